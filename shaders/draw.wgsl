// draw: bring the parts of argmax together, and make the likeliest token the row of the next step.
//
//   drawn[t] = id, logit m, sum_v e^(logit_v - m), NaN or +inf seen          over the whole vocabulary
//   rows[t]  = id at the next position of the same sequence
//
// grid      T workgroups, a lane for each part
// in        parts  4u32  [T, PARTS]
// in/out    rows   Row   [T]
// out       drawn  4u32  [T]
// override  PARTS
// requires  PARTS at most 64
// twin      src/ops/draw.rs
#import row
#import exp
override PARTS: u32;
@group(0) @binding(0) var<storage, read> parts: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> rows: array<Row>;
@group(0) @binding(2) var<storage, read_write> drawn: array<vec4<u32>>;

var<workgroup> found: array<vec4<u32>, 64>;
var<workgroup> shares: array<f32, 64>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let t = group.x;
    if lane < PARTS {
        found[lane] = parts[t * PARTS + lane];
    }
    workgroupBarrier(); // all parts are here
    // Every lane looks for the best one. Parts come in the order of ids: of equal logits the first one stays.
    var best = found[0];
    for (var p = 1u; p < PARTS; p++) {
        if bitcast<f32>(found[p].y) > bitcast<f32>(best.y) {
            best = found[p];
        }
    }
    if lane < PARTS {
        shares[lane] = bitcast<f32>(found[lane].z) * exp_f32(bitcast<f32>(found[lane].y) - bitcast<f32>(best.y));
    }
    workgroupBarrier(); // all shares of the sum are there
    if lane == 0u {
        var sum = 0.0;
        var seen = 0u;
        for (var p = 0u; p < PARTS; p++) {
            sum += shares[p];
            seen |= found[p].w;
        }
        drawn[t] = vec4<u32>(best.x, best.y, bitcast<u32>(sum), seen);
        rows[t].token = best.x;
        rows[t].position += 1u;
    }
}
