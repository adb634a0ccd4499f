//! Two traces, stage by stage: where they part first, by how much, and what the elements that are apart share.
//!
//! Stages are aligned by name and rows by position. A stage differs if the relative L2 error of any row passes its
//! tolerance, or the error of any element passes [`ELEMENT_FACTOR`] tolerances of its row's root mean square (a wrong
//! weight moves one element of a row of thousands), or one side has a NaN. B is the reference that errors are relative to.

mod follow;
mod numbers;
mod place;
pub mod weights;

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

pub(super) use self::numbers::measure;
pub use self::numbers::{BUCKETS, Column, Distance, Histogram, ulps};
pub use self::place::{LISTED, Place, Spread};

use self::place::{Anatomy, Routes, count};
use crate::checkpoint::json;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::trace::file::{FORMAT, TraceFile, Values, split_layer, stage_order};

/// Tolerances that a single element may be off by, relative to its row's root mean square.
pub const ELEMENT_FACTOR: f64 = 10.0;

/// Which relative errors are no difference, by stage.
#[derive(Clone, Debug, PartialEq)]
pub struct Tolerances {
    /// For stages without one of their own; none: [`Tolerances::F32`] or [`Tolerances::HALF`], as the traces need.
    pub default: Option<f64>,
    /// Patterns of names (`*` and `?`) and their tolerances; the last that matches counts.
    pub stages: Vec<(String, f64)>,
}

impl Tolerances {
    /// Between two runs in f32.
    pub const F32: f64 = 1e-4;
    /// Where one of them has 16-bit activations, as its metadata say (`dtype`).
    pub const HALF: f64 = 5e-2;

    /// What the traces need, where the user says nothing else.
    pub fn measured() -> Self {
        Self { default: None, stages: Vec::new() }
    }

    fn of(&self, stage: &str, measured: f64) -> f64 {
        let own =
            self.stages.iter().rev().find(|(pattern, _)| matches(pattern, stage)).map(|(_, tolerance)| *tolerance);
        own.or(self.default).unwrap_or(measured)
    }

    /// The default for these traces.
    fn default_of(a: &TraceFile, b: &TraceFile) -> f64 {
        const HALF: [&str; 5] = ["bf16", "bfloat16", "f16", "float16", "half"];
        let is_half =
            |t: &TraceFile| t.metadata("dtype").is_some_and(|dtype| HALF.iter().any(|half| dtype.contains(half)));
        if is_half(a) || is_half(b) { Self::HALF } else { Self::F32 }
    }

    /// Whether the user gave one for this stage.
    fn is_given(&self, stage: &str) -> bool {
        self.default.is_some() || self.stages.iter().any(|(pattern, _)| matches(pattern, stage))
    }
}

/// What to compare, and how strictly.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which errors are no difference.
    pub tolerances: Tolerances,
    /// Only stages that match one of these patterns (`*` and `?`); none: all.
    pub stages: Vec<String>,
    /// Only these layers, and what belongs to no layer; none: all.
    pub layers: Option<BTreeSet<usize>>,
}

impl Default for Options {
    fn default() -> Self {
        Self { tolerances: Tolerances::measured(), stages: Vec::new(), layers: None }
    }
}

/// How a stage, or the whole comparison, came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Within tolerance.
    Agrees,
    /// Not so.
    Differs,
    /// Other shapes, or values on one side and statistics on the other.
    Incomparable,
}

/// Two traces compared.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// The worst of its stages: one that differs comes before one that cannot be compared.
    pub outcome: Outcome,
    /// The result in a sentence.
    pub verdict: String,
    /// Index in `stages` of the first that differs (else of the first that cannot be compared).
    pub first: Option<usize>,
    /// Facts about A.
    pub a: Side,
    /// Facts about B, the reference.
    pub b: Side,
    /// Stages that both have, in execution order.
    pub stages: Vec<StageReport>,
    /// Stages of A that B lacks.
    pub only_a: Vec<String>,
    /// Stages of B that A lacks.
    pub only_b: Vec<String>,
    /// The weights of the first stage that differs, where two checkpoints were given.
    pub weights: Option<Vec<weights::TensorDifference>>,
}

