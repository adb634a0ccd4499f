// e4m3: sign, four exponent bits (bias 7), three mantissa bits; subnormals are multiples of 2^-9. Codes 0x7f and 0xff
// are NaN and are refused at load; here they count as 480.
fn e4m3(code: u32) -> f32 {
    let exponent = (code >> 3u) & 15u;
    let mantissa = code & 7u;
    let normal = bitcast<f32>(((exponent + 120u) << 23u) | (mantissa << 20u));
    let magnitude = select(normal, f32(mantissa) * 0.001953125, exponent == 0u);
    return bitcast<f32>(bitcast<u32>(magnitude) | ((code & 128u) << 24u));
}

// The four codes of a word.
fn e4m3x4(word: u32) -> vec4<f32> {
    return vec4<f32>(e4m3(word), e4m3(word >> 8u), e4m3(word >> 16u), e4m3(word >> 24u));
}
