//! E8M0, the power-of-two block scale of MXFP4: code c means 2^(c-127); 255 is NaN; there is no zero and no sign.

/// The value of a code. Code 0 is 2^-127, a subnormal f32 that a GPU may flush to zero; code 255 is NaN.
pub const fn decode(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits((code as u32) << 23),
    }
}

/// The code of a power of two from 2^-127 to 2^127; `None` for every other number, NaN too.
pub fn encode(x: f32) -> Option<u8> {
    (0..255).find(|&code| decode(code) == x)
}

/// The scale of a block whose largest magnitude is `amax`, for elements whose largest power of two is `2^emax`
/// (2 for E2M1): 2^(floor(log2 amax) - emax), clamped to what a code can say. A block of zeros gets code 0.
///
/// This is the rule of the OCP MX specification 1.0, section 6.3. Elements above `MAX * scale` then saturate; writers
/// that avoid this take the ceiling of log2(amax / MAX) instead (DeepSeek-V4), which needs no other decoder.
///
/// # Panics
/// If `amax` is negative, infinite or NaN: callers refuse such blocks first.
pub fn from_amax(amax: f32, emax: i32) -> u8 {
    assert!(amax.is_finite() && amax >= 0.0, "the largest magnitude of a block is finite, got {amax}");
    if amax == 0.0 {
        return 0;
    }
    // Every f32, subnormal or not, is a normal f64, so the exponent field is floor(log2).
    let floor_log2 = (f64::from(amax).to_bits() >> 52) as i32 - 1023;
    (floor_log2 - emax + 127).clamp(0, 254) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_powers_of_two_have_codes() {
        assert_eq!([1.0, 0.015625, 2.0f32.powi(127), 2.0f32.powi(-127)].map(encode), [127, 121, 254, 0].map(Some));
        assert_eq!([0.0, -1.0, 1.5, 2.0f32.powi(-128), f32::INFINITY, f32::NAN].map(encode), [None; 6]);
    }

    #[test]
    fn the_scale_follows_the_largest_magnitude() {
        assert_eq!([4.0, 7.99, 8.0, 1.0, 0.0].map(|a| from_amax(a, 2)), [127, 127, 128, 125, 0]);
        assert_eq!([f32::MAX, f32::from_bits(1), f32::MIN_POSITIVE].map(|a| from_amax(a, 2)), [252, 0, 0]);
    }
}
