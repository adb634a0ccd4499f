//! From a checkpoint's tensors to weights on a device. Each family says which linears, experts and vectors it has and of
//! what shape; this file finds them in whatever format they are stored, checks them, and stacks what belongs together.

use super::{Plan, Progress, heads};
use crate::checkpoint::{Checkpoint, Dtype, ScaleOrder, Stored, check_e4m3_scales, check_e8m0, check_finite_bf16};
use crate::config::{Config, Producer};
use crate::device::{Buffer, Device};
use crate::error::{Error, Result};
use crate::format::Format;
use crate::format::nvfp4::Global;
use crate::ops::{Activations, ExpertScales, Experts, Piece, Projection, Weight, WeightBytes};
use crate::program::Slice;
use std::collections::HashSet;
use std::sync::Arc;

/// What the loader found besides weights.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Calibrated activation scales, by the stage that they belong to: `layers.0.mlp_norm`, and one a linear or expert.
    pub input_scales: Vec<InputScale>,
    /// Calibrated scales of the KV cache, keys then values, by layer. The cache itself is not quantised.
    pub kv_scales: Vec<(usize, [f32; 2])>,
    /// Linears by format: how many, and how many weights they hold.
    pub linears: Vec<(Format, usize, u64)>,
}

/// The calibrated scale of what a linear is multiplied with.
#[derive(Clone, Debug, PartialEq)]
pub struct InputScale {
    /// The stage that it belongs to.
    pub stage: String,
    /// The linear: `model.layers.0.mlp.experts.3.down_proj`.
    pub module: String,
    /// amax / 2688 of what calibration saw, as a multiplier.
    pub scale: f32,
}

/// Whether the rows that a linear reads are quantised where the plan says so. A router's and the head's never are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Inputs {
    AsPlanned,
    Exact,
}

/// Takes checked tensors to a device, counting bytes.
pub(super) struct Loader<'a> {
    pub(super) config: &'a Config,
    checkpoint: &'a Checkpoint,
    device: &'a Arc<dyn Device>,
    plan: &'a Plan,
    /// Nothing is kept: what takes time and cannot fail is left out.
    rehearsing: bool,
    used: HashSet<String>,
    found: Found,
    buffers: Vec<Buffer>,
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(Progress),
}

impl<'a> Loader<'a> {
    pub(super) fn new(
        checkpoint: &'a Checkpoint,
        config: &'a Config,
        device: &'a Arc<dyn Device>,
        plan: &'a Plan,
        progress: &'a mut dyn FnMut(Progress),
    ) -> Self {
        let (used, found) = (HashSet::new(), Found::default());
        let (rehearsing, total) = (false, checkpoint.total_bytes());
        Self {
            config,
            checkpoint,
            device,
            plan,
            rehearsing,
            used,
            found,
            buffers: Vec::new(),
            done: 0,
            total,
            progress,
        }
    }

    /// For a device that keeps nothing.
    pub(super) fn rehearsing(self) -> Self {
        Self { rehearsing: true, ..self }
    }

    /// What was found, and the buffers of everything but weights, which own theirs.
    pub(super) fn take(&mut self) -> (Found, Vec<Buffer>) {
        (std::mem::take(&mut self.found), std::mem::take(&mut self.buffers))
    }

    /// Refuses tensors that nobody asked for, and activations that no weight goes with.
    pub(super) fn check_whole(&mut self, found: &Found) -> Result<()> {
        // Tables that old exports carry along and every engine makes itself.
        let tables = self.checkpoint.tensors().map(|t| t.name).filter(|name| name.ends_with(".rotary_emb.inv_freq"));
        self.used.extend(tables.map(str::to_owned));
        self.checkpoint.check_all_used(&self.used)?;
        if self.plan.activations != Activations::F32 && found.linears.iter().all(|(f, ..)| *f != Format::Nvfp4) {
            let reason = "quantised activations go with NVFP4 weights, and this checkpoint has none: use \"f32\"";
            return Err(Error::option("activations", reason));
        }
        Ok(())
    }