/// Where a trace comes from.
#[derive(Clone, Debug, Serialize)]
pub struct Side {
    /// The file.
    pub path: String,
    /// Its metadata, without long texts.
    pub facts: BTreeMap<String, String>,
    /// Tokens of the run, where the file says.
    pub tokens: Option<usize>,
}

/// One stage compared.
#[derive(Clone, Debug, Serialize)]
pub struct StageReport {
    /// Our name of it.
    pub name: String,
    /// How it came out.
    pub outcome: Outcome,
    /// What is to be said beside the numbers: why it cannot be compared, which routes differ.
    pub note: Option<String>,
    /// Rows and width that were compared.
    pub shape: [usize; 2],
    /// What the errors were held against.
    pub tolerance: f64,
    /// How far apart; none for indices and statistics.
    pub distance: Option<Distance>,
    /// A, B, and A - B by themselves.
    pub columns: Option<[Column; 3]>,
    /// Relative L2 of each row.
    pub rows: Vec<f64>,
    /// The position of each row.
    pub positions: Vec<usize>,
    /// The worst element.
    pub worst: Option<Place>,
    /// What the elements that are apart share.
    pub spread: Option<Spread>,
    /// Both sides' values.
    pub histogram: Option<Histogram>,
}

/// Compares what both traces have. An error means that nothing can be compared.
pub fn compare(a: &TraceFile, b: &TraceFile, options: &Options) -> Result<Comparison> {
    let chosen = |name: &String| {
        let layer = split_layer(name).map(|(layer, _)| layer);
        let by_layer = options.layers.as_ref().is_none_or(|layers| layer.is_none_or(|l| layers.contains(&l)));
        by_layer && (options.stages.is_empty() || options.stages.iter().any(|pattern| matches(pattern, name)))
    };
    let names = |of: &TraceFile| of.stages().iter().filter(|name| chosen(name)).cloned().collect::<BTreeSet<_>>();
    let (in_a, in_b) = (names(a), names(b));
    let sorted = |names: Vec<&String>| {
        let mut names: Vec<String> = names.into_iter().cloned().collect();
        names.sort_by_key(|name| stage_order(name));
        names
    };
    let common = sorted(in_a.intersection(&in_b).collect());
    if common.is_empty() {
        return Err(nothing_in_common(a, b, options));
    }
    let configs = [a, b].into_iter().filter_map(|t| t.metadata("config"));
    let config = configs.filter_map(|text| Config::from_json("config", text.as_bytes()).ok()).next();
    let mut pair = Pair { a, b, options, config, layer: None };
    let stages = common.iter().map(|name| pair.stage(name)).collect::<Result<Vec<_>>>()?;
    let index = |outcome| stages.iter().position(|stage| stage.outcome == outcome);
    let first = index(Outcome::Differs).or(index(Outcome::Incomparable));
    let mut comparison = Comparison {
        outcome: first.map_or(Outcome::Agrees, |first| stages[first].outcome),
        verdict: String::new(),
        first,
        a: side(a),
        b: side(b),
        stages,
        only_a: sorted(in_a.difference(&in_b).collect()),
        only_b: sorted(in_b.difference(&in_a).collect()),
        weights: None,
    };
    comparison.verdict = comparison.verdict_text();
    Ok(comparison)
}

impl Comparison {
    /// The first stage that differs, else the first that cannot be compared.
    pub fn first_stage(&self) -> Option<&StageReport> {
        self.stages.get(self.first?)
    }

    /// The last stage before the first that differs.
    pub fn last_agreeing(&self) -> Option<&str> {
        self.first?.checked_sub(1).map(|before| self.stages[before].name.as_str())
    }

    /// Stages that came out so.
    pub fn count(&self, outcome: Outcome) -> usize {
        self.stages.iter().filter(|stage| stage.outcome == outcome).count()
    }

