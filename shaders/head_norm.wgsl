// head_norm: bring each query head and each key head to unit root mean square, then apply a gain, in place.
//
//   x[t,h,d] = x[t,h,d] * g[d] / sqrt(mean_d(x[t,h,d]^2) + EPS)          g = q_gain for h < H, k_gain for the next HK
//
// grid      (H + HK) x T workgroups, one per head and row
// in        q_gain  bf16  [DH]
//           k_gain  bf16  [DH]
// in/out    x       f32   [T, H + 2 HK, DH]     values, the last HK heads, are left alone
// override  H, HK, DH, EPS
// requires  DH even
// twin      src/ops/head_norm.rs
#import bf16
override H: u32;
override HK: u32;
override DH: u32;
override EPS: f32;
const WG = 64u;
@group(0) @binding(0) var<storage, read> q_gain: array<u32>;
@group(0) @binding(1) var<storage, read> k_gain: array<u32>;
@group(0) @binding(2) var<storage, read_write> x: array<f32>;

var<workgroup> partial: array<f32, WG>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = (group.y * (H + 2u * HK) + group.x) * DH;
    var sum = 0.0;
    for (var d = lane; d < DH; d += WG) {
        let v = x[row + d];
        sum = fma(v, v, sum);
    }
    partial[lane] = sum;
    workgroupBarrier(); // all partial sums are there
    if lane == 0u {
        var total = 0.0;
        for (var i = 0u; i < WG; i++) {
            total += partial[i];
        }
        partial[0] = 1.0 / sqrt(total / f32(DH) + EPS);
    }
    workgroupBarrier(); // lane 0's result is there
    let scale = partial[0];
    for (var d = lane; d < DH; d += WG) {
        let gain = select(bf16_pick(k_gain[d / 2u], d), bf16_pick(q_gain[d / 2u], d), group.x < H);
        x[row + d] = x[row + d] * scale * gain;
    }
}
