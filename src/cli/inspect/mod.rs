//! `fourfold inspect`: what a checkpoint holds, whether it is sound, and what will go where.
//!
//! The report is written as far as it goes; what the engine would refuse is the error at its end.

mod ledger;
mod scales;

use super::Ending;
use super::run::KvArg;
use super::terminal::{self, Paint, bytes, count, grouped};
use fourfold::checkpoint::{Checkpoint, Dtype, Mapping, ScaleOrder, TensorView};
use fourfold::config::{Config, GenerationConfig, LayerType, Scaling};
use fourfold::device::{Limits, gpu};
use fourfold::model::Plan;
use fourfold::tokenizer::{ChatFormat, Text};
use fourfold::{Activations, DEFAULT_CHUNK, DEFAULT_CONTEXT, HostStages, Result};
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  fourfold inspect                                         the built-in model
  fourfold inspect ~/models/gpt-oss-20b --context 32768    with the memory that such a context takes
  fourfold inspect ~/models/gpt-oss-20b --all > report.txt

Scales: each FP4 block of 32 elements has an E8M0 byte s and is worth 2^(s - 127) times its codes. Suspicious is a byte \
of 255 (NaN); of 0 (2^-127, which GPUs may take for 0), or more than 40 away from the tensor's median, where the block \
has codes other than zero. The median is that of the bytes from 1 to 254.";

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
    /// Most prompt tokens at once
    #[arg(long, value_name = "TOKENS", default_value_t = DEFAULT_CHUNK)]
    chunk: usize,
    /// How keys and values are kept
    #[arg(long, value_name = "FORMAT", default_value = "f32")]
    kv: KvArg,
    /// Read the files into memory instead of mapping them
    #[arg(long)]
    no_mmap: bool,
}

pub(super) fn inspect(args: &Args) -> anyhow::Result<Ending> {
    let mapping = if args.no_mmap { Mapping::Read } else { Mapping::Mmap };
    let checkpoint = match &args.dir {
        Some(dir) => Checkpoint::open(dir, mapping)?,
        None => fourfold::default_checkpoint()?,
    };
    let mut report =
        Report { checkpoint: &checkpoint, args, out: io::BufWriter::new(io::stdout().lock()), paint: paint() };
    let config = Config::open(&checkpoint);
    report.files()?;
    let mut sound = Ok(());
    match &config {
        Ok(config) => {
            report.architecture(config)?;
            sound = report.text(config)?;
            report.kinds(config)?;
        }
        Err(e) => writeln!(report.out, "\nconfig.json cannot be used: {}", terminal::printable(&e.to_string()))?,
    }
    report.tensors()?;
    report.scales()?;
    if let Ok(config) = &config {
        sound = report.places(config)?.and(sound);
    }
    report.out.flush()?;
    drop(report);
    config?;
    sound?;
    Ok(Ending::Done)
}

fn paint() -> Paint {
    Paint(terminal::styled(&io::stdout()))
}

