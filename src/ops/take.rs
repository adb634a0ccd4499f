//! Gathering the rows whose logits are wanted.

use super::{Op, Views};
use crate::program::{Launch, Program, Slice};
use crate::shader::Kernel;

pub(crate) const KERNEL: Kernel = Kernel { name: "take", source: include_str!("../../shaders/take.wgsl"), slots: &[] };

/// Constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Take {
    /// Width of a row.
    pub d: u32,
}

impl Program {
    /// `y[p] = x[picks[p]]` for the program's rows p. `picks`: `[P]` u32; `x`: `[T, D]`, `y`: `[P, D]` f32.
    pub fn take(&mut self, d: u32, picks: Slice, x: Slice, y: Slice) {
        let launch = Launch::new(Op::Take(Take { d }), &KERNEL, [d.div_ceil(64), self.tokens, 1])
            .constant("D", d)
            .read("picks", picks)
            .read("x", x)
            .write("y", y);
        self.push(launch);
    }
}

impl Take {
    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        self.reference(&views.words("picks")[..tokens], views.f32("x"), views.f32_mut("y"));
    }

    /// `picks [P]`, `x [T, D]`, `y [P, D]`.
    pub fn reference(&self, picks: &[u32], x: &[f32], y: &mut [f32]) {
        let d = self.d as usize;
        for (y, &pick) in y.chunks_exact_mut(d).zip(picks) {
            y.copy_from_slice(&x[pick as usize * d..][..d]);
        }
    }
}
