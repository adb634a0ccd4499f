//! The rows that a matrix is multiplied with: f32, or quantised by `stage_activation`.

use super::Views;
use crate::format::{Format, nvfp4};
use crate::program::{Launch, Slice};
use std::borrow::Cow;

/// Rows on a device, `[R, K]`.
#[derive(Clone, Copy, Debug)]
pub enum Input {
    /// f32.
    F32(Slice),
    /// As `stage_activation` leaves them.
    Nvfp4 {
        /// `[R, ceil(K/64) + K/8]` words: E4M3 scales, then E2M1 codes.
        rows: Slice,
        /// `[R]` f32: what each row was divided by.
        scales: Slice,
    },
}

/// How input rows are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputFormat {
    /// f32.
    F32,
    /// E2M1 codes with E4M3 block scales and an f32 for each row.
    Nvfp4,
}

impl From<Slice> for Input {
    fn from(rows: Slice) -> Self {
        Self::F32(rows)
    }
}

impl Input {
    /// How the rows are stored.
    pub fn format(&self) -> InputFormat {
        match self {
            Self::F32(_) => InputFormat::F32,
            Self::Nvfp4 { .. } => InputFormat::Nvfp4,
        }
    }
}

/// Words that a quantised row of `k` elements takes: whole words of scales, then codes.
pub const fn staged_words(k: usize) -> usize {
    k.div_ceil(64) + k / 8
}

impl Launch {
    /// Bind input rows and fill slot `input`.
    pub(crate) fn input(self, input: Input) -> Self {
        match input {
            Input::F32(rows) => self.fill("input", "input_f32").read("x", rows),
            Input::Nvfp4 { rows, scales } => self.fill("input", "input_nvfp4").read("x", rows).read("x_scales", scales),
        }
    }

    /// Bind input rows of a kernel with matrix units, which takes f32 only.
    pub(crate) fn matrix_input(self, input: Input) -> Self {
        match input {
            Input::F32(rows) | Input::Nvfp4 { rows, .. } => self.read("x", rows),
        }
    }
}

impl<'a> Views<'a> {
    /// The launch's input, `[rows, k]`, decoded.
    pub fn input(&mut self, format: InputFormat, rows: usize, k: usize) -> Cow<'a, [f32]> {
        match format {
            InputFormat::F32 => Cow::Borrowed(&self.f32("x")[..rows * k]),
            InputFormat::Nvfp4 => {
                let (words, scales) = (self.words("x"), self.f32("x_scales"));
                let mut decoded = vec![0.0; rows * k];
                for (r, out) in decoded.chunks_exact_mut(k).enumerate() {
                    decode_staged(&words[r * staged_words(k)..][..staged_words(k)], scales[r], out);
                }
                Cow::Owned(decoded)
            }
        }
    }
}

/// One quantised row as f32.
pub fn decode_staged(words: &[u32], scale: f32, out: &mut [f32]) {
    let bytes: &[u8] = bytemuck::cast_slice(words);
    let (scales, codes) = bytes.split_at(out.len().div_ceil(64) * 4);
    Format::Nvfp4.decode_row(codes, &scales[..out.len() / nvfp4::BLOCK], scale, out);
}
