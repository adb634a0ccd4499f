// moe_down: each route through the second matrix of its expert. Not weighted yet: see moe_scatter.
//
//   y[t,a,d] = bias[e,d] + scale_d scale_x sum_k w[e,d,k] x[t,a,k]          e = experts[t,a]
//
// grid      ceil(D / 16) x T A workgroups: LANES lanes for two outputs, which share what is read of x
// in        experts  u32   [T, A]
//           x        slot  [T, A, K]
//           w        slot  [COUNT, D, K]     experts FIRST.. of the layer
//           bias     slot  [E, D]
// out       y        f32   [T, A, D]         routes to other parts' experts are left alone
// override  K, D, FIRST, COUNT
// slots     weights, e2m1, input, bias, lanes, reduce
// requires  K a multiple of 16
// twin      src/ops/moe_down.rs
#import weights
#import input
#import bias
#import dot16
#import reduce
override K: u32;
override D: u32;
override FIRST: u32;
override COUNT: u32;
const ROWS = 2u;
@group(0) @binding(5) var<storage, read> experts: array<u32>;
@group(0) @binding(6) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(LANES * 8u)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let d0 = (group.x * 8u + lane / LANES) * ROWS;
    let expert = experts[group.y];
    let part = expert - FIRST; // wraps to a large number for an expert before this part
    let base = min(part, COUNT - 1u) * D;
    var sums: array<f32, ROWS>;
    for (var i = lane % LANES; i < K / 16u; i += LANES) {
        let x = in_units(input_at(group.y, K / 16u, i));
        for (var r = 0u; r < ROWS; r++) {
            // Past the end the last row again, for nothing.
            sums[r] = dot16(weight_at(base + min(d0 + r, D - 1u), K / 16u, i), x, sums[r]);
        }
    }
    for (var r = 0u; r < ROWS; r++) {
        let d = d0 + r;
        let sum = reduce(sums[r], lane);
        if lane % LANES == 0u && d < D && part < COUNT {
            y[group.y * D + d] = fma(sum, row_scale(base + d) * input_scale(group.y), bias_at(expert * D + d));
        }
    }
}
