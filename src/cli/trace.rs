//! `fourfold trace`: run a prompt and record every stage.

use super::engine::{EngineArgs, activations_name};
use super::terminal::{self, Paint};
use super::{Ending, Usage};
use fourfold::trace::calibration::{self, Measured, ScaleOf};
use fourfold::trace::file::{IfThere, TraceFile, TraceWriter, split_layer};
use fourfold::trace::record::{Keep, record};
use fourfold::{Engine, Sampling, sampler};
use std::io;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Instant;

const EXAMPLES: &str = "\
Examples:
  fourfold trace --prompt \"Once upon a time\" -o a.safetensors
  fourfold trace --model DIR --tokens 410,11,412 --device cpu -o b.safetensors
  fourfold trace --prompt \"Hello\" --stage 'layers.*.mlp.*' --layers 0-3 -o mlp.safetensors
  fourfold trace --prompt \"Hello\" -n 32 --stats -o stats.safetensors

Then `fourfold diff a.safetensors b.safetensors`. docs/outside-traces.md has the format.

Where the checkpoint has calibrated scales of inputs (input_scale), the run's inputs are held against them: calibration \
saw up to 2688 x input_scale. More than twice that is a warning. Rows before experts with scales of their own go by the \
expert that they are routed to; with --stats, or without the stage mlp.router.experts, by the largest, and the ratio is \
at least what is shown. Linears that share an input go by the least.";

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
    /// List every calibrated input against what calibration saw, not only the largest (so does --verbose)
    #[arg(long)]
    scales: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

pub(super) fn trace(args: &Args, verbose: bool) -> anyhow::Result<Ending> {
    if !args.force && args.output.exists() {
        return Err(Usage(format!("{} is there already: --force replaces it", args.output.display())).into());
    }
    let if_there = if args.force { IfThere::Replace } else { IfThere::Fail };
    TraceWriter::check(&args.output, if_there).map_err(|e| Usage(e.to_string()))?;
    let keep = Keep {
        stats: args.stats,
        stages: args.stages.clone(),
        layers: list("--layers", args.layers.as_deref())?,
        positions: list("--positions", args.positions.as_deref())?,
    };
    let engine = args.engine.load(args.engine.device()?, false)?;
    note_fallback(&engine);
    let tokens = match &args.prompt {
        Some(text) => engine.text_tokens(text)?,
        None => args.tokens.clone(),
    };
    if tokens.is_empty() {
        return Err(Usage("there is nothing to run: the prompt has no tokens".into()).into());
    }
    engine.check_context(tokens.len().saturating_add(args.generate))?;
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
    let calibrated = &engine.found().input_scales;
    if calibrated.iter().any(|one| keep.stage(&one.stage)) {
        against_calibration(&TraceFile::open(&args.output)?, args.scales || verbose)?;
    } else if args.scales {
        let none = if calibrated.is_empty() { "the checkpoint" } else { "what was recorded" };
        terminal::note(&format!("{none} has no calibrated scales of inputs: there is nothing to list"));
    }
    Ok(Ending::Done)
}

/// Hold the recorded inputs against calibration: a line, the table if asked for, and what is suspicious.
fn against_calibration(trace: &TraceFile, list: bool) -> anyhow::Result<()> {
    let all = calibration::measure(trace)?;
    let Some(most) = all.iter().max_by(|x, y| x.ratio.total_cmp(&y.ratio)) else { return Ok(()) };
    if list {
        table(&all)?;
    }
    let (clipped, blocks) = all
        .iter()
        .filter_map(|m| m.clipped)
        .fold((0u64, 0u64), |(c, b), (x, y)| (c.saturating_add(x), b.saturating_add(y)));
    let share =
        if blocks > 0 { format!("; {} of all blocks clipped", percent(clipped, blocks)) } else { String::new() };
    let more = if list { "" } else { " (--scales: all)" };
    terminal::note(&format!(
        "inputs up to {}{} times what calibration saw, at {}{share}{more}",
        at_least(most),
        ratio(most.ratio),
        most.stage
    ));
    let suspicious: Vec<&Measured> = all.iter().filter(|m| m.is_suspicious()).collect();
    let Some(first) = suspicious.first() else { return Ok(()) };
    terminal::note(&warning(first));
    match suspicious.len() - 1 {
        0 => {}
        1 => terminal::note("1 later input is out of calibration's range, too (--scales lists it)."),
        n => terminal::note(&format!("{n} later inputs are out of calibration's range, too (--scales lists them).")),
    }
    Ok(())
}

/// What a suspicious input means, and where to look.
fn warning(m: &Measured) -> String {
    let place = format!("warning: {}: the input of this layer ", m.stage);
    let norm = split_layer(&m.stage).and_then(|(layer, stage)| match stage {
        "attn_norm" => Some(format!("model.layers.{layer}.input_layernorm.weight")),
        "mlp_norm" => Some(format!("model.layers.{layer}.post_attention_layernorm.weight")),
        _ => None,
    });
    let what = match m.ratio.is_nan() {
        true => "holds NaN or infinity.".to_owned(),
        false => format!("is {}{} times larger than calibration ever saw.", at_least(m), ratio(m.ratio)),
    };
    let look = match norm {
        Some(gain) => format!("check that the norm's gain ({gain}) is loaded and applied"),
        None => "check the stages before it, first that the gain of the norm is loaded and applied".to_owned(),
    };
    format!("{place}{what}\nThe wrong value is upstream: {look}.")
}

fn at_least(m: &Measured) -> &'static str {
    if m.is_lower_bound() { "at least " } else { "" }
}

fn table(all: &[Measured]) -> io::Result<()> {
    let row = |m: &Measured| {
        let of = match m.scale_of {
            ScaleOf::Stage => "the stage".to_owned(),
            ScaleOf::Expert(expert) => format!("expert {expert}"),
            ScaleOf::LargestOf(n) => format!("largest of {n} experts"),
        };
        let bound = if m.is_lower_bound() && !m.ratio.is_nan() { "≥ " } else { "" }.to_owned();
        let clipped = m.clipped.map_or("-".to_owned(), |(clipped, blocks)| percent(clipped, blocks));
        vec![m.stage.clone(), magnitude(m.amax), magnitude(m.amax_calibrated()), bound + &ratio(m.ratio), of, clipped]
    };
    let rows: Vec<Vec<String>> = all.iter().map(row).collect();
    let head = ["stage", ">amax", ">calibrated", ">ratio", "scale of", ">clipped"];
    terminal::table(&mut io::stdout().lock(), Paint(terminal::styled(&io::stdout())), &head, &rows)
}

fn percent(part: u64, of: u64) -> String {
    format!("{:.1} %", 100.0 * part as f64 / of.max(1) as f64)
}

fn magnitude(x: f32) -> String {
    if x >= 100.0 { format!("{x:.1}") } else { format!("{x:.4}") }
}

fn ratio(ratio: f32) -> String {
    if ratio >= 10.0 { format!("{ratio:.1}") } else { format!("{ratio:.2}") }
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
        ("activations", activations_name(engine.activations()).to_owned()),
        ("flags", serde_json::to_string(&flags)?),
    ];
    let mut facts: Vec<(String, String)> = facts.map(|(key, value)| (key.to_owned(), value)).into();
    if !engine.found().input_scales.is_empty() {
        facts.push((calibration::KEY.to_owned(), calibration::to_json(&engine.found().input_scales)));
    }
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
