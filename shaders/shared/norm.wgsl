// norm: one over the root mean square of a row, from each lane's share of the sum of squares. Every lane of a workgroup of
// 8 LANES must call it, and more than once only with a barrier between.
#import reduce
var<workgroup> norm_parts: array<f32, 8>;

fn inverse_rms(share: f32, lane: u32) -> f32 {
    let part = reduce(share, lane);
    if lane % LANES == 0u {
        norm_parts[lane / LANES] = part;
    }
    workgroupBarrier(); // all eight parts are there
    var sum = 0.0;
    for (var i = 0u; i < 8u; i++) {
        sum += norm_parts[i];
    }
    return 1.0 / sqrt(sum / f32(D) + EPS);
}

fn squares(v: vec4<f32>, sum: f32) -> f32 {
    return fma(v.w, v.w, fma(v.z, v.z, fma(v.y, v.y, fma(v.x, v.x, sum))));
}
