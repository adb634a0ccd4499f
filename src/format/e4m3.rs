//! E4M3 (the "FN" kind), the 8-bit float of NVFP4's block scales: sign, four exponent bits (bias 7), three mantissa
//! bits; largest value 448, smallest 2^-9; codes 0x7f and 0xff are NaN, there is no infinity.

/// The largest value.
pub const MAX: f32 = 448.0;

/// The value of each code.
pub const VALUES: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        values[code] = value(code as u8);
        code += 1;
    }
    values
};

/// The value of a code.
pub const fn decode(code: u8) -> f32 {
    VALUES[code as usize]
}

/// The nearest code, ties to the even code. The value is clamped to 448 first, so the result is NaN only for NaN.
/// The sign is kept, of zero as well.
pub fn encode(x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    if x.is_nan() {
        return sign | 0x7f;
    }
    let a = x.abs().min(MAX);
    if a < 1.0 / 64.0 {
        // Subnormal: a multiple of 2^-9. Eight of them are the smallest normal number, and its code is 8.
        return sign | (a * 512.0).round_ties_even() as u8;
    }
    // Round the 23 mantissa bits to 3, carrying into the exponent, then move the exponent's bias from 127 to 7.
    let bits = a.to_bits();
    let rounded = (bits + 0x7_ffff + (bits >> 20 & 1)) >> 20;
    sign | (rounded - ((127 - 7) << 3)) as u8
}

const fn value(code: u8) -> f32 {
    let sign = (code as u32 >> 7) << 31;
    let (exponent, mantissa) = (code as u32 >> 3 & 15, code as u32 & 7);
    match (exponent, mantissa) {
        (15, 7) => f32::NAN,
        (0, _) => f32::from_bits(sign | (mantissa as f32 / 512.0).to_bits()),
        _ => f32::from_bits(sign | (exponent + 127 - 7) << 23 | mantissa << 20),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_even_code() {
        assert_eq!([17.0, 19.0, 21.0].map(|x| decode(encode(x))), [16.0, 20.0, 20.0]);
    }

    #[test]
    fn too_large_is_448_and_nan_is_nan() {
        assert_eq!([449.0, 464.0, 1e30, f32::INFINITY].map(encode), [0x7e; 4]);
        assert_eq!(encode(-1e30), 0xfe);
        assert_eq!(encode(f32::NAN) & 0x7f, 0x7f);
    }

    #[test]
    fn rounding_up_may_leave_the_subnormals() {
        assert_eq!(encode(1.0 / 64.0 - 1e-9), 8);
        assert_eq!(encode(2.0f32.powi(-10)), 0);
    }
}
