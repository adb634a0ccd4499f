// draw: bring the parts of argmax together, and make the likeliest token the row of the next step.
//
//   drawn[t] = id, logit m, sum_v e^(logit_v - m), NaN or +inf seen          over the whole vocabulary
//   rows[t]  = id at the next position of the same sequence
//
// grid      ceil(T / 64) workgroups, a lane a row
// in        parts  4u32  [T, PARTS]
// in/out    rows   Row   [T]
// out       drawn  4u32  [T]
// override  PARTS
// twin      src/ops/draw.rs
#import step
#import row
#import exp
override PARTS: u32;
@group(0) @binding(1) var<storage, read> parts: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> rows: array<Row>;
@group(0) @binding(3) var<storage, read_write> drawn: array<vec4<u32>>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let t = id.x;
    if t < step.tokens {
        var best = parts[t * PARTS];
        for (var p = 1u; p < PARTS; p++) {
            let part = parts[t * PARTS + p];
            // Parts come in the order of ids: of equal logits the first one stays.
            if bitcast<f32>(part.y) > bitcast<f32>(best.y) {
                best.x = part.x;
                best.y = part.y;
            }
        }
        var sum = 0.0;
        var seen = 0u;
        for (var p = 0u; p < PARTS; p++) {
            let part = parts[t * PARTS + p];
            sum = fma(bitcast<f32>(part.z), exp_f32(bitcast<f32>(part.y) - bitcast<f32>(best.y)), sum);
            seen |= part.w;
        }
        drawn[t] = vec4<u32>(best.x, best.y, bitcast<u32>(sum), seen);
        rows[t].token = best.x;
        rows[t].position += 1u;
    }
}
