//! `fourfold bisect` and `fourfold probe`: which stage is wrong by itself, and whether a neighbour reaches a position.

use super::engine::{EngineArgs, HostArg};
use super::trace::note_fallback;
use super::{Ending, Usage, terminal};
use fourfold::device::{Device, Limits, cpu::Cpu, gpu};
use fourfold::trace::bisect::{Reference, StageError, TOLERANCE, bisect as bisect_runs};
use fourfold::trace::compare::Tolerances;
use fourfold::trace::file::TraceFile;
use fourfold::trace::probe::probe as probe_runs;
use fourfold::{DeviceChoice, Engine};
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

const BISECT_EXAMPLES: &str = "\
Examples:
  fourfold bisect --prompt \"Once upon a time\"                        the GPU against the twins
  fourfold bisect --device cpu --tokens 410,11 --against t.safetensors --model DIR
  fourfold bisect --adapter NVIDIA --against gpu:llvmpipe --prompt \"Hi\"   one adapter against another
  fourfold bisect --host attention --prompt \"Hi\" --against gpu       a stage on the host against all on the GPU

`local` is the error of a stage on the reference's own inputs: a stage that is wrong by itself. `cumulative` is the \
error of everything up to it. Against a trace, stages that the trace lacks count to the next one that it has.

Exit codes:
  0    no stage is off by itself
  1    a stage is, or the run failed
  2    bad usage, or nothing to compare
  3    a trace or checkpoint cannot be read, or the trace is of other tokens";

#[derive(clap::Args)]
#[command(after_help = BISECT_EXAMPLES)]
pub(super) struct BisectArgs {
    #[command(flatten)]
    prompt: PromptArgs,
    /// The reference: cpu (the twins), gpu, gpu:NAME (another adapter), or a trace file
    #[arg(long, value_name = "WHAT", default_value = "cpu")]
    against: String,
    /// Keep only tensors of the trace whose names begin so, and call them what follows
    #[arg(long, value_name = "PREFIX", default_value = "")]
    prefix: String,
    /// Local errors up to this are rounding [default: 1e-4; 5e-2 against a trace of dtype bf16 or f16]
    #[arg(long, value_name = "X", value_parser = tolerance)]
    tolerance: Option<f64>,
    /// Every stage, not only what leads to the verdict
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

/// The twins, with the limits of an engine's device: they record the same launches.
fn twins_like(engine: &Engine) -> DeviceChoice {
    let limits = Limits { laid_out: false, ..engine.device().limits() };
    DeviceChoice::Own(Arc::new(Cpu::with_limits(limits)))
}

/// What to run.
#[derive(clap::Args)]
struct PromptArgs {
    /// The text to run: control tokens in it are recognised
    #[arg(long, value_name = "TEXT", required_unless_present = "tokens", conflicts_with = "tokens")]
    prompt: Option<String>,
    /// The token ids to run
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    tokens: Vec<u32>,
}

impl PromptArgs {
    fn tokens(&self, engine: &Engine) -> anyhow::Result<Vec<u32>> {
        let tokens = match &self.prompt {
            Some(text) => engine.text_tokens(text)?,
            None => self.tokens.clone(),
        };
        if tokens.is_empty() {
            return Err(Usage("there is nothing to run: the prompt has no tokens".into()).into());
        }
        Ok(tokens)
    }
}

fn tolerance(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| format!("{text} is no number"))?;
    if number.is_finite() && number >= 0.0 {
        Ok(number)
    } else {
        Err(format!("{text} is no tolerance: give 0 or more"))
    }
}

