// dot8: the one inner product of every matmul. Eight products in index order, scaled, then added to the lane's sum;
// every step is an explicit fma, so that the order is ours and not the compiler's.
fn dot8(w: Weight8, x: Input8, sum: f32) -> f32 {
    var s = w.a.x * x.a.x;
    s = fma(w.a.y, x.a.y, s);
    s = fma(w.a.z, x.a.z, s);
    s = fma(w.a.w, x.a.w, s);
    s = fma(w.b.x, x.b.x, s);
    s = fma(w.b.y, x.b.y, s);
    s = fma(w.b.z, x.b.z, s);
    s = fma(w.b.w, x.b.w, s);
    return fma(s, w.scale * x.scale, sum);
}
