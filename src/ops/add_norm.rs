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
        /// Where the sum goes if somebody wants it apart, `[T, D]` f32.
        sum: Slice,
    },
}

impl Addend {
    /// Routes of a token, where their weighted sum is what is added.
    pub(super) fn routes(self) -> Option<u32> {
        if let Addend::Routes { a, .. } = self { Some(a) } else { None }
    }
}

impl Launch {
    /// Bind what is added and fill slot `addend`.
    pub(super) fn addend(self, addend: Addend) -> Self {
        match addend {
            Addend::Rows(y) => self.fill("addend", "addend_rows").read("addends", y),
            Addend::Routes { a, routes, x, .. } => self
                .fill("addend", "addend_routes")
                .constant("A", a)
                .read("addends", x)
                .read("route_weights", routes.weights),
        }
    }
}

impl Program {
    /// `sum = x + addend; h = norm(sum)` by row. `x`, `sum`, `h`: `[T, D]` f32; `g`: `[D]` bf16.
    pub fn add_norm(&mut self, norm: RmsNorm, x: Slice, addend: Addend, g: Slice, [sum, h]: [Slice; 2]) {
        let op = AddNorm { norm, routes: addend.routes() };
        let launch = Launch::new(Op::AddNorm(op), &KERNEL, [self.tokens, 1, 1])
            .constant("D", norm.d)
            .constant("EPS", norm.eps)
            .addend(addend)
            .read("x", x)
            .read("g", g)
            .write("sum", sum)
            .write("h", h);
        self.push(launch);
    }
}

impl AddNorm {
    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        let x = &views.f32("x")[..tokens * self.norm.d as usize];
        let weights = if self.routes.is_some() { views.f32("route_weights") } else { &[] };
        let (addends, g) = (views.f32("addends"), views.bf16("g"));
        self.reference(x, addends, weights, g, views.f32_mut("sum"), views.f32_mut("h"));
    }

    /// `x`, `sum`, `h`: `[T, D]`; `addends`: `[T, D]`, or `[T, A, D]` with their `weights [T, A]`; `g`: `[D]`.
    pub fn reference(
        &self,
        x: &[f32],
        addends: &[f32],
        weights: &[f32],
        g: &[half::bf16],
        sum: &mut [f32],
        h: &mut [f32],
    ) {
        let (d, n) = (self.norm.d, x.len());
        let sum = &mut sum[..n];
        match self.routes {
            None => Add { d }.reference(x, &addends[..n], sum),
            Some(a) => {
                let mut y = vec![0.0; n];
                let routes = n / d as usize * a as usize;
                MoeScatter { a, d }.reference(&weights[..routes], &addends[..routes * d as usize], &mut y);
                Add { d }.reference(x, &y, sum);
            }
        }
        self.norm.reference(sum, g, h);
    }
}
