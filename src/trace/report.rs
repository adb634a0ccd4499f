//! A comparison as one HTML page that needs nothing else: verdict, charts of the error by layer and stage, a table that
//! opens on click, histograms side by side. The page's text and styles are `assets/report.html`; shapes are made here.

use minijinja::{Environment, Value, context};

use crate::error::{Error, Result};
use crate::trace::compare::weights::TensorDifference;
use crate::trace::compare::{BUCKETS, Column, Comparison, Histogram, Outcome, Side, StageReport, value};
use crate::trace::file::{LAYER_STAGES, split_layer};

const TEMPLATE: &str = include_str!("../../assets/report.html");
const NAME: &str = "report.html";

/// The chart of errors in execution order: its plane, in units of the picture.
const WIDTH: f64 = 1080.0;
const HEIGHT: f64 = 240.0;
/// The smallest error that has a place of its own; what is smaller (or 0) stands on the floor.
const FLOOR: f64 = -9.0;
/// Size of a histogram.
const BARS: [f64; 2] = [480.0, 120.0];

/// The page.
pub fn html(comparison: &Comparison) -> Result<String> {
    let mut pages = Environment::new();
    let fault = |e: minijinja::Error| Error::Text { what: NAME.to_owned(), reason: format!("{e:#}") };
    pages.add_template(NAME, TEMPLATE).map_err(fault)?;
    let page = pages.get_template(NAME).map_err(fault)?;
    let first = comparison.first;
    let stages = comparison.stages.iter().enumerate().map(|(i, stage)| row(i, stage, first == Some(i)));
    let count = |outcome| comparison.count(outcome);
    page.render(context! {
        outcome => class(comparison.outcome),
        verdict => comparison.verdict.as_str(),
        spread => comparison.first_stage().and_then(|stage| stage.spread.as_ref()).map(|spread| spread.what.as_str()),
        first => first,
        first_name => comparison.first_stage().map(|stage| stage.name.as_str()),
        weights => comparison.weights.as_ref().map(|list| list.iter().map(tensor).collect::<Vec<_>>()),
        a => side(&comparison.a),
        b => side(&comparison.b),
        counts => [Outcome::Agrees, Outcome::Differs, Outcome::Incomparable].map(count),
        only_a => comparison.only_a.clone(),
        only_b => comparison.only_b.clone(),
        stages => stages.collect::<Vec<_>>(),
        chart => chart(comparison),
        grid => grid(comparison),
        bars => BARS,
    })
    .map_err(fault)
}

fn class(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Agrees => "agrees",
        Outcome::Differs => "differs",
        Outcome::Incomparable => "incomparable",
    }
}

fn side(side: &Side) -> Value {
    context! { path => side.path.as_str(), facts => side.facts.clone(), tokens => side.tokens }
}

fn tensor(difference: &TensorDifference) -> Value {
    let TensorDifference { tensor, reason, bytes, of, places } = difference;
    let places = places.iter().map(|place| Value::from(place.what.as_str())).collect::<Vec<_>>();
    context! { tensor => tensor.as_str(), reason => reason.as_deref(), bytes => *bytes, of => *of, places => places }
}

/// The error that a stage is judged by; for indices and statistics, whether any row differs.
fn error(stage: &StageReport) -> Option<f64> {
    match (&stage.distance, stage.outcome) {
        (Some(distance), _) => Some(distance.worst_row),
        (None, Outcome::Incomparable) => None,
        (None, outcome) => Some(f64::from(u8::from(outcome == Outcome::Differs))),
    }
}

