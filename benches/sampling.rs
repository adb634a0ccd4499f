//! What a token drawn on the host costs: one row of logits of gpt-oss's vocabulary, on one core.
//!
//!     cargo bench --bench sampling
//!
//! Medians of 101 draws at different positions. "peaked" logits are like a model's, a bell with a few tokens far ahead;
//! of "flat" ones, which few models give, very many are about as likely.

use fourfold::sampler::sample;
use fourfold::{Result, Sampling};
use std::time::{Duration, Instant};

const VOCAB: usize = 201_088;
const DRAWS: u64 = 101;

fn main() -> Result<()> {
    let flat: Vec<f32> = uniforms().take(VOCAB).map(|u| u * 8.0 - 4.0).collect();
    let mut numbers = uniforms();
    let mut bell = || (0..12).map(|_| numbers.next().expect("without end")).sum::<f32>() * 2.5 - 15.0;
    let mut peaked: Vec<f32> = (0..VOCAB).map(|_| bell()).collect();
    for (rank, u) in uniforms().take(200).enumerate() {
        peaked[(u * VOCAB as f32) as usize] = 18.0 - 2.0 * (1.0 + rank as f32).ln();
    }
    let history: Vec<u32> = (0..1000).map(|i| i * 197 % VOCAB as u32).collect();

    let plain = Sampling::default();
    let filtered =
        Sampling { temperature: 0.8, top_k: 40, top_p: 0.95, min_p: 0.05, repetition_penalty: 1.1, ..plain.clone() };
    let cases = [
        ("greedy", Sampling::greedy()),
        ("temperature 1", plain.clone()),
        ("temperature 0.8", Sampling { temperature: 0.8, ..plain.clone() }),
        ("temperature 0.8, every filter, penalty 1.1", filtered),
        ("temperature 1, 20 logprobs", Sampling { top_logprobs: 20, ..plain }),
    ];
    println!("one of {VOCAB} tokens, microseconds");
    println!("{:>44} {:>9} {:>9}", "", "peaked", "flat");
    for (name, sampling) in cases {
        let [peaked, flat] = [time(&sampling, &peaked, &history)?, time(&sampling, &flat, &history)?];
        println!("{name:>44} {:>9.0} {:>9.0}", peaked.as_secs_f64() * 1e6, flat.as_secs_f64() * 1e6);
    }
    Ok(())
}

/// The median of draws at different positions.
fn time(sampling: &Sampling, logits: &[f32], history: &[u32]) -> Result<Duration> {
    let mut times = Vec::new();
    for position in 0..DRAWS {
        let started = Instant::now();
        std::hint::black_box(sample(sampling, std::hint::black_box(logits), history, position)?);
        times.push(started.elapsed());
    }
    times.sort();
    Ok(times[times.len() / 2])
}

/// Numbers in [0, 1) without a pattern, always the same.
fn uniforms() -> impl Iterator<Item = f32> {
    let mut state = 1u64;
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    })
}
