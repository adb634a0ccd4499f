//! `fourfold diff`: where two traces part, for people, for scripts and as a page.

use super::terminal::{self, Paint};
use super::{Ending, Usage};
use fourfold::checkpoint::{Checkpoint, Mapping};
use fourfold::config::Config;
use fourfold::trace::compare::{
    self, Column, Comparison, Options, Outcome, Side, StageReport, Tolerances, value, weights,
};
use fourfold::trace::file::{TraceFile, split_layer};
use fourfold::trace::report;
use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

const EXAMPLES: &str = "\
Examples:
  fourfold diff gpu.safetensors cpu.safetensors                 B is the reference
  fourfold diff ours.safetensors golden.safetensors --prefix-b p7.
  fourfold diff a.safetensors b.safetensors --layers 0,3-5 --stage 'layers.*.mlp.*' --all
  fourfold diff a.safetensors b.safetensors --tolerance 1e-3 --tolerance 'logits=0.1' --html report.html
  fourfold diff a.safetensors b.safetensors --checkpoints DIR_A DIR_B

A stage differs if the relative L2 error of any row passes the tolerance, or any element is off by 10 tolerances of its \
row's root mean square, or one side has a NaN. Without --tolerance it is 1e-4, and 5e-2 where the metadata of either trace \
says dtype bf16 or f16. Experts are compared as sets. Traces of --stats agree if their bits do, or, with --tolerance, their \
means and deviations.

Columns: max rel is |a - b| / max(|a|, |b|); rel L2 is |A - B| / |B| over the stage, worst row that over its worst row; \
cosine is over the stage; ULPs are steps of f32.

Exit codes: 0 agrees, 1 differs, 2 cannot compare.";

/// Lines of the table before and after the first stage that differs, unless all are asked for.
const BEFORE: usize = 3;
const AFTER: usize = 8;
/// Stages whose own numbers are shown where --stage chooses some.
const OPENED: usize = 8;

/// Flags of `fourfold diff`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// A trace: a safetensors file of stages, written by `fourfold trace` or by anyone else
    a: PathBuf,
    /// The trace to compare it with, the reference
    b: PathBuf,
    /// In A only names that begin so count, without it: for files that hold several runs
    #[arg(long, value_name = "PREFIX", default_value = "", hide_default_value = true)]
    prefix_a: String,
    /// The same in B
    #[arg(long, value_name = "PREFIX", default_value = "", hide_default_value = true)]
    prefix_b: String,
    /// Relative error that is no difference, for all stages or for those of a name or pattern; may be given several times
    #[arg(long, value_name = "[STAGE=]X")]
    tolerance: Vec<ToleranceArg>,
    /// Only stages whose name matches, `*` for any text; may be given several times
    #[arg(long, value_name = "PATTERN")]
    stage: Vec<String>,
    /// Only these layers (0,3-5), and what lies outside any layer
    #[arg(long, value_name = "LAYERS")]
    layers: Option<LayersArg>,
    /// Every stage in the table, not only the first that differ
    #[arg(long)]
    all: bool,
    /// Write a page with charts and all numbers, which needs nothing else
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Print JSON instead of text; numbers that are not finite become null
    #[arg(long)]
    json: bool,
    /// The checkpoints of both runs: name the bytes that differ in the weights of the first stage that does
    #[arg(long, num_args = 2, value_names = ["DIR_A", "DIR_B"])]
    checkpoints: Option<Vec<PathBuf>>,
}

/// `1e-3` or `layers.*.mlp.out=1e-3`.
#[derive(Clone)]
struct ToleranceArg(Option<String>, f64);

impl std::str::FromStr for ToleranceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (stage, number) = match text.rsplit_once('=') {
            Some((stage, number)) => (Some(stage.to_owned()), number),
            None => (None, text),
        };
        let number: f64 = number.parse().map_err(|_| format!("{number} is no number"))?;
        if !(number >= 0.0 && number.is_finite()) {
            return Err(format!("{number} is no tolerance: give 0 or more"));
        }
        Ok(Self(stage, number))
    }
}

/// `0,3-5`.
#[derive(Clone)]
struct LayersArg(BTreeSet<usize>);