pub(super) fn bisect(args: &BisectArgs) -> anyhow::Result<Ending> {
    let mut engine = args.engine.load(args.engine.device()?, false)?;
    note_fallback(&engine);
    let mut tolerance = args.tolerance.unwrap_or(TOLERANCE);
    let tokens = args.prompt.tokens(&engine)?;
    // With the same buffers, or one side cannot be given the other's.
    let common = args.engine.with_steps_of(&engine);
    let twins = Cpu::default().describe();
    let (found, reference) = match args.against.as_str() {
        against if matches!(against, "cpu" | "gpu") || against.starts_with("gpu:") => {
            let choice = match against.strip_prefix("gpu:") {
                _ if against == "cpu" => twins_like(&engine),
                None => args.engine.gpu(),
                Some(name) => {
                    let without_matrix_units = !engine.device().limits().matrix;
                    let adapter = Some(name.to_owned());
                    DeviceChoice::Gpu(gpu::Options { adapter, without_matrix_units, ..gpu::Options::default() })
                }
            };
            let other = common.load_with_host(choice, &[] as &[HostArg], false)?;
            let by_twins = |engine: &Engine| engine.device().describe() == twins;
            if by_twins(&engine) && !by_twins(&other) {
                engine = common.load(twins_like(&other), false)?;
            }
            if [&engine, &other].into_iter().all(by_twins) && args.engine.host_is_empty() {
                let text =
                    "both sides are the CPU twins, which cannot differ: name a GPU, or a trace with --against FILE";
                return Err(Usage(text.into()).into());
            }
            let mut session = other.session()?;
            let found = bisect_runs(|| engine.session(), Reference::Session(&mut session), &tokens)?;
            (found, other.device().describe())
        }
        file => {
            let trace = TraceFile::open_part(&PathBuf::from(file), &args.prefix)?;
            let half = trace.metadata("dtype").is_some_and(|dtype| dtype.contains("16"));
            if half && args.tolerance.is_none() {
                tolerance = Tolerances::HALF;
            }
            (bisect_runs(|| engine.session(), Reference::Trace(&trace), &tokens)?, file.to_owned())
        }
    };
    if found.is_empty() {
        return Err(Usage(format!("{reference} has no stage of these tokens: is it a trace of another prompt?")).into());
    }
    let wrong: Vec<&StageError> = found.iter().filter(|s| s.local > tolerance).collect();
    let mut out = io::stdout().lock();
    writeln!(out, "{} tokens on {}, held to {reference}", tokens.len(), engine.device().describe())?;
    match wrong.first() {
        None => writeln!(out, "No stage is off by itself: the largest local error is {:.1e}.", largest(&found))?,
        Some(s) => writeln!(
            out,
            "{} is wrong by itself: off by {:.1e} on right inputs, worst at token {}, element {}.",
            s.name, s.local, s.worst.0, s.worst.1
        )?,
    }
    if wrong.len() > 1 {
        let names: Vec<&str> = wrong[1..].iter().map(|s| s.name.as_str()).collect();
        writeln!(out, "So are {} more: {}.", names.len(), names.join(", "))?;
    }
    writeln!(out, "\n  {:<28} {:>10} {:>10}", "stage", "local", "cumulative")?;
    let first = found.iter().position(|s| s.local > tolerance).unwrap_or(found.len());
    for (i, s) in found.iter().enumerate() {
        let near = first < found.len() && i + 3 >= first && i <= first + 3;
        if args.all || near || s.local > tolerance || (wrong.is_empty() && i + 1 == found.len()) {
            let mark = if s.local > tolerance { "  <- wrong by itself" } else { "" };
            writeln!(out, "  {:<28} {:>10.1e} {:>10.1e}{mark}", s.name, s.local, s.cumulative)?;
        }
    }
    Ok(if wrong.is_empty() { Ending::Done } else { Ending::Differs })
}

fn largest(found: &[StageError]) -> f64 {
    found.iter().map(|s| s.local).fold(0.0, f64::max)
}

const PROBE_EXAMPLES: &str = "\
Examples:
  fourfold probe --prompt \"Once upon a time\"
  fourfold probe --model DIR --device gpu --tokens 1,2,3,4,5,6,7,8

Runs the same tokens again, alone, in other pieces, beside other sessions and over scratch full of NaN, and hashes every \
row of every stage: all runs must give the same bits.

Exit codes:
  0    equal bits in all runs
  1    a run differs, or failed";

#[derive(clap::Args)]
#[command(after_help = PROBE_EXAMPLES)]
pub(super) struct ProbeArgs {
    #[command(flatten)]
    prompt: PromptArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

pub(super) fn probe(args: &ProbeArgs) -> anyhow::Result<Ending> {
    if args.engine.shares_scales() {
        let text = "--activations nvfp4-dynamic makes a token depend on its neighbours, and probe looks for just that: use \
                    nvfp4-token or nvfp4-static";
        return Err(Usage(text.into()).into());
    }
    let engine = args.engine.load(args.engine.device()?, false)?;
    note_fallback(&engine);
    let tokens = args.prompt.tokens(&engine)?;
    // Neighbours: the same number of other tokens, in another order.
    let vocab = engine.config().vocab_size as u32;
    let others: Vec<u32> = tokens.iter().rev().map(|id| (id % vocab + 1) % vocab).collect();
    let trials = probe_runs(&engine, || engine.session(), &tokens, &others)?;
    let mut out = io::stdout().lock();
    writeln!(out, "{} tokens on {}, every row of every stage hashed", tokens.len(), engine.device().describe())?;
    for trial in &trials {
        match &trial.parting {
            None => writeln!(out, "  {:<42} equal bits", trial.name)?,
            Some(p) => writeln!(
                out,
                "  {:<42} PARTS at {}, position {} ({} positions)",
                trial.name, p.stage, p.position, p.positions
            )?,
        }
    }
    let parted = trials.iter().filter(|t| t.parting.is_some()).count();
    if parted > 0 {
        drop(out);
        terminal::note(&format!("{parted} of {} runs gave other bits", trials.len()));
        return Ok(Ending::Differs);
    }
    Ok(Ending::Done)
}
