//! `fourfold trace`: run a prompt and record every stage.

use super::run::EngineArgs;
use super::{Ending, Usage, terminal};
use fourfold::trace::file::{IfThere, TraceWriter};
use fourfold::trace::record::{Keep, record};
use fourfold::{Engine, Sampling, sampler};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Instant;

const EXAMPLES: &str = "\
Examples:
  fourfold trace --prompt \"Once upon a time\" -o a.safetensors
  fourfold trace --model DIR --tokens 410,11,412 --device cpu -o b.safetensors
  fourfold trace --prompt \"Hello\" --stage 'layers.*.mlp.*' --layers 0-3 -o mlp.safetensors
  fourfold trace --prompt \"Hello\" -n 32 --stats -o stats.safetensors

Then `fourfold diff a.safetensors b.safetensors`. docs/outside-traces.md has the format.";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// The text to run: control tokens in it are recognised
    #[arg(long, value_name = "TEXT", required_unless_present = "tokens", conflicts_with = "tokens")]
    prompt: Option<String>,
    /// The token ids to run
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    tokens: Vec<u32>,
    /// Then generate N tokens greedily, and record them too
    #[arg(short = 'n', long, value_name = "N", default_value_t = 0)]
    generate: usize,
    /// The file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Replace the file if it is there
    #[arg(long)]
    force: bool,
    /// Statistics and hashes of each stage and step instead of values
    #[arg(long)]
    stats: bool,
    /// Only stages whose names match; `*` stands for anything; several times
    #[arg(long = "stage", value_name = "PATTERN")]
    stages: Vec<String>,
    /// Only these layers (0,3-5), and what lies outside any layer
    #[arg(long, value_name = "LIST")]
    layers: Option<String>,
    /// Only these positions (0,3-5)
    #[arg(long, value_name = "LIST")]
    positions: Option<String>,
    #[command(flatten)]
    engine: EngineArgs,
}

pub(super) fn trace(args: &Args) -> anyhow::Result<Ending> {
    if !args.force && args.output.exists() {
        return Err(Usage(format!("{} is there already: --force replaces it", args.output.display())).into());
    }
    let keep = Keep {
        stats: args.stats,
        stages: args.stages.clone(),
        layers: list("--layers", args.layers.as_deref())?,
        positions: list("--positions", args.positions.as_deref())?,
    };
    let engine = args.engine.load(args.engine.device()?, false)?;
    note_fallback(&engine);
    let tokens = match &args.prompt {
        Some(text) => engine.tokenizer()?.encode_with_specials(text)?,
        None => args.tokens.clone(),
    };
    if tokens.is_empty() {
        return Err(Usage("there is nothing to run: the prompt has no tokens".into()).into());
    }
    let mut writer = TraceWriter::new(facts(args, &engine)?);
    let mut session = engine.session()?;
    let started = Instant::now();
    let mut all = tokens.clone();
    let mut logits = record(&mut session, &tokens, &keep, &mut writer)?;
    for _ in 0..args.generate {
        let next = sampler::sample(&Sampling::greedy(), &logits, &all, all.len() as u64)?.id;
        all.push(next);
        logits = record(&mut session, &[next], &keep, &mut writer)?;
    }
    let took = started.elapsed();
    if writer.is_empty() {
        return Err(
            Usage("no stage, layer and position of this run was asked for: there is nothing to write".into()).into()
        );
    }
    writer.set("tokens", serde_json::to_string(&all)?);
    let if_there = if args.force { IfThere::Replace } else { IfThere::Fail };
    writer.write(&args.output, if_there)?;
    let size = std::fs::metadata(&args.output).map_or(0, |m| m.len());
    terminal::note(&format!(
        "{} tokens on {} in {:.2} s, {} in {}",
        all.len(),
        engine.device().describe(),
        took.as_secs_f64(),
        terminal::bytes(size),
        args.output.display()
    ));
    Ok(Ending::Done)
}

/// The run's facts, for the file's metadata.
fn facts(args: &Args, engine: &Engine) -> anyhow::Result<Vec<(String, String)>> {
    let checkpoint = args.engine.checkpoint()?;
    let config = String::from_utf8_lossy(checkpoint.require("config.json")?).into_owned();
    let flags: Vec<String> = std::env::args_os().skip(1).map(|arg| arg.to_string_lossy().into_owned()).collect();
    let facts = [
        ("engine", concat!("fourfold ", env!("CARGO_PKG_VERSION")).to_owned()),
        ("model", engine.name().to_owned()),
        ("checkpoint_hash", format!("{:016x}", checkpoint.digest())),
        ("config", config),
        ("device", engine.device().describe()),
        ("driver", engine.device().driver()),
        ("dtype", "float32".to_owned()),
        ("flags", serde_json::to_string(&flags)?),
    ];
    let mut facts: Vec<(String, String)> = facts.map(|(key, value)| (key.to_owned(), value)).into();
    if let Some(prompt) = &args.prompt {
        facts.push(("prompt".to_owned(), prompt.clone()));
    }
    Ok(facts)
}

/// Say why `auto` took the CPU, if it did.
pub(super) fn note_fallback(engine: &Engine) {
    if let Some(why) = engine.fallback() {
        terminal::note(why);
    }
}

/// `0,3-5` as ranges.
fn list(flag: &str, text: Option<&str>) -> anyhow::Result<Vec<RangeInclusive<usize>>> {
    let Some(text) = text else { return Ok(Vec::new()) };
    let range = |part: &str| {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| text.trim().parse::<usize>();
        match (number(from), number(to)) {
            (Ok(from), Ok(to)) if from <= to => Ok(from..=to),
            _ => Err(Usage(format!("{flag} {part:?} is no number or range such as 3 or 3-5")).into()),
        }
    };
    text.split(',').map(range).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn lists_are_numbers_and_ranges() {
        let list = |text| super::list("--layers", Some(text)).ok();
        assert_eq!(list("0,3-5"), Some(vec![0..=0, 3..=5]));
        assert!([list("x"), list("5-3"), list("1-"), list("-1"), list(""), list("1,,2")].iter().all(Option::is_none));
    }
}
