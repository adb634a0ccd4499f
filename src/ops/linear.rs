//! Matrix times rows.

use super::{Matrix, Op, Views, Weight, weight::dot};
use crate::format::Format;
use crate::program::{Launch, Program, Slice};
use crate::shader::{BIAS, Kernel, REDUCE, TILE, WEIGHTS};

pub(crate) const KERNEL: Kernel =
    Kernel { name: "linear", source: include_str!("../../shaders/linear.wgsl"), slots: &[WEIGHTS, BIAS, TILE, REDUCE] };

/// Constants of one part of the matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Linear {
    /// How the weight is stored.
    pub format: Format,
    /// Inputs.
    pub k: u32,
    /// Outputs of the whole matrix.
    pub n: u32,
    /// First output of the part.
    pub first: u32,
    /// Outputs in the part.
    pub count: u32,
}

impl Program {
    /// `y = w x + bias` by row. `step`: uniform with T; `x`: `[T, K]`, `y`: `[T, N]` f32; `bias`: `[N]` bf16.
    pub fn linear(&mut self, step: Slice, w: &Weight, bias: Option<Slice>, x: Slice, y: Slice) {
        // The tile changes how many sums a lane carries, not the order of any of them.
        let (tile, tokens) = if self.tokens < 4 { ("tile_1", 1) } else { ("tile_8", 8) };
        for part in &w.parts {
            let op = Linear { format: w.format, k: w.k, n: w.n, first: part.first, count: part.count };
            let grid = [part.count.div_ceil(8), self.tokens.div_ceil(tokens), 1];
            let launch = Launch::new(Op::Linear(op), &KERNEL, grid)
                .constant("K", op.k)
                .constant("N", op.n)
                .constant("FIRST", op.first)
                .constant("COUNT", op.count)
                .read("step", step)
                .weight(w.format, part)
                .bias(bias)
                .fill("tile", tile)
                .read("x", x)
                .update("y", y);
            self.push(launch);
        }
    }
}

impl Linear {
    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        let w = views.matrix(self.format, self.k as usize);
        let bias = if views.has("bias") { views.bf16("bias") } else { &[] };
        self.reference(&w, bias, &views.f32("x")[..tokens * self.k as usize], views.f32_mut("y"));
    }

    /// `x [T, K]`, `w [COUNT, K]`, `bias [N]` or empty, `y [T, N]`.
    pub fn reference(&self, w: &Matrix<'_>, bias: &[half::bf16], x: &[f32], y: &mut [f32]) {
        let (n, k, first) = (self.n as usize, self.k as usize, self.first as usize);
        let mut row = vec![0.0; k];
        for i in 0..self.count as usize {
            w.row(i, &mut row);
            let b = bias.get(first + i).map_or(0.0, |b| b.to_f64());
            for (t, x) in x.chunks_exact(k).enumerate() {
                y[t * n + first + i] = (dot(&row, x) + b) as f32;
            }
        }
    }
}
