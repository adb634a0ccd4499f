// dot8: the one inner product of every matmul. Eight products in index order, scaled, then added to the lane's sum;
// every step is an explicit fma, so that the order is ours and not the compiler's.
fn dot8(w: Weight8, xa: vec4<f32>, xb: vec4<f32>, sum: f32) -> f32 {
    var s = w.a.x * xa.x;
    s = fma(w.a.y, xa.y, s);
    s = fma(w.a.z, xa.z, s);
    s = fma(w.a.w, xa.w, s);
    s = fma(w.b.x, xb.x, s);
    s = fma(w.b.y, xb.y, s);
    s = fma(w.b.z, xb.z, s);
    s = fma(w.b.w, xb.w, s);
    return fma(s, w.scale, sum);
}
