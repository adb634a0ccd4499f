//! The number formats of weights, in scalar Rust: the ground truth that kernels, twins and tests are held to.
//!
//! | module | element | scale |
//! | --- | --- | --- |
//! | [`bf16`] | upper half of an f32 | none |
//! | [`e2m1`] | 4 bits: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives | none by itself |
//! | [`e4m3`], [`e8m0`] | the 8-bit numbers that serve as block scales | none by themselves |
//! | fp8 | e4m3 | one f32 for the tensor or for each row, or for each 128 elements of a row |
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

/// Elements of a row that share a scale in [`Format::Fp8Blocks`].
pub const FP8_BLOCK: usize = 128;

/// The format of a weight matrix as it lies on disk, K elements a row along the last axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// 4 bytes an element, little-endian.
    F32,
    /// 2 bytes an element, little-endian.
    Bf16,
    /// An e4m3 byte an element, and one f32 for the tensor or for each row.
    Fp8,
    /// An e4m3 byte an element, and a little-endian f32 for each 128 elements of a row.
    Fp8Blocks,
    /// Half a byte an element, and an e8m0 byte for each 32 elements.
    Mxfp4,
    /// Half a byte an element, an e4m3 byte for each 16 elements, and one f32 for the tensor.
    Nvfp4,
}

impl Format {
    /// Elements along K that share a scale; 1 where there are no scales. K must be a multiple of it.
    pub const fn block(self) -> usize {
        match self {
            Self::F32 | Self::Bf16 | Self::Fp8 => 1,
            Self::Fp8Blocks => FP8_BLOCK,
            Self::Mxfp4 => mxfp4::BLOCK,
            Self::Nvfp4 => nvfp4::BLOCK,
        }
    }

    /// Bytes of codes in a row of `k` elements, without scales. `k` is a multiple of [`block`](Self::block).
    pub const fn row_bytes(self, k: usize) -> usize {
        match self {
            Self::F32 => 4 * k,
            Self::Bf16 => 2 * k,
            Self::Fp8 | Self::Fp8Blocks => k,
            Self::Mxfp4 | Self::Nvfp4 => k / 2,
        }
    }

    /// Bytes of scales in a row of `k` elements; 0 where there are no scales.
    pub const fn scale_bytes(self, k: usize) -> usize {
        match self {
            Self::F32 | Self::Bf16 | Self::Fp8 => 0,
            Self::Fp8Blocks => 4 * (k / FP8_BLOCK),
            Self::Mxfp4 => k / mxfp4::BLOCK,
            Self::Nvfp4 => k / nvfp4::BLOCK,
        }
    }

    /// The name in messages and reports: `f32`, `bf16`, `fp8`, `fp8-blocks`, `mxfp4`, `nvfp4`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Fp8Blocks => "fp8-blocks",
            Self::Mxfp4 => "mxfp4",
            Self::Nvfp4 => "nvfp4",
        }
    }

    /// Whether an element with its block scale is a half, which matrix units take. (Scales of FP8 blocks are any f32.)
    pub const fn fits_half(self) -> bool {
        match self {
            Self::Bf16 | Self::Fp8 | Self::Mxfp4 | Self::Nvfp4 => true,
            Self::F32 | Self::Fp8Blocks => false,
        }
    }

    /// Whether elements are E2M1 codes in blocks with a scale of one byte.
    pub const fn is_fp4(self) -> bool {
        match self {
            Self::Mxfp4 | Self::Nvfp4 => true,
            Self::F32 | Self::Bf16 | Self::Fp8 | Self::Fp8Blocks => false,
        }
    }

    /// Whether each row has an f32 of its own: NVFP4's tensor scale, or FP8's.
    pub const fn has_row_scale(self) -> bool {
        matches!(self, Self::Fp8 | Self::Nvfp4)
    }

    /// Decodes one row of K = `out.len()` elements. `row_scale` is the multiplier of the row, of the NVFP4 or FP8 tensor
    /// that it comes from; 1 for formats that have none.
    ///
    /// # Panics
    /// If the lengths are not those of a row of K elements, or if a format without row scales comes with one.
    pub fn decode_row(self, codes: &[u8], scales: &[u8], row_scale: f32, out: &mut [f32]) {
        let k = out.len();
        assert!(k.is_multiple_of(self.block()), "a {self} row is whole blocks of {}, not {k} elements", self.block());
        assert_eq!(codes.len(), self.row_bytes(k), "a {self} row of {k} elements comes with all its code bytes");
        assert_eq!(scales.len(), self.scale_bytes(k), "a {self} row of {k} elements comes with all its scale bytes");
        assert!(self.has_row_scale() || row_scale == 1.0, "{self} has no row scales, got {row_scale}");
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
            Self::Fp8 => {
                for (y, c) in out.iter_mut().zip(codes) {
                    *y = e4m3::decode(*c) * row_scale;
                }
            }
            Self::Fp8Blocks => {
                let blocks = out.chunks_exact_mut(FP8_BLOCK).zip(codes.chunks_exact(FP8_BLOCK));
                for ((out, codes), scale) in blocks.zip(scales.as_chunks().0) {
                    let scale = f32::from_le_bytes(*scale);
                    for (y, c) in out.iter_mut().zip(codes) {
                        *y = e4m3::decode(*c) * scale;
                    }
                }
            }
            Self::Mxfp4 => mxfp4::decode_row(codes, scales, out),
            Self::Nvfp4 => nvfp4::decode_row(codes, scales, row_scale, out),
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
        let formats = [Format::F32, Format::Bf16, Format::Fp8, Format::Fp8Blocks, Format::Mxfp4, Format::Nvfp4];
        let sizes = formats.map(|f| (f.to_string(), f.block(), f.row_bytes(384), f.scale_bytes(384)));
        let want = [
            ("f32", 1, 1536, 0),
            ("bf16", 1, 768, 0),
            ("fp8", 1, 384, 0),
            ("fp8-blocks", 128, 384, 12),
            ("mxfp4", 32, 192, 12),
            ("nvfp4", 16, 192, 24),
        ];
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
    fn fp8_rows_take_one_scale_or_one_for_each_block() {
        let mut y = [0.0; 2];
        Format::Fp8.decode_row(&[0x38, 0xfe], &[], 0.5, &mut y);
        assert_eq!(y, [0.5, -224.0]);
        let scales = [2f32.to_le_bytes(), (-0.25f32).to_le_bytes()].concat();
        let mut y = [0.0; 256];
        Format::Fp8Blocks.decode_row(&[0x38; 256], &scales, 1.0, &mut y);
        assert!(y[..128].iter().all(|v| *v == 2.0) && y[128..].iter().all(|v| *v == -0.25));
    }

    #[test]
    #[should_panic(expected = "comes with all its scale bytes")]
    fn a_missing_scale_is_noticed() {
        Format::Mxfp4.decode_row(&[0; 32], &[127], 1.0, &mut [0.0; 64]);
    }

    #[test]
    #[should_panic(expected = "has no row scales")]
    fn a_row_scale_where_there_is_none_is_noticed() {
        Format::Mxfp4.decode_row(&[0; 16], &[127], 0.5, &mut [0.0; 32]);
    }
}
