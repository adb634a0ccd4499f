//! Recording a run: every named stage of every step, as values or as statistics, into a [`TraceWriter`].

use super::compare::matches;
use super::file::{Element, StepStats, TraceWriter, split_layer};
use crate::engine::{Session, Want, Watch};
use crate::error::Result;
use crate::ops::STATS_WORDS;
use crate::program::{HostStages, Program, Slice, Stage};
use crate::tokenizer::TokenId;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// The stages of the head, which is computed for the rows whose logits are wanted.
const HEAD: [&str; 2] = ["final_norm", "logits"];

/// What to keep of a run.
#[derive(Clone, Debug, Default)]
pub struct Keep {
    /// Statistics and hashes instead of values.
    pub stats: bool,
    /// Stages whose names match one of these patterns (`*` stands for anything); all if empty.
    pub stages: Vec<String>,
    /// Stages of these layers, and those outside any layer; all if empty.
    pub layers: Vec<RangeInclusive<usize>>,
    /// Rows of these positions; all if empty.
    pub positions: Vec<RangeInclusive<usize>>,
}

/// Whether a list of ranges has a number; an empty list has all.
fn has(ranges: &[RangeInclusive<usize>], number: usize) -> bool {
    ranges.is_empty() || ranges.iter().any(|range| range.contains(&number))
}

impl Keep {
    /// Whether a stage is kept.
    pub fn stage(&self, name: &str) -> bool {
        let layer = split_layer(name).is_none_or(|(layer, _)| has(&self.layers, layer));
        layer && (self.stages.is_empty() || self.stages.iter().any(|pattern| matches(pattern, name)))
    }
}

/// Append `tokens` to a session in steps of its chunk, recording each. Logits are those of every row, or of the last one
/// where statistics are kept (as an untraced run computes them). Gives the last row's logits.
pub fn record(session: &mut Session, tokens: &[TokenId], keep: &Keep, into: &mut TraceWriter) -> Result<Vec<f32>> {
    session.engine().check_context(session.tokens().len() + tokens.len())?;
    let vocab = session.engine().config().vocab_size;
    let chunk = session.chunk();
    let mut logits = Vec::new();
    let count = tokens.len().div_ceil(chunk);
    for (i, piece) in tokens.chunks(chunk).enumerate() {
        let first = session.tokens().len();
        let want = match (keep.stats, i + 1 == count) {
            (false, _) if HEAD.iter().any(|name| keep.stage(name)) => Want::All,
            (_, true) => Want::Last,
            (_, false) => Want::Nothing,
        };
        // A stage of the head comes in several runs of few rows each.
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        let mut see = |stage: &Stage, words: Vec<u32>| {
            let width = if keep.stats { STATS_WORDS } else { stage.width };
            let rows = words.len() / width;
            let done = seen.entry(stage.name.clone()).or_default();
            // The head of a step with statistics has the last row only.
            let start = if keep.stats && rows < piece.len() { first + piece.len() - rows } else { first + *done };
            let positions = start..start + rows;
            *done += rows;
            if keep.stats {
                let rows = words.chunks_exact(width).zip(positions).filter(|(_, p)| has(&keep.positions, *p));
                let kept: Vec<&[u32]> = rows.map(|(row, _)| row).collect();
                if !kept.is_empty() {
                    into.push_stats(&stage.name, &step_stats(&kept, stage.width));
                }
                return Ok(());
            }
            let element = if stage.indices { Element::I32 } else { Element::F32 };
            for (row, position) in words.chunks_exact(stage.width).zip(positions) {
                if has(&keep.positions, position) {
                    into.push(&stage.name, 1, stage.width, element, row);
                }
            }
            Ok(())
        };
        let stage = |name: &str| keep.stage(name);
        logits = session.feed_watching(piece, want, &mut Watch { keep: &stage, stats: keep.stats, see: &mut see })?;
        if !keep.stats {
            let all = first..first + piece.len();
            let kept: Vec<i32> = all.filter(|p| has(&keep.positions, *p)).map(|p| p as i32).collect();
            into.push_positions(&kept);
        }
    }
    let last = logits.len().saturating_sub(vocab);
    Ok(logits.split_off(last))
}

/// The statistics of a whole step from those of its rows.
fn step_stats(rows: &[&[u32]], width: usize) -> StepStats {
    let mut stats = [0.0, 0.0, 0.0, f32::MAX, f32::MIN, 0.0, 0.0, 0.0];
    let (mut sum, mut squares) = (0.0f64, 0.0f64);
    let mut hash = [0u32; 2];
    for row in rows {
        let number = |i: usize| f32::from_bits(row[i]);
        sum += f64::from(number(0));
        squares += f64::from(number(1));
        stats[3] = stats[3].min(number(2));
        stats[4] = stats[4].max(number(3));
        stats[5] += row[4] as f32;
        stats[6] += row[5] as f32;
        hash = [hash[0].wrapping_add(row[6]), hash[1].wrapping_add(row[7])];
    }
    let count = rows.len() * width;
    (stats[0], stats[1], stats[2]) = (count as f32, sum as f32, squares as f32);
    // The reader's order: count, sum, sum of squares, min, max, NaN count, infinity count, 0.
    StepStats { stats, hash: (i64::from(hash[1]) << 32) | i64::from(hash[0]) }
}

/// A program of one launch that writes the statistics of `x [T, width]` to `s [T, 8]`: for tests of the kernel.
#[doc(hidden)]
pub fn stats_program(tokens: u32, x: Slice, width: usize, indices: bool, s: Slice) -> Program {
    let mut p = Program::new(tokens, HostStages::default());
    let stage = Stage { name: "x".to_owned(), after: 0, slice: x, width, indices };
    let launch = p.stats_of(&stage, s);
    p.insert(0, vec![launch]);
    p
}
