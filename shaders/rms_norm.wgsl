// rms_norm: bring each row to unit root mean square, then apply a gain.
//
//   y[t,d] = x[t,d] * g[d] / sqrt(mean_d(x[t,d]^2) + EPS)
//
// grid      T workgroups, one per row
// in        x  f32   [T, D]
//           g  bf16  [D]        packed two per word, even index in the low half
// out       y  f32   [T, D]     may not alias x
// override  D, EPS
// slots     lanes, reduce
// requires  D a multiple of 4
// twin      src/ops/rms_norm.rs
#import norm
#import bf16
override D: u32;
@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> g: array<vec2<u32>>;
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>;

@compute @workgroup_size(LANES * WARPS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.x * (D / 4u);
    var share = 0.0;
    for (var i = lane * 4u; i < D / 4u; i += LANES * WARPS * 4u) {
        for (var q = i; q < min(i + 4u, D / 4u); q++) {
            share = squares(x[row + q], share);
        }
    }
    let scale = inverse_rms(share, D, lane);
    for (var i = lane; i < D / 4u; i += LANES * WARPS) {
        y[row + i] = x[row + i] * scale * bf16x4(g[i].x, g[i].y);
    }
}
