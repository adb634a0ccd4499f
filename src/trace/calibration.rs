//! Inputs of products against what calibration saw: how a run's `amax / 2688` compares with the checkpoint's `input_scale`.
//!
//! Calibration saw inputs up to `2688 x input_scale`. Rows a little larger are normal; rows several times larger say that
//! something before the product is wrong, such as a norm without its gain. The scales lie in the trace's metadata under
//! [`KEY`], so that the file alone is enough to compute this.

use std::collections::BTreeMap;

use super::file::{TraceFile, Values, split_layer};
use crate::checkpoint::json;
use crate::error::{Error, Result};
use crate::format::nvfp4;
use crate::model::InputScale;

/// What the scales are called in a trace's metadata: a JSON object of a list for each stage, which holds one scale, or one
/// for each expert (null: none). Where linears that share an input have several, the least counts.
pub const KEY: &str = "input_scales";
/// Above this ratio the run has another input than calibration had.
pub const SUSPICIOUS: f32 = 2.0;

/// A stage's scales, by expert or one for all.
type Scales = Vec<Option<f32>>;

/// One stage of a run against its calibration.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// `layers.3.mlp_norm`.
    pub stage: String,
    /// The largest magnitude in the rows of the trace; NaN where one of them is no number.
    pub amax: f32,
    /// Which scale `ratio` goes by.
    pub scale_of: ScaleOf,
    /// That scale.
    pub input_scale: f32,
    /// The largest `amax / 2688 / input_scale` of a row, or of what may be more ([`Measured::is_lower_bound`]); NaN where a
    /// row is no number.
    pub ratio: f32,
    /// How many blocks were clipped while they were quantised, of how many. `None`: f32 rows, or a trace of statistics.
    pub clipped: Option<(u64, u64)>,
}

/// Which scale a ratio goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleOf {
    /// The stage has one.
    Stage,
    /// That of the expert that the row was routed to.
    Expert(usize),
    /// The largest of so many experts': the trace does not say where rows went, and the ratio is a lower bound.
    LargestOf(usize),
}

impl Measured {
    /// The largest magnitude that calibration saw.
    pub fn amax_calibrated(&self) -> f32 {
        nvfp4::MAX * self.input_scale
    }

    /// Whether the ratio may be larger than `ratio`, because it is not known which expert's scale belongs to which row.
    pub fn is_lower_bound(&self) -> bool {
        matches!(self.scale_of, ScaleOf::LargestOf(_))
    }

    /// Whether the input is none that calibration can have seen.
    pub fn is_suspicious(&self) -> bool {
        self.ratio.is_nan() || self.ratio > SUSPICIOUS
    }
}

/// The scales of a checkpoint as the metadata have them.
pub fn to_json(found: &[InputScale]) -> String {
    let mut stages: BTreeMap<&str, Scales> = BTreeMap::new();
    for one in found {
        let scales = stages.entry(&one.stage).or_default();
        let at = expert(&one.module).unwrap_or(0);
        scales.resize(scales.len().max(at + 1), None);
        scales[at] = Some(scales[at].map_or(one.scale, |other| other.min(one.scale)));
    }
    for scales in stages.values_mut().filter(|scales| scales.iter().all(|scale| *scale == scales[0])) {
        scales.truncate(1);
    }
    serde_json::to_string(&stages).expect("names and numbers")
}

/// The expert in `model.layers.0.mlp.experts.3.down_proj`.
fn expert(module: &str) -> Option<usize> {
    module.split_once(".experts.")?.1.split('.').next()?.parse().ok()
}

/// Every stage of a trace that has calibrated scales, in the order of execution. Empty where the metadata have none.
///
/// # Errors
/// If the metadata are no scales, if a tensor cannot be read, or if a row of `mlp.up` is not as many parts as experts.
pub fn measure(trace: &TraceFile) -> Result<Vec<Measured>> {
    let Some(text) = trace.metadata(KEY) else { return Ok(Vec::new()) };
    let all: BTreeMap<String, Scales> = serde_json::from_str(text).map_err(|e| {
        Error::file(trace.path().display().to_string(), format!("metadata `{KEY}` should be lists of scales: {e}"))
    })?;
    let stages = trace.stages().iter().filter_map(|stage| Some((stage, all.get(stage)?)));
    // The staged ones, and statistics without values, are beside; what has no scale says nothing.
    stages.filter_map(|(stage, scales)| measure_stage(trace, stage, scales).transpose()).collect()
}

