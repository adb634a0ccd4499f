//! `fourfold quantize`: the flags, the calibration run, and the table of what the new format costs.

use super::terminal::{self, Paint};
use super::{Ending, Usage};
use clap::ValueEnum;
use fourfold::checkpoint::{Checkpoint, Mapping};
use fourfold::device::gpu;
use fourfold::format::Format;
use fourfold::quantize::{self, Calibration, Changed, Options, Progress, Report, ScaleSearch};
use fourfold::{DeviceChoice, Engine, Error};
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Instant;

const EXAMPLES: &str = "\
Examples:
  fourfold quantize ~/models/Qwen3-30B-A3B ~/models/qwen3-nvfp4 --format nvfp4
  fourfold quantize SRC DST --format nvfp4 --scale-search mse --calibrate text.txt
  fourfold quantize SRC DST --format mxfp4 --layers 'model.layers.*.mlp.*'
  fourfold quantize ~/models/gpt-oss-20b DST --format nvfp4    an exact cast of MXFP4
  fourfold quantize SRC DST --format bf16                      f16 and f32 to bf16, no more

NVFP4 is written as NVIDIA ModelOpt does, MXFP4 as gpt-oss has it or, for other models, as compressed-tensors does. \
Without --calibrate NVFP4 has no scales of activations (W4A16). Embeddings, lm_head, norms and routers stay, in bf16; \
so does the attention of a gpt-oss unless --layers names it. Then `fourfold eval --model DST --reference SRC` tells what \
it costs.";

