//! W4A4: `stage_activation` holds to its twin bit for bit, and the products with NVFP4 weights to the oracle's goldens
//! (`tests/fixtures/format/README.md`), on the twins and on every GPU variant.

use crate::harness::{Bench, Named, Random, assert_near, cpu, distance, floats, gpus, sum_tolerance};
use fourfold::HostStages;
use fourfold::device::Device;
use fourfold::format::Format;
use fourfold::ops::{
    ActScale, ExpertScales, Experts, Gate, GateUp, Input, InputScales, MoeScatter, Routes, StageActivation, Staging,
    Step, Swiglu, Weight, WeightBytes, decode_staged, staged_words,
};
use fourfold::program::{Program, Slice};
use safetensors::SafeTensors;
use std::sync::Arc;

/// The twins, and every GPU variant.
fn devices() -> Vec<Named> {
    let mut devices = vec![("twins", cpu())];
    devices.extend(gpus().iter().cloned());
    devices
}

fn program(tokens: usize) -> Program {
    Program::new(tokens as u32, HostStages::default())
}

fn step(b: &mut Bench, tokens: usize) -> Slice {
    b.input(&[Step { tokens: tokens as u32, pad: [0; 3] }])
}

fn staging(b: &mut Bench, rows: usize, k: usize) -> Staging {
    Staging {
        rows: b.output(rows * staged_words(k)),
        scales: b.output(rows),
        report: b.output(rows * 2),
        amaxes: b.output(rows),
    }
}

/// What the oracle asks of a quantiser: rows of zeros, blocks of zeros, faint and loud blocks, signs of zero, ties.
fn nasty(random: &mut Random, rows: usize, k: usize) -> Vec<f32> {
    let mut x = random.f32s(rows * k);
    for (r, row) in x.chunks_exact_mut(k).enumerate() {
        match r % 8 {
            1 => row.fill(0.0),
            2 => row[..16].fill(-0.0),
            3 => row.iter_mut().for_each(|v| *v *= 300.0),
            4 => row[..16].iter_mut().for_each(|v| *v *= 1e-5),
            5 => row.iter_mut().enumerate().for_each(|(i, v)| *v = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0][i % 8]),
            6 => row.iter_mut().for_each(|v| *v *= 1e-39),
            7 => row.iter_mut().for_each(|v| *v = half::bf16::from_f32(*v).to_f32()),
            _ => {}
        }
    }
    x
}

const SCALES: [ActScale; 4] = [ActScale::Static, ActScale::Expert, ActScale::Token, ActScale::Tensor];

/// Words of rows, scales and report.
fn staged(device: &Arc<dyn Device>, x: &[f32], k: usize, scale: ActScale, share: usize) -> Vec<Vec<u32>> {
    let mut b = Bench::new(device);
    let tokens = x.len() / k;
    let rows = tokens * share;
    let experts: Vec<u32> = (0..rows as u32).map(|r| r * 7 % 5).collect();
    let given =
        InputScales { scales: b.input(&[7.3e-4f32, 2.1e-5, 3.0e-2, 1.0, 1.1e-3]), experts: Some(b.input(&experts)) };
    let to = staging(&mut b, rows, k);
    let (x, step) = (b.input(x), step(&mut b, tokens));
    let mut p = program(tokens);
    let op = StageActivation { k: k as u32, rows_per_token: share as u32, share: share as u32, scale };
    p.stage_activation(op, step, x, Some(given), &to);
    b.run(&p, &[to.rows, to.scales, to.report])
}

#[test]
fn quantised_rows_have_the_twins_bits() {
    for k in [16, 48, 96, 208, 2880] {
        for (scale, share) in SCALES.into_iter().flat_map(|scale| [(scale, 1), (scale, 3)]) {
            if scale == ActScale::Tensor && share > 1 {
                continue; // one scale for all needs no row for each route
            }
            let x = nasty(&mut Random(k as u64), 17, k);
            let want = staged(&cpu(), &x, k, scale, share);
            let clips = floats(&want[2]).iter().skip(1).step_by(2).any(|n| *n > 0.0);
            assert_eq!(clips, matches!(scale, ActScale::Static | ActScale::Expert), "{scale:?} clips");
            for (name, device) in gpus() {
                let got = staged(device, &x, k, scale, share);
                for (what, (got, want)) in ["rows", "scales", "report"].iter().zip(got.iter().zip(&want)) {
                    let same = got.iter().zip(want).position(|(g, w)| g != w);
                    let place = same.map(|i| format!("word {i}: {:08x}, not {:08x}", got[i], want[i]));
                    // Subnormal numbers may be flushed: rows of 1e-39 then count as zeros, with the same codes.
                    let flushed =
                        *what != "rows" && floats(got).iter().zip(floats(want)).all(|(g, w)| *g == w || w < 1e-38);
                    assert!(same.is_none() || flushed, "{what}, K={k} {scale:?} share {share} on {name}: {place:?}");
                }
            }
        }
    }
}