fn measure_stage(trace: &TraceFile, stage: &str, scales: &Scales) -> Result<Option<Measured>> {
    // An input goes to some of the experts. Against the largest scale no healthy model is suspicious; against a lesser
    // one, of an expert that the input may not have gone to, many would be.
    let of = if scales.len() == 1 { ScaleOf::Stage } else { ScaleOf::LargestOf(scales.len()) };
    let largest = scales.iter().flatten().copied().max_by(f32::total_cmp);
    let Some(largest) = largest.filter(|scale| *scale > 0.0) else { return Ok(None) };
    let measured = |amax: f32, scale_of, input_scale: f32| Measured {
        stage: stage.to_owned(),
        amax,
        scale_of,
        input_scale,
        ratio: amax / nvfp4::MAX / input_scale,
        clipped: None,
    };
    if !trace.has_values(stage) {
        let steps = trace.stats(stage)?;
        let step = |[_, _, _, least, most, nan, inf, _]: [f32; 8]| match nan + inf > 0.0 {
            true => f32::NAN,
            false => least.abs().max(most.abs()),
        };
        let amax = steps.iter().map(|s| step(s.stats)).max_by(f32::total_cmp);
        return Ok(amax.map(|amax| measured(amax, of, largest)));
    }
    let values = trace.tensor(stage)?;
    let Values::F32(numbers) = &values.values else { return Ok(None) };
    let routes = if scales.len() > 1 { routes(trace, stage, values.rows)? } else { None };
    // A row holds one input of each of a token's experts, or one that they share.
    let a = routes.as_ref().map_or(1, |(_, a)| *a);
    let parts = if stage.ends_with(".mlp.up") { a } else { 1 };
    if values.width == 0 || parts == 0 || !values.width.is_multiple_of(parts) {
        let reason = format!("has rows of {} numbers, which are not whole parts for {parts} experts", values.width);
        return Err(Error::tensor(trace.path().display().to_string(), json::name(stage), reason));
    }
    let mut worst: Option<Measured> = None;
    let mut amax_of_all = 0f32;
    for (row, numbers) in numbers.chunks_exact(values.width).enumerate() {
        for (slot, part) in numbers.chunks_exact(values.width / parts).enumerate() {
            let finite = part.iter().all(|v| v.is_finite());
            let amax = if finite { part.iter().map(|v| v.abs()).fold(0.0, f32::max) } else { f32::NAN };
            amax_of_all = [amax_of_all, amax].into_iter().max_by(f32::total_cmp).unwrap_or(amax);
            let own = |expert: i32| {
                let expert = usize::try_from(expert).ok()?;
                Some(measured(amax, ScaleOf::Expert(expert), (*scales.get(expert)?)?))
            };
            let found = match &routes {
                None => Some(measured(amax, of, largest)),
                Some((experts, a)) => {
                    let slots = &experts[row * a..][..*a];
                    let slots = if parts > 1 { &slots[slot..=slot] } else { slots };
                    slots.iter().filter_map(|e| own(*e)).max_by(|x, y| x.ratio.total_cmp(&y.ratio))
                }
            };
            if let Some(found) = found.filter(|f| worst.as_ref().is_none_or(|w| w.ratio.total_cmp(&f.ratio).is_lt())) {
                worst = Some(found);
            }
        }
    }
    let clipped = clipped(trace, stage, values.width)?;
    Ok(worst.map(|worst| Measured { amax: amax_of_all, clipped, ..worst }))
}

/// The experts of each row, and how many there are a row, where the trace has them for these rows.
fn routes(trace: &TraceFile, stage: &str, rows: usize) -> Result<Option<(Vec<i32>, usize)>> {
    let name = split_layer(stage).map(|(layer, _)| format!("layers.{layer}.mlp.router.experts"));
    let Some(name) = name.filter(|name| trace.has_values(name)) else { return Ok(None) };
    let experts = trace.tensor(&name)?;
    match experts.values {
        Values::I32(list) if experts.rows == rows => Ok(Some((list, experts.width))),
        _ => Ok(None),
    }
}

/// Clipped blocks and all blocks of a stage's rows, from `STAGE.staged`: pairs of amax and clipped blocks.
fn clipped(trace: &TraceFile, stage: &str, width: usize) -> Result<Option<(u64, u64)>> {
    let name = format!("{stage}.staged");
    let mut sum: Option<(u64, u64)> = None;
    let again = format!("{name}.");
    let staged = trace.stages().iter().filter(|other| **other == name || other.starts_with(&again));
    for name in staged.filter(|name| trace.has_values(name)) {
        let report = trace.tensor(name)?;
        let Values::F32(pairs) = &report.values else { continue };
        // Before the second matrix each route has a row of its own; before the first, they share the input's width.
        let k = if stage.ends_with(".mlp.up") { width / (report.width / 2).max(1) } else { width };
        let clipped: f64 = pairs.as_chunks::<2>().0.iter().map(|[_, clipped]| f64::from(*clipped)).sum();
        let blocks = (pairs.len() / 2 * (k / nvfp4::BLOCK)) as u64;
        let (so_far, of) = sum.unwrap_or_default();
        sum = Some((so_far.saturating_add(clipped as u64), of.saturating_add(blocks)));
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_become_one_a_stage_or_one_an_expert() {
        let one = |stage: &str, module: &str, scale| InputScale { stage: stage.into(), module: module.into(), scale };
        let found = [
            one("layers.0.attn_norm", "model.layers.0.self_attn.q_proj", 0.5),
            one("layers.0.attn_norm", "model.layers.0.self_attn.k_proj", 0.25),
            one("layers.0.mlp_norm", "model.layers.0.mlp.experts.0.gate_proj", 2.0),
            one("layers.0.mlp_norm", "model.layers.0.mlp.experts.1.gate_proj", 2.0),
            one("layers.0.mlp.up", "model.layers.0.mlp.experts.0.down_proj", 1.0),
            one("layers.0.mlp.up", "model.layers.0.mlp.experts.2.down_proj", 3.0),
        ];
        let json = r#"{"layers.0.attn_norm":[0.25],"layers.0.mlp.up":[1.0,null,3.0],"layers.0.mlp_norm":[2.0]}"#;
        assert_eq!(to_json(&found), json);
        assert_eq!(to_json(&[]), "{}");
    }
}
