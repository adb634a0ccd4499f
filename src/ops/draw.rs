//! A token drawn for each row by its sequence's rule, made the row of the next step on the device.

use super::argmax::largest;
use super::narrow::{over_spans, passes};
use super::{Kept, Narrow, Op, PARTS, Peak, Row, Views, Weigh};
use crate::program::{Launch, Program, Slice};
use crate::sampler::{Rule, bin, random, scaled};
use crate::shader::Kernel;

pub(crate) const KERNEL: Kernel = Kernel { name: "draw", source: include_str!("../../shaders/draw.wgsl"), slots: &[] };

/// Most spans of the vocabulary with sums of their own.
const SPANS: u64 = 64;
/// Tokens that are worth a span.
const SPAN_TOKENS: u64 = 512;
/// Bytes of a span's sums: of 256 digits.
const SPAN_BYTES: u64 = 256 * 8;

/// Constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Logits of a row.
    pub v: u32,
    /// Spans of the vocabulary with sums of their own.
    pub spans: u32,
    /// The first of the rows.
    pub row: u32,
    /// How many rows.
    pub rows: u32,
    /// Rules may ask for more than the likeliest token; else nothing but `parts` is looked at.
    pub sampled: bool,
}

/// How a program draws: a row's token follows its sequence's rule, not what the program could do for others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Draws {
    /// All rules are for the likeliest token.
    #[default]
    Likeliest,
    /// The rules need as many rounds at most: [`Rule::rounds`].
    Rounds(u32),
}

impl Draws {
    /// What serves all of these.
    pub fn of<'r>(rules: impl IntoIterator<Item = &'r Rule>) -> Self {
        let one = |rule: &Rule| if rule.sharp == 0.0 { Self::Likeliest } else { Self::Rounds(rule.rounds()) };
        rules.into_iter().map(one).max().unwrap_or_default()
    }
}

/// What tokens are drawn from, and where what is found on the way stands.
#[derive(Clone, Copy, Debug)]
pub struct Drawing {
    /// `[T, V]` f32.
    pub logits: Slice,
    /// `sampler::POWERS`.
    pub powers: Slice,
    /// [`Rule`] of each sequence.
    pub rules: Slice,
    /// `[T]` [`Row`].
    pub rows: Slice,
    /// `[T, 64]` [`Peak`].
    pub parts: Slice,
    /// `[T]` [`Kept`].
    pub kept: Slice,
    /// Sums of spans, of as many rows at a time as it holds: [`Drawing::row_bytes`] each, or of one that has fewer spans.
    pub sums: Slice,
}

impl Drawing {
    /// Bytes of the sums of a row of `v` logits, where a binding holds as many.
    pub fn row_bytes(v: u32, max_binding_bytes: u64) -> u64 {
        let most = u64::from(v).div_ceil(SPAN_TOKENS).min(SPANS);
        SPAN_BYTES * (max_binding_bytes / SPAN_BYTES).clamp(1, most)
    }

    /// Spans of a row, and rows at a time.
    fn layout(&self, v: u32) -> [u32; 2] {
        let row = Self::row_bytes(v, self.sums.bytes);
        [(row / SPAN_BYTES) as u32, (self.sums.bytes / row) as u32]
    }
}

/// What was drawn from a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Drawn {
    /// The token.
    pub id: u32,
    /// Its logit less the largest one.
    pub logit: f32,
    /// The sum of e^(logit - largest) over all tokens.
    pub sum: f32,
    /// Not zero: a logit was NaN or plus infinity, and there is no token to be had.
    pub bad: u32,
}

