//! The cases: each kernel over rows of its own, with shapes that leave tiles partly empty. A case computes any of its rows
//! in any order, so that one recording serves the comparison with the twin and the comparison of rows with themselves.

mod experts;

use super::bench::{Bench, Random};
use super::kernels::ROWS;
use crate::error::Result;
use crate::format::Format;
use crate::ops::{
    ActScale, Addend, Amax, Attention, CacheFormat, Drawing, Draws, Gate, Glu, HeadNorm, Input, InputScales, KvCache,
    PARTS, Piece, Projection, RmsNorm, Rotated, Routes, Row, STATS_WORDS, StageActivation, Staging, Stream,
    staged_words,
};
use crate::program::{HostStages, Program, Role, Slice};
use crate::sampler::{POWERS, Rule, Sampling};
use crate::trace::record::stats_program;
use experts::{chosen_group, group, linear_add, moe, moe_by_matrix, moe_down_add, moe_scatter, router};

const EPS: f64 = f32::EPSILON as f64;

/// What two halves keep of an input, and how matrix units add: about as much as f32 does over a few thousand products.
const BY_MATRIX: f64 = 4e-6;

/// Every format that a kernel reads.
const FORMATS: [Format; 5] = [Format::Bf16, Format::Fp8, Format::Fp8Blocks, Format::Mxfp4, Format::Nvfp4];

type Record = Box<dyn Fn(&mut Bench<'_>, &[usize]) -> Result<(Program, Vec<Output>)>>;

/// A kernel over some of [`ROWS`] rows.
pub(super) struct Case {
    /// Format and variant, for people.
    pub(super) what: String,
    /// How far it may be from its twin.
    pub(super) tolerance: f64,
    /// Whether a row's outputs are its own.
    pub(super) by_row: bool,
    /// Put the rows on a device, and give the program that computes them.
    pub(super) record: Record,
}

/// What a case leaves.
#[derive(Clone, Copy)]
pub(super) struct Output {
    pub(super) slice: Slice,
    /// Words of each of the rows, in their order. `None`: it is no row's own.
    pub(super) width: Option<usize>,
    /// It is records of so many words.
    record: usize,
    /// The words of a record that are f32 and may be off by rounding. All others are the same or wrong.
    near: &'static [usize],
}

impl Output {
    /// f32 that rounding may move.
    fn near(slice: Slice, width: usize) -> Self {
        Self { slice, width: Some(width), record: 1, near: &[0] }
    }

    /// Words that are the same or wrong.
    fn exact(slice: Slice, width: usize) -> Self {
        Self { near: &[], ..Self::near(slice, width) }
    }

    /// Not row after row.
    fn whole(self) -> Self {
        Self { width: None, ..self }
    }

    /// How it differs from the twin's.
    pub(super) fn differs(&self, got: &[u32], want: &[u32], tolerance: f64) -> Option<String> {
        let is_near = |i: usize| self.near.contains(&(i % self.record));
        let (mut largest, mut most, mut at) = (0.0f64, 0.0f64, 0);
        for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
            if !is_near(i) {
                if g != w {
                    return Some(format!("word {i} is {g:#010x}, the twin's {w:#010x}"));
                }
                continue;
            }
            let (g, w) = (f64::from(f32::from_bits(g)), f64::from(f32::from_bits(w)));
            if !g.is_finite() || !w.is_finite() {
                return Some(format!("element {i} is {g}, the twin's {w}"));
            }
            most = most.max(w.abs());
            if (g - w).abs() > largest {
                (largest, at) = ((g - w).abs(), i);
            }
        }
        let how = || format!("element {at} is off by {:.1e} of the largest, {tolerance:.1e} allowed", largest / most);
        (largest > tolerance * most).then(how)
    }
}

