//! What becomes of each tensor of a source: which are linears to quantise, which stay, and what stands in the new files.

use std::collections::HashMap;

use serde_json::{Map, Value};

use super::source::{Layout, Matrix, fault, is_float};
use super::{Calibration, Options};
use crate::checkpoint::write::Planned;
use crate::checkpoint::{Checkpoint, Dtype, TensorView, check_e8m0, json};
use crate::error::{Error, Result};
use crate::format::{Format, mxfp4};
use crate::trace::compare::matches;

/// Everything that is to be done, checked.
pub(super) struct Plan<'a> {
    /// In the order of the names in the source.
    pub(super) works: Vec<Work<'a>>,
    /// The model's `config.json`.
    pub(super) config: Map<String, Value>,
    /// Modules of layers that stay as they are, in the order of their names.
    pub(super) ignored: Vec<String>,
    pub(super) is_gpt_oss: bool,
}

/// What becomes of a tensor.
pub(super) enum Work<'a> {
    /// It stays, in bf16.
    Keep(TensorView<'a>),
    /// It is quantised.
    Quantize(Linear<'a>),
}

/// A linear, or the fused experts of a gpt-oss.
pub(super) struct Linear<'a> {
    /// The module: the tensor's name without `.weight`, `_blocks` and the like.
    pub(super) module: String,
    pub(super) matrix: Matrix<'a>,
    /// The experts of a layer in one tensor.
    pub(super) fused: bool,
}

impl Linear<'_> {
    /// Linears of one group share the scale of the tensor: q, k and v, and gate and up.
    pub(super) fn group(&self) -> String {
        let (parent, own) = self.module.rsplit_once('.').unwrap_or(("", &self.module));
        match own {
            "q_proj" | "k_proj" | "v_proj" => format!("{parent}.qkv"),
            "gate_proj" | "up_proj" => format!("{parent}.gate_up"),
            _ => self.module.clone(),
        }
    }
}

impl<'a> Plan<'a> {
    pub(super) fn new(source: &'a Checkpoint, options: &Options) -> Result<Self> {
        let path = source.path("config.json");
        let config = json::object(&path, source.require("config.json")?)?;
        let is_gpt_oss = config.get("model_type").and_then(Value::as_str) == Some("gpt_oss");
        let patterns = &options.layers;
        match options.format {
            Format::Bf16 if !patterns.is_empty() => {
                return Err(Error::option("layers", "goes with the formats mxfp4 and nvfp4: bf16 takes every tensor"));
            }
            Format::Bf16 | Format::Mxfp4 | Format::Nvfp4 => {}
            other => return Err(Error::option("format", format!("{other} is not written: mxfp4, nvfp4 or bf16"))),
        }
        if options.calibration.is_some() && options.format != Format::Nvfp4 {
            return Err(Error::option("calibrate", "goes with the format nvfp4: no other has scales of activations"));
        }
        let found: Vec<Found> =
            source.tensors().filter_map(|view| find(source, view, is_gpt_oss).transpose()).collect::<Result<_>>()?;
        let is_mxfp4 = |linear: &Linear| matches!(linear.matrix.layout, Layout::Mxfp4(_));
        let from_mxfp4 = found.iter().any(|f| matches!(f, Found::Linear(linear) if is_mxfp4(linear)));
        if from_mxfp4 && !patterns.is_empty() {
            return Err(Error::option("layers", "does not go with a source in MXFP4: all that is MXFP4 is cast"));
        }
        // The release's MXFP4 has no names for attention.
        let sayable = |l: &Linear| l.fused || !is_gpt_oss || options.format == Format::Nvfp4;
        let modules = || {
            found.iter().filter_map(|f| match f {
                Found::Linear(linear) if sayable(linear) => Some(&linear.module),
                _ => None,
            })
        };
        if let Some(pattern) = patterns.iter().find(|pattern| !modules().any(|module| matches(pattern, module))) {
            let example = modules().next().map_or_else(|| "there are none".into(), |m| format!("there is a {m}"));
            return Err(Error::option(
                "layers",
                format!("{pattern:?} matches no linear of {}; {example}", source.name()),
            ));
        }

        let mut plan = Self { works: Vec::new(), config, ignored: Vec::new(), is_gpt_oss };
        let mut any = false;
        for found in found {
            let selected = match &found {
                Found::Linear(linear) if from_mxfp4 => is_mxfp4(linear),
                Found::Linear(linear) if patterns.is_empty() => linear.fused || !is_gpt_oss,
                Found::Linear(linear) => sayable(linear) && patterns.iter().any(|p| matches(p, &linear.module)),
                Found::Fused(view) if options.format != Format::Bf16 => {
                    return Err(fault(
                        view,
                        "has the experts of a layer in one tensor, which is read of gpt-oss only: save the \
                        model with one tensor for each expert's projection",
                    ));
                }
                Found::Fused(_) | Found::Other(_) => false,
            };
            match found {
                Found::Linear(linear) if selected && options.format != Format::Bf16 => {
                    check(&linear, options)?;
                    any = true;
                    plan.works.push(Work::Quantize(linear));
                }
                Found::Linear(Linear { matrix: Matrix { view, .. }, .. }) | Found::Other(view) | Found::Fused(view) => {
                    plan.keep(view, options.format)?;
                }
            }
        }
        if !any && options.format != Format::Bf16 {
            let reason = "this model has no linears that could be quantised: model.layers.*_proj.weight of two dimensions, \
                          or the experts of a gpt-oss";
            return Err(Error::file(source.name(), reason));
        }
        Ok(plan)
    }

