//! One linear's weight as it lies on disk, with the scales that give its codes a meaning: [`Checkpoint::stored`].
//!
//! A scale is part of the weight's type. Names and dtypes of the tensors decide the format; what is missing, doubled, of
//! another shape, not finite or not above zero is an error here, before anything is computed with it.
//!
//! | format | codes | block scales | one f32 | of inputs |
//! | --- | --- | --- | --- | --- |
//! | bf16 | `weight` BF16 `[N, K]` | | | |
//! | nvfp4, ModelOpt | `weight` U8 `[N, K/2]` | `weight_scale` F8_E4M3 `[N, K/16]` | `weight_scale_2`, multiplies | `input_scale`, multiplies |
//! | nvfp4, Quark | the same | the same | the same | `input_scale_2`, multiplies |
//! | nvfp4, compressed-tensors | `weight_packed` U8 `[N, K/2]` | the same | `weight_global_scale`, **divides** | `input_global_scale`, **divides** |
//! | mxfp4 | `weight` or `weight_packed` U8 `[N, K/2]` | `weight_scale` U8 or F8_E8M0 `[N, K/32]` | | |
//! | fp8 | `weight` F8_E4M3 `[N, K]` | | `weight_scale` `[]`, `[1]`, `[N]`, `[N, 1]`, multiplies | `input_scale`, checked and not used |
//! | fp8-blocks | `weight` F8_E4M3 `[N, K]` | `weight_scale_inv` (or `weight_scale`) `[⌈N/128⌉, ⌈K/128⌉]`, multiplies | | `input_scale`, likewise |
//!
//! Sources: listings of what the producers wrote, `tests/fixtures/quantization/`; vLLM 0.33 `modelopt.py`,
//! `quark_nvfp4.py`, `compressed_tensors_w4a4_nvfp4.py`.

use std::borrow::Cow;

use super::scales::{check_e4m3_codes, check_e4m3_scales, check_e8m0};
use super::{Checkpoint, Dtype, TensorView, json};
use crate::config::{ActivationScheme, Producer, Quantization, Scheme};
use crate::error::{Error, Result};
use crate::format::nvfp4::{self, Global};
use crate::format::{FP8_BLOCK, Format, mxfp4};

/// Names of tensors beside a weight that hold scales. One that its format does not have is an error, not a leftover.
const SCALES: [&str; 7] = [
    "weight_scale",
    "weight_scale_2",
    "weight_global_scale",
    "weight_scale_inv",
    "input_scale",
    "input_scale_2",
    "input_global_scale",
];

const DAMAGED: &str = "the export is damaged: download or export it again";
const UNCALIBRATED: &str =
    "calibration did not reach this linear: export again with more calibration data, or with weights only (W4A16)";

/// The order of NVFP4 block scales in a file; other formats have only the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ScaleOrder {
    /// Row-major `[N, K/16]`, as every producer writes them.
    #[default]
    Linear,
    /// In 128x4 order, padded to `[N up to 128, K/16 up to 4]`: scales that were made ready for one kind of matrix unit.
    /// They are brought back into rows.
    Swizzled,
}

/// What multiplies (or divides) whole rows.
#[derive(Clone, Debug, PartialEq)]
pub enum RowScales {
    /// Nothing: BF16, MXFP4, FP8 in blocks.
    None,
    /// One number for all rows, in the convention of its file.
    Tensor(Global),
    /// A multiplier for each row, `[N]`.
    Rows(Vec<f32>),
}

/// One linear's weight as it lies on disk, with what its scales mean. Borrows from the checkpoint.
#[derive(Clone, Debug)]
pub struct Stored<'a> {
    /// What the weight belongs to: `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// The format, by the tensors' names and dtypes.
    pub format: Format,
    /// N, rows.
    pub n: usize,
    /// K, elements of a row.
    pub k: usize,
    /// Codes, row-major, as on disk.
    pub codes: &'a [u8],
    /// Block scales, row-major: NVFP4 E4M3 `[N, K/16]`; MXFP4 E8M0 `[N, K/32]`; FP8 in blocks f32, little-endian,
    /// `[N, K/128]`, each row of blocks repeated for its 128 rows. Empty for other formats.
    pub scales: Cow<'a, [u8]>,
    /// NVFP4's f32 of the tensor; FP8's of the tensor or of each row.
    pub row_scales: RowScales,
    /// NVFP4: the calibrated scale of the inputs, in its file's convention. `None`: the file has none, and then it was
    /// not declared to have one; or the module was declared to have inputs of another kind, whose scale is checked and
    /// not used.
    pub input: Option<Global>,
    /// Names of all tensors that this took from, for [`Checkpoint::check_all_used`].
    pub tensors: Vec<&'a str>,
}

