//! `fourfold bench`: tokens a second, beside what memory allows here.

use super::Ending;
use super::engine::EngineArgs;
use super::terminal::{self, Paint};
use super::trace::note_fallback;
use fourfold::bench::{self, Timed, median};
use serde_json::json;
use std::io::{self, Write};

const EXAMPLES: &str = "\
Examples:
  fourfold bench                                       the built-in model
  fourfold bench --model synth:gpt-oss-20b             random weights of a true shape; no files
  fourfold bench --model synth:gpt-oss-120b:12         its first 12 layers
  fourfold bench --depth 0,4096 --prefill 512,2048     other lengths
  fourfold bench --profile                             where the time of one token goes

The floor of a token is what it must read (weights, of experts those that it goes to, keys and values) at the speed at
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
    /// Tokens to decode at each depth, after eight that are not counted
    #[arg(long, value_name = "N", default_value = "64", value_parser = at_least_one)]
    tokens: usize,
    /// Time every launch of one decoded token on the device
    #[arg(long)]
    profile: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// No progress bar and no notes: on stderr only errors
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Tokens before the first that counts.
const WARM: usize = 8;
/// Bytes that the ceiling is measured over.
const CEILING_BYTES: u64 = 1 << 30;

pub(super) fn bench(args: &Args) -> anyhow::Result<Ending> {
    let device = args.engine.device()?;
    let deepest = args.depth.iter().max().map_or(0, |depth| depth + WARM + args.tokens);
    let longest = args.prefill.iter().copied().max().unwrap_or(0);
    let engine = args.engine.with_room(deepest.max(longest)).load(device, args.quiet)?;
    if !args.quiet {
        note_fallback(&engine);
    }
    let mut session = engine.session()?;
    // Busy for a while first: idle clocks are slow clocks.
    bench::decode(&mut session, 0, 0, args.tokens)?;
    let ceiling = bench::read_ceiling(engine.device(), CEILING_BYTES);
    let mut rows = Vec::new();
    let mut figures = Vec::new();
    for &length in &args.prefill {
        bench::prefill(&mut session, length)?;
        let seconds = median((0..3).map(|_| bench::prefill(&mut session, length)).collect::<fourfold::Result<_>>()?);
        let rate = length as f64 / seconds;
        rows.push(vec![format!("prefill {length}"), rate_of(rate), format!("{:.1} ms", seconds * 1e3), String::new()]);
        figures.push(json!({ "what": "prefill", "tokens": length, "seconds": seconds, "tokens_per_second": rate }));
    }
    for &depth in &args.depth {
        let run = bench::decode(&mut session, depth, WARM, args.tokens)?;
        let seconds = median(run.seconds.clone());
        let floor = ceiling.as_ref().ok().map(|c| run.bytes as f64 / c);
        let of_floor = floor.map_or(String::new(), |f| format!("{:.0} % of {}", 100.0 * f / seconds, rate_of(1.0 / f)));
        rows.push(vec![
            format!("decode at {depth}"),
            rate_of(1.0 / seconds),
            format!("{:.2} ms", seconds * 1e3),
            of_floor,
        ]);
        let (least, most) = run.seconds.iter().fold((f64::MAX, 0f64), |(a, b), s| (a.min(*s), b.max(*s)));
        figures.push(json!({ "what": "decode", "depth": depth, "tokens": args.tokens, "median_seconds": seconds,
            "least_seconds": least, "most_seconds": most, "bytes_per_token": run.bytes, "floor_seconds": floor }));
    }
    let profile = match args.profile {
        true => Some(bench::profile(&engine, args.depth.first().copied().unwrap_or(0), 1, 9)?),
        false => None,
    };
    let mut out = io::stdout().lock();
    if args.json {
        let kernels: Option<Vec<_>> = profile.map(|timed| {
            timed.iter().map(|t| json!({ "kernel": t.kernel, "bytes": t.bytes, "seconds": t.seconds })).collect()
        });
        let ceiling = ceiling.ok();
        let report = json!({ "model": engine.name(), "device": engine.device().describe(),
            "driver": engine.device().driver(), "read_bytes_per_second": ceiling, "figures": figures, "launches": kernels });
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
    terminal::table(&mut out, paint, &["what", ">tokens/s", ">median", "of the floor"], &rows)?;
    if let Some(timed) = profile {
        writeln!(out)?;
        let head = ["kernel", ">launches", ">µs", ">share", ">MB", ">GB/s"];
        terminal::table(&mut out, paint, &head, &by_kernel(&timed))?;
    }
    Ok(Ending::Done)
}

/// Rows of the profile: launches of one kernel together, the longest first, and a total.
fn by_kernel(timed: &[Timed]) -> Vec<Vec<String>> {
    let mut kernels: Vec<(&str, usize, f64, u64)> = Vec::new();
    for t in timed {
        match kernels.iter_mut().find(|k| k.0 == t.kernel) {
            Some(k) => *k = (k.0, k.1 + 1, k.2 + t.seconds, k.3 + t.bytes),
            None => kernels.push((t.kernel, 1, t.seconds, t.bytes)),
        }
    }
    kernels.sort_by(|a, b| b.2.total_cmp(&a.2));
    let total = timed.iter().fold(("total", 0, 0.0, 0), |k, t| (k.0, k.1 + 1, k.2 + t.seconds, k.3 + t.bytes));
    let row = |(kernel, launches, seconds, bytes): &(&str, usize, f64, u64)| {
        let (mb, speed) = match bytes {
            0 => (String::new(), String::new()),
            _ => (format!("{:.1}", *bytes as f64 / 1e6), format!("{:.0}", *bytes as f64 / seconds / 1e9)),
        };
        let share = format!("{:.1} %", 100.0 * seconds / total.2);
        vec![(*kernel).to_owned(), launches.to_string(), format!("{:.1}", seconds * 1e6), share, mb, speed]
    };
    kernels.iter().chain([&total]).map(row).collect()
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "should be a whole number above zero".to_owned())
}

fn rate_of(rate: f64) -> String {
    if rate >= 100.0 { format!("{rate:.0}") } else { format!("{rate:.1}") }
}
