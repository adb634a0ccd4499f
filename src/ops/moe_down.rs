//! The experts' second matrix.

use super::group::Carried;
use super::{
    Add, Experts, Group, Input, InputFormat, Matrix, MoeScatter, Op, Routes, Routing, Views, linear::Block, weight::dot,
};
use crate::format::Format;
use crate::program::{Launch, Program, Slice};
use crate::shader::{
    BIAS, BLOCK, E2M1, EXPERT_TILE, FOLD, INPUT, Kernel, LANES, MATRIX_TILES, ROUTE_TILE, ROUTE_TILES, ROUTES, WEIGHTS,
};

pub(crate) const KERNEL: Kernel = Kernel {
    name: "moe_down",
    source: include_str!("../../shaders/moe_down.wgsl"),
    slots: &[WEIGHTS, E2M1, INPUT, BIAS, ROUTES, ROUTE_TILES, EXPERT_TILE, LANES, FOLD],
};

/// For many rows, by matrix units.
pub(crate) const MATRIX: Kernel = Kernel {
    name: "moe_down_matrix",
    source: include_str!("../../shaders/moe_down_matrix.wgsl"),
    slots: &[BLOCK, MATRIX_TILES, WEIGHTS, E2M1, BIAS],
};

/// With what follows: the weighted sum, and the sum with the residual stream.
pub(crate) const ADD: Kernel = Kernel {
    name: "moe_down_add",
    source: include_str!("../../shaders/moe_down_add.wgsl"),
    slots: &[WEIGHTS, E2M1, BIAS, ROUTE_TILE, LANES, FOLD],
};

/// Rows of weights of a workgroup that adds.
const ADDED_ROWS: u32 = 4;

/// Constants of one part of the experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MoeDown {
    /// How the weight is stored.
    pub format: Format,
    /// How the input is stored.
    pub input: InputFormat,
    /// Inputs.
    pub k: u32,
    /// Outputs.
    pub d: u32,
    /// Experts per token.
    pub a: u32,
    /// Experts of the layer.
    pub e: u32,
    /// First expert of the part.
    pub first: u32,
    /// Experts in the part.
    pub count: u32,
    /// Most routes of a tile.
    pub each: u32,
}

/// Constants of bringing a token's routes back into the residual stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MoeDownAdd(pub MoeDown);

impl Program {
    /// `y[t,a] = w_e x[t,a] + bias_e` with `e = experts[t,a]`. `x`: `[T, A, K]`, `y`: `[T, A, D]` f32.
    pub fn moe_down(&mut self, down: &Experts, a: u32, routing: impl Into<Routing>, x: impl Into<Input>, y: Slice) {
        let (x, routing, k, d) = (x.into(), routing.into(), down.weight.k, down.weight.n);
        let Carried { tile, tiles, rows, spans } = routing.carried(self.tokens, a, down.weight.experts);
        let (each, matrix) = (routing.routes(), matches!(routing, Routing::ByMatrix(..)));
        for part in &down.weight.parts {
            let (format, input) = (down.weight.format, x.format());
            let (e, first, count) = (down.weight.experts, part.first, part.count);
            let op = MoeDown { format, input, k, d, a, e, first, count, each };
            let launch = match matrix {
                true => {
                    let block = Block::of_routes(each);
                    let grid = [tiles, d.div_ceil(block.tall), 1];
                    Launch::new(Op::MoeDown(op), &MATRIX, grid).fill("block", block.file).matrix_input(x)
                }
                false => {
                    let grid = [d.div_ceil(rows), tiles, 1];
                    Launch::new(Op::MoeDown(op), &KERNEL, grid).input(x).carried(tile, [rows, spans])
                }
            };
            let launch = launch
                .constant("K", k)
                .constant("D", d)
                .constant("FIRST", op.first)
                .constant("COUNT", op.count)
                .weight(op.format, part)
                .bias(down.bias)
                .routes(routing)
                .update("y", y);
            self.push(launch);
        }
    }