impl std::str::FromStr for LayersArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const MOST: usize = 10_000;
        let number = |text: &str| {
            let layer = text.trim().parse().map_err(|_| format!("{text:?} is no layer; give such as 0,3-5"))?;
            if layer > MOST { Err(format!("no model has {layer} layers")) } else { Ok(layer) }
        };
        let mut layers = BTreeSet::new();
        for part in text.split(',') {
            match part.split_once('-') {
                None => _ = layers.insert(number(part)?),
                Some((from, to)) if number(from)? <= number(to)? => layers.extend(number(from)?..=number(to)?),
                Some(_) => return Err(format!("{part} runs backwards")),
            }
        }
        Ok(Self(layers))
    }
}

pub(super) fn diff(args: &Args) -> anyhow::Result<Ending> {
    // Whatever is wrong with traces, checkpoints or the page, there is no answer: one exit code for all of it.
    let comparison = compared(args).map_err(|e| Usage(format!("cannot compare: {e}")))?;
    match print(&comparison, args) {
        // A reader that has left still wants the exit code.
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => return Err(e.into()),
        _ => {}
    }
    match comparison.outcome {
        Outcome::Agrees => Ok(Ending::Done),
        Outcome::Differs => Ok(Ending::Differs),
        Outcome::Incomparable => Err(Usage(comparison.verdict).into()),
    }
}

fn print(comparison: &Comparison, args: &Args) -> io::Result<()> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    if args.json {
        serde_json::to_writer_pretty(&mut out, comparison)?;
        writeln!(out)?;
    } else {
        let paint = Paint(terminal::styled(&io::stdout()));
        Report { comparison, args, paint, out: &mut out }.print()?;
    }
    out.flush()
}

fn compared(args: &Args) -> anyhow::Result<Comparison> {
    let same = |a: &Path, b: &Path| a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b));
    if let Some(page) = &args.html
        && let Some(trace) = [&args.a, &args.b].into_iter().find(|trace| same(trace, page))
    {
        anyhow::bail!("--html: {} is one of the traces, which the page would replace", trace.display());
    }
    let a = TraceFile::open_part(&args.a, &args.prefix_a)?;
    let b = TraceFile::open_part(&args.b, &args.prefix_b)?;
    let checkpoints = match args.checkpoints.as_deref() {
        Some([a, b]) => Some([Checkpoint::open(a, Mapping::Mmap)?, Checkpoint::open(b, Mapping::Mmap)?]),
        _ => None,
    };
    let mut tolerances = Tolerances::measured();
    for ToleranceArg(stage, number) in &args.tolerance {
        match stage {
            None => tolerances.default = Some(*number),
            Some(stage) => tolerances.stages.push((stage.clone(), *number)),
        }
    }
    let in_either = |pattern: &str| a.stages().iter().chain(b.stages()).any(|stage| compare::matches(pattern, stage));
    if let Some((unknown, _)) = tolerances.stages.iter().find(|(pattern, _)| !in_either(pattern)) {
        anyhow::bail!("--tolerance: no stage of the traces is called {unknown}");
    }
    let layer_of = |stage: &String| split_layer(stage).map(|(layer, _)| layer);
    let in_traces = |layers: &LayersArg| {
        a.stages().iter().chain(b.stages()).filter_map(layer_of).any(|layer| layers.0.contains(&layer))
    };
    if args.layers.as_ref().is_some_and(|layers| !in_traces(layers)) {
        anyhow::bail!("--layers: the traces have none of these");
    }
    let layers = args.layers.as_ref().map(|layers| layers.0.clone());
    let mut comparison = compare::compare(&a, &b, &Options { tolerances, stages: args.stage.clone(), layers })?;
    if let Some([a, b]) = &checkpoints
        && let Some(first) = comparison.first_stage()
    {
        let config = Config::open(a)?;
        let names = weights::tensors_of(&first.name, comparison.last_agreeing(), config.num_hidden_layers);
        comparison.weights = Some(weights::differences(a, b, &names));
    }
    if let Some(path) = &args.html {
        let page = report::html(&comparison)?;
        std::fs::write(path, page).map_err(|source| fourfold::Error::Io { path: path.clone(), source })?;
    }
    Ok(comparison)
}

struct Report<'a, W: Write> {
    comparison: &'a Comparison,
    args: &'a Args,
    paint: Paint,
    out: W,
}

