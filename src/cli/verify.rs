//! `fourfold verify`: whether bits depend on anything here that they should not depend on.

use super::engine::EngineArgs;
use super::trace::note_fallback;
use super::{Ending, MOST, Usage, terminal};
use fourfold::Engine;
use fourfold::verify::{Line, Options, Part, verify as verify_engine};
use serde_json::json;
use std::io::{self, Write};

const EXAMPLES: &str = "\
Examples:
  fourfold verify                            the built-in model, the best device
  fourfold verify --model DIR --device gpu   whole steps of another model, on a GPU or not at all
  fourfold verify --only kernels,rows        the kernels alone
  fourfold verify --cases 100 --strict       many conversations, prompts by the kernels of generated tokens

oracle: programs whose answers are known. kernels: each gives what its twin on the CPU gives. rows: a row of each kernel has \
the same bits alone, among 2 to 64 others, in any order. steps: the logits of whole conversations have the same bits again, \
in other chunks, over scratch full of NaN, beside other sequences, sessions and threads, and after another model came and \
went on the device.

Exit codes:
  0    everything holds
  1    something differs: the table says what and where, or the run failed
  2    bad usage
  3    the checkpoint cannot be read";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// Only these parts: oracle, kernels, rows, steps; several with commas between
    #[arg(long, value_name = "PARTS", value_delimiter = ',')]
    only: Vec<PartArg>,
    /// Conversations that whole steps are checked with
    #[arg(long, value_name = "N", default_value_t = 1)]
    cases: usize,
    /// Tokens of each conversation's prompt: past 128, attention is shared among segments
    #[arg(long, value_name = "TOKENS", default_value_t = Options::default().prompt)]
    prompt_tokens: usize,
    /// Tokens that are drawn after it
    #[arg(short = 'n', long, value_name = "TOKENS", default_value_t = Options::default().drawn)]
    max_tokens: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum PartArg {
    Oracle,
    Kernels,
    Rows,
    Steps,
}

impl PartArg {
    fn part(self) -> Part {
        match self {
            Self::Oracle => Part::Oracle,
            Self::Kernels => Part::Kernels,
            Self::Rows => Part::Rows,
            Self::Steps => Part::Steps,
        }
    }
}

pub(super) fn verify(args: &Args) -> anyhow::Result<Ending> {
    if [args.cases, args.prompt_tokens, args.max_tokens].contains(&0) {
        return Err(Usage("--cases, --prompt-tokens and --max-tokens are 1 at least".into()).into());
    }
    let positions = args.prompt_tokens.saturating_add(args.max_tokens);
    if positions > MOST {
        return Err(
            Usage(format!("--prompt-tokens and --max-tokens: {positions} is more than any context holds")).into()
        );
    }
    let parts = match args.only.is_empty() {
        true => Part::ALL.to_vec(),
        false => args.only.iter().map(|part| part.part()).collect(),
    };
    let options = Options { parts, cases: args.cases, prompt: args.prompt_tokens, drawn: args.max_tokens };
    // A scheduler's cache has room for the whole context of each session: no more of it than the conversations need.
    let wanted = args.engine.with_context(positions);
    let engine = wanted.load(args.engine.device()?, false)?;
    note_fallback(&engine);
    let mut out = io::stdout().lock();
    if !args.json {
        writeln!(
            out,
            "{} on {}",
            terminal::printable(engine.name()),
            terminal::printable(&engine.device().describe())
        )?;
    }
    let mut printed = Ok(());
    let lines = verify_engine(&engine, &options, &mut |line| {
        if !args.json && printed.is_ok() {
            printed = print(&mut out, line);
        }
    })?;
    printed?;
    let wrong: Vec<&Line> = lines.iter().filter(|line| !line.holds()).collect();
    let hint = wrong.iter().find(|line| !line.tokens.is_empty()).map(|line| probe(args, &line.tokens));
    if args.json {
        serde_json::to_writer_pretty(&mut out, &report(&engine, &lines, hint.as_deref()))?;
        writeln!(out)?;
    } else if let Some(hint) = &hint {
        writeln!(out, "\nThe stage, where a prompt alone shows it: {hint}")?;
    }
    if wrong.is_empty() {
        if !args.json {
            let cases: usize = lines.iter().map(|line| line.cases).sum();
            writeln!(out, "\nAll {} checks hold ({} cases).", lines.len(), terminal::grouped(cases as u64))?;
        }
        return Ok(Ending::Done);
    }
    drop(out);
    terminal::note(&format!("{} of {} checks differ on {}", wrong.len(), lines.len(), engine.device().describe()));
    Ok(Ending::Differs)
}

/// A line of the table, when its check is done.
fn print(out: &mut impl Write, line: &Line) -> io::Result<()> {
    let verdict = if line.holds() { "holds".to_owned() } else { format!("DIFFERS ({})", line.wrong) };
    let (part, name, cases, seconds) = (line.part.name(), &line.name, line.cases, line.elapsed.as_secs_f64());
    writeln!(out, "  {part:<7}  {name:<36}  {cases:>5} cases  {seconds:>6.1} s  {verdict}")?;
    if !line.holds() {
        writeln!(out, "           {}", terminal::printable(&line.detail))?;
    }
    out.flush()
}

/// The command that finds the stage.
fn probe(args: &Args, tokens: &[u32]) -> String {
    let ids: Vec<String> = tokens.iter().map(u32::to_string).collect();
    format!("fourfold probe{} --tokens {}", args.engine.as_flags(), ids.join(","))
}

fn report(engine: &Engine, lines: &[Line], probe: Option<&str>) -> serde_json::Value {
    let line = |line: &Line| {
        json!({
            "part": line.part.name(),
            "name": line.name,
            "cases": line.cases,
            "wrong": line.wrong,
            "holds": line.holds(),
            "detail": line.detail,
            "seconds": line.elapsed.as_secs_f64(),
        })
    };
    json!({
        "model": engine.name(),
        "device": engine.device().describe(),
        "driver": engine.device().driver(),
        "strict": engine.strict(),
        "holds": lines.iter().all(Line::holds),
        "checks": lines.iter().map(line).collect::<Vec<_>>(),
        "probe": probe,
    })
}