    /// `y[t] = residual[t] + sum_a weights[t,a] (w_e x[t,a] + bias_e)` with `e = experts[t,a]`: the bits of `moe_down`,
    /// `moe_scatter` and `add`. `x`: `[T, A, K]`, `residual`, `y`: `[T, D]` f32. Of experts that [`MoeDownAdd::takes`].
    pub fn moe_down_add(&mut self, down: &Experts, a: u32, routes: Routes, x: Slice, [residual, y]: [Slice; 2]) {
        let [part] = &down.weight.parts[..] else { unreachable!("`MoeDownAdd::takes` was asked") };
        let (format, k, d, e) = (down.weight.format, down.weight.k, down.weight.n, down.weight.experts);
        let op = MoeDown { format, input: InputFormat::F32, k, d, a, e, first: 0, count: e, each: 1 };
        let launch = Launch::new(Op::MoeDownAdd(MoeDownAdd(op)), &ADD, [d.div_ceil(ADDED_ROWS), self.tokens, 1])
            .constant("K", k)
            .constant("D", d)
            .constant("A", a)
            .constant("E", e)
            .fill("tile", "tile_1x4")
            .weight(format, part)
            .bias(down.bias)
            .read("experts", routes.experts)
            .read("route_weights", routes.weights)
            .read("x", x)
            .read("residual", residual)
            .write("y", y);
        self.push(launch);
    }
}

impl MoeDownAdd {
    /// Whether [`Program::moe_down_add`] can do it.
    pub fn takes(down: &Experts, a: u32) -> bool {
        down.weight.parts.len() == 1 && a <= 8
    }

    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        let op = self.0;
        let (k, d, a) = (op.k as usize, op.d as usize, op.a as usize);
        let w = views.matrix(op.format, k);
        let bias = if views.has("bias") { views.bf16("bias") } else { &[] };
        let (experts, weights) = (&views.words("experts")[..tokens * a], &views.f32("route_weights")[..tokens * a]);
        let (x, residual) = (&views.f32("x")[..tokens * a * k], &views.f32("residual")[..tokens * d]);
        self.reference((&w, bias), (experts, weights), x, residual, &mut views.f32_mut("y")[..tokens * d]);
    }

    /// `w [E, D, K]`, `bias [E, D]` or empty, `experts`, `weights`: `[T, A]`, `x [T, A, K]`, `residual`, `y`: `[T, D]`.
    pub fn reference(
        &self,
        (w, bias): (&Matrix<'_>, &[half::bf16]),
        (experts, weights): (&[u32], &[f32]),
        x: &[f32],
        residual: &[f32],
        y: &mut [f32],
    ) {
        let op = self.0;
        let (mut routes, mut sum) = (vec![0.0; experts.len() * op.d as usize], vec![0.0; y.len()]);
        op.reference(w, bias, experts, x, &mut routes);
        MoeScatter { a: op.a, d: op.d }.reference(weights, &routes, &mut sum);
        Add { d: op.d }.reference(residual, &sum, y);
    }
}

impl MoeDown {
    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        let w = views.matrix(self.format, self.k as usize);
        let experts = views.experts(Group { e: self.e, a: self.a, routes: self.each }, tokens);
        let bias = if views.has("bias") { views.bf16("bias") } else { &[] };
        let x = views.input(self.input, experts.len(), self.k as usize);
        self.reference(&w, bias, &experts, &x, views.f32_mut("y"));
    }

    /// `w [COUNT, D, K]`, `bias [E, D]` or empty, `experts [T, A]`, `x [T, A, K]`, `y [T, A, D]`.
    pub fn reference(&self, w: &Matrix<'_>, bias: &[half::bf16], experts: &[u32], x: &[f32], y: &mut [f32]) {
        let (k, d) = (self.k as usize, self.d as usize);
        let mut row = vec![0.0; k];
        for (route, &expert) in experts.iter().enumerate() {
            if !(self.first..self.first + self.count).contains(&expert) {
                continue;
            }
            let x = &x[route * k..][..k];
            for i in 0..d {
                w.row((expert - self.first) as usize * d + i, &mut row);
                y[route * d + i] =
                    (dot(&row, x) + bias.get(expert as usize * d + i).map_or(0.0, |b| b.to_f64())) as f32;
            }
        }
    }
}
