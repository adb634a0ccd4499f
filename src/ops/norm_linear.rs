//! Adding, normalising, multiplying, and perhaps rotating, in one launch: what a decode step does most. Of one row by any
//! matrix, of any number of rows by a router's.

use super::linear::{Linear, Projection};
use super::{AddNorm, Addend, InputFormat, Matrix, Op, RmsNorm, Rope, Rotated, Views};
use crate::format::Format;
use crate::program::{Launch, Program, Slice};
use crate::shader::{
    ADDEND, APPEND, BIAS, E2M1, FOLD, Kernel, LANES, NORMED_INPUT, OUTPUT, REDUCE, RESIDUAL, ROW_TILE, WEIGHTS,
};

pub(crate) const KERNEL: Kernel = Kernel {
    name: "norm_linear",
    source: include_str!("../../shaders/norm_linear.wgsl"),
    slots: &[WEIGHTS, E2M1, NORMED_INPUT, RESIDUAL, ADDEND, BIAS, OUTPUT, APPEND, ROW_TILE, LANES, FOLD, REDUCE],
};

/// For few rows of weights.
pub(crate) const FEW: Kernel = Kernel {
    name: "norm_linear_few",
    source: include_str!("../../shaders/norm_linear_few.wgsl"),
    slots: &[BIAS, LANES, REDUCE],
};

/// Rows of weights of a workgroup.
const ROWS: u32 = 16;

/// What brings a row to unit root mean square.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Normed {
    /// The norm alone.
    Alone(RmsNorm),
    /// Something is added before.
    Added(AddNorm),
}

/// Constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormLinear {
    /// What is added, if anything, and the norm.
    pub norm: Normed,
    /// The matrix: all of its rows, f32 inputs.
    pub linear: Linear,
    /// What the result is rotated by, if it is queries, keys and values.
    pub rope: Option<Rope>,
}

/// Constants of few rows of bf16 weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormLinearFew {
    /// The norm, after the addition.
    pub norm: RmsNorm,
    /// Rows of weights.
    pub n: u32,
}

impl Program {
    /// `sum = x + addend; h = norm(sum); y = w h + bias`, of one row; `h = norm(x)` where nothing is `added`, which comes with
    /// where the sum goes. `y` is rotated and appended as by [`Program::rope`] where
    /// `rotated` says so, and keys and values are not written to it. The projection is one matrix in one
    /// part, and so is the cache.
    pub fn norm_linear(
        &mut self,
        norm: RmsNorm,
        (x, added, g): (Slice, Option<(Addend, Slice)>, Slice),
        h: Slice,
        w: &Projection,
        rotated: Option<Rotated<'_>>,
        y: Slice,
    ) {
        let ([piece], [part]) = (&w.pieces[..], &w.pieces[0].weight.parts[..]) else {
            unreachable!("`NormLinear::takes` was asked")
        };
        let (format, k, n) = (piece.weight.format, piece.weight.k, w.n);
        let op = NormLinear {
            norm: match added {
                None => Normed::Alone(norm),
                Some((addend, _)) => Normed::Added(AddNorm { norm, routes: addend.routes() }),
            },
            linear: Linear { format, input: InputFormat::F32, k, n, first: 0, count: n },
            rope: rotated.map(|rotated| rotated.op(0)),
        };
        let launch = Launch::new(Op::NormLinear(op), &KERNEL, [n.div_ceil(ROWS), 1, 1])
            .constant("K", k)
            .constant("N", n)
            .constant("EPS", norm.eps)
            .constant("ROWS", ROWS)
            .fill("input", "input_normed")
            .fill("tile", "tile_1x2")
            .weight(format, part)
            .bias(w.bias)
            .read("x", x)
            .read("g", g)
            .write("h", h)
            .update("y", y);
        let launch = match added {
            None => launch.fill("residual", "residual_whole"),
            Some((addend, sum)) => launch.fill("residual", "residual_added").addend(addend).write("sum", sum),
        };
        let launch = match rotated {
            None => launch.fill("output", "output_rows"),
            Some(rotated) => launch.fill("output", "output_rotated").rotated(rotated, 0),
        };
        self.push(launch);
    }

    /// `sum = x + addend; h = norm(sum); y = w h + bias` by row, where the matrix is in bf16 and has few rows. It is not to the bit
    /// what [`Program::norm_linear`] gives: the norm comes last. `x`, `addend`, `sum`, `h`: `[T, K]`, `y`: `[T, N]` f32; `g`: `[K]` bf16.
    pub fn norm_linear_few(
        &mut self,
        norm: RmsNorm,
        (x, addend, g): (Slice, Slice, Slice),
        [sum, h]: [Slice; 2],
        w: &Projection,
        y: Slice,
    ) {
        let ([piece], [part]) = (&w.pieces[..], &w.pieces[0].weight.parts[..]) else {
            unreachable!("`NormLinear::takes_few` was asked")
        };
        let (k, n) = (piece.weight.k, w.n);
        let launch = Launch::new(Op::NormLinearFew(NormLinearFew { norm, n }), &FEW, [n.div_ceil(2), self.tokens, 1])
            .constant("K", k)
            .constant("N", n)
            .constant("EPS", norm.eps)
            .read("codes", part.codes)
            .bias(w.bias)
            .read("x", x)
            .read("addends", addend)
            .read("g", g)
            .write("sum", sum)
            .write("h", h)
            .write("y", y);
        self.push(launch);
    }
}

