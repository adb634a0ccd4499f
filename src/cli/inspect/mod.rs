//! `fourfold inspect`: what a checkpoint holds, whether it is sound, and what will go where.
//!
//! The report is written as far as it goes; what the engine would refuse is the error at its end.

mod bad;
mod kinds;
mod ledger;
mod quantization;
mod scales;

use self::kinds::{format_of, layer, parameters, pattern};
use self::ledger::Ledger;
use super::Ending;
use super::engine::{ActivationsArg, KvArg, scale_order};
use super::terminal::{self, Paint, bytes, count, grouped};
use fourfold::checkpoint::{Checkpoint, Dtype, Mapping, TensorView, check_finite_bf16};
use fourfold::config::{Config, Family, GenerationConfig, LayerType, Scaling};
use fourfold::device::{Limits, gpu};
use fourfold::model::{Plan, WeightKind as Kind};
use fourfold::tokenizer::{ChatFormat, Text};
use fourfold::{DEFAULT_CHUNK, DEFAULT_CONTEXT, Error, HostStages, MATRIX_CHUNK, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

const EXAMPLES: &str = "\
Examples:
  fourfold inspect                                         the built-in model
  fourfold inspect ~/models/gpt-oss-20b --context 32768    with the memory that such a context takes
  fourfold inspect ~/models/gpt-oss-20b --all > report.txt

Families: gpt_oss, qwen3_moe, qwen3, llama; weights in BF16, MXFP4, NVFP4 and FP8.

Scales: every NVFP4 and FP8 scale shall be a finite number above zero (of NVFP4's block scales 0 will do); each one that \
is not is listed, and the exit code is 3. MXFP4: each block of 32 elements has an E8M0 byte s and is worth 2^(s - 127) times its codes. Suspicious is a byte \
of 255 (NaN); of 0 (2^-127, which GPUs may take for 0), or more than 40 away from the tensor's median, where the block \
has codes other than zero. The median is that of the bytes from 1 to 254.";

/// Where lines of words are broken.
const COLUMNS: usize = 80;

/// Flags of `fourfold inspect`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// A Hugging Face directory [default: the built-in model]
    #[arg(env = "FOURFOLD_MODEL")]
    dir: Option<PathBuf>,
    /// Every tensor by its name, and the scales of all layers instead of the first
    #[arg(long)]
    all: bool,
    /// Tokens that a conversation shall hold [default: 4096, or what the model allows]
    #[arg(long, value_name = "TOKENS")]
    context: Option<usize>,
    /// Most prompt tokens at once [default: 128; 1024 where `auto` takes a GPU with matrix units]
    #[arg(long, value_name = "TOKENS")]
    chunk: Option<usize>,
    /// How keys and values are kept
    #[arg(long, value_name = "FORMAT", default_value = "f32")]
    kv: KvArg,
    /// What is multiplied with NVFP4 weights: f32, or quantised to NVFP4 (W4A4); see `fourfold run --help`
    #[arg(long, value_name = "HOW", default_value = "f32")]
    activations: ActivationsArg,
    /// NVFP4 block scales lie in 128x4 order, not row by row
    #[arg(long)]
    swizzled_scales: bool,
    /// Read the files into memory instead of mapping them
    #[arg(long)]
    no_mmap: bool,
}

pub(super) fn inspect(args: &Args) -> anyhow::Result<Ending> {
    let mapping = if args.no_mmap { Mapping::Read } else { Mapping::Mmap };
    let checkpoint = match &args.dir {
        Some(dir) => fourfold::synth::open(dir, mapping)?,
        None => fourfold::default_checkpoint()?,
    };
    let out = io::BufWriter::new(Patient(io::stdout().lock()));
    let mut report = Report { checkpoint: &checkpoint, args, adapters: gpu::list(), out, paint: paint() };
    let config = Config::open(&checkpoint);
    report.files()?;
    let (mut sound, mut planned) = (Ok(()), None);
    match &config {
        Ok(config) => {
            report.architecture(config)?;
            sound = report.text(config)?;
            report.kinds(config)?;
            planned = Some(report.plan(config));
            report.quantization(config, planned.as_ref().and_then(|p| p.as_ref().ok()).map(|(_, ledger)| ledger))?;
        }
        Err(e) => writeln!(report.out, "\nconfig.json cannot be used: {}", terminal::printable(&e.to_string()))?,
    }
    report.tensors()?;
    report.scales()?;
    let scales = report.bad_scales()?;
    if let (Ok(config), Some(planned)) = (&config, planned) {
        sound = report.places(config, planned)?.and(sound);
    }
    report.out.flush()?;
    drop(report);
    config?;
    sound?;
    scales?;
    first_bad_value(&checkpoint)?;
    Ok(Ending::Done)
}

/// A reader that has left still wants the exit code.
struct Patient<W>(W);

impl<W: Write> Write for Patient<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let gone = |e: &io::Error| e.kind() == io::ErrorKind::BrokenPipe;
        self.0.write(bytes).or_else(|e| if gone(&e) { Ok(bytes.len()) } else { Err(e) })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().or_else(|e| if e.kind() == io::ErrorKind::BrokenPipe { Ok(()) } else { Err(e) })
    }
}

