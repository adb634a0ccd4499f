// e2m1: codes 0..7 are 0 .5 1 1.5 2 3 4 6, 8..15 their negatives. Twice the value is one nibble of the constant.
fn e2m1(code: u32) -> f32 {
    let twice = f32((0xc8643210u >> ((code & 7u) * 4u)) & 15u);
    return bitcast<f32>(bitcast<u32>(twice * 0.5) | ((code & 8u) << 28u));
}

// Four codes of a word, from bit `shift` on.
fn e2m1x4(word: u32, shift: u32) -> vec4<f32> {
    let w = word >> shift;
    return vec4<f32>(e2m1(w), e2m1(w >> 4u), e2m1(w >> 8u), e2m1(w >> 12u));
}
