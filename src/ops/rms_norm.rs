//! Root-mean-square normalisation with a gain.

use super::{Op, Views};
use crate::program::{Launch, Program, Slice};
use crate::shader::{Kernel, LANES, REDUCE};

pub(crate) const KERNEL: Kernel =
    Kernel { name: "rms_norm", source: include_str!("../../shaders/rms_norm.wgsl"), slots: &[LANES, REDUCE] };

/// Constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RmsNorm {
    /// Width of a row.
    pub d: u32,
    /// Added to the mean square.
    pub eps: f32,
}

impl Program {
    /// `y = x g / sqrt(mean(x^2) + eps)` by row. `x`, `y`: `[T, D]` f32; `g`: `[D]` bf16.
    pub fn rms_norm(&mut self, op: RmsNorm, x: Slice, g: Slice, y: Slice) {
        let launch = Launch::new(Op::RmsNorm(op), &KERNEL, [self.tokens, 1, 1])
            .constant("D", op.d)
            .constant("EPS", op.eps)
            .read("x", x)
            .read("g", g)
            .write("y", y);
        self.push(launch);
    }
}

impl RmsNorm {
    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        let d = self.d as usize;
        self.reference(&views.f32("x")[..tokens * d], views.bf16("g"), views.f32_mut("y"));
    }

    /// What brings a row to unit root mean square.
    pub(super) fn scale_of(&self, x: &[f32]) -> f64 {
        let mean = x.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>() / f64::from(self.d);
        1.0 / (mean + f64::from(self.eps)).sqrt()
    }

    /// `x`, `y`: `[T, D]`; `g`: `[D]`.
    pub fn reference(&self, x: &[f32], g: &[half::bf16], y: &mut [f32]) {
        let d = self.d as usize;
        for (x, y) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)) {
            let scale = self.scale_of(x);
            for i in 0..d {
                y[i] = (f64::from(x[i]) * scale * g[i].to_f64()) as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_equal_values_becomes_the_gain() {
        let op = RmsNorm { d: 4, eps: 0.0 };
        let g: Vec<_> = [1.0, -2.0, 0.5, 0.0].map(half::bf16::from_f32).into();
        let mut y = [f32::NAN; 4];
        op.reference(&[3.0; 4], &g, &mut y);
        assert_eq!(y, [1.0, -2.0, 0.5, 0.0]);
    }
}
