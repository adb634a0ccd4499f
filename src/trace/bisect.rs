//! Which stage is wrong by itself: two executions of one checkpoint, stage by stage.
//!
//! A wrong stage makes every later one look wrong (the **cumulative** error). So a second session of the execution under
//! test runs in step with the reference, and after every stage gets the reference's own buffers: what is then off is the
//! error of that stage alone (the **local** error).

use super::file::{TraceFile, Values};
use crate::device::Device;
use crate::engine::{Session, Want, Watch};
use crate::error::{Error, Result};
use crate::program::{Program, Slice, Stage};
use crate::tokenizer::TokenId;
use std::collections::{BTreeMap, BTreeSet};

/// What the execution under test is held to.
pub enum Reference<'r> {
    /// Another session of the same model: other device, other placement.
    Session(&'r mut Session),
    /// A trace from anywhere. Stages that it lacks are not judged; their errors show in the next one that it has.
    Trace(&'r TraceFile),
}

/// How far one stage is off.
#[derive(Clone, Debug, PartialEq)]
pub struct StageError {
    /// The stage.
    pub name: String,
    /// Error of this stage alone, on the reference's own inputs: relative L2; for indices, the share that differs.
    pub local: f64,
    /// Error of everything up to here.
    pub cumulative: f64,
    /// Position and element of the largest local error.
    pub worst: (usize, usize),
}

/// Errors above this are no rounding: twins and kernels differ by 1e-5 at most on the goldens.
pub const TOLERANCE: f64 = 1e-4;

/// Run `tokens` on the execution under test (`new_session` makes its sessions) and on the reference. Gives every stage in
/// order of execution; the first whose local error passes the tolerance is the one that is wrong by itself.
pub fn bisect(
    new_session: impl Fn() -> Result<Session>,
    mut reference: Reference<'_>,
    tokens: &[TokenId],
) -> Result<Vec<StageError>> {
    if let Reference::Trace(trace) = &reference
        && let Some(theirs) = trace.tokens()
        && let Some(at) = tokens.iter().zip(theirs).position(|(a, b)| a != b)
    {
        let reason =
            format!("is of other tokens: at position {at} it has {}, and {} is to run", theirs[at], tokens[at]);
        return Err(Error::file(trace.path().display().to_string(), reason));
    }
    let mut free = new_session()?;
    let mut held = new_session()?;
    let mut cumulative: BTreeMap<String, Vec<u32>> = BTreeMap::new();
    let mut collect = |stage: &Stage, words: Vec<u32>| {
        cumulative.entry(stage.name.clone()).or_default().extend(words);
        Ok(())
    };
    free.feed_watching(tokens, Want::All, &mut Watch { keep: &|_| true, stats: false, see: &mut collect })?;
    let mut found = Found::default();
    for piece in tokens.chunks(held.chunk()) {
        let first = held.tokens().len();
        let under_test = held.begin(piece)?;
        let reference_program = match &mut reference {
            Reference::Session(session) => Some(session.begin(piece)?),
            Reference::Trace(_) => None,
        };
        lockstep(&held, &under_test, &mut reference, reference_program.as_ref(), first, &mut found)?;
        let rows: Vec<u32> = (0..piece.len() as u32).collect();
        let most = match &reference {
            Reference::Session(session) => held.max_picks().min(session.max_picks()),
            Reference::Trace(_) => held.max_picks(),
        };
        for picks in rows.chunks(most) {
            let under_test = held.begin_head(picks)?;
            let reference_program = match &mut reference {
                Reference::Session(session) => Some(session.begin_head(picks)?),
                Reference::Trace(_) => None,
            };
            let first = first + picks[0] as usize;
            lockstep(&held, &under_test, &mut reference, reference_program.as_ref(), first, &mut found)?;
        }
        held.end(piece);
        if let Reference::Session(session) = &mut reference {
            session.end(piece);
        }
    }
    found.judge(&cumulative)
}

/// What was found so far, by stage in order of execution.
#[derive(Default)]
struct Found {
    order: Vec<String>,
    stages: BTreeMap<String, Rows>,
}

#[derive(Default)]
struct Rows {
    width: usize,
    indices: bool,
    local: Vec<u32>,
    reference: Vec<u32>,
}

impl Found {
    fn add(&mut self, stage: &Stage, local: Vec<u32>, reference: Vec<u32>) {
        if !self.stages.contains_key(&stage.name) {
            self.order.push(stage.name.clone());
        }
        let rows = self.stages.entry(stage.name.clone()).or_default();
        (rows.width, rows.indices) = (stage.width, stage.indices);
        rows.local.extend(local);
        rows.reference.extend(reference);
    }

    fn judge(self, cumulative: &BTreeMap<String, Vec<u32>>) -> Result<Vec<StageError>> {
        let judge = |name: &String| {
            let rows = &self.stages[name];
            let seen = cumulative.get(name).filter(|seen| seen.len() == rows.reference.len());
            let seen = seen.ok_or_else(|| Error::file(name.as_str(), "the reference has another number of rows"))?;
            let (local, worst) = distance(&rows.local, &rows.reference, rows.indices);
            let (cumulative, _) = distance(seen, &rows.reference, rows.indices);
            let worst = (worst / rows.width, worst % rows.width);
            Ok(StageError { name: name.clone(), local, cumulative, worst })
        };
        self.order.iter().map(judge).collect()
    }
}

/// Relative L2 (for indices: share that differs) and the place of the largest difference. NaN on one side is infinitely
/// far, on both sides no difference.
fn distance(got: &[u32], want: &[u32], indices: bool) -> (f64, usize) {
    if indices {
        let wrong = got.iter().zip(want).filter(|(g, w)| g != w).count();
        let first = got.iter().zip(want).position(|(g, w)| g != w).unwrap_or(0);
        return (wrong as f64 / got.len().max(1) as f64, first);
    }
    let (mut difference, mut norm, mut most, mut worst) = (0.0f64, 0.0f64, -1.0f64, 0);
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let (g, w) = (f64::from(f32::from_bits(*g)), f64::from(f32::from_bits(*w)));
        let apart = if g == w || (g.is_nan() && w.is_nan()) { 0.0 } else { (g - w).abs() };
        let apart = if apart.is_nan() { f64::INFINITY } else { apart };
        difference += apart * apart;
        norm += if w.is_finite() { w * w } else { 0.0 };
        if apart > most {
            (most, worst) = (apart, i);
        }
    }
    (if difference == 0.0 { 0.0 } else { (difference / norm).sqrt() }, worst)
}