struct Report<'a, W: Write> {
    checkpoint: &'a Checkpoint,
    args: &'a Args,
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
        facts.iter().try_for_each(|(name, value)| writeln!(self.out, "  {name:width$}  {}", terminal::printable(value)))
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
            None => format!("theta {}", c.rope.theta),
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
        let head = if c.tie_word_embeddings { "the embedding" } else { "a matrix of its own" };
        self.title(&format!("Architecture: {}", c.family.name().replace('_', "-")))?;
        self.facts(&[
            ("hidden size", format!("{}, {} layers", c.hidden_size, c.num_hidden_layers)),
            (
                "attention",
                format!(
                    "{} query heads of {}, {} key/value heads",
                    c.num_attention_heads, c.head_dim, c.num_key_value_heads
                ),
            ),
            ("layers", format!("{sliding} see the last {} positions, {full} see all", c.sliding_window)),
            (
                "experts",
                format!(
                    "{} a layer, {} used a token, inner size {}, clamp {}",
                    c.num_local_experts, c.num_experts_per_tok, c.intermediate_size, c.swiglu_limit
                ),
            ),
            ("rope", rope),
            ("vocabulary", format!("{}; the output matrix is {head}", c.vocab_size)),
            ("context", format!("up to {} tokens", c.max_position_embeddings)),
        ])
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
            let format = format_of(&view);
            if !sum.formats.contains(&format) {
                sum.formats.push(format);
            }
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
        let used = experts * c.num_experts_per_tok as u64 / c.num_local_experts as u64;
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
        self.title("Tensors, layers taken together (--all: one by one)")?;
        let row = |((name, dtype, shape), (n, bytes)): ((String, String, String), (u64, u64))| {
            vec![n.to_string(), name, dtype, shape, grouped(bytes)]
        };
        rows.extend(groups.into_iter().map(row));
        terminal::table(&mut self.out, self.paint, &[">n", "name", "dtype", "shape", ">bytes"], &rows)
    }

    fn scales(&mut self) -> io::Result<()> {
        let (mut rows, mut suspects, mut n_suspects) = (Vec::new(), Vec::new(), 0);
        for scales in self.checkpoint.tensors().filter(scales::is_scales) {
            let codes = scales::codes(self.checkpoint, &scales);
            let found = scales::Found::read(&scales, codes.as_ref().map(|codes| codes.bytes));
            if self.args.all || layer(scales.name).is_none_or(|layer| layer == 0) {
                rows.push(found.row(&scales));
            }
            n_suspects += found.n_suspects;
            suspects.extend(found.suspects.into_iter().map(|suspect| suspect.row(&scales)));
        }
        if rows.is_empty() && n_suspects == 0 {
            return writeln!(self.out, "\nNo FP4 tensors.");
        }
        self.title(if self.args.all { "FP4 scales" } else { "FP4 scales of the first layer (--all: of every layer)" })?;
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

    /// Memory, and how matrices are split. The inner result is what the engine would refuse of the tensors.
    fn places(&mut self, c: &Config) -> io::Result<Result<()>> {
        let context = self.args.context.unwrap_or(DEFAULT_CONTEXT.min(c.max_position_embeddings));
        let clamp = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let chunk = clamp(self.args.chunk.min(context));
        let plan = Plan {
            context: clamp(context),
            chunk,
            cache: self.args.kv.format(),
            host: HostStages::default(),
            activations: Activations::F32,
            scale_order: ScaleOrder::Linear,
        };
        let unlimited = Limits { max_binding_bytes: u64::MAX, max_grid: u32::MAX };
        let planned = plan.check(c).and_then(|()| ledger::Ledger::fill(self.checkpoint, c, &plan, unlimited));
        let ledger = match planned {
            Ok(ledger) => ledger,
            Err(e) => {
                writeln!(self.out, "\nThe engine would refuse this model.")?;
                return Ok(Err(e));
            }
        };
        self.title("What goes where")?;
        let total = ledger.weights + ledger.cache + ledger.rest;
        self.facts(&[
            ("weights", format!("{} on the device, as they lie on disk", bytes(ledger.weights))),
            ("KV cache", format!("{} for {context} tokens in {}", bytes(ledger.cache), kv_name(self.args.kv))),
            ("the rest", format!("{} for activations of {chunk} tokens at once, and tables", bytes(ledger.rest))),
            ("together", format!("{} for one conversation", bytes(total))),
        ])?;
        for adapter in gpu::list() {
            let limits = ledger::limits(&adapter);
            let fits = match ledger::Ledger::fill(self.checkpoint, c, &plan, limits) {
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
        Some(format!("stops at tokens {:?}", g.eos_token_id)),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// What a tensor is for, in the order of the report.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Embedding,
    Attention,
    Router,
    Experts,
    Norms,
    Head,
    Unknown,
}

impl Kind {
    fn of(name: &str) -> Self {
        let kinds = [
            (".self_attn.", Self::Attention),
            (".mlp.router.", Self::Router),
            (".mlp.experts.", Self::Experts),
            ("norm.weight", Self::Norms),
            ("embed_tokens.", Self::Embedding),
            ("lm_head.", Self::Head),
        ];
        kinds.iter().find(|(part, _)| name.contains(part)).map_or(Self::Unknown, |(_, kind)| *kind)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Attention => "attention",
            Self::Router => "routers",
            Self::Experts => "experts",
            Self::Norms => "norms",
            Self::Head => "head",
            Self::Unknown => "unknown",
        }
    }
}

#[derive(Default)]
struct Sum {
    tensors: u64,
    parameters: u64,
    bytes: u64,
    formats: Vec<&'static str>,
}

/// Numbers of the model that a tensor holds: an FP4 byte has two, a scale belongs to others.
fn parameters(view: &TensorView<'_>) -> u64 {
    let elements = view.shape.iter().map(|&n| n as u64).product();
    match (view.name, view.dtype) {
        (name, Dtype::U8) if name.ends_with("_blocks") => 2 * elements,
        _ if scales::is_scales(view) => 0,
        _ => elements,
    }
}

fn format_of(view: &TensorView<'_>) -> &'static str {
    let is_blocks = view.name.ends_with("_blocks") && view.dtype == Dtype::U8;
    if is_blocks || scales::is_scales(view) { "MXFP4" } else { view.dtype.word() }
}

/// The layer in `model.layers.7.mlp...`.
fn layer(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

/// The name with its layer number left open.
fn pattern(name: &str) -> String {
    match layer(name) {
        Some(layer) => name.replacen(&format!(".{layer}."), ".*.", 1),
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_show_layer_and_kind() {
        let name = "model.layers.17.mlp.experts.down_proj_blocks";
        assert_eq!((layer(name), pattern(name)), (Some(17), "model.layers.*.mlp.experts.down_proj_blocks".to_owned()));
        assert_eq!((layer("lm_head.weight"), pattern("lm_head.weight")), (None, "lm_head.weight".to_owned()));
        let kinds = [name, "model.layers.1.mlp.router.bias", "model.norm.weight", "lm_head.weight", "rotary"];
        assert_eq!(kinds.map(|n| Kind::of(n).name()), ["experts", "routers", "norms", "head", "unknown"]);
    }
}
