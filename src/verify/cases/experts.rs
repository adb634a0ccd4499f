//! The cases of experts: the choice, the routes by expert, both matrices, and the sum.

use super::{BY_MATRIX, Case, EPS, FORMATS, Output, case, columns, pick, program, rows, sum_of};
use crate::error::Result;
use crate::format::Format;
use crate::ops::{
    ChosenGroup, Gate, GateUp, Group, LinearAdd, MoeScatter, Piece, Projection, RmsNorm, Router, Routes, Routing,
    Scored, Swiglu,
};
use crate::program::Program;
use crate::verify::bench::{Bench, Random};
use crate::verify::kernels::ROWS;

/// The experts of each token: `a` different ones of `e`, in no order.
fn chosen(random: &mut Random, e: usize, a: usize) -> Vec<u32> {
    (0..ROWS).flat_map(|_| random.shuffled(e).into_iter().take(a).map(|e| e as u32).collect::<Vec<_>>()).collect()
}

pub(super) fn router(normalise: bool) -> Case {
    let (e, a) = (100, 4);
    case(format!("normalised: {normalise}"), 16.0 * EPS, move |b, which| {
        let mut scores = Random(e as u64).f32s(ROWS * e);
        // Ties, within the chosen and across the border.
        scores.iter_mut().step_by(3).for_each(|s| *s = (*s * 2.0).round() / 2.0);
        let scores = b.input(&pick(&scores, e, which))?;
        let routes = Routes { experts: b.output(which.len() * a)?, weights: b.output(which.len() * a)? };
        let mut p = program(which.len());
        p.router(Router { e: e as u32, a: a as u32, normalise }, scores, routes);
        Ok((p, vec![Output::exact(routes.experts, a), Output::near(routes.weights, a)]))
    })
}

pub(super) fn group((e, a, routes): (usize, usize, u32)) -> Case {
    let op = Group { e: e as u32, a: a as u32, routes };
    let tiles = case(format!("E={e} A={a}, tiles of {routes}"), 0.0, move |b, which| {
        let experts = b.input(&pick(&chosen(&mut Random(e as u64), e, a), a, which))?;
        let words = op.tiles(which.len() as u32) as usize * op.tile_bytes() as usize / 4;
        let (tiles, step) = (b.output(words)?, b.step(which.len())?);
        let mut p = program(which.len());
        p.group(op, step, experts, tiles);
        Ok((p, vec![Output::exact(tiles, 0).whole()]))
    });
    Case { by_row: false, ..tiles }
}

/// The choice and the routes by expert in one launch. What a row is given does not follow its neighbours; its place in the tiles
/// does.
pub(super) fn chosen_group(by_row: bool, tile: u32) -> Case {
    let (e, a) = (15usize, 4usize);
    let router = Router { e: e as u32, a: a as u32, normalise: true };
    let group = Group { e: e as u32, a: a as u32, routes: tile };
    let what = if by_row { "chosen on the way" } else { "their tiles" };
    let chosen = case(format!("E={e} A={a}, tiles of {tile}, {what}"), 16.0 * EPS, move |b, which| {
        let scores = b.input(&pick(&Random(7).f32s(ROWS * e), e, which))?;
        let routes = Routes { experts: b.output(which.len() * a)?, weights: b.output(which.len() * a)? };
        let words = group.tiles(which.len() as u32) as usize * group.tile_bytes() as usize / 4;
        let (tiles, step) = (b.output(words)?, b.step(which.len())?);
        let mut p = program(which.len());
        p.choose_and_group(ChosenGroup { router, group }, step, scores, routes, tiles);
        let outputs = match by_row {
            true => vec![Output::exact(routes.experts, a), Output::near(routes.weights, a)],
            false => vec![Output::exact(tiles, 0).whole()],
        };
        Ok((p, outputs))
    });
    Case { by_row, ..chosen }
}

/// How experts take routes.
#[derive(Clone, Copy, PartialEq)]
enum How {
    /// One by one in steps of few rows, grouped in others, and the first matrix of a row alone chooses itself: as a model
    /// does it.
    Usual,
    Matrix,
}

/// One of a layer's two expert matrices.
#[derive(Clone, Copy)]
struct Form {
    format: Format,
    /// The second matrix.
    second: bool,
    routing: How,
    /// Quantised rows.
    staged: bool,
    /// Gates before ups and SiLU, not interleaved and clamped.
    halves: bool,
    /// Every route of the first matrix reads a row of its own.
    spread: bool,
    bias: bool,
    /// Inputs.
    k: usize,
}

impl Form {
    fn new(format: Format, second: bool) -> Self {
        // Both activations and both kinds of bias, some formats with one and some with the other.
        let (halves, bias) = (format.has_row_scale(), !format.has_row_scale());
        Self { format, second, routing: How::Usual, staged: false, halves, spread: false, bias, k: 352 }
    }
}

