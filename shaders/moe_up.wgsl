// moe_up: each token through the first matrix of its experts, and the clamped SwiGLU.
//
//   g = bias[e, 2f]   + sum_k w[e, 2f, k] h[t,k]          e = experts[t,a]
//   u = bias[e, 2f+1] + sum_k w[e, 2f+1, k] h[t,k]
//   y[t,a,f] = gate sigmoid(ALPHA gate) (up + 1),   gate = min(g, LIMIT), up = clamp(u, -LIMIT, LIMIT)
//
// grid      ceil(F / 8) x T A workgroups: eight lanes an output
// in        experts  u32   [T, A]
//           h        f32   [T, K]
//           w        slot  [COUNT, 2F, K]     experts FIRST.. of the layer; gate and up rows interleaved
//           bias     slot  [E, 2F]
// out       y        f32   [T, A, F]          routes to other parts' experts are left alone
// override  K, F, A, FIRST, COUNT, LIMIT, ALPHA
// slots     weights, bias, reduce
// requires  K a multiple of 8
// twin      src/ops/moe_up.rs
#import weights
#import bias
#import dot8
#import reduce
#import exp
override K: u32;
override F: u32;
override A: u32;
override FIRST: u32;
override COUNT: u32;
override LIMIT: f32;
override ALPHA: f32;
@group(0) @binding(4) var<storage, read> experts: array<u32>;
@group(0) @binding(5) var<storage, read> h: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let f = group.x * 8u + lane / 8u;
    let t = group.y / A;
    let expert = experts[group.y];
    let part = expert - FIRST; // wraps to a large number for an expert before this part
    let row = min(part, COUNT - 1u) * F + min(f, F - 1u);
    var gate = 0.0;
    var up = 0.0;
    for (var i = lane % 8u; i < K / 8u; i += 8u) {
        let at = t * (K / 4u) + i * 2u;
        let a = h[at];
        let b = h[at + 1u];
        gate = dot8(weight8(row * 2u, K / 8u, i), a, b, gate);
        up = dot8(weight8(row * 2u + 1u, K / 8u, i), a, b, up);
    }
    gate = reduce8(gate, lane);
    up = reduce8(up, lane);
    if lane % 8u == 0u && f < F && part < COUNT {
        let at = (expert * F + f) * 2u;
        let g0 = gate + bias_at(at);
        let u0 = up + bias_at(at + 1u);
        let g = min(g0, LIMIT);
        let u = clamp(u0, -LIMIT, LIMIT);
        let activated = g / (1.0 + exp_f32(-(ALPHA * g))) * (u + 1.0);
        // min and clamp turn a NaN into the limit on some GPUs (an H100 does, written as select too): ask the bits.
        y[group.y * F + f] = select(activated, g0 + u0, is_nan(g0) || is_nan(u0));
    }
}
