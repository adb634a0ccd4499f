//! Weight matrices on a device: the bytes as they lie on disk, in as many buffers as the binding limit asks for.

use crate::device::{Buffer, Device};
use crate::error::Result;
use crate::format::Format;
use crate::program::{Launch, Slice};
use std::sync::Arc;

/// A matrix of `n` rows of `k` elements, or one for each of several experts.
#[derive(Debug)]
pub struct Weight {
    /// How an element is stored.
    pub format: Format,
    /// Experts; 1 for a plain matrix.
    pub experts: u32,
    /// Rows (outputs), of one expert.
    pub n: u32,
    /// Columns (inputs).
    pub k: u32,
    /// The buffers, in order. One unless the adapter's binding limit forced a split.
    pub parts: Vec<Part>,
    buffers: Vec<Buffer>,
}

/// A run of experts, or of rows where there is one expert.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// The first expert (or row).
    pub first: u32,
    /// How many.
    pub count: u32,
    /// The codes (for bf16: the values).
    pub codes: Slice,
    /// The block scales.
    pub scales: Option<Slice>,
}

/// What a split of a weight must not cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Row,
    Expert,
}

impl Weight {
    /// Upload a matrix. `codes` and `scales` may come in several pieces (q, k and v), which are stacked by rows. A split
    /// is by rows.
    pub fn matrix(
        device: &Arc<dyn Device>,
        label: &str,
        format: Format,
        [n, k]: [u32; 2],
        codes: &[&[u8]],
        scales: &[&[u8]],
    ) -> Result<Self> {
        Self::upload(device, label, format, Unit::Row, [1, n, k], codes, scales)
    }

    /// Upload the matrices of a layer's experts, one after the other. A split is by experts, also where there is one.
    pub fn experts(
        device: &Arc<dyn Device>,
        label: &str,
        format: Format,
        shape: [u32; 3],
        codes: &[u8],
        scales: &[u8],
    ) -> Result<Self> {
        Self::upload(device, label, format, Unit::Expert, shape, &[codes], &[scales])
    }