/// Run two programs stage by stage, the one under test always from the reference's buffers.
fn lockstep(
    held: &Session,
    under_test: &Program,
    reference: &mut Reference<'_>,
    reference_program: Option<&Program>,
    first: usize,
    found: &mut Found,
) -> Result<()> {
    let reference_parts = reference_program.map(Program::split_at_stages);
    // Written to the execution under test before its next launch: stages of one launch are judged together.
    let mut corrections: Vec<(Slice, Vec<u32>)> = Vec::new();
    for (i, (part, stage)) in under_test.split_at_stages().into_iter().enumerate() {
        let device = held.device();
        if !part.launches.is_empty() {
            for (slice, words) in corrections.drain(..) {
                device.write(slice, bytemuck::cast_slice(&words))?;
            }
        }
        device.run(&part)?;
        match (&mut *reference, &reference_parts) {
            (Reference::Session(session), Some(parts)) => {
                let (reference_part, reference_stage) = &parts[i];
                session.device().run(reference_part)?;
                if let (Some(stage), Some(other)) = (stage, reference_stage) {
                    assert_eq!(stage.name, other.name, "both executions have the same stages");
                    let (local, want) = (read(device, stage.slice)?, read(session.device(), other.slice)?);
                    found.add(stage, local, want);
                }
                // What either part wrote becomes what the reference wrote.
                let written = |part: &Program, slices: &[Slice]| -> BTreeSet<usize> {
                    let args = part.launches.iter().flat_map(|l| &l.args);
                    let written = args.filter(|a| crate::ops::is_written(a.access));
                    written.filter_map(|a| slices.iter().position(|s| s.buffer == a.slice.buffer)).collect()
                };
                let (ours, theirs) = (held.state_slices(), session.state_slices());
                for at in written(&part, &ours).union(&written(reference_part, &theirs)) {
                    corrections.push((ours[*at], read(session.device(), theirs[*at])?));
                }
            }
            (Reference::Trace(trace), _) => {
                let Some(stage) = stage else { continue };
                let rows = (stage.slice.bytes / 4) as usize / stage.width;
                let Some(want) = rows_of(trace, stage, first, rows)? else { continue };
                found.add(stage, read(device, stage.slice)?, want.clone());
                corrections.push((stage.slice, want));
            }
            (Reference::Session(_), None) => unreachable!("a session has a program"),
        }
    }
    for (slice, words) in corrections {
        held.device().write(slice, bytemuck::cast_slice(&words))?;
    }
    Ok(())
}

fn read(device: &dyn Device, slice: Slice) -> Result<Vec<u32>> {
    let mut words = vec![0u32; (slice.bytes / 4) as usize];
    device.read(slice, bytemuck::cast_slice_mut(&mut words))?;
    Ok(words)
}

/// Rows `first..first + rows` of a stage, if the trace has all of them.
fn rows_of(trace: &TraceFile, stage: &Stage, first: usize, rows: usize) -> Result<Option<Vec<u32>>> {
    if !trace.has_values(&stage.name) {
        return Ok(None);
    }
    let have = trace.tensor(&stage.name)?;
    if have.width != stage.width {
        let file = trace.path().display().to_string();
        let reason = format!("has rows of {}, but this model's have {}", have.width, stage.width);
        return Err(Error::tensor(file, &stage.name, reason));
    }
    let (positions, _) = trace.positions(&stage.name, have.rows)?;
    let words: Vec<u32> = match &have.values {
        Values::F32(values) => values.iter().map(|v| v.to_bits()).collect(),
        Values::I32(values) => values.iter().map(|v| *v as u32).collect(),
    };
    let mut wanted = Vec::new();
    for position in first..first + rows {
        let Some(row) = positions.iter().position(|p| *p == position) else { return Ok(None) };
        wanted.extend_from_slice(&words[row * stage.width..][..stage.width]);
    }
    Ok(Some(wanted))
}
