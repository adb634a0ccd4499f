//! The experts' first matrix (gate and up) and the gated activation.

use super::group::Carried;
use super::{Gate, Group, Input, InputFormat, Matrix, Op, Router, Routing, Views, Weight, linear::Block, weight::dot};
use crate::format::Format;
use crate::program::{Launch, Program, Slice};
use crate::shader::{
    BIAS, BLOCK, E2M1, EXPERT_TILE, FOLD, GLU, INPUT, Kernel, LANES, MATRIX_TILES, ROUTE_TILES, UP_ROUTES, WEIGHTS,
};

pub(crate) const KERNEL: Kernel = Kernel {
    name: "moe_up",
    source: include_str!("../../shaders/moe_up.wgsl"),
    slots: &[WEIGHTS, E2M1, INPUT, BIAS, GLU, UP_ROUTES, ROUTE_TILES, EXPERT_TILE, LANES, FOLD],
};

/// For many rows, by matrix units.
pub(crate) const MATRIX: Kernel = Kernel {
    name: "moe_up_matrix",
    source: include_str!("../../shaders/moe_up_matrix.wgsl"),
    slots: &[BLOCK, MATRIX_TILES, WEIGHTS, E2M1, BIAS, GLU],
};

/// Workgroups that keep a large GPU busy.
const ENOUGH: u32 = 512;

/// One of a layer's two expert matrices: a weight for each expert, and what belongs to it.
#[derive(Debug)]
pub struct Experts {
    /// The matrices.
    pub weight: Weight,
    /// `[E, N]` bf16.
    pub bias: Option<Slice>,
    /// The calibrated scale of what they are multiplied with, on the device.
    pub input_scale: Option<ExpertScales>,
}

/// Calibrated activation scales of a layer's experts.
#[derive(Clone, Copy, Debug)]
pub enum ExpertScales {
    /// `[1]` f32: the same for all.
    Shared(Slice),
    /// `[E]` f32.
    Each(Slice),
}

/// Where gate and up stand among the rows of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateUp {
    /// gate 0, up 0, gate 1, up 1 and so on: gpt-oss.
    Interleaved,
    /// All gates, then all ups.
    Halves,
}

impl GateUp {
    /// From one output's rows to the next one's, and from gate to up, of `f` outputs.
    pub(super) fn strides(self, f: u32) -> [u32; 2] {
        match self {
            Self::Interleaved => [2, 1],
            Self::Halves => [1, f],
        }
    }
}

/// Rows of weights of workgroups that each choose anew: twice as many, where enough workgroups are left.
fn tall_enough(f: u32, tiles: u32, height: u32) -> u32 {
    let enough = (2 * f).div_ceil(2 * height) * tiles >= ENOUGH;
    if enough { 2 * height } else { height }
}

/// Constants of one part of the experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MoeUp {
    /// How the weight is stored.
    pub format: Format,
    /// How the input is stored.
    pub input: InputFormat,
    /// Inputs.
    pub k: u32,
    /// Outputs after the activation.
    pub f: u32,
    /// Experts per token.
    pub a: u32,
    /// Routes that read one row of the input.
    pub share: u32,
    /// Experts of the layer.
    pub e: u32,
    /// First expert of the part.
    pub first: u32,
    /// Experts in the part.
    pub count: u32,
    /// Most routes of a tile.
    pub each: u32,
    /// What chooses the routes, if nothing has yet.
    pub router: Option<Router>,
    /// Where gate and up stand.
    pub rows: GateUp,
    /// The activation.
    pub gate: Gate,
}

/// What the rows of an expert's first matrix mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Swiglu {
    /// Experts per token.
    pub a: u32,
    /// Where gate and up stand.
    pub rows: GateUp,
    /// The activation.
    pub gate: Gate,
}

impl Swiglu {
    /// gpt-oss's: rows interleaved, clamped.
    pub fn gpt_oss(a: u32, [limit, alpha]: [f32; 2]) -> Self {
        Self { a, rows: GateUp::Interleaved, gate: Gate::Clamped { limit, alpha } }
    }
}