    /// gpt-oss is published in MXFP4; what else there is of it has its experts laid out in another way.
    pub(super) fn refuse_unquantised(&self) -> Result<()> {
        if self.config.quantization.producer != Producer::None {
            return Ok(());
        }
        let reason = "quantization_config: is missing, and unquantised gpt-oss exports are not supported; supported: \"mxfp4\", as openai/gpt-oss-20b is published, which `fourfold quantize` makes";
        Err(Error::file(self.checkpoint.path("config.json"), reason))
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.checkpoint.tensor(name).is_ok()
    }

    /// Count a tensor as used and, up to here, as uploaded.
    fn use_tensor(&mut self, name: &str) -> Result<()> {
        self.done += self.checkpoint.tensor(name)?.bytes.len() as u64;
        self.used.insert(name.to_owned());
        (self.progress)(Progress { done_bytes: self.done, total_bytes: self.total });
        Ok(())
    }

    /// The bytes of a tensor of this dtype and shape.
    fn bytes(&mut self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<&'a [u8]> {
        let bytes = self.checkpoint.tensor(name)?.expect(dtype, shape)?;
        self.use_tensor(name)?;
        Ok(bytes)
    }

    fn put(&mut self, label: &str, bytes: &[u8]) -> Result<Slice> {
        let buffer = Buffer::with_bytes(self.device, label, bytes)?;
        let slice = buffer.slice();
        self.buffers.push(buffer);
        Ok(slice)
    }

