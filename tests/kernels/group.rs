//! Routes by expert: the tiles themselves, and that neither they nor the rows beside it change a bit of a row.

use super::{FORMATS, Format, check_on, experts, linear_case, matrix, output_of, program, routes, step, weight};
use crate::harness::{Bench, Random, cpu, gpus, small_binding_gpu, sum_tolerance};
use fourfold::device::Device;
use fourfold::ops::{
    ActScale, ChosenGroup, Experts, Gate, GateUp, Group, Input, Op, Router, Routes, Routing, StageActivation, Staging,
    Swiglu, staged_words,
};
use fourfold::program::{Program, Slice};
use std::sync::Arc;

fn tiles_case(b: &mut Bench, op: Group, chosen: &[u32]) -> (Program, Vec<Slice>) {
    let t = chosen.len() / op.a as usize;
    let (step, experts) = (step(b, t), b.input(chosen));
    let tiles = b.output(op.tiles(t as u32) as usize * op.words());
    let mut p = program(t);
    p.group(op, step, experts, tiles);
    (p, vec![tiles])
}

/// What tiles must be, said without the twin: each route once, in a tile of its expert, experts and routes in order.
fn assert_whole(op: Group, words: &[u32], chosen: &[u32], what: &str) {
    let tiles: Vec<&[u32]> = words.chunks_exact(op.words()).collect();
    let used = tiles.iter().position(|tile| tile[1] == 0).unwrap_or(tiles.len());
    let (used, unused) = tiles.split_at(used);
    assert!(unused.iter().all(|tile| tile.iter().all(|word| *word == 0)), "{what}: unused tiles are empty, and last");
    let mut listed = Vec::new();
    for tile in used {
        let (some, rest) = tile[2..].split_at(tile[1] as usize);
        assert!(rest.iter().all(|route| *route == 0), "{what}: {tile:?}");
        listed.extend(some.iter().map(|route| (tile[0], *route)));
    }
    let mut want: Vec<(u32, u32)> = chosen.iter().zip(0..).map(|(expert, route)| (*expert, route)).collect();
    want.sort_unstable();
    assert!(listed == want, "{what}: {listed:?}");
    let full = used.windows(2).all(|two| two[0][0] < two[1][0] || two[0][1] == op.routes);
    assert!(full, "{what}: only an expert's last tile has room");
}

#[test]
fn tiles_hold_each_route_once_in_order() {
    let shapes = [
        (1, 1, 1),
        (1, 4, 4),
        (2, 4, 4),
        (3, 7, 3),
        (5, 33, 4),
        (16, 32, 4),
        (64, 128, 8),
        (9, 255, 8),
        (7, 256, 2),
        (40, 257, 4),
        (33, 1000, 16),
        (2048, 1024, 16),
        (2048, 8, 2),
    ];
    for ((t, e, a), routes_of_a_tile) in
        shapes.into_iter().flat_map(|shape| [2, 4, 16, 64].map(|routes| (shape, routes)))
    {
        let op = Group { e: e as u32, a: a as u32, routes: routes_of_a_tile };
        let mut random = Random((t * e) as u64);
        let mut cases = vec![("first", vec![0; t * a]), ("last", vec![e as u32 - 1; t * a])];
        // Of as many experts as routes want, and of a few, the rest without any.
        let few = e.min(3) as u32;
        cases.push(("few", (0..t * a).map(|_| e as u32 - 1 - random.below(few as usize) as u32).collect()));
        cases.push(("uneven", (0..t * a).map(|_| (random.below(e) * random.below(e) / e) as u32).collect()));
        if t * e < 100_000 {
            cases.push(("routes", routes(&mut random, t, e, a)));
        }
        for (name, chosen) in cases {
            let what = format!("T={t} E={e} A={a}, {name}, tiles of {routes_of_a_tile}");
            let want = output_of(&cpu(), |b| tiles_case(b, op, &chosen));
            assert_whole(op, &want, &chosen, &what);
            for (gpu, device) in gpus() {
                let got = output_of(device, |b| tiles_case(b, op, &chosen));
                assert!(got == want, "{what}: other tiles on {gpu}");
            }
        }
    }
}