impl<W: Write> Report<'_, W> {
    fn print(&mut self) -> io::Result<()> {
        let c = self.comparison;
        self.line(&format!("{}{}{}", self.paint.bold(), terminal::printable(&c.verdict), self.paint.plain()))?;
        if let Some(spread) = c.first_stage().and_then(|stage| stage.spread.as_ref()) {
            self.line(&format!("  {}", spread.what))?;
        }
        self.weights()?;
        writeln!(self.out)?;
        self.side("A", &c.a)?;
        self.side("B", &c.b)?;
        writeln!(self.out)?;
        self.table()?;
        self.numbers()?;
        self.ending()
    }

    fn line(&mut self, line: &str) -> io::Result<()> {
        writeln!(self.out, "{line}")
    }

    fn side(&mut self, name: &str, side: &Side) -> io::Result<()> {
        let kept = ["engine", "model", "device", "adapter", "dtype", "origin"];
        let facts = kept.iter().filter_map(|key| side.facts.get(*key).cloned());
        let tokens = side.tokens.map(|n| format!("{n} tokens"));
        let line = [side.path.clone()].into_iter().chain(facts).chain(tokens).collect::<Vec<_>>().join(" · ");
        let (dim, plain) = (self.paint.dim(), self.paint.plain());
        writeln!(self.out, "  {name}  {dim}{}{plain}", terminal::printable(&line))
    }

    fn weights(&mut self) -> io::Result<()> {
        let Some(weights) = &self.comparison.weights else { return Ok(()) };
        if weights.is_empty() {
            return self.line("  the checkpoints have equal bytes in the weights of this stage");
        }
        for tensor in weights {
            let name = terminal::printable(&tensor.tensor);
            match &tensor.reason {
                Some(reason) => writeln!(self.out, "  {name} {reason}")?,
                None => writeln!(self.out, "  {name}: {} of {} bytes differ", tensor.bytes, tensor.of)?,
            }
            for place in &tensor.places {
                writeln!(self.out, "    {}", place.what)?;
            }
            if tensor.bytes > tensor.places.len() {
                writeln!(self.out, "    and {} more", tensor.bytes - tensor.places.len())?;
            }
        }
        Ok(())
    }

    /// The stages to list: all, or those around the first that does not agree.
    fn listed(&self) -> Vec<usize> {
        let c = self.comparison;
        let everything = self.args.all || !self.args.stage.is_empty();
        let chosen = |i: &usize| match c.first {
            _ if everything => true,
            Some(first) => (first.saturating_sub(BEFORE)..=first + AFTER).contains(i),
            // All agree: the worst ones are worth a look.
            None => self.largest().contains(i),
        };
        (0..c.stages.len()).filter(chosen).collect()
    }

    /// The stages with the largest errors.
    fn largest(&self) -> BTreeSet<usize> {
        let stages = self.comparison.stages.iter().enumerate();
        let mut errors: Vec<(f64, usize)> = stages.filter_map(|(i, s)| Some((s.distance?.worst_row, i))).collect();
        errors.sort_by(|(a, _), (b, _)| b.total_cmp(a));
        errors.into_iter().take(AFTER).map(|(_, i)| i).collect()
    }

    fn table(&mut self) -> io::Result<()> {
        let listed = self.listed();
        let row = |i: &usize| {
            let stage = &self.comparison.stages[*i];
            let mark = match stage.outcome {
                Outcome::Agrees => "",
                Outcome::Differs => "differs",
                Outcome::Incomparable => "cannot compare",
            };
            let mut row = vec![stage.name.clone(), format!("{} × {}", stage.shape[0], stage.shape[1])];
            row.extend(match stage.distance {
                Some(d) => {
                    let short = |x: f64| if x == 0.0 { "0".to_owned() } else { format!("{x:.1e}") };
                    let ulps = if d.max_ulps == u32::MAX { "NaN".to_owned() } else { d.max_ulps.to_string() };
                    let cosine = format!("{:.6}", d.cosine);
                    [short(d.max_abs), short(d.max_rel), short(d.rel_l2), short(d.worst_row), cosine, ulps]
                }
                None => std::array::from_fn(|_| String::new()),
            });
            let note = stage.note.as_deref().unwrap_or_default();
            row.push(format!("{mark}{}{note}", if mark.is_empty() || note.is_empty() { "" } else { ": " }));
            row
        };
        let rows: Vec<Vec<String>> = listed.iter().map(row).collect();
        let head = ["stage", ">shape", ">max abs", ">max rel", ">rel L2", ">worst row", ">cosine", ">max ULPs", ""];
        terminal::table(&mut self.out, self.paint, &head, &rows)?;
        let rest = self.comparison.stages.len() - listed.len();
        if rest > 0 {
            let shown: BTreeSet<usize> = listed.into_iter().collect();
            let stages = self.comparison.stages.iter().enumerate();
            let differ = stages.filter(|(i, s)| !shown.contains(i) && s.outcome == Outcome::Differs).count();
            let (dim, plain) = (self.paint.dim(), self.paint.plain());
            writeln!(self.out, "  {dim}{rest} more stages, {differ} of which differ (--all lists them){plain}")?;
        }
        Ok(())
    }

    /// Each side by itself, for the first stage that differs and for those that were chosen.
    fn numbers(&mut self) -> io::Result<()> {
        let c = self.comparison;
        let mut opened: Vec<&StageReport> =
            if self.args.stage.is_empty() { Vec::new() } else { c.stages.iter().collect() };
        opened.truncate(OPENED);
        if let Some(first) = c.first_stage()
            && !opened.iter().any(|stage| stage.name == first.name)
        {
            opened.insert(0, first);
        }
        for stage in opened {
            let Some(columns) = &stage.columns else { continue };
            let name = terminal::printable(&stage.name);
            writeln!(self.out, "\n{}{name}{}", self.paint.bold(), self.paint.plain())?;
            let line = |name: &str, of: &dyn Fn(&Column) -> String| -> Vec<String> {
                [name.to_owned()].into_iter().chain(columns.iter().map(of)).collect()
            };
            let mut rows = vec![
                line("mean", &|c| value(c.mean)),
                line("std", &|c| value(c.std)),
                line("min", &|c| value(c.min)),
                line("max", &|c| value(c.max)),
                line("NaN", &|c| c.n_nan.to_string()),
                line("infinite", &|c| c.n_inf.to_string()),
            ];
            for i in 0..columns[0].first.len().min(5) {
                rows.push(line(if i == 0 { "first 5" } else { "" }, &|c| value(f64::from(c.first[i]))));
            }
            terminal::table(&mut self.out, self.paint, &["", ">A", ">B", ">A - B"], &rows)?;
        }
        Ok(())
    }

    fn ending(&mut self) -> io::Result<()> {
        let c = self.comparison;
        let [agree, differ, cannot] =
            [Outcome::Agrees, Outcome::Differs, Outcome::Incomparable].map(|outcome| c.count(outcome));
        writeln!(self.out)?;
        let cannot = if cannot > 0 { format!(", {cannot} cannot be compared") } else { String::new() };
        writeln!(self.out, "{agree} stages agree, {differ} differ{cannot}")?;
        for (name, list) in [("A", &c.only_a), ("B", &c.only_b)] {
            if !list.is_empty() {
                let some: Vec<&str> = list.iter().take(6).map(String::as_str).collect();
                let more = if list.len() > some.len() { ", ..." } else { "" };
                let some = some.join(", ");
                writeln!(self.out, "only in {name}: {} stages ({}{more})", list.len(), terminal::printable(&some))?;
            }
        }
        if let Some(path) = &self.args.html {
            writeln!(self.out, "page: {}", path.display())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tolerances_and_layers_are_read() {
        let read = |text: &str| text.parse::<ToleranceArg>().map(|t| (t.0, t.1));
        assert_eq!(read("1e-3").unwrap(), (None, 1e-3));
        assert_eq!(read("layers.*=0.5").unwrap(), (Some("layers.*".to_owned()), 0.5));
        assert!(read("x=").is_err() && read("-1").is_err() && read("inf").is_err() && read("nan").is_err());
        let layers = |text: &str| text.parse::<LayersArg>().map(|l| l.0.into_iter().collect::<Vec<_>>());
        assert_eq!(layers("0,3-5").unwrap(), [0, 3, 4, 5]);
        assert!(
            layers("5-3").is_err() && layers("a").is_err() && layers("0-99999999999").is_err() && layers("").is_err()
        );
    }
}