#[test]
fn a_row_that_is_no_number_says_so_and_leaves_the_others_alone() {
    for (name, device) in devices() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = Random(4).f32s(5 * 48);
            let clean = staged(&device, &x, 48, ActScale::Token, 1);
            x[2 * 48 + 17] = bad;
            let got = staged(&device, &x, 48, ActScale::Token, 1);
            for row in 0..5 {
                let (was, is) = (f32::from_bits(clean[1][row]), f32::from_bits(got[1][row]));
                assert!(if row == 2 { is.is_nan() } else { is == was }, "{bad} row {row} on {name}: {is}");
            }
            // One scale for all: then no row has one.
            let got = staged(&device, &x, 48, ActScale::Tensor, 1);
            assert!(floats(&got[1]).iter().all(|s| s.is_nan()), "{bad} on {name}");
        }
    }
}

#[test]
fn a_row_quantised_alone_has_the_same_bits_unless_one_scale_is_for_all() {
    let (k, rows) = (96, 9);
    let x = Random(6).f32s(rows * k);
    for (name, device) in devices() {
        for scale in SCALES {
            let all = staged(&device, &x, k, scale, 1);
            let alone: Vec<Vec<u32>> =
                (0..rows).map(|r| staged(&device, &x[r * k..][..k], k, scale, 1).swap_remove(0)).collect();
            let equal = alone.concat() == all[0];
            // With a scale for each expert, a row alone here goes to expert 0.
            let own = matches!(scale, ActScale::Static | ActScale::Token);
            assert_eq!(equal, own, "{scale:?} on {name}");
        }
    }
}

/// A golden file of the oracle.
struct Golden(Vec<u8>);

impl Golden {
    fn open(name: &str) -> Self {
        let dir = std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/format");
        Self(std::fs::read(dir.join(name)).unwrap())
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.0).unwrap().tensor(name).unwrap().data().to_vec()
    }

    fn f32s(&self, name: &str) -> Vec<f32> {
        self.bytes(name).chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn f64s(&self, name: &str) -> Vec<f64> {
        self.bytes(name).chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn u32s(&self, name: &str) -> Vec<u32> {
        self.bytes(name).chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
    }
}

#[test]
fn activations_are_quantised_as_in_the_goldens() {
    let golden = Golden::open("quant_vectors.safetensors");
    let (x, k) = (golden.f32s("act.x"), 64);
    let rows = x.len() / k;
    for (name, device) in devices() {
        for (tag, scale) in
            [("static", ActScale::Static), ("dyn_tensor", ActScale::Tensor), ("dyn_token", ActScale::Token)]
        {
            let mut b = Bench::new(&device);
            let given = InputScales { scales: b.input(&golden.f32s(&format!("act.{tag}.gs"))), experts: None };
            let to = staging(&mut b, rows, k);
            let (input, step) = (b.input(&x), step(&mut b, rows));
            let mut p = program(rows);
            let op = StageActivation { k: k as u32, rows_per_token: 1, share: 1, scale };
            p.stage_activation(op, step, input, Some(given), &to);
            let got = b.run(&p, &[to.rows, to.scales]);
            let part = |what: &str| golden.bytes(&format!("act.{tag}.{what}"));
            let (scales, codes) = (part("scale"), part("codes"));
            let (faint_scales, faint_codes) = (part("ambiguous_scale"), part("ambiguous_code"));
            let mut compared = 0;
            for (row, words) in got[0].chunks_exact(staged_words(k)).enumerate() {
                let bytes: &[u8] = bytemuck::cast_slice(words);
                for i in 0..k {
                    let block = row * 4 + i / 16;
                    if faint_scales[block] != 0 || faint_codes[row * k + i] != 0 {
                        continue;
                    }
                    assert_eq!(bytes[i / 16], scales[block], "{tag} scale of row {row} block {} on {name}", i / 16);
                    let code = bytes[4 + i / 2] >> (i % 2 * 4) & 15;
                    let want = codes[row * k + i];
                    // Where a block's scale is 0 the sign of its zeros is nobody's business.
                    assert!(code == want || scales[block] == 0 && code & 7 == 0, "{tag} [{row}, {i}] on {name}");
                    compared += 1;
                }
            }
            assert!(compared > rows * k * 9 / 10, "{compared}");
            let dequant = golden.f32s(&format!("act.{tag}.dequant"));
            for (row, words) in got[0].chunks_exact(staged_words(k)).enumerate() {
                let mut y = vec![f32::NAN; k];
                decode_staged(words, f32::from_bits(got[1][row]), &mut y);
                for (i, (y, want)) in y.iter().zip(&dequant[row * k..]).enumerate() {
                    let clear = faint_scales[row * 4 + i / 16] == 0 && faint_codes[row * k + i] == 0;
                    assert!(!clear || (y - want).abs() <= want.abs() * f32::EPSILON, "{tag} [{row}, {i}] on {name}");
                }
            }
        }
    }
}

#[test]
fn products_of_fp4_with_fp4_are_golden() {
    let golden = Golden::open("gemm.safetensors");
    let dir = std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/format");
    let facts: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.join("gemm.json")).unwrap()).unwrap();
    for case in facts["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let [m, n, k] = ["m", "n", "k"].map(|key| case[key].as_u64().unwrap() as usize);
        let [a_global, b_global] = ["a_global", "b_global"].map(|key| case[key].as_f64().unwrap() as f32);
        let part = |what: &str| golden.bytes(&format!("{name}.{what}"));
        // Rows as stage_activation lays them out: the scales padded to whole words, then the codes.
        let (a, a_scales) = (part("a"), part("a_scale"));
        let mut rows = Vec::new();
        for row in 0..m {
            let mut scales = a_scales[row * k / 16..][..k / 16].to_vec();
            scales.resize(k.div_ceil(64) * 4, 0);
            rows.extend([scales, a[row * k / 2..][..k / 2].to_vec()].concat());
        }
        let want: Vec<f64> = golden.f64s(&format!("{name}.d_f64"));
        for (where_, device) in devices() {
            let mut b = Bench::new(&device);
            let (codes, scales, row_scales) = (part("b"), part("b_scale"), vec![b_global; n]);
            let bytes = WeightBytes { codes: &[&codes], scales: &[&scales], row_scales: &row_scales };
            let w = Weight::matrix(&device, "b", Format::Nvfp4, [n as u32, k as u32], &bytes).unwrap();
            let input = Input::Nvfp4 { rows: b.input(&rows), scales: b.input(&vec![a_global; m]) };
            let (y, step) = (b.output(m * n), step(&mut b, m));
            let mut p = program(m);
            p.linear(step, &w, None, input, y);
            let got = floats(&b.run(&p, &[y])[0]);
            for (row, (got, want)) in got.chunks_exact(n).zip(want.chunks_exact(n)).enumerate() {
                let norm = want.iter().map(|w| w * w).sum::<f64>().sqrt();
                let error = got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).powi(2)).sum::<f64>().sqrt();
                let allowed = if name.starts_with("random") { 2e-6 * norm } else { 0.0 };
                assert!(error <= allowed, "{name} row {row} on {where_}: {error:e} of {norm:e}");
            }
        }
    }
}

