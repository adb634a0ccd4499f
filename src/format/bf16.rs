//! bf16: the upper 16 bits of an f32.

/// The largest finite value, about 3.39e38.
pub const MAX: f32 = decode(0x7f7f);

/// The value of a bit pattern: exact.
pub const fn decode(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

/// The nearest bf16, ties to the even mantissa. Too large becomes infinity. NaN stays NaN: sign and upper payload bits
/// are kept and it is made quiet.
pub const fn encode(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// The value after a trip through bf16.
pub const fn round(x: f32) -> f32 {
    decode(encode(x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nan_with_only_low_payload_bits_stays_nan() {
        assert!(decode(encode(f32::from_bits(0x7f80_0001))).is_nan());
        assert!(decode(encode(f32::from_bits(0xffff_ffff))).is_nan());
    }

    #[test]
    fn the_largest_f32_rounds_to_infinity() {
        assert_eq!((round(f32::MAX), round(f32::MIN)), (f32::INFINITY, f32::NEG_INFINITY));
    }
}
