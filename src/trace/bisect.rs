//! Which stage is wrong by itself: two executions of one checkpoint, stage by stage.
//!
//! A wrong stage makes every later one look wrong (the **cumulative** error). So a second session of the execution under
//! test runs in step with the reference, and after every stage gets the reference's own buffers: what is then off is the
//! error of that stage alone (the **local** error).

use super::compare::{ELEMENT_FACTOR, measure};
use super::file::{TraceFile, Values, stage_order};
use crate::device::Device;
use crate::engine::{Session, Want, Watch};
use crate::error::{Error, Result};
use crate::program::{Program, Slice, Stage};
use crate::tokenizer::TokenId;
use std::collections::{BTreeMap, BTreeSet};

/// What the execution under test is held to.
pub enum Reference<'r> {
    /// Another session of the same model, with equal context and chunk: another device of equal limits (the twins take any:
    /// [`crate::device::cpu::Cpu::with_limits`]), another placement.
    Session(&'r mut Session),
    /// A trace from anywhere. Stages that it lacks are not judged; their errors show in the next one that it has.
    Trace(&'r TraceFile),
}

/// How far one stage is off.
#[derive(Clone, Debug, PartialEq)]
pub struct StageError {
    /// The stage.
    pub name: String,
    /// Error of this stage alone, on the reference's own inputs. Of numbers: the relative L2 of the worst row, or a tenth
    /// of the worst element's error against its row's root mean square, whichever is larger (a wrong weight moves one
    /// element of thousands). Of indices: the share of rows that hold other ones.
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
    reference: Reference<'_>,
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
    if let Reference::Session(session) = &reference {
        comparable(&held, session)?;
    }
    let mut reference = match reference {
        Reference::Session(session) => {
            session.clear();
            Side::Session(session)
        }
        Reference::Trace(trace) => Side::Trace(Outside { trace, head: BTreeMap::new() }),
    };
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
        let reference_program = reference.session(|session| session.begin(piece))?;
        lockstep(&held, &under_test, &mut reference, reference_program.as_ref(), first, &mut found)?;
        let rows: Vec<u32> = (0..piece.len() as u32).collect();
        let most = match &reference {
            Side::Session(session) => held.max_picks().min(session.max_picks()),
            Side::Trace(_) => held.max_picks(),
        };
        for picks in rows.chunks(most) {
            let under_test = held.begin_head(picks)?;
            let reference_program = reference.session(|session| session.begin_head(picks))?;
            let first = first + picks[0] as usize;
            lockstep(&held, &under_test, &mut reference, reference_program.as_ref(), first, &mut found)?;
        }
        held.end(piece);
        reference.session(|session| {
            session.end(piece);
            Ok(())
        })?;
    }
    Ok(found.judge(&cumulative))
}

/// Both record the same launches over buffers of the same sizes, or one cannot be given the other's.
fn comparable(held: &Session, reference: &Session) -> Result<()> {
    let (ours, theirs) = (held.engine(), reference.engine());
    for (option, ours, theirs) in
        [("context", ours.context(), theirs.context()), ("chunk", ours.chunk(), theirs.chunk())]
    {
        if ours != theirs {
            let reason = format!("the one under test has {ours}, the reference {theirs}: give both the same");
            return Err(Error::option(option, reason));
        }
    }
    if held.device().limits().matrix != reference.device().limits().matrix {
        let reason = "a prompt takes matrix units on one side only: open both devices with them or without";
        return Err(Error::option("no-matrix-units", reason));
    }
    let bytes = |session: &Session| session.state_slices().iter().map(|slice| slice.bytes).collect::<Vec<_>>();
    if bytes(held) != bytes(reference) {
        let reason = "the devices bind so much more or less that a layer's cache lies in other parts on each: give both the \
                      same limit, or a shorter context";
        return Err(Error::option("max-binding-bytes", reason));
    }
    Ok(())
}

/// The reference while it runs.
enum Side<'r> {
    Session(&'r mut Session),
    Trace(Outside<'r>),
}

impl Side<'_> {
    /// Do something with the session, if it is one.
    fn session<T>(&mut self, with: impl FnOnce(&mut Session) -> Result<T>) -> Result<Option<T>> {
        match self {
            Side::Session(session) => with(session).map(Some),
            Side::Trace(_) => Ok(None),
        }
    }
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
    positions: Vec<usize>,
    local: Vec<u32>,
    reference: Vec<u32>,
}