/// One MoE block of the oracle, as the engine records it: stage, up, silu(gate) up, stage, down, weighted sum.
fn moe_block(device: &Arc<dyn Device>, golden: &Golden, scale: Option<ActScale>, each_expert: bool) -> Vec<f32> {
    let (t, k, f, e, a) = (9, 64, 48, 4, 2);
    let mut b = Bench::new(device);
    let stack = |names: &[&str], n: usize, k: usize| {
        let each = || (0..e).flat_map(|e| names.iter().map(move |name| format!("{e}.{name}")));
        let codes: Vec<Vec<u8>> = each().map(|name| golden.bytes(&format!("{name}.weight"))).collect();
        let scales: Vec<Vec<u8>> = each().map(|name| golden.bytes(&format!("{name}.weight_scale"))).collect();
        let globals = each().map(|name| golden.f32s(&format!("{name}.weight_scale_2"))[0]);
        let row_scales: Vec<f32> = globals.flat_map(|g| vec![g; n / names.len()]).collect();
        let (codes, scales): (Vec<&[u8]>, Vec<&[u8]>) =
            (codes.iter().map(|c| &c[..]).collect(), scales.iter().map(|s| &s[..]).collect());
        let bytes = WeightBytes { codes: &codes, scales: &scales, row_scales: &row_scales };
        let weight = Weight::experts(device, "experts", Format::Nvfp4, [e as u32, n as u32, k as u32], &bytes).unwrap();
        Experts { weight, bias: None, input_scale: None }
    };
    let (mut up, mut down) = (stack(&["gate", "up"], 2 * f, k), stack(&["down"], k, f));
    for (experts, name) in [(&mut up, "input_scale_13"), (&mut down, "input_scale_2")] {
        let scales = vec![golden.f32s(name)[0]; e];
        experts.input_scale = Some(match each_expert {
            true => ExpertScales::Each(b.input(&scales)),
            false => ExpertScales::Shared(b.input(&scales[..1])),
        });
    }
    let routes = Routes { experts: b.input(&golden.u32s("topk_index")), weights: b.input(&golden.f32s("topk_weight")) };
    let (x, step) = (b.input(&golden.f32s("x")), step(&mut b, t));
    let (inner, outer, y) = (b.output(t * a * f), b.output(t * a * k), b.output(t * k));
    let [to_up, to_down] = [k, f].map(|k| staging(&mut b, t * a, k));
    let mut p = program(t);
    let stage = |p: &mut Program, experts: &Experts, x: Slice, rows: usize, to: &Staging| -> Input {
        let Some(scale) = scale else { return x.into() };
        let (scale, given, rows_per_token, share) = match experts.input_scale {
            Some(ExpertScales::Each(scales)) if scale == ActScale::Static => {
                let given = InputScales { scales, experts: Some(routes.experts) };
                (ActScale::Expert, given, a, a / rows)
            }
            Some(ExpertScales::Shared(scales) | ExpertScales::Each(scales)) => {
                (scale, InputScales { scales, experts: None }, rows, 1)
            }
            None => unreachable!("set above"),
        };
        let (rows_per_token, share) = (rows_per_token as u32, share as u32);
        let op = StageActivation { k: experts.weight.k, rows_per_token, share, scale };
        p.stage_activation(op, step, x, Some(given), to)
    };
    let staged_up = stage(&mut p, &up, x, 1, &to_up);
    let share = if each_expert && scale == Some(ActScale::Static) { 1 } else { a as u32 };
    let form = Swiglu { a: a as u32, rows: GateUp::Halves, gate: Gate::Silu };
    p.moe_up(&up, form, routes.experts, (staged_up, share), inner);
    let staged_down = stage(&mut p, &down, inner, a, &to_down);
    p.moe_down(&down, a as u32, routes.experts, staged_down, outer);
    p.moe_scatter(MoeScatter { a: a as u32, d: k as u32 }, routes, outer, y);
    b.keep(up.weight);
    b.keep(down.weight);
    floats(&b.run(&p, &[y])[0])
}