#[test]
fn experts_chosen_on_the_way_are_those_of_the_router() {
    let shapes = [(2, 4, 4), (3, 7, 3), (8, 32, 4), (32, 32, 4), (8, 128, 8), (1, 1024, 16), (64, 15, 4)];
    for ((t, e, a), tile) in shapes.into_iter().flat_map(|shape| [2, 4, 16, 64].map(|tile| (shape, tile))) {
        let normalise = !(t + tile as usize).is_multiple_of(3);
        let router = Router { e: e as u32, a: a as u32, normalise };
        let group = Group { e: e as u32, a: a as u32, routes: tile };
        assert!(ChosenGroup::takes(&router, t as u32) && !ChosenGroup::takes(&router, 300));
        let case = |b: &mut Bench, at_once: bool| {
            let mut scores = Random((t * e) as u64).f32s(t * e);
            // Ties, within the chosen and across the border.
            scores.iter_mut().step_by(3).for_each(|s| *s = (*s * 2.0).round() / 2.0);
            let (scores, step) = (b.input(&scores), step(b, t));
            let routes = Routes { experts: b.output(t * a), weights: b.output(t * a) };
            let tiles = b.output(group.tiles(t as u32) as usize * group.words());
            let mut p = program(t);
            if at_once {
                p.choose_and_group(ChosenGroup { router, group }, step, scores, routes, tiles);
            } else {
                p.router(router, scores, routes);
                p.group(group, step, routes.experts, tiles);
            }
            (p, vec![routes.weights, routes.experts, tiles])
        };
        let run = |device: &Arc<dyn Device>, at_once| {
            let mut b = Bench::new(device);
            let (p, outputs) = case(&mut b, at_once);
            b.run(&p, &outputs)
        };
        let want = run(&cpu(), false);
        assert!(run(&cpu(), true) == want, "T={t} E={e} A={a} on the twins");
        for (gpu, device) in gpus() {
            let got = run(device, true);
            assert!(got == run(device, false), "T={t} E={e} A={a}, tiles of {tile}: other bits than apart on {gpu}");
            assert!(got[1..] == want[1..], "T={t} E={e} A={a}, tiles of {tile}: other routes than the twin's on {gpu}");
        }
    }
}

#[test]
fn there_is_room_for_as_many_tiles_as_there_can_be() {
    for (e, a) in [(1, 1), (4, 2), (5, 3), (32, 4), (128, 8)] {
        let op = Group { e, a, routes: 4 };
        for t in 1..70 {
            // As many experts as possible with one route more than fills their tiles.
            let routes = t * a;
            let mut counts = vec![0u32; e as usize];
            (0..routes.min(e)).for_each(|i| counts[i as usize] += 1);
            (0..routes.saturating_sub(e) / 4).for_each(|i| counts[(i % e) as usize] += 4);
            counts[0] += routes - counts.iter().sum::<u32>();
            let used: u32 = counts.iter().map(|n| n.div_ceil(4)).sum();
            assert!(used <= op.tiles(t) && op.tiles(t) < used + 2, "E={e} A={a} T={t}: {used}, {}", op.tiles(t));
        }
    }
}

/// How a case gives its routes and rows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Form {
    /// Most of a tile; 1: one by one; 16 and 64: for matrix units.
    pub(super) routes: u32,
    /// Rows quantised with a scale of their own.
    pub(super) staged: bool,
    /// Every route reads a row of its own.
    pub(super) spread: bool,
    /// Gates before ups, without a clamp.
    pub(super) halves: bool,
}

pub(super) const PLAIN: Form = Form { routes: 4, staged: false, spread: false, halves: false };