impl Program {
    /// A token from each row of logits into `drawn [T]` ([`Drawn`]), and into `rows` as the next step's.
    pub fn draw(&mut self, v: u32, how: Draws, from: &Drawing, drawn: Slice) {
        self.argmax(v, from.logits, from.parts);
        let tokens = self.tokens;
        let [spans, some] = from.layout(v);
        debug_assert!(v.div_ceil(spans) <= 1 << 16, "sums of half words fit a word");
        let (some, sampled) = match how {
            Draws::Likeliest => (tokens, false),
            Draws::Rounds(_) => (some, true),
        };
        for row in (0..tokens).step_by(some as usize) {
            let rows = some.min(tokens - row);
            if let Draws::Rounds(rounds) = how {
                self.weigh(Weigh { v, spans, row, rows, first: true }, from);
                for round in 0..rounds {
                    self.narrow(Narrow { v, spans, row, rows, last: round % 3 == 2 }, from);
                    self.weigh(Weigh { v, spans, row, rows, first: false }, from);
                }
            }
            self.draw_rows(Draw { v, spans, row, rows, sampled }, from, drawn);
        }
    }

    fn draw_rows(&mut self, op: Draw, from: &Drawing, drawn: Slice) {
        let launch = Launch::new(Op::Draw(op), &KERNEL, [op.rows, 1, 1])
            .constant("V", op.v)
            .constant("PARTS", PARTS)
            .constant("SPANS", op.spans)
            .constant("ROW", op.row)
            .constant("SAMPLED", op.sampled)
            .read("logits", from.logits)
            .read("powers", from.powers)
            .read("rules", from.rules)
            .read("parts", from.parts)
            .read("kept", from.kept)
            .read("sums", from.sums)
            .update("rows", from.rows)
            .write("drawn", drawn);
        self.push(launch);
    }
}

impl Draw {
    pub(crate) fn twin(&self, views: &mut Views<'_>) {
        let (v, spans) = (self.v as usize, self.spans as usize);
        let (logits, rules): (_, &[Rule]) = (views.f32("logits"), bytemuck::cast_slice(views.words("rules")));
        let parts: &[Peak] = bytemuck::cast_slice(views.words("parts"));
        let kept: &[Kept] = bytemuck::cast_slice(views.words("kept"));
        let sums: &[[u32; 2]] = bytemuck::cast_slice(views.words("sums"));
        let rows: &mut [Row] = bytemuck::cast_slice_mut(views.words_mut("rows"));
        let drawn: &mut [Drawn] = bytemuck::cast_slice_mut(views.words_mut("drawn"));
        for (i, t) in (self.row as usize..).take(self.rows as usize).enumerate() {
            let (row, parts) = (&mut rows[t], &parts[t * PARTS as usize..][..PARTS as usize]);
            row.position += 1;
            let rule = rules.get(row.sequence as usize).filter(|rule| self.sampled && rule.sharp != 0.0);
            let logits = &logits[t * v..][..v];
            let token = rule.and_then(|rule| {
                self.reference(rule, &kept[t], logits, &sums[i * spans * 256..][..spans * 256], row.position)
            });
            drawn[t] = likeliest(parts);
            if let Some(id) = token {
                drawn[t] = Drawn { id, logit: logits[id as usize] - largest(parts), ..drawn[t] };
            }
            row.token = drawn[t].id;
        }
    }

    /// The token drawn from one row for a position. `None`: its logits are no numbers.
    pub fn reference(
        &self,
        rule: &Rule,
        kept: &Kept,
        logits: &[f32],
        spans: &[[u32; 2]],
        position: u32,
    ) -> Option<u32> {
        let sums = over_spans(spans);
        let target = scaled(random(rule, position.into()), sums.iter().sum());
        let (at, left) = passes(sums, target)?;
        let of_bin = |(&logit, id): (&f32, u32)| match kept.counts(rule, logit, id) {
            (count, steps) if bin(steps) == at => u64::from(count),
            _ => 0,
        };
        passes(logits.iter().zip(0..).map(of_bin), left).map(|(id, _)| id)
    }
}

/// The best of the parts of one row.
fn likeliest(parts: &[Peak]) -> Drawn {
    let best = parts.iter().fold(parts[0], |best, p| if p.logit > best.logit { *p } else { best });
    let some = parts.iter().filter(|part| part.sum != 0.0);
    let sum: f64 = some.map(|part| f64::from(part.sum) * f64::from(part.logit - best.logit).exp()).sum();
    Drawn { id: best.id, logit: 0.0, sum: sum as f32, bad: parts.iter().fold(0, |bad, part| bad | part.bad) }
}
