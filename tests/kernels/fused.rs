//! Launches that do what several others do: the same bits, and near the twin.

use super::{FORMATS, check_on, experts, matrix, program, routes, step, weight};
use crate::harness::{Bench, Random, cpu, gpus, sum_tolerance};
use fourfold::format::Format;
use fourfold::ops::{
    Addend, CacheFormat, Gate, GateUp, HeadNorm, KvCache, LinearAdd, MoeDownAdd, MoeScatter, NormLinear, Piece,
    Projection, RmsNorm, Rotated, Router, Routes, Routing, Row, Scored, Swiglu,
};
use fourfold::program::{Program, Slice};

const EPS: f32 = 1e-5;

/// What is added to a row before its norm.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Added {
    Nothing,
    Row,
    Routes(usize),
}

/// One row: sum where something is added, h, and y or what is rotated of it. D, N; heads where y is queries, keys and values.
fn norm_linear_case(
    b: &mut Bench,
    format: Format,
    ([d, n], added): ([usize; 2], Added),
    heads: Option<([u32; 3], CacheFormat)>,
    fused: bool,
) -> (Program, Vec<Slice>) {
    let mut random = Random((d * n) as u64);
    let norm = RmsNorm { d: d as u32, eps: EPS };
    let bytes = matrix(&mut random, format, n, d);
    let weight = weight(b, format, [n, d], &bytes);
    let bias = if n.is_multiple_of(3) { None } else { Some(b.input(&random.bf16s(n + n % 2))) };
    let piece = Piece { weight, first: 0, input_scale: None };
    let w = Projection { pieces: vec![piece], n: n as u32, bias };
    assert!(NormLinear::takes(&w));
    let (x, g) = (b.input(&random.f32s(d)), b.input(&random.bf16s(d)));
    let a = if let Added::Routes(a) = added { a } else { 1 };
    let (addends, weights) = (b.input(&random.f32s(a * d)), b.input(&random.f32s(a)));
    let (sum, h, scattered) = (b.output(d), b.output(d), b.output(d));
    let y = if heads.is_some() { b.guarded(&vec![0.25; n]) } else { b.output(n) };
    let routes = Routes { experts: weights, weights };
    let addend = match added {
        Added::Nothing => None,
        Added::Row => Some(Addend::Rows(addends)),
        Added::Routes(a) => Some(Addend::Routes { a: a as u32, routes, x: addends, sum: scattered }),
    };
    let mut outputs = vec![h, y];
    let turned = heads.map(|([q, hk, dh], format)| {
        let (page, pages) = (4, 3);
        let elements = (2 * page * pages * hk * dh) as usize;
        let words = if format == CacheFormat::F32 { elements } else { elements / 2 };
        let cache = KvCache {
            format,
            page,
            pages,
            table: b.input(&[5u32, 0, 2, 4, 1, 3]),
            keys: b.guarded(&vec![7.0; words]),
            values: b.guarded(&vec![8.0; words]),
        };
        let row = Row { token: 3, sequence: 1, position: 9, pad: 0 };
        let rows = b.input(bytemuck::cast_slice::<_, u32>(&[row]));
        let table = b.input(&random.f32s(16 * dh as usize));
        outputs = vec![h, y, cache.keys, cache.values];
        ([q, hk, dh], rows, table, [cache])
    });
    let rotated =
        turned.as_ref().map(|(heads, rows, table, cache)| Rotated { heads: *heads, rows: *rows, table: *table, cache });
    let step = step(b, 1);
    outputs.extend(addend.map(|_| sum));
    let mut p = program(1);
    if fused {
        p.norm_linear(norm, (x, addend.map(|addend| (addend, sum)), g), h, &w, rotated, y);
    } else {
        match addend {
            None => p.rms_norm(norm, x, g, h),
            Some(addend) => p.add_norm(norm, x, addend, g, [sum, h]),
        }
        p.projection(step, &w, h, y);
        if let Some(Rotated { heads, rows, table, cache }) = rotated {
            p.rope(heads, rows, table, y, cache);
        }
    }
    w.pieces.into_iter().for_each(|piece| b.keep(piece.weight));
    (p, outputs)
}

