//! Adding a stage's output to the residual stream.

use super::{Op, Views};
use crate::program::{Launch, Program, Slice};
use crate::shader::Kernel;

pub(crate) const KERNEL: Kernel = Kernel { name: "add", source: include_str!("../../shaders/add.wgsl"), slots: &[] };

/// Constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Add {
    /// Width of a row.
    pub d: u32,
}

impl Program {
    /// `sum = x + y`. All `[T, D]` f32.
    pub fn add(&mut self, d: u32, x: Slice, y: Slice, sum: Slice) {
        let launch = Launch::new(Op::Add(Add { d }), &KERNEL, [d.div_ceil(64), self.tokens, 1])
            .constant("D", d)
            .read("x", x)
            .read("y", y)
            .write("sum", sum);
        self.push(launch);
    }
}

impl Add {
    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        let n = tokens * self.d as usize;
        self.reference(&views.f32("x")[..n], &views.f32("y")[..n], views.f32_mut("sum"));
    }

    /// `x`, `y`, `sum`: `[T, D]`.
    pub fn reference(&self, x: &[f32], y: &[f32], sum: &mut [f32]) {
        for ((x, y), sum) in x.iter().zip(y).zip(sum) {
            *sum = (f64::from(*x) + f64::from(*y)) as f32;
        }
    }
}
