// draw: bring the parts of argmax together, draw a token by the sequence's rule, and make it the row of the next step.
//
//   drawn[t] = id, logit_id - m, sum_v e^(logit_v - m), NaN or +inf seen          m the largest logit of the whole vocabulary
//   rows[t]  = id at the next position of the same sequence
//
// The token is the likeliest one or, where SAMPLED and the rule says so, the one where the running sum of weights passes a random
// share of all: by the sums of weigh, and where they pass it by id.
//
// grid      rows workgroups
// in        logits  f32   [T, V]
//           powers  2u32  [512]
//           rules   Rule  [S]
//           parts   4u32  [T, PARTS]     of argmax
//           kept    Kept  [T]
//           sums    2u32  [rows, SPANS, 256]     of weigh
// in/out    rows    Row   [T]
// out       drawn   4u32  [T]
// override  V, PARTS, SPANS, ROW, SAMPLED; ROW: the first of the rows; not SAMPLED: neither kept nor sums are there
// requires  PARTS and SPANS at most 64
// twin      src/ops/draw.rs
#import row
#import exp
#import order
#import passes
#import philox
override V: u32;
override PARTS: u32;
override SPANS: u32;
override ROW: u32;
override SAMPLED: bool;
@group(0) @binding(3) var<storage, read> parts: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> kept: array<Kept>;
@group(0) @binding(5) var<storage, read> sums: array<vec2<u32>>;
@group(0) @binding(6) var<storage, read_write> rows: array<Row>;
@group(0) @binding(7) var<storage, read_write> drawn: array<vec4<u32>>;

var<workgroup> found: array<vec4<u32>, 64>;
var<workgroup> shares: array<f32, 64>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let t = ROW + group.x;
    if lane < PARTS {
        found[lane] = parts[t * PARTS + lane];
    }
    workgroupBarrier(); // all parts are here
    let next = rows[t];
    // A bound that the compiler does not know keeps the code short: it runs once, and has to be fetched first.
    let end = PARTS + next.pad;
    // Every lane looks for the best one. Parts come in the order of ids: of equal logits the first one stays.
    var most = order(found[0].y);
    var first = 0u;
    for (var p = 1u; p < end; p++) {
        if order(found[p].y) > most {
            most = order(found[p].y);
            first = p;
        }
    }
    let best = found[first];
    if lane < PARTS {
        let share = bitcast<f32>(found[lane].z) * exp_f32(bitcast<f32>(found[lane].y) - bitcast<f32>(best.y));
        shares[lane] = select(share, 0.0, found[lane].z == 0u);
    }
    var id = best.x;
    var logit = bitcast<f32>(best.y);
    if SAMPLED {
        let rule = rules[next.sequence];
        let known = kept[t];
        var own = vec2<u32>(0u);
        if rule.sharp != 0.0 {
            own = over_spans(lane, group.x);
        }
        let sum = running(lane, own);
        find(lane, own, sum, scaled(philox(rule.seed, rule.stream, next.position + 1u), runs[WG - 1u]));
        find_token(lane, group.x, rule, known, place, 16u, t);
        if place < WG {
            id = token;
            logit = bitcast<f32>(logits[t * V + id]);
        }
    }
    workgroupBarrier(); // all shares of the sum are there, and all lanes know the row
    if lane == 0u {
        var sum = 0.0;
        var seen = 0u;
        for (var p = 0u; p < end; p++) {
            sum += shares[p];
            seen |= found[p].w;
        }
        drawn[t] = vec4<u32>(id, bitcast<u32>(logit - bitcast<f32>(best.y)), bitcast<u32>(sum), seen);
        rows[t].token = id;
        rows[t].position += 1u;
    }
}