pub(super) fn moe(second: bool) -> Vec<Case> {
    let mut all: Vec<Case> = FORMATS.into_iter().map(|format| moe_case(Form::new(format, second))).collect();
    let nvfp4 = Form { staged: true, ..Form::new(Format::Nvfp4, second) };
    all.push(moe_case(nvfp4));
    all.push(moe_case(Form { spread: true, halves: false, ..nvfp4 }));
    // More spans of columns than slots for their sums, with 8 lanes and with 32.
    all.extend([Format::Mxfp4, Format::Nvfp4].map(|format| moe_case(Form { k: 4640, ..Form::new(format, second) })));
    all
}

/// From attention's output to the experts' first matrix: of one row in two launches, of several in four.
pub(super) fn linear_add(format: Format, d: usize, biased: bool) -> Case {
    let (e, a, d, k, f) = (9, 3, columns(format, d), columns(format, 96), if format.is_fp4() { 16 } else { 13 });
    case(format!("{format} E={e} A={a} D={d} K={k} F={f}"), 8.0 * sum_of(d + k), move |b, which| {
        let mut random = Random((d * k) as u64);
        let out = b.matrix(&mut random, format, [d, k])?;
        let bias = if biased { Some(b.input(&random.bf16s(d))?) } else { None };
        let out = Projection { pieces: vec![Piece { weight: out, first: 0, input_scale: None }], n: d as u32, bias };
        let router = b.matrix(&mut random, Format::Bf16, [e, d])?;
        let bias = b.input(&random.bf16s(e + 1))?;
        let pieces = vec![Piece { weight: router, first: 0, input_scale: None }];
        let router = Projection { pieces, n: e as u32, bias: Some(bias) };
        let mut up = b.experts(&mut random, format, [e, 2 * f, d])?;
        up.bias = up.bias.filter(|_| biased);
        let (x, residual) = (random.f32s(ROWS * k), random.f32s(ROWS * d));
        let (x, residual) = (b.input(&pick(&x, k, which))?, b.input(&pick(&residual, d, which))?);
        let g = b.input(&random.bf16s(d))?;
        let t = which.len();
        let [delta, sum, h] = [b.output(t * d)?, b.output(t * d)?, b.output(t * d)?];
        let (scores, y) = (b.output(t * e)?, b.output(t * a * f)?);
        let routes = Routes { experts: b.output(t * a)?, weights: b.output(t * a)? };
        let norm = RmsNorm { d: d as u32, eps: 1e-5 };
        let choice = Router { e: e as u32, a: a as u32, normalise: biased };
        let form = match biased {
            true => Swiglu::gpt_oss(a as u32, [7.0, 1.702]),
            false => Swiglu { a: a as u32, rows: GateUp::Halves, gate: Gate::Silu },
        };
        let mut p = program(t);
        if t == 1 && b.fuses() {
            let shares = b.output(LinearAdd::share_words(d as u32, e as u32))?;
            p.linear_add(&out, [x, residual], (g, &router), [delta, sum, shares]);
            let scored = Scored { x: sum, g, shares, bias };
            p.norm_moe_up((norm, choice), scored, (&up, form), [h, scores], routes, y);
        } else {
            let step = b.step(t)?;
            p.projection(step, &out, x, delta);
            p.norm_linear_few(norm, (residual, delta, g), [sum, h], &router, scores);
            p.router(choice, scores, routes);
            p.moe_up(&up, form, Routing::Each(routes.experts), (h, a as u32), y);
        }
        [out, router].into_iter().flat_map(|w| w.pieces).for_each(|piece| b.keep(piece.weight));
        b.keep(up.weight);
        let rows = [(delta, d), (sum, d), (h, d), (scores, e), (routes.weights, a), (y, a * f)];
        let near = rows.into_iter().map(|(slice, width)| Output::near(slice, width));
        Ok((p, near.chain([Output::exact(routes.experts, a)]).collect()))
    })
}

/// The end of a layer: of one row in one launch, of several in three.
pub(super) fn moe_down_add(format: Format, bias: bool) -> Case {
    let (e, a, d, k) = (6, 3, if format.is_fp4() { 32 } else { 35 }, columns(format, 352));
    case(format!("{format} E={e} A={a} D={d} K={k}"), 4.0 * sum_of(k + a), move |b, which| {
        let mut random = Random((d * k) as u64);
        let mut experts = b.experts(&mut random, format, [e, d, k])?;
        experts.bias = experts.bias.filter(|_| bias);
        let (chosen, weights) = (pick(&chosen(&mut random, e, a), a, which), pick(&random.f32s(ROWS * a), a, which));
        let (x, residual) = (random.f32s(ROWS * a * k), random.f32s(ROWS * d));
        let (x, residual) = (b.input(&pick(&x, a * k, which))?, b.input(&pick(&residual, d, which))?);
        let routes = Routes { experts: b.input(&chosen)?, weights: b.input(&weights)? };
        let t = which.len();
        let (each, sum, y) = (b.output(t * a * d)?, b.output(t * d)?, b.output(t * d)?);
        let mut p = program(t);
        if t == 1 && b.fuses() {
            p.moe_down_add(&experts, a as u32, routes, x, [residual, y]);
        } else {
            p.moe_down(&experts, a as u32, routes.experts, x, each);
            p.moe_scatter(MoeScatter { a: a as u32, d: d as u32 }, routes, each, sum);
            p.add(d as u32, residual, sum, y);
        }
        b.keep(experts.weight);
        Ok((p, vec![Output::near(y, d)]))
    })
}