    fn verdict_text(&self) -> String {
        let Some(first) = self.first_stage() else {
            let measured = self.stages.iter().filter_map(|s| s.distance.map(|d| (d.worst_row, s)));
            let worst = measured.max_by(|(x, _), (y, _)| x.total_cmp(y));
            let worst = worst.filter(|(error, _)| *error > 0.0);
            return match worst {
                Some((error, stage)) => format!(
                    "A agrees with B in {}; the largest relative error of a row is {error:.1e}, in {} (allowed {:.0e})",
                    count(self.stages.len(), "stage"),
                    stage.name,
                    stage.tolerance
                ),
                None => format!("A equals B in {}", count(self.stages.len(), "stage")),
            };
        };
        let name = &first.name;
        let note = first.note.as_deref().unwrap_or_default();
        if first.outcome == Outcome::Incomparable {
            return format!("A cannot be compared with B at {name}: {note}");
        }
        let Some(worst) = &first.worst else { return format!("A differs from B first at {name}: {note}") };
        let token = worst.token.map(|id| format!(" (id {id})")).unwrap_or_default();
        let Place { position, what, a, b, .. } = worst;
        format!(
            "A differs from B first at {name}; worst at token {position}{token}, {what}: A {}, B {}",
            value(f64::from(*a)),
            value(f64::from(*b))
        )
    }
}

/// A number of any size in few characters.
pub fn value(x: f64) -> String {
    match x.abs() {
        _ if !x.is_finite() => if x.is_nan() {
            "NaN"
        } else if x > 0.0 {
            "inf"
        } else {
            "-inf"
        }
        .to_owned(),
        0.0 => "0".to_owned(),
        1e-3..1e6 => format!("{x:.5}"),
        _ => format!("{x:.4e}"),
    }
}

/// Whether a name matches a pattern in which `*` stands for any text and `?` for any character.
pub fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    // Row p: whether the first p characters of the pattern match the first n of the name.
    let mut row = vec![false; name.len() + 1];
    row[0] = true;
    for p in pattern {
        let mut next = vec![p == '*' && row[0]; 1];
        for (n, c) in name.iter().enumerate() {
            next.push(if p == '*' { next[n] || row[n + 1] } else { row[n] && (p == '?' || p == *c) });
        }
        row = next;
    }
    row[name.len()]
}

fn side(trace: &TraceFile) -> Side {
    let keys =
        ["engine", "model", "device", "driver", "adapter", "dtype", "checkpoint_hash", "prompt", "flags", "kind"];
    let fact = |key: &&str| Some(((*key).to_owned(), json::clip(trace.metadata(key)?, 160)));
    let mut facts: BTreeMap<String, String> = keys.iter().filter_map(fact).collect();
    if trace.metadata("format") != Some(FORMAT) {
        facts.insert("origin".to_owned(), "not written by Fourfold".to_owned());
    }
    Side { path: trace.path().display().to_string(), facts, tokens: trace.tokens().map(<[u32]>::len) }
}

fn nothing_in_common(a: &TraceFile, b: &TraceFile, options: &Options) -> Error {
    let some = |t: &TraceFile| {
        let shown: Vec<String> = t.stages().iter().take(4).map(|name| json::name(name)).collect();
        format!("{} ({}{})", t.path().display(), shown.join(", "), if t.stages().len() > 4 { ", ..." } else { "" })
    };
    let asked = !options.stages.is_empty() || options.layers.is_some();
    let asked = if asked { " among those asked for" } else { "" };
    Error::option("traces", format!("no stage{asked} is in both {} and {}", some(a), some(b)))
}

struct Pair<'t> {
    a: &'t TraceFile,
    b: &'t TraceFile,
    options: &'t Options,
    config: Option<Config>,
    /// The routes of the layer that is being compared.
    layer: Option<(usize, LayerRoutes)>,
}

/// Experts of each position, of A and of B (of one for both where the other has none).
#[derive(Clone, Default)]
struct LayerRoutes {
    a: Option<Routes>,
    b: Option<Routes>,
}

