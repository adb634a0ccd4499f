//! Where a filter ends, digit by digit, and in the end which of the tokens there stay.

use super::weigh::{whole, words};
use super::{Drawing, Kept, Op, Row, Views};
use crate::program::{Launch, Program};
use crate::sampler::{Rule, share};
use crate::shader::Kernel;

pub(crate) const KERNEL: Kernel =
    Kernel { name: "narrow", source: include_str!("../../shaders/narrow.wgsl"), slots: &[] };

/// Constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Narrow {
    /// Logits of a row.
    pub v: u32,
    /// Spans of the vocabulary with sums of their own.
    pub spans: u32,
    /// The first of the rows.
    pub row: u32,
    /// How many rows.
    pub rows: u32,
    /// The digit is a filter's last.
    pub last: bool,
}

impl Program {
    /// The next digit of `op.rows` rows, from `to.sums`.
    pub(super) fn narrow(&mut self, op: Narrow, to: &Drawing) {
        let launch = Launch::new(Op::Narrow(op), &KERNEL, [op.rows, 1, 1])
            .constant("V", op.v)
            .constant("SPANS", op.spans)
            .constant("ROW", op.row)
            .constant("LAST", op.last)
            .read("logits", to.logits)
            .read("powers", to.powers)
            .read("rules", to.rules)
            .read("rows", to.rows)
            .read("sums", to.sums)
            .update("kept", to.kept);
        self.push(launch);
    }
}

/// The sums of all spans together.
pub(super) fn over_spans(spans: &[[u32; 2]]) -> [u64; 256] {
    let mut sums = [0; 256];
    spans.chunks_exact(256).for_each(|span| sums.iter_mut().zip(span).for_each(|(sum, s)| *sum += whole(*s)));
    sums
}

/// Where a running sum passes `target`, and what is left of it there.
pub(super) fn passes(sums: impl IntoIterator<Item = u64>, mut target: u64) -> Option<(u32, u64)> {
    for (at, sum) in (0..).zip(sums) {
        if sum > target {
            return Some((at, target));
        }
        target -= sum;
    }
    None
}

impl Narrow {
    pub(crate) fn twin(&self, views: &mut Views<'_>) {
        let (v, spans) = (self.v as usize, self.spans as usize);
        let (logits, rules): (_, &[Rule]) = (views.f32("logits"), bytemuck::cast_slice(views.words("rules")));
        let rows: &[Row] = bytemuck::cast_slice(views.words("rows"));
        let sums: &[[u32; 2]] = bytemuck::cast_slice(views.words("sums"));
        let kept: &mut [Kept] = bytemuck::cast_slice_mut(views.words_mut("kept"));
        for (sums, t) in sums.chunks_exact(spans * 256).zip(self.row as usize..).take(self.rows as usize) {
            let rule = &rules[rows[t].sequence as usize];
            kept[t] = match kept[t].stage {
                Kept::WEIGHS.. => Kept { stage: Kept::DONE, ..kept[t] },
                _ => self.reference(rule, &kept[t], &logits[t * v..][..v], sums),
            };
        }
    }

    /// What is known of a row after its sums over all spans.
    pub fn reference(&self, rule: &Rule, kept: &Kept, logits: &[f32], spans: &[[u32; 2]]) -> Kept {
        let sums = over_spans(spans);
        let target = if kept.stage == 3 { share(rule.top_p, sums.iter().sum()) } else { whole(kept.wanted) };
        let found = passes(sums, target);
        let digits = |at| kept.digits << 8 | at;
        if !self.last {
            let (digits, target) = found.map_or((kept.digits, target), |(at, left)| (digits(at), left));
            return Kept { stage: kept.stage + 1, digits, wanted: words(target), ..*kept };
        }
        let stage = if kept.stage == 2 && rule.top_p != Rule::ALL { 3 } else { Kept::WEIGHS };
        let mut after = Kept { stage, digits: 0, wanted: words(target), ..*kept };
        if let Some((at, left)) = found {
            let of_place = |(&logit, id): (&f32, u32)| match kept.counts(rule, logit, id) {
                (count, steps) if steps == digits(at) => u64::from(count),
                _ => 0,
            };
            let (id, _) = passes(logits.iter().zip(0..).map(of_place), left).expect("the sum counts these tokens");
            (after.below, after.id) = (digits(at), id);
        }
        after
    }
}