/// Names of the scales of a KV cache, of keys and of values: as ModelOpt and compressed-tensors write them; the same
/// beside the attention; Quark's and older llm-compressor's; AutoFP8's one for both.
const KV_SCALES: [[&str; 2]; 4] = [
    ["k_proj.k_scale", "v_proj.v_scale"],
    ["k_scale", "v_scale"],
    ["k_proj.output_scale", "v_proj.output_scale"],
    ["kv_scale", "kv_scale"],
];

/// The calibrated scales of a layer's KV cache: `amax / 448`, to multiply E4M3 codes by.
#[derive(Clone, Debug, PartialEq)]
pub struct KvScales<'a> {
    /// Of the keys.
    pub k: f32,
    /// Of the values.
    pub v: f32,
    /// Names of both tensors, or of the one for both, for [`Checkpoint::check_all_used`].
    pub tensors: Vec<&'a str>,
}

impl Stored<'_> {
    /// What multiplies row `row`, besides its block scales; 1 where nothing does.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row_scale(&self, row: usize) -> f32 {
        assert!(row < self.n, "row {row} of {}", self.n);
        match &self.row_scales {
            RowScales::None => 1.0,
            RowScales::Tensor(global) => global.multiplier(),
            RowScales::Rows(rows) => rows[row],
        }
    }

    /// What multiplies each row, `[N]`; empty for formats that have nothing of the kind.
    pub fn row_scale_values(&self) -> Vec<f32> {
        match &self.row_scales {
            RowScales::None => Vec::new(),
            RowScales::Tensor(global) => vec![global.multiplier(); self.n],
            RowScales::Rows(rows) => rows.clone(),
        }
    }

    /// Decodes row `row` into `out`, which has K elements.
    ///
    /// # Panics
    /// If there is no such row, or if `out` has another length.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.k, "a row of {} has K elements", self.module);
        let (codes, scales) = (self.format.row_bytes(self.k), self.format.scale_bytes(self.k));
        let codes = &self.codes[row * codes..][..codes];
        self.format.decode_row(codes, &self.scales[row * scales..][..scales], self.row_scale(row), out);
    }
}