/// Rows of a stage that belong together.
struct Rows {
    positions: Vec<usize>,
    a: Vec<usize>,
    b: Vec<usize>,
}

impl Pair<'_> {
    fn stage(&mut self, name: &str) -> Result<StageReport> {
        let mut report = StageReport {
            name: name.to_owned(),
            outcome: Outcome::Agrees,
            note: None,
            shape: [0, 0],
            tolerance: self.options.tolerances.of(name, Tolerances::default_of(self.a, self.b)),
            distance: None,
            columns: None,
            rows: Vec::new(),
            positions: Vec::new(),
            worst: None,
            spread: None,
            histogram: None,
        };
        match (self.a.has_values(name), self.b.has_values(name)) {
            (true, true) => {}
            (false, false) => return self.stats(report),
            (full_a, _) => {
                let (values, stats) = if full_a { ("A", "B") } else { ("B", "A") };
                return Ok(incomparable(report, format!("{values} has values, {stats} statistics only")));
            }
        }
        let ([rows_a, width_a], [rows_b, width_b]) = (self.a.shape(name)?, self.b.shape(name)?);
        let rows = match self.align(name, rows_a, rows_b)? {
            Some(rows) if width_a == width_b => rows,
            _ => {
                let shapes = format!("the shapes differ: A [{rows_a}, {width_a}], B [{rows_b}, {width_b}]");
                return Ok(incomparable(report, shapes));
            }
        };
        if rows.positions.is_empty() {
            return Ok(incomparable(report, "no position is in both".to_owned()));
        }
        let last = rows.positions.iter().max().copied().unwrap_or_default();
        if let Some(reason) = self.other_tokens(last) {
            return Ok(incomparable(report, reason));
        }
        report.shape = [rows.positions.len(), width_a];
        report.positions.clone_from(&rows.positions);
        let (a, b) = (self.a.tensor(name)?.values, self.b.tensor(name)?.values);
        match (a, b) {
            (Values::I32(a), Values::I32(b)) => {
                let (a, b) = (pick(&a, &rows.a, width_a), pick(&b, &rows.b, width_a));
                self.indices(report, &a, &b)
            }
            (Values::F32(a), Values::F32(b)) => {
                let (a, b) = (pick(&a, &rows.a, width_a), pick(&b, &rows.b, width_a));
                self.numbers(report, &a, b)
            }
            _ => Ok(incomparable(report, "one side has numbers, the other indices".to_owned())),
        }
    }

    /// Rows by position. None: the traces do not say which positions, and have not equally many.
    fn align(&self, name: &str, rows_a: usize, rows_b: usize) -> Result<Option<Rows>> {
        let ((a, a_says), (b, b_says)) = (self.a.positions(name, rows_a)?, self.b.positions(name, rows_b)?);
        // Fewer rows of the head may be the first ones or the last: who has them must say.
        let fewer_says = if rows_a < rows_b { a_says } else { b_says };
        let known = if stage_order(name).0 == 2 { fewer_says } else { a_says || b_says };
        if rows_a != rows_b && !known {
            return Ok(None);
        }
        let in_b: BTreeMap<usize, usize> = b.iter().enumerate().map(|(row, position)| (*position, row)).collect();
        let mut rows = Rows { positions: Vec::new(), a: Vec::new(), b: Vec::new() };
        for (row, position) in a.iter().enumerate() {
            if let Some(&other) = in_b.get(position) {
                rows.positions.push(*position);
                rows.a.push(row);
                rows.b.push(other);
            }
        }
        Ok(Some(rows))
    }

    /// Why positions up to `last` cannot be compared: the runs were fed other tokens.
    fn other_tokens(&self, last: usize) -> Option<String> {
        let (a, b) = (self.a.tokens()?, self.b.tokens()?);
        let at = a.iter().zip(b).position(|(a, b)| a != b).filter(|at| *at <= last)?;
        Some(format!("the runs were fed other tokens: at position {at} A has {}, B {}", a[at], b[at]))
    }

    fn token(&self, position: usize) -> Option<u32> {
        [self.a, self.b].into_iter().find_map(|trace| trace.tokens()?.get(position).copied())
    }

    /// The experts of a layer's positions.
    fn routes(&mut self, name: &str) -> Result<LayerRoutes> {
        let Some((layer, _)) = split_layer(name) else { return Ok(LayerRoutes::default()) };
        if let Some((held, routes)) = &self.layer
            && *held == layer
        {
            return Ok(routes.clone());
        }
        let stage = format!("layers.{layer}.mlp.router.experts");
        let read = |trace: &TraceFile| -> Result<Option<Routes>> {
            if !trace.has_values(&stage) {
                return Ok(None);
            }
            let [rows, width] = trace.shape(&stage)?;
            let (Values::I32(experts), (positions, _)) = (trace.tensor(&stage)?.values, trace.positions(&stage, rows)?)
            else {
                return Ok(None);
            };
            Ok(Some(positions.into_iter().zip(experts.chunks(width).map(<[i32]>::to_vec)).collect()))
        };
        let (a, b) = (read(self.a)?, read(self.b)?);
        let routes = LayerRoutes { a: a.clone().or(b.clone()), b: b.or(a) };
        self.layer = Some((layer, routes.clone()));
        Ok(routes)
    }

    /// Stages of numbers.
    fn numbers(&mut self, mut report: StageReport, a: &[f32], mut b: Vec<f32>) -> Result<StageReport> {
        let width = report.shape[1];
        let routes = self.routes(&report.name)?;
        let stage = split_layer(&report.name).map_or(report.name.as_str(), |(_, stage)| stage);
        if matches!(stage, "mlp.up" | "mlp.down" | "mlp.router.weights") {
            let moved = bring_slots_together(&mut b, width, &report.positions, &routes);
            if moved > 0 {
                report.note =
                    Some(format!("{} in another order of experts; compared by expert", count(moved, "token")));
            }
        }
        let anatomy = Anatomy { stage, width, config: self.config.as_ref(), routes: routes.a.as_ref() };
        let measured = numbers::measure(a, &b, width);
        let distance = measured.distance;
        let beyond = |error: f64, limit: f64| error > limit || !error.is_finite();
        if beyond(distance.worst_row, report.tolerance)
            || beyond(distance.worst_element, ELEMENT_FACTOR * report.tolerance)
        {
            report.outcome = Outcome::Differs;
            let spread_beyond = |limit: f64| {
                anatomy.spread(&report.positions, |see| numbers::elements_beyond(a, &b, width, limit, see))
            };
            let mut spread = spread_beyond(ELEMENT_FACTOR * report.tolerance);
            // Smaller differences may show the same pattern in more tokens, down to any difference at all.
            let is_narrow = spread.outputs.len() < LISTED.min(width / 2);
            for limit in [report.tolerance, report.tolerance / 10.0, 0.0].into_iter().filter(|_| is_narrow) {
                let wider = spread_beyond(limit);
                if wider.experts != spread.experts || wider.outputs != spread.outputs {
                    break;
                }
                spread = wider;
                if limit == 0.0 {
                    spread.what += "; all else in the stage is equal bit for bit";
                }
            }
            if let &[output] = &spread.outputs[..]
                && let Some(source) = self.source(&report, &anatomy)?
            {
                let tokens = spread.positions.iter().filter_map(|position| {
                    let row = report.positions.iter().position(|p| p == position)?;
                    let (slot, column) = anatomy.column_of(*position, output, spread.experts.first().copied())?;
                    let at = row * width + column;
                    Some((f64::from(a[at]) - f64::from(b[at]), source.input(*position, slot)?))
                });
                if let Some(what) = follow::follow(&tokens.collect::<Vec<_>>()) {
                    spread.what += &format!("; {what}");
                }
            }
            report.spread = Some(spread);
        }
        if distance.max_abs > 0.0 {
            let (position, column) = (report.positions[measured.worst / width], measured.worst % width);
            let part = anatomy.part(position, column);
            let what = anatomy.words(&part);
            report.worst = Some(Place {
                position,
                token: self.token(position),
                column,
                expert: part.expert,
                slot: part.slot,
                output: part.output,
                what,
                a: a[measured.worst],
                b: b[measured.worst],
            });
        }
        let delta: Vec<f32> = a.iter().zip(&b).map(|(a, b)| if a == b { 0.0 } else { a - b }).collect();
        report.columns = Some([numbers::column(a), numbers::column(&b), numbers::column(&delta)]);
        report.histogram = Some(numbers::histogram(a, &b));
        report.distance = Some(distance);
        report.rows = measured.rows;
        Ok(report)
    }

    /// What a linear stage was computed from, where A has it.
    fn source(&self, report: &StageReport, anatomy: &Anatomy<'_>) -> Result<Option<follow::Source>> {
        let Some(input) = follow::input_of(&report.name).filter(|input| self.a.has_values(input)) else {
            return Ok(None);
        };
        let [rows, width] = self.a.shape(&input)?;
        let Values::F32(values) = self.a.tensor(&input)?.values else { return Ok(None) };
        let (positions, _) = self.a.positions(&input, rows)?;
        let slots = if anatomy.stage == "mlp.down" { anatomy.slots().unwrap_or(1) } else { 1 };
        Ok(Some(follow::Source { values, width, slots, positions }))
    }

    /// Stages of indices: experts as sets, whose order is told but not judged; anything else exactly.
    fn indices(&self, mut report: StageReport, a: &[i32], b: &[i32]) -> Result<StageReport> {
        let width = report.shape[1];
        let are_experts = report.name.ends_with("mlp.router.experts");
        let scores = if are_experts { self.scores(&report.name)? } else { None };
        let (mut others, mut order, mut elements) = (Vec::new(), 0, Vec::new());
        for (row, (a, b)) in a.chunks(width).zip(b.chunks(width)).enumerate() {
            let position = report.positions[row];
            let (set_a, set_b): (BTreeSet<i32>, BTreeSet<i32>) =
                (a.iter().copied().collect(), b.iter().copied().collect());
            let differs = if are_experts { set_a != set_b } else { a != b };
            report.rows.push(f64::from(u8::from(differs)));
            order += usize::from(!differs && a != b);
            if differs {
                let columns =
                    a.iter().enumerate().filter(|(i, e)| if are_experts { !set_b.contains(e) } else { b[*i] != **e });
                elements.extend(columns.map(|(i, _)| (position, i)));
                others.push((position, a, b, set_a, set_b));
            }
        }
        let what = if are_experts { "experts" } else { "indices" };
        if let Some((position, a, b, set_a, set_b)) = others.first() {
            report.outcome = Outcome::Differs;
            let token = self.token(*position).map(|id| format!(" (id {id})")).unwrap_or_default();
            let mut note = format!("other {what} for {} of {}", others.len(), count(report.shape[0], "token"));
            note += &format!(", first token {position}{token}: A {a:?}, B {b:?}");
            // The chosen on one side only, and how near the scores of the last in and the first out were.
            let only = |x: &BTreeSet<i32>, y: &BTreeSet<i32>| x.difference(y).copied().collect::<Vec<_>>();
            let (only_a, only_b) = (only(set_a, set_b), only(set_b, set_a));
            let score = |e: &i32| scores.as_ref()?.get(position)?.get(usize::try_from(*e).ok()?).copied();
            if let (Some(x), Some(y)) = (only_a.first().and_then(score), only_b.first().and_then(score)) {
                let gap = value(f64::from((x - y).abs()));
                note += &format!("; in A the logits of experts {} and {} are {gap} apart", only_a[0], only_b[0]);
            }
            report.note = Some(note);
            let positions = others.iter().map(|(position, ..)| *position).collect();
            let experts: BTreeSet<i32> = others
                .iter()
                .flat_map(|(_, _, _, x, y)| x.symmetric_difference(y).copied().collect::<Vec<_>>())
                .collect();
            report.spread = Some(Spread {
                elements: elements.len(),
                positions,
                experts: experts.into_iter().collect(),
                outputs: Vec::new(),
                what: format!("{} of {} with other {what}", others.len(), count(report.shape[0], "token")),
            });
        } else if order > 0 {
            report.note = Some(format!("the same {what}, in another order for {}", count(order, "token")));
        }
        Ok(report)
    }

    /// A's router logits (else B's) of the layer whose experts are called `name`, by position.
    fn scores(&self, name: &str) -> Result<Option<BTreeMap<usize, Vec<f32>>>> {
        let name = name.replace(".experts", ".logits");
        let Some(trace) = [self.a, self.b].into_iter().find(|trace| trace.has_values(&name)) else { return Ok(None) };
        let [rows, width] = trace.shape(&name)?;
        let Values::F32(scores) = trace.tensor(&name)?.values else { return Ok(None) };
        let (positions, _) = trace.positions(&name, rows)?;
        Ok(Some(positions.into_iter().zip(scores.chunks(width).map(<[f32]>::to_vec)).collect()))
    }

    /// Stages of which only statistics were kept: equal bits, or statistics within a tolerance that was asked for.
    fn stats(&self, mut report: StageReport) -> Result<StageReport> {
        let (a, b) = (self.a.stats(&report.name)?, self.b.stats(&report.name)?);
        if a.len() != b.len() {
            let reason = format!("A has {}, B {}: record both in the same chunks", count(a.len(), "step"), b.len());
            return Ok(incomparable(report, reason));
        }
        if let Some(reason) = self.other_tokens(usize::MAX) {
            return Ok(incomparable(report, reason));
        }
        let other = a.iter().zip(&b).filter(|(a, b)| a.hash != b.hash).count();
        let columns = [stats_column(&a), stats_column(&b)];
        let elements = columns[0].count as usize;
        report.shape = [a.len(), elements / a.len().max(1)];
        report.rows = a.iter().zip(&b).map(|(a, b)| f64::from(u8::from(a.hash != b.hash))).collect();
        report.positions = (0..a.len()).collect();
        if elements as u64 != columns[1].count {
            let reason = format!("A has {elements} elements, B {}", columns[1].count);
            return Ok(incomparable(report, reason));
        }
        if other > 0 {
            let [x, y] = &columns;
            let size = (y.mean.powi(2) + y.std.powi(2)).sqrt();
            let far = [(x.mean, y.mean), (x.std, y.std)].iter().map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
            let within = far <= report.tolerance * size && x.n_nan == 0 && y.n_nan == 0 && x.n_inf == y.n_inf;
            let steps = count(a.len(), "step");
            if self.options.tolerances.is_given(&report.name) && within {
                report.note =
                    Some(format!("other bits in {other} of {steps}; mean and deviation are within tolerance"));
            } else {
                report.outcome = Outcome::Differs;
                let first = report.rows.iter().position(|differs| *differs > 0.0).unwrap_or_default();
                report.note = Some(format!("other bits in {other} of {steps}, first in step {first}"));
            }
        }
        let [x, y] = columns;
        let less = |of: fn(&Column) -> f64| of(&x) - of(&y);
        let delta = Column {
            mean: less(|c| c.mean),
            std: less(|c| c.std),
            min: less(|c| c.min),
            max: less(|c| c.max),
            ..x.clone()
        };
        report.columns = Some([x, y, delta]);
        Ok(report)
    }
}

