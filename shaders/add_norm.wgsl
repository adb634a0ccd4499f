// add_norm: put a stage's output back into the residual stream, and bring the sum to unit root mean square.
//
//   x[t,d] = x[t,d] + addend[t,d]
//   h[t,d] = x[t,d] * g[d] / sqrt(mean_d(x[t,d]^2) + EPS)
//
// grid      T workgroups, one per row
// in        addend  slot  rows as they are, or the weighted sum of a token's routes
//           g       bf16  [D]
// in/out    x       f32   [T, D]
// out       h       f32   [T, D]
// override  D, EPS; A where the addend is summed
// slots     addend, lanes, reduce
// requires  D a multiple of 4
// twin      src/ops/add_norm.rs
//
// The same bits as moe_scatter, add and rms_norm one after the other: the same products and sums in the same order.
#import lanes
#import norm
#import bf16
#import addend
override D: u32;
override EPS: f32;
const WG = LANES * 8u;
@group(0) @binding(0) var<storage, read_write> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> g: array<vec2<u32>>;
@group(0) @binding(2) var<storage, read_write> h: array<vec4<f32>>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.x * (D / 4u);
    var share = 0.0;
    for (var n = 0u; n * WG < D / 4u; n++) { // as often for every lane, so that all is loaded at once
        let i = n * WG + lane;
        if i < D / 4u {
            let sum = x[row + i] + addend(group.x, i, D / 4u);
            x[row + i] = sum;
            share = squares(sum, share);
        }
    }
    let scale = inverse_rms(share, lane);
    for (var n = 0u; n * WG < D / 4u; n++) {
        let i = n * WG + lane;
        if i < D / 4u {
            h[row + i] = x[row + i] * scale * bf16x4(g[i].x, g[i].y); // a lane reads what it wrote itself
        }
    }
}
