//! Measuring: how fast memory is read here, what a step must read, and where its time goes.

use crate::device::{Buffer, Device};
use crate::engine::{Engine, Session, Want};
use crate::error::Result;
use crate::ops::{Op, Stream};
use crate::program::{HostStages, Program};
use crate::tokenizer::TokenId;
use std::sync::Arc;
use std::time::Instant;

/// What a step must move at least, launch by launch, and what it took.
#[derive(Clone, Debug)]
pub struct Timed {
    /// The kernel's name.
    pub kernel: &'static str,
    /// Bytes of weights and of cached keys and values that it must read.
    pub bytes: u64,
    /// Seconds on the device.
    pub seconds: f64,
}

/// Bytes a second at which a kernel that does nothing else reads memory: the median of several passes over `bytes` bytes.
/// The device should have been kept busy for a second before.
///
/// # Errors
/// Where the device has no clock, or not so much memory.
pub fn read_ceiling(device: &Arc<dyn Device>, bytes: u64) -> Result<f64> {
    // Buffers of 256 MiB at most, read one after the other: more than any cache holds.
    let one = bytes.min(256 << 20).min(device.limits().max_binding_bytes) / 16 * 16;
    let op = Stream { n: (one / 16) as u32, groups: 2048 };
    let y = Buffer::new(device, "stream result", op.outputs() as u64 * 4)?;
    let buffers = (0..bytes.div_ceil(one)).map(|_| Buffer::new(device, "stream", one)).collect::<Result<Vec<_>>>()?;
    let mut program = Program::new(1, HostStages::default());
    for _ in 0..4 {
        for buffer in &buffers {
            program.stream(op, buffer.slice(), y.slice());
        }
    }
    device.run(&program)?;
    Ok(one as f64 / median(device.time(&program)?))
}

/// The middle value.
///
/// # Panics
/// If there is none.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Bytes that a launch must read: weights, of experts those that the step's routes go to on average, and the cache up to
/// `position` as far as the layer sees it. Activations are left out: they stay in the device's caches.
fn bytes_of(program: &Program, at: usize, position: u64) -> u64 {
    let launch = &program.launches[at];
    let read = |names: &[&str]| -> u64 {
        launch.args.iter().filter(|arg| names.contains(&arg.name)).map(|arg| arg.slice.bytes).sum()
    };
    let weights = read(&["codes", "scales", "row_scales"]);
    let tokens = f64::from(program.tokens());
    // The share of a layer's `e` experts that `tokens` rows with `a` routes each choose at least once.
    let touched = |a: u32, e: u32| 1.0 - (1.0 - f64::from(a) / f64::from(e)).powf(tokens);
    match &launch.op {
        Op::Linear(_) => weights + read(&["bias"]),
        Op::MoeUp(op) => (weights as f64 * touched(op.a, op.e)) as u64,
        Op::MoeDown(op) => (weights as f64 * touched(op.a, op.e)) as u64,
        Op::Attention(op) => {
            let seen = if op.window == 0 { position + 1 } else { (position + 1).min(u64::from(op.window)) };
            2 * op.format.bytes(seen * u64::from(op.hk) * u64::from(op.dh))
        }
        _ => 0,
    }
}

/// Bytes that one step over `tokens` must read.
fn bytes_of_step(programs: &[&Program], position: u64) -> u64 {
    programs.iter().map(|p| (0..p.launches.len()).map(|at| bytes_of(p, at, position)).sum::<u64>()).sum()
}

/// Decoding measured.
#[derive(Clone, Debug)]
pub struct Decode {
    /// Tokens in the cache before the first.
    pub depth: usize,
    /// Seconds of each token, as a caller sees them.
    pub seconds: Vec<f64>,
    /// Bytes that a token must read.
    pub bytes: u64,
}

/// Tokens that do not repeat soon.
fn tokens(n: usize, vocab: usize) -> Vec<TokenId> {
    (0..n as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as u32 % vocab as u32).collect()
}

/// Seconds of a prompt of `length` tokens from an empty cache.
pub fn prefill(session: &mut Session, length: usize) -> Result<f64> {
    let prompt = tokens(length, session.engine().config().vocab_size);
    session.clear();
    let start = Instant::now();
    session.feed(&prompt, Want::Last)?;
    Ok(start.elapsed().as_secs_f64())
}

/// `count` tokens after `depth`, each the likeliest after the one before, the first `warm` of them not counted.
pub fn decode(session: &mut Session, depth: usize, warm: usize, count: usize) -> Result<Decode> {
    session.clear();
    let next = tokens(1, session.engine().config().vocab_size)[0];
    if depth > 0 {
        prefill(session, depth)?;
    }
    let bytes = bytes_of_step(&[&session.decode_program(1, depth as u32 + 1).clone()], depth as u64);
    session.feed(&[next], Want::Logits)?;
    session.begin_drawing()?;
    let mut seconds = Vec::new();
    let mut start = Instant::now();
    for i in 0..warm + count {
        session.draw(usize::MAX)?;
        let now = Instant::now();
        if i >= warm {
            seconds.push((now - start).as_secs_f64());
        }
        start = now;
    }
    session.clear();
    Ok(Decode { depth, seconds, bytes })
}

/// The launches of one decoded token at `depth`, each timed on the device: the median of `rounds`.
///
/// # Errors
/// Where the device has no clock.
pub fn profile(engine: &Engine, depth: usize, rows: usize, rounds: usize) -> Result<Vec<Timed>> {
    let mut session = engine.session()?;
    if depth > 0 {
        prefill(&mut session, depth)?;
    }
    let step = tokens(rows, engine.config().vocab_size);
    session.feed_drawn(&step, Want::Nothing)?;
    let program = session.decode_program(rows as u32, (depth + rows) as u32).clone();
    let device = engine.device();
    let mut timed = Vec::new();
    for program in [&program] {
        device.run(program)?;
        let rounds = (0..rounds).map(|_| device.time(program)).collect::<Result<Vec<_>>>()?;
        for (at, launch) in program.launches.iter().enumerate() {
            let seconds = median(rounds.iter().map(|round| round[at]).collect());
            timed.push(Timed { kernel: launch.kernel.name, bytes: bytes_of(program, at, depth as u64), seconds });
        }
    }
    session.clear();
    Ok(timed)
}