impl Checkpoint {
    /// The weight `[N, K]` of a linear `module`, with its scales, all checked. `order` is that of NVFP4 block scales;
    /// `quantization` says whether a scale of the inputs must be there (for the format the tensors have the last word).
    ///
    /// # Errors
    /// One that names the tensor: missing, unexpected beside the others, of another dtype or shape; a scale that is not a
    /// finite number above zero; a NaN among block scales or FP8 codes; K that is not whole blocks; a dtype that is not
    /// read (F16, F32).
    pub fn stored(
        &self,
        module: &str,
        [n, k]: [usize; 2],
        quantization: &Quantization,
        order: ScaleOrder,
    ) -> Result<Stored<'_>> {
        let mut parts = Parts { checkpoint: self, module, tensors: Vec::new() };
        let weight = match (parts.optional("weight"), parts.optional("weight_packed")) {
            (None, None) => return Err(self.tensor(&parts.name("weight")).unwrap_err()),
            (Some(one), None) | (None, Some(one)) => one,
            (Some(plain), Some(packed)) => {
                let reason = format!("stands beside {}: one linear has one weight", json::name(plain.name));
                return Err(fault(&packed, reason));
            }
        };
        let packed = weight.name.ends_with("_packed");
        if n == 0 || k == 0 {
            return Err(fault(&weight, format!("is {} {:?}: a linear has elements", weight.dtype, weight.shape)));
        }
        let mut stored = match weight.dtype {
            Dtype::Bf16 if !packed => parts.bf16(&weight, [n, k])?,
            Dtype::U8 => parts.fp4(&weight, [n, k], order)?,
            Dtype::F8E4M3 if !packed => parts.fp8(&weight, [n, k])?,
            Dtype::F16 | Dtype::F32 | Dtype::F64 if !packed => {
                let reason = format!(
                    "is {} {:?}, but should be BF16 [{n}, {k}]; `fourfold quantize --format bf16` converts it",
                    weight.dtype, weight.shape
                );
                return Err(fault(&weight, reason));
            }
            other => {
                let should = if packed { "U8 (packed FP4)" } else { "BF16, F8_E4M3 or U8 (packed FP4)" };
                return Err(fault(&weight, format!("is {other} {:?}, but should be {should}", weight.shape)));
            }
        };
        let stray = SCALES
            .iter()
            .map(|part| parts.name(part))
            .find(|name| self.tensors.contains_key(name) && !stored.tensors.contains(&name.as_str()));
        if let Some(stray) = stray {
            let reason = format!("stands beside {}, which is {} and has no such scale", weight.name, stored.format);
            return Err(fault(&self.tensor(&stray)?, json::clip(&reason, 200)));
        }
        let declared = quantization.resolve(module)?;
        let calibrated = Some(&Scheme::Nvfp4 { activations: ActivationScheme::StaticGlobal });
        if stored.format == Format::Nvfp4 && stored.input.is_none() && declared == calibrated {
            let part = match quantization.producer {
                _ if packed => "input_global_scale",
                Producer::Quark => "input_scale_2",
                _ => "input_scale",
            };
            let reason = format!("is missing, but the config declares calibrated inputs; {UNCALIBRATED}");
            return Err(Error::tensor(weight.file, json::name(&parts.name(part)), reason));
        }
        // Where inputs are declared to be something else than calibrated FP4, the scale is another quantity: that of
        // FP8 inputs (W4A8) is amax / 448.
        if declared.is_some() && declared != calibrated {
            stored.input = None;
        }
        stored.module = module.to_owned();
        Ok(stored)
    }

    /// The scales of the KV cache of an attention (`model.layers.0.self_attn`): `k_proj.k_scale` and `v_proj.v_scale`,
    /// `k_scale` and `v_scale`, `k_proj.output_scale` and `v_proj.output_scale`, or `kv_scale` for both; `None` where the
    /// file has none.
    ///
    /// # Errors
    /// If only one of the two is there, if several spellings are, or if one is not a single finite F32 or BF16 above zero.
    pub fn kv_scales(&self, attention: &str) -> Result<Option<KvScales<'_>>> {
        let mut parts = Parts { checkpoint: self, module: attention, tensors: Vec::new() };
        let mut found: Option<KvScales> = None;
        for [k, v] in KV_SCALES {
            let (k, v) = match (parts.optional(k), parts.optional(v)) {
                (None, None) => continue,
                (Some(k), Some(v)) => (k, v),
                (one, _) => {
                    let (missing, there) = if one.is_some() { (v, k) } else { (k, v) };
                    let reason = format!("is missing, but {} is there; {DAMAGED}", json::name(&parts.name(there)));
                    return Err(Error::tensor(self.name(), json::name(&parts.name(missing)), reason));
                }
            };
            if let Some(first) = &found {
                return Err(fault(
                    &k,
                    format!("stands beside {}: one cache has one scale", json::name(first.tensors[0])),
                ));
            }
            let k_scale = parts.scalar(&k, DAMAGED)?;
            let v_scale = if k.name == v.name { k_scale } else { parts.scalar(&v, DAMAGED)? };
            let (k, v) = (k_scale, v_scale);
            found = Some(KvScales { k, v, tensors: std::mem::take(&mut parts.tensors) });
        }
        Ok(found)
    }
}

/// The tensors of one module, collected as they are used.
struct Parts<'a, 'm> {
    checkpoint: &'a Checkpoint,
    module: &'m str,
    tensors: Vec<&'a str>,
}