    fn upload(
        device: &Arc<dyn Device>,
        label: &str,
        format: Format,
        unit: Unit,
        [experts, n, k]: [u32; 3],
        codes: &[&[u8]],
        scales: &[&[u8]],
    ) -> Result<Self> {
        let [wide_n, wide_k] = [n as usize, k as usize];
        let (code_bytes, scale_bytes) = (format.row_bytes(wide_k), format.scale_bytes(wide_k));
        let (units, rows) = if unit == Unit::Expert { (experts, wide_n) } else { (n, 1) };
        let given: usize = codes.iter().map(|c| c.len()).sum();
        assert_eq!(given, units as usize * rows * code_bytes, "{label}: the caller checked the shape");
        let limits = device.limits();
        let by_bytes = limits.max_binding_bytes / (rows * code_bytes) as u64;
        let by_grid = if unit == Unit::Expert { u64::MAX } else { u64::from(limits.max_grid) * 8 };
        // At a multiple of 8 rows every piece starts at a whole word of packed scales and biases.
        let step = by_bytes.min(by_grid).min(u64::from(units));
        let step = if step < u64::from(units) && unit == Unit::Row { step / 8 * 8 } else { step };
        if step == 0 {
            let (least, limit) = (rows * code_bytes, limits.max_binding_bytes);
            let what = if unit == Unit::Expert { "one expert takes" } else { "eight rows take eight times" };
            let text = format!("{label}: {what} {least} bytes, but this adapter binds {limit} at most");
            return Err(crate::Error::Device(text));
        }
        let (mut parts, mut buffers) = (Vec::new(), Vec::new());
        let mut first = 0;
        while first < units {
            let count = (step as u32).min(units - first);
            let mut put = |what: &str, pieces: &[&[u8]], unit: usize| -> Result<Slice> {
                let range = first as usize * unit..(first + count) as usize * unit;
                let buffer =
                    Buffer::new(device, &format!("{label} {what}"), (range.len() as u64).next_multiple_of(16))?;
                write_pieces(device, buffer.slice(), pieces, range)?;
                let slice = buffer.slice();
                buffers.push(buffer);
                Ok(slice)
            };
            let codes = put("codes", codes, rows * code_bytes)?;
            let scales = if scale_bytes > 0 { Some(put("scales", scales, rows * scale_bytes)?) } else { None };
            parts.push(Part { first, count, codes, scales });
            first += count;
        }
        Ok(Self { format, experts, n, k, parts, buffers })
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> u64 {
        self.buffers.iter().map(|b| b.slice().bytes).sum()
    }
}

/// Write `range` of the concatenation of `pieces` to the head of `to`.
fn write_pieces(device: &Arc<dyn Device>, to: Slice, pieces: &[&[u8]], range: std::ops::Range<usize>) -> Result<()> {
    let mut start = 0; // of the piece, in the concatenation
    let mut pending: Vec<u8> = Vec::new(); // bytes short of a whole word between two pieces
    let mut offset = to.offset;
    for piece in pieces {
        let (from, until) = (range.start.max(start), range.end.min(start + piece.len()));
        if from < until {
            let mut bytes = &piece[from - start..until - start];
            while !bytes.is_empty() && !pending.is_empty() {
                pending.push(bytes[0]);
                bytes = &bytes[1..];
                if pending.len() == 4 {
                    device.write(Slice { offset, bytes: 4, ..to }, &pending)?;
                    offset += 4;
                    pending.clear();
                }
            }
            let whole = bytes.len() / 4 * 4;
            if whole > 0 {
                device.write(Slice { offset, bytes: whole as u64, ..to }, &bytes[..whole])?;
                offset += whole as u64;
            }
            pending.extend_from_slice(&bytes[whole..]);
        }
        start += piece.len();
    }
    if !pending.is_empty() {
        pending.resize(4, 0);
        device.write(Slice { offset, bytes: 4, ..to }, &pending)?;
    }
    Ok(())
}

impl Launch {
    /// Bind a part of a weight and fill slot `weights`.
    pub(crate) fn weight(self, format: Format, part: &Part) -> Self {
        let file = match format {
            Format::Bf16 => "weights_bf16",
            Format::Mxfp4 => "weights_mxfp4",
            other => unreachable!("no kernel reads {other}; the loader refuses it"),
        };
        let launch = self.fill("weights", file).read("codes", part.codes);
        match part.scales {
            Some(scales) => launch.read("scales", scales),
            None => launch,
        }
    }

    /// Bind a bias, or none, and fill slot `bias`.
    pub(crate) fn bias(self, bias: Option<Slice>) -> Self {
        match bias {
            Some(bias) => self.fill("bias", "bias_bf16").read("bias", bias),
            None => self.fill("bias", "bias_none"),
        }
    }
}

/// A weight matrix in host memory, for the twins: decodes a row at a time.
pub struct Matrix<'a> {
    /// How an element is stored.
    pub format: Format,
    /// Columns.
    pub k: usize,
    /// Codes, row after row.
    pub codes: &'a [u8],
    /// Block scales, row after row.
    pub scales: &'a [u8],
}

impl Matrix<'_> {
    /// Row `row` as f32.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let (c, s) = (self.format.row_bytes(self.k), self.format.scale_bytes(self.k));
        self.format.decode_row(&self.codes[row * c..][..c], &self.scales[row * s..][..s], 1.0, out);
    }
}

impl<'a> super::Views<'a> {
    /// The launch's weight.
    pub fn matrix(&mut self, format: Format, k: usize) -> Matrix<'a> {
        let codes = bytemuck::cast_slice(self.words("codes"));
        let scales = if self.has("scales") { bytemuck::cast_slice(self.words("scales")) } else { &[] };
        Matrix { format, k, codes, scales }
    }
}

/// Sum of products in f64, in index order.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}
