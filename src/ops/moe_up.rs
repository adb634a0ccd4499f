//! The experts' first matrix (gate and up, interleaved) and the clamped SwiGLU.

use super::{Matrix, Op, Views, Weight, weight::dot};
use crate::format::Format;
use crate::program::{Launch, Program, Slice};
use crate::shader::{BIAS, Kernel, REDUCE, WEIGHTS};

pub(crate) const KERNEL: Kernel =
    Kernel { name: "moe_up", source: include_str!("../../shaders/moe_up.wgsl"), slots: &[WEIGHTS, BIAS, REDUCE] };

/// One of a layer's two expert matrices: a weight for each expert, and a bias `[E, N]` bf16.
#[derive(Debug)]
pub struct Experts {
    /// The matrices.
    pub weight: Weight,
    /// The biases.
    pub bias: Slice,
}

/// Constants of one part of the experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MoeUp {
    /// How the weight is stored.
    pub format: Format,
    /// Inputs.
    pub k: u32,
    /// Outputs after the activation.
    pub f: u32,
    /// Experts per token.
    pub a: u32,
    /// First expert of the part.
    pub first: u32,
    /// Experts in the part.
    pub count: u32,
    /// Clamp of gate and up.
    pub limit: f32,
    /// Factor inside the sigmoid.
    pub alpha: f32,
}

impl Program {
    /// `y[t,a] = swiglu(w_e h[t] + bias_e)` with `e = experts[t,a]`. `h`: `[T, K]`, `y`: `[T, A, F]` f32;
    /// `experts`: `[T, A]` u32.
    pub fn moe_up(&mut self, up: &Experts, a: u32, [limit, alpha]: [f32; 2], experts: Slice, [h, y]: [Slice; 2]) {
        let (k, f) = (up.weight.k, up.weight.n / 2);
        for part in &up.weight.parts {
            let (first, count) = (part.first, part.count);
            let op = MoeUp { format: up.weight.format, k, f, a, first, count, limit, alpha };
            let launch = Launch::new(Op::MoeUp(op), &KERNEL, [f.div_ceil(8), self.tokens * a, 1])
                .constant("K", k)
                .constant("F", f)
                .constant("A", a)
                .constant("FIRST", first)
                .constant("COUNT", count)
                .constant("LIMIT", limit)
                .constant("ALPHA", alpha)
                .weight(up.weight.format, part)
                .bias(Some(up.bias))
                .read("experts", experts)
                .read("h", h)
                .update("y", y);
            self.push(launch);
        }
    }
}

impl MoeUp {
    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        let w = views.matrix(self.format, self.k as usize);
        let experts = &views.words("experts")[..tokens * self.a as usize];
        self.reference(&w, views.bf16("bias"), experts, views.f32("h"), views.f32_mut("y"));
    }

    /// `w [COUNT, 2F, K]`, `bias [E, 2F]`, `experts [T, A]`, `h [T, K]`, `y [T, A, F]`.
    pub fn reference(&self, w: &Matrix<'_>, bias: &[half::bf16], experts: &[u32], h: &[f32], y: &mut [f32]) {
        let (k, f) = (self.k as usize, self.f as usize);
        let (limit, alpha) = (f64::from(self.limit), f64::from(self.alpha));
        let mut row = vec![0.0; k];
        for (route, &expert) in experts.iter().enumerate() {
            if !(self.first..self.first + self.count).contains(&expert) {
                continue;
            }
            let h = &h[route / self.a as usize * k..][..k];
            let mut output = |r: usize| {
                w.row((expert - self.first) as usize * 2 * f + r, &mut row);
                dot(&row, h) + bias[expert as usize * 2 * f + r].to_f64()
            };
            for i in 0..f {
                let gate = output(2 * i);
                let gate = if gate > limit { limit } else { gate }; // `min` would turn NaN into the limit
                let up = output(2 * i + 1).clamp(-limit, limit);
                y[route * f + i] = (gate / (1.0 + (-alpha * gate).exp()) * (up + 1.0)) as f32;
            }
        }
    }
}