#[test]
fn norm_linear_has_the_bits_of_its_parts() {
    // Rows of one group of lanes and of several, matrices that end within a workgroup, all that can be filled in.
    let shapes = [
        ([64, 32], Added::Row),
        ([576, 515], Added::Routes(4)),
        ([4128, 40], Added::Routes(3)),
        ([64, 528], Added::Row),
        ([4128, 36], Added::Nothing),
    ];
    let heads = [([2, 1, 8], CacheFormat::F32), ([6, 2, 20], CacheFormat::Bf16), ([2, 1, 16], CacheFormat::F32)];
    for format in FORMATS {
        let rounded = |d: usize| d.next_multiple_of(format.block());
        let plain = shapes.map(|([d, n], a)| (([rounded(d), n], a), None));
        let turned = [Added::Routes(2), Added::Nothing].into_iter().flat_map(|added| {
            heads.map(|(heads @ [h, hk, dh], cache)| {
                (([rounded(352), ((h + 2 * hk) * dh) as usize], added), Some((heads, cache)))
            })
        });
        for (shape, heads) in plain.into_iter().chain(turned) {
            let what = format!("norm_linear {format} {shape:?} {heads:?}");
            // A cache in bf16 has its own steps.
            if heads.is_none_or(|(_, cache)| cache == CacheFormat::F32) {
                let near = 8.0 * sum_tolerance(shape.0[0] + 4);
                check_on(&what, near, gpus(), |b| norm_linear_case(b, format, shape, heads, true));
            }
            for (gpu, device) in gpus() {
                let run = |fused| {
                    let mut b = Bench::new(device);
                    let (p, outputs) = norm_linear_case(&mut b, format, shape, heads, fused);
                    assert_eq!(p.launches.len(), if fused { 1 } else { 2 + usize::from(heads.is_some()) });
                    let mut words = b.run(&p, &outputs);
                    if let Some(([q, _, dh], _)) = heads {
                        words[1].truncate((q * dh) as usize); // keys and values stand in the cache only
                    }
                    words
                };
                assert!(run(true) == run(false), "{what}: other bits on {gpu}");
            }
        }
    }
}

#[test]
fn norm_linear_few_is_near_its_twin_and_has_the_norm_of_add_norm() {
    // More lanes than sixteens and fewer, as many; one row of weights, an odd number, more pairs than quads of a row.
    for [d, n, t] in [[64usize, 1, 3], [576, 33, 1], [4128, 32, 2], [2048, 6, 3], [16, 12, 5]] {
        let case = |b: &mut Bench, rows: std::ops::Range<usize>, fused: bool| {
            let mut random = Random((d * n) as u64);
            let bytes = matrix(&mut random, Format::Bf16, n, d);
            let weight = weight(b, Format::Bf16, [n, d], &bytes);
            let bias = if n == 32 { None } else { Some(b.input(&random.bf16s(n + n % 2))) };
            let w = Projection { pieces: vec![Piece { weight, first: 0, input_scale: None }], n: n as u32, bias };
            let (x, addends, g) = (random.f32s(t * d), random.f32s(t * d), b.input(&random.bf16s(d)));
            let some = rows.start * d..rows.end * d;
            let (x, addends, t) = (b.input(&x[some.clone()]), b.input(&addends[some]), rows.len());
            let (sum, h, y) = (b.output(t * d), b.output(t * d), b.output(t * n));
            let norm = RmsNorm { d: d as u32, eps: EPS };
            let mut p = program(t);
            if fused {
                assert!(NormLinear::takes_few(&w));
                p.norm_linear_few(norm, (x, addends, g), [sum, h], &w, y);
            } else {
                p.add_norm(norm, x, Addend::Rows(addends), g, [sum, h]);
            }
            w.pieces.into_iter().for_each(|piece| b.keep(piece.weight));
            (p, if fused { vec![sum, h, y] } else { vec![sum, h] })
        };
        let what = format!("norm_linear_few D={d} N={n} T={t}");
        check_on(&what, 8.0 * sum_tolerance(d), gpus(), |b| case(b, 0..t, true));
        for (gpu, device) in gpus() {
            let run = |rows, fused| {
                let mut b = Bench::new(device);
                let (p, outputs) = case(&mut b, rows, fused);
                b.run(&p, &outputs)
            };
            let all = run(0..t, true);
            assert!(all[..2] == run(0..t, false)[..], "{what}: another norm on {gpu}");
            let last = run(t - 1..t, true);
            assert!(all[2][(t - 1) * n..] == last[2][..], "{what}: other bits alone on {gpu}");
        }
    }
}

