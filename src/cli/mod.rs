//! The command line: the commands, and which error ends with which exit code.

mod bench;
mod bisect;
mod chat;
mod devices;
mod diff;
mod drafting;
mod engine;
mod eval;
mod inspect;
mod interrupt;
mod isolation;
mod oracle;
mod quantize;
mod run;
mod screen;
mod synth;
mod terminal;
mod trace;
mod verify;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Instant;

const EXAMPLES: &str = "\
Examples:
  fourfold                                      chat with the built-in model
  fourfold run --raw \"Once upon a time\"         continue a text
  fourfold run \"Tell me a story about a fox\"    one answer, then exit
  fourfold run --model ~/models/gpt-oss-20b     chat with another model: gpt_oss, qwen3_moe, qwen3, llama
  fourfold inspect ~/models/Qwen3-30B-A3B-NVFP4 what a checkpoint holds, and whether it is sound
  fourfold quantize SRC DST --format nvfp4      make an FP4 checkpoint of a bf16 one
  fourfold eval --text FILE                     perplexity on a text
  fourfold trace --prompt \"Hi\" -o a.safetensors  record every stage of a run
  fourfold diff a.safetensors b.safetensors     where two traces part
  fourfold bisect --prompt \"Hi\"                the stage that is wrong by itself: GPU against twins
  fourfold bench --model synth:gpt-oss-20b      tokens a second at a true shape, without its weights
  fourfold synth --shape gpt-oss-20b DST        such a model as files
  fourfold devices                              which GPUs there are
  fourfold oracle                               whether they compute rightly
  fourfold verify                               whether bits depend on what they should not
  fourfold isolation --model A --beside B       whether one model changes another's output

Exit codes:
  0    done
  1    the run failed: no usable device, out of memory, device lost
  2    bad usage: an option or argument that cannot work
  3    bad checkpoint: a file, tensor, tokenizer or template
  4    the context is full: prompt or answer did not fit
  130  stopped by Ctrl-C

Environment:
  FOURFOLD_MODEL   the model where no --model is given
  FOURFOLD_CACHE   where compiled kernels are kept, instead of the user's cache folder; off: nowhere

Without a command it is `fourfold run`: a chat on a terminal; in a pipe, an answer to what comes in on stdin.";

/// Run FP4 language models, with experts or dense, on any GPU, or on the CPU
#[derive(Parser)]
#[command(name = "fourfold", version, about, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// Say on stderr what is done; twice: every detail. RUST_LOG, where set, decides instead
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Subcommand)]
enum Command {
    /// Chat with a model, answer one prompt, or continue a text
    Run(Box<run::Args>),
    /// Show what a checkpoint holds, whether it is sound, and what will go where
    Inspect(inspect::Args),
    /// Make an FP4 checkpoint: bf16 to MXFP4 or NVFP4, MXFP4 to NVFP4
    Quantize(Box<quantize::Args>),
    /// Write a checkpoint of a true shape with random weights, to measure with
    Synth(Box<synth::Args>),
    /// Perplexity on a text, and how far a model is from a reference
    Eval(Box<eval::Args>),
    /// Measure tokens a second, and what memory allows here
    Bench(Box<bench::Args>),
    /// Run a prompt and record every stage of every layer
    Trace(Box<trace::Args>),
    /// Compare two traces: the first stage, token and element where they part
    Diff(Box<diff::Args>),
    /// Find the stage that is wrong by itself, feeding each with a reference's own inputs
    Bisect(Box<bisect::BisectArgs>),
    /// Run the same tokens in many ways: which stage lets a neighbour or old data in
    Probe(Box<bisect::ProbeArgs>),
    /// List the adapters that could compute
    Devices,
    /// Check that a device computes rightly: tests whose answers are known
    Oracle(oracle::Args),
    /// Check that bits do not depend on what they should not: kernels, rows, whole steps
    Verify(Box<verify::Args>),
    /// Run a model alone, beside its twin and beside another: every layer's output must keep its bits
    Isolation(Box<isolation::Args>),
    /// Write a shell's completions to stdout
    #[command(
        after_help = "Example:\n  mkdir -p ~/.local/share/bash-completion/completions\n  fourfold completions bash > ~/.local/share/bash-completion/completions/fourfold"
    )]
    Completions {
        /// bash, elvish, fish, powershell or zsh
        shell: clap_complete::Shell,
    },
}

