//! Root-mean-square normalisation of each query and key head, before rotation (Qwen3).

use super::{Op, Views};
use crate::program::{Launch, Program, Slice};
use crate::shader::{Kernel, LANES, REDUCE};

pub(crate) const KERNEL: Kernel =
    Kernel { name: "head_norm", source: include_str!("../../shaders/head_norm.wgsl"), slots: &[LANES, REDUCE] };

/// Constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadNorm {
    /// Query heads.
    pub h: u32,
    /// Key/value heads.
    pub hk: u32,
    /// Head size.
    pub dh: u32,
    /// Added to the mean square.
    pub eps: f32,
}

impl Program {
    /// Normalise the query and key heads of `qkv [T, (H + 2 Hk) Dh]` in place. `gains`: of queries and of keys, `[Dh]` bf16.
    pub fn head_norm(&mut self, op: HeadNorm, gains: [Slice; 2], qkv: Slice) {
        let launch = Launch::new(Op::HeadNorm(op), &KERNEL, [op.h + op.hk, self.tokens, 1])
            .constant("H", op.h)
            .constant("HK", op.hk)
            .constant("DH", op.dh)
            .head_gains(op.eps, gains)
            .update("qkv", qkv);
        self.push(launch);
    }
}

impl Launch {
    /// Bind what heads are normalised with.
    pub(super) fn head_gains(self, eps: f32, gains: [Slice; 2]) -> Self {
        self.constant("EPS", eps).read("q_gain", gains[0]).read("k_gain", gains[1])
    }
}

impl HeadNorm {
    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        let width = ((self.h + 2 * self.hk) * self.dh) as usize;
        let gains = [views.bf16("q_gain"), views.bf16("k_gain")];
        self.reference(gains, &mut views.f32_mut("qkv")[..tokens * width]);
    }

    /// `gains`: `[Dh]` each; `x [T, H + 2 Hk, Dh]`.
    pub fn reference(&self, gains: [&[half::bf16]; 2], x: &mut [f32]) {
        let [h, hk, dh] = [self.h, self.hk, self.dh].map(|n| n as usize);
        for row in x.chunks_exact_mut((h + 2 * hk) * dh) {
            for (head, v) in row.chunks_exact_mut(dh).take(h + hk).enumerate() {
                let gain = gains[usize::from(head >= h)];
                let mean = v.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>() / dh as f64;
                let scale = 1.0 / (mean + f64::from(self.eps)).sqrt();
                for (v, g) in v.iter_mut().zip(gain) {
                    *v = (f64::from(*v) * scale * g.to_f64()) as f32;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_apart_and_values_are_left_alone() {
        let op = HeadNorm { h: 1, hk: 1, dh: 2, eps: 0.0 };
        let [one, two] = [1.0, 2.0].map(|g| [half::bf16::from_f32(g); 2]);
        let mut x = [3.0, 3.0, -5.0, 5.0, 7.0, 8.0];
        op.reference([&one, &two], &mut x);
        assert_eq!(x, [1.0, 1.0, -2.0, 2.0, 7.0, 8.0]);
    }
}
