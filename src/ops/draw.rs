//! The likeliest token of each row, made the row of the next step on the device.

use super::{Drawn, Op, PARTS, Row, Views};
use crate::program::{Launch, Program, Slice};
use crate::shader::Kernel;

pub(crate) const KERNEL: Kernel = Kernel { name: "draw", source: include_str!("../../shaders/draw.wgsl"), slots: &[] };

/// Constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw;

impl Program {
    /// The likeliest token of each of `logits [T, V]` f32 into `drawn [T]` ([`Drawn`]), and into `rows` as the next step's.
    /// `parts`: `[T, 64]` of four words.
    pub fn draw(&mut self, v: u32, logits: Slice, parts: Slice, rows: Slice, drawn: Slice) {
        self.argmax(v, logits, parts);
        let launch = Launch::new(Op::Draw(Draw), &KERNEL, [self.tokens, 1, 1])
            .constant("PARTS", PARTS)
            .read("parts", parts)
            .update("rows", rows)
            .write("drawn", drawn);
        self.push(launch);
    }
}

impl Draw {
    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        let parts: &[Drawn] = bytemuck::cast_slice(views.words("parts"));
        let rows: &mut [Row] = bytemuck::cast_slice_mut(views.words_mut("rows"));
        let drawn: &mut [Drawn] = bytemuck::cast_slice_mut(views.words_mut("drawn"));
        for (t, parts) in parts.chunks_exact(PARTS as usize).take(tokens).enumerate() {
            drawn[t] = self.reference(parts);
            rows[t].token = drawn[t].id;
            rows[t].position += 1;
        }
    }

    /// The best of the parts of one row.
    pub fn reference(&self, parts: &[Drawn]) -> Drawn {
        let best = parts.iter().fold(parts[0], |best, p| if p.logit > best.logit { *p } else { best });
        let sum: f64 = parts.iter().map(|p| f64::from(p.sum) * f64::from(p.logit - best.logit).exp()).sum();
        Drawn { sum: sum as f32, bad: parts.iter().fold(0, |bad, p| bad | p.bad), ..best }
    }
}
