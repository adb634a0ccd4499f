//! Scales and codes as they lie on disk. E8M0: 255 is NaN and has no place in a checkpoint, and 253 and 254 take FP4
//! values past f32's range. E4M3: 127 and 255 are NaN, and a block scale is not negative.

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
    let index = index_of(position, scales.shape);
    let what = if found == 255 { "NaN" } else { "too large for f32" };
    Err(fault(format!("the E8M0 scale at {index:?} is {found}, which is {what}: the checkpoint is damaged")))
}

/// Refuses NVFP4 block scales `bytes`, row-major with `n_blocks` a row, of which one is NaN or negative; the error gives
/// `[row, block]`. `scales` is the tensor that they come from, for the message.
pub fn check_e4m3_scales(scales: &TensorView, bytes: &[u8], n_blocks: usize) -> Result<()> {
    // Above the largest number, 448, come NaN, negative zero, all negative numbers, and NaN again.
    let Some(at) = find_above(bytes, 0x7e) else { return Ok(()) };
    let (found, index) = (bytes[at], [at / n_blocks, at % n_blocks]);
    let what = if found & 0x7f == 0x7f { "NaN" } else { "negative" };
    let reason = format!("the E4M3 scale at {index:?} is {found:#04x}, which is {what}: the checkpoint is damaged");
    Err(Error::tensor(scales.file, super::json::name(scales.name), reason))
}

/// Refuses FP8 codes of which one is NaN; the error gives its index.
pub(super) fn check_e4m3_codes(codes: &TensorView) -> Result<()> {
    let Some(at) = find(codes.bytes, |b| b & 0x7f == 0x7f) else { return Ok(()) };
    let index = index_of(at, codes.shape);
    let reason =
        format!("the E4M3 code at {index:?} is {:#04x}, which is NaN: the checkpoint is damaged", codes.bytes[at]);
    Err(Error::tensor(codes.file, super::json::name(codes.name), reason))
}

/// Refuses a bf16 tensor with a NaN or an infinity: it would reach every token. Loading asks so of all but matrices, which are not
/// read before they are uploaded.
pub fn check_finite_bf16(values: &TensorView) -> Result<()> {
    const CHUNK: usize = 512;
    let bad = |pair: &[u8]| u16::from_le_bytes([pair[0], pair[1]]) & 0x7f80 == 0x7f80;
    // Whole chunks without a branch an element, as in `find`.
    let any = |chunk: &[u8]| chunk.chunks_exact(2).fold(false, |any, pair| any | bad(pair));
    let Some(chunk) = values.bytes.chunks(CHUNK).position(any) else { return Ok(()) };
    let within = values.bytes[chunk * CHUNK..].chunks_exact(2).position(bad).unwrap_or_default();
    let at = chunk * CHUNK / 2 + within;
    let reason = format!("element {at} is NaN or infinite: the checkpoint is damaged");
    Err(Error::tensor(values.file, super::json::name(values.name), reason))
}

/// Where the element at `position` stands in a tensor of this shape.
fn index_of(position: usize, shape: &[usize]) -> Vec<usize> {
    let mut rest = position;
    let mut index: Vec<usize> = shape.iter().rev().map(|&d| (rest % d, rest /= d).0).collect();
    index.reverse();
    index
}

fn find_above(bytes: &[u8], limit: u8) -> Option<usize> {
    find(bytes, |b| b > limit)
}

/// The first bad byte. Whole chunks are tested without a branch a byte, so that the compiler uses vectors.
fn find(bytes: &[u8], bad: impl Fn(u8) -> bool) -> Option<usize> {
    const CHUNK: usize = 256;
    let hit = |chunk: &[u8]| chunk.iter().fold(false, |any, &b| any | bad(b));
    let chunk = bytes.chunks(CHUNK).position(hit)?;
    let from = chunk * CHUNK;
    bytes[from..].iter().position(|&b| bad(b)).map(|i| from + i)
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
