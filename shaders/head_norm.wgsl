// head_norm: bring each query head and each key head to unit root mean square, then apply a gain, in place.
//
//   x[t,h,d] = x[t,h,d] * g[d] / sqrt(mean_d(x[t,h,d]^2) + EPS)          g = q_gain for h < H, k_gain for the next HK
//
// grid      (H + HK) x T workgroups, one per head and row
// in        q_gain  bf16  [DH]
//           k_gain  bf16  [DH]
// in/out    qkv     f32   [T, H + 2 HK, DH]     values, the last HK heads, are left alone
// override  H, HK, DH, EPS
// slots     lanes, reduce
// requires  DH a multiple of 4
// twin      src/ops/head_norm.rs
#import heads_normed

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * (H + 2u * HK) + group.x) * DH;
    let scale = scale_of_head(group.x, at, lane);
    for (var i = lane * 2u; i < DH / 2u; i += LANES * 2u) {
        put_four(at + i, scaled(group.x, at + i, i, scale));
    }
}