#[test]
fn norm_rope_has_the_bits_of_its_parts() {
    // Heads smaller than the lanes of a workgroup, and larger.
    for (([h, hk, dh], tokens), format) in [([4, 2, 36], 3), ([3, 1, 128], 1), ([2, 2, 256], 2)].into_iter().zip([
        CacheFormat::F32,
        CacheFormat::Bf16,
        CacheFormat::F32,
    ]) {
        let case = |b: &mut Bench, fused: bool| {
            let mut random = Random(u64::from(h * dh));
            let width = (h + 2 * hk) * dh;
            let qkv = b.guarded(&random.f32s((tokens * width) as usize));
            let gains = [b.input(&random.bf16s(dh as usize)), b.input(&random.bf16s(dh as usize))];
            let row = |i: u32| Row { token: 3, sequence: i, position: 2 + i, pad: 0 };
            let rows: Vec<Row> = (0..tokens).map(row).collect();
            let rows = b.input(bytemuck::cast_slice::<_, u32>(&rows));
            let table = b.input(&random.f32s((8 * dh) as usize));
            let keys = b.guarded(&vec![7.0; (tokens * 4 * hk * dh) as usize]);
            let values = b.guarded(&vec![8.0; (tokens * 4 * hk * dh) as usize]);
            let pages = b.input(&(0..tokens).collect::<Vec<u32>>());
            let cache = [KvCache { format, page: 4, pages: 1, table: pages, keys, values }];
            let mut p = program(tokens as usize);
            if fused {
                p.norm_rope(EPS, gains, Rotated { heads: [h, hk, dh], rows, table, cache: &cache }, qkv);
            } else {
                p.head_norm(HeadNorm { h, hk, dh, eps: EPS }, gains, qkv);
                p.rope([h, hk, dh], rows, table, qkv, &cache);
            }
            (p, vec![qkv, keys, values])
        };
        let what = format!("{h} {hk} {dh}, {tokens} rows");
        for (gpu, device) in gpus() {
            let [parts, whole] = [false, true].map(|fused| {
                let mut b = Bench::new(device);
                let (p, outputs) = case(&mut b, fused);
                let mut words = b.run(&p, &outputs);
                // Keys stand normalised in `qkv` only after a launch of their own.
                let row = ((h + 2 * hk) * dh) as usize;
                words[0] = words[0].chunks(row).flat_map(|row| row[..(h * dh) as usize].to_vec()).collect();
                words
            });
            assert!(parts == whole, "{what}: other bits on {gpu}");
        }
        if format == CacheFormat::F32 {
            check_on(&what, 2.0 * sum_tolerance(dh as usize), gpus(), |b| case(b, true));
        }
    }
}

#[test]
fn experts_that_choose_have_the_bits_of_those_that_are_told() {
    // The last two have so many rows of weights that workgroups take twice as many of them, and end within one or not.
    for ([t, e, a, f, k], normalise) in [
        ([1, 32, 4, 21, 96], true),
        ([3, 130, 8, 9, 352], false),
        ([2, 1, 1, 5, 32], true),
        ([1, 5, 4, 2052, 64], true),
        ([1, 5, 4, 2048, 32], true),
    ] {
        let case = |b: &mut Bench, fused: bool| {
            let mut random = Random((e * f) as u64);
            let up = experts(b, &mut random, Format::Mxfp4, [e, 2 * f, k]);
            let mut scores = random.f32s(t * e);
            if e > 2 {
                scores[e / 2] = scores[1]; // of equal ones the lower index
            }
            let (scores, x) = (b.input(&scores), b.input(&random.f32s(t * k)));
            let routes = Routes { experts: b.output(t * a), weights: b.output(t * a) };
            let y = b.output(t * a * f);
            let choice = Router { e: e as u32, a: a as u32, normalise };
            let mut p = program(t);
            let routing = match fused {
                true => Routing::Chosen(choice, scores, routes),
                false => {
                    p.router(choice, scores, routes);
                    Routing::Each(routes.experts)
                }
            };
            p.moe_up(&up, Swiglu::gpt_oss(a as u32, [7.0, 1.702]), routing, (x, a as u32), y);
            b.keep(up.weight);
            (p, vec![routes.experts, routes.weights, y])
        };
        let what = format!("T={t} E={e} A={a}");
        for (gpu, device) in gpus() {
            let [told, chosen] = [false, true].map(|fused| {
                let mut b = Bench::new(device);
                let (p, outputs) = case(&mut b, fused);
                b.run(&p, &outputs)
            });
            assert!(told == chosen, "{what}: other bits on {gpu}");
        }
        check_on(&what, 2.0 * sum_tolerance(k), gpus(), |b| {
            let (p, outputs) = case(b, true);
            (p, outputs[1..].to_vec())
        });
    }
}

