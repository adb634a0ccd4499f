//! E2M1, the 4-bit float of MXFP4 and NVFP4: sign, two exponent bits (bias 1), one mantissa bit; no NaN, no infinity.
//! Two codes make a byte: element 2j lies in the low nibble of byte j, element 2j+1 in the high one.

/// The value of each code; code 8 is -0.
pub const VALUES: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The largest value.
pub const MAX: f32 = 6.0;

/// The value of a code. The upper four bits are ignored.
pub const fn decode(code: u8) -> f32 {
    VALUES[(code & 15) as usize]
}

/// The nearest code, ties to the even code; above 6 saturates, infinities too. The sign is kept: -0.1 becomes code 8.
///
/// # Panics
/// On NaN, which has no code: callers refuse it first.
pub fn encode(x: f32) -> u8 {
    assert!(!x.is_nan(), "NaN was refused before encoding");
    let a = x.abs();
    // Midpoints between neighbours. Halfway up to an even code goes up (>=), up to an odd code stays down (>).
    let above =
        [a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5.0].into_iter().filter(|&b| b).count();
    above as u8 | if x.is_sign_negative() { 8 } else { 0 }
}

/// The code of element `idx` in packed bytes.
pub const fn code(packed: &[u8], idx: usize) -> u8 {
    packed[idx / 2] >> (idx % 2 * 4) & 15
}

/// Two codes a byte, the even element low.
///
/// # Panics
/// If the number of codes is odd or a code is above 15.
pub fn pack(codes: &[u8]) -> Vec<u8> {
    assert!(codes.len().is_multiple_of(2), "codes are packed in pairs");
    assert!(codes.iter().all(|&c| c < 16), "a code has four bits");
    codes.as_chunks().0.iter().map(|[low, high]| low | high << 4).collect()
}

/// The codes of packed bytes, two for each byte.
pub fn unpack(packed: &[u8]) -> Vec<u8> {
    packed.iter().flat_map(|b| [b & 15, b >> 4]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_even_element_is_the_low_nibble() {
        assert_eq!(pack(&[1, 2, 15, 0]), [0x21, 0x0f]);
        assert_eq!(unpack(&[0x21, 0x0f]), [1, 2, 15, 0]);
        assert_eq!([0, 1, 2, 3].map(|i| code(&[0x21, 0x0f], i)), [1, 2, 15, 0]);
    }

    #[test]
    fn every_code_survives_a_round_trip() {
        for code in 0..16 {
            assert_eq!(encode(decode(code)), code);
        }
    }

    #[test]
    fn infinities_saturate() {
        assert_eq!((encode(f32::INFINITY), encode(f32::NEG_INFINITY)), (7, 15));
    }
}
