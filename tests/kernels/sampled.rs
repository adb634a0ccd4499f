//! Tokens drawn at a temperature: on the device, by the twins and by the host's sampler the same ones, always.

use super::draw::draw_case;
use crate::harness::{Bench, Random, cpu, gpus, small_binding_gpu};
use fourfold::Sampling;
use fourfold::device::Device;
use fourfold::ops::{Drawing, Drawn, Draws};
use fourfold::sampler::{Rule, sample};
use std::sync::Arc;

const NEVER: f32 = f32::NEG_INFINITY;

/// Rows of logits of one shape each.
fn logits(random: &mut Random, v: usize, shape: usize) -> Vec<f32> {
    let mut row = random.f32s(v);
    let spread = [1.0, 4.0, 20.0, 1e3, 1e-6][shape % 5];
    row.iter_mut().for_each(|l| *l *= spread);
    match shape {
        5..10 => row.iter_mut().for_each(|l| *l = (*l * 2.0).round() / 2.0),
        10..15 => row.iter_mut().enumerate().for_each(|(i, l)| *l = if i % 3 > 0 || v < 3 { *l } else { NEVER }),
        15 => row.fill(1.25),
        16 => row.iter_mut().enumerate().for_each(|(i, l)| *l = if i == v / 2 { 30.0 } else { -0.01 * (i % 7) as f32 }),
        17 => row.iter_mut().enumerate().for_each(|(i, l)| *l = [f32::MIN, f32::MAX, 0.0, -0.0][i % 4]),
        18 => row.iter_mut().enumerate().for_each(|(i, l)| *l = f32::from_bits(i as u32 * 77)), // mostly below 2^-126
        19 => row.iter_mut().enumerate().for_each(|(i, l)| *l = if i == v - 1 { f32::MIN } else { NEVER }),
        _ => {}
    }
    row
}

const SHAPES: usize = 20;

/// Options with every mixture of filters, and their extremes.
fn sampling(random: &mut Random, v: usize, seed: u64) -> Sampling {
    let temperatures = [0.0, 1.0, 0.7, 1.3, 1e-4, 100.0, f32::from_bits(1), f32::MAX];
    let mut pick = |some: &[f32]| some[random.below(some.len())];
    Sampling {
        temperature: pick(&temperatures),
        top_k: pick(&[0.0, 0.0, 1.0, 3.0, 40.0, v as f32, v as f32 + 9.0]) as usize,
        top_p: pick(&[1.0, 1.0, 0.0, 1e-6, 0.3, 0.95, 0.999_999]),
        min_p: pick(&[0.0, 0.0, 0.02, 0.5, 1.0]),
        seed,
        stream: seed << 33 | 5,
        ..Sampling::default()
    }
}

/// Draw from rows on a device.
fn drawn(device: &Arc<dyn Device>, rows: &[f32], by: &[Sampling], how: Draws, sums: usize) -> Vec<Vec<u32>> {
    let rules: Vec<Rule> = [Rule::default()].into_iter().chain(by.iter().map(Rule::new)).collect();
    let mut b = Bench::new(device);
    let (p, outputs) = draw_case(&mut b, rows, by.len(), &rules, how, sums);
    b.run(&p, &outputs)
}

