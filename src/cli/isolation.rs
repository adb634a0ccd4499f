//! `fourfold isolation`: a model alone, beside its twin, beside another model.

use super::engine::EngineArgs;
use super::{Ending, Usage, terminal};
use fourfold::isolation::{Layer, Report, Setting, Who, isolation as run_isolation};
use fourfold::{DeviceChoice, Engine};
use serde_json::json;
use std::io::{self, Write};
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  fourfold isolation --model DIR --beside TARGET
  fourfold isolation --model synth:gpt-oss-20b:2 --beside synth:gpt-oss-120b:2 --device gpu
  fourfold isolation --beside DIR --prompt \"Once upon a time\" -n 32

The model runs alone; beside a second engine of the same checkpoint; beside the other model. The neighbour is loaded on the \
same device before it, run, kept, and run again before each of its steps. Every layer's output must keep its bits.

Exit codes:
  0    equal bits in all three
  1    a setting differs, or the run failed
  2    bad usage
  3    a checkpoint cannot be read";

/// Tokens of a prompt that nobody gave.
const TOKENS: u32 = 79;

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// The other model: a directory or synth:SHAPE
    #[arg(long, value_name = "DIR")]
    beside: PathBuf,
    /// The text to run [default: 79 uneven token ids]
    #[arg(long, value_name = "TEXT", conflicts_with = "tokens")]
    prompt: Option<String>,
    /// The token ids to run
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    tokens: Vec<u32>,
    /// Then draw N tokens
    #[arg(short = 'n', long, value_name = "N", default_value_t = 16)]
    max_tokens: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

impl Args {
    fn tokens(&self, engine: &Engine) -> fourfold::Result<Vec<u32>> {
        match &self.prompt {
            Some(text) => engine.text_tokens(text),
            None if self.tokens.is_empty() => {
                let vocab = engine.config().vocab_size as u32;
                Ok((0..TOKENS).map(|i| i.wrapping_mul(2_654_435_761) % vocab).collect())
            }
            None => Ok(self.tokens.clone()),
        }
    }
}

pub(super) fn isolation(args: &Args) -> anyhow::Result<Ending> {
    if args.engine.shares_scales() {
        let text = "--activations nvfp4-dynamic takes a prompt as one step from an empty conversation: use nvfp4-token or \
                    nvfp4-static";
        return Err(Usage(text.into()).into());
    }
    let first = args.engine.device()?;
    let other = args.engine.with_model(&args.beside);
    let mut load = |who, device| {
        let device = match device {
            Some(device) => DeviceChoice::Own(device),
            None => first.clone(),
        };
        if who == Who::Other { other.load(device, args.json) } else { args.engine.load(device, args.json) }
    };
    let report = run_isolation(&mut load, &|engine| args.tokens(engine), args.max_tokens)?;
    let differences = report.differences();
    let mut out = io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &as_json(&report, &differences))?;
        writeln!(out)?;
    } else {
        print(&mut out, args, &report, &differences)?;
    }
    if differences.is_empty() {
        return Ok(Ending::Done);
    }
    drop(out);
    terminal::note(&format!("{} of {} settings differ", differences.len(), report.settings.len() - 1));
    Ok(Ending::Differs)
}

fn print(out: &mut impl Write, args: &Args, report: &Report, differences: &[String]) -> io::Result<()> {
    let paint = terminal::Paint(terminal::styled(&io::stdout()));
    let (given, drawn) = (report.tokens.len(), args.max_tokens);
    writeln!(out, "{given} tokens given, {drawn} drawn, on {}", terminal::printable(&report.device))?;
    writeln!(out, "the other: {}\n", terminal::printable(&args.beside.display().to_string()))?;
    let Some((alone, others)) = report.settings.split_first() else { return Ok(()) };
    let same = |equal: bool| if equal { "same" } else { "DIFFERS" }.to_owned();
    let head =
        ["layer", ">mean", ">std", ">min", ">max", "hash of what the MLP adds", "of the output", "twin", "other"];
    let mut rows = Vec::new();
    for (idx, layer) in alone.layers.iter().enumerate() {
        let mut row = vec![idx.to_string()];
        row.extend(moments(layer));
        row.extend([layer.mlp, layer.output].map(|hash| format!("{hash:016x}")));
        let bits = |layer: &Layer| [layer.mlp, layer.output];
        row.extend(others.iter().map(|other| same(bits(&other.layers[idx]) == bits(layer))));
        rows.push(row);
    }
    let mut logits = vec!["logits".to_owned()];
    logits.resize(6, String::new());
    logits.push(format!("{:016x}", alone.logits));
    logits.extend(others.iter().map(|other| same(other.logits == alone.logits)));
    rows.push(logits);
    terminal::table(out, paint, &head, &rows)?;
    if differences.is_empty() {
        return writeln!(out, "\nEqual bits in all settings: the model does not see who lives beside it.");
    }
    // What the first wrong layer's MLP added, in each setting.
    let differs = |idx: &usize| others.iter().any(|other| other.layers[*idx].mlp != alone.layers[*idx].mlp);
    if let Some(idx) = (0..alone.layers.len()).find(differs) {
        writeln!(out, "\nWhat the MLP of layer {idx} adds")?;
        let head: Vec<&str> = ["setting", ">mean", ">std", ">min", ">max"].into();
        let row = |s: &Setting| [s.name.to_owned()].into_iter().chain(moments(&s.layers[idx])).collect();
        terminal::table(out, paint, &head, &report.settings.iter().map(row).collect::<Vec<_>>())?;
    }
    writeln!(out)?;
    differences.iter().try_for_each(|difference| writeln!(out, "DIFFERS {difference}"))
}

fn moments(layer: &Layer) -> [String; 4] {
    [layer.mean, layer.deviation, layer.least, layer.largest].map(|v| format!("{v:.4}"))
}

fn as_json(report: &Report, differences: &[String]) -> serde_json::Value {
    let layer = |l: &Layer| {
        json!({
            "mean": l.mean, "std": l.deviation, "min": l.least, "max": l.largest,
            "mlp": format!("{:016x}", l.mlp), "output": format!("{:016x}", l.output),
        })
    };
    let setting = |s: &Setting| {
        json!({
            "name": s.name,
            "layers": s.layers.iter().map(layer).collect::<Vec<_>>(),
            "logits": format!("{:016x}", s.logits),
            "drawn": s.drawn,
        })
    };
    json!({
        "device": report.device,
        "tokens": report.tokens,
        "settings": report.settings.iter().map(setting).collect::<Vec<_>>(),
        "equal": differences.is_empty(),
        "differences": differences,
    })
}
