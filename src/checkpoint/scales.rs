//! Block scales as they lie on disk: E8M0 bytes, of which 255 is NaN and has no place in a checkpoint.

use super::{Dtype, TensorView};
use crate::error::{Error, Result};

/// The E8M0 byte that means NaN.
const NAN: u8 = 255;

/// Refuses a scale tensor (`U8` or `F8_E8M0`) that holds a NaN; the error gives its index, e.g. `[expert, row, block]`.
pub fn check_e8m0(scales: &TensorView) -> Result<()> {
    let fault = |reason: String| Error::tensor(scales.file, super::json::name(scales.name), reason);
    if !matches!(scales.dtype, Dtype::U8 | Dtype::F8E8M0) {
        return Err(fault(format!("is {}, but E8M0 scales are U8 or F8_E8M0", scales.dtype)));
    }
    let Some(position) = find(scales.bytes, NAN) else { return Ok(()) };
    let mut rest = position;
    let mut index: Vec<usize> = scales.shape.iter().rev().map(|&d| (rest % d, rest /= d).0).collect();
    index.reverse();
    Err(fault(format!("the E8M0 scale at {index:?} is 255, which is NaN: the checkpoint is damaged")))
}

/// The first place of `byte`. Whole chunks are tested without a branch a byte, so that the compiler uses vectors.
fn find(bytes: &[u8], byte: u8) -> Option<usize> {
    const CHUNK: usize = 256;
    let hit = |chunk: &[u8]| chunk.iter().fold(false, |any, &b| any | (b == byte));
    let chunk = bytes.chunks(CHUNK).position(hit)?;
    let from = chunk * CHUNK;
    bytes[from..].iter().position(|&b| b == byte).map(|i| from + i)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_a_nan_wherever_it_is_and_gives_its_index() {
        let clean: Vec<u8> = (0..3 * 37 * 11).map(|i| (i * 31 % 255) as u8).collect();
        let view = |bytes: &[u8]| {
            check_e8m0(&TensorView { name: "s", file: "f", dtype: Dtype::U8, shape: &[3, 37, 11], bytes })
        };
        view(&clean).unwrap();
        for place in [0, 1, 255, 256, 511, 700, clean.len() - 1] {
            let mut bad = clean.clone();
            bad[place] = 255;
            let index = format!("[{}, {}, {}]", place / (37 * 11), place / 11 % 37, place % 11);
            assert!(view(&bad).unwrap_err().to_string().contains(&index), "{place}");
        }
        check_e8m0(&TensorView { name: "s", file: "f", dtype: Dtype::Bf16, shape: &[1], bytes: &[0, 0] }).unwrap_err();
    }
}
