//! MXFP4: blocks of 32 E2M1 codes in 16 bytes with one E8M0 scale, value = e2m1(code) * 2^(scale - 127).
//! This is gpt-oss's `*_blocks` and `*_scales` (Hugging Face layout; the bytes of ggml lie in another order).
//! Source: OCP Microscaling Formats (MX) specification 1.0.

use super::{NotFinite, amax, e2m1, e8m0, require_finite};

/// Elements that share a scale.
pub const BLOCK: usize = 32;

/// Bytes of codes in a block.
pub const BLOCK_BYTES: usize = BLOCK / 2;

/// Exponent of the largest power of two that E2M1 has (4 = 2^2).
const EMAX: i32 = 2;

/// The largest scale with which every code is a finite f32.
const MAX_SCALE: u8 = 252;

/// Decodes one block. Scale 255 gives NaN everywhere; scales of 253 and 254 overflow the large codes to infinity.
pub fn decode(block: &[u8; BLOCK_BYTES], scale: u8, out: &mut [f32; BLOCK]) {
    let scale = e8m0::decode(scale);
    for (pair, byte) in out.as_chunks_mut::<2>().0.iter_mut().zip(block) {
        *pair = [e2m1::decode(byte & 15) * scale, e2m1::decode(byte >> 4) * scale];
    }
}

/// Decodes K = `out.len()` elements from `[K/2]` code bytes and `[K/32]` scales.
///
/// # Panics
/// If the lengths do not fit each other.
pub fn decode_row(codes: &[u8], scales: &[u8], out: &mut [f32]) {
    assert!(out.len() == scales.len() * BLOCK && codes.len() == scales.len() * BLOCK_BYTES, "whole MXFP4 blocks");
    for ((block, scale), out) in codes.as_chunks().0.iter().zip(scales).zip(out.as_chunks_mut().0) {
        decode(block, *scale, out);
    }
}

/// Encodes one block: the scale by [`e8m0::from_amax`], the elements to the nearest code, saturating at 6 * scale.
/// A block of zeros gets scale 0 and keeps the signs of its zeros.
///
/// # Errors
/// [`NotFinite`] at the first NaN or infinity.
pub fn encode(x: &[f32; BLOCK]) -> Result<([u8; BLOCK_BYTES], u8), NotFinite> {
    require_finite(x)?;
    let scale = e8m0::from_amax(amax(x), EMAX);
    Ok((codes(x, scale), scale))
}

/// As [`encode`], with the scale that gives the least squared error, out of the rule's own and its two neighbours. Never
/// worse than [`encode`], which wins a tie.
///
/// # Errors
/// [`NotFinite`] at the first NaN or infinity.
pub fn encode_least(x: &[f32; BLOCK]) -> Result<([u8; BLOCK_BYTES], u8), NotFinite> {
    let rule = encode(x)?;
    let error = |(block, scale): &([u8; BLOCK_BYTES], u8)| -> f64 {
        let mut y = [0.0; BLOCK];
        decode(block, *scale, &mut y);
        x.iter().zip(y).map(|(v, y)| (f64::from(y) - f64::from(*v)).powi(2)).sum()
    };
    let (mut best, mut least) = (rule, error(&rule));
    for scale in [rule.1.saturating_sub(1), (rule.1 + 1).min(MAX_SCALE)] {
        let this = (codes(x, scale), scale);
        let off = error(&this);
        if off < least {
            (best, least) = (this, off);
        }
    }
    Ok(best)
}

/// The nearest codes under a scale.
fn codes(x: &[f32; BLOCK], scale: u8) -> [u8; BLOCK_BYTES] {
    let per_unit = 1.0 / f64::from(e8m0::decode(scale));
    let mut block = [0; BLOCK_BYTES];
    for (byte, pair) in block.iter_mut().zip(x.as_chunks::<2>().0) {
        // The quotient is taken in f64, where the power of two is exact even for subnormal elements.
        let [low, high] = pair.map(|v| e2m1::encode((f64::from(v) * per_unit) as f32));
        *byte = low | high << 4;
    }
    block
}

/// Encodes a row of K elements, K a multiple of 32, to `[K/2]` code bytes and `[K/32]` scales.
///
/// # Errors
/// [`NotFinite`] at the first NaN or infinity.
///
/// # Panics
/// If K is not a multiple of 32.
pub fn encode_row(x: &[f32]) -> Result<(Vec<u8>, Vec<u8>), NotFinite> {
    assert!(x.len().is_multiple_of(BLOCK), "an MXFP4 row is whole blocks of {BLOCK}");
    require_finite(x)?;
    let blocks = x.as_chunks().0.iter().map(encode).collect::<Result<Vec<_>, _>>()?;
    Ok((blocks.iter().flat_map(|(block, _)| *block).collect(), blocks.iter().map(|(_, scale)| *scale).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_element_sets_the_scale() {
        let mut x = [0.0; BLOCK];
        (x[0], x[1], x[31]) = (-7.9, 0.5, 1.0);
        let (block, scale) = encode(&x).unwrap();
        assert_eq!((block[0], block[15], scale), (0x1f, 0x20, 127)); // -7.9 saturates to -6
    }

    #[test]
    fn the_least_error_is_never_more_than_the_rule_s() {
        let error = |x: &[f32; BLOCK], (block, scale): ([u8; BLOCK_BYTES], u8)| -> f64 {
            let mut y = [0.0; BLOCK];
            decode(&block, scale, &mut y);
            x.iter().zip(y).map(|(a, b)| (f64::from(*a) - f64::from(b)).powi(2)).sum()
        };
        let (mut seed, mut better) = (1u32, 0);
        for _ in 0..1000 {
            let x: [f32; BLOCK] = std::array::from_fn(|_| {
                seed = seed.wrapping_mul(1664525).wrapping_add(1013904223);
                (seed >> 8) as f32 / 8388608.0 - 1.0
            });
            let x = x.map(|v| v * (1.0 + (seed >> 20) as f32));
            let (rule, least) = (error(&x, encode(&x).unwrap()), error(&x, encode_least(&x).unwrap()));
            assert!(least <= rule, "{least} {rule}");
            better += usize::from(least < rule);
        }
        assert!(better > 50, "only {better} of 1000 became better: the search does nothing");
        assert_eq!(encode_least(&[0.0; BLOCK]), encode(&[0.0; BLOCK]));
        assert!(encode_least(&[f32::MAX; BLOCK]).unwrap().1 <= MAX_SCALE);
    }

    #[test]
    fn nan_and_infinity_are_refused_by_place() {
        let mut x = [0.0; 64];
        x[40] = f32::NEG_INFINITY;
        assert_eq!(encode_row(&x).unwrap_err().idx, 40);
    }
}
