//! The norm, a router's scores, the choice of experts, and their first matrix, of one row in one launch.

use super::moe_up::{Experts, MoeUp, Swiglu};
use super::norm_linear::score;
use super::{InputFormat, Matrix, Op, RmsNorm, Router, Routes, Views};
use crate::program::{Launch, Program, Slice};
use crate::shader::{BIAS, E2M1, FOLD, GLU, Kernel, LANES, NORMED_INPUT, REDUCE, ROUTE_TILE, WEIGHTS, WHOLE_RESIDUAL};

pub(crate) const KERNEL: Kernel = Kernel {
    name: "norm_moe_up",
    source: include_str!("../../shaders/norm_moe_up.wgsl"),
    slots: &[WEIGHTS, E2M1, NORMED_INPUT, WHOLE_RESIDUAL, BIAS, GLU, ROUTE_TILE, LANES, FOLD, REDUCE],
};

/// Workgroups that keep a large GPU busy; more than can run at once would repeat what comes before the matrix for nothing.
const ENOUGH: u32 = 384;

/// Constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormMoeUp {
    /// The norm.
    pub norm: RmsNorm,
    /// The choice.
    pub router: Router,
    /// The matrix: of all experts, f32 inputs, routes one by one.
    pub up: MoeUp,
}

/// A row before its norm, and what a router makes of it.
#[derive(Clone, Copy, Debug)]
pub struct Scored {
    /// `[K]` f32.
    pub x: Slice,
    /// The norm's gains, `[K]` bf16.
    pub g: Slice,
    /// What [`Program::linear_add`] left.
    pub shares: Slice,
    /// The router's bias, `[E]` bf16.
    pub bias: Slice,
}

impl Program {
    /// `h = norm(x)`, the router's `scores` of it, the `routes` by them, and `y[a] = glu(w_e h + bias_e)` with `e = experts[a]`,
    /// of one row: the bits of `norm_linear_few`, `router` and `moe_up`. Of a router that [`super::LinearAdd::takes`], and
    /// experts in one part. `h [K]`, `scores [E]`, `y [A, F]` f32.
    pub fn norm_moe_up(
        &mut self,
        (norm, router): (RmsNorm, Router),
        scored: Scored,
        (up, form): (&Experts, Swiglu),
        [h, scores]: [Slice; 2],
        routes: Routes,
        y: Slice,
    ) {
        let [part] = &up.weight.parts[..] else { unreachable!("experts in several parts choose elsewhere") };
        let (format, k, f, e) = (up.weight.format, up.weight.k, up.weight.n / 2, up.weight.experts);
        let Swiglu { a, rows, gate } = form;
        let (input, share, first, count, each) = (InputFormat::F32, a, 0, e, 1);
        let matrix = MoeUp { format, input, k, f, a, share, e, first, count, each, router: Some(router), rows, gate };
        // Each workgroup does all that comes before anew: few of them, but as many as keep a large GPU busy.
        let enough = |height: &u32| (2 * f).is_multiple_of(*height) && 2 * f / height * a >= ENOUGH;
        let height = [48, 32].into_iter().find(enough).unwrap_or(16);
        let [stride, second] = rows.strides(f);
        let op = NormMoeUp { norm, router, up: matrix };
        let launch = Launch::new(Op::NormMoeUp(op), &KERNEL, [(2 * f).div_ceil(height), a, 1])
            .constant("K", k)
            .constant("EPS", norm.eps)
            .constant("E", e)
            .constant("A", a)
            .constant("ALL", u32::from(!router.normalise))
            .constant("F", f)
            .constant("STRIDE", stride)
            .constant("UP", second)
            .constant("ROWS", height)
            .fill("input", "input_normed")
            .fill("residual", "residual_whole")
            .fill("tile", "tile_1x4")
            .weight(format, part)
            .bias(up.bias)
            .gate(gate)
            .read("x", scored.x)
            .read("g", scored.g)
            .read("shares", scored.shares)
            .read("score_bias", scored.bias)
            .write("h", h)
            .write("scores", scores)
            .write("experts", routes.experts)
            .write("weights", routes.weights)
            .write("y", y);
        self.push(launch);
    }
}

impl NormMoeUp {
    pub(crate) fn twin(&self, views: &mut Views<'_>) {
        let (k, a, e) = (self.up.k as usize, self.up.a as usize, self.up.e as usize);
        let w = views.matrix(self.up.format, k);
        let bias = if views.has("bias") { views.bf16("bias") } else { &[] };
        let (x, g) = (&views.f32("x")[..k], views.bf16("g"));
        let shares = (views.f32("shares"), &views.bf16("score_bias")[..e]);
        let (h, scores) = (&mut views.f32_mut("h")[..k], &mut views.f32_mut("scores")[..e]);
        let (experts, weights) = (&mut views.words_mut("experts")[..a], &mut views.f32_mut("weights")[..a]);
        self.reference((&w, bias), (x, g), shares, (h, scores), (experts, weights), views.f32_mut("y"));
    }

    /// `w [E, 2F, K]`, `bias [E, 2F]` or empty, `x`, `g`, `h`: `[K]`, `shares [K / 64, E, 4]`, `score_bias`, `scores`: `[E]`,
    /// `experts`, `weights`: `[A]`, `y [A, F]`.
    pub fn reference(
        &self,
        (w, bias): (&Matrix<'_>, &[half::bf16]),
        (x, g): (&[f32], &[half::bf16]),
        (shares, score_bias): (&[f32], &[half::bf16]),
        (h, scores): (&mut [f32], &mut [f32]),
        (experts, weights): (&mut [u32], &mut [f32]),
        y: &mut [f32],
    ) {
        self.norm.reference(x, g, h);
        let scale = self.norm.scale_of(x);
        for (expert, out) in scores.iter_mut().enumerate() {
            let of_four = shares.chunks_exact(4).skip(expert).step_by(self.up.e as usize).take(x.len().div_ceil(64));
            *out = score(of_four.flatten().copied(), scale, score_bias.get(expert));
        }
        self.router.reference(scores, experts, weights);
        self.up.reference(w, bias, experts, h, y);
    }
}
