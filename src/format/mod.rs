//! The number formats of weights, in scalar Rust: the ground truth that kernels, twins and tests are held to.
//!
//! | module | element | scale |
//! | --- | --- | --- |
//! | [`bf16`] | upper half of an f32 | none |
//! | [`e2m1`] | 4 bits: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives | none by itself |
//! | [`e4m3`], [`e8m0`] | the 8-bit numbers that serve as block scales | none by themselves |
//! | [`mxfp4`] | e2m1 | e8m0 for each 32 elements |
//! | [`nvfp4`] | e2m1 | e4m3 for each 16 elements, and one f32 for the tensor |
//!
//! Sources: OCP Microscaling Formats (MX) specification 1.0, OCP 8-bit Floating Point specification 1.0, and for
//! NVFP4 the exports of NVIDIA ModelOpt and compressed-tensors. `tests/format.rs` compares with vectors from both.

use std::fmt;

pub mod bf16;
pub mod e2m1;
pub mod e4m3;
pub mod e8m0;
pub mod mxfp4;
pub mod nvfp4;

/// The format of a weight matrix as it lies on disk, K elements a row along the last axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// 4 bytes an element, little-endian.
    F32,
    /// 2 bytes an element, little-endian.
    Bf16,
    /// Half a byte an element, and an e8m0 byte for each 32 elements.
    Mxfp4,
    /// Half a byte an element, an e4m3 byte for each 16 elements, and one f32 for the tensor.
    Nvfp4,
}

impl Format {
    /// Elements along K that share a scale; 1 where there are no scales. K must be a multiple of it.
    pub const fn block(self) -> usize {
        match self {
            Self::F32 | Self::Bf16 => 1,
            Self::Mxfp4 => mxfp4::BLOCK,
            Self::Nvfp4 => nvfp4::BLOCK,
        }
    }

    /// Bytes of codes in a row of `k` elements, without scales. `k` is a multiple of [`block`](Self::block).
    pub const fn row_bytes(self, k: usize) -> usize {
        match self {
            Self::F32 => 4 * k,
            Self::Bf16 => 2 * k,
            Self::Mxfp4 | Self::Nvfp4 => k / 2,
        }
    }

    /// Bytes of scales in a row of `k` elements; 0 where there are no scales.
    pub const fn scale_bytes(self, k: usize) -> usize {
        match self {
            Self::F32 | Self::Bf16 => 0,
            Self::Mxfp4 => k / mxfp4::BLOCK,
            Self::Nvfp4 => k / nvfp4::BLOCK,
        }
    }

    /// The name in messages and reports: `f32`, `bf16`, `mxfp4`, `nvfp4`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Mxfp4 => "mxfp4",
            Self::Nvfp4 => "nvfp4",
        }
    }

    /// Decodes one row of K = `out.len()` elements. `tensor_scale` is the multiplier of an NVFP4 tensor, 1 for others.
    ///
    /// # Panics
    /// If the lengths are not those of a row of K elements, or if another format than NVFP4 comes with a tensor scale.
    pub fn decode_row(self, codes: &[u8], scales: &[u8], tensor_scale: f32, out: &mut [f32]) {
        let k = out.len();
        assert!(k.is_multiple_of(self.block()), "a {self} row is whole blocks of {}, not {k} elements", self.block());
        assert_eq!(codes.len(), self.row_bytes(k), "a {self} row of {k} elements comes with all its code bytes");
        assert_eq!(scales.len(), self.scale_bytes(k), "a {self} row of {k} elements comes with all its scale bytes");
        assert!(self == Self::Nvfp4 || tensor_scale == 1.0, "{self} has no tensor scale, got {tensor_scale}");
        match self {
            Self::F32 => {
                for (y, c) in out.iter_mut().zip(codes.as_chunks().0) {
                    *y = f32::from_le_bytes(*c);
                }
            }
            Self::Bf16 => {
                for (y, c) in out.iter_mut().zip(codes.as_chunks().0) {
                    *y = bf16::decode(u16::from_le_bytes(*c));
                }
            }
            Self::Mxfp4 => mxfp4::decode_row(codes, scales, out),
            Self::Nvfp4 => nvfp4::decode_row(codes, scales, tensor_scale, out),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A NaN or an infinity where a number was to be encoded: the 4-bit formats have no code for either.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("element {idx} is {value}, which a 4-bit format cannot hold")]
pub struct NotFinite {
    /// Where, counted from the start of the slice that was to be encoded.
    pub idx: usize,
    /// What was found there.
    pub value: f32,
}

fn require_finite(x: &[f32]) -> Result<(), NotFinite> {
    match x.iter().position(|v| !v.is_finite()) {
        Some(idx) => Err(NotFinite { idx, value: x[idx] }),
        None => Ok(()),
    }
}

/// The largest magnitude; 0 for an empty slice.
fn amax(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |m, v| m.max(v.abs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_a_row() {
        let sizes = [Format::F32, Format::Bf16, Format::Mxfp4, Format::Nvfp4]
            .map(|f| (f.to_string(), f.block(), f.row_bytes(96), f.scale_bytes(96)));
        let want = [("f32", 1, 384, 0), ("bf16", 1, 192, 0), ("mxfp4", 32, 48, 3), ("nvfp4", 16, 48, 6)];
        assert_eq!(sizes, want.map(|(name, block, row, scale)| (name.to_owned(), block, row, scale)));
    }

    #[test]
    fn plain_rows_are_little_endian() {
        let mut y = [0.0; 2];
        Format::F32.decode_row(&[0, 0, 0xc0, 0x3f, 0, 0, 0, 0xc0], &[], 1.0, &mut y);
        assert_eq!(y, [1.5, -2.0]);
        Format::Bf16.decode_row(&[0xc0, 0x3f, 0, 0xc0], &[], 1.0, &mut y);
        assert_eq!(y, [1.5, -2.0]);
    }

    #[test]
    #[should_panic(expected = "comes with all its scale bytes")]
    fn a_missing_scale_is_noticed() {
        Format::Mxfp4.decode_row(&[0; 32], &[127], 1.0, &mut [0.0; 64]);
    }

    #[test]
    #[should_panic(expected = "has no tensor scale")]
    fn a_tensor_scale_where_there_is_none_is_noticed() {
        Format::Mxfp4.decode_row(&[0; 16], &[127], 0.5, &mut [0.0; 32]);
    }
}
