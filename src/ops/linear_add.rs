//! A matrix times a row, added to the residual stream, and what a router that comes next makes of the sum, in one launch.

use super::linear::{Linear, Projection};
use super::norm_linear::share;
use super::{Add, InputFormat, Matrix, NormLinear, Op, Views};
use crate::program::{Launch, Program, Slice};
use crate::shader::{BIAS, E2M1, F32_INPUT, FOLD, Kernel, LANES, ROUTE_TILE, WEIGHTS};

pub(crate) const KERNEL: Kernel = Kernel {
    name: "linear_add",
    source: include_str!("../../shaders/linear_add.wgsl"),
    slots: &[WEIGHTS, E2M1, F32_INPUT, BIAS, ROUTE_TILE, LANES, FOLD],
};

/// Rows of weights of a workgroup: a sixteen of what follows.
const ROWS: u32 = 16;

/// Constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinearAdd {
    /// The matrix: all of its rows, f32 inputs.
    pub linear: Linear,
    /// Experts of the router.
    pub e: u32,
}

impl Program {
    /// `y = w x + bias; sum = residual + y` of one row: the bits of `linear` and `add`; and to `shares`, of
    /// [`LinearAdd::share_words`], what each sixteen of `sum` times `g` gives to the router's scores, for
    /// [`Program::norm_moe_up`]. Of matrices that [`LinearAdd::takes`]. `x [K]`, `residual`, `y`, `sum`: `[N]` f32, `g [N]` bf16.
    pub fn linear_add(
        &mut self,
        w: &Projection,
        [x, residual]: [Slice; 2],
        (g, router): (Slice, &Projection),
        [y, sum, shares]: [Slice; 3],
    ) {
        let ([piece], [part]) = (&w.pieces[..], &w.pieces[0].weight.parts[..]) else {
            unreachable!("`LinearAdd::takes` was asked")
        };
        let (format, k, n, e) = (piece.weight.format, piece.weight.k, w.n, router.n);
        let linear = Linear { format, input: InputFormat::F32, k, n, first: 0, count: n };
        let grid = [LinearAdd::shares(n), 1, 1];
        let launch = Launch::new(Op::LinearAdd(LinearAdd { linear, e }), &KERNEL, grid)
            .constant("K", k)
            .constant("N", n)
            .constant("E", e)
            .constant("ROWS", ROWS)
            .fill("tile", "tile_1x4")
            .weight(format, part)
            .bias(w.bias)
            .input(x.into())
            .read("residual", residual)
            .read("g", g)
            .read("router", router.pieces[0].weight.parts[0].codes)
            .write("y", y)
            .write("sum", sum)
            .write("shares", shares);
        self.push(launch);
    }
}

impl LinearAdd {
    /// Most experts. Each workgroup of [`Program::norm_moe_up`] reads all shares: of many that would take longer than a launch.
    pub const EXPERTS: u32 = 32;

    /// The router's bias, if [`Program::linear_add`] and [`Program::norm_moe_up`] can do it.
    pub fn takes(w: &Projection, router: &Projection) -> Option<Slice> {
        let whole = NormLinear::takes(w) && w.n.is_multiple_of(ROWS);
        router.bias.filter(|_| whole && NormLinear::takes_few(router) && router.n <= Self::EXPERTS)
    }

    /// f32s of the shares of a row of `n` elements in the scores of `e` experts; none of more than are taken.
    pub fn share_words(n: u32, e: u32) -> usize {
        if e > Self::EXPERTS { 0 } else { (Self::shares(n) * e) as usize }
    }

    /// Sixteens of a row with those past its end, to whole groups of 32 lanes.
    fn shares(n: u32) -> u32 {
        n.div_ceil(ROWS).next_multiple_of(32)
    }

    pub(crate) fn twin(&self, views: &mut Views<'_>) {
        let (k, n) = (self.linear.k as usize, self.linear.n as usize);
        let w = views.matrix(self.linear.format, k);
        let bias = if views.has("bias") { views.bf16("bias") } else { &[] };
        let (x, residual) = (&views.f32("x")[..k], &views.f32("residual")[..n]);
        let router = (views.bf16("g"), views.bf16("router"));
        let [y, sum] = ["y", "sum"].map(|name| &mut views.f32_mut(name)[..n]);
        self.reference((&w, bias), x, residual, router, [y, sum, views.f32_mut("shares")]);
    }

    /// `w [N, K]`, `bias [N]` or empty, `x [K]`, `residual`, `y`, `sum`: `[N]`, `g [N]`, `router [E, N]`,
    /// `shares [N / 64, E, 4]` and zeros.
    pub fn reference(
        &self,
        (w, bias): (&Matrix<'_>, &[half::bf16]),
        x: &[f32],
        residual: &[f32],
        (g, router): (&[half::bf16], &[half::bf16]),
        [y, sum, shares]: [&mut [f32]; 3],
    ) {
        let (n, e) = (self.linear.n as usize, self.e as usize);
        self.linear.reference(w, bias, x, y);
        Add { d: self.linear.n }.reference(residual, y, sum);
        shares[..Self::share_words(self.linear.n, self.e)].fill(0.0);
        for i in 0..n / ROWS as usize {
            for expert in 0..e {
                shares[(i / 4 * e + expert) * 4 + i % 4] = share(&router[expert * n..], sum, g, i);
            }
        }
    }
}