fn given(b: &mut Bench, p: &mut Program, [e, a]: [usize; 2], chosen: &[u32], form: Form) -> Routing {
    let experts = b.input(chosen);
    if form.routes == 1 {
        return Routing::Each(experts);
    }
    let op = Group { e: e as u32, a: a as u32, routes: form.routes };
    let (step, tiles) = (step(b, chosen.len() / a), b.output(op.tiles(p.tokens()) as usize * op.words()));
    p.group(op, step, experts, tiles);
    if form.routes >= 16 { Routing::ByMatrix(tiles, form.routes) } else { Routing::Grouped(tiles, form.routes) }
}

/// `x [R, k]`, as it is or quantised.
fn rows(b: &mut Bench, p: &mut Program, x: &[f32], k: usize, staged: bool) -> Input {
    let (rows, t) = (x.len() / k, p.tokens() as usize);
    let x = b.input(x);
    if !staged {
        return x.into();
    }
    let to = Staging {
        rows: b.output(rows * staged_words(k)),
        scales: b.output(rows),
        report: b.output(rows * 2),
        amaxes: b.output(rows),
    };
    let step = step(b, t);
    let op = StageActivation { k: k as u32, rows_per_token: (rows / t) as u32, share: 1, scale: ActScale::Token };
    p.stage_activation(op, step, x, None, &to)
}

/// A layer's experts over the tokens `which` of T: first matrix, or second.
pub(super) fn moe_case(
    b: &mut Bench,
    format: Format,
    [t, e, a, n, k]: [usize; 5],
    form: Form,
    second: bool,
    which: &[usize],
) -> (Program, Vec<Slice>) {
    let mut random = Random((n * k + e) as u64);
    let matrix: Experts = experts(b, &mut random, format, [e, if second { n } else { 2 * n }, k]);
    let chosen = routes(&mut random, t, e, a);
    let each = if second || form.spread { a } else { 1 };
    let x = random.f32s(t * each * k);
    let take = |width: usize| which.iter().flat_map(move |row| row * width..(row + 1) * width);
    let chosen: Vec<u32> = take(a).map(|i| chosen[i]).collect();
    let x: Vec<f32> = take(each * k).map(|i| x[i]).collect();
    let mut p = program(which.len());
    let routing = given(b, &mut p, [e, a], &chosen, form);
    let x = rows(b, &mut p, &x, k, form.staged);
    let y = b.output(which.len() * a * n);
    if second {
        p.moe_down(&matrix, a as u32, routing, x, y);
    } else {
        let swiglu = match form.halves {
            true => Swiglu { a: a as u32, rows: GateUp::Halves, gate: Gate::Silu },
            false => Swiglu::gpt_oss(a as u32, [7.0, 1.702]),
        };
        p.moe_up(&matrix, swiglu, routing, (x, (a / each) as u32), y);
    }
    b.keep(matrix.weight);
    (p, vec![y])
}

pub(super) fn all(t: usize) -> Vec<usize> {
    (0..t).collect()
}

/// The tile of the last launch.
fn tile_of(p: &Program) -> &'static str {
    p.launches.last().unwrap().fillings.iter().find(|(slot, _)| *slot == "tile").unwrap().1
}