pub(super) fn moe_by_matrix(format: Format, second: bool) -> Case {
    moe_case(Form { routing: How::Matrix, ..Form::new(format, second) })
}

fn moe_case(form: Form) -> Case {
    let (e, a, format) = (6, 3, form.format);
    // FP4 fills its workgroups, the others end within one.
    let n = match (format.is_fp4() && !form.staged, form.second) {
        (false, false) => 13,
        (false, true) => 35,
        (true, false) => 16,
        (true, true) => 64,
    };
    let k = columns(format, form.k);
    let tolerance = match (form.routing, form.staged) {
        (How::Matrix, _) => BY_MATRIX,
        (_, true) => 2e-5,
        // The activation multiplies gate by up: twice the relative error of a sum.
        (_, false) => 2.0 * sum_of(k),
    };
    let what = format!("{format} E={e} A={a} N={n} K={k}{}", if form.staged { ", quantised rows" } else { "" });
    case(what, tolerance, move |b, which| {
        let mut random = Random((n * k + e) as u64);
        let mut experts = b.experts(&mut random, format, [e, if form.second { n } else { 2 * n }, k])?;
        experts.bias = experts.bias.filter(|_| form.bias);
        let routes = pick(&chosen(&mut random, e, a), a, which);
        let each = if form.second || form.spread { a } else { 1 };
        let x = pick(&random.f32s(ROWS * each * k), each * k, which);
        let mut p = program(which.len()).with_matrix(form.routing == How::Matrix);
        let chooses = !form.second && !form.staged && form.routing == How::Usual && which.len() == 1 && b.fuses();
        let routing = match chooses {
            true => choosing(b, [e, a], &routes)?,
            false => routing(b, &mut p, [e, a], &routes, form.routing)?,
        };
        let x = rows(b, &mut p, &x, k, form.staged)?;
        let y = b.output(which.len() * a * n)?;
        if form.second {
            p.moe_down(&experts, a as u32, routing, x, y);
        } else {
            let swiglu = match form.halves {
                true => Swiglu { a: a as u32, rows: GateUp::Halves, gate: Gate::Silu },
                false => Swiglu::gpt_oss(a as u32, [7.0, 1.702]),
            };
            p.moe_up(&experts, swiglu, routing, (x, (a / each) as u32), y);
        }
        b.keep(experts.weight);
        Ok((p, vec![Output::near(y, a * n)]))
    })
}

/// Scores of which these routes are the largest.
fn choosing(b: &mut Bench<'_>, [e, a]: [usize; 2], routes: &[u32]) -> Result<Routing> {
    let mut scores = vec![-1.0f32; e];
    routes.iter().enumerate().for_each(|(rank, expert)| scores[*expert as usize] = 9.0 - rank as f32);
    let to = Routes { experts: b.output(a)?, weights: b.output(a)? };
    Ok(Routing::Chosen(Router { e: e as u32, a: a as u32, normalise: true }, b.input(&scores)?, to))
}

fn routing(b: &mut Bench<'_>, p: &mut Program, [e, a]: [usize; 2], routes: &[u32], how: How) -> Result<Routing> {
    let experts = b.input(routes)?;
    if how == How::Usual && routes.len() <= 2 * a {
        return Ok(Routing::Each(experts));
    }
    let of_tile = match (how, routes.len() / a) {
        (How::Matrix, ..=16) => 16,
        (How::Matrix, _) => 64,
        (How::Usual, ..8) => 2,
        (How::Usual, _) => 4,
    };
    let op = Group { e: e as u32, a: a as u32, routes: of_tile };
    let words = op.tiles(p.tokens()) as usize * op.tile_bytes() as usize / 4;
    let (step, tiles) = (b.step(routes.len() / a)?, b.output(words)?);
    p.group(op, step, experts, tiles);
    Ok(if how == How::Matrix { Routing::ByMatrix(tiles, of_tile) } else { Routing::Grouped(tiles, of_tile) })
}

pub(super) fn moe_scatter() -> Case {
    let (a, d) = (3, 67);
    case("moe_scatter", sum_of(a), move |b, which| {
        let mut random = Random(d as u64);
        let (weights, x) = (random.f32s(ROWS * a), random.f32s(ROWS * a * d));
        let (weights, x) = (b.input(&pick(&weights, a, which))?, b.input(&pick(&x, a * d, which))?);
        let y = b.output(which.len() * d)?;
        let mut p = program(which.len());
        p.moe_scatter(MoeScatter { a: a as u32, d: d as u32 }, Routes { experts: weights, weights }, x, y);
        Ok((p, vec![Output::near(y, d)]))
    })
}