/// Matrices in bf16 are not read before they are uploaded, so a NaN in them would show in the logits only.
fn first_bad_value(checkpoint: &Checkpoint) -> Result<()> {
    let bf16: Vec<TensorView<'_>> = checkpoint.tensors().filter(|view| view.dtype == Dtype::Bf16).collect();
    let next = AtomicUsize::new(0);
    let bad = Mutex::new(BTreeMap::new());
    let work = || {
        while let at = next.fetch_add(1, Ordering::Relaxed)
            && let Some(view) = bf16.get(at)
        {
            if let Err(e) = check_finite_bf16(view) {
                bad.lock().unwrap_or_else(PoisonError::into_inner).insert(at, e);
            }
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..cores).for_each(|_| _ = scope.spawn(work)));
    let first = bad.into_inner().unwrap_or_else(PoisonError::into_inner).pop_first();
    first.map_or(Ok(()), |(_, e)| Err(e))
}

fn paint() -> Paint {
    Paint(terminal::styled(&io::stdout()))
}

/// The plan, and the books of loading by it.
type Planned = Result<(Plan, Ledger)>;

struct Report<'a, W: Write> {
    checkpoint: &'a Checkpoint,
    args: &'a Args,
    adapters: Vec<gpu::AdapterFacts>,
    out: W,
    paint: Paint,
}

