// norm: one over the root mean square of a row of WIDTH elements, whose sixteens lanes take in turn: element 16i..16i+16 is
// lane i's, then lane i + LANES WARPS's. Every lane of a workgroup of LANES WARPS must call `inverse_rms` with its share of
// the sum of squares, and more than once only with a barrier between.
#import warps
#import reduce
override EPS: f32;
var<workgroup> norm_parts: array<f32, 8>;

fn inverse_rms(share: f32, width: u32, lane: u32) -> f32 {
    let part = reduce(share, lane);
    if lane % LANES == 0u {
        norm_parts[lane / LANES] = part;
    }
    workgroupBarrier(); // all parts are there
    var sum = 0.0;
    for (var i = 0u; i < WARPS; i++) {
        sum += norm_parts[i];
    }
    return 1.0 / sqrt(sum / f32(width) + EPS);
}

fn squares(v: vec4<f32>, sum: f32) -> f32 {
    return fma(v.w, v.w, fma(v.z, v.z, fma(v.y, v.y, fma(v.x, v.x, sum))));
}
