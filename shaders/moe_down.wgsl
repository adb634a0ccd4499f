// moe_down: each route through the second matrix of its expert. Not weighted yet: see moe_scatter.
//
//   y[t,a,d] = bias[e,d] + sum_k w[e,d,k] x[t,a,k]          e = experts[t,a]
//
// grid      ceil(D / 8) x T A workgroups: eight lanes an output
// in        experts  u32   [T, A]
//           x        f32   [T, A, K]
//           w        slot  [COUNT, D, K]     experts FIRST.. of the layer
//           bias     slot  [E, D]
// out       y        f32   [T, A, D]         routes to other parts' experts are left alone
// override  K, D, FIRST, COUNT
// slots     weights, bias, reduce
// requires  K a multiple of 8
// twin      src/ops/moe_down.rs
#import weights
#import bias
#import dot8
#import reduce
override K: u32;
override D: u32;
override FIRST: u32;
override COUNT: u32;
@group(0) @binding(4) var<storage, read> experts: array<u32>;
@group(0) @binding(5) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let d = group.x * 8u + lane / 8u;
    let expert = experts[group.y];
    let part = expert - FIRST; // wraps to a large number for an expert before this part
    let row = min(part, COUNT - 1u) * D + min(d, D - 1u);
    var sum = 0.0;
    for (var i = lane % 8u; i < K / 8u; i += 8u) {
        let at = group.y * (K / 4u) + i * 2u;
        sum = dot8(weight8(row, K / 8u, i), x[at], x[at + 1u], sum);
    }
    sum = reduce8(sum, lane);
    if lane % 8u == 0u && d < D && part < COUNT {
        y[group.y * D + d] = sum + bias_at(expert * D + d);
    }
}
