//! `fourfold bench`: tokens a second, beside what memory allows here.

mod chart;

use super::engine::EngineArgs;
use super::run::Chances;
use super::terminal::{self, Paint};
use super::trace::note_fallback;
use super::{Ending, MOST, Usage};
use fourfold::bench::{self, Timed, median};
use fourfold::device::Device;
use serde_json::{Value, json};
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

const EXAMPLES: &str = "\
Examples:
  fourfold bench                                       the built-in model
  fourfold bench --model synth:gpt-oss-20b             random weights of a true shape; no files
  fourfold bench --model synth:gpt-oss-120b:12         its first 12 layers
  fourfold bench --depth 0,4096 --prefill 512,2048     other lengths
  fourfold bench --batch 1,8,32                        conversations that are stepped together
  fourfold bench --batch 8,32 --plain                  and what the scheduler costs them
  fourfold bench --temperature 0.8 --top-p 0.95        drawn tokens instead of the likeliest ones
  fourfold bench --profile                             where the time of a step goes
  fourfold bench --kernel moe --tokens 1,8,64          the experts of one layer alone
  fourfold bench --chart bench.svg                     a picture of it

The floor of a token is what it must read (weights, of experts those that it goes to, keys and values) at the speed at \
which a kernel that does nothing else reads memory, measured in the same run.";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// Lengths of prompts
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "512", value_parser = at_least_one)]
    prefill: Vec<usize>,
    /// Tokens in the cache when decoding begins
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "0")]
    depth: Vec<usize>,
    /// Conversations that are decoded together
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1", value_parser = at_least_one)]
    batch: Vec<usize>,
    /// Tokens to decode in each case, after eight that are not counted; with --kernel: rows of a step, several with commas
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "64", value_parser = at_least_one)]
    tokens: Vec<usize>,
    /// Measure this alone; moe: a layer's experts, from the choice by given scores to the weighted sum, one layer after the other
    #[arg(long, value_name = "KERNEL", conflicts_with_all = ["prefill", "depth", "batch", "temperature", "top_k", "top_p", "min_p"])]
    kernel: Option<Kernel>,
    /// With --kernel: the kernels of decoding, or those of prompts
    #[arg(long, value_name = "ROLE", requires = "kernel", default_value = "decode")]
    role: RoleArg,
    /// Measure steps without the scheduler's work beside its own: what it costs
    #[arg(long, conflicts_with = "kernel")]
    plain: bool,
    /// Time every launch of a step on the device
    #[arg(long, conflicts_with = "kernel")]
    profile: bool,
    /// Draw the figures into this file, .svg or .html
    #[arg(long, value_name = "FILE")]
    chart: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// No progress bar and no notes: on stderr only errors
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten, next_help_heading = "Drawing tokens")]
    chances: Chances,
    #[command(flatten)]
    engine: EngineArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Kernel {
    Moe,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum RoleArg {
    Decode,
    Prompt,
}

/// Tokens before the first that counts.
const WARM: usize = 8;
/// Bytes that the ceiling is measured over.
const CEILING_BYTES: u64 = 1 << 30;

/// Something measured: seconds of each repetition, in which `tokens` tokens were computed and `bytes` had to be read.
struct Figure {
    what: String,
    facts: Value,
    tokens: usize,
    seconds: Vec<f64>,
    bytes: Option<u64>,
}

impl Figure {
    fn median(&self) -> f64 {
        median(self.seconds.clone())
    }

    fn rate(&self) -> f64 {
        self.tokens as f64 / self.median()
    }

    /// Least and most.
    fn spread(&self) -> [f64; 2] {
        self.seconds.iter().fold([f64::MAX, 0.0], |[a, b], s| [a.min(*s), b.max(*s)])
    }

    /// Seconds that reading the bytes takes.
    fn floor(&self, ceiling: Option<f64>) -> Option<f64> {
        Some(self.bytes? as f64 / ceiling?)
    }

    fn row(&self, ceiling: Option<f64>) -> Vec<String> {
        let (median, [least, most]) = (self.median(), self.spread());
        let of_floor = self.floor(ceiling).map_or(String::new(), |floor| {
            format!("{:.0} % of {}", 100.0 * floor / median, rate_of(self.tokens as f64 / floor))
        });
        let (unit, name) = if median < 1e-3 { (1e6, "µs") } else { (1e3, "ms") };
        let spread = format!("{:.2} to {:.2}", least * unit, most * unit);
        let speed = self.bytes.map_or(String::new(), |bytes| format!("{:.0}", bytes as f64 / median / 1e9));
        vec![self.what.clone(), rate_of(self.rate()), format!("{:.2} {name}", median * unit), spread, speed, of_floor]
    }

    fn json(&self, ceiling: Option<f64>) -> Value {
        let [least, most] = self.spread();
        let mut value = json!({ "median_seconds": self.median(), "least_seconds": least, "most_seconds": most,
            "repetitions": self.seconds.len(), "tokens_per_second": self.rate(), "bytes": self.bytes,
            "floor_seconds": self.floor(ceiling) });
        let facts = self.facts.as_object().cloned().unwrap_or_default();
        value.as_object_mut().expect("made above").extend(facts);
        value
    }
}

pub(super) fn bench(args: &Args) -> anyhow::Result<Ending> {
    if args.chart.as_ref().is_some_and(|file| file.extension().is_none_or(|end| end != "svg" && end != "html")) {
        return Err(Usage("--chart: the file's name should end in .svg or .html".into()).into());
    }
    if args.kernel.is_none() && args.tokens.len() > 1 {
        return Err(Usage("--tokens: several numbers go with --kernel; decoding takes one".into()).into());
    }
    args.chances.alone().validate()?;
    let device = args.engine.device()?;
    let most = |all: &[usize]| all.iter().copied().max().unwrap_or(0);
    let deepest = most(&args.depth).saturating_add(args.tokens[0]).saturating_add(WARM + 3);
    for (flags, count) in [
        ("--prefill", most(&args.prefill)),
        ("--depth and --tokens", deepest),
        ("--tokens", most(&args.tokens)),
        ("--batch", most(&args.batch)),
    ] {
        if count > MOST {
            return Err(Usage(format!("{flags}: {count} is more than any model or device holds")).into());
        }
    }
    let room = if args.kernel.is_some() { 0 } else { deepest.max(most(&args.prefill)) };
    let engine = args.engine.with_room(room).load(device, args.quiet)?;
    if !args.quiet {
        note_fallback(&engine);
    }
    let (figures, ceiling) = match args.kernel {
        Some(Kernel::Moe) => experts(args, &engine)?,
        None => steps(args, &engine)?,
    };
    let mut profiles = Vec::new();
    // A device without a clock has no profile, and all else.
    let no_profile = bench::clock(engine.device()).err().filter(|_| args.profile).map(|e| e.to_string());
    for &rows in args.batch.iter().filter(|_| args.profile && no_profile.is_none()) {
        profiles.push((
            rows,
            bench::profile(&engine, &args.chances.alone(), args.depth.first().copied().unwrap_or(0), rows, 9)?,
        ));
    }
    let read = ceiling.as_ref().ok().copied();
    if let Some(file) = &args.chart {
        let title = format!("{} on {}", engine.name(), engine.device().describe());
        let steps = profiles.iter().map(|(rows, timed)| (format!("a step of {rows}"), by_kernel(timed)));
        let bars = figures.iter().map(|f| (f.what.clone(), f.rate(), f.floor(read).map(|s| f.tokens as f64 / s)));
        let svg = chart::svg(&title, &bars.collect::<Vec<_>>(), &steps.collect::<Vec<_>>());
        let is_page = file.extension().is_some_and(|end| end == "html");
        let chart = if is_page { chart::page(&title, &svg) } else { svg };
        std::fs::write(file, chart).map_err(|e| Usage(format!("--chart {}: {e}", file.display())))?;
    }
    let mut out = io::stdout().lock();
    if args.json {
        let launches = |(rows, timed): &(usize, Vec<Timed>)| -> Value {
            let each = |t: &Timed| json!({ "kernel": t.kernel, "bytes": t.bytes, "seconds": t.seconds });
            json!({ "rows": rows, "launches": timed.iter().map(each).collect::<Vec<_>>() })
        };
        let report = json!({ "model": engine.name(), "device": engine.device().describe(),
            "driver": engine.device().driver(), "read_bytes_per_second": read,
            "no_floor": ceiling.as_ref().err().map(ToString::to_string), "no_profile": no_profile,
            "figures": figures.iter().map(|f| f.json(read)).collect::<Vec<_>>(),
            "profiles": profiles.iter().map(launches).collect::<Vec<_>>() });
        writeln!(out, "{report}")?;
        return Ok(Ending::Done);
    }
    writeln!(out, "{} on {}", engine.name(), engine.device().describe())?;
    writeln!(out, "{}", engine.needs())?;
    match &ceiling {
        Ok(ceiling) => writeln!(out, "memory reads at {:.0} GB/s (measured now)", ceiling / 1e9)?,
        Err(e) => writeln!(out, "no floor: {e}")?,
    }
    writeln!(out)?;
    let paint = Paint(terminal::styled(&io::stdout()));
    let rows: Vec<_> = figures.iter().map(|f| f.row(read)).collect();
    let head = ["what", ">tokens/s", ">median", ">least to most", ">GB/s", "of the floor"];
    terminal::table(&mut out, paint, &head, &rows)?;
    if let Some(why) = no_profile {
        writeln!(out, "\nno profile: {why}")?;
    }
    for (rows, timed) in &profiles {
        writeln!(out, "\nA step of {rows}:")?;
        let head = ["kernel", ">launches", ">µs", ">share", ">MB", ">GB/s"];
        terminal::table(&mut out, paint, &head, &by_kernel(timed).iter().map(Kind::row).collect::<Vec<_>>())?;
    }
    Ok(Ending::Done)
}

type Measured = (Vec<Figure>, fourfold::Result<f64>);

fn ceiling(device: &Arc<dyn Device>) -> fourfold::Result<f64> {
    bench::read_ceiling(device, CEILING_BYTES)
}

/// Prompts and decoding.
fn steps(args: &Args, engine: &fourfold::Engine) -> anyhow::Result<Measured> {
    let mut session = engine.session()?;
    let (count, sampling) = (args.tokens[0], args.chances.alone());
    bench::keep_busy(&mut session)?;
    let ceiling = ceiling(engine.device());
    let mut figures = Vec::new();
    for &length in &args.prefill {
        bench::prefill(&mut session, length)?;
        let seconds = (0..3).map(|_| bench::prefill(&mut session, length)).collect::<fourfold::Result<_>>()?;
        let facts = json!({ "what": "prefill", "tokens": length });
        figures.push(Figure { what: format!("prefill {length}"), facts, tokens: length, seconds, bytes: None });
    }
    for &depth in &args.depth {
        for &batch in &args.batch {
            let mut beside = if batch == 1 { String::new() } else { format!(", {batch} at once") };
            if sampling.temperature > 0.0 {
                beside += &format!(", temperature {}", sampling.temperature);
                let filters = [
                    ("top-k", sampling.top_k as f32, 0.0),
                    ("top-p", sampling.top_p, 1.0),
                    ("min-p", sampling.min_p, 0.0),
                ];
                for (name, value, off) in filters {
                    beside += &if value == off { String::new() } else { format!(", {name} {value}") };
                }
            }
            let mut add = |what: &str, how: &str, run: bench::Decode| {
                let facts = json!({ "what": what, "depth": depth, "batch": batch, "temperature": sampling.temperature,
                    "top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p });
                let (what, bytes) = (format!("decode at {depth}{beside}{how}"), Some(run.bytes));
                figures.push(Figure { what, facts, tokens: batch, seconds: run.seconds, bytes });
            };
            if batch == 1 {
                add("decode", "", bench::decode(&mut session, &sampling, depth, WARM, count)?);
            }
            if batch > 1 || args.plain {
                let (what, how) = if batch > 1 { ("decode", "") } else { ("scheduler", ", scheduler") };
                add(what, how, bench::decode_batch(engine, &sampling, batch, depth, WARM, count)?);
            }
            if args.plain {
                add("plain", ", plain steps", bench::decode_plain(engine, &sampling, batch, depth, WARM, count)?);
                if let [.., scheduled, plain] = &mut figures[..] {
                    let share = scheduled.median() / plain.median();
                    plain.what += &format!(" (x {share:.3})");
                    plain.facts["scheduler_over_plain"] = share.into();
                }
            }
        }
    }
    Ok((figures, ceiling))
}

/// The experts of a layer alone.
fn experts(args: &Args, engine: &fourfold::Engine) -> anyhow::Result<Measured> {
    let prompt = args.role == RoleArg::Prompt;
    bench::moe(engine, args.tokens[0], prompt, 1)?; // busy first
    let ceiling = ceiling(engine.device());
    let mut figures = Vec::new();
    for &rows in &args.tokens {
        let moe = bench::moe(engine, rows, prompt, 9)?;
        let role = if prompt { "prompt" } else { "decode" };
        let facts = json!({ "what": "moe", "tokens": rows, "role": role, "experts": moe.experts });
        let what = format!("experts of a layer, {rows} tokens ({:.1} experts)", moe.experts);
        figures.push(Figure { what, facts, tokens: rows, seconds: moe.seconds, bytes: Some(moe.bytes) });
    }
    Ok((figures, ceiling))
}

/// Launches of one kernel.
struct Kind {
    kernel: String,
    launches: usize,
    seconds: f64,
    share: f64,
    bytes: u64,
}

impl Kind {
    fn row(&self) -> Vec<String> {
        let (mb, speed) = match self.bytes {
            0 => (String::new(), String::new()),
            bytes => (format!("{:.1}", bytes as f64 / 1e6), format!("{:.0}", bytes as f64 / self.seconds / 1e9)),
        };
        let (us, share) = (format!("{:.1}", self.seconds * 1e6), format!("{:.1} %", 100.0 * self.share));
        vec![self.kernel.clone(), self.launches.to_string(), us, share, mb, speed]
    }
}

/// Launches of one kernel together, the longest first, and a total.
fn by_kernel(timed: &[Timed]) -> Vec<Kind> {
    let total: f64 = timed.iter().map(|t| t.seconds).sum();
    let mut kinds: Vec<Kind> = Vec::new();
    let mut add = |kernel: &str, t: &Timed| {
        let at = kinds.iter().position(|k| k.kernel == kernel).unwrap_or_else(|| {
            kinds.push(Kind { kernel: kernel.to_owned(), launches: 0, seconds: 0.0, share: 0.0, bytes: 0 });
            kinds.len() - 1
        });
        let kind = &mut kinds[at];
        (kind.launches, kind.seconds, kind.bytes) = (kind.launches + 1, kind.seconds + t.seconds, kind.bytes + t.bytes);
        kind.share = kind.seconds / total;
    };
    for t in timed {
        add(t.kernel, t);
        add("total", t);
    }
    // The total takes the longest of all, and goes last.
    kinds.sort_by(|a, b| (a.kernel == "total").cmp(&(b.kernel == "total")).then(b.seconds.total_cmp(&a.seconds)));
    kinds
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "should be a whole number above zero".to_owned())
}

fn rate_of(rate: f64) -> String {
    if rate >= 100.0 { format!("{rate:.0}") } else { format!("{rate:.1}") }
}
