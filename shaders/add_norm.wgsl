// add_norm: put a stage's output back into the residual stream, and bring the sum to unit root mean square.
//
//   sum[t,d] = x[t,d] + addend[t,d]
//   h[t,d]   = sum[t,d] * g[d] / sqrt(mean_d(sum[t,d]^2) + EPS)
//
// grid      T workgroups, one per row
// in        addend  slot  rows as they are, or the weighted sum of a token's routes
//           g       bf16  [D]
//           x       f32   [T, D]
// out       sum     f32   [T, D]     may not alias x
//           h       f32   [T, D]
// override  D, EPS; A where the addend is summed
// slots     addend, lanes, reduce
// requires  D a multiple of 4
// twin      src/ops/add_norm.rs
//
// The same bits as moe_scatter, add and rms_norm one after the other: the same products and sums in the same order.
#import norm
#import bf16
#import addend
override D: u32;
@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> g: array<vec2<u32>>;
@group(0) @binding(2) var<storage, read_write> h: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> sum: array<vec4<f32>>;

@compute @workgroup_size(LANES * WARPS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.x * (D / 4u);
    var share = 0.0;
    // The last four that the lane has: mostly the only ones.
    var own: array<vec4<f32>, 4>;
    for (var i = lane * 4u; i < D / 4u; i += LANES * WARPS * 4u) {
        for (var q = 0u; q < 4u; q++) {
            let at = min(i + q, D / 4u - 1u);
            own[q] = x[row + at] + addend(group.x, at, D / 4u);
        }
        for (var q = 0u; q < 4u; q++) {
            if i + q < D / 4u {
                sum[row + i + q] = own[q];
                share = squares(own[q], share);
            }
        }
    }
    let scale = inverse_rms(share, D, lane);
    for (var i = lane * 4u; i < D / 4u; i += LANES * WARPS * 4u) {
        var gains: array<vec2<u32>, 4>;
        for (var q = 0u; q < 4u; q++) {
            gains[q] = g[min(i + q, D / 4u - 1u)];
        }
        for (var q = 0u; q < 4u; q++) {
            if i + q < D / 4u {
                var v = own[q];
                if i + LANES * WARPS * 4u < D / 4u {
                    v = sum[row + i + q]; // which this lane wrote
                }
                h[row + i + q] = v * scale * bf16x4(gains[q].x, gains[q].y);
            }
        }
    }
}