impl<W: Write> Report<'_, W> {
    fn title(&mut self, title: &str) -> io::Result<()> {
        writeln!(self.out, "\n{}{}{}", self.paint.bold(), terminal::printable(title), self.paint.plain())
    }

    /// Name and values, in two columns.
    fn facts(&mut self, facts: &[(&str, String)]) -> io::Result<()> {
        let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
        for (name, value) in facts {
            let lines = wrapped(&terminal::printable(value), COLUMNS - width - 4);
            for (i, line) in lines.iter().enumerate() {
                let name = if i == 0 { *name } else { "" };
                writeln!(self.out, "  {name:width$}  {line}")?;
            }
        }
        Ok(())
    }

    fn files(&mut self) -> io::Result<()> {
        let mut files: Vec<&str> = self.checkpoint.tensors().map(|t| t.file).collect();
        files.sort_unstable();
        files.dedup();
        let (n_tensors, total) = (self.checkpoint.tensors().count(), self.checkpoint.total_bytes());
        let name = terminal::printable(self.checkpoint.name());
        writeln!(self.out, "{}{name}{}", self.paint.bold(), self.paint.plain())?;
        let files = format!("{} file{}", files.len(), if files.len() == 1 { "" } else { "s" });
        writeln!(self.out, "  {n_tensors} tensors of {} bytes ({}) in {files}", grouped(total), bytes(total))
    }

    fn architecture(&mut self, c: &Config) -> io::Result<()> {
        let sliding = c.layer_types.iter().filter(|t| **t == LayerType::Sliding).count();
        let full = c.num_hidden_layers - sliding;
        let rope = match &c.rope.scaling {
            None => format!("theta {}, not scaled", c.rope.theta),
            Some(Scaling::Llama3(l)) => {
                let original = l.original_max_position_embeddings;
                format!("theta {}, Llama 3 factor {} over {original} positions", c.rope.theta, l.factor)
            }
            Some(Scaling::Linear { factor }) => format!("theta {}, linear factor {factor}", c.rope.theta),
            Some(Scaling::Yarn(y)) => {
                let original = y.original_max_position_embeddings;
                format!("theta {}, YaRN factor {} over {original} positions", c.rope.theta, y.factor)
            }
        };
        let (moe, dense): (Vec<usize>, Vec<usize>) = (0..c.num_hidden_layers).partition(|layer| c.is_moe(*layer));
        let inside = if moe.is_empty() { "dense" } else { "with experts" };
        self.title(&format!("Architecture: {}, {inside}", c.family.name().replace('_', "-")))?;
        let heads = format!(
            "{} query heads of {}, {} key/value heads",
            c.num_attention_heads, c.head_dim, c.num_key_value_heads
        );
        let has = |part: &str| self.checkpoint.tensors().any(|t| t.name.contains(part));
        let with = [
            (has(".self_attn.q_norm."), "norms on heads"),
            (c.attention_bias, "biases"),
            (has(".self_attn.sinks"), "sinks"),
        ];
        let with: Vec<&str> = with.iter().filter_map(|(there, what)| there.then_some(*what)).collect();
        let with = if with.is_empty() { String::new() } else { format!("; {}", with.join(", ")) };
        let sees = match sliding {
            0 => "all see all positions".to_owned(),
            _ => format!("{sliding} see the last {} positions, {full} see all", c.sliding_window),
        };
        let mut facts = vec![
            ("hidden size", format!("{}, {} layers", c.hidden_size, c.num_hidden_layers)),
            ("attention", heads + &with),
            ("layers", sees),
        ];
        if !moe.is_empty() {
            let form = match c.family {
                Family::GptOss => format!("clamp {}", c.swiglu_limit),
                _ if c.norm_topk_prob => "weights made to sum to 1".to_owned(),
                _ => "weights as the softmax gives them".to_owned(),
            };
            facts.push((
                "experts",
                format!(
                    "{} a layer, {} used a token, none shared, inner size {}, {form}",
                    c.num_local_experts, c.num_experts_per_tok, c.moe_intermediate_size
                ),
            ));
        }
        if !dense.is_empty() {
            let some = match moe.is_empty() {
                true => String::new(),
                false => format!("layers {}: ", quantization::ranges(&BTreeSet::from_iter(dense))),
            };
            facts.push(("dense MLP", format!("{some}inner size {}", c.intermediate_size)));
        }
        let head = if c.tie_word_embeddings { "the embedding" } else { "a matrix of its own" };
        facts.extend([
            ("rope", rope),
            ("vocabulary", format!("{}; the output matrix is {head}", c.vocab_size)),
            ("context", format!("up to {} tokens", c.max_position_embeddings)),
        ]);
        self.facts(&facts)
    }

    /// Tokenizer, chat format and recommended sampling. The inner result is what the engine would refuse of them.
    fn text(&mut self, config: &Config) -> io::Result<Result<()>> {
        self.title("Text")?;
        let text = match Text::load(self.checkpoint, config) {
            Ok(text) => text,
            Err(e) => {
                self.facts(&[("refused", e.to_string())])?;
                return Ok(Err(e));
            }
        };
        let tokens = match &text.tokenizer {
            Some(t) => format!("{} tokens", t.vocab_size()),
            None => "none: takes and gives token ids only".to_owned(),
        };
        let chat = match (&text.tokenizer, &text.chat) {
            (None, _) | (_, None) => "none: bare continuation only",
            (_, Some(ChatFormat::Template(_))) => "the checkpoint's own template",
            (_, Some(ChatFormat::Harmony(_))) => "Harmony",
        };
        let sampling = recommended(&text.generation);
        self.facts(&[("tokenizer", tokens), ("chat format", chat.to_owned()), ("recommended", sampling)])?;
        Ok(Ok(()))
    }

    /// Parameters and bytes by kind, in all and for one token.
    fn kinds(&mut self, c: &Config) -> io::Result<()> {
        let mut kinds: BTreeMap<Kind, Sum> = BTreeMap::new();
        for view in self.checkpoint.tensors() {
            let sum = kinds.entry(Kind::of(view.name)).or_default();
            sum.tensors += 1;
            sum.parameters += parameters(&view);
            sum.bytes += view.bytes.len() as u64;
            let format = format_of(self.checkpoint, &view);
            sum.formats.extend(format.filter(|format| !sum.formats.contains(format)));
        }
        let total_bytes = self.checkpoint.total_bytes();
        let row = |(kind, sum): (&Kind, &Sum)| {
            let share = 100.0 * sum.bytes as f64 / total_bytes.max(1) as f64;
            let (parameters, bytes) = (count(sum.parameters), bytes(sum.bytes));
            vec![
                kind.name().to_owned(),
                sum.tensors.to_string(),
                sum.formats.join(", "),
                parameters,
                bytes,
                format!("{share:.1} %"),
            ]
        };
        let rows: Vec<Vec<String>> = kinds.iter().map(row).collect();
        self.title("Sizes")?;
        let head = ["kind", ">tensors", "formats", ">parameters", ">bytes", ">share"];
        terminal::table(&mut self.out, self.paint, &head, &rows)?;
        let of = |kind| kinds.get(&kind).map_or(0, |sum| sum.parameters);
        let total: u64 = kinds.values().map(|sum| sum.parameters).sum();
        let experts = of(Kind::Experts);
        let used = experts * c.num_experts_per_tok as u64 / c.num_local_experts.max(1) as u64;
        // Looking a row up is no arithmetic, but a head that is the embedding is.
        let looked_up = if of(Kind::Head) > 0 { of(Kind::Embedding) } else { 0 };
        let active = total - experts + used - looked_up;
        let (total, active) = (count(total), count(active));
        writeln!(
            self.out,
            "  {total} parameters, of which a token uses {active} (looking up its embedding not counted)"
        )
    }

    fn tensors(&mut self) -> io::Result<()> {
        let shape = |t: &TensorView<'_>| format!("{:?}", t.shape);
        let mut rows: Vec<Vec<String>> = Vec::new();
        if self.args.all {
            self.title("Tensors")?;
            let row = |t: TensorView<'_>| {
                vec![t.name.to_owned(), t.dtype.to_string(), shape(&t), grouped(t.bytes.len() as u64)]
            };
            rows.extend(self.checkpoint.tensors().map(row));
            return terminal::table(&mut self.out, self.paint, &["name", "dtype", "shape", ">bytes"], &rows);
        }
        let mut groups: BTreeMap<(String, String, String), (u64, u64)> = BTreeMap::new();
        for t in self.checkpoint.tensors() {
            let group = groups.entry((pattern(t.name), t.dtype.to_string(), shape(&t))).or_default();
            group.0 += 1;
            group.1 += t.bytes.len() as u64;
        }
        self.title("Tensors, layers and experts taken together (--all: one by one)")?;
        let row = |((name, dtype, shape), (n, bytes)): ((String, String, String), (u64, u64))| {
            vec![n.to_string(), name, dtype, shape, grouped(bytes)]
        };
        rows.extend(groups.into_iter().map(row));
        terminal::table(&mut self.out, self.paint, &[">n", "name", "dtype", "shape", ">bytes"], &rows)
    }

    fn scales(&mut self) -> io::Result<()> {
        let (mut rows, mut suspects, mut n_suspects) = (Vec::new(), Vec::new(), 0);
        for scales in self.checkpoint.tensors().filter(scales::is_scales) {
            let codes = kinds::codes(self.checkpoint, scales.name);
            let codes = codes.filter(|codes| codes.bytes.len() == scales.bytes.len() * scales::block_bytes());
            let found = scales::Found::read(&scales, codes.as_ref().map(|codes| codes.bytes));
            let first = |number: Option<usize>| number.is_none_or(|number| number == 0);
            if self.args.all || first(layer(scales.name)) && first(kinds::expert(scales.name)) {
                rows.push(found.row(&scales));
            }
            n_suspects += found.n_suspects;
            suspects.extend(found.suspects.into_iter().map(|suspect| suspect.row(&scales)));
        }
        if rows.is_empty() && n_suspects == 0 {
            return Ok(());
        }
        self.title(if self.args.all {
            "MXFP4 scales"
        } else {
            "MXFP4 scales of the first layer (--all: of every layer)"
        })?;
        let head = ["name", "shape", ">sum", ">mean", ">std", ">median", ">min", ">max", "first 10"];
        terminal::table(&mut self.out, self.paint, &head, &rows)?;
        if n_suspects == 0 {
            return writeln!(self.out, "  no suspicious scale in any layer (--help has the rule)");
        }
        let plural = if n_suspects == 1 { "" } else { "s" };
        self.title(&format!("{} suspicious scale{plural}, in all layers (--help has the rule)", grouped(n_suspects)))?;
        suspects.truncate(scales::LISTED);
        terminal::table(&mut self.out, self.paint, &["name", "place", ">scale", ">median", "why"], &suspects)?;
        match n_suspects - suspects.len() as u64 {
            0 => Ok(()),
            rest => writeln!(self.out, "  and {} more", grouped(rest)),
        }
    }

    /// Every NVFP4 and FP8 scale that is no finite number above zero. The inner result says so.
    fn bad_scales(&mut self) -> io::Result<Result<()>> {
        let walk = bad::Walk::over(self.checkpoint, scale_order(self.args.swizzled_scales));
        if walk.n_scales == 0 {
            return Ok(Ok(()));
        }
        let (n, tensors) = (grouped(walk.n_scales), grouped(walk.n_tensors));
        match walk.n_bad {
            0 => {
                self.title("NVFP4 and FP8 scales")?;
                writeln!(self.out, "  {n} in {tensors} tensors, all sound")?;
            }
            n_bad => {
                let plural = if n_bad == 1 { "" } else { "s" };
                self.title(&format!("{} bad scale{plural} of {n} in {tensors} tensors", grouped(n_bad)))?;
                let rows: Vec<Vec<String>> = walk.bad.iter().map(|bad| bad.row.clone()).collect();
                terminal::table(&mut self.out, self.paint, &["name", "place", "value"], &rows)?;
                if n_bad > rows.len() as u64 {
                    writeln!(self.out, "  and {} more", grouped(n_bad - rows.len() as u64))?;
                }
            }
        }
        if let Some(first) = &walk.first_lost {
            let n = grouped(walk.n_lost);
            writeln!(self.out, "  blocks with codes under a scale of 0, which count as zeros: {n}; the first is")?;
            writeln!(self.out, "    {}", terminal::printable(first))?;
        }
        let reason = || format!("is one of {} bad scales: a scale is a finite number above zero", walk.n_bad);
        Ok(match walk.bad.first() {
            None => Ok(()),
            Some(first) => {
                Err(Error::Tensor { file: first.file.clone(), tensor: first.tensor.clone(), reason: reason() })
            }
        })
    }

    /// What the config declares, what there is, and what calibration left.
    fn quantization(&mut self, c: &Config, ledger: Option<&Ledger>) -> io::Result<()> {
        let q = &c.quantization;
        self.title("Quantisation")?;
        let linears = quantization::Linears::read(self.checkpoint, c, scale_order(self.args.swizzled_scales));
        let mut facts = quantization::declared(self.checkpoint, q);
        match ledger {
            Some(ledger) => facts.extend(quantization::stored(&ledger.found, q, kv_name(self.args.kv))),
            None => facts.push(("stored", "not counted: the engine would refuse this model".to_owned())),
        }
        facts.extend(linears.facts(c));
        self.facts(&facts)?;
        let Some(ledger) = ledger else { return Ok(()) };
        let (rows, missing) = linears.inputs(&ledger.found);
        if rows.is_empty() {
            return Ok(());
        }
        self.title("Calibrated inputs: amax = 2688 x input_scale")?;
        terminal::table(&mut self.out, self.paint, &["stage", ">layers", ">amax", "scales in a layer"], &rows)?;
        missing.iter().try_for_each(|place| writeln!(self.out, "  missing: {place}"))
    }

    fn plan(&self, c: &Config) -> Planned {
        let context = self.args.context.unwrap_or(DEFAULT_CONTEXT.min(c.max_position_embeddings));
        let clamp = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let matrix = self.adapters.first().is_some_and(|first| gpu::is_hardware(first) && first.matrix);
        let chunk = self.args.chunk.unwrap_or(if matrix { MATRIX_CHUNK } else { DEFAULT_CHUNK });
        let plan = Plan {
            context: clamp(context),
            chunk: clamp(chunk.min(context)),
            paged: None,
            cache: self.args.kv.format(),
            host: HostStages::default(),
            activations: self.args.activations.activations(),
            scale_order: scale_order(self.args.swizzled_scales),
        };
        let unlimited = Limits {
            max_binding_bytes: u64::MAX,
            max_grid: u32::MAX,
            max_storage_buffers: 8,
            matrix: false,
            laid_out: false,
        };
        plan.check(c).and_then(|()| Ledger::fill(self.checkpoint, c, &plan, unlimited)).map(|ledger| (plan, ledger))
    }

    /// Memory, and how matrices are split. The inner result is what the engine would refuse of the tensors.
    fn places(&mut self, c: &Config, planned: Planned) -> io::Result<Result<()>> {
        let (plan, ledger) = match planned {
            Ok(planned) => planned,
            Err(e) => {
                writeln!(self.out, "\nThe engine would refuse this model.")?;
                return Ok(Err(e));
            }
        };
        let (context, chunk) = (plan.context, plan.chunk);
        self.title("What goes where")?;
        let needs = &ledger.needs;
        let (weights, rest) = (needs.weight_bytes(), needs.tables + needs.activations);
        let total = weights + needs.cache + rest;
        self.facts(&[
            ("weights", format!("{} on the device, not converted", bytes(weights))),
            ("KV cache", format!("{} for {context} tokens in {}", bytes(needs.cache), kv_name(self.args.kv))),
            ("the rest", format!("{} for activations of {chunk} tokens at once, and tables", bytes(rest))),
            ("together", format!("{} for one conversation", bytes(total))),
        ])?;
        for adapter in &self.adapters {
            let limits = ledger::limits(adapter);
            let fits = match Ledger::fill(self.checkpoint, c, &plan, limits) {
                Ok(ledger) => ledger.splits(),
                Err(e) => format!("does not fit: {e}"),
            };
            let name = terminal::printable(&adapter.name);
            writeln!(self.out, "  on {name} ({}): {}", adapter.backend, terminal::printable(&fits))?;
        }
        Ok(Ok(()))
    }
}

