//! Making FP4 checkpoints: a Hugging Face directory in bf16, f16 or f32 becomes one in MXFP4 or NVFP4, and an MXFP4 one
//! becomes NVFP4 by an exact cast.
//!
//! | file | what it owns |
//! | --- | --- |
//! | `plan.rs` | what becomes of each tensor, under which names; all that can be checked before the first byte is written |
//! | `source.rs` | rows of a source's matrices as f32 |
//! | `encode.rs` | rows to codes, in parallel, with their deviation |
//! | `calibrate.rs` | the largest activations over a text, for NVFP4's `input_scale` |
//! | `config.rs` | what the new checkpoint says about itself |
//!
//! The new directory is `checkpoint/write.rs`'s.
//!
//! What is read: linears `model.layers.*_proj.weight` of two dimensions; the fused experts of a gpt-oss, in MXFP4 or as
//! transformers holds them (transposed); MXFP4 of compressed-tensors. Of a gpt-oss only the experts are taken unless
//! patterns name more, as in the released files. Embeddings, `lm_head`, norms, routers and biases always stay, in bf16.
//!
//! The same source and options give the same bytes, whatever the number of threads. At any time about one matrix is in
//! memory.

mod calibrate;
mod config;
mod encode;
mod plan;
mod source;

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;

pub use self::calibrate::{Calibration, calibrate};

use self::encode::Scheme;
use self::plan::{Linear, Plan, Work};
use self::source::Layout;
use crate::checkpoint::write::{self, Directory, Planned, Shard};
use crate::checkpoint::{Checkpoint, Dtype, TensorView, check_finite_bf16};
use crate::error::Result;
use crate::format::{Format, nvfp4};

/// Bytes of tensors in one file, unless asked otherwise.
pub const SHARD_BYTES: u64 = 4_000_000_000;

/// The side files that a new checkpoint takes over.
const COPIED: [&str; 4] = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"];

/// How the scale of a block is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ScaleSearch {
    /// By the block's largest magnitude alone: the rule of the OCP MX specification for MXFP4, ModelOpt's for NVFP4.
    #[default]
    Rtn,
    /// The one of a few around that with the least squared error.
    Mse,
}

/// What to make.
#[derive(Clone, Debug)]
pub struct Options {
    /// [`Format::Mxfp4`], [`Format::Nvfp4`], or [`Format::Bf16`], which only converts f16 and f32.
    pub format: Format,
    /// Names of modules to quantise (`*` stands for anything, as in `model.layers.*.mlp.*`); all linears if empty.
    pub layers: Vec<String>,
    /// How scales are chosen.
    pub search: ScaleSearch,
    /// For NVFP4: what activations were seen, to be written as `input_scale`.
    pub calibration: Option<Calibration>,
    /// Bytes of tensors in one file, at most, unless one linear takes more.
    pub shard_bytes: u64,
}

impl Options {
    /// All linears, no search, no calibration.
    pub fn new(format: Format) -> Self {
        let (layers, search) = (Vec::new(), ScaleSearch::default());
        Self { format, layers, search, calibration: None, shard_bytes: SHARD_BYTES }
    }
}

/// How far the work has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The tensor that was finished last, or what else is done.
    pub what: &'a str,
    /// Done so far, in bytes of the source (in tokens while calibrating).
    pub done: u64,
    /// To be done in all.
    pub total: u64,
}

/// How far a tensor is from what it was. The differences are taken from the decoded bytes, in f64.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Deviation {
    /// Sum of the squared differences.
    pub squares_off: f64,
    /// Sum of the squared elements as they were.
    pub squares: f64,
    /// The largest difference.
    pub max_abs: f64,
    /// MXFP4 blocks that NVFP4 could not say exactly.
    pub n_inexact: u64,
}

impl Deviation {
    /// Root of the mean squared difference, relative to that of the elements. 0 for a tensor of zeros that stayed one.
    pub fn relative_rms(&self) -> f64 {
        if self.squares_off == 0.0 { 0.0 } else { (self.squares_off / self.squares).sqrt() }
    }

    fn compare(&mut self, was: &[f32], is: &[f32]) {
        for (a, b) in was.iter().zip(is) {
            let off = f64::from(*b) - f64::from(*a);
            self.squares_off += off * off;
            self.squares += f64::from(*a) * f64::from(*a);
            self.max_abs = self.max_abs.max(off.abs());
        }
    }

