// divide: a / b rounded to nearest even, for positive normal a and b, by long division of the significands. A driver's
// own division may be off by 2.5 ulp (Vulkan), which would move an FP4 code now and then; this one is the same everywhere.
// A quotient below 2^-126 becomes 0, one past f32's range infinity.
fn divide(a: f32, b: f32) -> f32 {
    var rest = (bitcast<u32>(a) & 0x7fffffu) | 0x800000u;
    let by = (bitcast<u32>(b) & 0x7fffffu) | 0x800000u;
    var exponent = i32(bitcast<u32>(a) >> 23u) - i32(bitcast<u32>(b) >> 23u) + 127;
    if rest < by {
        rest *= 2u;
        exponent -= 1;
    }
    var quotient = 0u; // 24 bits of the result and one for rounding
    for (var i = 0u; i < 25u; i++) {
        let fits = rest >= by;
        quotient = quotient * 2u + u32(fits);
        rest = (rest - select(0u, by, fits)) * 2u;
    }
    let odd = (quotient >> 1u) & 1u;
    let up = (quotient & 1u) & (odd | u32(rest != 0u));
    let significand = (quotient >> 1u) + up; // may carry into the exponent, which is then one more: as it should be
    if exponent < 1 {
        return 0.0;
    }
    let bits = (u32(exponent) << 23u) + (significand - 0x800000u);
    return bitcast<f32>(min(bits, 0x7f800000u));
}
