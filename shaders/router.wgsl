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
#import scores
@group(0) @binding(0) var<storage, read> scores: array<f32>;
@group(0) @binding(1) var<storage, read_write> experts: array<u32>;
@group(0) @binding(2) var<storage, read_write> weights: array<f32>;
const WG = 64u;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    choose(group.x, 1u, lane, WG);
    if lane < A {
        experts[group.x * A + lane] = chosen[lane];
        weights[group.x * A + lane] = weight_of(0u, lane);
    }
}
