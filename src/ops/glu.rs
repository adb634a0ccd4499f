//! Gated activations: inside the experts' first matrix, and on its own in a dense MLP.

use super::{Op, Views};
use crate::program::{Launch, Program, Slice};
use crate::shader::{GLU, Kernel};

pub(crate) const KERNEL: Kernel = Kernel { name: "glu", source: include_str!("../../shaders/glu.wgsl"), slots: &[GLU] };

/// What becomes of a gate and an up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gate {
    /// gpt-oss: `gate sigmoid(alpha gate) (up + 1)` with `gate = min(g, limit)`, `up = clamp(u, -limit, limit)`.
    Clamped {
        /// Clamp of gate and up.
        limit: f32,
        /// Factor inside the sigmoid.
        alpha: f32,
    },
    /// Llama, Qwen: `g sigmoid(g) u`.
    Silu,
}

impl Gate {
    /// The activation in f64; NaN stays NaN.
    pub fn of(self, g: f64, u: f64) -> f64 {
        match self {
            Self::Clamped { limit, alpha } => {
                let (limit, alpha) = (f64::from(limit), f64::from(alpha));
                let gate = if g > limit { limit } else { g }; // `min` would turn NaN into the limit
                gate / (1.0 + (-alpha * gate).exp()) * (u.clamp(-limit, limit) + 1.0)
            }
            Self::Silu => g / (1.0 + (-g).exp()) * u,
        }
    }
}

impl Launch {
    /// Fill slot `glu`.
    pub(crate) fn gate(self, gate: Gate) -> Self {
        match gate {
            Gate::Clamped { limit, alpha } => {
                self.fill("glu", "glu_clamped").constant("LIMIT", limit).constant("ALPHA", alpha)
            }
            Gate::Silu => self.fill("glu", "glu_silu"),
        }
    }
}

/// Constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Glu {
    /// Outputs.
    pub f: u32,
    /// The activation.
    pub gate: Gate,
}

impl Program {
    /// `y[t,f] = glu(x[t,f], x[t,F+f])`. `x`: `[T, 2F]`, `y`: `[T, F]` f32.
    pub fn glu(&mut self, op: Glu, x: Slice, y: Slice) {
        let launch = Launch::new(Op::Glu(op), &KERNEL, [op.f.div_ceil(64), self.tokens, 1])
            .constant("F", op.f)
            .gate(op.gate)
            .read("x", x)
            .write("y", y);
        self.push(launch);
    }
}

impl Glu {
    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        self.reference(&views.f32("x")[..tokens * 2 * self.f as usize], views.f32_mut("y"));
    }

    /// `x [T, 2F]`, `y [T, F]`.
    pub fn reference(&self, x: &[f32], y: &mut [f32]) {
        let f = self.f as usize;
        for (x, y) in x.chunks_exact(2 * f).zip(y.chunks_exact_mut(f)) {
            for i in 0..f {
                y[i] = self.gate.of(f64::from(x[i]), f64::from(x[f + i])) as f32;
            }
        }
    }
}
