//! Every kernel against its twin: the same program runs on the twins and on every GPU variant, over uneven inputs,
//! with outputs that start as NaN and shapes that leave partial tiles.

mod attention;
mod draw;
mod fused;
mod group;
mod matrix;
mod sampled;

use crate::harness::{Bench, Named, Random, assert_near, cpu, gpus, small_binding_gpu, sum_tolerance};
use fourfold::HostStages;
use fourfold::device::Device;
use fourfold::format::Format;
use fourfold::ops::{
    Amax, Experts, Gate, GateUp, Glu, HeadNorm, MoeScatter, RmsNorm, Router, Routes, Row, Step, Stream, Swiglu, Weight,
    WeightBytes,
};
use fourfold::program::{Program, Slice};
use std::sync::Arc;

const EPS: f64 = f32::EPSILON as f64;

/// Run `setup`'s program on the twins and on every GPU variant; each output must be near the twins'.
fn check(what: &str, tolerance: f64, setup: impl Fn(&mut Bench) -> (Program, Vec<Slice>)) {
    check_on(what, tolerance, gpus(), setup);
}

fn check_on(what: &str, tolerance: f64, devices: &[Named], setup: impl Fn(&mut Bench) -> (Program, Vec<Slice>)) {
    let run = |device: &Arc<dyn Device>| {
        let mut bench = Bench::new(device);
        let (program, outputs) = setup(&mut bench);
        bench.run(&program, &outputs)
    };
    let want = run(&cpu());
    for (name, device) in devices {
        for (i, (got, want)) in run(device).iter().zip(&want).enumerate() {
            assert_near(&format!("{what}, output {i}, on {name}"), got, want, tolerance);
        }
    }
}

/// Words of one output of a program on a device.
fn output_of(device: &Arc<dyn Device>, setup: impl Fn(&mut Bench) -> (Program, Vec<Slice>)) -> Vec<u32> {
    let mut bench = Bench::new(device);
    let (program, outputs) = setup(&mut bench);
    bench.run(&program, &outputs).swap_remove(0)
}

fn program(tokens: usize) -> Program {
    Program::new(tokens as u32, HostStages::default())
}

fn step(bench: &mut Bench, tokens: usize) -> Slice {
    bench.input(&[Step { tokens: tokens as u32, pad: [0; 3] }])
}

/// Bytes of a random matrix: (codes, scales). MXFP4 scales spread over a few binades around 2^-6, as trained weights'.
fn matrix(random: &mut Random, format: Format, rows: usize, k: usize) -> Bytes {
    let n_scales = format.scale_bytes(k) * rows;
    // FP8 codes without NaN, and E4M3 scales without NaN and negatives.
    let mut fp8 = |n: usize, mask: u8| -> Vec<u8> {
        random.bytes(n).into_iter().map(|b| if b & 0x7f == 0x7f { b - 1 } else { b } & mask).collect()
    };
    let (codes, scales) = match format {
        Format::Fp8 | Format::Fp8Blocks => (fp8(rows * k, 0xff), Vec::new()),
        Format::Nvfp4 => (Vec::new(), fp8(n_scales, 0x7f)),
        _ => Default::default(),
    };
    match format {
        Format::Bf16 => Bytes { codes: random.bf16s(rows * k), ..Bytes::default() },
        Format::Fp8 => Bytes { codes, row_scales: row_scales(random, rows), ..Bytes::default() },
        Format::Fp8Blocks => {
            let scales = bytemuck::cast_slice(&row_scales(random, n_scales / 4)).to_vec();
            Bytes { codes, scales, ..Bytes::default() }
        }
        Format::Mxfp4 => {
            let codes = random.bytes(format.row_bytes(k) * rows);
            let scales = (0..n_scales).map(|_| 119 + random.below(5) as u8).collect();
            Bytes { codes, scales, ..Bytes::default() }
        }
        Format::Nvfp4 => {
            let codes = random.bytes(format.row_bytes(k) * rows);
            Bytes { codes, scales, row_scales: row_scales(random, rows) }
        }
        Format::F32 => unreachable!("no kernel reads f32 weights"),
    }
}