#[test]
fn grouped_routes_have_the_bits_of_single_ones() {
    // Tiles of one route to full ones; outputs that end within a workgroup's.
    for ([t, e, a], routes, tile) in [
        ([5, 7, 3], 2, "tile_2x4"),
        ([16, 32, 4], 2, "tile_2x4"),
        ([5, 7, 3], 4, "tile_4x4"),
        ([26, 5, 4], 4, "tile_4x4"),
    ] {
        for format in FORMATS {
            let k = 96usize.next_multiple_of(format.block());
            for (staged, spread, halves) in [(false, false, false), (true, false, true), (true, true, false)] {
                if staged && format != Format::Nvfp4 {
                    continue;
                }
                // Outputs that end within a workgroup's, and that fill it.
                let full = [(false, 16), (true, 64)].into_iter().filter(|_| format.is_fp4() && !staged);
                for (second, n) in [(false, 13), (true, 35)].into_iter().chain(full) {
                    let form = Form { staged, spread, halves, ..PLAIN };
                    let what = format!("{format} T={t} E={e} A={a} second={second} {form:?}");
                    let case = |b: &mut Bench, routes| {
                        let (p, y) = moe_case(b, format, [t, e, a, n, k], Form { routes, ..form }, second, &all(t));
                        assert_eq!(tile_of(&p), if routes == 1 { "tile_1x4" } else { tile }, "{what}");
                        (p, y)
                    };
                    let twin = |routes| output_of(&cpu(), |b| case(b, routes));
                    assert!(twin(routes) == twin(1), "{what}: other bits on the twins");
                    for (gpu, device) in gpus() {
                        let [each, grouped] = [1, routes].map(|routes| output_of(device, |b| case(b, routes)));
                        assert!(each == grouped, "{what}: other bits on {gpu}");
                    }
                    // Equal bits of wrong numbers are equal, too.
                    let near = if staged { 2e-5 } else { 2.0 * sum_tolerance(k) };
                    check_on(&what, near, gpus().get(..1).unwrap_or_default(), |b| case(b, routes));
                }
            }
        }
    }
}