fn kv_name(kv: KvArg) -> &'static str {
    match kv {
        KvArg::F32 => "f32",
        KvArg::Bf16 => "bf16",
    }
}

fn recommended(g: &GenerationConfig) -> String {
    let temperature = g.temperature.filter(|_| g.do_sample != Some(false));
    let greedy = (g.do_sample == Some(false)).then(|| "greedy".to_owned());
    let parts = [
        greedy,
        temperature.map(|t| format!("temperature {t}")),
        g.top_k.map(|k| format!("top-k {k}")),
        g.top_p.map(|p| format!("top-p {p}")),
        g.min_p.map(|p| format!("min-p {p}")),
        g.repetition_penalty.map(|x| format!("repetition penalty {x}")),
        Some(format!("stops at tokens {:?}", g.eos_token_id)),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

#[derive(Default)]
struct Sum {
    tensors: u64,
    parameters: u64,
    bytes: u64,
    formats: Vec<&'static str>,
}

/// Lines of at most `width` characters, broken at spaces where there are some.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let line = lines.last_mut().expect("there is one");
        if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > width {
            lines.push(word.to_owned());
        } else {
            *line += if line.is_empty() { "" } else { " " };
            *line += word;
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::wrapped;

    #[test]
    fn lines_break_at_spaces() {
        assert_eq!(wrapped("one two three", 7), ["one two", "three"]);
        assert_eq!((wrapped("", 3), wrapped("longword", 3)), (vec![String::new()], vec!["longword".to_owned()]));
    }
}
