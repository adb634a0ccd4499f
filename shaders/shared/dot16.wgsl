// dot16: the one inner product of every matmul. Sixteen products in index order, then scaled; every step is an explicit
// fma, so that the order is ours and not the compiler's. Only the last product may become one fma with what it is added to: see
// `fold`.
#import sixteen
fn dot4(w: vec4<f32>, x: vec4<f32>, sum: f32) -> f32 {
    return fma(w.w, x.w, fma(w.z, x.z, fma(w.y, x.y, fma(w.x, x.x, sum))));
}

fn dot16(w: Sixteen, x: Sixteen) -> f32 {
    return dot4(w.d, x.d, dot4(w.c, x.c, dot4(w.b, x.b, dot4(w.a, x.a, 0.0)))) * (w.scale * x.scale);
}

// Inputs in the inverse of the units in which the weights and they themselves were decoded: powers of two, so that each
// product is what it should be, to the bit. Zeros for a lane that has none (NaN where its row ends in an infinity).
fn in_units(x: Sixteen, there: bool) -> Sixteen {
    let unit = select(0.0, WEIGHT_UNIT * INPUT_UNIT, there);
    return Sixteen(x.a * unit, x.b * unit, x.c * unit, x.d * unit, x.scale);
}