#[test]
fn a_row_has_its_bits_alone_and_among_others_in_any_order() {
    let (t, e, a) = (64, 6, 3);
    for (gpu, device) in gpus() {
        for (format, staged) in [(Format::Mxfp4, false), (Format::Nvfp4, true), (Format::Bf16, false)] {
            for (second, n, k) in [(false, 9, 352), (true, 19, 352)] {
                let width = a * n;
                let case = |routes: u32, which: &[usize]| {
                    let form = Form { routes, staged, ..PLAIN };
                    output_of(device, |b| moe_case(b, format, [t, e, a, n, k], form, second, which))
                };
                let whole = case(4, &all(t));
                let mut random = Random(7);
                for count in [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64] {
                    // Any rows in any order; one row the way a single token goes.
                    let mut which = all(t);
                    (0..count).for_each(|i| which.swap(i, i + random.below(t - i)));
                    which.truncate(count);
                    let some = case([1, 2, 4][count % 3], &which);
                    for (i, row) in which.iter().enumerate() {
                        let same = some[i * width..][..width] == whole[row * width..][..width];
                        assert!(same, "{format} second={second}: row {row}, one of {count}, has other bits on {gpu}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_of_linear_has_its_bits_in_every_tile() {
    for (gpu, device) in gpus() {
        let ends = FORMATS.map(|format| (format, false, [531, 352])).into_iter();
        let full = [Format::Mxfp4, Format::Nvfp4].map(|format| (format, false, [544, 96]));
        // More spans than slots, with 8 lanes and with 32.
        let long = [(Format::Bf16, false, [513, 4624]), (Format::Nvfp4, false, [4100, 1056])];
        for (format, staged, [n, k]) in ends.chain([(Format::Nvfp4, true, [531, 352])]).chain(full).chain(long) {
            let k = usize::next_multiple_of(k, format.block());
            let case = |b: &mut Bench, which: &[usize]| {
                let mut random = Random(11);
                let bytes = matrix(&mut random, format, n, k);
                let x = random.f32s(64 * k);
                let x: Vec<f32> = which.iter().flat_map(|row| x[row * k..][..k].to_vec()).collect();
                let w = weight(b, format, [n, k], &bytes);
                let (bias, y, step) = (b.input(&random.bf16s(n + 1)), b.output(which.len() * n), step(b, which.len()));
                let mut p = program(which.len());
                let x = rows(b, &mut p, &x, k, staged);
                p.linear(step, &w, Some(bias), x, y);
                b.keep(w);
                (p, vec![y])
            };
            let whole = output_of(device, |b| case(b, &all(64)));
            for (count, tile) in [(1, "tile_1x2"), (2, "tile_2x4"), (3, "tile_2x4"), (9, "tile_4x4"), (16, "tile_4x4")]
            {
                let which: Vec<usize> = (0..count).map(|i| (i * 29 + count) % 64).collect();
                let some = output_of(device, |b| {
                    let (p, y) = case(b, &which);
                    assert_eq!(tile_of(&p), if n > 4096 && count > 8 { "tile_4x2" } else { tile });
                    (p, y)
                });
                for (i, row) in which.iter().enumerate() {
                    let same = some[i * n..][..n] == whole[row * n..][..n];
                    assert!(same, "{format} staged={staged}: row {row}, one of {count}, has other bits on {gpu}");
                }
            }
        }
    }
}

#[test]
fn wide_tiles_of_linear_hold_to_the_twin() {
    for (format, [t, n, k]) in [(Format::Mxfp4, [17, 531, 96]), (Format::Bf16, [24, 512, 160])] {
        check_on(&format!("linear {format} T={t} N={n}"), sum_tolerance(k), gpus(), |b| {
            let (p, y) = linear_case(b, format, [t, n, k], true, 0..t);
            assert_eq!(tile_of(&p), "tile_4x4");
            (p, y)
        });
    }
}

#[test]
fn grouped_routes_and_wide_tiles_go_through_a_split_weight() {
    let Some(small) = small_binding_gpu(12288) else { return };
    let whole = &gpus()[0].1;
    for (second, n) in [(false, 33), (true, 67)] {
        let case = |b: &mut Bench, routes| {
            let form = Form { routes, ..PLAIN };
            moe_case(b, Format::Mxfp4, [9, 7, 3, n, 96], form, second, &all(9))
        };
        let parts = |p: &Program| p.launches.iter().filter(|l| matches!(l.op, Op::MoeUp(_) | Op::MoeDown(_))).count();
        let in_parts = output_of(&small, |b| {
            let (p, y) = case(b, 4);
            assert_eq!(parts(&p), 3, "seven experts in three parts");
            (p, y)
        });
        for routes in [1, 2, 4] {
            assert!(in_parts == output_of(whole, |b| case(b, routes)), "second={second}: parts have other bits");
        }
    }
    // 600 rows of 176 bytes: parts of 272, which have narrower tiles than the whole.
    let Some(small) = small_binding_gpu(49152) else { return };
    let wide = |b: &mut Bench| linear_case(b, Format::Mxfp4, [20, 600, 352], true, 0..20);
    assert!(output_of(&small, wide) == output_of(whole, wide), "linear: parts have other bits");
}

#[test]
fn a_short_step_does_not_see_the_tiles_of_a_longer_one() {
    let (e, a, n, k) = (5, 2, 9, 96);
    let op = Group { e: e as u32, a: a as u32, routes: 2 };
    let devices: Vec<_> = gpus().iter().map(|(_, device)| device.clone()).chain([cpu()]).collect();
    for device in devices {
        let mut b = Bench::new(&device);
        let mut random = Random(3);
        let down = experts(&mut b, &mut random, Format::Mxfp4, [e, n, k]);
        // Every token has a route to expert 4 first; then none has, and no route of expert 4 may be left.
        let (long, short) = ([4, 3].repeat(40), [0, 1, 2, 0, 1, 0, 3, 2]);
        let (all, x) = (b.input(&long), b.input(&random.f32s(40 * a * k)));
        let (few, tiles) = (b.input(&short), b.output(op.tiles(40) as usize * op.words()));
        let (steps, outputs) = ([40, 4].map(|t| step(&mut b, t)), [b.output(40 * a * n), b.output(4 * a * n)]);
        let each = b.output(4 * a * n);
        for (t, step, experts, y) in [(40, steps[0], all, outputs[0]), (4, steps[1], few, outputs[1])] {
            let mut p = program(t);
            p.group(op, step, experts, tiles);
            p.moe_down(&down, a as u32, Routing::Grouped(tiles, 2), x, y);
            b.run(&p, &[y]);
        }
        let mut p = program(4);
        p.moe_down(&down, a as u32, few, x, each);
        let single = b.run(&p, &[each]);
        assert!(b.words(outputs[1]) == single[0], "other bits on {}", device.describe());
        b.keep(down.weight);
    }
}
