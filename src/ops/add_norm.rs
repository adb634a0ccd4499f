//! Adding a stage's output to the residual stream, and normalising the sum: one launch for two or three ops.

use super::{Add, MoeScatter, Op, RmsNorm, Routes, Views};
use crate::program::{Launch, Program, Slice};
use crate::shader::{ADDEND, Kernel, LANES, REDUCE};

pub(crate) const KERNEL: Kernel =
    Kernel { name: "add_norm", source: include_str!("../../shaders/add_norm.wgsl"), slots: &[ADDEND, LANES, REDUCE] };

/// Constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AddNorm {
    /// The norm.
    pub norm: RmsNorm,
    /// Routes a token, where their weighted sum is what is added.
    pub routes: Option<u32>,
}

/// What has been computed and not yet added to the residual stream.
#[derive(Clone, Copy, Debug)]
pub enum Addend {
    /// `[T, D]` f32.
    Rows(Slice),
    /// The weighted sum of each token's routes.
    Routes {
        /// Experts per token.
        a: u32,
        /// Their weights.
        routes: Routes,
        /// `[T, A, D]` f32.
        x: Slice,
        /// Where the sum goes, `[T, D]` f32.
        sum: Slice,
    },
}

impl Program {
    /// `x += addend; h = norm(x)` by row. `x`, `h`: `[T, D]` f32; `g`: `[D]` bf16.
    pub fn add_norm(&mut self, norm: RmsNorm, addend: Addend, x: Slice, g: Slice, h: Slice) {
        let routes = if let Addend::Routes { a, .. } = addend { Some(a) } else { None };
        let launch = Launch::new(Op::AddNorm(AddNorm { norm, routes }), &KERNEL, [self.tokens, 1, 1])
            .constant("D", norm.d)
            .constant("EPS", norm.eps);
        let launch = match addend {
            Addend::Rows(y) => launch.fill("addend", "addend_rows").read("y", y),
            Addend::Routes { a, routes, x, sum } => launch
                .fill("addend", "addend_routes")
                .constant("A", a)
                .read("weights", routes.weights)
                .read("routes", x)
                .write("y", sum),
        };
        self.push(launch.update("x", x).read("g", g).write("h", h));
    }
}

impl AddNorm {
    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        let (d, n) = (self.norm.d, tokens * self.norm.d as usize);
        let x = &mut views.f32_mut("x")[..n];
        let y = match self.routes {
            None => &views.f32("y")[..n],
            Some(a) => {
                let (weights, y) = (&views.f32("weights")[..tokens * a as usize], views.f32_mut("y"));
                MoeScatter { a, d }.reference(weights, views.f32("routes"), y);
                &y[..n]
            }
        };
        self.reference(y, x, views.bf16("g"), views.f32_mut("h"));
    }

    /// `y`: what is added, already summed over routes; `y`, `x`, `h`: `[T, D]`; `g`: `[D]`.
    pub fn reference(&self, y: &[f32], x: &mut [f32], g: &[half::bf16], h: &mut [f32]) {
        Add { d: self.norm.d }.reference(y, x);
        self.norm.reference(x, g, h);
    }
}
