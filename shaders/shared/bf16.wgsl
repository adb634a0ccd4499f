// bf16: two values a word, the even index in the low half. A bf16 is the upper half of an f32.
fn bf16_lo(word: u32) -> f32 {
    return bitcast<f32>(word << 16u);
}

fn bf16_hi(word: u32) -> f32 {
    return bitcast<f32>(word & 0xffff0000u);
}

fn bf16x4(x: u32, y: u32) -> vec4<f32> {
    return vec4<f32>(bf16_lo(x), bf16_hi(x), bf16_lo(y), bf16_hi(y));
}

// Element i of a packed array, given the word that holds it.
fn bf16_pick(word: u32, i: u32) -> f32 {
    return select(bf16_lo(word), bf16_hi(word), (i & 1u) == 1u);
}

// Round to nearest, ties to even; NaN stays NaN.
fn bf16_round(v: f32) -> u32 {
    let bits = bitcast<u32>(v);
    if (bits & 0x7fffffffu) > 0x7f800000u {
        return (bits >> 16u) | 0x40u;
    }
    return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}