/// A stage's line and what opens below it.
fn row(i: usize, stage: &StageReport, is_first: bool) -> Value {
    let short = |x: f64| if x == 0.0 { "0".to_owned() } else { format!("{x:.1e}") };
    let numbers = stage.distance.map(|d| {
        let ulps = if d.max_ulps == u32::MAX { "NaN".to_owned() } else { d.max_ulps.to_string() };
        [short(d.max_abs), short(d.max_rel), short(d.rel_l2), short(d.worst_row), format!("{:.6}", d.cosine), ulps]
    });
    let own = stage.columns.as_ref().map(columns);
    let first = stage.columns.as_ref().map(first_values);
    // A bar for each row's error, on the chart's logarithmic scale.
    let n = stage.rows.len().max(1) as f64;
    let bars = stage.rows.iter().zip(&stage.positions).enumerate().map(|(i, (error, position))| {
        let height = (1.0 - y(*error, 0.0) / HEIGHT) * 60.0;
        let hot = *error > stage.tolerance;
        context! {
            x => BARS[0] * i as f64 / n, y => 60.0 - height, width => (BARS[0] / n - 1.0).max(0.5), height => height,
            hot => hot, title => format!("token {position}: {}", short(*error)),
        }
    });
    // More bars than this are thinner than a pixel.
    let bars: Vec<Value> = if stage.rows.len() > 1 && stage.rows.len() <= 512 { bars.collect() } else { Vec::new() };
    context! {
        id => i,
        name => stage.name.as_str(),
        outcome => class(stage.outcome),
        is_first => is_first,
        shape => format!("{} × {}", stage.shape[0], stage.shape[1]),
        tolerance => short(stage.tolerance),
        note => stage.note.as_deref(),
        spread => stage.spread.as_ref().map(|spread| spread.what.as_str()),
        worst => stage.worst.as_ref().map(|p| context! {
            text => format!("token {}{}, {}", p.position, p.token.map(|t| format!(" (id {t})")).unwrap_or_default(), p.what),
            a => value(f64::from(p.a)), b => value(f64::from(p.b)),
        }),
        numbers => numbers,
        columns => own,
        first => first,
        bars => bars,
        histogram => stage.histogram.as_ref().map(histogram),
    }
}

/// The lines of a stage's own numbers: name, A, B, A - B.
fn columns(columns: &[Column; 3]) -> Vec<[String; 4]> {
    let line = |name: &str, of: &dyn Fn(&Column) -> String| {
        let [a, b, delta] = columns;
        [name.to_owned(), of(a), of(b), of(delta)]
    };
    vec![
        line("mean", &|c| value(c.mean)),
        line("std", &|c| value(c.std)),
        line("min", &|c| value(c.min)),
        line("max", &|c| value(c.max)),
        line("NaN", &|c| c.n_nan.to_string()),
        line("infinite", &|c| c.n_inf.to_string()),
    ]
}

/// The first values of A, B and A - B, each side's name before them.
fn first_values(columns: &[Column; 3]) -> Vec<Vec<String>> {
    let line = |(name, column): (&str, &Column)| {
        let values = column.first.iter().map(|v| value(f64::from(*v)));
        [name.to_owned()].into_iter().chain(values).collect()
    };
    ["A", "B", "A − B"].into_iter().zip(columns).filter(|(_, c)| !c.first.is_empty()).map(line).collect()
}

/// Outlines of both sides' counts, on a scale of log(1 + count).
fn histogram(h: &Histogram) -> Value {
    let most = h.a.iter().chain(&h.b).copied().max().unwrap_or_default();
    let top = f64::from(most).ln_1p().max(1e-9);
    let path = |counts: &[u32]| {
        let mut path = format!("M0 {:.0}", BARS[1]);
        for (i, count) in counts.iter().enumerate() {
            let y = BARS[1] - f64::from(*count).ln_1p() / top * (BARS[1] - 4.0);
            let x = |i: usize| BARS[0] * i as f64 / BUCKETS as f64;
            path += &format!("L{:.1} {y:.1}L{:.1} {y:.1}", x(i), x(i + 1));
        }
        path + &format!("L{:.0} {:.0}Z", BARS[0], BARS[1])
    };
    context! { min => value(h.min), max => value(h.max), most => most, a => path(&h.a), b => path(&h.b) }
}

/// Height of an error in the chart, whose top is 10^`top`.
fn y(error: f64, top: f64) -> f64 {
    let log = if error > 0.0 { error.log10() } else { FLOOR };
    (top - log.clamp(FLOOR, top)) / (top - FLOOR) * HEIGHT
}

