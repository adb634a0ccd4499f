//! `fourfold synth`: the flags, the progress bar, and Ctrl-C.

use super::Ending;
use super::quantize::bar;
use super::terminal;
use clap::ValueEnum;
use fourfold::format::Format;
use fourfold::synth::{Progress, Recipe, SHAPES};
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Instant;

const EXAMPLES: &str = "\
Examples:
  fourfold synth --shape gpt-oss-20b ~/models/synth-20b
  fourfold synth --shape gpt-oss-120b --layers 4 DST
  fourfold synth --shape qwen3-30b-a3b --format bf16 DST    to quantise, or to compare with

Shapes: gpt-oss-20b and gpt-oss-120b, in mxfp4 (as released) or nvfp4; qwen3-30b-a3b, in nvfp4 or bf16. The weights are \
random and mean nothing; sizes, names and formats are those of the published files. There is no tokenizer: `bench` and \
`inspect` take such a model, `run` asks for one. The same weights without files: --model synth:SHAPE[:LAYERS][:FORMAT].";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// The directory to make: nothing is overwritten
    #[arg(value_name = "DST")]
    destination: PathBuf,
    /// Whose shape: gpt-oss-20b, gpt-oss-120b or qwen3-30b-a3b
    #[arg(long, value_name = "SHAPE", value_parser = clap::builder::PossibleValuesParser::new(SHAPES))]
    shape: String,
    /// Only the first layers [default: all]
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// The format of the linears, of a gpt-oss of the experts [default: that of the published files]
    #[arg(long, value_name = "FORMAT")]
    format: Option<FormatArg>,
    /// Another seed gives other weights
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// No progress bar and no closing line
    #[arg(short, long)]
    quiet: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum FormatArg {
    Mxfp4,
    Nvfp4,
    Bf16,
}

pub(super) fn synth(args: &Args) -> anyhow::Result<Ending> {
    let started = Instant::now();
    let format = args.format.map(|format| match format {
        FormatArg::Mxfp4 => Format::Mxfp4,
        FormatArg::Nvfp4 => Format::Nvfp4,
        FormatArg::Bf16 => Format::Bf16,
    });
    let recipe = Recipe { shape: args.shape.clone(), layers: args.layers, format, seed: args.seed };
    recipe.check(&args.destination)?;
    let stop = super::interrupt::asked()?;
    let bar = bar(args.quiet, "writing {wide_bar} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}");
    let mut see = |p: Progress| {
        bar.set_length(p.total_bytes);
        bar.set_position(p.done_bytes);
        if stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let written = recipe.write(&args.destination, &mut see);
    bar.finish_and_clear();
    let Some(written) = written? else { return Ok(Ending::Interrupted) };
    if !args.quiet {
        let seconds = started.elapsed().as_secs_f64();
        writeln!(
            io::stdout().lock(),
            "{} of {} layers in {}: {} in {} files in {}, {seconds:.1} s, {:.2} GB/s",
            args.shape,
            written.layers,
            written.format,
            terminal::bytes(written.bytes),
            written.files.len(),
            terminal::printable(&args.destination.display().to_string()),
            written.bytes as f64 / seconds / 1e9
        )?;
    }
    Ok(Ending::Done)
}
