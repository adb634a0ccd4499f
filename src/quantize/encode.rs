//! Encoding matrices: rows in parallel, their codes, and how far each is from what it was.

use std::ops::Range;

use super::source::{self, Matrix};
use super::{Deviation, Failure, ScaleSearch};
use crate::checkpoint::TensorView;
use crate::error::Result;
use crate::format::{Format, bf16, mxfp4, nvfp4};
use crate::parallel::in_parallel;

/// Rows that are decoded at once.
const TILE: usize = 32;

/// What a tensor becomes, apart from the encoded bytes.
#[derive(Clone, Copy)]
pub(super) enum Scheme {
    /// Rounded to bf16.
    Bf16,
    /// MXFP4 by this search.
    Mxfp4(ScaleSearch),
    /// NVFP4 under this multiplier.
    Nvfp4(ScaleSearch, f32),
    /// MXFP4 codes under the multiplier 2^m.
    Cast(i32),
}

/// Encoded rows.
#[derive(Default)]
pub(super) struct Rows {
    pub(super) codes: Vec<u8>,
    pub(super) scales: Vec<u8>,
    /// Of each row.
    pub(super) deviations: Vec<Deviation>,
}

/// Encodes one expert's matrix (or the only one). Gives codes and scales row after row; the bytes, and the deviation, do
/// not depend on the number of threads.
pub(super) fn encode(matrix: &Matrix, expert: usize, scheme: Scheme) -> Result<Rows> {
    let mut all = Rows::default();
    for part in in_parallel(matrix.n, matrix.k, |rows| encode_rows(matrix, expert, rows, scheme)) {
        let part = part.map_err(|failure| matrix.refuse(failure))?;
        all.codes.extend(part.codes);
        all.scales.extend(part.scales);
        all.deviations.extend(part.deviations);
    }
    Ok(all)
}

/// The largest magnitude of one expert's matrix.
pub(super) fn amax(matrix: &Matrix, expert: usize) -> Result<f32> {
    let parts = in_parallel(matrix.n, matrix.k, |rows| {
        let mut largest = 0f32;
        for tile in tiles(rows) {
            let mut x = vec![0.0; tile.len() * matrix.k];
            matrix.read(expert, tile, &mut x)?;
            largest = x.iter().fold(largest, |m, v| m.max(v.abs()));
        }
        Ok(largest)
    });
    let mut largest = 0f32;
    for part in parts {
        largest = largest.max(part.map_err(|failure| matrix.refuse(failure))?);
    }
    Ok(largest)
}

/// A tensor that stays, in bf16: the bytes, and the deviation where they are not those that were there.
pub(super) fn round(view: &TensorView) -> Result<(Vec<u8>, Deviation)> {
    let size = view.dtype.bits() / 8;
    let len = view.bytes.len() / size;
    let parts = in_parallel(len.div_ceil(TILE_ELEMENTS), TILE_ELEMENTS, |pieces| {
        let mut rows = Rows::default();
        for piece in pieces {
            let first = piece * TILE_ELEMENTS;
            let mut x = vec![0.0; TILE_ELEMENTS.min(len - first)];
            source::decode(view, first, &mut x);
            let refused = |v: &f32| !v.is_finite() || !bf16::round(*v).is_finite();
            if let Some(at) = x.iter().position(refused) {
                return Err(Failure { flat: first + at, value: x[at] });
            }
            rows.push(&x, &[], &[], Scheme::Bf16);
        }
        Ok(rows)
    });
    let (mut bytes, mut deviation) = (Vec::with_capacity(2 * len), Deviation::default());
    for part in parts {
        let part = part.map_err(|failure| failure.of(view))?;
        bytes.extend(part.codes);
        part.deviations.iter().for_each(|d| deviation.add(d));
    }
    Ok((bytes, deviation))
}

/// Elements of a staying tensor that are rounded at once.
const TILE_ELEMENTS: usize = 4096;

fn encode_rows(matrix: &Matrix, expert: usize, rows: Range<usize>, scheme: Scheme) -> Result<Rows, Failure> {
    let k = matrix.k;
    let mut all = Rows::default();
    for tile in tiles(rows) {
        let mut x = vec![0.0; tile.len() * k];
        matrix.read(expert, tile.clone(), &mut x)?;
        for (row, x) in tile.zip(x.chunks_exact(k.max(1))) {
            let (codes, scales) = matrix.mxfp4(expert, row..row + 1).unwrap_or_default();
            all.push(x, codes, scales, scheme);
        }
    }
    Ok(all)
}

impl Rows {
    /// One more row: `x` is what it means, `codes` and `scales` its bytes if it is MXFP4 already.
    fn push(&mut self, x: &[f32], codes: &[u8], scales: &[u8], scheme: Scheme) {
        let (codes_before, scales_before) = (self.codes.len(), self.scales.len());
        let mut deviation = Deviation::default();
        let (format, multiplier) = match scheme {
            Scheme::Bf16 => {
                self.codes.extend(x.iter().flat_map(|v| bf16::encode(*v).to_le_bytes()));
                (Format::Bf16, 1.0)
            }
            Scheme::Mxfp4(search) => {
                for block in x.as_chunks::<{ mxfp4::BLOCK }>().0 {
                    let encoded = match search {
                        ScaleSearch::Rtn => mxfp4::encode(block),
                        ScaleSearch::Mse => mxfp4::encode_least(block),
                    };
                    let (codes, scale) = encoded.expect("only finite elements are read");
                    self.codes.extend(codes);
                    self.scales.push(scale);
                }
                (Format::Mxfp4, 1.0)
            }
            Scheme::Nvfp4(search, multiplier) => {
                for block in x.as_chunks::<{ nvfp4::BLOCK }>().0 {
                    let (codes, scale) = match search {
                        ScaleSearch::Rtn => nvfp4::encode_block(block, multiplier),
                        ScaleSearch::Mse => nvfp4::encode_block_least(block, multiplier),
                    };
                    self.codes.extend(codes);
                    self.scales.push(scale);
                }
                (Format::Nvfp4, multiplier)
            }
            Scheme::Cast(m) => {
                let cast = nvfp4::from_mxfp4(codes, scales, m);
                self.codes.extend(cast.codes);
                self.scales.extend(cast.scales);
                deviation.n_inexact = cast.n_inexact as u64;
                (Format::Nvfp4, 2f32.powi(m))
            }
        };
        let mut y = vec![0.0; x.len()];
        format.decode_row(&self.codes[codes_before..], &self.scales[scales_before..], multiplier, &mut y);
        deviation.compare(x, &y);
        self.deviations.push(deviation);
    }
}

fn tiles(rows: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    rows.clone().step_by(TILE).map(move |from| from..(from + TILE).min(rows.end))
}
