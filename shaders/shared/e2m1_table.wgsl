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
