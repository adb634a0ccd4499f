// moe_scatter: the weighted sum of a token's expert outputs.
//
//   y[t,d] = sum_a weights[t,a] x[t,a,d]          a in order
//
// grid      ceil(D / 64) x T workgroups
// in        weights  f32  [T, A]
//           x        f32  [T, A, D]
// out       y        f32  [T, D]
// override  A, D
// twin      src/ops/moe_scatter.rs
#import first_route
override A: u32;
override D: u32;
@group(0) @binding(0) var<storage, read> weights: array<f32>;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let d = group.x * 64u + lane;
    let t = group.y;
    if d < D {
        var sum = first_route(weights[t * A], x[t * A * D + d]);
        for (var a = 1u; a < A; a++) {
            sum = fma(weights[t * A + a], x[(t * A + a) * D + d], sum);
        }
        y[t * D + d] = sum;
    }
}