fn incomparable(mut report: StageReport, reason: String) -> StageReport {
    report.outcome = Outcome::Incomparable;
    report.note = Some(reason);
    report
}

/// Chosen rows of a stage.
fn pick<T: Copy>(values: &[T], rows: &[usize], width: usize) -> Vec<T> {
    rows.iter().flat_map(|row| &values[row * width..][..width]).copied().collect()
}

/// Where B chose the same experts as A in another order, its parts of a row take A's order. Gives how many rows did so.
fn bring_slots_together(b: &mut [f32], width: usize, positions: &[usize], routes: &LayerRoutes) -> usize {
    let (Some(of_a), Some(of_b)) = (&routes.a, &routes.b) else { return 0 };
    let mut moved = 0;
    for (row, position) in b.chunks_mut(width).zip(positions) {
        let (Some(x), Some(y)) = (of_a.get(position), of_b.get(position)) else { continue };
        if x == y || x.len() != y.len() || !width.is_multiple_of(x.len()) {
            continue;
        }
        let from: Vec<Option<usize>> = x.iter().map(|expert| y.iter().position(|other| other == expert)).collect();
        let Some(from) = from.into_iter().collect::<Option<Vec<usize>>>() else { continue };
        let (part, old) = (width / x.len(), row.to_vec());
        for (slot, from) in from.into_iter().enumerate() {
            row[slot * part..][..part].copy_from_slice(&old[from * part..][..part]);
        }
        moved += 1;
    }
    moved
}

