// router: the A experts with the largest scores, and their weights.
//
//   experts[t,:] = the A largest of scores[t,:], largest first, the lower index first among equals
//   weights[t,a] = softmax over those A scores, or over all E where ALL is 1
//
// grid      T workgroups
// in        scores   f32  [T, E]
// out       experts  u32  [T, A]
//           weights  f32  [T, A]
// override  E, A, ALL
// requires  A <= 16, A <= E <= 1024
// twin      src/ops/router.rs
#import exp
override E: u32;
override A: u32;
override ALL: u32;
const WG = 64u;
const MAX_A = 16u;
@group(0) @binding(0) var<storage, read> scores: array<f32>;
@group(0) @binding(1) var<storage, read_write> experts: array<u32>;
@group(0) @binding(2) var<storage, read_write> weights: array<f32>;

var<workgroup> held: array<f32, 1024>;
var<workgroup> chosen: array<u32, MAX_A>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.x * E;
    if lane < MAX_A {
        chosen[lane] = 0u; // NaN scores have no rank: they must still name an expert that exists
    }
    for (var e = lane; e < E; e += WG) {
        held[e] = scores[row + e];
    }
    workgroupBarrier(); // `chosen` is clear, and all scores are here
    // An expert's rank is the number of experts before it; the ranks are distinct, so no two lanes write one place.
    for (var e = lane; e < E; e += WG) {
        let s = held[e];
        var rank = 0u;
        for (var o = 0u; o < E; o++) {
            let other = held[o];
            if other > s || (other == s && o < e) {
                rank++;
            }
        }
        if rank < A {
            chosen[rank] = e;
        }
    }
    workgroupBarrier(); // `chosen` is whole
    if lane < A {
        let top = held[chosen[0]];
        var total = 0.0;
        for (var a = 0u; a < A; a++) {
            total += exp_f32(held[chosen[a]] - top);
        }
        if ALL == 1u {
            total = 0.0;
            for (var e = 0u; e < E; e++) {
                total += exp_f32(held[e] - top);
            }
        }
        experts[group.x * A + lane] = chosen[lane];
        weights[group.x * A + lane] = exp_f32(held[chosen[lane]] - top) / total;
    }
}
