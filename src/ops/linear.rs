//! Matrix times rows.

use super::{Input, InputFormat, Matrix, Op, Views, Weight, weight::dot};
use crate::format::Format;
use crate::program::{Launch, Program, Slice};
use crate::shader::{BIAS, BLOCK, E2M1, FOLD, INPUT, Kernel, LANES, TILE, WEIGHTS};

pub(crate) const KERNEL: Kernel = Kernel {
    name: "linear",
    source: include_str!("../../shaders/linear.wgsl"),
    slots: &[WEIGHTS, E2M1, INPUT, BIAS, TILE, LANES, FOLD],
};

/// For many rows, by matrix units.
pub(crate) const MATRIX: Kernel = Kernel {
    name: "linear_matrix",
    source: include_str!("../../shaders/linear_matrix.wgsl"),
    slots: &[BLOCK, WEIGHTS, E2M1, BIAS],
};

/// What a workgroup with matrix units multiplies. It changes no bit.
#[derive(Clone, Copy)]
pub(super) struct Block {
    /// The filling of slot `block`.
    pub(super) file: &'static str,
    /// Rows of weights.
    pub(super) tall: u32,
    /// Rows of input.
    pub(super) wide: u32,
}

impl Block {
    const FEW: Self = Self { file: "block_16", tall: 64, wide: 16 };
    const MANY: Self = Self { file: "block_64", tall: 128, wide: 64 };
    /// With fewer large workgroups much of a GPU would have no work.
    const MANY_GROUPS: u32 = 64;

    /// For tiles of so many routes.
    pub(super) fn of_routes(routes: u32) -> Self {
        if routes == Self::FEW.wide { Self::FEW } else { Self::MANY }
    }

    /// For so many tokens and rows of weights: large ones take less work for each, where there are enough of them.
    fn of_rows(tokens: u32, count: u32) -> Self {
        let [x, y, _] = Self::MANY.grid(tokens, count);
        if tokens <= Self::FEW.wide || x * y < Self::MANY_GROUPS { Self::FEW } else { Self::MANY }
    }

    fn grid(self, tokens: u32, count: u32) -> [u32; 3] {
        [tokens.div_ceil(self.wide), count.div_ceil(self.tall), 1]
    }
}

/// A linear layer: one matrix, or several whose rows follow each other in the output, where their formats or activation
/// scales differ (q, k and v of some checkpoints).
#[derive(Debug)]
pub struct Projection {
    /// The matrices, in the order of the output's columns.
    pub pieces: Vec<Piece>,
    /// Outputs of all.
    pub n: u32,
    /// `[N]` bf16.
    pub bias: Option<Slice>,
}

/// One matrix of a [`Projection`].
#[derive(Debug)]
pub struct Piece {
    /// The matrix.
    pub weight: Weight,
    /// The column of the output where it begins.
    pub first: u32,
    /// The calibrated scale of what it is multiplied with, `[1]` f32 on the device.
    pub input_scale: Option<Slice>,
}

/// Constants of one part of the matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Linear {
    /// How the weight is stored.
    pub format: Format,
    /// How the input is stored.
    pub input: InputFormat,
    /// Inputs.
    pub k: u32,
    /// Outputs of the whole matrix.
    pub n: u32,
    /// First output of the part.
    pub first: u32,
    /// Outputs in the part.
    pub count: u32,
}

impl Program {
    /// `y = w x + bias` by row. `step`: uniform with T; `x`: `[T, K]`, `y`: `[T, N]` f32; `bias`: `[N]` bf16.
    pub fn linear(&mut self, step: Slice, w: &Weight, bias: Option<Slice>, x: impl Into<Input>, y: Slice) {
        self.linear_columns(step, w, [0, w.n], bias, (x.into(), y), false);
    }

    /// `y = w x + bias` by row, through every matrix of a linear layer.
    pub fn projection(&mut self, step: Slice, w: &Projection, x: Slice, y: Slice) {
        for piece in &w.pieces {
            self.linear_piece(step, w, piece, x, y);
        }
    }