    fn add(&mut self, other: &Self) {
        self.squares_off += other.squares_off;
        self.squares += other.squares;
        self.max_abs = self.max_abs.max(other.max_abs);
        self.n_inexact += other.n_inexact;
    }
}

/// What became of one linear, or of one tensor that was rounded to bf16.
#[derive(Clone, Debug, PartialEq)]
pub struct Changed {
    /// The module, or for a rounded tensor its name.
    pub name: String,
    /// What it is now.
    pub format: Format,
    /// Elements.
    pub elements: u64,
    /// How far it is from what it was.
    pub deviation: Deviation,
}

/// What was made.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Every tensor whose bytes changed, in the order of the source's names.
    pub changed: Vec<Changed>,
    /// Tensors that were copied as they are.
    pub n_copied: usize,
    /// Bytes of all tensors in the source.
    pub before_bytes: u64,
    /// Bytes of all tensors that were written.
    pub after_bytes: u64,
    /// The files with tensors.
    pub files: Vec<String>,
}

/// An element that no format can say, by its place in the tensor.
#[derive(Clone, Copy, Debug)]
struct Failure {
    flat: usize,
    value: f32,
}

/// Whether the work can be done, as far as it can be known before a tensor is read: dtypes, shapes, names, the
/// destination. Writes nothing.
pub fn check(source: &Checkpoint, destination: &Path, options: &Options) -> Result<()> {
    Plan::new(source, options)?;
    Directory::check(destination).map(|_| ())
}

/// Quantises `source` into the new directory `destination`, which may not be there or has to be empty. `None` if `progress` broke
/// it off: then nothing stays.
///
/// # Errors
/// The tensor, and where it applies the element, that cannot be quantised; the file that cannot be written. All that was
/// written until then is removed; a run that is killed leaves a directory without `config.json`, which nothing opens.
pub fn quantize(
    source: &Checkpoint,
    destination: &Path,
    options: &Options,
    progress: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
) -> Result<Option<Report>> {
    let plan = Plan::new(source, options)?;
    let mut directory = Directory::create(destination)?;
    let mut report = Report { before_bytes: source.total_bytes(), ..Report::default() };
    let groups = plan.groups();
    let mut making = Making { plan: &plan, options, groups, multipliers: HashMap::new(), done: 0, report: &mut report };
    let mut shards = Vec::new();
    for (file, works) in plan.shards(options) {
        let tensors: Vec<Planned> = works.iter().flat_map(|(_, outputs)| outputs.clone()).collect();
        let mut shard = directory.shard(&file, &tensors)?;
        let mut first = 0;
        for (idx, outputs) in &works {
            let name = making.make(&plan.works[*idx], &mut shard, first)?;
            first += outputs.len();
            let now = Progress { what: name, done: making.done, total: making.report.before_bytes };
            if progress(&now).is_break() {
                return Ok(None);
            }
        }
        directory.close(shard)?;
        shards.push((file, tensors));
    }
    report.after_bytes = shards.iter().flat_map(|(_, tensors)| tensors).map(Planned::bytes).sum();
    report.files = shards.iter().map(|(file, _)| file.clone()).collect();
    if shards.len() > 1 {
        directory.file("model.safetensors.index.json", &write::index(&shards))?;
    }
    for name in COPIED {
        if let Some(bytes) = source.file(name) {
            directory.file(name, bytes)?;
        }
    }
    if let Some(about) = config::hf_quant_config(&plan, options) {
        directory.file("hf_quant_config.json", &about)?;
    }
    directory.finish(&config::config(&plan, options))?;
    Ok(Some(report))
}

/// The work under way.
struct Making<'a, 'b> {
    plan: &'a Plan<'a>,
    options: &'a Options,
    /// The works of each group.
    groups: HashMap<String, Vec<usize>>,
    /// Of each group and expert, once one of the group was met.
    multipliers: HashMap<String, Vec<Multiplier>>,
    done: u64,
    report: &'b mut Report,
}

/// The f32 of an NVFP4 tensor.
#[derive(Clone, Copy)]
enum Multiplier {
    /// Of floats.
    Any(f32),
    /// 2^m, of a cast.
    Power(i32),
}

impl Multiplier {
    fn value(self) -> f32 {
        match self {
            Self::Any(value) => value,
            Self::Power(m) => 2f32.powi(m),
        }
    }
}

/// The f32 of an NVFP4 tensor with this largest magnitude. Readers divide by it and refuse what is not above zero, so that
/// zeros get 1, and what is too small for a normal number the smallest of these.
fn multiplier(amax: f32) -> f32 {
    if amax == 0.0 { 1.0 } else { (amax / nvfp4::MAX).max(f32::MIN_POSITIVE) }
}