impl NormLinear {
    /// Storage buffers that a launch may bind.
    pub const BINDINGS: u32 = 16;

    /// Whether this projection can be multiplied so.
    pub fn takes(w: &Projection) -> bool {
        w.pieces.len() == 1 && w.pieces[0].weight.parts.len() == 1
    }

    /// Whether [`Program::norm_linear_few`] does. Scales that round would be products that a compiler may join with a sum.
    pub fn takes_few(w: &Projection) -> bool {
        Self::takes(w) && w.pieces[0].weight.format == Format::Bf16
    }

    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        let (k, n) = (self.linear.k as usize, self.linear.n as usize);
        let (row, out) = (tokens * k, tokens * n);
        let w = views.matrix(self.linear.format, k);
        let bias = if views.has("bias") { views.bf16("bias") } else { &[] };
        let x = &views.f32("x")[..row];
        let weights = if views.has("route_weights") { views.f32("route_weights") } else { &[] };
        let addends = if views.has("addends") { views.f32("addends") } else { &[] };
        let sum = if views.has("sum") { views.f32_mut("sum") } else { &mut [] };
        let (g, h, y) = (views.bf16("g"), &mut views.f32_mut("h")[..row], &mut views.f32_mut("y")[..out]);
        let Some(rope) = self.rope else {
            self.reference((&w, bias), (x, addends, weights), g, [sum, h, y]);
            return;
        };
        let mut qkv = vec![0.0; n];
        self.reference((&w, bias), (x, addends, weights), g, [sum, h, &mut qkv]);
        let rows = &bytemuck::cast_slice(views.words("rows"))[..1];
        let (table, pages) = (views.f32("table"), views.words("pages"));
        rope.reference(rows, table, pages, &mut qkv, views.words_mut("keys"), views.words_mut("values"));
        let queries = (rope.h * rope.dh) as usize;
        y[..queries].copy_from_slice(&qkv[..queries]);
    }

    /// What comes before a rotation. `w [N, K]`, `bias [N]` or empty, `x`, `sum`, `h`: `[T, K]`; `g [K]`; `addends`: `[T, K]`, or
    /// `[T, A, K]` with their `weights [T, A]`; `y [T, N]`. Where nothing is added, `addends`, `weights` and `sum` are not looked at.
    pub fn reference(
        &self,
        (w, bias): (&Matrix<'_>, &[half::bf16]),
        (x, addends, weights): (&[f32], &[f32], &[f32]),
        g: &[half::bf16],
        [sum, h, y]: [&mut [f32]; 3],
    ) {
        match self.norm {
            Normed::Alone(norm) => norm.reference(x, g, h),
            Normed::Added(norm) => norm.reference(x, addends, weights, g, sum, h),
        }
        self.linear.reference(w, bias, h, y);
    }
}

impl NormLinearFew {
    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        let (row, out) = (tokens * self.norm.d as usize, tokens * self.n as usize);
        let w = views.bf16("codes");
        let bias = if views.has("bias") { views.bf16("bias") } else { &[] };
        let (x, addends, g) = (&views.f32("x")[..row], &views.f32("addends")[..row], views.bf16("g"));
        let [sum, h] = ["sum", "h"].map(|name| &mut views.f32_mut(name)[..row]);
        self.reference((w, bias), (x, addends), g, [sum, h, &mut views.f32_mut("y")[..out]]);
    }

    /// `w [N, K]`, `bias [N]` or empty, `x`, `addends`, `sum`, `h`: `[T, K]`; `g [K]`; `y [T, N]`.
    pub fn reference(
        &self,
        (w, bias): (&[half::bf16], &[half::bf16]),
        (x, addends): (&[f32], &[f32]),
        g: &[half::bf16],
        [sum, h, y]: [&mut [f32]; 3],
    ) {
        let (d, n) = (self.norm.d as usize, self.n as usize);
        AddNorm { norm: self.norm, routes: None }.reference(x, addends, &[], g, sum, h);
        for (sum, y) in sum.chunks_exact(d).zip(y.chunks_exact_mut(n)) {
            let scale = self.norm.scale_of(sum);
            for (i, y) in y.iter_mut().enumerate() {
                let w = &w[i * d..][..d];
                let shares = (0..d / SIXTEEN).map(|at| share(w, sum, g, at));
                *y = score(shares, scale, bias.get(i));
            }
        }
    }
}

/// Elements of a share.
const SIXTEEN: usize = 16;

/// What sixteen `at` of a row gives to the score of a row of weights, before the norm: a number of its own, in f32.
pub(super) fn share(w: &[half::bf16], row: &[f32], g: &[half::bf16], at: usize) -> f32 {
    let own = at * SIXTEEN..(at + 1) * SIXTEEN;
    own.map(|d| w[d].to_f64() * f64::from(row[d]) * g[d].to_f64()).sum::<f64>() as f32
}

/// The score of a row of weights: its shares in order, times what norms the row.
pub(super) fn score(shares: impl Iterator<Item = f32>, scale: f64, bias: Option<&half::bf16>) -> f32 {
    (shares.map(f64::from).sum::<f64>() * scale + bias.map_or(0.0, |b| b.to_f64())) as f32
}
