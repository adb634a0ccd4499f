//! Weight matrices on a device: the bytes of the checkpoint, in as many buffers as the binding limit asks for.

use crate::device::{Buffer, Device};
use crate::error::Result;
use crate::format::Format;
use crate::ops::Layout;
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
    /// An f32 for each row.
    pub row_scales: Option<Slice>,
}

/// A weight's bytes in host memory, row-major, in as many pieces as the checkpoint has them (q, k and v).
#[derive(Clone, Copy, Debug, Default)]
pub struct WeightBytes<'a> {
    /// The codes (for bf16: the values).
    pub codes: &'a [&'a [u8]],
    /// The block scales, where the format has any.
    pub scales: &'a [&'a [u8]],
    /// An f32 for each row of each expert, where the format has them.
    pub row_scales: &'a [f32],
}

/// What a split of a weight must not cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Row,
    Expert,
}

impl Weight {
    /// Upload a matrix, its pieces stacked by rows. A split is by rows.
    pub fn matrix(
        device: &Arc<dyn Device>,
        label: &str,
        format: Format,
        [n, k]: [u32; 2],
        bytes: &WeightBytes<'_>,
    ) -> Result<Self> {
        Self::upload(device, label, format, Unit::Row, [1, n, k], bytes)
    }

    /// Upload the matrices of a layer's experts, one after the other. A split is by experts, also where there is one.
    pub fn experts(
        device: &Arc<dyn Device>,
        label: &str,
        format: Format,
        shape: [u32; 3],
        bytes: &WeightBytes<'_>,
    ) -> Result<Self> {
        Self::upload(device, label, format, Unit::Expert, shape, bytes)
    }

    fn upload(
        device: &Arc<dyn Device>,
        label: &str,
        format: Format,
        unit: Unit,
        [experts, n, k]: [u32; 3],
        bytes: &WeightBytes<'_>,
    ) -> Result<Self> {
        let [wide_n, wide_k] = [n as usize, k as usize];
        let (code_bytes, scale_bytes) = (format.row_bytes(wide_k), format.scale_bytes(wide_k));
        let (units, rows) = if unit == Unit::Expert { (experts, wide_n) } else { (n, 1) };
        let all_rows = units as usize * rows;
        let given = |pieces: &[&[u8]]| pieces.iter().map(|c| c.len()).sum::<usize>();
        let scaled_rows = if format.has_row_scale() { all_rows } else { 0 };
        assert_eq!(
            (given(bytes.codes), given(bytes.scales), bytes.row_scales.len()),
            (all_rows * code_bytes, all_rows * scale_bytes, scaled_rows),
            "{label}: the caller checked the shape"
        );
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
        let fp4 = limits.laid_out && format.is_fp4();
        let code_layout = if fp4 { Layout::Codes } else { Layout::Stored };
        let scale_layout = if fp4 { Layout::Scales(scale_bytes) } else { Layout::Stored };
        let (mut parts, mut buffers) = (Vec::new(), Vec::new());
        let mut first = 0;
        while first < units {
            let count = (step as u32).min(units - first);
            let mut put = |what: &str, pieces: &[&[u8]], unit: usize, layout: Layout| -> Result<Slice> {
                let range = first as usize * unit..(first + count) as usize * unit;
                let bytes = layout.bytes(range.len()).next_multiple_of(16);
                let buffer = Buffer::new(device, &format!("{label} {what}"), bytes as u64)?;
                device.write_laid_out(buffer.slice(), &cut(pieces, range), layout)?;
                let slice = buffer.slice();
                buffers.push(buffer);
                Ok(slice)
            };
            let codes = put("codes", bytes.codes, rows * code_bytes, code_layout)?;
            let scales = if scale_bytes > 0 {
                Some(put("scales", bytes.scales, rows * scale_bytes, scale_layout)?)
            } else {
                None
            };
            let row_scales = match format.has_row_scale() {
                true => Some(put("row scales", &[bytemuck::cast_slice(bytes.row_scales)], rows * 4, Layout::Stored)?),
                false => None,
            };
            parts.push(Part { first, count, codes, scales, row_scales });
            first += count;
        }
        Ok(Self { format, experts, n, k, parts, buffers })
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> u64 {
        self.buffers.iter().map(|b| b.slice().bytes).sum()
    }
}

/// The parts of `pieces` that stand in `range` of their concatenation.
fn cut<'a>(pieces: &[&'a [u8]], range: std::ops::Range<usize>) -> Vec<&'a [u8]> {
    let mut start = 0; // of the piece, in the concatenation
    let mut parts = Vec::new();
    for piece in pieces {
        let (from, until) = (range.start.max(start), range.end.min(start + piece.len()));
        if from < until {
            parts.push(&piece[from - start..until - start]);
        }
        start += piece.len();
    }
    parts
}

impl Launch {
    /// Bind a part of a weight and fill slot `weights`.
    pub(crate) fn weight(self, format: Format, part: &Part) -> Self {
        let file = match format {
            Format::Bf16 => "weights_bf16",
            Format::Fp8 => "weights_fp8",
            Format::Fp8Blocks => "weights_fp8_blocks",
            Format::Mxfp4 => "weights_mxfp4",
            Format::Nvfp4 => "weights_nvfp4",
            Format::F32 => unreachable!("no kernel reads f32 weights; the loader refuses them"),
        };
        let mut launch = self.fill("weights", file).read("codes", part.codes);
        if let Some(scales) = part.scales {
            launch = launch.read("scales", scales);
        }
        if let Some(row_scales) = part.row_scales {
            launch = launch.read("row_scales", row_scales);
        }
        launch
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
    /// An f32 for each row, or none.
    pub row_scales: &'a [f32],
}

impl Matrix<'_> {
    /// Row `row` as f32.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let (c, s) = (self.format.row_bytes(self.k), self.format.scale_bytes(self.k));
        let row_scale = if self.row_scales.is_empty() { 1.0 } else { self.row_scales[row] };
        self.format.decode_row(&self.codes[row * c..][..c], &self.scales[row * s..][..s], row_scale, out);
    }
}

impl<'a> super::Views<'a> {
    /// The launch's weight.
    pub fn matrix(&mut self, format: Format, k: usize) -> Matrix<'a> {
        let codes = bytemuck::cast_slice(self.words("codes"));
        let scales = if self.has("scales") { bytemuck::cast_slice(self.words("scales")) } else { &[] };
        let row_scales = if self.has("row_scales") { self.f32("row_scales") } else { &[] };
        Matrix { format, k, codes, scales, row_scales }
    }
}

/// Sum of products in f64, in index order.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}