/// Statistics of all steps together.
fn stats_column(steps: &[crate::trace::file::StepStats]) -> Column {
    let sum = |i: usize| steps.iter().map(|step| f64::from(step.stats[i])).sum::<f64>();
    let bound = |i: usize, pick: fn(f64, f64) -> f64| {
        steps.iter().map(|step| f64::from(step.stats[i])).reduce(pick).unwrap_or_default()
    };
    let (count, n_nan, n_inf) = (sum(0), sum(5), sum(6));
    let n = (count - n_nan - n_inf).max(1.0);
    let mean = sum(1) / n;
    Column {
        count: count as u64,
        mean,
        std: (sum(2) / n - mean * mean).max(0.0).sqrt(),
        min: bound(3, f64::min),
        max: bound(4, f64::max),
        first: Vec::new(),
        n_nan: n_nan as u64,
        n_inf: n_inf as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        for (pattern, name, matched) in [
            ("*", "embed", true),
            ("layers.*.mlp.*", "layers.3.mlp.up", true),
            ("layers.?.hidden", "layers.13.hidden", false),
            ("*hidden", "layers.13.hidden", true),
            ("*.up", "layers.1.mlp.up.x", false),
            ("", "", true),
            ("", "a", false),
            ("embed", "embed", true),
        ] {
            assert_eq!(matches(pattern, name), matched, "{pattern} {name}");
        }
    }

    #[test]
    fn the_last_tolerance_that_matches_counts() {
        let tolerances = Tolerances {
            default: Some(1.0),
            stages: vec![("*.mlp.*".to_owned(), 2.0), ("layers.0.*".to_owned(), 3.0)],
        };
        assert!(tolerances.is_given("x"));
        let of = |stage: &str| tolerances.of(stage, 9.0);
        assert_eq!([of("embed"), of("layers.1.mlp.up"), of("layers.0.mlp.up")], [1.0, 2.0, 3.0]);
        assert_eq!(Tolerances::measured().of("embed", 9.0), 9.0);
    }

    #[test]
    fn slots_are_brought_together_by_expert() {
        let mut b = vec![10.0, 11.0, 20.0, 21.0, 1.0, 2.0, 3.0, 4.0];
        let routes = |list: [[i32; 2]; 2]| Some((0..2).zip(list.map(|e| e.to_vec())).collect::<Routes>());
        let routes = LayerRoutes { a: routes([[5, 7], [1, 2]]), b: routes([[7, 5], [1, 3]]) };
        assert_eq!(bring_slots_together(&mut b, 4, &[0, 1], &routes), 1);
        assert_eq!(b, [20.0, 21.0, 10.0, 11.0, 1.0, 2.0, 3.0, 4.0]);
    }

    #[test]
    fn numbers_of_any_size() {
        let shown = [0.0, 0.5, -1.25e-7, f64::NAN, f64::NEG_INFINITY].map(value);
        assert_eq!(shown, ["0", "0.50000", "-1.2500e-7", "NaN", "-inf"]);
    }
}
