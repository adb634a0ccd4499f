//! The largest magnitude of each row.

use super::{Op, Views};
use crate::program::{Launch, Program, Slice};
use crate::shader::Kernel;

pub(crate) const KERNEL: Kernel = Kernel { name: "amax", source: include_str!("../../shaders/amax.wgsl"), slots: &[] };

/// Constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Amax {
    /// Elements in a row.
    pub k: u32,
    /// Rows for each row of the step.
    pub rows_per_token: u32,
}

impl Program {
    /// `y[r] = max_k |x[r,k]|`. `x`: `[R, K]`, `y`: `[R]` f32, R = T rows_per_token.
    pub fn amax(&mut self, op: Amax, x: Slice, y: Slice) {
        let launch = Launch::new(Op::Amax(op), &KERNEL, [self.tokens * op.rows_per_token, 1, 1])
            .constant("K", op.k)
            .read("x", x)
            .write("y", y);
        self.push(launch);
    }
}

impl Amax {
    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        let rows = tokens * self.rows_per_token as usize;
        self.reference(&views.f32("x")[..rows * self.k as usize], views.f32_mut("y"));
    }

    /// `x [R, K]`, `y [R]`. A row with a NaN has the largest NaN's magnitude.
    pub fn reference(&self, x: &[f32], y: &mut [f32]) {
        for (x, y) in x.chunks_exact(self.k as usize).zip(y) {
            *y = x.iter().map(|v| v.abs()).max_by(f32::total_cmp).unwrap_or(0.0);
        }
    }
}