impl<'a> Parts<'a, '_> {
    fn name(&self, part: &str) -> String {
        format!("{}.{part}", self.module)
    }

    fn optional(&self, part: &str) -> Option<TensorView<'a>> {
        let name = self.name(part);
        self.checkpoint.tensors.get_key_value(&name).map(|(name, tensor)| self.checkpoint.view(name, tensor))
    }

    /// A tensor without which `weight` means nothing.
    fn required(&self, part: &str, weight: &TensorView) -> Result<TensorView<'a>> {
        self.optional(part).ok_or_else(|| {
            let there = format!("{} {:?}", weight.dtype, weight.shape);
            let reason = format!("is missing, and {} is {there}, which means nothing without it", weight.name);
            Error::tensor(weight.file, json::name(&self.name(part)), json::clip(&reason, 300))
        })
    }

    fn finish(
        &mut self,
        format: Format,
        [n, k]: [usize; 2],
        codes: &'a [u8],
        scales: Cow<'a, [u8]>,
        row_scales: RowScales,
    ) -> Stored<'a> {
        let tensors = std::mem::take(&mut self.tensors);
        Stored { module: String::new(), format, n, k, codes, scales, row_scales, input: None, tensors }
    }

    fn bf16(&mut self, weight: &TensorView<'a>, [n, k]: [usize; 2]) -> Result<Stored<'a>> {
        let codes = weight.expect(Dtype::Bf16, &[n, k])?;
        self.tensors.push(weight.name);
        Ok(self.finish(Format::Bf16, [n, k], codes, Cow::Borrowed(&[]), RowScales::None))
    }

    fn fp4(&mut self, weight: &TensorView<'a>, [n, k]: [usize; 2], order: ScaleOrder) -> Result<Stored<'a>> {
        let scales = self.required("weight_scale", weight)?;
        let format = match scales.dtype {
            Dtype::F8E4M3 => Format::Nvfp4,
            Dtype::U8 | Dtype::F8E8M0 => Format::Mxfp4,
            other => {
                let should = "F8_E4M3 (NVFP4), or U8 or F8_E8M0 (MXFP4)";
                return Err(fault(&scales, format!("is {other} {:?}, but should be {should}", scales.shape)));
            }
        };
        whole_blocks(weight, format, k)?;
        let codes = weight.expect(Dtype::U8, &[n, k / 2])?;
        self.tensors.extend([weight.name, scales.name]);
        if format == Format::Mxfp4 {
            let bytes = scales.expect(scales.dtype, &[n, k / mxfp4::BLOCK])?;
            check_e8m0(&scales)?;
            return Ok(self.finish(format, [n, k], codes, Cow::Borrowed(bytes), RowScales::None));
        }

        let bytes = in_rows(&scales, [n, k / nvfp4::BLOCK], order)?;
        check_e4m3_scales(&scales, &bytes, k / nvfp4::BLOCK)?;
        let packed = weight.name.ends_with("_packed");
        let (global, convention): (_, fn(f32) -> Global) = match packed {
            true => (self.required("weight_global_scale", weight)?, Global::Divisor),
            false => (self.required("weight_scale_2", weight)?, Global::Multiplier),
        };
        let global = self.global(&global, convention, DAMAGED)?;
        let mut input = None;
        for part in if packed { &["input_global_scale"][..] } else { &["input_scale", "input_scale_2"] } {
            let Some(view) = self.optional(part) else { continue };
            if input.is_some() {
                return Err(fault(&view, format!("stands beside {}: one of them is wrong", self.name("input_scale"))));
            }
            input = Some(self.global(&view, convention, UNCALIBRATED)?);
        }
        let stored = self.finish(format, [n, k], codes, bytes, RowScales::Tensor(global));
        Ok(Stored { input, ..stored })
    }

    fn fp8(&mut self, weight: &TensorView<'a>, [n, k]: [usize; 2]) -> Result<Stored<'a>> {
        let codes = weight.expect(Dtype::F8E4M3, &[n, k])?;
        self.tensors.push(weight.name);
        let grid = [n.div_ceil(FP8_BLOCK), k.div_ceil(FP8_BLOCK)];
        let inverse = self.optional("weight_scale_inv");
        let scales = match inverse {
            Some(inverse) => inverse,
            None => self.required("weight_scale", weight)?,
        };
        let rows = [vec![], vec![1], vec![n], vec![n, 1]];
        let in_blocks = inverse.is_some() || (scales.shape == grid && !rows.iter().any(|shape| scales.shape == *shape));
        if in_blocks {
            whole_blocks(weight, Format::Fp8Blocks, k)?;
        }
        if in_blocks && scales.shape != grid {
            return Err(fault(&scales, format!("is {} {:?}, but should be {grid:?}", scales.dtype, scales.shape)));
        }
        if !in_blocks && !rows.iter().any(|shape| scales.shape == *shape) {
            let should = format!("[], [1], [{n}] or [{n}, 1] for rows, or {grid:?} for blocks");
            return Err(fault(&scales, format!("is {} {:?}, but should be {should}", scales.dtype, scales.shape)));
        }
        let values = self.floats(&scales)?;
        if let Some(at) = values.iter().position(|scale| !positive(*scale)) {
            let index = if in_blocks { format!("{:?}", [at / grid[1], at % grid[1]]) } else { format!("[{at}]") };
            return Err(fault(&scales, not_positive(&format!("the scale at {index}"), values[at], DAMAGED)));
        }
        check_e4m3_codes(weight)?;
        if let Some(input) = self.optional("input_scale") {
            self.scalar(&input, UNCALIBRATED)?; // what the inputs of FP8 products were calibrated for is not used
        }
        if !in_blocks {
            let row_scales = match values[..] {
                [one] => RowScales::Tensor(Global::Multiplier(one)),
                _ => RowScales::Rows(values),
            };
            return Ok(self.finish(Format::Fp8, [n, k], codes, Cow::Borrowed(&[]), row_scales));
        }
        let mut expanded = Vec::with_capacity(n * grid[1] * 4);
        for row in 0..n {
            let of_row = &values[row / FP8_BLOCK * grid[1]..][..grid[1]];
            of_row.iter().for_each(|scale| expanded.extend(scale.to_le_bytes()));
        }
        Ok(self.finish(Format::Fp8Blocks, [n, k], codes, Cow::Owned(expanded), RowScales::None))
    }

    /// All elements of an F32 or BF16 tensor, which is used with that.
    fn floats(&mut self, view: &TensorView<'a>) -> Result<Vec<f32>> {
        let values = match view.dtype {
            Dtype::F32 => view.bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Dtype::Bf16 => {
                let halves = view.bytes.as_chunks().0.iter();
                halves.map(|b| crate::format::bf16::decode(u16::from_le_bytes(*b))).collect()
            }
            other => return Err(fault(view, format!("is {other} {:?}, but scales are F32 or BF16", view.shape))),
        };
        self.tensors.push(view.name);
        Ok(values)
    }

    /// The one number of a tensor `[]` or `[1]`, finite and above zero.
    fn scalar(&mut self, view: &TensorView<'a>, advice: &str) -> Result<f32> {
        if !matches!(view.shape, [] | [1]) {
            return Err(fault(
                view,
                format!("is {} {:?}, but should be one number, [] or [1]", view.dtype, view.shape),
            ));
        }
        let value = self.floats(view)?[0];
        if !positive(value) {
            return Err(fault(view, not_positive("it", value, advice)));
        }
        Ok(value)
    }

    fn global(&mut self, view: &TensorView<'a>, convention: fn(f32) -> Global, advice: &str) -> Result<Global> {
        let value = self.scalar(view, advice)?;
        let global = convention(value);
        if !positive(global.multiplier()) {
            // A divisor so small that its inverse overflows.
            return Err(fault(view, format!("its inverse, 1 / {value:e}, is not a finite f32: {advice}")));
        }
        Ok(global)
    }
}

/// The scales of NVFP4 row-major, `[N, K/16]`. The two orders differ in shape unless both sizes need no padding.
fn in_rows<'a>(scales: &TensorView<'a>, [n, blocks]: [usize; 2], order: ScaleOrder) -> Result<Cow<'a, [u8]>> {
    let linear = [n, blocks];
    let swizzled = [n.next_multiple_of(128), blocks.next_multiple_of(4)];
    let is = format!("is {} {:?}", scales.dtype, scales.shape);
    match order {
        ScaleOrder::Linear if scales.shape == linear => Ok(Cow::Borrowed(scales.bytes)),
        ScaleOrder::Swizzled if scales.shape == swizzled => Ok(Cow::Owned(nvfp4::unswizzle(scales.bytes, n, blocks))),
        ScaleOrder::Linear if scales.bytes.len() == nvfp4::swizzled_bytes(n, blocks) && scales.shape != linear => {
            let reason = format!("{is}, the size of scales in 128x4 order, but should be row-major {linear:?}");
            Err(fault(scales, format!("{reason}: say that they are swizzled, or export them row-major")))
        }
        ScaleOrder::Swizzled if scales.shape == linear => {
            let reason = format!("{is}, which is row-major, but should be in 128x4 order, padded to {swizzled:?}");
            Err(fault(scales, format!("{reason}: do not say that they are swizzled")))
        }
        ScaleOrder::Linear => Err(fault(scales, format!("{is}, but should be F8_E4M3 {linear:?}"))),
        ScaleOrder::Swizzled => Err(fault(scales, format!("{is}, but should be in 128x4 order, {swizzled:?}"))),
    }
}

fn whole_blocks(weight: &TensorView, format: Format, k: usize) -> Result<()> {
    match k % format.block() {
        0 => Ok(()),
        _ => Err(fault(
            weight,
            format!("has rows of {k} elements, which are not whole {format} blocks of {}", format.block()),
        )),
    }
}

fn positive(scale: f32) -> bool {
    scale.is_finite() && scale > 0.0
}

fn not_positive(what: &str, value: f32, advice: &str) -> String {
    format!("{what} is {value}, but a scale is a finite number above zero: {advice}")
}

fn fault(view: &TensorView, reason: impl Into<String>) -> Error {
    Error::tensor(view.file, json::name(view.name), reason)
}
