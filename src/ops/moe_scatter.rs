//! The weighted sum of a token's expert outputs.

use super::{Op, Routes, Views};
use crate::program::{Launch, Program, Slice};
use crate::shader::Kernel;

pub(crate) const KERNEL: Kernel =
    Kernel { name: "moe_scatter", source: include_str!("../../shaders/moe_scatter.wgsl"), slots: &[] };

/// Constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MoeScatter {
    /// Experts per token.
    pub a: u32,
    /// Width of a row.
    pub d: u32,
}

impl Program {
    /// `y[t] = sum_a weights[t,a] x[t,a]`. `x`: `[T, A, D]`, `y`: `[T, D]` f32.
    pub fn moe_scatter(&mut self, op: MoeScatter, routes: Routes, x: Slice, y: Slice) {
        let launch = Launch::new(Op::MoeScatter(op), &KERNEL, [op.d.div_ceil(64), self.tokens, 1])
            .constant("A", op.a)
            .constant("D", op.d)
            .read("weights", routes.weights)
            .read("x", x)
            .write("y", y);
        self.push(launch);
    }
}

impl MoeScatter {
    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        let weights = &views.f32("weights")[..tokens * self.a as usize];
        self.reference(weights, views.f32("x"), views.f32_mut("y"));
    }

    /// `weights [T, A]`, `x [T, A, D]`, `y [T, D]`.
    pub fn reference(&self, weights: &[f32], x: &[f32], y: &mut [f32]) {
        let (a, d) = (self.a as usize, self.d as usize);
        for (t, weights) in weights.chunks_exact(a).enumerate() {
            for i in 0..d {
                let sum: f64 = (0..a).map(|j| f64::from(weights[j]) * f64::from(x[(t * a + j) * d + i])).sum();
                y[t * d + i] = sum as f32;
            }
        }
    }
}