/// From attention's output to the experts' first matrix, in two launches or four: `format` of the projection and the experts. D, K
/// of the projection, E, A, F.
fn linear_add_case(
    b: &mut Bench,
    format: Format,
    [d, k, e, a, f]: [usize; 5],
    form: Swiglu,
    fused: bool,
) -> (Program, Vec<Slice>) {
    let mut random = Random((d * k + e) as u64);
    let projection = |b: &mut Bench, random: &mut Random, format, [n, k]: [usize; 2], biased: bool| {
        let bytes = matrix(random, format, n, k);
        let weight = weight(b, format, [n, k], &bytes);
        let bias = biased.then(|| b.input(&random.bf16s(n + n % 2)));
        Projection { pieces: vec![Piece { weight, first: 0, input_scale: None }], n: n as u32, bias }
    };
    let w = projection(b, &mut random, format, [d, k], e > 1);
    let router = projection(b, &mut random, Format::Bf16, [e, d], true);
    let mut up = experts(b, &mut random, format, [e, 2 * f, d]);
    up.bias = up.bias.filter(|_| e != 9);
    let (x, residual) = (b.input(&random.f32s(k)), b.input(&random.f32s(d)));
    let g = b.input(&random.bf16s(d));
    let [delta, sum, h] = [d; 3].map(|n| b.output(n));
    let (scores, shares, y) = (b.output(e), b.output(LinearAdd::share_words(d as u32, e as u32)), b.output(a * f));
    let routes = Routes { experts: b.output(a), weights: b.output(a) };
    let norm = RmsNorm { d: d as u32, eps: EPS };
    let choice = Router { e: e as u32, a: a as u32, normalise: e != 5 };
    let mut p = program(1);
    if fused {
        assert!(LinearAdd::takes(&w, &router).is_some());
        p.linear_add(&w, [x, residual], (g, &router), [delta, sum, shares]);
        let scored = Scored { x: sum, g, shares, bias: router.bias.unwrap() };
        p.norm_moe_up((norm, choice), scored, (&up, form), [h, scores], routes, y);
    } else {
        let step = step(b, 1);
        p.projection(step, &w, x, delta);
        p.norm_linear_few(norm, (residual, delta, g), [sum, h], &router, scores);
        p.router(choice, scores, routes);
        p.moe_up(&up, form, Routing::Each(routes.experts), (h, a as u32), y);
    }
    [w, router].into_iter().flat_map(|w| w.pieces).for_each(|piece| b.keep(piece.weight));
    b.keep(up.weight);
    (p, vec![delta, sum, h, scores, routes.weights, y, routes.experts])
}

#[test]
fn linear_add_and_norm_moe_up_have_the_bits_of_their_parts() {
    // One sixteen and less than a group of lanes; several groups, the last not full; more spans than groups of lanes; one expert,
    // as many as there may be, and five that weigh against all; few outputs and so many that workgroups take two or three times as
    // many rows, gates and ups side by side and apart.
    let shapes = [
        ([16usize, 32usize, 1, 1, 5], true),
        ([64, 96, 5, 3, 21], false),
        ([576, 512, 32, 4, 29], true),
        ([2880, 64, 31, 8, 16], true),
        ([64, 64, 9, 8, 1152], true),
        ([64, 64, 7, 6, 1024], false),
        ([4160, 64, 32, 2, 24], false),
    ];
    for ([d, k, e, a, f], interleaved) in shapes {
        for format in FORMATS {
            let shape = [d.next_multiple_of(format.block()), k.next_multiple_of(format.block()), e, a, f];
            let gpt_oss = Swiglu::gpt_oss(a as u32, [7.0, 1.702]);
            let form = if interleaved { gpt_oss } else { Swiglu { rows: GateUp::Halves, gate: Gate::Silu, ..gpt_oss } };
            let what = format!("linear_add and norm_moe_up {format} {shape:?}");
            check_on(&what, 8.0 * sum_tolerance(d + k), gpus(), |b| {
                let (p, mut outputs) = linear_add_case(b, format, shape, form, true);
                outputs.pop(); // experts are no f32
                (p, outputs)
            });
            // The twins, too: a device that is one has the same programs.
            for (gpu, device) in gpus().iter().chain([&("the twins", cpu())]) {
                let run = |fused| {
                    let mut b = Bench::new(device);
                    let (p, outputs) = linear_add_case(&mut b, format, shape, form, fused);
                    assert_eq!(p.launches.len(), if fused { 2 } else { 4 });
                    b.run(&p, &outputs)
                };
                assert!(run(true) == run(false), "{what}: other bits on {gpu}");
            }
        }
    }
}