    fn keep(&mut self, view: TensorView<'a>, format: Format) -> Result<()> {
        if !is_float(view.dtype) {
            return Err(fault(
                &view,
                match view.dtype {
                    Dtype::F64
                    | Dtype::I16
                    | Dtype::U16
                    | Dtype::I32
                    | Dtype::U32
                    | Dtype::I64
                    | Dtype::U64
                    | Dtype::Bool
                    | Dtype::C64 => {
                        format!("is {}, which is not converted: BF16, F16 or F32 is", view.dtype)
                    }
                    _ if format == Format::Bf16 => {
                        format!("is {}: quantised already, and not taken back to bf16", view.dtype)
                    }
                    _ => format!(
                        "is {}: quantised already. Give the model in BF16, F16 or F32 (or, for --format nvfp4, in MXFP4)",
                        view.dtype
                    ),
                },
            ));
        }
        if let Some(module) = view.name.strip_suffix(".weight").filter(|_| view.shape.len() == 2)
            && module.starts_with(LAYERS)
        {
            self.ignored.push(module.to_owned());
        } else if view.shape.len() == 3 && fused_module(view.name).is_some() {
            self.ignored.push(view.name.to_owned());
        }
        self.works.push(Work::Keep(view));
        Ok(())
    }

    /// Which works share the scale of a tensor.
    pub(super) fn groups(&self) -> HashMap<String, Vec<usize>> {
        let mut groups: HashMap<String, Vec<usize>> = HashMap::new();
        for (idx, work) in self.works.iter().enumerate() {
            if let Work::Quantize(linear) = work {
                groups.entry(linear.group()).or_default().push(idx);
            }
        }
        groups
    }

    /// Works that go into one file each, in order, by number of bytes.
    pub(super) fn shards(&self, options: &Options) -> Vec<(String, Vec<Job>)> {
        let mut shards = vec![(0, Vec::new())];
        for (i, work) in self.works.iter().enumerate() {
            let outputs = work.outputs(options, self.is_gpt_oss);
            let bytes: u64 = outputs.iter().map(Planned::bytes).sum();
            let last = shards.last_mut().expect("there is always one");
            if !last.1.is_empty() && last.0 + bytes > options.shard_bytes {
                shards.push((bytes, vec![(i, outputs)]));
            } else {
                last.0 += bytes;
                last.1.push((i, outputs));
            }
        }
        let count = shards.len();
        let name = |i: usize| match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        shards.into_iter().enumerate().map(|(i, (_, works))| (name(i), works)).collect()
    }
}

