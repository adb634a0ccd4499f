// rms_norm: bring each row to unit root mean square, then apply a gain.
//
//   y[t,d] = x[t,d] * g[d] / sqrt(mean_d(x[t,d]^2) + EPS)
//
// grid      T workgroups, one per row
// in        x  f32   [T, D]
//           g  bf16  [D]        packed two per word, even index in the low half
// out       y  f32   [T, D]     may not alias x
// override  D, EPS
// requires  D even
// twin      src/ops/rms_norm.rs
#import bf16
override D: u32;
override EPS: f32;
const WG = 256u;
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> g: array<u32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

var<workgroup> partial: array<f32, WG>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.x * D;
    var sum = 0.0;
    for (var d = lane; d < D; d += WG) {
        let v = x[row + d];
        sum = fma(v, v, sum);
    }
    // A tree of fixed shape: the same bits whatever the subgroup size. Many lanes, since one row is all there is to do.
    for (var stride = WG / 2u; stride > 0u; stride /= 2u) {
        partial[lane] = sum;
        workgroupBarrier(); // all lanes have written
        if lane < stride {
            sum += partial[lane + stride];
        }
        workgroupBarrier(); // all lanes have read before the next round overwrites
    }
    if lane == 0u {
        partial[0] = 1.0 / sqrt(sum / f32(D) + EPS);
    }
    workgroupBarrier(); // lane 0's result is there
    let scale = partial[0];
    for (var d = lane; d < D; d += WG) {
        y[row + d] = x[row + d] * scale * bf16_pick(g[d / 2u], d);
    }
}
