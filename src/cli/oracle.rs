//! `fourfold oracle`: the known-answer tests, on the twins and on the GPU.

use super::{Ending, Usage, terminal};
use fourfold::Gpu;
use fourfold::device::{Device, cpu::Cpu, gpu};
use fourfold::oracle::{self, Outcome, Subject, Which};
use serde_json::json;
use std::io::{self, Write};
use std::sync::Arc;

const EXAMPLES: &str = "\
Examples:
  fourfold oracle                        both, or the twins alone where there is no GPU
  fourfold oracle --adapter NVIDIA       another GPU
  fourfold oracle --device cpu --json    for a script

Each check computes something whose answer follows from exact arithmetic: a failed one names what the device does \
wrong, with no other engine or model in between.

Exit codes:
  0    every check passed on every device asked for
  1    a check failed, or there is no such device";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// Only this one; both if not given
    #[arg(long, value_enum, value_name = "WHICH")]
    device: Option<DeviceArg>,
    /// The GPU whose name contains this; `fourfold devices` lists them
    #[arg(long, value_name = "NAME")]
    adapter: Option<String>,
    /// Behave as a GPU without subgroups
    #[arg(long, hide = true)]
    no_subgroups: bool,
    /// Only the checks that an engine makes when it starts
    #[arg(long)]
    quick: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum DeviceArg {
    Cpu,
    Gpu,
}

/// One device's outcomes.
struct Column {
    title: &'static str,
    device: String,
    outcomes: Vec<Outcome>,
}

pub(super) fn oracle(args: &Args) -> anyhow::Result<Ending> {
    let asks_for_gpu = args.adapter.is_some() || args.no_subgroups;
    if args.device == Some(DeviceArg::Cpu) && asks_for_gpu {
        return Err(Usage("--device cpu does not go with options of a GPU (--adapter)".into()).into());
    }
    let which = if args.quick { Which::Quick } else { Which::All };
    let mut columns = Vec::new();
    if args.device != Some(DeviceArg::Gpu) {
        columns.push(column("twins", Arc::new(Cpu::default()), which)?);
    }
    let mut no_gpu = None;
    if args.device != Some(DeviceArg::Cpu) {
        let options = gpu::Options {
            adapter: args.adapter.clone(),
            without_subgroups: args.no_subgroups,
            ..gpu::Options::default()
        };
        match Gpu::open(&options) {
            Ok(gpu) => columns.push(column("GPU", Arc::new(gpu), which)?),
            // Asked for by name or by --device it must be there; otherwise a machine without one is no failure.
            Err(e) if args.device.is_some() || asks_for_gpu => return Err(e.into()),
            Err(e) => no_gpu = Some(e.to_string()),
        }
    }
    if args.json {
        print_json(&columns, no_gpu.as_deref())?;
    } else {
        print_table(&columns, no_gpu.as_deref())?;
    }
    let failed: Vec<String> = columns.iter().filter_map(Column::failure).collect();
    if failed.is_empty() { Ok(Ending::Done) } else { Err(anyhow::anyhow!(failed.join("; "))) }
}

fn column(title: &'static str, device: Arc<dyn Device>, which: Which) -> anyhow::Result<Column> {
    let mut outcomes = oracle::run(&device, which)?;
    if title == "GPU" {
        // They would only run on the host a second time.
        outcomes.retain(|outcome| outcome.subject == Subject::Device);
    }
    Ok(Column { title, device: device.describe(), outcomes })
}

impl Column {
    fn outcome(&self, name: &str) -> Option<&Outcome> {
        self.outcomes.iter().find(|outcome| outcome.name == name)
    }

    /// `twins: 2 of 26 checks failed`, or nothing.
    fn failure(&self) -> Option<String> {
        let failed = self.outcomes.iter().filter(|outcome| !outcome.passed).count();
        (failed > 0).then(|| format!("{} of {} checks failed on {}", failed, self.outcomes.len(), self.device))
    }
}

fn print_table(columns: &[Column], no_gpu: Option<&str>) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for column in columns {
        let took: std::time::Duration = column.outcomes.iter().map(|o| o.elapsed).sum();
        writeln!(out, "{}: {}, {:.1} s", column.title, terminal::printable(&column.device), took.as_secs_f64())?;
    }
    if let Some(why) = no_gpu {
        writeln!(out, "GPU: none ({})", terminal::printable(why))?;
    }
    writeln!(out)?;
    let head: Vec<&str> = ["check"].into_iter().chain(columns.iter().map(|c| c.title)).chain(["detail"]).collect();
    let rows: Vec<Vec<String>> = oracle::checks()
        .iter()
        .filter(|check| columns.iter().any(|column| column.outcome(check.name).is_some()))
        .map(|check| {
            let verdicts = columns.iter().map(|column| match column.outcome(check.name) {
                None => "-".to_owned(),
                Some(outcome) => if outcome.passed { "ok" } else { "WRONG" }.to_owned(),
            });
            [check.name.to_owned()].into_iter().chain(verdicts).chain([details(columns, check)]).collect()
        })
        .collect();
    terminal::table(&mut out, terminal::Paint(terminal::styled(&io::stdout())), &head, &rows)
}

/// What failed and how, then what devices do that they may do.
fn details(columns: &[Column], check: &oracle::Check) -> String {
    let mut parts = Vec::new();
    for (column, outcome) in columns.iter().filter_map(|column| Some((column, column.outcome(check.name)?))) {
        if !outcome.passed {
            parts.push(format!("{}: {}: {}", column.title, outcome.fact, outcome.detail));
        }
        parts.extend(outcome.notes.iter().map(|note| format!("{} {note}, which is allowed", column.title)));
    }
    if check.subject == Subject::Host {
        parts.push("host code".to_owned());
    }
    parts.join("; ")
}

fn print_json(columns: &[Column], no_gpu: Option<&str>) -> anyhow::Result<()> {
    let device = |column: &Column| {
        let check = |o: &Outcome| {
            json!({
                "name": o.name,
                "subject": match o.subject { Subject::Device => "device", Subject::Host => "host" },
                "passed": o.passed,
                "fact": o.fact,
                "detail": o.detail,
                "notes": o.notes,
                "ms": o.elapsed.as_secs_f64() * 1e3,
            })
        };
        let checks: Vec<_> = column.outcomes.iter().map(check).collect();
        json!({ "title": column.title, "device": column.device, "passed": column.failure().is_none(), "checks": checks })
    };
    let devices: Vec<_> = columns.iter().map(device).collect();
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, &json!({ "devices": devices, "no_gpu": no_gpu }))?;
    writeln!(out)?;
    Ok(())
}
