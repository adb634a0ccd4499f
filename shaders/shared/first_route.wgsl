// first_route: what the first of a token's routes adds. The choice keeps the product apart: without one, compilers make one fma of
// it and what it is added to, or of the next product and it, in one kernel and not in another. It is never a negative zero.
fn first_route(weight: f32, y: f32) -> f32 {
    let product = weight * y;
    return select(product, 0.0, product == 0.0);
}
