//! `fourfold eval`: perplexity of a model on a text, alone or against a reference.

use super::Ending;
use super::engine::EngineArgs;
use super::quantize::{bar, read_text};
use super::terminal::{self, Paint};
use super::trace::note_fallback;
use fourfold::checkpoint::Checkpoint;
use fourfold::eval::{self, Against, Comparison, Options, Progress, Report, Score};
use fourfold::trace::file::TraceFile;
use fourfold::{DeviceChoice, Engine};
use serde_json::{Value, json};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

const EXAMPLES: &str = "\
Examples:
  fourfold eval --text book.txt                                  the built-in model
  fourfold eval --model DIR --text book.txt --window 2048 --max-tokens 20000
  fourfold eval --model NVFP4_DIR --reference BF16_DIR --text book.txt
  fourfold eval --model DIR --reference-trace a.safetensors --text prompt.txt
  fourfold eval --text book.txt --stride 256 --json

Each window is computed from an empty cache; it begins with the tokenizer's beginning-of-text token where the tokenizer \
adds one. Tokens are scored once; the first of a window is not, where nothing comes before it. What spells a control \
token is one.";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// The text, UTF-8
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens of a window [default: 512, or the context if that is less]
    #[arg(long, value_name = "N")]
    window: Option<usize>,
    /// Tokens from one window's start to the next: less than a window gives every token more context [default: a window]
    #[arg(long, value_name = "N")]
    stride: Option<usize>,
    /// Only the first N tokens of the text
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// Also run this checkpoint, and say how far the model is from it. --kv, --no-mmap and --swizzled-scales hold for both; --activations, --chunk and --host for the model alone
    #[arg(long, value_name = "DIR", conflicts_with = "reference_trace")]
    reference: Option<PathBuf>,
    /// Take the reference's logits from a trace of the text's first tokens, recorded without --stats
    #[arg(long, value_name = "FILE")]
    reference_trace: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// No progress bar and no notes: on stderr only errors
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

pub(super) fn eval(args: &Args) -> anyhow::Result<Ending> {
    let device = args.engine.device()?;
    let text = read_text(&args.text)?;
    let trace = args.reference_trace.as_deref().map(TraceFile::open).transpose()?;
    let engine = args.engine.load(device, args.quiet)?;
    if !args.quiet {
        note_fallback(&engine);
    }
    let lead = engine.leading_token()?;
    let reference =
        args.reference.as_deref().map(|dir| load_reference(dir, &args.engine, &engine, args.quiet)).transpose()?;
    let against = match (&reference, &trace) {
        (Some(engine), _) => Against::Engine(engine),
        (None, Some(trace)) => Against::Trace(trace),
        (None, None) => Against::Nothing,
    };
    let options = Options { window: args.window, stride: args.stride, max_tokens: args.max_tokens, lead };
    let bar = bar(args.quiet, "evaluating {wide_bar} {pos} of {len} tokens");
    let mut see = |p: Progress| {
        bar.set_length(p.total);
        bar.set_position(p.done);
    };
    let report = eval::evaluate(&engine, &text, against, &options, &mut see);
    bar.finish_and_clear();
    let report = report?;
    let reference_name = reference.as_ref().map(|r| r.name().to_owned());
    let reference_name =
        reference_name.or_else(|| trace.as_ref().map(|t| t.path().display().to_string())).unwrap_or_default();
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(out, "{}", to_json(args, &engine, &reference_name, &report))?;
    } else {
        print(&mut out, &engine, &reference_name, &report)?;
    }
    Ok(Ending::Done)
}

/// The reference on the model's device, with the same context, the same kind of cache, and its files read the same way.
fn load_reference(dir: &Path, args: &EngineArgs, engine: &Engine, quiet: bool) -> anyhow::Result<Engine> {
    // Opened first, so that a mistake is told before anything is loaded.
    Checkpoint::open(dir, args.mapping())?;
    let loading = terminal::loading(quiet);
    let shown = loading.clone();
    let builder = args
        .files_and_cache(Engine::builder())
        .checkpoint(dir)
        .device(DeviceChoice::Own(engine.device().clone()))
        .context(engine.context())
        .progress(move |p| {
            shown.set_length(p.total_bytes);
            shown.set_position(p.done_bytes);
        });
    let reference = builder.build();
    loading.finish_and_clear();
    Ok(reference?)
}

fn print(out: &mut impl Write, engine: &Engine, reference: &str, report: &Report) -> io::Result<()> {
    let paint = Paint(terminal::styled(&io::stdout()));
    let rate = |score: &Score| match report.tokens_per_second(score) {
        0.0 => "-".to_owned(),
        rate => format!("{rate:.1}"),
    };
    let row = |name: &str, score: &Score| {
        vec![
            name.to_owned(),
            format!("{:.4}", score.perplexity()),
            format!("{:.5}", score.nll),
            format!("{:.5}", report.bits_per_byte(score)),
            format!("{:.2} %", score.accuracy * 100.0),
            rate(score),
        ]
    };
    let mut rows = vec![row(engine.name(), &report.model)];
    if let Some(Comparison { score, .. }) = &report.reference {
        rows.push(row(&format!("{reference} (reference)"), score));
    }
    let head = ["model", ">perplexity", ">nats/token", ">bits/byte", ">top-1", ">tokens/s"];
    terminal::table(out, paint, &head, &rows)?;
    if let Some(Comparison { kl_mean, kl_p99, kl_max, agreement, .. }) = &report.reference {
        let cells = [kl_mean, kl_p99, kl_max].map(|kl| format!("{kl:.6}"));
        let row = vec![cells[0].clone(), cells[1].clone(), cells[2].clone(), format!("{:.2} %", agreement * 100.0)];
        let head = [">KL(reference || model)", ">99th percentile", ">max", ">same top-1"];
        terminal::table(out, paint, &head, &[row])?;
    }
    let windows = if report.windows == 1 { "window" } else { "windows" };
    writeln!(
        out,
        "  {} of {} tokens scored in {} {windows}, {} bytes of text, {}",
        terminal::grouped(report.scored as u64),
        terminal::grouped(report.computed as u64),
        report.windows,
        terminal::grouped(report.bytes as u64),
        terminal::printable(&engine.device().describe())
    )
}

fn to_json(args: &Args, engine: &Engine, reference: &str, report: &Report) -> Value {
    let scores = |name: &str, score: &Score| {
        json!({
            "name": name,
            "perplexity": score.perplexity(),
            "nll": score.nll,
            "bits_per_byte": report.bits_per_byte(score),
            "accuracy": score.accuracy,
            "tokens_per_second": report.tokens_per_second(score),
        })
    };
    let mut all = json!({
        "text": args.text.display().to_string(),
        "device": engine.device().describe(),
        "tokens_scored": report.scored,
        "tokens_computed": report.computed,
        "windows": report.windows,
        "bytes": report.bytes,
        "model": scores(engine.name(), &report.model),
    });
    if let Some(comparison) = &report.reference {
        all["reference"] = scores(reference, &comparison.score);
        all["kl"] = json!({ "mean": comparison.kl_mean, "p99": comparison.kl_p99, "max": comparison.kl_max });
        all["top1_agreement"] = comparison.agreement.into();
    }
    all
}