impl Found {
    /// Add one row of a stage.
    fn add(&mut self, stage: &Stage, position: usize, local: &[u32], reference: &[u32]) {
        if !self.stages.contains_key(&stage.name) {
            self.order.push(stage.name.clone());
        }
        let rows = self.stages.entry(stage.name.clone()).or_default();
        (rows.width, rows.indices) = (stage.width, stage.indices);
        rows.positions.push(position);
        rows.local.extend(local);
        rows.reference.extend(reference);
    }

    fn judge(self, cumulative: &BTreeMap<String, Vec<u32>>) -> Vec<StageError> {
        let judge = |name: &String| {
            let rows = &self.stages[name];
            let row = |position: &usize| &cumulative[name][position * rows.width..][..rows.width];
            let seen: Vec<u32> = rows.positions.iter().flat_map(row).copied().collect();
            let (local, worst) = error(&rows.local, &rows.reference, rows);
            let (cumulative, _) = error(&seen, &rows.reference, rows);
            let worst = (rows.positions[worst / rows.width], worst % rows.width);
            StageError { name: name.clone(), local, cumulative, worst }
        };
        self.order.iter().map(judge).collect()
    }
}

/// The error of `got`, and the index of its worst element.
fn error(got: &[u32], want: &[u32], rows: &Rows) -> (f64, usize) {
    if rows.indices {
        // A row is a set: the order in it carries no value.
        let sorted = |row: &[u32]| {
            let mut row = row.to_vec();
            row.sort_unstable();
            row
        };
        let pairs = || got.chunks_exact(rows.width).zip(want.chunks_exact(rows.width));
        let wrong = pairs().filter(|(g, w)| sorted(g) != sorted(w)).count();
        let first = pairs().position(|(g, w)| sorted(g) != sorted(w)).unwrap_or(0);
        return (wrong as f64 / rows.positions.len() as f64, first * rows.width);
    }
    let floats = |words: &[u32]| words.iter().map(|w| f32::from_bits(*w)).collect::<Vec<_>>();
    let measured = measure(&floats(got), &floats(want), rows.width);
    let (row, element) = (measured.distance.worst_row, measured.distance.worst_element / ELEMENT_FACTOR);
    // NaN is no small error.
    let error = if row.is_nan() || element.is_nan() { f64::INFINITY } else { row.max(element) };
    (error, measured.worst)
}

/// A trace, with the stages of the head kept: they come in many pieces of few rows.
struct Outside<'t> {
    trace: &'t TraceFile,
    head: BTreeMap<String, Option<Known>>,
}

/// Rows of a stage that a trace has.
#[derive(Clone)]
struct Known {
    by_position: BTreeMap<usize, usize>,
    words: Vec<u32>,
}

impl Outside<'_> {
    /// What the trace has of a stage; `None`: nothing.
    fn stage(&mut self, stage: &Stage) -> Result<Option<Known>> {
        let is_head = stage_order(&stage.name).0 == 2;
        if let Some(known) = self.head.get(&stage.name) {
            return Ok(known.clone());
        }
        let known = self.read(stage)?;
        if is_head {
            self.head.insert(stage.name.clone(), known.clone());
        }
        Ok(known)
    }

    fn read(&self, stage: &Stage) -> Result<Option<Known>> {
        if !self.trace.has_values(&stage.name) {
            return Ok(None);
        }
        let have = self.trace.tensor(&stage.name)?;
        let fault = |reason| Error::tensor(self.trace.path().display().to_string(), &stage.name, reason);
        if have.width != stage.width {
            return Err(fault(format!("has rows of {}, but this model's have {}", have.width, stage.width)));
        }
        let words: Vec<u32> = match &have.values {
            Values::F32(values) if !stage.indices => values.iter().map(|v| v.to_bits()).collect(),
            Values::I32(values) if stage.indices => values.iter().map(|v| *v as u32).collect(),
            Values::F32(_) => return Err(fault("holds numbers, but should hold expert indices (I32)".to_owned())),
            Values::I32(_) => return Err(fault("holds whole numbers, but should hold F32".to_owned())),
        };
        let (positions, _) = self.trace.positions(&stage.name, have.rows)?;
        let by_position = positions.into_iter().enumerate().map(|(row, position)| (position, row)).collect();
        Ok(Some(Known { by_position, words }))
    }
}