/// Uneven numbers around 2^-12.
fn row_scales(random: &mut Random, n: usize) -> Vec<f32> {
    random.f32s(n).iter().map(|v| (v.abs() + 0.1) / 4096.0).collect()
}

/// A weight's bytes.
#[derive(Default)]
struct Bytes {
    codes: Vec<u8>,
    scales: Vec<u8>,
    row_scales: Vec<f32>,
}

impl Bytes {
    fn with<R>(&self, make: impl FnOnce(&WeightBytes<'_>) -> R) -> R {
        make(&WeightBytes { codes: &[&self.codes], scales: &[&self.scales], row_scales: &self.row_scales })
    }
}

fn weight(bench: &Bench, format: Format, shape: [usize; 2], bytes: &Bytes) -> Weight {
    let shape = shape.map(|n| n as u32);
    bytes.with(|bytes| Weight::matrix(&bench.device, "test weight", format, shape, bytes)).unwrap()
}

/// Every format that a kernel reads.
const FORMATS: [Format; 5] = [Format::Bf16, Format::Fp8, Format::Fp8Blocks, Format::Mxfp4, Format::Nvfp4];

#[test]
fn rms_norm() {
    for (t, d) in [(1, 4), (3, 96), (5, 320), (2, 2880), (1, 132)] {
        // One sum of D squares, a square root, a division and two products.
        check(&format!("rms_norm T={t} D={d}"), sum_tolerance(d), |b| {
            let mut random = Random(d as u64);
            let (x, g, y) = (b.input(&random.f32s(t * d)), b.input(&random.bf16s(d)), b.output(t * d));
            let mut p = program(t);
            p.rms_norm(RmsNorm { d: d as u32, eps: 1e-5 }, x, g, y);
            (p, vec![y])
        });
    }
}

#[test]
fn linear() {
    for format in FORMATS {
        for (t, n, k) in [(1, 1, 32), (1, 40, 320), (3, 9, 96), (4, 7, 160), (8, 17, 2880), (17, 24, 64), (9, 513, 32)]
        {
            let k = usize::next_multiple_of(k, format.block());
            for with_bias in [true, false] {
                let what = format!("linear {format} T={t} N={n} K={k} bias={with_bias}");
                check(&what, sum_tolerance(k), |b| linear_case(b, format, [t, n, k], with_bias, 0..t));
            }
        }
    }
}

#[test]
fn linear_whose_rows_fill_their_workgroups() {
    for format in [Format::Bf16, Format::Mxfp4, Format::Nvfp4] {
        // Of 8, of 4, of 32 in tiles of two and of four tokens.
        for (t, n, k) in [(1, 512, 96), (2, 64, 96), (2, 512, 64), (5, 544, 64), (17, 544, 64)] {
            let what = format!("linear {format} T={t} N={n} K={k}");
            check(&what, sum_tolerance(k), |b| linear_case(b, format, [t, n, k], true, 0..t));
        }
    }
}

fn linear_case(
    b: &mut Bench,
    format: Format,
    [t, n, k]: [usize; 3],
    with_bias: bool,
    rows: std::ops::Range<usize>,
) -> (Program, Vec<Slice>) {
    let mut random = Random((n * k) as u64);
    let bytes = matrix(&mut random, format, n, k);
    let bias = random.bf16s(n);
    let x = random.f32s(t * k);
    let x = &x[rows.start * k..rows.end * k];
    let t = rows.len();
    let w = weight(b, format, [n, k], &bytes);
    let (x, y, step) = (b.input(x), b.output(t * n), step(b, t));
    let bias = with_bias.then(|| b.input(&bias));
    let mut p = program(t);
    p.linear(step, &w, bias, x, y);
    b.keep(w);
    (p, vec![y])
}

#[test]
fn linear_split_by_the_binding_limit() {
    // 64 rows of 320 bf16 are 40960 bytes: parts of 24 rows (a multiple of 8), and a rest.
    let Some(small) = small_binding_gpu(16384) else { return };
    check_on("linear in parts", sum_tolerance(320), &[("small bindings", small)], |b| {
        linear_case(b, Format::Bf16, [5, 64, 320], true, 0..5)
    });
}

#[test]
fn a_row_of_linear_does_not_depend_on_its_neighbours() {
    for (_, device) in gpus() {
        for (format, k) in [(Format::Bf16, 2880), (Format::Mxfp4, 320), (Format::Nvfp4, 336)] {
            let (t, n) = (19, 23);
            let all = output_of(device, |b| linear_case(b, format, [t, n, k], true, 0..t));
            for rows in [0..1, 7..8, 18..19, 3..6, 2..11] {
                let some = output_of(device, |b| linear_case(b, format, [t, n, k], true, rows.clone()));
                assert!(some == all[rows.start * n..rows.end * n], "{format} rows {rows:?} alone have other bits");
            }
        }
    }
}

/// E experts of which routes use A a token, in no order; part of the experts unused.
fn routes(random: &mut Random, t: usize, e: usize, a: usize) -> Vec<u32> {
    (0..t)
        .flat_map(|_| {
            let mut all: Vec<u32> = (0..e as u32).collect();
            for i in 0..a {
                let j = i + random.below(e - i);
                all.swap(i, j);
            }
            all.truncate(a);
            all
        })
        .collect()
}

fn experts(b: &mut Bench, random: &mut Random, format: Format, [e, n, k]: [usize; 3]) -> Experts {
    let bytes = matrix(random, format, e * n, k);
    let bias = Some(b.input(&random.bf16s(e * n)));
    let shape = [e, n, k].map(|n| n as u32);
    let weight = bytes.with(|bytes| Weight::experts(&b.device, "test experts", format, shape, bytes)).unwrap();
    Experts { weight, bias, input_scale: None }
}

fn moe_up_case(
    b: &mut Bench,
    format: Format,
    shape: [usize; 5],
    rows: std::ops::Range<usize>,
) -> (Program, Vec<Slice>) {
    moe_up_form(b, format, shape, Swiglu::gpt_oss(shape[2] as u32, [7.0, 1.702]), rows)
}

fn moe_up_form(
    b: &mut Bench,
    format: Format,
    [t, e, a, f, k]: [usize; 5],
    form: Swiglu,
    rows: std::ops::Range<usize>,
) -> (Program, Vec<Slice>) {
    let mut random = Random((f * k) as u64);
    let up = experts(b, &mut random, format, [e, 2 * f, k]);
    let (chosen, h) = (routes(&mut random, t, e, a), random.f32s(t * k));
    let t = rows.len();
    let chosen = b.input(&chosen[rows.start * a..rows.end * a]);
    let h = b.input(&h[rows.start * k..rows.end * k]);
    let y = b.output(t * a * f);
    let mut p = program(t);
    p.moe_up(&up, form, chosen, (h, a as u32), y);
    b.keep(up.weight);
    (p, vec![y])
}

fn moe_down_case(b: &mut Bench, format: Format, [t, e, a, d, k]: [usize; 5]) -> (Program, Vec<Slice>) {
    let mut random = Random((d * k) as u64);
    let down = experts(b, &mut random, format, [e, d, k]);
    let (chosen, x) = (routes(&mut random, t, e, a), random.f32s(t * a * k));
    let (chosen, x, y) = (b.input(&chosen), b.input(&x), b.output(t * a * d));
    let mut p = program(t);
    p.moe_down(&down, a as u32, chosen, x, y);
    b.keep(down.weight);
    (p, vec![y])
}

#[test]
fn moe_up() {
    for format in FORMATS {
        for (t, e, a, f, k) in [(1, 4, 2, 8, 32), (3, 7, 3, 13, 96), (2, 8, 4, 160, 320), (1, 2, 1, 9, 2880)] {
            let k = usize::next_multiple_of(k, format.block());
            let what = format!("moe_up {format} T={t} E={e} A={a} F={f} K={k}");
            // The activation multiplies gate by up: twice the relative error of a sum.
            check(&what, 2.0 * sum_tolerance(k), |b| moe_up_case(b, format, [t, e, a, f, k], 0..t));
        }
    }
}

#[test]
fn moe_up_with_gates_before_ups() {
    for format in FORMATS {
        let shape = [3, 7, 3, 13, 160usize.next_multiple_of(format.block())];
        let form = Swiglu { a: 3, rows: GateUp::Halves, gate: Gate::Silu };
        check(&format!("moe_up in halves {format}"), 2.0 * sum_tolerance(shape[4]), |b| {
            moe_up_form(b, format, shape, form, 0..3)
        });
    }
}

#[test]
fn matrices_without_bias_in_the_formats_of_experts() {
    check("moe_down without bias", sum_tolerance(96), |b| {
        let mut random = Random(8);
        let down = Experts { bias: None, ..experts(b, &mut random, Format::Nvfp4, [4, 9, 96]) };
        let (chosen, x) = (b.input(&routes(&mut random, 3, 4, 2)), b.input(&random.f32s(3 * 2 * 96)));
        let y = b.output(3 * 2 * 9);
        let mut p = program(3);
        p.moe_down(&down, 2, chosen, x, y);
        b.keep(down.weight);
        (p, vec![y])
    });
}

#[test]
fn glu() {
    for (t, f) in [(1, 1), (3, 96), (2, 1000)] {
        for gate in [Gate::Silu, Gate::Clamped { limit: 7.0, alpha: 1.702 }] {
            // e^x of our own is good to an ulp or, where a driver splits fma, to |x| of them.
            check(&format!("glu {gate:?} T={t} F={f}"), 16.0 * EPS, |b| {
                let x: Vec<f32> = Random(f as u64).f32s(t * 2 * f).iter().map(|v| v * 4.0).collect();
                let (x, y) = (b.input(&x), b.output(t * f));
                let mut p = program(t);
                p.glu(Glu { f: f as u32, gate }, x, y);
                (p, vec![y])
            });
        }
    }
}

#[test]
fn nan_and_large_numbers_pass_through_glu_as_they_are() {
    for (name, device) in gpus() {
        for gate in [Gate::Silu, Gate::Clamped { limit: 7.0, alpha: 1.702 }] {
            let x = [f32::NAN, 1.0, -1e30, 1e30, 1.0, f32::NAN, 1.0, 1.0];
            let got = output_of(device, |b| {
                let (x, y) = (b.input(&x), b.output(4));
                let mut p = program(1);
                p.glu(Glu { f: 4, gate }, x, y);
                (p, vec![y])
            });
            let got = crate::harness::floats(&got);
            assert!(got[0].is_nan() && got[1].is_nan() && got[2] == 0.0, "{gate:?} on {name}: {got:?}");
            assert!(got[3] == if gate == Gate::Silu { 1e30 } else { got[3] } && got[3] > 13.0, "{gate:?} {got:?}");
        }
    }
}

#[test]
fn head_norm() {
    for (t, h, hk, dh) in [(1, 1, 1, 4), (3, 4, 2, 32), (2, 8, 1, 128), (5, 3, 3, 252)] {
        check(&format!("head_norm T={t} H={h} HK={hk} DH={dh}"), sum_tolerance(dh), |b| {
            let mut random = Random(dh as u64);
            let gains = [0; 2].map(|_| b.input(&random.bf16s(dh)));
            let x = b.guarded(&random.f32s(t * (h + 2 * hk) * dh));
            let mut p = program(t);
            p.head_norm(HeadNorm { h: h as u32, hk: hk as u32, dh: dh as u32, eps: 1e-6 }, gains, x);
            (p, vec![x])
        });
    }
}

#[test]
fn amax() {
    for (t, k, rows_per_token) in [(1, 16, 1), (3, 96, 2), (2, 2880, 4)] {
        check("amax", 0.0, |b| {
            let rows = t * rows_per_token;
            let (x, y) = (b.input(&Random(k as u64).f32s(rows * k)), b.output(rows));
            let mut p = program(t);
            p.amax(Amax { k: k as u32, rows_per_token: rows_per_token as u32 }, x, y);
            (p, vec![y])
        });
    }
}

#[test]
fn a_row_of_moe_up_does_not_depend_on_its_neighbours() {
    for (_, device) in gpus() {
        let (t, a, f) = (6, 3, 13);
        let case = |rows: std::ops::Range<usize>| {
            output_of(device, |b| moe_up_case(b, Format::Mxfp4, [t, 7, a, f, 96], rows.clone()))
        };
        let all = case(0..t);
        for row in 0..t {
            assert!(case(row..row + 1) == all[row * a * f..(row + 1) * a * f], "row {row} alone has other bits");
        }
    }
}

#[test]
fn moe_down() {
    for format in FORMATS {
        for (t, e, a, d, k) in [(1, 4, 2, 8, 32), (3, 7, 3, 13, 160), (2, 8, 4, 320, 160), (1, 2, 1, 9, 2880)] {
            let k = usize::next_multiple_of(k, format.block());
            let what = format!("moe_down {format} T={t} E={e} A={a} D={d} K={k}");
            check(&what, sum_tolerance(k), |b| moe_down_case(b, format, [t, e, a, d, k]));
        }
    }
}

#[test]
fn one_expert_is_not_split() {
    // A layer with a single expert is still a layer of experts: where it does not fit, that is an error.
    let Some(small) = small_binding_gpu(2048) else { return };
    let shape = [1, 64, 96];
    let made = Bytes { codes: vec![0; 64 * 48], scales: vec![127; 64 * 3], ..Bytes::default() }
        .with(|bytes| Weight::experts(&small, "single", Format::Mxfp4, shape, bytes));
    assert!(made.unwrap_err().to_string().contains("one expert takes 3072 bytes"));
}

#[test]
fn experts_split_by_the_binding_limit() {
    // One expert of moe_up has 66 rows of 48 bytes: parts of three experts, and one left. Of moe_down: two, and one left.
    let Some(small) = small_binding_gpu(12288) else { return };
    let devices = [("small bindings", small)];
    check_on("moe_up in parts", 2.0 * sum_tolerance(96), &devices, |b| {
        moe_up_case(b, Format::Mxfp4, [5, 7, 3, 33, 96], 0..5)
    });
    check_on("moe_down in parts", sum_tolerance(160), &devices, |b| {
        moe_down_case(b, Format::Mxfp4, [5, 7, 3, 67, 160])
    });
}

#[test]
fn saturated_activations_are_clamped() {
    // Large inputs drive gate and up far past the limit on both sides: the result is bounded by 7 x 8.
    let check_large = |b: &mut Bench| {
        let (p, outputs) = moe_up_case(b, Format::Bf16, [2, 4, 2, 33, 320], 0..2);
        (p, outputs)
    };
    for (_, device) in gpus() {
        let words = output_of(device, check_large);
        let largest = words.iter().map(|w| f32::from_bits(*w).abs()).fold(0.0, f32::max);
        assert!(largest > 50.0 && largest <= 56.0, "{largest}");
    }
}

#[test]
fn every_mxfp4_code_and_scale_on_the_device() {
    // One block per scale holding all 16 codes twice, times one-hot inputs: the product is the decoded value itself.
    // Scale 0 is the subnormal 2^-127, which a GPU may flush to zero, and with it the block; other subnormal products it
    // may flush, too. Nothing else may differ by a bit. From 2^126 on (scale 253) the largest codes pass f32's range.
    let block: Vec<u8> = (0..16u8).map(|i| (2 * i % 16) | ((2 * i + 1) % 16) << 4).collect();
    let codes: Vec<u8> = (0..253).flat_map(|_| block.clone()).collect();
    let scales: Vec<u8> = (0..253).collect();
    let x: Vec<f32> = (0..32 * 32).map(|i| f32::from(i % 33 == 0)).collect();
    let setup = |b: &mut Bench| {
        let bytes = Bytes { codes: codes.clone(), scales: scales.clone(), ..Bytes::default() };
        let w = weight(b, Format::Mxfp4, [253, 32], &bytes);
        let (x, y, step) = (b.input(&x), b.output(32 * 253), step(b, 32));
        let mut p = program(32);
        p.linear(step, &w, None, x, y);
        b.keep(w);
        (p, vec![y])
    };
    let want = output_of(&cpu(), setup);
    for (name, device) in gpus() {
        for (i, (got, want)) in output_of(device, setup).iter().zip(&want).enumerate() {
            let (scale, code) = (i % 253, i / 253 % 16);
            let (got, want) = (f32::from_bits(*got), f32::from_bits(*want));
            let flushed = (scale == 0 || want.is_subnormal()) && got == 0.0;
            assert!(
                got.to_bits() == want.to_bits() || flushed || (got == 0.0 && want == 0.0),
                "scale {scale} code {code} on {name}: {got:e}, not {want:e}"
            );
        }
    }
}

#[test]
fn embed() {
    let (vocab, d, t) = (50, 66, 9);
    let setup = |b: &mut Bench| {
        let mut random = Random(5);
        let bytes = Bytes { codes: random.bf16s(vocab * d), ..Bytes::default() };
        let table = weight(b, Format::Bf16, [vocab, d], &bytes);
        let row = |i: usize| Row { token: (i * 17 % vocab) as u32, ..Row::default() };
        let rows: Vec<Row> = (0..t).map(row).collect();
        let (rows, x) = (b.input(&rows), b.output(t * d));
        let mut p = program(t);
        p.embed(&table, rows, x);
        b.keep(table);
        (p, vec![x])
    };
    check("embed", 0.0, setup);
    if let Some(small) = small_binding_gpu(4096) {
        check_on("embed in parts", 0.0, &[("small bindings", small)], setup);
    }
}

#[test]
fn router() {
    let cases = [(1, 4, 4), (3, 7, 3), (5, 32, 4), (2, 128, 4), (2, 100, 16), (1, 1, 1)];
    for (t, e, a, normalise) in cases.into_iter().flat_map(|(t, e, a)| [(t, e, a, true), (t, e, a, false)]) {
        let setup = |b: &mut Bench| {
            let mut random = Random(e as u64);
            let mut scores: Vec<f32> = random.f32s(t * e);
            // Ties, within the chosen and across the border.
            for row in scores.chunks_exact_mut(e) {
                for i in (0..e).step_by(3) {
                    row[i] = (row[i] * 2.0).round() / 2.0;
                }
            }
            let scores = b.input(&scores);
            let routes = Routes { experts: b.output(t * a), weights: b.output(t * a) };
            let mut p = program(t);
            p.router(Router { e: e as u32, a: a as u32, normalise }, scores, routes);
            (p, vec![routes.weights, routes.experts])
        };
        let run = |device: &Arc<dyn Device>| {
            let mut bench = Bench::new(device);
            let (program, outputs) = setup(&mut bench);
            bench.run(&program, &outputs)
        };
        let want = run(&cpu());
        for (name, device) in gpus() {
            let got = run(device);
            assert_eq!(got[1], want[1], "experts E={e} A={a} on {name}");
            assert_near(&format!("weights E={e} A={a} on {name}"), &got[0], &want[0], 16.0 * EPS);
        }
    }
}

#[test]
fn a_router_with_nan_scores_still_names_experts_that_exist() {
    for (_, device) in gpus() {
        let mut b = Bench::new(device);
        let scores = b.input(&[f32::NAN; 8]);
        let routes = Routes { experts: b.output(4), weights: b.output(4) };
        let mut p = program(1);
        p.router(Router { e: 8, a: 4, normalise: true }, scores, routes);
        let experts = b.run(&p, &[routes.experts]).swap_remove(0);
        assert!(experts.iter().all(|e| *e < 8), "{experts:?}");
    }
}

#[test]
fn moe_scatter() {
    for (t, a, d) in [(1, 1, 1), (3, 3, 67), (5, 4, 320)] {
        check(&format!("moe_scatter T={t} A={a} D={d}"), sum_tolerance(a), |b| {
            let mut random = Random(d as u64);
            let weights = b.input(&random.f32s(t * a));
            let (x, y) = (b.input(&random.f32s(t * a * d)), b.output(t * d));
            let mut p = program(t);
            p.moe_scatter(MoeScatter { a: a as u32, d: d as u32 }, Routes { experts: weights, weights }, x, y);
            (p, vec![y])
        });
    }
}

#[test]
fn add_and_take() {
    let (t, d) = (5, 67);
    check("add", 0.0, |b| {
        let mut random = Random(9);
        let (x, y, sum) = (b.input(&random.f32s(t * d)), b.input(&random.f32s(t * d)), b.output(t * d));
        let mut p = program(t);
        p.add(d as u32, x, y, sum);
        (p, vec![sum])
    });
    check("take", 0.0, |b| {
        let mut random = Random(10);
        let (x, y) = (b.input(&random.f32s(t * d)), b.output(3 * d));
        let picks = b.input(&[4u32, 0, 4]);
        let mut p = program(3);
        p.take(d as u32, picks, x, y);
        (p, vec![y])
    });
}

#[test]
fn stats() {
    use fourfold::ops::STATS_WORDS;
    for (t, w, indices) in [(1, 1, false), (3, 67, false), (2, 4096, false), (5, 4, true)] {
        let setup = |b: &mut Bench| {
            let mut random = Random(w as u64);
            let mut words: Vec<u32> = random.f32s(t * w).iter().map(|v| v.to_bits()).collect();
            if indices {
                words = (0..t * w).map(|_| random.below(32) as u32).collect();
            } else if w > 10 {
                words[3] = f32::NAN.to_bits();
                words[w + 9] = f32::NEG_INFINITY.to_bits();
                words[w + 11] = (-0.0f32).to_bits();
            }
            let (x, s) = (b.input(&words), b.output(t * STATS_WORDS));
            (fourfold::trace::record::stats_program(t as u32, x, w, indices, s), vec![s])
        };
        let want = output_of(&cpu(), setup);
        for (name, device) in gpus() {
            let got = output_of(device, setup);
            for (got, want) in got.chunks_exact(STATS_WORDS).zip(want.chunks_exact(STATS_WORDS)) {
                // Counts and hashes are exact; sums differ by rounding.
                assert_eq!(got[2..], want[2..], "T={t} W={w} on {name}");
                let scale = f32::from_bits(want[1]).sqrt().max(1.0);
                for i in 0..2 {
                    let (got, want) = (f32::from_bits(got[i]), f32::from_bits(want[i]));
                    assert!((got - want).abs() <= 1e-5 * scale * scale, "T={t} W={w} on {name}: {got} {want}");
                }
            }
        }
    }
}

#[test]
fn stream() {
    for (n, groups) in [(1u32, 1), (5000, 3), (40_000, 7)] {
        check("stream", 0.0, |b| {
            let op = Stream { n, groups };
            // Bits of numbers that are not NaN however they are folded would be few: the words are compared as they are.
            let words: Vec<u32> = (0..n * 4).map(|i| i.wrapping_mul(0x9e37_79b9) >> 9).collect();
            let (x, y) = (b.input(&words), b.output(op.outputs()));
            let mut p = program(1);
            p.stream(op, x, y);
            (p, vec![y])
        });
    }
}
