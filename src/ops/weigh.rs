//! What the tokens of each span of the vocabulary count, by the digits of how far they lie below the likeliest one: the sums that a
//! filter's end, or the token that is drawn, is found by.

use super::argmax::largest;
use super::{Drawing, Op, PARTS, Peak, Row, Views};
use crate::program::{Launch, Program};
use crate::sampler::{FAR, Rule, below, weight};
use crate::shader::Kernel;

pub(crate) const KERNEL: Kernel =
    Kernel { name: "weigh", source: include_str!("../../shaders/weigh.wgsl"), slots: &[] };

/// Constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weigh {
    /// Logits of a row.
    pub v: u32,
    /// Spans of the vocabulary with sums of their own.
    pub spans: u32,
    /// The first of the rows.
    pub row: u32,
    /// How many rows.
    pub rows: u32,
    /// Nothing is known of the rows yet.
    pub first: bool,
}

/// What is known of a row while its token is drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Kept {
    /// The largest logit.
    pub largest: f32,
    /// What comes next: the digits of top-k's end, 0 to 2; of top-p's, 3 to 5; the weights to draw by; nothing.
    pub stage: u32,
    /// Tokens are kept that lie fewer steps below the likeliest, or as many,
    pub below: u32,
    /// and have an id up to this.
    pub id: u32,
    /// The digits found so far of the place that is sought.
    pub digits: u32,
    /// Nothing.
    pub pad: u32,
    /// What the running sum over the tokens with these digits passes there: low and high word.
    pub wanted: [u32; 2],
}

impl Kept {
    /// The weights to draw by come next.
    pub(crate) const WEIGHS: u32 = 6;
    /// Nothing comes next.
    pub(crate) const DONE: u32 = 7;

    /// Of a row with this largest logit.
    pub(crate) fn new(rule: &Rule, largest: f32) -> Self {
        let stage = match rule {
            Rule { sharp: 0.0, .. } => Self::DONE,
            Rule { top_k: 1.., .. } => 0,
            Rule { top_p: Rule::ALL, .. } => Self::WEIGHS,
            _ => 3,
        };
        let wanted = [rule.top_k.saturating_sub(1), 0];
        Self { largest, stage, below: FAR - 1, id: u32::MAX, digits: 0, pad: 0, wanted }
    }

    /// What a token counts in the sums of this stage, and where it lies.
    pub(crate) fn counts(&self, rule: &Rule, logit: f32, id: u32) -> (u32, u32) {
        let steps = if logit.is_finite() { below(self.largest, logit, rule.sharp) } else { FAR };
        let far = if self.stage < Self::WEIGHS { FAR - 1 } else { rule.far };
        let kept = steps <= far && (steps, id) <= (self.below, self.id);
        let what = if self.stage < 3 { 1 } else { weight(steps) };
        (if kept { what } else { 0 }, steps)
    }
}

/// Two words as one number.
pub(crate) fn whole([low, high]: [u32; 2]) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

/// A number as two words.
pub(crate) fn words(n: u64) -> [u32; 2] {
    [n as u32, (n >> 32) as u32]
}

impl Program {
    /// The sums of `op.rows` rows into `to.sums`.
    pub(super) fn weigh(&mut self, op: Weigh, to: &Drawing) {
        let launch = Launch::new(Op::Weigh(op), &KERNEL, [op.spans, op.rows, 1])
            .constant("V", op.v)
            .constant("PARTS", PARTS)
            .constant("SPANS", op.spans)
            .constant("ROW", op.row)
            .constant("FIRST", op.first)
            .read("logits", to.logits)
            .read("powers", to.powers)
            .read("rules", to.rules)
            .read("parts", to.parts)
            .read("rows", to.rows)
            .update("kept", to.kept)
            .update("sums", to.sums);
        self.push(launch);
    }
}

impl Weigh {
    pub(crate) fn twin(&self, views: &mut Views<'_>) {
        let (v, spans) = (self.v as usize, self.spans as usize);
        let (logits, rules): (_, &[Rule]) = (views.f32("logits"), bytemuck::cast_slice(views.words("rules")));
        let parts: &[Peak] = bytemuck::cast_slice(views.words("parts"));
        let rows: &[Row] = bytemuck::cast_slice(views.words("rows"));
        let kept: &mut [Kept] = bytemuck::cast_slice_mut(views.words_mut("kept"));
        let sums: &mut [[u32; 2]] = bytemuck::cast_slice_mut(views.words_mut("sums"));
        let each = v.div_ceil(spans);
        for (sums, t) in sums.chunks_exact_mut(spans * 256).zip(self.row as usize..).take(self.rows as usize) {
            let rule = &rules[rows[t].sequence as usize];
            if self.first {
                let parts = &parts[t * PARTS as usize..][..PARTS as usize];
                kept[t] = Kept::new(rule, largest(parts) + 0.0);
            }
            if kept[t].stage == Kept::DONE {
                continue;
            }
            for (span, to) in sums.chunks_exact_mut(256).enumerate() {
                let first = (span * each).min(v);
                let logits = &logits[t * v..][first..(first + each).min(v)];
                to.copy_from_slice(&self.reference(rule, &kept[t], logits, first as u32).map(words));
            }
        }
    }

    /// By digit, what these logits' tokens count, whose first is token `first`.
    pub fn reference(&self, rule: &Rule, kept: &Kept, logits: &[f32], first: u32) -> [u64; 256] {
        let mut sums = [0; 256];
        let shift = 16 - 8 * (kept.stage % 3);
        for (&logit, id) in logits.iter().zip(first..) {
            let (count, steps) = kept.counts(rule, logit, id);
            if (steps >> shift) >> 8 == kept.digits {
                sums[(steps >> shift) as usize % 256] += u64::from(count);
            }
        }
        sums
    }
}