impl<'a> Making<'a, '_> {
    /// Writes what one work becomes, whose outputs begin at `first` in the shard. Gives its name.
    fn make(&mut self, work: &'a Work, shard: &mut Shard, first: usize) -> Result<&'a str> {
        match work {
            Work::Keep(view) => self.keep(view, shard, first),
            Work::Quantize(linear) => self.quantize(linear, shard, first),
        }
    }

    fn keep(&mut self, view: &'a TensorView, shard: &mut Shard, first: usize) -> Result<&'a str> {
        self.done += view.bytes.len() as u64;
        if view.dtype == Dtype::Bf16 {
            check_finite_bf16(view)?;
            shard.write(first, 0, view.bytes)?;
            self.report.n_copied += 1;
            return Ok(view.name);
        }
        let (bytes, deviation) = encode::round(view)?;
        shard.write(first, 0, &bytes)?;
        let elements = bytes.len() as u64 / 2;
        self.report.changed.push(Changed { name: view.name.to_owned(), format: Format::Bf16, elements, deviation });
        Ok(view.name)
    }

    fn quantize(&mut self, linear: &'a Linear, shard: &mut Shard, first: usize) -> Result<&'a str> {
        let (matrix, options) = (&linear.matrix, self.options);
        let multipliers = match options.format {
            Format::Nvfp4 => self.multipliers(linear)?,
            _ => Vec::new(),
        };
        let mut deviation = Deviation::default();
        let (mut codes_end, mut scales_end) = (0, 0);
        for expert in 0..matrix.count {
            let scheme = match multipliers.get(expert) {
                None => Scheme::Mxfp4(options.search),
                Some(Multiplier::Any(value)) => Scheme::Nvfp4(options.search, *value),
                Some(Multiplier::Power(m)) => Scheme::Cast(*m),
            };
            let rows = encode::encode(matrix, expert, scheme)?;
            shard.write(first, codes_end, &rows.codes)?;
            shard.write(first + 1, scales_end, &rows.scales)?;
            codes_end += rows.codes.len() as u64;
            scales_end += rows.scales.len() as u64;
            rows.deviations.iter().for_each(|d| deviation.add(d));
        }
        if options.format == Format::Nvfp4 {
            let values: Vec<u8> = multipliers.iter().flat_map(|m| m.value().to_le_bytes()).collect();
            shard.write(first + 2, 0, &values)?;
        }
        if let Some(calibration) = &options.calibration {
            shard.write(first + 3, 0, &calibration.input_scale(&linear.module)?.to_le_bytes())?;
        }
        self.done += matrix.view.bytes.len() as u64;
        if let Layout::Mxfp4(scales) = matrix.layout {
            self.done += scales.bytes.len() as u64;
        }
        let elements = (matrix.count * matrix.n * matrix.k) as u64;
        let name = linear.module.clone();
        self.report.changed.push(Changed { name, format: options.format, elements, deviation });
        Ok(&linear.module)
    }

    /// One for each expert; what is shared by the linears of a group fits the largest of them.
    fn multipliers(&mut self, linear: &Linear) -> Result<Vec<Multiplier>> {
        let group = linear.group();
        if let Some(known) = self.multipliers.get(&group) {
            return Ok(known.clone());
        }
        let linears = self.groups[&group].iter().filter_map(|idx| match &self.plan.works[*idx] {
            Work::Quantize(other) => Some(other),
            Work::Keep(_) => None,
        });
        let linears: Vec<&Linear> = linears.collect();
        let one = |expert: usize| -> Result<Multiplier> {
            let (mut amax, mut exponent) = (0f32, None);
            for Linear { matrix, .. } in &linears {
                match matrix.mxfp4(expert, 0..matrix.n) {
                    Some((codes, scales)) => exponent = exponent.max(nvfp4::mxfp4_exponent(codes, scales)),
                    None => amax = amax.max(encode::amax(matrix, expert)?),
                }
            }
            Ok(match linear.matrix.layout {
                Layout::Mxfp4(_) => Multiplier::Power(exponent.unwrap_or(0)),
                _ => Multiplier::Any(multiplier(amax)),
            })
        };
        let multipliers = (0..linear.matrix.count).map(one).collect::<Result<Vec<_>>>()?;
        self.multipliers.insert(group, multipliers.clone());
        Ok(multipliers)
    }
}
