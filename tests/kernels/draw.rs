//! Drawing tokens on the device, and the ops that are fused for decoding.

use super::{EPS, check, output_of, program};
use crate::harness::{Bench, Random, cpu, gpus, sum_tolerance};
use fourfold::ops::{Add, Addend, Drawing, Drawn, Draws, MoeScatter, Op, RmsNorm, Routes, Row};
use fourfold::program::{Program, Slice};
use fourfold::sampler::{POWERS, Rule};

/// Rows of sequences 1 to T at positions 0, 10, 20 and so on; `rules` are those of sequence 0 and on. Outputs: what was drawn, and
/// the rows.
pub fn draw_case(
    b: &mut Bench,
    logits: &[f32],
    t: usize,
    rules: &[Rule],
    how: Draws,
    sums: usize,
) -> (Program, Vec<Slice>) {
    let v = logits.len() / t;
    let rows: Vec<Row> = (0..t as u32).map(|i| Row { token: 7, sequence: i + 1, position: 10 * i, pad: 0 }).collect();
    let (drawn, rows) = (b.output(t * 4), b.guarded(bytemuck::cast_slice(&rows)));
    let from = Drawing {
        logits: b.input(logits),
        powers: b.input(&POWERS),
        rules: b.input(rules),
        rows,
        parts: b.output(t * 64 * 4),
        kept: b.output(t * 8),
        sums: b.output(sums / 4),
    };
    let mut p = program(t);
    p.draw(v as u32, how, &from, drawn);
    (p, vec![drawn, rows, from.kept])
}

/// The likeliest token of each row.
fn likeliest_case(b: &mut Bench, logits: &[f32], t: usize) -> (Program, Vec<Slice>) {
    let (p, mut outputs) = draw_case(b, logits, t, &vec![Rule::default(); t + 1], Draws::Likeliest, 2048);
    outputs.truncate(2);
    (p, outputs)
}

#[test]
fn the_likeliest_token_is_drawn_and_becomes_the_next_row() {
    for (t, v) in [(1, 1), (1, 63), (3, 1000), (2, 20_000), (70, 300)] {
        let mut random = Random(v as u64);
        let mut logits = random.f32s(t * v);
        for row in logits.chunks_exact_mut(v).skip(1) {
            // Equal ones, in one part and in another: the lowest id is taken.
            for at in [v / 3, v / 3 + 1, v - 1] {
                row[at] = 9.0;
            }
            row[v / 2] = f32::NEG_INFINITY;
        }
        let words = |device: &_| output_of_all(device, &logits, t);
        let want = words(&cpu());
        for (name, device) in gpus() {
            let got = words(device);
            assert_eq!(got[1], want[1], "rows, T={t} V={v} on {name}");
            let (got, want): (&[Drawn], &[Drawn]) = (bytemuck::cast_slice(&got[0]), bytemuck::cast_slice(&want[0]));
            for (row, (got, want)) in got.iter().zip(want).enumerate() {
                assert_eq!((got.id, got.logit, got.bad), (want.id, want.logit, 0), "row {row}, T={t} V={v} on {name}");
                let near = f64::from((got.sum - want.sum).abs()) < sum_tolerance(v) * f64::from(want.sum);
                assert!(near, "row {row}: sum {} of {} on {name}", got.sum, want.sum);
                if row > 0 && v > 3 {
                    assert_eq!(got.id as usize, v / 3);
                }
            }
        }
    }
}

fn output_of_all(device: &std::sync::Arc<dyn fourfold::device::Device>, logits: &[f32], t: usize) -> Vec<Vec<u32>> {
    let mut b = Bench::new(device);
    let (p, outputs) = likeliest_case(&mut b, logits, t);
    b.run(&p, &outputs)
}

#[test]
fn logits_that_are_no_numbers_are_told() {
    for device in gpus().iter().map(|(_, device)| device).chain([&cpu()]) {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut logits = vec![0.5; 3000];
            logits[1234] = bad;
            let words = output_of(device, |b| likeliest_case(b, &logits, 3));
            let drawn: &[Drawn] = bytemuck::cast_slice(&words);
            assert_eq!([0, 1, 2].map(|t| drawn[t].bad), [0, 1, 0]);
        }
        let words = output_of(device, |b| likeliest_case(b, &[f32::NEG_INFINITY; 200], 1));
        let drawn: Drawn = bytemuck::pod_read_unaligned(bytemuck::cast_slice(&words));
        assert!(drawn.bad == 0 && drawn.sum == 0.0, "{drawn:?}");
    }
}

/// The sum and h, of rows or of routes; fused or one after the other.
fn sum_case(b: &mut Bench, [t, d, a]: [usize; 3], routed: bool, fused: bool) -> (Program, Vec<Slice>) {
    let mut random = Random((t + d + a) as u64);
    let norm = RmsNorm { d: d as u32, eps: 1e-5 };
    let (x, g) = (b.input(&random.f32s(t * d)), b.input(&random.bf16s(d)));
    let (weights, y) = (b.input(&random.f32s(t * a)), b.input(&random.f32s(t * a * d)));
    let (h, sum, scattered) = (b.output(t * d), b.output(t * d), b.output(t * d));
    let routes = Routes { experts: weights, weights };
    let mut p = program(t);
    let addend = match routed {
        true => Addend::Routes { a: a as u32, routes, x: y, sum: scattered },
        false => Addend::Rows(y),
    };
    if fused {
        p.add_norm(norm, x, addend, g, [sum, h]);
    } else {
        if routed {
            p.moe_scatter(MoeScatter { a: a as u32, d: norm.d }, routes, y, scattered);
        }
        p.add(norm.d, x, if routed { scattered } else { y }, sum);
        p.rms_norm(norm, sum, g, h);
    }
    (p, vec![sum, h])
}

#[test]
fn add_norm_has_the_bits_of_its_parts() {
    for shape in [[1, 4, 1], [2, 2048, 1], [3, 1028, 2], [3, 100, 4], [2, 2880, 4], [5, 1028, 8]] {
        for routed in [false, true] {
            let what = format!("add_norm {shape:?}, routes: {routed}");
            check(&what, 4.0 * EPS + sum_tolerance(shape[1] + shape[2]), |b| sum_case(b, shape, routed, true));
            for (name, device) in gpus() {
                let run = |fused| {
                    let mut b = Bench::new(device);
                    let (p, outputs) = sum_case(&mut b, shape, routed, fused);
                    b.run(&p, &outputs)
                };
                assert!(run(true) == run(false), "{what}: other bits on {name}");
            }
        }
    }
    let parts = sum_case(&mut Bench::new(&cpu()), [1, 4, 1], true, false).0;
    assert!(matches!(parts.launches[1].op, Op::Add(Add { d: 4 })), "the parts are three launches");
}
