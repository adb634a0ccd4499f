//! Kernels with matrix units against their twins. Needs an adapter that has them: lavapipe has none.

use super::group::{Form, PLAIN, all, moe_case};
use super::{FORMATS, matrix, output_of, program, step, weight};
use crate::harness::{Bench, Random, assert_near, cpu, matrix_gpu};
use fourfold::device::Device;
use fourfold::format::Format;
use fourfold::ops::{Piece, Projection};
use fourfold::program::{Program, Slice};
use std::sync::Arc;

/// What two halves keep of an input, and how the units add: about as much as f32 does over a few thousand products.
const TOLERANCE: f64 = 4e-6;

fn linear_case(
    b: &mut Bench,
    format: Format,
    rows: std::ops::Range<usize>,
    [n, k]: [usize; 2],
    scale: f32,
) -> (Program, Vec<Slice>) {
    let mut random = Random((n + k) as u64);
    let bytes = matrix(&mut random, format, n, k);
    let weight = weight(b, format, [n, k], &bytes);
    let bias = b.input(&random.bf16s(n));
    let bias = (scale == 1.0).then_some(bias); // beside which small inputs would be nothing
    let x: Vec<f32> = random.f32s(200 * k).iter().map(|v| v * scale).collect();
    let t = rows.len();
    let (step, x, y) = (step(b, t), b.input(&x[rows.start * k..rows.end * k]), b.output(t * n));
    let piece = Piece { weight, first: 0, input_scale: None };
    let projection = Projection { pieces: vec![piece], n: n as u32, bias };
    let mut p = program(t).with_matrix(true);
    p.linear_by_matrix(step, &projection, &projection.pieces[0], x, y);
    b.keep(projection.pieces.into_iter().next().unwrap().weight);
    (p, vec![y])
}

#[test]
fn linear_by_matrix_units() {
    let Some(gpu) = matrix_gpu() else { return };
    let run = |device: &Arc<dyn Device>, format, rows, shape| {
        let mut b = Bench::new(device);
        let (p, outputs) = linear_case(&mut b, format, rows, shape, 1.0);
        b.run(&p, &outputs).swap_remove(0)
    };
    for format in FORMATS.into_iter().filter(|f| f.fits_half()) {
        // The last two end within a round of 32 of K, where blocks of the format do.
        for (t, [n, k]) in [
            (1, [128, 32]),
            (3, [8, 128]),
            (64, [130, 96]),
            (65, [384, 256]),
            (70, [8192, 64]),
            (200, [72, 2880]),
            (5, [40, 80]),
            (130, [200, 336]),
        ] {
            let shape = [n, usize::next_multiple_of(k, format.block())];
            let got = run(&gpu, format, 0..t, shape);
            let want = run(&cpu(), format, 0..t, shape);
            assert_near(&format!("{format:?} T={t} N, K={shape:?}"), &got, &want, TOLERANCE);
            // A row alone, and in another place, has the same bits.
            for row in [0, t / 2, t - 1] {
                let alone = run(&gpu, format, row..row + 1, shape);
                assert!(alone == got[row * shape[0]..][..shape[0]], "{format:?} row {row} of {t}: other bits alone");
            }
        }
    }
}

/// Halves have fewer bits below 2^-14, and end at 2^16.
#[test]
fn small_and_large_inputs_keep_their_bits() {
    let Some(gpu) = matrix_gpu() else { return };
    for format in FORMATS.into_iter().filter(|f| f.fits_half()) {
        for scale in [1e-4, 1e-3, 1e-2, 1e3, 1e5] {
            for t in [16, 200] {
                let run = |device: &Arc<dyn Device>| {
                    let mut b = Bench::new(device);
                    let (p, outputs) = linear_case(&mut b, format, 0..t, [128, 512], scale);
                    b.run(&p, &outputs).swap_remove(0)
                };
                assert_near(&format!("{format:?} T={t}, inputs of {scale}"), &run(&gpu), &run(&cpu()), TOLERANCE);
            }
        }
    }
}

#[test]
fn experts_by_matrix_units() {
    let Some(gpu) = matrix_gpu() else { return };
    for format in FORMATS.into_iter().filter(|f| f.fits_half()) {
        for ([t, e, a, k], halves) in [
            ([1, 4, 2, 96], false),
            ([70, 5, 4, 96], false),
            ([40, 3, 2, 96], true),
            ([130, 2, 1, 96], true),
            ([70, 5, 4, 80], false), // ends within a round of 32, where blocks of the format do
        ] {
            let k = usize::next_multiple_of(k, format.block());
            for (second, n) in [(false, 70), (true, 135)] {
                let run = |device: &Arc<dyn Device>, routes, which: &[usize]| {
                    let form = Form { routes, halves, ..PLAIN };
                    output_of(device, |b| moe_case(b, format, [t, e, a, n, k], form, second, which))
                };
                let what = format!("{format:?} T={t} E={e} A={a} K={k} second={second} halves={halves}");
                let (got, want) = (run(&gpu, 64, &all(t)), run(&cpu(), 64, &all(t)));
                assert_near(&what, &got, &want, TOLERANCE);
                assert!(run(&gpu, 16, &all(t)) == got, "{what}: tiles of 16 and of 64 give other bits");
                for row in [0, t / 2, t - 1] {
                    let alone = run(&gpu, 16, &[row]);
                    assert!(alone == got[row * a * n..][..a * n], "{what}: row {row} has other bits alone");
                }
            }
        }
    }
}