/// Hold devices to the host's sampler over `t` rows, and whatever the program could do for other rows.
fn check(devices: &[(&str, Arc<dyn Device>)], v: usize, t: usize, seed: u64, most_bytes: usize) {
    let mut random = Random(seed << 20 | v as u64);
    let rows: Vec<f32> = (0..t).flat_map(|i| logits(&mut random, v, (i + seed as usize) % SHAPES)).collect();
    let by: Vec<Sampling> = (0..t).map(|i| sampling(&mut random, v, seed * 1000 + i as u64)).collect();
    let most = Draws::of(&by.iter().map(Rule::new).collect::<Vec<_>>());
    let want: Vec<_> = rows
        .chunks_exact(v)
        .zip(&by)
        .enumerate()
        .map(|(i, (row, by))| sample(by, row, &[], 10 * i as u64 + 1).unwrap())
        .collect();
    let twin = drawn(&cpu(), &rows, &by, most, 4 << 20);
    // All rows at a time; few of them, or of their spans; and rounds that nobody needs.
    let sums = [4 << 20, 21 * 2048, 30 * Drawing::row_bytes(v as u32, u64::MAX) as usize]
        .map(|bytes: usize| bytes.min(most_bytes));
    let ways = [(most, sums[0]), (most, sums[1]), (Draws::Rounds(6), sums[2])];
    for (name, device) in devices {
        for (how, sums) in ways {
            let got = drawn(device, &rows, &by, how, sums);
            let drawn: &[Drawn] = bytemuck::cast_slice(&got[0]);
            for (i, (got, want)) in drawn.iter().zip(&want).enumerate() {
                let what = format!("row {i} of {t}, V={v}, seed {seed}, {how:?} on {name}: {:?}", by[i]);
                assert_eq!((got.id, got.bad), (want.id, 0), "{what}");
                let logprob = got.logit - got.sum.ln();
                let near = (logprob - want.logprob).abs() <= 2e-5 * want.logprob.abs().max(1.0);
                assert!(near || logprob == want.logprob, "{what}: {logprob}, not {}", want.logprob);
                // A difference below 2^-126 may come out as 0.
                let below = rows[i * v + got.id as usize] - rows[i * v..][..v].iter().copied().fold(NEVER, f32::max);
                assert!(got.logit == below || (got.logit - below).abs() < f32::MIN_POSITIVE, "{what}: {}", got.logit);
            }
            assert_eq!(got[1], twin[1], "rows on {name}");
            for (i, (got, want)) in got[2].chunks_exact(8).zip(twin[2].chunks_exact(8)).enumerate() {
                // With rounds that it does not need, a row is done earlier.
                let same = got == want || (how != most && got[2..] == want[2..]);
                assert!(same, "row {i}, V={v}, {how:?} on {name}: {:?}: keeps {got:?}, not {want:?}", by[i]);
            }
        }
    }
}

#[test]
fn host_twins_and_devices_draw_the_same_tokens() {
    let gpu = gpus().first().cloned();
    let devices: Vec<_> = [("twins", cpu())].into_iter().chain(gpu).collect();
    for (v, t, seeds) in [(1, 20, 2), (3, 40, 4), (63, 40, 5), (64, 40, 5), (65, 40, 5), (300, 40, 12), (5000, 20, 8)] {
        (0..seeds).for_each(|seed| check(&devices, v, t, seed, usize::MAX));
    }
    check(&devices, 50_001, 20, 1, usize::MAX);
    // The others differ in how kernels are compiled.
    gpus().iter().skip(1).for_each(|gpu| check(std::slice::from_ref(gpu), 1000, 40, 7, usize::MAX));
}

#[test]
fn a_device_that_binds_little_draws_the_same() {
    let Some(small) = small_binding_gpu(60_000) else { return };
    check(&[("a small binding", small)], 300, 20, 3, 50_000);
}

#[test]
fn what_cannot_be_drawn_is_told_at_a_temperature() {
    let by = [
        Sampling { top_k: 5, top_p: 0.9, ..Sampling::default() },
        Sampling::default(),
        Sampling { top_p: 0.5, min_p: 0.1, ..Sampling::default() },
    ];
    for device in gpus().iter().map(|(_, device)| device).chain([&cpu()]) {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut rows = vec![0.5; 3000];
            rows[1234] = bad;
            let got = drawn(device, &rows, &by, Draws::Rounds(6), 1 << 20);
            let got: &[Drawn] = bytemuck::cast_slice(&got[0]);
            assert_eq!([0, 1, 2].map(|t| got[t].bad), [0, 1, 0]);
            // Nothing but NaN.
            let got = drawn(device, &[bad; 300], &by, Draws::Rounds(6), 1 << 20);
            assert!(bytemuck::cast_slice::<u32, Drawn>(&got[0]).iter().all(|drawn| drawn.bad == 1));
        }
        let got = drawn(device, &[NEVER; 300], &by, Draws::Rounds(6), 1 << 20);
        let got: &[Drawn] = bytemuck::cast_slice(&got[0]);
        assert!(got.iter().all(|drawn| drawn.bad == 0 && drawn.sum == 0.0), "{got:?}");
    }
}

#[test]
fn the_comparison_notices_another_random_number() {
    let mut random = Random(1);
    let rows = random.f32s(20 * 500);
    let by = vec![Sampling::default(); 20];
    let other = vec![Sampling { seed: 1, ..Sampling::default() }; 20];
    let ids = |by: &[Sampling]| drawn(&cpu(), &rows, by, Draws::Rounds(0), 1 << 20)[0].clone();
    assert_ne!(ids(&by), ids(&other));
}