/// Run two programs stage by stage, the one under test always from the reference's buffers.
fn lockstep(
    held: &Session,
    under_test: &Program,
    reference: &mut Side<'_>,
    reference_program: Option<&Program>,
    first: usize,
    found: &mut Found,
) -> Result<()> {
    let reference_parts = reference_program.map(Program::split_at_stages);
    // Written to the execution under test before its next launch: stages of one launch are judged together.
    let mut corrections: Vec<(Slice, Vec<u32>)> = Vec::new();
    // Buffers that the last part wrote and no stage has shown, by their place in the state.
    let mut unseen: BTreeSet<usize> = BTreeSet::new();
    for (i, (part, stage)) in under_test.split_at_stages().into_iter().enumerate() {
        let device = held.device();
        if !part.launches.is_empty() {
            for (slice, words) in corrections.drain(..) {
                device.write(slice, bytemuck::cast_slice(&words))?;
            }
        }
        device.run(&part)?;
        match (&mut *reference, &reference_parts) {
            (Side::Session(session), Some(parts)) => {
                let (reference_part, reference_stage) = &parts[i];
                session.device().run(reference_part)?;
                let mut off = false;
                if let (Some(stage), Some(other)) = (stage, reference_stage) {
                    assert_eq!(stage.name, other.name, "both executions have the same stages");
                    let (local, want) = (read(device, stage.slice)?, read(session.device(), other.slice)?);
                    off = is_off(stage, &local, &want);
                    let rows = local.chunks_exact(stage.width).zip(want.chunks_exact(stage.width));
                    for (row, (local, want)) in rows.enumerate() {
                        found.add(stage, first + row, local, want);
                    }
                }
                // What either part wrote becomes what the reference wrote: at once where the stage shows it, or where the
                // fault has a name already. What no stage shows (rows that were quantised, of which the stage is a report)
                // stays for one more, so that the stage made of it is judged with it.
                let written = |part: &Program, slices: &[Slice]| -> BTreeSet<usize> {
                    let args = part.launches.iter().flat_map(|l| &l.args);
                    let written = args.filter(|a| crate::ops::is_written(a.access));
                    written.filter_map(|a| slices.iter().position(|s| s.buffer == a.slice.buffer)).collect()
                };
                let (ours, theirs) = (held.state_slices(), session.state_slices());
                let wrote = &written(&part, &ours) | &written(reference_part, &theirs);
                let shown = |at: &usize| stage.is_none_or(|stage| ours[*at].buffer == stage.slice.buffer);
                let (now, later): (BTreeSet<usize>, BTreeSet<usize>) = wrote.iter().partition(|at| off || shown(at));
                for at in &now | &(&unseen - &later) {
                    corrections.push((ours[at], read(session.device(), theirs[at])?));
                }
                unseen = later;
            }
            (Side::Trace(outside), _) => {
                let Some(stage) = stage else { continue };
                let Some(known) = outside.stage(stage)? else { continue };
                let local = read(device, stage.slice)?;
                let row_bytes = stage.width as u64 * 4;
                for (row, local) in local.chunks_exact(stage.width).enumerate() {
                    let Some(theirs) = known.by_position.get(&(first + row)) else { continue };
                    let want = &known.words[theirs * stage.width..][..stage.width];
                    found.add(stage, first + row, local, want);
                    let offset = stage.slice.offset + row as u64 * row_bytes;
                    corrections.push((Slice { offset, bytes: row_bytes, ..stage.slice }, want.to_vec()));
                }
            }
            (Side::Session(_), None) => unreachable!("a session has a program"),
        }
    }
    for (slice, words) in corrections {
        held.device().write(slice, bytemuck::cast_slice(&words))?;
    }
    Ok(())
}

/// Whether these rows of a stage are further off than rounding.
fn is_off(stage: &Stage, local: &[u32], want: &[u32]) -> bool {
    let positions = (0..local.len() / stage.width).collect();
    let rows = Rows { width: stage.width, indices: stage.indices, positions, ..Rows::default() };
    error(local, want, &rows).0 > TOLERANCE
}

fn read(device: &dyn Device, slice: Slice) -> Result<Vec<u32>> {
    let mut words = vec![0u32; (slice.bytes / 4) as usize];
    device.read(slice, bytemuck::cast_slice_mut(&mut words))?;
    Ok(words)
}
