//! Matrices of a source checkpoint: where their elements lie, and rows of them as f32.

use std::ops::Range;

use super::Failure;
use crate::checkpoint::{Dtype, TensorView};
use crate::error::{Error, Result};
use crate::format::{bf16, mxfp4};

/// How a matrix's elements lie in its tensor.
#[derive(Clone, Copy)]
pub(super) enum Layout<'a> {
    /// `[.., N, K]`: rows are outputs.
    Rows,
    /// `[.., K, N]`: the experts of an unquantised gpt-oss.
    Columns,
    /// MXFP4 codes, with these E8M0 scales.
    Mxfp4(TensorView<'a>),
}

/// A matrix `[N, K]`, or one for each expert.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub(super) view: TensorView<'a>,
    pub(super) layout: Layout<'a>,
    /// Experts; 1 where there are none.
    pub(super) count: usize,
    pub(super) n: usize,
    pub(super) k: usize,
}

impl<'a> Matrix<'a> {
    /// MXFP4 codes and scales of rows of one expert.
    pub(super) fn mxfp4(&self, expert: usize, rows: Range<usize>) -> Option<(&'a [u8], &'a [u8])> {
        let Layout::Mxfp4(scales) = self.layout else { return None };
        let (from, to) = (expert * self.n + rows.start, expert * self.n + rows.end);
        let (code_bytes, scale_bytes) = (self.k / 2, self.k / mxfp4::BLOCK);
        let scales: &'a [u8] = scales.bytes;
        Some((&self.view.bytes[from * code_bytes..to * code_bytes], &scales[from * scale_bytes..to * scale_bytes]))
    }

    /// Rows of one expert as f32, `[rows, K]`, all finite.
    pub(super) fn read(&self, expert: usize, rows: Range<usize>, out: &mut [f32]) -> Result<(), Failure> {
        let (n, k) = (self.n, self.k);
        if k == 0 {
            return Ok(());
        }
        match self.layout {
            Layout::Rows => decode(&self.view, (expert * n + rows.start) * k, out),
            Layout::Columns => {
                let count = rows.len();
                let mut across = vec![0.0; count];
                for column in 0..k {
                    decode(&self.view, (expert * k + column) * n + rows.start, &mut across);
                    for (row, v) in across.iter().enumerate() {
                        out[row * k + column] = *v;
                    }
                }
            }
            Layout::Mxfp4(_) => {
                let (codes, scales) = self.mxfp4(expert, rows.clone()).expect("the layout was looked at");
                mxfp4::decode_row(codes, scales, out);
            }
        }
        let Some(bad) = out.iter().position(|v| !v.is_finite()) else { return Ok(()) };
        let (row, column) = (rows.start + bad / k, bad % k);
        let flat = match self.layout {
            Layout::Columns => (expert * k + column) * n + row,
            _ => (expert * n + row) * k + column,
        };
        Err(Failure { flat, value: out[bad] })
    }

    /// What [`Matrix::read`] refused, as an error that names the element.
    pub(super) fn refuse(&self, failure: Failure) -> Error {
        match self.layout {
            // The shape on disk is one of bytes and blocks.
            Layout::Mxfp4(_) => {
                let (row, k) = (failure.flat / self.k, failure.flat % self.k);
                let at = [row / self.n, row % self.n, k];
                failure.at(&self.view, if self.count > 1 { &at } else { &at[1..] })
            }
            _ => failure.of(&self.view),
        }
    }
}

impl Failure {
    /// The error for an element of a tensor of floats.
    pub(super) fn of(&self, view: &TensorView) -> Error {
        let mut rest = self.flat;
        let mut index: Vec<usize> = view.shape.iter().rev().map(|&d| (rest % d, rest /= d).0).collect();
        index.reverse();
        self.at(view, &index)
    }

    fn at(&self, view: &TensorView, index: &[usize]) -> Error {
        let why = if self.value.is_finite() { "too large for bf16" } else { "no number to quantise" };
        let reason = format!("the element at {index:?} is {}, {why}: the checkpoint is damaged", self.value);
        fault(view, reason)
    }
}

/// Whether elements of this type can be read.
pub(super) fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::Bf16 | Dtype::F16 | Dtype::F32)
}

/// Elements from `first` on, of a tensor for which [`is_float`] holds.
pub(super) fn decode(view: &TensorView, first: usize, out: &mut [f32]) {
    let size = view.dtype.bits() / 8;
    let bytes = &view.bytes[first * size..(first + out.len()) * size];
    match view.dtype {
        Dtype::Bf16 => fill(out, bytes, |b| bf16::decode(u16::from_le_bytes(b))),
        Dtype::F16 => fill(out, bytes, |b: [u8; 2]| half::f16::from_le_bytes(b).to_f32()),
        Dtype::F32 => fill(out, bytes, f32::from_le_bytes),
        other => unreachable!("{other} was refused when the work was planned"),
    }
}

fn fill<const N: usize>(out: &mut [f32], bytes: &[u8], of: impl Fn([u8; N]) -> f32) {
    for (y, b) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *y = of(*b);
    }
}

/// What is wrong with a tensor.
pub(super) fn fault(view: &TensorView, reason: impl Into<String>) -> Error {
    Error::tensor(view.file, crate::checkpoint::json::name(view.name), reason)
}
