// Fills slot `e2m1`: codes 0..7 are 0 .5 1 1.5 2 3 4 6, 8..15 their negatives. Twice the value is one nibble of the
// constant. For adapters that flush subnormal halves.
const E2M1_UNIT = 1.0;

struct E2m1x8 {
    a: vec4<f32>,
    b: vec4<f32>,
}

fn e2m1(code: u32) -> f32 {
    let twice = f32((0xc8643210u >> ((code & 7u) * 4u)) & 15u);
    return bitcast<f32>(bitcast<u32>(twice * 0.5) | ((code & 8u) << 28u));
}

// The eight codes of a word, lowest nibble first, each times 1 / E2M1_UNIT.
fn e2m1x8(w: u32) -> E2m1x8 {
    return E2m1x8(
        vec4<f32>(e2m1(w), e2m1(w >> 4u), e2m1(w >> 8u), e2m1(w >> 12u)),
        vec4<f32>(e2m1(w >> 16u), e2m1(w >> 20u), e2m1(w >> 24u), e2m1(w >> 28u)),
    );
}

// The same of a word of weights, laid out so that few masks and shifts take it apart: see e2m1_half.
fn e2m1x8_laid_out(w: u32) -> E2m1x8 {
    return E2m1x8(
        vec4<f32>(e2m1_of(w >> 9u, w >> 15u), e2m1_of(w >> 1u, w >> 7u), e2m1_of(w >> 12u, w >> 8u), e2m1_of(w >> 4u, w)),
        vec4<f32>(
            e2m1_of(w >> 25u, w >> 31u),
            e2m1_of(w >> 17u, w >> 23u),
            e2m1_of(w >> 28u, w >> 24u),
            e2m1_of(w >> 20u, w >> 16u),
        ),
    );
}

// Exponent and mantissa in the low three bits of one word, the sign in the lowest of another.
fn e2m1_of(magnitude: u32, sign: u32) -> f32 {
    return e2m1((magnitude & 7u) | ((sign & 1u) << 3u));
}