impl Program {
    /// `y[t,a] = glu(w_e x + bias_e)` with `e = experts[t,a]`. `x`: `[T, K]`, or `[T, A, K]` where each route has a row of
    /// its own (`share` 1); `y`: `[T, A, F]` f32.
    pub fn moe_up(
        &mut self,
        up: &Experts,
        form: Swiglu,
        routing: impl Into<Routing>,
        (x, share): (impl Into<Input>, u32),
        y: Slice,
    ) {
        let (x, routing, k, f) = (x.into(), routing.into(), up.weight.k, up.weight.n / 2);
        let Swiglu { a, rows, gate } = form;
        let Carried { tile, tiles, rows: height, spans } = routing.carried(self.tokens, a, up.weight.experts);
        let height = if matches!(routing, Routing::Chosen(..)) { tall_enough(f, tiles, height) } else { height };
        let (each, matrix) = (routing.routes(), matches!(routing, Routing::ByMatrix(..)));
        let router = if let Routing::Chosen(router, ..) = routing { Some(router) } else { None };
        let [stride, second] = rows.strides(f);
        for part in &up.weight.parts {
            let (format, input, first, count) = (up.weight.format, x.format(), part.first, part.count);
            let op =
                MoeUp { format, input, k, f, a, share, e: up.weight.experts, first, count, each, router, rows, gate };
            let launch = match matrix {
                true => {
                    let block = Block::of_routes(each);
                    let grid = [tiles, (2 * f).div_ceil(block.tall), 1];
                    Launch::new(Op::MoeUp(op), &MATRIX, grid).fill("block", block.file).matrix_input(x)
                }
                false => {
                    let grid = [(2 * f).div_ceil(height), tiles, 1];
                    Launch::new(Op::MoeUp(op), &KERNEL, grid).input(x).carried(tile, [height, spans])
                }
            };
            let launch = launch
                .constant("K", k)
                .constant("F", f)
                .constant("SHARE", share)
                .constant("FIRST", first)
                .constant("COUNT", count)
                .constant("STRIDE", stride)
                .constant("UP", second)
                .weight(format, part)
                .bias(up.bias)
                .gate(gate)
                .routes(routing)
                .update("y", y);
            self.push(launch);
        }
    }
}

impl MoeUp {
    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        let w = views.matrix(self.format, self.k as usize);
        let routes = tokens * self.a as usize;
        if let Some(router) = self.router {
            let scores = &views.f32("scores")[..tokens * router.e as usize];
            let (experts, weights) = (views.words_mut("experts"), views.f32_mut("weights"));
            router.reference(scores, experts, weights);
            views.add_read("experts", experts);
        }
        let experts = views.experts(Group { e: self.e, a: self.a, routes: self.each }, tokens);
        let bias = if views.has("bias") { views.bf16("bias") } else { &[] };
        let x = views.input(self.input, routes / self.share as usize, self.k as usize);
        self.reference(&w, bias, &experts, &x, views.f32_mut("y"));
    }

    /// `w [COUNT, 2F, K]`, `bias [E, 2F]` or empty, `experts [T, A]`, `x [T A / SHARE, K]`, `y [T, A, F]`.
    pub fn reference(&self, w: &Matrix<'_>, bias: &[half::bf16], experts: &[u32], x: &[f32], y: &mut [f32]) {
        let (k, f) = (self.k as usize, self.f as usize);
        let mut row = vec![0.0; k];
        for (route, &expert) in experts.iter().enumerate() {
            if !(self.first..self.first + self.count).contains(&expert) {
                continue;
            }
            let x = &x[route / self.share as usize * k..][..k];
            let mut output = |r: usize| {
                w.row((expert - self.first) as usize * 2 * f + r, &mut row);
                dot(&row, x) + bias.get(expert as usize * 2 * f + r).map_or(0.0, |b| b.to_f64())
            };
            for i in 0..f {
                let (gate, up) = match self.rows {
                    GateUp::Interleaved => (output(2 * i), output(2 * i + 1)),
                    GateUp::Halves => (output(i), output(f + i)),
                };
                y[route * f + i] = self.gate.of(gate, up) as f32;
            }
        }
    }
}