/// The cases by kernel. `matrix`: those of kernels with matrix units, too.
pub(super) fn cases(matrix: bool) -> Vec<(&'static str, Vec<Case>)> {
    let mut all = vec![
        ("embed", vec![embed()]),
        ("rms_norm", [4, 132, 2880].map(rms_norm).into()),
        ("add_norm", [1, 3].map(add_norm).into()),
        ("head_norm", vec![head_norm()]),
        (
            "rope",
            [
                (CacheFormat::F32, false, 1),
                (CacheFormat::F32, true, 1),
                (CacheFormat::Bf16, false, 1),
                (CacheFormat::Bf16, true, 1),
                (CacheFormat::F32, true, 2),
                (CacheFormat::Bf16, false, 2),
            ]
            .map(|(format, norm, parts)| rope(format, norm, parts))
            .into(),
        ),
        ("attention of prompts", attention(false)),
        ("attention of generated rows", attention(true)),
        ("linear", linear()),
        ("norm_linear", norm_linears()),
        ("norm_linear_few", [3, 34].map(norm_linear_few).into()),
        ("router", [true, false].map(router).into()),
        (
            "group",
            [(6, 3, 2), (33, 4, 4), (6, 3, 16), (6, 3, 64)]
                .map(group)
                .into_iter()
                .chain([2, 4, 16, 64].into_iter().flat_map(|n| [true, false].map(|by_row| chosen_group(by_row, n))))
                .collect(),
        ),
        ("moe_up", moe(false)),
        ("moe_down", moe(true)),
        ("moe_down_add", FORMATS.into_iter().enumerate().map(|(i, format)| moe_down_add(format, i % 2 == 0)).collect()),
        ("linear_add, norm_moe_up", linear_adds()),
        ("moe_scatter", vec![moe_scatter()]),
        ("glu", [Gate::Silu, Gate::Clamped { limit: 7.0, alpha: 1.702 }].map(glu).into()),
        ("amax", vec![amax()]),
        (
            "stage_activation",
            [ActScale::Static, ActScale::Expert, ActScale::Token, ActScale::Tensor].map(stage_activation).into(),
        ),
        ("add", vec![add()]),
        ("take", vec![take()]),
        ("argmax, weigh, narrow, draw", [Draws::Likeliest, Draws::Rounds(0), Draws::Rounds(6)].map(draw).into()),
        ("stats", [false, true].map(stats).into()),
        ("stream", vec![stream()]),
    ];
    if matrix {
        let halves = || FORMATS.into_iter().filter(|format| format.fits_half());
        // Of so many rows of weights some steps take large blocks.
        let linear = halves().map(|format| linear_matrix(format, [200, 352]));
        all.push(("linear_matrix", linear.chain([linear_matrix(Format::Mxfp4, [8192, 96])]).collect()));
        for (name, second) in [("moe_up_matrix", false), ("moe_down_matrix", true)] {
            all.push((name, halves().map(|format| moe_by_matrix(format, second)).collect()));
        }
    }
    all
}