#[test]
fn the_moe_block_is_golden_in_every_mode() {
    let golden = Golden::open("moe_block.safetensors");
    let modes = [
        ("w4a16", None, false),
        ("w4a4_static", Some(ActScale::Static), false),
        ("w4a4_static", Some(ActScale::Static), true),
        ("w4a4_dyn_tensor", Some(ActScale::Tensor), false),
        ("w4a4_dyn_token", Some(ActScale::Token), false),
    ];
    for (where_, device) in devices() {
        for (mode, scale, each_expert) in modes {
            let want: Vec<f32> = golden.f64s(&format!("y.{mode}")).iter().map(|v| *v as f32).collect();
            let (l2, max) = distance(&moe_block(&device, &golden, scale, each_expert), &want);
            assert!(l2 < 2e-6 && max < 2e-6, "{mode}, a scale each: {each_expert}, on {where_}: {l2:.1e} {max:.1e}");
        }
        // The modes differ by far more than that: a mode taken for another does not pass.
        let w4a16: Vec<f32> = golden.f64s("y.w4a16").iter().map(|v| *v as f32).collect();
        let (l2, _) = distance(&moe_block(&device, &golden, Some(ActScale::Token), false), &w4a16);
        assert!(l2 > 0.05, "{l2}");
    }
}

#[test]
fn products_with_quantised_rows_hold_to_their_twins() {
    for (t, n, k) in [(1, 9, 48), (5, 17, 208), (9, 40, 2880)] {
        let run = |device: &Arc<dyn Device>| {
            let mut b = Bench::new(device);
            let mut random = Random((n * k) as u64);
            let codes = random.bytes(n * k / 2);
            let scales: Vec<u8> = random.bytes(n * k / 16).iter().map(|b| b % 0x7f).collect();
            let row_scales: Vec<f32> = random.f32s(n).iter().map(|v| v.abs() / 4096.0).collect();
            let bytes = WeightBytes { codes: &[&codes], scales: &[&scales], row_scales: &row_scales };
            let w = Weight::matrix(device, "w", Format::Nvfp4, [n as u32, k as u32], &bytes).unwrap();
            let (x, bias, step) = (b.input(&random.f32s(t * k)), b.input(&random.bf16s(n + 1)), step(&mut b, t));
            let (to, y) = (staging(&mut b, t, k), b.output(t * n));
            let mut p = program(t);
            let op = StageActivation { k: k as u32, rows_per_token: 1, share: 1, scale: ActScale::Token };
            let x = p.stage_activation(op, step, x, None, &to);
            p.linear(step, &w, Some(bias), x, y);
            b.keep(w);
            b.run(&p, &[y]).swap_remove(0)
        };
        let want = run(&cpu());
        for (name, device) in gpus() {
            assert_near(&format!("W4A4 linear T={t} N={n} K={k} on {name}"), &run(device), &want, sum_tolerance(k));
        }
    }
}