/// Errors in execution order, on a logarithmic scale.
fn chart(comparison: &Comparison) -> Value {
    let n = comparison.stages.len().max(1) as f64;
    let x = |i: f64| (i + 0.5) / n * WIDTH;
    let largest = comparison.stages.iter().filter_map(error).filter(|e| e.is_finite()).fold(1e-2, f64::max);
    let top = largest.log10().ceil().clamp(0.0, 38.0);
    let dots = comparison.stages.iter().enumerate().filter_map(|(i, stage)| {
        let e = error(stage)?;
        let text = if e == 0.0 { "equal".to_owned() } else { format!("{e:.1e}") };
        Some(context! {
            id => i, x => x(i as f64), y => y(e, top), outcome => class(stage.outcome),
            is_first => comparison.first == Some(i),
            title => format!("{}: {text} (allowed {:.0e})", stage.name, stage.tolerance),
        })
    });
    // Where the layers lie.
    let mut bands: Vec<(Option<usize>, usize, usize)> = Vec::new();
    for (i, stage) in comparison.stages.iter().enumerate() {
        let layer = split_layer(&stage.name).map(|(layer, _)| layer);
        match bands.last_mut() {
            Some((last, _, to)) if *last == layer => *to = i + 1,
            _ => bands.push((layer, i, i + 1)),
        }
    }
    let every = bands.len().div_ceil(28);
    let bands = bands.into_iter().enumerate().map(|(k, (layer, from, to))| {
        let [from, to] = [from, to].map(|i| i as f64 / n * WIDTH);
        let label = layer.filter(|layer| layer.is_multiple_of(every)).map(|layer| layer.to_string());
        context! { x => from, width => to - from, middle => (from + to) / 2.0, odd => k % 2 == 1, label => label }
    });
    let limit = comparison.stages.iter().enumerate().map(|(i, stage)| {
        let [from, to] = [i, i + 1].map(|i| i as f64 / n * WIDTH);
        let y = y(stage.tolerance, top);
        format!("{}{from:.1} {y:.1}L{to:.1} {y:.1}", if i == 0 { "M" } else { "L" })
    });
    let ticks = (FLOOR as i32..=top as i32).filter(|e| e % if top > 6.0 { 6 } else { 3 } == 0).map(|e| {
        context! { y => y(10f64.powi(e), top), label => if e == FLOOR as i32 { format!("≤ 1e{e}") } else if e == 0 { "1".to_owned() } else { format!("1e{e}") } }
    });
    context! {
        width => WIDTH, height => HEIGHT, radius => (WIDTH / n / 2.0).clamp(1.6, 4.0),
        dots => dots.collect::<Vec<_>>(), bands => bands.collect::<Vec<_>>(), limit => limit.collect::<String>(),
        ticks => ticks.collect::<Vec<_>>(),
    }
}

/// Layers by stages, each cell coloured by how its error compares with its tolerance.
fn grid(comparison: &Comparison) -> Value {
    let find = |layer: usize, kind: &str| {
        comparison.stages.iter().position(|stage| split_layer(&stage.name) == Some((layer, kind)))
    };
    let mut layers: Vec<usize> = comparison.stages.iter().filter_map(|s| Some(split_layer(&s.name)?.0)).collect();
    layers.dedup();
    let kinds = LAYER_STAGES.iter().filter(|kind| layers.iter().any(|layer| find(*layer, kind).is_some()));
    let cell = (WIDTH / layers.len().max(1) as f64).clamp(6.0, 34.0);
    let rows = kinds.enumerate().map(|(k, kind)| {
        let cells = layers.iter().enumerate().filter_map(|(l, layer)| {
            let id = find(*layer, kind)?;
            let stage = &comparison.stages[id];
            let heat = match error(stage).map(|error| error / stage.tolerance) {
                None => "none",
                Some(_) if stage.outcome == Outcome::Differs && stage.distance.is_none() => "h6",
                Some(0.0) => "h0",
                Some(..1e-2) => "h1",
                Some(..1e-1) => "h2",
                // Within tolerance, but for a single element.
                Some(..=1.0) if stage.outcome == Outcome::Agrees => "h3",
                Some(..10.0) => "h4",
                Some(..100.0) => "h5",
                Some(_) => "h6",
            };
            let title = format!("{}: {}", stage.name, error(stage).map_or("-".to_owned(), |e| format!("{e:.1e}")));
            Some(context! { id => id, x => l as f64 * cell, heat => heat, title => title })
        });
        context! { y => k as f64 * 20.0, label => *kind, cells => cells.collect::<Vec<_>>() }
    });
    let rows: Vec<Value> = rows.collect();
    let every = if cell < 16.0 { 5 } else { 1 };
    let labels = layers.iter().enumerate().filter(|(_, layer)| layer.is_multiple_of(every)).map(|(l, layer)| {
        context! { x => (l as f64 + 0.5) * cell, label => *layer }
    });
    let labels: Vec<Value> = labels.collect();
    context! { height => rows.len() as f64 * 20.0, cell => cell, rows => rows, labels => labels }
}