/// Names of tensors in the default table.
const WORST: usize = 5;
/// Rows of kinds in the default table.
const KINDS: usize = 24;
/// Tokens of a window while calibrating.
const WINDOW: usize = 512;

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// A Hugging Face directory in BF16, F16 or F32; for nvfp4 also in MXFP4
    #[arg(value_name = "SRC")]
    source: PathBuf,
    /// The directory to make: nothing is overwritten
    #[arg(value_name = "DST")]
    destination: PathBuf,
    /// The format of the linears
    #[arg(long, value_name = "FORMAT")]
    format: FormatArg,
    /// Only modules whose names match; `*` stands for anything; several times [default: all linears]
    #[arg(long, value_name = "PATTERN")]
    layers: Vec<String>,
    /// How the scale of a block is found: from its largest element, or by least squared error (slower, closer)
    #[arg(long, value_name = "HOW", default_value = "rtn")]
    scale_search: SearchArg,
    /// For nvfp4: run SRC over this text, and write scales for its activations
    #[arg(long, value_name = "TEXT_FILE")]
    calibrate: Option<PathBuf>,
    /// Tokens of the text to calibrate with
    #[arg(long, value_name = "N", default_value_t = 8192, requires = "calibrate")]
    calibrate_tokens: usize,
    /// What computes while calibrating; auto: the best GPU, the CPU where there is none
    #[arg(long, value_name = "WHAT", default_value = "auto")]
    device: DeviceArg,
    /// The GPU whose name contains this; `fourfold devices` lists them
    #[arg(long, value_name = "NAME")]
    adapter: Option<String>,
    /// Read the weights into memory instead of mapping the files
    #[arg(long)]
    no_mmap: bool,
    /// No progress bar and no table; -v lists every tensor instead
    #[arg(short, long)]
    quiet: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum FormatArg {
    Mxfp4,
    Nvfp4,
    Bf16,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SearchArg {
    Rtn,
    Mse,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DeviceArg {
    Auto,
    Gpu,
    Cpu,
}

pub(super) fn quantize(args: &Args, verbose: bool) -> anyhow::Result<Ending> {
    let started = Instant::now();
    let device = device(args)?;
    let mapping = if args.no_mmap { Mapping::Read } else { Mapping::Mmap };
    let source = Checkpoint::open(&args.source, mapping)?;
    let mut options = Options::new(match args.format {
        FormatArg::Mxfp4 => Format::Mxfp4,
        FormatArg::Nvfp4 => Format::Nvfp4,
        FormatArg::Bf16 => Format::Bf16,
    });
    options.layers = args.layers.clone();
    options.search = match args.scale_search {
        SearchArg::Rtn => ScaleSearch::Rtn,
        SearchArg::Mse => ScaleSearch::Mse,
    };
    if args.calibrate.is_some() && args.format != FormatArg::Nvfp4 {
        return Err(Usage("--calibrate goes with --format nvfp4: no other has scales of activations".into()).into());
    }
    // Before the long run of a calibration.
    quantize::check(&source, &args.destination, &options)?;
    if let Some(file) = &args.calibrate {
        options.calibration = Some(calibration(args, file, device, mapping)?);
    }
    let stop = super::interrupt::asked()?;
    let bar = bar(args.quiet, "quantizing {wide_bar} {binary_bytes} of {binary_total_bytes}");
    let mut see = |p: &Progress| {
        bar.set_length(p.total);
        bar.set_position(p.done);
        if stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let report = quantize::quantize(&source, &args.destination, &options, &mut see);
    bar.finish_and_clear();
    let Some(report) = report? else { return Ok(Ending::Interrupted) };
    if !args.quiet {
        let mut out = io::stdout().lock();
        let paint = Paint(terminal::styled(&io::stdout()));
        list(&mut out, paint, &report, verbose)?;
        writeln!(
            out,
            "{} → {} in {}, {:.1} s: {} tensors changed, {} copied",
            terminal::bytes(report.before_bytes),
            terminal::bytes(report.after_bytes),
            terminal::printable(&args.destination.display().to_string()),
            started.elapsed().as_secs_f64(),
            report.changed.len(),
            report.n_copied
        )?;
    }
    Ok(Ending::Done)
}

fn device(args: &Args) -> anyhow::Result<DeviceChoice> {
    let options = || gpu::Options { adapter: args.adapter.clone(), ..Default::default() };
    match args.device {
        DeviceArg::Cpu if args.adapter.is_some() => {
            Err(Usage("--device cpu does not go with options of a GPU (--adapter)".into()).into())
        }
        DeviceArg::Cpu => Ok(DeviceChoice::Cpu),
        DeviceArg::Auto if args.adapter.is_none() => Ok(DeviceChoice::Auto),
        DeviceArg::Auto | DeviceArg::Gpu => Ok(DeviceChoice::Gpu(options())),
    }
}

fn calibration(args: &Args, file: &Path, device: DeviceChoice, mapping: Mapping) -> anyhow::Result<Calibration> {
    let text = read_text(file)?;
    let loading = terminal::loading(args.quiet);
    let shown = loading.clone();
    let builder = Engine::builder().checkpoint(&args.source).device(device).mapping(mapping).progress(move |p| {
        shown.set_length(p.total_bytes);
        shown.set_position(p.done_bytes);
    });
    let engine = builder.build();
    loading.finish_and_clear();
    let engine = engine?;
    if let Some(why) = engine.fallback().filter(|_| !args.quiet) {
        terminal::note(why);
    }
    let tokenizer = engine.tokenizer()?;
    let mut tokens = tokenizer.encode_with_specials(&text)?;
    tokens.truncate(args.calibrate_tokens);
    let lead = engine.leading_token()?;
    let bar = bar(args.quiet, "calibrating {wide_bar} {pos} of {len} tokens");
    let mut see = |p: &Progress| {
        bar.set_length(p.total);
        bar.set_position(p.done);
    };
    let calibration = quantize::calibrate(&engine, &tokens, lead, WINDOW.min(engine.context()), &mut see);
    bar.finish_and_clear();
    Ok(calibration?)
}

/// Longest text that is read: its tokens take a hundred times as much memory while they are found.
const MAX_TEXT: u64 = 16 << 20;

/// A text file, which has to be UTF-8.
pub(super) fn read_text(file: &Path) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    let read = File::open(file).and_then(|open| open.take(MAX_TEXT + 1).read_to_end(&mut bytes));
    read.map_err(|source| Error::Io { path: file.to_owned(), source })?;
    if bytes.len() as u64 > MAX_TEXT {
        let reason = format!("is longer than {} MiB: give a part of it", MAX_TEXT >> 20);
        return Err(Error::File { file: file.display().to_string(), reason }.into());
    }
    if bytes.is_empty() {
        return Err(Error::File { file: file.display().to_string(), reason: "is empty".into() }.into());
    }
    let not_text = |e: std::string::FromUtf8Error| Error::File {
        file: file.display().to_string(),
        reason: format!("is no UTF-8 text: byte {} cannot be read", e.utf8_error().valid_up_to()),
    };
    Ok(String::from_utf8(bytes).map_err(not_text)?)
}

/// A bar on stderr; invisible where that is no terminal or `quiet` is asked for.
pub(super) fn bar(quiet: bool, template: &str) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    ProgressBar::new(0).with_style(ProgressStyle::with_template(template).expect("the template is right"))
}

/// What changed: kinds of tensors and the worst of them, or every tensor.
fn list(out: &mut impl Write, paint: Paint, report: &Report, verbose: bool) -> anyhow::Result<()> {
    let inexact = report.changed.iter().any(|c| c.deviation.n_inexact > 0);
    let with = |mut row: Vec<String>, blocks: u64| {
        if inexact {
            row.push(blocks.to_string());
        }
        row
    };
    let one = |c: &Changed| {
        let d = &c.deviation;
        let row = vec![c.name.clone(), c.format.to_string(), percent(d.relative_rms()), format!("{:.3e}", d.max_abs)];
        with(row, d.n_inexact)
    };
    let mut head = vec!["tensor", "format", ">rms error", ">max error"];
    if inexact {
        head.push(">blocks not exact");
    }
    if verbose {
        let rows: Vec<Vec<String>> = report.changed.iter().map(one).collect();
        return Ok(terminal::table(out, paint, &head, &rows)?);
    }
    let mut kinds: BTreeMap<(String, &str), Vec<&Changed>> = BTreeMap::new();
    for c in &report.changed {
        kinds.entry((kind(&c.name), c.format.name())).or_default().push(c);
    }
    let rms = |c: &&Changed| c.deviation.relative_rms();
    let mut rows: Vec<Vec<String>> = Vec::new();
    for ((kind, format), all) in kinds.iter().take(KINDS) {
        let mean = all.iter().map(rms).sum::<f64>() / all.len() as f64;
        let worst = all.iter().map(rms).fold(0.0, f64::max);
        let max = all.iter().map(|c| c.deviation.max_abs).fold(0.0, f64::max);
        let elements = all.iter().map(|c| c.elements).sum();
        let row = vec![
            kind.clone(),
            (*format).to_owned(),
            all.len().to_string(),
            terminal::count(elements),
            percent(mean),
            percent(worst),
            format!("{max:.3e}"),
        ];
        rows.push(with(row, all.iter().map(|c| c.deviation.n_inexact).sum()));
    }
    if rows.is_empty() {
        return Ok(());
    }
    let mut by_kind = vec!["kind", "format", ">tensors", ">elements", ">mean rms error", ">worst", ">max error"];
    if inexact {
        by_kind.push(">blocks not exact");
    }
    terminal::table(out, paint, &by_kind, &rows)?;
    if kinds.len() > KINDS {
        writeln!(out, "  and {} more kinds: -v lists every tensor", kinds.len() - KINDS)?;
    }
    let mut worst: Vec<&Changed> = report.changed.iter().filter(|c| c.deviation.squares_off > 0.0).collect();
    worst.sort_by(|a, b| rms(b).total_cmp(&rms(a)));
    worst.truncate(WORST);
    if !worst.is_empty() {
        head[0] = "worst";
        let rows: Vec<Vec<String>> = worst.into_iter().map(one).collect();
        terminal::table(out, paint, &head, &rows)?;
    }
    Ok(())
}

/// A name without the numbers of layer and expert.
fn kind(name: &str) -> String {
    let name = name.strip_prefix("model.layers.").unwrap_or(name);
    let parts: Vec<&str> = name.split('.').filter(|part| part.parse::<u64>().is_err()).collect();
    parts.join(".")
}

/// A fraction as a percentage of three digits.
fn percent(x: f64) -> String {
    match x * 100.0 {
        0.0 => "0".to_owned(),
        p if p < 0.001 => "<0.001 %".to_owned(),
        p => format!("{p:.3} %"),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn kinds_have_no_numbers() {
        assert_eq!(super::kind("model.layers.12.mlp.experts.3.up_proj"), "mlp.experts.up_proj");
        assert_eq!(super::kind("lm_head.weight"), "lm_head.weight");
    }
}