/// How a command ended, where that is no error.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    Done,
    /// What was compared is not the same.
    Differs,
    Interrupted,
}

/// An option or argument that cannot work, found after the parser was content.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

/// Positions or rows: more than any model takes, and few enough to reckon with.
const MOST: usize = 1 << 30;

/// Exit code of a run that Ctrl-C stopped: 128 and the number of SIGINT.
const INTERRUPTED: u8 = 130;

/// Parse, run, and say how it went.
pub(crate) fn main() -> ExitCode {
    let started = Instant::now();
    let cli = parse(std::env::args_os());
    log(cli.verbose);
    // No command is the command `run`, its defaults and variables included.
    let command = cli.command.or_else(|| parse(["fourfold", "run"]).command);
    let done = match command.expect("the parser was given one") {
        Command::Run(args) => run::run(&args, started),
        Command::Inspect(args) => inspect::inspect(&args),
        Command::Quantize(args) => quantize::quantize(&args, cli.verbose > 0),
        Command::Synth(args) => synth::synth(&args),
        Command::Eval(args) => eval::eval(&args),
        Command::Bench(args) => bench::bench(&args),
        Command::Trace(args) => trace::trace(&args, cli.verbose > 0),
        Command::Diff(args) => diff::diff(&args),
        Command::Bisect(args) => bisect::bisect(&args),
        Command::Probe(args) => bisect::probe(&args),
        Command::Devices => devices::devices(),
        Command::Oracle(args) => oracle::oracle(&args),
        Command::Verify(args) => verify::verify(&args),
        Command::Isolation(args) => isolation::isolation(&args),
        Command::Completions { shell } => completions(shell),
    };
    match done {
        Ok(Ending::Done) => ExitCode::SUCCESS,
        Ok(Ending::Differs) => ExitCode::FAILURE,
        Ok(Ending::Interrupted) => ExitCode::from(INTERRUPTED),
        Err(e) if is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            terminal::note(&format!("error: {}", terminal::printable(&e.to_string())));
            ExitCode::from(code(&e))
        }
    }
}

/// As the flags say; `-1` is a number, for the flag before it to refuse.
fn parse(args: impl IntoIterator<Item = impl Into<std::ffi::OsString> + Clone>) -> Cli {
    let mut command = Cli::command().mut_subcommands(|command| command.allow_negative_numbers(true));
    let parsed = command.try_get_matches_from_mut(args).and_then(|found| Cli::from_arg_matches(&found));
    parsed.unwrap_or_else(|e| e.format(&mut command).exit())
}

/// The reader of our output has left: it has all that it wants.
fn is_broken_pipe(e: &anyhow::Error) -> bool {
    let json = || e.downcast_ref::<serde_json::Error>().and_then(serde_json::Error::io_error_kind);
    e.downcast_ref::<io::Error>().map(io::Error::kind).or_else(json) == Some(io::ErrorKind::BrokenPipe)
}

fn code(e: &anyhow::Error) -> u8 {
    use fourfold::Error;
    if e.is::<Usage>() {
        return 2;
    }
    match e.downcast_ref::<Error>() {
        Some(Error::Option { .. }) => 2,
        Some(Error::Io { .. } | Error::File { .. } | Error::Tensor { .. } | Error::Text { .. }) => 3,
        Some(Error::ContextFull { .. }) => 4,
        _ => 1,
    }
}

fn log(verbose: u8) {
    let level = match verbose {
        0 => "error",
        1 => "warn,fourfold=debug",
        _ => "info,fourfold=trace",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    let ansi = terminal::styled(&io::stderr());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(ansi).init();
}

fn completions(shell: clap_complete::Shell) -> anyhow::Result<Ending> {
    // Into memory first: the generator panics where a pipe breaks.
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "fourfold", &mut text);
    io::stdout().write_all(&text)?;
    Ok(Ending::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parser_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_of_a_gpu_reach_the_one_that_auto_takes() {
        let args = |flags: &[&str]| match parse([&["fourfold", "run"], flags].concat()).command {
            Some(Command::Run(args)) => args.engine.device().unwrap(),
            _ => unreachable!("the command is `run`"),
        };
        let without = |choice| match choice {
            fourfold::DeviceChoice::Prefer(options) => options.without_matrix_units,
            other => panic!("{other:?}"),
        };
        assert!(!without(args(&[])) && without(args(&["--no-matrix-units"])));
    }
}