impl Work<'_> {
    /// The tensors that it becomes: codes, scales, the multiplier, the scale of activations, as far as there are.
    pub(super) fn outputs(&self, options: &Options, is_gpt_oss: bool) -> Vec<Planned> {
        let Linear { module, matrix, fused } = match self {
            Self::Keep(view) => return vec![Planned::new(view.name, Dtype::Bf16, view.shape)],
            Self::Quantize(linear) => linear,
        };
        let Matrix { count, n, k, .. } = *matrix;
        // `experts.gate_up_proj_weight_scale` where there is no module of that name, `q_proj.weight_scale` where there is.
        let name = |what: &str| format!("{module}{}{what}", if *fused { "_" } else { "." });
        let shape = |own: &[usize]| if *fused { [&[count], own].concat() } else { own.to_vec() };
        if options.format == Format::Mxfp4 {
            let blocks = k / mxfp4::BLOCK;
            return if is_gpt_oss {
                vec![
                    Planned::new(name("blocks"), Dtype::U8, &shape(&[n, blocks, mxfp4::BLOCK_BYTES])),
                    Planned::new(name("scales"), Dtype::U8, &shape(&[n, blocks])),
                ]
            } else {
                vec![
                    Planned::new(name("weight_packed"), Dtype::U8, &shape(&[n, k / 2])),
                    Planned::new(name("weight_scale"), Dtype::U8, &shape(&[n, blocks])),
                ]
            };
        }
        let codes = if *fused { module.clone() } else { name("weight") };
        let mut outputs = vec![
            Planned::new(codes, Dtype::U8, &shape(&[n, k / 2])),
            Planned::new(name("weight_scale"), Dtype::F8E4M3, &shape(&[n, k / 16])),
            Planned::new(name("weight_scale_2"), Dtype::F32, &shape(&[])),
        ];
        if options.calibration.is_some() {
            outputs.push(Planned::new(name("input_scale"), Dtype::F32, &[]));
        }
        outputs
    }
}

/// A work, by its place in the plan, and the tensors that it becomes.
pub(super) type Job = (usize, Vec<Planned>);

const LAYERS: &str = "model.layers.";

