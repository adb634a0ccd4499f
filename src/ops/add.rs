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
    /// `x += y`. Both `[T, D]` f32.
    pub fn add(&mut self, d: u32, y: Slice, x: Slice) {
        let launch = Launch::new(Op::Add(Add { d }), &KERNEL, [d.div_ceil(64), self.tokens, 1])
            .constant("D", d)
            .read("y", y)
            .update("x", x);
        self.push(launch);
    }
}

impl Add {
    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        self.reference(&views.f32("y")[..tokens * self.d as usize], views.f32_mut("x"));
    }

    /// `x`, `y`: `[T, D]`.
    pub fn reference(&self, y: &[f32], x: &mut [f32]) {
        for (x, y) in x.iter_mut().zip(y) {
            *x = (f64::from(*x) + f64::from(*y)) as f32;
        }
    }
}
