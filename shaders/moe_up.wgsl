// moe_up: each token through the first matrix of its experts, and the gated activation.
//
//   g = bias[e, gate] + scale_gate scale_x sum_k w[e, gate, k] x[i,k]          e = experts[t,a], i = (t A + a) / SHARE
//   u = bias[e, up]   + scale_up   scale_x sum_k w[e, up, k]   x[i,k]          gate = f STRIDE, up = f STRIDE + UP
//   y[t,a,f] = glu(g, u)
//
// grid      ceil(F / 8) x T A workgroups: LANES lanes an output
// in        experts  u32   [T, A]
//           x        slot  [T A / SHARE, K]     SHARE routes read one row
//           w        slot  [COUNT, 2F, K]       experts FIRST.. of the layer
//           bias     slot  [E, 2F]
// out       y        f32   [T, A, F]            routes to other parts' experts are left alone
// override  K, F, SHARE, FIRST, COUNT, STRIDE, UP          gate and up rows interleaved: 2, 1; in halves: 1, F
// slots     weights, e2m1, input, bias, glu, lanes, reduce
// requires  K a multiple of 16
// twin      src/ops/moe_up.rs
#import weights
#import input
#import bias
#import glu
#import dot16
#import reduce
override K: u32;
override F: u32;
override SHARE: u32;
override FIRST: u32;
override COUNT: u32;
override STRIDE: u32;
override UP: u32;
@group(0) @binding(5) var<storage, read> experts: array<u32>;
@group(0) @binding(6) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(LANES * 8u)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let f = group.x * 8u + lane / LANES;
    let expert = experts[group.y];
    let part = expert - FIRST; // wraps to a large number for an expert before this part
    let gate_row = min(part, COUNT - 1u) * F * 2u + min(f, F - 1u) * STRIDE;
    let up_row = gate_row + UP;
    let source = group.y / SHARE;
    var gate = 0.0;
    var up = 0.0;
    for (var i = lane % LANES; i < K / 16u; i += LANES) {
        let x = in_units(input_at(source, K / 16u, i));
        gate = dot16(weight_at(gate_row, K / 16u, i), x, gate);
        up = dot16(weight_at(up_row, K / 16u, i), x, up);
    }
    gate = reduce(gate, lane);
    up = reduce(up, lane);
    if lane % LANES == 0u && f < F && part < COUNT {
        let at = expert * F * 2u + f * STRIDE;
        let scale = input_scale(source);
        let g = fma(gate, row_scale(gate_row) * scale, bias_at(at));
        let u = fma(up, row_scale(up_row) * scale, bias_at(at + UP));
        y[group.y * F + f] = glu(g, u);
    }
}