/// A tensor of the source, looked at.
enum Found<'a> {
    Linear(Linear<'a>),
    /// Fused experts of a family whose layout of them is not known.
    Fused(TensorView<'a>),
    Other(TensorView<'a>),
}

/// What a tensor is; `None` for scales, which go with their codes.
fn find<'a>(source: &'a Checkpoint, view: TensorView<'a>, is_gpt_oss: bool) -> Result<Option<Found<'a>>> {
    let beside = |name: String| source.tensor(&name).ok();
    let name = view.name;
    if !name.starts_with(LAYERS) {
        return Ok(Some(Found::Other(view)));
    }
    let linear = |module: &str, layout, count, n, k, fused| {
        let matrix = Matrix { view, layout, count, n, k };
        Ok(Some(Found::Linear(Linear { module: module.to_owned(), matrix, fused })))
    };
    // MXFP4 as gpt-oss has it.
    if let Some(module) = name.strip_suffix("_blocks").filter(|m| is_gpt_oss && fused_module(m).is_some()) {
        let scales = source.tensor(&format!("{module}_scales"))?;
        let [count, n, blocks, mxfp4::BLOCK_BYTES] = *view.shape else {
            return Err(fault(&view, format!("has shape {:?}; MXFP4 blocks are [E, N, K/32, 16]", view.shape)));
        };
        view.expect(Dtype::U8, view.shape)?;
        scales.expect(scales.dtype, &[count, n, blocks])?;
        check_e8m0(&scales)?;
        let k = times(&view, blocks, mxfp4::BLOCK)?;
        return linear(module, Layout::Mxfp4(scales), count, n, k, true);
    }
    if let Some(module) = name.strip_suffix("_scales").filter(|m| is_gpt_oss && fused_module(m).is_some())
        && beside(format!("{module}_blocks")).is_some()
    {
        return Ok(None);
    }
    // MXFP4 as compressed-tensors has it. A global scale would make it NVFP4.
    if let Some(module) = name.strip_suffix(".weight_packed").filter(|_| view.dtype == Dtype::U8)
        && let Some(scales) = beside(format!("{module}.weight_scale"))
        && matches!(scales.dtype, Dtype::U8 | Dtype::F8E8M0)
        && beside(format!("{module}.weight_global_scale")).is_none()
    {
        let [n, half] = *view.shape else {
            return Err(fault(&view, format!("has shape {:?}; MXFP4 codes are [N, K/2]", view.shape)));
        };
        let (k, blocks) = (times(&view, half, 2)?, half / mxfp4::BLOCK_BYTES);
        if !half.is_multiple_of(mxfp4::BLOCK_BYTES) {
            return Err(fault(&view, format!("has rows of {k} elements, no multiple of 32")));
        }
        scales.expect(scales.dtype, &[n, blocks])?;
        check_e8m0(&scales)?;
        return linear(module, Layout::Mxfp4(scales), 1, n, k, false);
    }
    if let Some(module) = name.strip_suffix(".weight_scale").filter(|_| matches!(view.dtype, Dtype::U8 | Dtype::F8E8M0))
        && beside(format!("{module}.weight_packed")).is_some()
        && beside(format!("{module}.weight_global_scale")).is_none()
    {
        return Ok(None);
    }
    if !is_float(view.dtype) {
        return Ok(Some(Found::Other(view)));
    }
    match *view.shape {
        [count, k, n] if is_gpt_oss && fused_module(name).is_some() => linear(name, Layout::Columns, count, n, k, true),
        [_, _, _] if fused_module(name).is_some() => Ok(Some(Found::Fused(view))),
        [n, k] if name.ends_with("_proj.weight") => {
            linear(name.trim_end_matches(".weight"), Layout::Rows, 1, n, k, false)
        }
        _ => Ok(Some(Found::Other(view))),
    }
}

/// The name, if it is that of fused experts.
fn fused_module(name: &str) -> Option<&str> {
    let own = name.rsplit_once(".experts.")?.1;
    (name.starts_with(LAYERS) && matches!(own, "gate_up_proj" | "down_proj")).then_some(name)
}

/// The elements of a row of `units` bytes or blocks. A tensor without rows may claim any number of them.
fn times(view: &TensorView, units: usize, each: usize) -> Result<usize> {
    let too_large = || fault(view, format!("has shape {:?}, too large for this machine's addresses", view.shape));
    units.checked_mul(each).ok_or_else(too_large)
}

/// What can be known of a linear before it is read.
fn check(linear: &Linear, options: &Options) -> Result<()> {
    let Matrix { view, k, layout, .. } = &linear.matrix;
    // No bytes are no limit: the other dimensions may be anything.
    if view.shape.contains(&0) {
        return Err(fault(view, format!("has shape {:?}: a linear without elements cannot be quantised", view.shape)));
    }
    if matches!(layout, Layout::Mxfp4(_)) && options.format != Format::Nvfp4 {
        return Err(fault(view, "is MXFP4 already: only the format nvfp4 takes it"));
    }
    let block = options.format.block();
    if !k.is_multiple_of(block) {
        let reason = format!("has rows of {k} elements, no multiple of the {block} of a block in {}", options.format);
        return Err(fault(view, reason));
    }
    if let Some(calibration) = &options.calibration {
        calibration.input_scale(&linear.module)?;
    }
    Ok(())
}

/// The stage that a linear takes in, as the engine calls it.
pub(super) fn input_stage(module: &str) -> Option<String> {
    let (layer, rest) = module.strip_prefix(LAYERS)?.split_once('.')?;
    let (parent, own) = rest.rsplit_once('.')?;
    let in_mlp = parent == "mlp" || parent == "mlp.experts" || parent.starts_with("mlp.experts.");
    let stage = match own {
        "q_proj" | "k_proj" | "v_proj" if parent == "self_attn" => "attn_norm",
        "o_proj" if parent == "self_attn" => "attention",
        "gate_proj" | "up_proj" | "gate_up_proj" if in_mlp => "mlp_norm",
        "down_proj" if in_mlp => "mlp.up",
        _ => return None,
    };
    Some(format!("layers.{layer}.{stage}"))
}

impl Calibration {
    /// The scale of what a linear takes in: the largest magnitude divided by 2688.
    pub fn input_scale(&self, module: &str) -> Result<f32> {
        let fault = |reason: String| Error::option("calibrate", format!("{module}: {reason}"));
        let stage = input_stage(module).ok_or_else(|| fault("it is not known which stage it takes in".into()))?;
        match self.amax.get(&stage) {
            None => Err(fault(format!("the stage {stage}, which it takes in, was not seen"))),
            Some(amax) if *amax > 0.0 && amax.is_finite() => Ok(amax / crate::format::nvfp4::MAX),
            Some(amax) => Err(fault(format!("the largest magnitude of {stage} was {amax}, which gives no scale"))),
        }
    }
}