#[test]
fn linear_add_is_for_a_whole_projection_and_a_small_router_in_bf16_with_a_bias() {
    let twins = cpu();
    let mut b = Bench::new(&twins);
    let mut random = Random(1);
    let bias = b.input(&random.bf16s(64));
    let mut projection = |n: usize, format: Format, biased: bool| {
        let bytes = matrix(&mut random, format, n, 64);
        let piece = Piece { weight: weight(&b, format, [n, 64], &bytes), first: 0, input_scale: None };
        Projection { pieces: vec![piece], n: n as u32, bias: biased.then_some(bias) }
    };
    let (out, odd) = (projection(64, Format::Mxfp4, false), projection(40, Format::Mxfp4, true));
    let [router, most] = [8, 32].map(|e| projection(e, Format::Bf16, true));
    let [many, bare, other] = [(33, Format::Bf16, true), (8, Format::Bf16, false), (8, Format::Fp8, true)]
        .map(|(e, format, biased)| projection(e, format, biased));
    assert!(LinearAdd::takes(&out, &router).is_some() && LinearAdd::takes(&out, &most).is_some());
    for (out, router) in [(&odd, &router), (&out, &many), (&out, &bare), (&out, &other)] {
        assert!(LinearAdd::takes(out, router).is_none());
    }
    assert_eq!(LinearAdd::share_words(2880, 33), 0);
}

/// `y = residual + sum_a weights (w_e x + bias)`, in one launch or three.
fn moe_down_add_case(b: &mut Bench, format: Format, [t, e, a, d, k]: [usize; 5], fused: bool) -> (Program, Vec<Slice>) {
    let mut random = Random((d * k + a) as u64);
    let down = experts(b, &mut random, format, [e, d, k]);
    let chosen = routes(&mut random, t, e, a);
    let routes = Routes { experts: b.input(&chosen), weights: b.input(&random.f32s(t * a)) };
    let (x, residual) = (b.input(&random.f32s(t * a * k)), b.input(&random.f32s(t * d)));
    let (each, sum, y) = (b.output(t * a * d), b.output(t * d), b.output(t * d));
    let mut p = program(t);
    if fused {
        assert!(MoeDownAdd::takes(&down, a as u32));
        p.moe_down_add(&down, a as u32, routes, x, [residual, y]);
    } else {
        p.moe_down(&down, a as u32, routes.experts, x, each);
        p.moe_scatter(MoeScatter { a: a as u32, d: d as u32 }, routes, each, sum);
        p.add(d as u32, residual, sum, y);
    }
    b.keep(down.weight);
    (p, vec![y])
}

#[test]
fn moe_down_add_has_the_bits_of_its_parts() {
    // Fewer slots than groups of lanes and more, more spans than slots, rows that end within a workgroup, one route, two and eight.
    let shapes: [[usize; 5]; 5] =
        [[1, 3, 1, 40, 64], [1, 3, 2, 8, 64], [1, 8, 4, 66, 576], [3, 9, 8, 40, 352], [2, 5, 3, 5, 4224]];
    for [t, e, a, d, k] in shapes {
        for format in FORMATS {
            let shape = [t, e, a, d, k.next_multiple_of(format.block())];
            let what = format!("moe_down_add {format} {shape:?}");
            check_on(&what, 4.0 * sum_tolerance(k + a), gpus(), |b| moe_down_add_case(b, format, shape, true));
            for (gpu, device) in gpus() {
                let run = |fused| {
                    let mut b = Bench::new(device);
                    let (p, outputs) = moe_down_add_case(&mut b, format, shape, fused);
                    assert_eq!(p.launches.len(), if fused { 1 } else { 3 });
                    b.run(&p, &outputs)
                };
                assert!(run(true) == run(false), "{what}: other bits on {gpu}");
            }
        }
    }
}