fn case(
    what: impl Into<String>,
    tolerance: f64,
    record: impl Fn(&mut Bench<'_>, &[usize]) -> Result<(Program, Vec<Output>)> + 'static,
) -> Case {
    Case { what: what.into(), tolerance, by_row: true, record: Box::new(record) }
}

/// Rounding of a sum of `k` products in f32, order unknown, with room for a result that cancels.
fn sum_of(k: usize) -> f64 {
    3.0 * EPS * (k as f64).sqrt().max(2.0)
}

fn program(tokens: usize) -> Program {
    Program::new(tokens as u32, HostStages::default())
}

/// These rows, of `width` elements each, of `data`.
fn pick<T: Copy>(data: &[T], width: usize, which: &[usize]) -> Vec<T> {
    which.iter().flat_map(|row| &data[row * width..][..width]).copied().collect()
}

/// A number of columns that blocks of the format divide.
fn columns(format: Format, k: usize) -> usize {
    k.next_multiple_of(format.block())
}

fn embed() -> Case {
    let (vocab, d) = (50, 66);
    case("embed", 0.0, move |b, which| {
        let table = b.matrix(&mut Random(5), Format::Bf16, [vocab, d])?;
        let row = |i: &usize| Row { token: (i * 17 % vocab) as u32, ..Row::default() };
        let rows = b.input(&which.iter().map(row).collect::<Vec<_>>())?;
        let x = b.output(which.len() * d)?;
        let mut p = program(which.len());
        p.embed(&table, rows, x);
        b.keep(table);
        Ok((p, vec![Output::near(x, d)]))
    })
}

fn rms_norm(d: usize) -> Case {
    case(format!("D={d}"), sum_of(d), move |b, which| {
        let mut random = Random(d as u64);
        let x = pick(&random.f32s(ROWS * d), d, which);
        let (x, g, y) = (b.input(&x)?, b.input(&random.bf16s(d))?, b.output(x.len())?);
        let mut p = program(which.len());
        p.rms_norm(RmsNorm { d: d as u32, eps: 1e-5 }, x, g, y);
        Ok((p, vec![Output::near(y, d)]))
    })
}

/// Of a row, or of the weighted sum of `a` routes.
fn add_norm(a: usize) -> Case {
    let d = 100;
    case(format!("{a} routes"), 4.0 * EPS + sum_of(d), move |b, which| {
        let mut random = Random(a as u64);
        let (x, y) = (random.f32s(ROWS * d), random.f32s(ROWS * a * d));
        let (weights, g) = (random.f32s(ROWS * a), random.bf16s(d));
        let (x, y, g) = (b.input(&pick(&x, d, which))?, b.input(&pick(&y, a * d, which))?, b.input(&g)?);
        let (weights, h, sum) =
            (b.input(&pick(&weights, a, which))?, b.output(which.len() * d)?, b.output(which.len() * d)?);
        let mut p = program(which.len());
        let routes = Routes { experts: weights, weights };
        let addend = if a == 1 { Addend::Rows(y) } else { Addend::Routes { a: a as u32, routes, x: y, sum: h } };
        p.add_norm(RmsNorm { d: d as u32, eps: 1e-5 }, x, addend, g, [sum, h]);
        Ok((p, vec![Output::near(sum, d), Output::near(h, d)]))
    })
}

/// What a decode step does with one row in one launch, and with several in two or three: after nothing, a row or the weighted sum
/// of `a` routes; rotated into a cache.
fn norm_linear(format: Format, a: usize, bias: bool, cache: Option<CacheFormat>) -> Case {
    // Heads of FP4 fill their workgroups, the others end within one.
    let ([h, hk, dh], d) = ([3, 1, if format.is_fp4() { 16 } else { 20 }], columns(format, 352));
    let n = (h + 2 * hk) * dh;
    let added = a;
    let a = a.max(1);
    let what =
        format!("{format} N={n} K={d}, {added} routes, {}", cache.map_or("a row".into(), |c| format!("{c:?} cache")));
    case(what, 8.0 * sum_of(d + a), move |b, which| {
        let mut random = Random(d as u64);
        let norm = RmsNorm { d: d as u32, eps: 1e-5 };
        let weight = b.matrix(&mut random, format, [n, d])?;
        let bias = if bias { Some(b.input(&random.bf16s(n))?) } else { None };
        let (x, addends, weights) = (random.f32s(ROWS * d), random.f32s(ROWS * a * d), random.f32s(ROWS * a));
        let (x, addends) = (b.input(&pick(&x, d, which))?, b.input(&pick(&addends, a * d, which))?);
        let (weights, g) = (b.input(&pick(&weights, a, which))?, b.input(&random.bf16s(d))?);
        let t = which.len();
        let (sum, normed, step) = (b.output(t * d)?, b.output(t * d)?, b.step(t)?);
        let y = b.guarded(&vec![0.5; t * n])?;
        let routes = Routes { experts: weights, weights };
        let addend = match added {
            0 => None,
            1 => Some(Addend::Rows(addends)),
            _ => Some(Addend::Routes { a: a as u32, routes, x: addends, sum: normed }),
        };
        let w = Projection { pieces: vec![Piece { weight, first: 0, input_scale: None }], n: n as u32, bias };
        let mut outputs = vec![Output::near(normed, d)];
        outputs.extend(addend.map(|_| Output::near(sum, d)));
        let heads = [h as u32, hk as u32, dh as u32];
        let appended;
        let rotated = match cache {
            None => {
                outputs.push(Output::near(y, n));
                None
            }
            Some(format) => {
                // A sequence of one position for each row, so that the cache has row after row.
                let row = |(i, at): (usize, &usize)| Row { token: 0, sequence: i as u32, position: *at as u32, pad: 0 };
                let rows = b.input(&which.iter().enumerate().map(row).collect::<Vec<_>>())?;
                let table: Vec<f32> = (0..ROWS * dh / 2).flat_map(|i| [(i as f32).cos(), (i as f32).sin()]).collect();
                let words = format.bytes((hk * dh) as u64) as usize / 4;
                let (keys, values) = (b.output(t * words)?, b.output(t * words)?);
                let pages = b.input(&(0..t as u32).collect::<Vec<_>>())?;
                appended = [KvCache { format, page: 1, pages: 1, table: pages, keys, values }];
                // Queries stand in y; a row alone has its keys and values in the cache only.
                outputs.push(Output::near(y, 0).whole());
                if format == CacheFormat::F32 {
                    outputs.extend([keys, values].map(|slice| Output::near(slice, words)));
                }
                Some(Rotated { heads, rows, table: b.input(&table)?, cache: &appended })
            }
        };
        let mut p = program(t);
        if t == 1 && b.fuses() {
            p.norm_linear(norm, (x, addend.map(|addend| (addend, sum)), g), normed, &w, rotated, y);
        } else {
            match addend {
                None => p.rms_norm(norm, x, g, normed),
                Some(addend) => p.add_norm(norm, x, addend, g, [sum, normed]),
            }
            p.projection(step, &w, normed, y);
            if let Some(Rotated { heads, rows, table, cache }) = rotated {
                p.rope(heads, rows, table, y, cache);
            }
        }
        w.pieces.into_iter().for_each(|piece| b.keep(piece.weight));
        Ok((p, outputs))
    })
}

/// Every format, addend, bias and cache at least once.
fn norm_linears() -> Vec<Case> {
    let caches = [None, Some(CacheFormat::F32), Some(CacheFormat::Bf16)];
    let case = |(i, format): (usize, Format)| norm_linear(format, 1 + 2 * (i % 2), i % 3 > 0, caches[i % 3]);
    let alone = |(i, format): (usize, Format)| norm_linear(format, 0, i % 3 == 0, caches[(i + 1) % 3]);
    FORMATS.into_iter().enumerate().map(case).chain(FORMATS.into_iter().enumerate().map(alone)).collect()
}

/// A router behind its norm, of few experts and of many.
fn norm_linear_few(n: usize) -> Case {
    let d = 352;
    case(format!("N={n} K={d}"), 8.0 * sum_of(d), move |b, which| {
        let mut random = Random(d as u64);
        let weight = b.matrix(&mut random, Format::Bf16, [n, d])?;
        let bias = if n == 3 { None } else { Some(b.input(&random.bf16s(n))?) };
        let (x, y) = (random.f32s(ROWS * d), random.f32s(ROWS * d));
        let (x, y, g) = (b.input(&pick(&x, d, which))?, b.input(&pick(&y, d, which))?, b.input(&random.bf16s(d))?);
        let t = which.len();
        let (sum, h, scores) = (b.output(t * d)?, b.output(t * d)?, b.output(t * n)?);
        let w = Projection { pieces: vec![Piece { weight, first: 0, input_scale: None }], n: n as u32, bias };
        let mut p = program(t);
        p.norm_linear_few(RmsNorm { d: d as u32, eps: 1e-5 }, (x, y, g), [sum, h], &w, scores);
        w.pieces.into_iter().for_each(|piece| b.keep(piece.weight));
        Ok((p, vec![Output::near(sum, d), Output::near(h, d), Output::near(scores, n)]))
    })
}

fn head_norm() -> Case {
    let [h, hk, dh] = [4, 2, 36];
    case("head_norm", sum_of(dh), move |b, which| {
        let mut random = Random(8);
        let width = (h + 2 * hk) * dh;
        let x = b.guarded(&pick(&random.f32s(ROWS * width), width, which))?;
        let gains = [b.input(&random.bf16s(dh))?, b.input(&random.bf16s(dh))?];
        let mut p = program(which.len());
        p.head_norm(HeadNorm { h: h as u32, hk: hk as u32, dh: dh as u32, eps: 1e-6 }, gains, x);
        Ok((p, vec![Output::near(x, width)]))
    })
}

fn linear_adds() -> Vec<Case> {
    let usual = FORMATS.into_iter().enumerate().map(|(i, format)| linear_add(format, 352, i % 2 == 0));
    // More spans of columns than groups of lanes.
    usual.chain([linear_add(Format::Mxfp4, 4640, true)]).collect()
}

/// Pages of a cache of two sequences, `pages` each, in no order.
fn page_table(pages: usize) -> Vec<u32> {
    (0..2 * pages).map(|i| ((i * 5 + 3) % (2 * pages)) as u32).collect()
}

/// After norms of heads, or not; into a cache of so many parts.
fn rope(format: CacheFormat, norm: bool, parts: usize) -> Case {
    let ([h, hk, dh], [page, pages]) = ([6, 2, 20], [16, 14]);
    // Two products and a sum; and the mean of squares.
    let near = if norm { 4.0 * sum_of(dh) } else { 4.0 * EPS };
    let what = if norm { ", heads normalised" } else { "" };
    case(format!("{format:?} cache in {parts} parts{what}"), near, move |b, which| {
        let width = (h + 2 * hk) * dh;
        let row = |i: &usize| Row { token: 0, sequence: *i as u32 % 2, position: *i as u32 / 2 * 7, pad: 0 };
        let table: Vec<f32> =
            (0..ROWS / 2 * 7 * dh / 2).flat_map(|i| [(i as f32).cos() * 1.3, (i as f32).sin() * 1.3]).collect();
        let rows = b.input(&which.iter().map(row).collect::<Vec<_>>())?;
        let qkv = b.guarded(&pick(&Random(3).f32s(ROWS * width), width, which))?;
        let words = format.bytes((2 * page * pages * hk / parts * dh) as u64) as usize / 4;
        let of_pages = b.input(&page_table(pages))?;
        let kv: Vec<KvCache> = (0..parts)
            .map(|_| {
                let (keys, values) = (b.guarded(&vec![0.5; words])?, b.guarded(&vec![0.5; words])?);
                Ok(KvCache { format, page: page as u32, pages: pages as u32, table: of_pages, keys, values })
            })
            .collect::<Result<_>>()?;
        let mut p = program(which.len());
        let (heads, table) = ([h as u32, hk as u32, dh as u32], b.input(&table)?);
        if norm {
            let mut random = Random(8);
            let gains = [b.input(&random.bf16s(dh))?, b.input(&random.bf16s(dh))?];
            p.norm_rope(1e-6, gains, Rotated { heads, rows, table, cache: &kv }, qkv);
        } else {
            p.rope(heads, rows, table, qkv, &kv);
        }
        let mut outputs = vec![Output::near(qkv, width)];
        for part in kv {
            outputs.push(Output::exact(part.values, 0).whole());
            // A rotated key that is a tie by a hair may round to another bf16.
            outputs.extend((format == CacheFormat::F32).then_some(Output::near(part.keys, 0).whole()));
        }
        Ok((p, outputs))
    })
}

/// Of a prompt; and of generated rows, where one workgroup sees all keys of a row, and where they are shared among segments.
fn attention(generated: bool) -> Vec<Case> {
    let (f32, bf16) = (CacheFormat::F32, CacheFormat::Bf16);
    [
        ([6, 2, 32, 0], (f32, 1), true, 430),
        ([8, 1, 20, 0], (bf16, 1), false, 300),
        ([6, 2, 64, 13], (bf16, 1), true, 900), // the window of a ring that has wrapped
        ([2, 2, 32, 200], (f32, 1), false, 900),
        ([4, 2, 16, 0], (f32, 1), false, 90),
        ([8, 4, 32, 0], (bf16, 2), true, 300),
    ]
    .map(|(shape, cache, sinks, last)| attention_case(shape, cache, sinks, last, generated))
    .into()
}

fn attention_case(
    [h, hk, dh, window]: [usize; 4],
    (format, parts): (CacheFormat, usize),
    sinks: bool,
    last: usize,
    generated: bool,
) -> Case {
    let what = format!("H={h} Hk={hk} Dh={dh} window {window}, {format:?} cache in {parts} parts, sinks: {sinks}");
    // A dot product of Dh, then a weighted mean of the keys; scores pass through exp.
    case(what, 2.0 * sum_of(dh + last), move |b, which| {
        let mut random = Random((dh + window) as u64);
        let (width, head) = ((h + 2 * hk) * dh, hk * dh);
        let capacity = (if window == 0 { last + 1 } else { window + 40 }).next_multiple_of(48);
        let qkv = random.f32s(ROWS * width);
        let (keys, values) = (random.f32s(2 * capacity * head), random.f32s(2 * capacity * head));
        // Where a position stands must not matter: pages of 16 or of 48, in another order.
        let page = if which.len() % 2 == 0 { 16 } else { 48 };
        let pages = capacity / page;
        let table = page_table(pages);
        let held = head / parts;
        let mut placed = |cache: &[f32], part: usize| {
            let mut all = vec![0.0; cache.len() / parts];
            for (at, row) in cache.chunks_exact(head).enumerate() {
                let (sequence, slot) = (at / capacity, at % capacity);
                let to = table[sequence * pages + slot / page] as usize * page + slot % page;
                all[to * held..][..held].copy_from_slice(&row[part * held..][..held]);
            }
            match format {
                CacheFormat::F32 => b.input(&all),
                CacheFormat::Bf16 => {
                    b.input(&all.iter().map(|v| half::bf16::from_f32(*v).to_bits()).collect::<Vec<_>>())
                }
            }
        };
        let placed: Vec<[Slice; 2]> =
            (0..parts).map(|part| Ok([placed(&keys, part)?, placed(&values, part)?])).collect::<Result<_>>()?;
        let (table, page, pages) = (b.input(&table)?, page as u32, pages as u32);
        let part = |[keys, values]: [Slice; 2]| KvCache { format, page, pages, table, keys, values };
        let kv: Vec<KvCache> = placed.into_iter().map(part).collect();
        let position = |i: usize| (last - i * 7 % (last + 1)) as u32;
        let row = |i: &usize| Row { token: 0, sequence: *i as u32 % 2, position: position(*i), pad: 0 };
        let rows = b.input(&which.iter().map(row).collect::<Vec<_>>())?;
        let sinks = if sinks { Some(b.input(&random.bf16s(h))?) } else { None };
        let qkv = b.input(&pick(&qkv, width, which))?;
        // Room for the segments of some rows: they go in several launches.
        let room = b.output((which.len() / 2).max(1) * h * 8 * (dh + 4))?;
        let (a, step) = (b.output(which.len() * h * dh)?, b.step(which.len())?);
        let reach = which.iter().map(|i| position(*i) + 1).max().unwrap_or(1);
        let role = if generated { Role::Generated { reach } } else { Role::Prompt };
        let [h, hk, dh, window] = [h, hk, dh, window].map(|n| n as u32);
        let held = [0, hk];
        let op = Attention { h, hk, dh, held, window, page, pages, format, segments: 0, first: 0, rows: 0 };
        let mut p = program(which.len()).of(role);
        p.attention(op, step, [rows, qkv, room], &kv, sinks, a);
        Ok((p, vec![Output::near(a, (h * dh) as usize)]))
    })
}

fn linear() -> Vec<Case> {
    let mut all: Vec<Case> = FORMATS.into_iter().map(|format| linear_case(format, [531, 352], false, true)).collect();
    all.push(linear_case(Format::Nvfp4, [531, 352], true, true));
    all.push(linear_case(Format::Bf16, [9, 96], false, false));
    all.push(linear_case(Format::Mxfp4, [17, 2880], false, true));
    // Rows that fill their workgroups.
    all.extend([Format::Mxfp4, Format::Nvfp4].map(|format| linear_case(format, [544, 352], false, true)));
    // As many columns as lanes, with 8 of them and with 32: no lane is without any.
    all.extend([Format::Nvfp4, Format::Fp8Blocks].map(|format| linear_case(format, [520, 512], false, true)));
    // Many rows, and several spans of columns with 8 lanes and with 32.
    all.push(linear_case(Format::Bf16, [4100, 1040], false, false));
    all.push(linear_case(Format::Nvfp4, [4100, 1056], false, false));
    all.push(linear_case(Format::Mxfp4, [16400, 544], false, false));
    all
}

fn linear_case(format: Format, [n, k]: [usize; 2], staged: bool, bias: bool) -> Case {
    let k = columns(format, k);
    let what = format!("{format} N={n} K={k}{}", if staged { ", quantised rows" } else { "" });
    case(what, sum_of(k), move |b, which| {
        let mut random = Random((n + k) as u64);
        let w = b.matrix(&mut random, format, [n, k])?;
        let bias = if bias { Some(b.input(&random.bf16s(n))?) } else { None };
        let (y, step) = (b.output(which.len() * n)?, b.step(which.len())?);
        let mut p = program(which.len());
        let x = rows(b, &mut p, &pick(&random.f32s(ROWS * k), k, which), k, staged)?;
        p.linear(step, &w, bias, x, y);
        b.keep(w);
        Ok((p, vec![Output::near(y, n)]))
    })
}

fn linear_matrix(format: Format, [n, k]: [usize; 2]) -> Case {
    let k = columns(format, k);
    case(format!("{format} N={n} K={k}"), BY_MATRIX, move |b, which| {
        let mut random = Random((n + k) as u64);
        let weight = b.matrix(&mut random, format, [n, k])?;
        // Half of the formats with a bias, so that both ways of the kernel run.
        let bias = if format.has_row_scale() { None } else { Some(b.input(&random.bf16s(n))?) };
        let x = b.input(&pick(&random.f32s(ROWS * k), k, which))?;
        let (y, step) = (b.output(which.len() * n)?, b.step(which.len())?);
        let piece = Piece { weight, first: 0, input_scale: None };
        let projection = Projection { pieces: vec![piece], n: n as u32, bias };
        let mut p = program(which.len()).with_matrix(true);
        p.linear_by_matrix(step, &projection, &projection.pieces[0], x, y);
        projection.pieces.into_iter().for_each(|piece| b.keep(piece.weight));
        Ok((p, vec![Output::near(y, n)]))
    })
}

/// `x [R, k]` as it is, or quantised with a scale for each row.
fn rows(b: &mut Bench<'_>, p: &mut Program, x: &[f32], k: usize, staged: bool) -> Result<Input> {
    let (n, tokens) = (x.len() / k, p.tokens() as usize);
    let x = b.input(x)?;
    if !staged {
        return Ok(x.into());
    }
    let to = staging(b, n, k)?;
    let step = b.step(tokens)?;
    let op = StageActivation { k: k as u32, rows_per_token: (n / tokens) as u32, share: 1, scale: ActScale::Token };
    Ok(p.stage_activation(op, step, x, None, &to))
}

fn staging(b: &mut Bench<'_>, n: usize, k: usize) -> Result<Staging> {
    Ok(Staging {
        rows: b.output(n * staged_words(k))?,
        scales: b.output(n)?,
        report: b.output(n * 2)?,
        amaxes: b.output(n)?,
    })
}

fn glu(gate: Gate) -> Case {
    let f = 97;
    // e^x of our own is good to an ulp or, where a driver splits fma, to |x| of them.
    case(format!("{gate:?}"), 16.0 * EPS, move |b, which| {
        let x: Vec<f32> = Random(f as u64).f32s(ROWS * 2 * f).iter().map(|v| v * 4.0).collect();
        let (x, y) = (b.input(&pick(&x, 2 * f, which))?, b.output(which.len() * f)?);
        let mut p = program(which.len());
        p.glu(Glu { f: f as u32, gate }, x, y);
        Ok((p, vec![Output::near(y, f)]))
    })
}

fn amax() -> Case {
    let (k, each) = (96, 2);
    case("amax", 0.0, move |b, which| {
        let x = pick(&Random(k as u64).f32s(ROWS * each * k), each * k, which);
        let (x, y) = (b.input(&x)?, b.output(which.len() * each)?);
        let mut p = program(which.len());
        p.amax(Amax { k: k as u32, rows_per_token: each as u32 }, x, y);
        Ok((p, vec![Output::exact(y, each)]))
    })
}

fn stage_activation(scale: ActScale) -> Case {
    let k = 208;
    let staged = case(format!("{scale:?}"), 0.0, move |b, which| {
        let mut random = Random(k as u64);
        // Rows of very different sizes.
        let mut x = random.f32s(ROWS * k);
        x.chunks_exact_mut(k)
            .enumerate()
            .for_each(|(i, row)| row.iter_mut().for_each(|v| *v *= 3f32.powi(i as i32 % 9 - 4)));
        let experts: Vec<u32> = which.iter().map(|i| (i * 7 % 5) as u32).collect();
        let scales = b.input(&[7.3e-4f32, 2.1e-5, 3.0e-2, 1.0, 1.1e-3])?;
        let given = InputScales { scales, experts: Some(b.input(&experts)?) };
        let to = staging(b, which.len(), k)?;
        let (x, step) = (b.input(&pick(&x, k, which))?, b.step(which.len())?);
        let mut p = program(which.len());
        p.stage_activation(
            StageActivation { k: k as u32, rows_per_token: 1, share: 1, scale },
            step,
            x,
            Some(given),
            &to,
        );
        Ok((p, vec![Output::exact(to.rows, staged_words(k)), Output::exact(to.scales, 1), Output::exact(to.report, 2)]))
    });
    // One scale for all rows: a row's bits follow its neighbours by definition.
    Case { by_row: scale != ActScale::Tensor, ..staged }
}

fn add() -> Case {
    let d = 67;
    case("add", 0.0, move |b, which| {
        let mut random = Random(9);
        let (y, x) = (random.f32s(ROWS * d), random.f32s(ROWS * d));
        let (x, y) = (b.input(&pick(&x, d, which))?, b.input(&pick(&y, d, which))?);
        let (sum, mut p) = (b.output(which.len() * d)?, program(which.len()));
        p.add(d as u32, x, y, sum);
        Ok((p, vec![Output::exact(sum, d)]))
    })
}

fn take() -> Case {
    let d = 67;
    case("take", 0.0, move |b, which| {
        let picks: Vec<u32> = which.iter().map(|i| *i as u32).collect();
        let (x, picks, y) = (b.input(&Random(10).f32s(ROWS * d))?, b.input(&picks)?, b.output(which.len() * d)?);
        let mut p = program(which.len());
        p.take(d as u32, picks, x, y);
        Ok((p, vec![Output::exact(y, d)]))
    })
}

/// Rules of every kind, by turns; of ties and of tokens that cannot be.
fn draw(how: Draws) -> Case {
    let v = 1000;
    case(format!("{how:?}"), sum_of(v), move |b, which| {
        let mut logits = Random(v as u64).f32s(ROWS * v);
        // Equal ones, in one part and in another: the lowest id is taken.
        logits.chunks_exact_mut(v).for_each(|row| {
            [v / 3, v / 3 + 1, v - 1].into_iter().for_each(|i| row[i] = 2.5);
            row[v / 2] = f32::NEG_INFINITY;
        });
        let rule = |i: usize| match how {
            Draws::Likeliest => Rule::default(),
            Draws::Rounds(rounds) => Rule::new(&Sampling {
                temperature: [0.0, 0.7, 1.0, 1.4, 0.05][i % 5],
                top_k: if rounds > 3 { [0, 0, 1, 40, 2000][i / 2 % 5] } else { 0 },
                top_p: if rounds > 0 { [1.0, 0.9, 0.3][i / 3 % 3] } else { 1.0 },
                min_p: [0.0, 0.05][i / 4 % 2],
                seed: 3,
                stream: i as u64,
                ..Sampling::default()
            }),
        };
        let row = |i: &usize| Row { token: 7, sequence: *i as u32 + 1, position: 10 * *i as u32, pad: 0 };
        let places: Vec<Row> = which.iter().map(row).collect();
        let rows = b.guarded(bytemuck::cast_slice(&places))?;
        let drawn = b.output(which.len() * 4)?;
        let from = Drawing {
            logits: b.input(&pick(&logits, v, which))?,
            powers: b.input(&POWERS)?,
            rules: b.input(&(0..ROWS + 1).map(rule).collect::<Vec<_>>())?,
            rows,
            parts: b.output(which.len() * PARTS as usize * 4)?,
            kept: b.output(which.len() * 8)?,
            // Of so many rows at a time.
            sums: b.output(24 * Drawing::row_bytes(v as u32, u64::MAX) as usize / 4)?,
        };
        let mut p = program(which.len());
        p.draw(v as u32, how, &from, drawn);
        // Id, logit less the largest, sum, bad.
        let mut outputs = vec![Output { record: 4, near: &[2], ..Output::near(drawn, 4) }, Output::exact(rows, 4)];
        if how != Draws::Likeliest {
            outputs.push(Output::exact(from.kept, 8));
        }
        Ok((p, outputs))
    })
}

fn stats(indices: bool) -> Case {
    let w = 67;
    let stats = case(format!("indices: {indices}"), 1e-5, move |b, which| {
        let mut random = Random(w as u64);
        let words: Vec<u32> = match indices {
            true => (0..ROWS * w).map(|_| random.below(32) as u32).collect(),
            false => random.f32s(ROWS * w).iter().map(|v| v.to_bits()).collect(),
        };
        let (x, s) = (b.input(&pick(&words, w, which))?, b.output(which.len() * STATS_WORDS)?);
        // The sum and the sum of squares round; extremes, counts and hashes do not.
        let output = Output { record: STATS_WORDS, near: &[0, 1], ..Output::near(s, STATS_WORDS) };
        Ok((stats_program(which.len() as u32, x, w, indices, s), vec![output]))
    });
    // The hash knows the place of a row.
    Case { by_row: false, ..stats }
}

fn stream() -> Case {
    let stream = case("stream", 0.0, |b, _| {
        let op = Stream { n: 5000, groups: 3 };
        let words: Vec<u32> = (0..op.n * 4).map(|i| i.wrapping_mul(0x9e37_79b9) >> 9).collect();
        let (x, y) = (b.input(&words)?, b.output(op.outputs())?);
        let mut p = program(1);
        p.stream(op, x, y);
        Ok((p, vec![Output::exact(y, 0).whole()]))
    });
    Case { by_row: false, ..stream }
}