    /// A bf16 tensor without NaN and infinity: a norm's gain, biases.
    fn bf16(&mut self, name: &str, shape: &[usize]) -> Result<&'a [u8]> {
        let bytes = self.bytes(name, Dtype::Bf16, shape)?;
        check_finite_bf16(&self.checkpoint.tensor(name)?)?;
        Ok(bytes)
    }

    /// A bf16 vector.
    pub(super) fn vector(&mut self, name: &str, n: usize) -> Result<Slice> {
        let bytes = self.bf16(name, &[n])?;
        self.put(name, bytes)
    }

    /// A bf16 matrix that rows are taken of.
    pub(super) fn table(&mut self, name: &str, [n, k]: [u32; 2]) -> Result<Weight> {
        let bytes = self.bytes(name, Dtype::Bf16, &[n as usize, k as usize])?;
        Weight::matrix(self.device, name, Format::Bf16, [n, k], &WeightBytes { codes: &[bytes], ..Default::default() })
    }

    /// One linear as it is stored.
    fn stored(&mut self, module: &str, n: u32, k: u32) -> Result<Stored<'a>> {
        let (checkpoint, config) = (self.checkpoint, self.config);
        let stored =
            checkpoint.stored(module, [n as usize, k as usize], &config.quantization, self.plan.scale_order)?;
        for name in &stored.tensors {
            self.use_tensor(name)?;
        }
        if let (Some(input), Some(stage)) = (stored.input, fed_by(module)) {
            let (module, scale) = (module.to_owned(), input.multiplier());
            self.found.input_scales.push(InputScale { stage, module, scale });
        }
        self.count(stored.format, 1, u64::from(n) * u64::from(k));
        Ok(stored)
    }

    fn count(&mut self, format: Format, linears: usize, weights: u64) {
        match self.found.linears.iter_mut().find(|(f, ..)| *f == format) {
            Some((_, n, total)) => (*n, *total) = (*n + linears, *total + weights),
            None => self.found.linears.push((format, linears, weights)),
        }
    }

    /// The scale that static activations need.
    fn static_scale(&self, stored: &Stored<'_>) -> Result<Option<Global>> {
        if self.plan.activations != Activations::Nvfp4Static || stored.format != Format::Nvfp4 {
            return Ok(None);
        }
        stored.input.map(Some).ok_or_else(|| self.uncalibrated(&stored.module))
    }

    /// A linear layer, its rows stacked from several modules of N rows each. Modules of the same format and activation
    /// scale become one matrix; their weights' scales stay apart, row by row.
    pub(super) fn projection(&mut self, modules: &[(String, u32)], k: u32, inputs: Inputs) -> Result<Projection> {
        let mut pieces = Vec::new();
        let mut run: Vec<Stored<'a>> = Vec::new();
        let (mut first, mut total) = (0, 0);
        for (module, n) in modules {
            let stored = self.stored(module, *n, k)?;
            let alike = |other: &Stored<'_>| {
                let same =
                    |a: Option<Global>, b: Option<Global>| a.map(Global::multiplier) == b.map(Global::multiplier);
                let wanted = self.plan.activations == Activations::Nvfp4Static && inputs == Inputs::AsPlanned;
                other.format == stored.format && (!wanted || same(other.input, stored.input))
            };
            if run.last().is_some_and(|last| !alike(last)) {
                pieces.push(self.piece(&std::mem::take(&mut run), first, k, inputs)?);
                first = total;
            }
            run.push(stored);
            total += n;
        }
        pieces.push(self.piece(&run, first, k, inputs)?);
        Ok(Projection { pieces, n: total, bias: None })
    }

    /// The modules' biases, stacked.
    pub(super) fn biases(&mut self, modules: &[(String, u32)]) -> Result<Option<Slice>> {
        let pieces = modules.iter().map(|(module, n)| self.bf16(&format!("{module}.bias"), &[*n as usize]));
        let bias = pieces.collect::<Result<Vec<_>>>()?.concat();
        self.put(&format!("{}.bias", modules[0].0), &bias).map(Some)
    }

    /// q, k and v of a layer, one below the other, with biases where the config says so.
    pub(super) fn qkv(&mut self, idx: usize) -> Result<Projection> {
        let [h, hk, dh] = heads(self.config);
        let modules = [("q_proj", h), ("k_proj", hk), ("v_proj", hk)];
        let modules = modules.map(|(name, heads)| (format!("model.layers.{idx}.self_attn.{name}"), heads * dh));
        let qkv = self.projection(&modules, self.config.hidden_size as u32, Inputs::AsPlanned)?;
        Ok(Projection { bias: if self.config.attention_bias { self.biases(&modules)? } else { None }, ..qkv })
    }

    /// The attention's output matrix of a layer, with a bias where the config says so.
    pub(super) fn attention_out(&mut self, idx: usize) -> Result<Projection> {
        let [h, _, dh] = heads(self.config);
        let module = [(format!("model.layers.{idx}.self_attn.o_proj"), self.config.hidden_size as u32)];
        let out = self.projection(&module, h * dh, Inputs::AsPlanned)?;
        Ok(Projection { bias: if self.config.attention_bias { self.biases(&module)? } else { None }, ..out })
    }

    fn piece(&mut self, run: &[Stored<'a>], first: u32, k: u32, inputs: Inputs) -> Result<Piece> {
        let rows = run.iter().map(|s| s.n as u32).sum();
        let scale = if inputs == Inputs::AsPlanned { self.static_scale(&run[0])? } else { None };
        let input_scale = match scale {
            Some(scale) => Some(self.put(&input_label(&run[0].module), &scale.multiplier().to_le_bytes())?),
            None => None,
        };
        let weight =
            self.stack(run, |device, label, format, bytes| Weight::matrix(device, label, format, [rows, k], bytes))?;
        Ok(Piece { weight, first, input_scale })
    }

    fn stack(
        &self,
        run: &[Stored<'a>],
        upload: impl FnOnce(&Arc<dyn Device>, &str, Format, &WeightBytes<'_>) -> Result<Weight>,
    ) -> Result<Weight> {
        let codes: Vec<&[u8]> = run.iter().map(|s| s.codes).collect();
        let scales: Vec<&[u8]> = run.iter().map(|s| &*s.scales).collect();
        let format = run[0].format;
        let row_scales: Vec<f32> = match format.has_row_scale() {
            true => run.iter().flat_map(Stored::row_scale_values).collect(),
            false => Vec::new(),
        };
        upload(
            self.device,
            &run[0].module,
            format,
            &WeightBytes { codes: &codes, scales: &scales, row_scales: &row_scales },
        )
    }

    /// A layer's experts, each stacked from the same modules of `n` rows each: `PREFIX.E.NAME`.
    pub(super) fn experts(&mut self, prefix: &str, names: &[&str], [e, n, k]: [u32; 3]) -> Result<Experts> {
        let mut run = Vec::new();
        let mut scales = Vec::new();
        for expert in 0..e {
            let from = run.len();
            for name in names {
                run.push(self.stored(&format!("{prefix}.{expert}.{name}"), n, k)?);
            }
            for stored in &run[from..] {
                if stored.format != run[0].format {
                    let reason = format!("is {}, but {} is {}", stored.format, run[0].module, run[0].format);
                    let reason = reason + ": experts of one layer in several formats are not supported";
                    return Err(Error::tensor(self.checkpoint.name(), stored.module.clone(), reason));
                }
                let scale = self.static_scale(stored)?.map(Global::multiplier);
                let first = self.static_scale(&run[from])?.map(Global::multiplier);
                if scale != first {
                    let reason = format!("has the input scale {scale:?}, but {} has {first:?}", run[from].module);
                    let reason = reason + ": one input has one scale; use activations \"f32\" or \"nvfp4-token\"";
                    return Err(Error::tensor(self.checkpoint.name(), stored.module.clone(), reason));
                }
            }
            scales.extend(self.static_scale(&run[from])?.map(Global::multiplier));
        }
        let shape = [e, n * names.len() as u32, k];
        let weight =
            self.stack(&run, |device, label, format, bytes| Weight::experts(device, label, format, shape, bytes))?;
        let input_scale = match scales.first() {
            None => None,
            Some(first) if scales.iter().all(|s| s == first) => {
                Some(ExpertScales::Shared(self.put(&input_label(&run[0].module), &first.to_le_bytes())?))
            }
            Some(_) => Some(ExpertScales::Each(self.put(&input_label(&run[0].module), bytemuck::cast_slice(&scales))?)),
        };
        Ok(Experts { weight, bias: None, input_scale })
    }

    /// gpt-oss's experts of a layer in one tensor: MXFP4 as released (`NAME_blocks`, `NAME_scales`), or NVFP4 as
    /// `fourfold quantize` writes it (`NAME`, `NAME_weight_scale`, `NAME_weight_scale_2`); with `NAME_bias`.
    pub(super) fn fused_experts(&mut self, name: &str, [e, n, k]: [u32; 3]) -> Result<Experts> {
        let [we, wn, wk] = [e, n, k].map(|n| n as usize);
        let mut input_scale = None;
        let weight = match self.has(&format!("{name}_weight_scale")) {
            false => {
                let blocks = self.bytes(&format!("{name}_blocks"), Dtype::U8, &[we, wn, wk / 32, 16])?;
                let scales = format!("{name}_scales");
                let bytes = self.bytes(&scales, Dtype::U8, &[we, wn, wk / 32])?;
                check_e8m0(&self.checkpoint.tensor(&scales)?)?;
                self.count(Format::Mxfp4, we, (we * wn * wk) as u64);
                let bytes = WeightBytes { codes: &[blocks], scales: &[bytes], row_scales: &[] };
                Weight::experts(self.device, name, Format::Mxfp4, [e, n, k], &bytes)?
            }
            true => {
                if self.plan.scale_order == ScaleOrder::Swizzled {
                    let reason =
                        format!("{name} has the experts' scales in one tensor, which are read row by row only");
                    return Err(Error::option("swizzled-scales", reason));
                }
                let codes = self.bytes(name, Dtype::U8, &[we, wn, wk / 2])?;
                let scale_name = format!("{name}_weight_scale");
                let scales = self.bytes(&scale_name, Dtype::F8E4M3, &[we, wn, wk / 16])?;
                check_e4m3_scales(&self.checkpoint.tensor(&scale_name)?, scales, wk / 16)?;
                let global_name = format!("{name}_weight_scale_2");
                let globals = self.bytes(&global_name, Dtype::F32, &[we])?;
                let globals: Vec<f32> = globals.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                if let Some(expert) = globals.iter().position(|g| !(g.is_finite() && *g > 0.0)) {
                    let reason = format!(
                        "is {} for expert {expert}, should be above zero: the checkpoint is damaged",
                        globals[expert]
                    );
                    return Err(Error::tensor(self.checkpoint.name(), global_name, reason));
                }
                input_scale = self.fused_input_scale(name)?;
                self.count(Format::Nvfp4, we, (we * wn * wk) as u64);
                let row_scales: Vec<f32> = globals.iter().flat_map(|g| vec![*g; wn]).collect();
                let bytes = WeightBytes { codes: &[codes], scales: &[scales], row_scales: &row_scales };
                Weight::experts(self.device, name, Format::Nvfp4, [e, n, k], &bytes)?
            }
        };
        let bias = self.bf16(&format!("{name}_bias"), &[we, wn])?;
        let bias = Some(self.put(&format!("{name}_bias"), bias)?);
        Ok(Experts { weight, bias, input_scale })
    }

    /// `NAME_input_scale` of fused experts, where the file has it.
    fn fused_input_scale(&mut self, name: &str) -> Result<Option<ExpertScales>> {
        let tensor = format!("{name}_input_scale");
        let wanted = self.plan.activations == Activations::Nvfp4Static;
        if !self.has(&tensor) {
            return if wanted { Err(self.uncalibrated(name)) } else { Ok(None) };
        }
        let bytes = self.bytes(&tensor, Dtype::F32, &[])?;
        let scale = f32::from_le_bytes(bytes.try_into().expect("one f32"));
        if !(scale.is_finite() && scale > 0.0) {
            let reason = format!("is {scale}, should be above zero: the checkpoint is damaged");
            return Err(Error::tensor(self.checkpoint.name(), tensor, reason));
        }
        let stage = fed_by(&format!("{}.{}", name, if name.ends_with("down_proj") { "down_proj" } else { "up_proj" }));
        self.found.input_scales.extend(stage.map(|stage| InputScale { stage, module: name.to_owned(), scale }));
        if wanted { Ok(Some(ExpertScales::Shared(self.put(&input_label(name), bytes)?))) } else { Ok(None) }
    }

    fn uncalibrated(&self, module: &str) -> Error {
        let reason =
            "has no calibrated input scale, which activations \"nvfp4-static\" need: use \"f32\" or \"nvfp4-token\"";
        Error::tensor(self.checkpoint.name(), module, reason)
    }

    /// cos and sin by position, the scaling's factor included. The angle is rounded to f32 first, as in the references.
    pub(super) fn rope_table(&mut self) -> Result<Slice> {
        let (rope, dh, context) = (&self.config.rope, self.config.head_dim, self.plan.context);
        let (inv_freq, factor) = (rope.inv_freq(dh), f64::from(rope.attention_factor()));
        let table = Buffer::new(self.device, "rope table", u64::from(context) * dh as u64 * 4)?;
        // In pieces: a table for millions of positions must not stand in host memory as a whole.
        let positions: Vec<u32> = (0..if self.rehearsing { 0 } else { context }).collect();
        for piece in positions.chunks(1 << 16) {
            let mut values = Vec::with_capacity(piece.len() * dh);
            for (p, f) in piece.iter().flat_map(|p| inv_freq.iter().map(move |f| (p, f))) {
                let angle = f64::from(*p as f32 * f);
                values.extend([(angle.cos() * factor) as f32, (angle.sin() * factor) as f32]);
            }
            let offset = u64::from(piece[0]) * dh as u64 * 4;
            let to = Slice { offset, bytes: values.len() as u64 * 4, ..table.slice() };
            self.device.write(to, bytemuck::cast_slice(&values))?;
        }
        let slice = table.slice();
        self.buffers.push(table);
        Ok(slice)
    }

    /// The scales of a layer's KV cache, where the file has them. They are checked and not used.
    pub(super) fn kv_scales(&mut self, idx: usize) -> Result<()> {
        if let Some(scales) = self.checkpoint.kv_scales(&format!("model.layers.{idx}.self_attn"))? {
            for name in &scales.tensors {
                self.use_tensor(name)?;
            }
            self.found.kv_scales.push((idx, [scales.k, scales.v]));
        }
        Ok(())
    }
}

/// The label of the buffer with a weight's scales of inputs.
fn input_label(module: &str) -> String {
    format!("{module} input scale")
}

/// The stage that a linear reads: names on disk are the same in all families.
fn fed_by(module: &str) -> Option<String> {
    let rest = module.strip_prefix("model.")?;
    let layer = rest.split('.').nth(1)?;
    let stage = match rest.rsplit('.').next()? {
        "q_proj" | "k_proj" | "v_proj" => "attn_norm",
        "o_proj" => "attention",
        "gate_proj" | "up_proj" => "mlp_norm",
        "down_proj" => "mlp.up",
        _ => return None,
    };
    Some(format!("layers.{layer}.{stage}"))
}
