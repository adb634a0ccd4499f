//! Block scales as they lie on disk: E8M0 bytes, of which 255 is NaN and has no place in a checkpoint, and 253 and 254
//! take FP4 values past f32's range.

use super::{Dtype, TensorView};
use crate::error::{Error, Result};

/// The largest scale byte with which every FP4 value is a finite f32: 6 x 2^(252 - 127).
const LARGEST: u8 = 252;

/// Refuses a scale tensor (`U8` or `F8_E8M0`) that holds a NaN or a scale beyond f32's range; the error gives its index,
/// e.g. `[expert, row, block]`.
pub fn check_e8m0(scales: &TensorView) -> Result<()> {
    let fault = |reason: String| Error::tensor(scales.file, super::json::name(scales.name), reason);
    if !matches!(scales.dtype, Dtype::U8 | Dtype::F8E8M0) {
        return Err(fault(format!("is {}, but E8M0 scales are U8 or F8_E8M0", scales.dtype)));
    }
    let Some(position) = find_above(scales.bytes, LARGEST) else { return Ok(()) };
    let found = scales.bytes[position];
    let mut rest = position;
    let mut index: Vec<usize> = scales.shape.iter().rev().map(|&d| (rest % d, rest /= d).0).collect();
    index.reverse();
    let what = if found == 255 { "NaN" } else { "too large for f32" };
    Err(fault(format!("the E8M0 scale at {index:?} is {found}, which is {what}: the checkpoint is damaged")))
}

/// Refuses a bf16 tensor (a norm's gain, a bias, sinks) with a NaN or an infinity: it would reach every token.
pub fn check_finite_bf16(values: &TensorView) -> Result<()> {
    let bad = |pair: &[u8]| u16::from_le_bytes([pair[0], pair[1]]) & 0x7f80 == 0x7f80;
    let Some(at) = values.bytes.chunks_exact(2).position(bad) else { return Ok(()) };
    let reason = format!("element {at} is NaN or infinite: the checkpoint is damaged");
    Err(Error::tensor(values.file, super::json::name(values.name), reason))
}

/// The first byte above `limit`. Whole chunks are tested without a branch a byte, so that the compiler uses vectors.
fn find_above(bytes: &[u8], limit: u8) -> Option<usize> {
    const CHUNK: usize = 256;
    let hit = |chunk: &[u8]| chunk.iter().fold(false, |any, &b| any | (b > limit));
    let chunk = bytes.chunks(CHUNK).position(hit)?;
    let from = chunk * CHUNK;
    bytes[from..].iter().position(|&b| b > limit).map(|i| from + i)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_a_nan_wherever_it_is_and_gives_its_index() {
        let clean: Vec<u8> = (0..3 * 37 * 11).map(|i| (i * 31 % 253) as u8).collect();
        let view = |bytes: &[u8]| {
            check_e8m0(&TensorView { name: "s", file: "f", dtype: Dtype::U8, shape: &[3, 37, 11], bytes })
        };
        view(&clean).unwrap();
        let mut large = clean.clone();
        large[40] = 253;
        assert!(view(&large).unwrap_err().to_string().contains("is 253, which is too large"));
        for place in [0, 1, 255, 256, 511, 700, clean.len() - 1] {
            let mut bad = clean.clone();
            bad[place] = 255;
            let index = format!("[{}, {}, {}]", place / (37 * 11), place / 11 % 37, place % 11);
            assert!(view(&bad).unwrap_err().to_string().contains(&index), "{place}");
        }
        check_e8m0(&TensorView { name: "s", file: "f", dtype: Dtype::Bf16, shape: &[1], bytes: &[0, 0] }).unwrap_err();
    }
}