    /// One matrix of a [`Projection`], into its columns of `y`.
    pub fn linear_piece(&mut self, step: Slice, w: &Projection, piece: &Piece, x: impl Into<Input>, y: Slice) {
        self.linear_columns(step, &piece.weight, [piece.first, w.n], w.bias, (x.into(), y), false);
    }

    /// The same by matrix units, where the program may take them: not for routers, whose scores decide.
    pub fn linear_by_matrix(&mut self, step: Slice, w: &Projection, piece: &Piece, x: impl Into<Input>, y: Slice) {
        self.linear_columns(step, &piece.weight, [piece.first, w.n], w.bias, (x.into(), y), true);
    }

    fn linear_columns(
        &mut self,
        step: Slice,
        w: &Weight,
        [first, n]: [u32; 2],
        bias: Option<Slice>,
        (x, y): (Input, Slice),
        matrix: bool,
    ) {
        let by_matrix = matrix && self.by_matrix() && x.format() == InputFormat::F32 && w.format.fits_half();
        for part in &w.parts {
            if by_matrix {
                let first = first + part.first;
                let op = Linear { format: w.format, input: x.format(), k: w.k, n, first, count: part.count };
                let block = Block::of_rows(self.tokens, part.count);
                let launch = Launch::new(Op::Linear(op), &MATRIX, block.grid(self.tokens, part.count));
                let launch = launch.fill("block", block.file).matrix_input(x);
                self.push(launch.read("step", step).weight(w.format, part).bias(bias).of_linear(op).update("y", y));
                continue;
            }
            // The tile changes how many sums a workgroup has, not the order of any of them. Of a matrix with few rows
            // many in a workgroup would leave most of a GPU without work; where there are many, groups of lanes have two
            // spans each, so that more workgroups fit.
            let (tile, tokens, rows, spans) = match (self.tokens, part.count) {
                (1, ..512) => ("tile_1x2", 1, 2, 1),
                (1, _) => ("tile_1x2", 1, 8, 1),
                (_, ..512) => ("tile_2x4", 2, 4, 1),
                (2, _) => ("tile_2x4", 2, 16, 1),
                (..=8, ..4096) => ("tile_2x4", 2, 32, 1),
                (..=8, ..16384) => ("tile_2x4", 2, 32, 2),
                (..=8, _) => ("tile_4x4", 4, 32, 2),
                (_, 4096..16384) => ("tile_4x2", 4, 64, 2),
                _ => ("tile_4x4", 4, 64, 2),
            };
            let (input, first) = (x.format(), first + part.first);
            let op = Linear { format: w.format, input, k: w.k, n, first, count: part.count };
            let grid = [self.tokens.div_ceil(tokens), part.count.div_ceil(rows), 1];
            let launch = Launch::new(Op::Linear(op), &KERNEL, grid)
                .of_linear(op)
                .constant("ROWS", rows)
                .constant("SPANS", spans)
                .read("step", step)
                .weight(w.format, part)
                .bias(bias)
                .fill("tile", tile)
                .input(x)
                .update("y", y);
            self.push(launch);
        }
    }
}

impl Launch {
    fn of_linear(self, op: Linear) -> Self {
        self.constant("K", op.k).constant("N", op.n).constant("FIRST", op.first).constant("COUNT", op.count)
    }
}

impl Linear {
    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        let w = views.matrix(self.format, self.k as usize);
        let bias = if views.has("bias") { views.bf16("bias") } else { &[] };
        let x = views.input(self.input, tokens, self.k as usize);
        self.reference(&w, bias, &x, views.f32_mut("y"));
    }

    /// `x [T, K]`, `w [COUNT, K]`, `bias [N]` or empty, `y [T, N]`.
    pub fn reference(&self, w: &Matrix<'_>, bias: &[half::bf16], x: &[f32], y: &mut [f32]) {
        let (n, k, first) = (self.n as usize, self.k as usize, self.first as usize);
        let mut row = vec![0.0; k];
        for i in 0..self.count as usize {
            w.row(i, &mut row);
            let b = bias.get(first + i).map_or(0.0, |b| b.to_f64());
            for (t, x) in x.chunks_exact(k).enumerate() {
                y[t * n + first + i] = (dot(&row, x) + b) as f32;
            }
        }
    }
}
