//! Measuring: how fast memory is read here, what a step must read, and where its time goes.

use crate::decode::{drawn, run_drawing};
use crate::device::{Buffer, Device};
use crate::engine::{Engine, Session, Want, write_rows};
use crate::error::{Error, Result};
use crate::model::Plan;
use crate::ops::{ChosenGroup, Draws, MoeDownAdd, NormMoeUp, Op, Row, Stream};
use crate::program::{HostStages, Program, Role};
use crate::reply::ReplyOptions;
use crate::sampler::Sampling;
use crate::schedule::{Request, Scheduler, SchedulerOptions};
use crate::tokenizer::TokenId;
use std::collections::VecDeque;
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
    clock(device)?;
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
    let weights = read(&WEIGHTS);
    let tokens = f64::from(program.tokens());
    // The share of a layer's `e` experts that `tokens` rows with `a` routes each choose at least once.
    let touched = |a: u32, e: u32| 1.0 - (1.0 - f64::from(a) / f64::from(e)).powf(tokens);
    match &launch.op {
        Op::Linear(_) | Op::LinearAdd(_) | Op::NormLinear(_) | Op::NormLinearFew(_) => {
            weights + read(&["bias", "router"])
        }
        Op::MoeUp(op) | Op::NormMoeUp(NormMoeUp { up: op, .. }) => (weights as f64 * touched(op.a, op.e)) as u64,
        Op::MoeDown(op) | Op::MoeDownAdd(MoeDownAdd(op)) => (weights as f64 * touched(op.a, op.e)) as u64,
        Op::Attention(op) => {
            let seen = if op.window == 0 { position + 1 } else { (position + 1).min(u64::from(op.window)) };
            u64::from(op.rows) * 2 * op.format.bytes(seen * u64::from(op.held[1]) * u64::from(op.dh))
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

/// `count` tokens after `depth`, drawn as `sampling` says, the first `warm` of them not counted.
pub fn decode(session: &mut Session, sampling: &Sampling, depth: usize, warm: usize, count: usize) -> Result<Decode> {
    session.clear();
    let next = tokens(1, session.engine().config().vocab_size)[0];
    if depth > 0 {
        prefill(session, depth)?;
    }
    let bytes = bytes_of_step(&[&session.decode_program(1, depth as u32 + 1, Draws::Likeliest).clone()], depth as u64);
    session.feed(&[next], Want::Logits)?;
    session.begin_drawing(sampling)?;
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

/// As [`decode`], of `sequences` sequences that are stepped together: seconds of each step, bytes of a step.
pub fn decode_batch(
    engine: &Engine,
    sampling: &Sampling,
    sequences: usize,
    depth: usize,
    warm: usize,
    count: usize,
) -> Result<Decode> {
    let (mut scheduler, _requests) = filled(engine, sampling, sequences, depth, warm + count + 1, Paged::AsUsual)?;
    let bytes = bytes_of_step(&[&scheduler.begin(0)?], depth as u64);
    let mut seconds = Vec::new();
    let mut start = Instant::now();
    for i in 0..warm + count {
        scheduler.step()?;
        let now = Instant::now();
        if i >= warm {
            seconds.push((now - start).as_secs_f64());
        }
        start = now;
    }
    Ok(Decode { depth, seconds, bytes })
}

/// As [`decode_batch`], without a scheduler's work on the host: one program that feeds itself is submitted over and over, as
/// far ahead as the device likes, its tokens are read, and nobody looks at them. The cache of a sequence lies in one page, or in few.
///
/// # Errors
/// Where so many steps are more than such a page has positions: nobody gives pages back that no window looks back to.
pub fn decode_plain(
    engine: &Engine,
    sampling: &Sampling,
    sequences: usize,
    depth: usize,
    warm: usize,
    count: usize,
) -> Result<Decode> {
    let steps = warm + count;
    if steps > LARGE_PAGE {
        let reason = format!("plain steps are {} at most: fewer, or no --plain", LARGE_PAGE - warm);
        return Err(Error::option("tokens", reason));
    }
    let (mut scheduler, _requests) = filled(engine, sampling, sequences, depth, steps + 1, Paged::InOne)?;
    let program = scheduler.begin(steps)?;
    let (device, bytes) = (engine.device(), bytes_of_step(&[&program], depth as u64));
    let (mut under_way, mut left) = (VecDeque::new(), steps);
    let mut seconds = Vec::new();
    let mut start = Instant::now();
    for i in 0..steps {
        while left > 0 && under_way.len() <= device.ahead() {
            under_way.push_back(run_drawing(device, &program, scheduler.drawn())?);
            left -= 1;
        }
        under_way.pop_front().map(drawn).transpose()?;
        let now = Instant::now();
        if i >= warm {
            seconds.push((now - start).as_secs_f64());
        }
        start = now;
    }
    Ok(Decode { depth, seconds, bytes })
}

/// One layer's experts measured: their choice by given scores, their matrices, and the weighted sum.
#[derive(Clone, Debug)]
pub struct Moe {
    /// Tokens of the step.
    pub tokens: usize,
    /// Seconds of a layer: one for each round over all layers.
    pub seconds: Vec<f64>,
    /// Bytes of the experts that the tokens went to, of a layer.
    pub bytes: u64,
    /// Different experts that they went to, of a layer.
    pub experts: f64,
}

/// The experts of every layer, one layer behind the other so that no weights are in the device's caches, each over random
/// rows of its own: by the kernels of decoding, or by a prompt's. The router's scores are there before, random too, as other
/// libraries have it that are measured so.
///
/// # Errors
/// Where the model has no experts, and where so many rows are no step.
pub fn moe(engine: &Engine, rows: usize, prompt: bool, rounds: usize) -> Result<Moe> {
    let (device, model, config) = (engine.device(), engine.model(), engine.config());
    let plan = Plan { context: 1, chunk: u32::try_from(rows).unwrap_or(u32::MAX), ..*engine.plan() };
    plan.check(config)
        .map_err(|_| Error::option("tokens", format!("{rows} is out of range: 1 to 2048 rows of a step")))?;
    let state = model.state(device, &plan)?;
    let role = if prompt { Role::Prompt } else { Role::Generated { reach: 1 } };
    let places: Vec<Row> = (0..rows as u32).map(|sequence| Row { sequence, ..Row::default() }).collect();
    write_rows(device, &state, &places)?;
    let step = model.body(rows as u32, role, true, &state);
    let mut all = Program::new(rows as u32, engine.plan().host);
    let (mut bytes, mut experts, mut layers, mut inputs) = (0, 0, 0, Vec::new());
    // Few rows come several times, so that the experts of one round are not those of all.
    for round in 0..(512 / rows).clamp(1, 4) {
        for idx in 0..config.num_hidden_layers {
            let name = |stage: &str| format!("layers.{idx}.{stage}");
            let stage = |what: &str| step.stages.iter().find(|stage| stage.name == name(what));
            let parts = (stage("mlp_norm"), stage("mlp.router.logits"), stage("mlp.router.experts"));
            let (Some(norm), Some(logits), Some(chosen)) = parts else { continue }; // a dense layer
            let launches = step.between(&name("mlp.router.logits"), &name("mlp.out")).expect("they are there");
            let seed = 2 * (round * config.num_hidden_layers + idx) as u64;
            let made = |label: &str, width: usize, seed: u64| {
                Buffer::with_bytes(device, label, bytemuck::cast_slice(&noise(rows * width, seed)))
            };
            let scores = made("scores of a layer", config.num_local_experts, seed)?;
            let input = made("rows of a layer", config.hidden_size, seed + 1)?;
            let together = if engine.plan().host.routing { launches.to_vec() } else { ChosenGroup::join(launches) };
            let mut layer = Program::new(rows as u32, engine.plan().host);
            for mut launch in together {
                for arg in &mut launch.args {
                    match arg.slice.buffer {
                        buffer if buffer == norm.slice.buffer => arg.slice = input.slice(),
                        buffer if buffer == logits.slice.buffer => arg.slice = scores.slice(),
                        _ => {}
                    }
                }
                layer.push(launch);
            }
            device.run(&layer)?;
            let mut words = vec![0u32; chosen.slice.bytes as usize / 4];
            device.read(chosen.slice, bytemuck::cast_slice_mut(&mut words))?;
            words.sort_unstable();
            words.dedup();
            let weights = launches.iter().filter(|launch| matches!(launch.op, Op::MoeUp(_) | Op::MoeDown(_)));
            let weights = weights.flat_map(|launch| &launch.args).filter(|arg| WEIGHTS.contains(&arg.name));
            let each = weights.map(|arg| arg.slice.bytes).sum::<u64>() / config.num_local_experts as u64;
            bytes += each * words.len() as u64;
            experts += words.len();
            layers += 1;
            all.launches.extend(layer.launches);
            inputs.extend([input, scores]);
        }
    }
    if layers == 0 {
        return Err(Error::option(
            "kernel",
            "moe: this model has no experts; take one that has, or leave --kernel out",
        ));
    }
    let all = all.seal();
    let run = |times: usize| -> Result<f64> {
        let start = Instant::now();
        (0..times).try_for_each(|_| device.run(&all))?;
        device.wait()?;
        Ok(start.elapsed().as_secs_f64() / times as f64)
    };
    // Busy first, and then long enough that the wait at the end does not count.
    let (start, mut one) = (Instant::now(), run(1)?);
    while start.elapsed().as_secs_f64() < BUSY_SECONDS {
        one = run(4)?;
    }
    let times = (0.05 / one).ceil().clamp(1.0, 200.0) as usize;
    let seconds = (0..rounds).map(|_| Ok(run(times)? / layers as f64)).collect::<Result<_>>()?;
    Ok(Moe { tokens: rows, seconds, bytes: bytes / layers as u64, experts: experts as f64 / layers as f64 })
}

/// How long a device is kept busy before anything is timed: idle clocks are slow clocks.
const BUSY_SECONDS: f64 = 1.0;

/// Decode for about a second.
pub fn keep_busy(session: &mut Session) -> Result<()> {
    let start = Instant::now();
    while start.elapsed().as_secs_f64() < BUSY_SECONDS {
        decode(session, &Sampling::greedy(), 0, 0, 4)?;
    }
    Ok(())
}

/// Whether the device times single launches.
///
/// # Errors
/// Where it has no clock.
pub fn clock(device: &Arc<dyn Device>) -> Result<()> {
    device.time(&Program::new(1, HostStages::default())).map(|_| ())
}

/// Roughly normal numbers, as a norm leaves them.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    // Mixed well (SplitMix64), so that neighbouring seeds have nothing in common.
    let mut state = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    // The sum of four has a standard deviation of 0.577.
    (0..n).map(|_| (uniform() + uniform() + uniform() + uniform()) * 1.732).collect()
}

/// Names of what a launch binds of a weight.
const WEIGHTS: [&str; 3] = ["codes", "scales", "row_scales"];

/// The launches of a step over `rows` sequences at `depth`, each timed on the device: the median of `rounds`.
///
/// # Errors
/// Where the device has no clock.
pub fn profile(engine: &Engine, sampling: &Sampling, depth: usize, rows: usize, rounds: usize) -> Result<Vec<Timed>> {
    let device = engine.device();
    clock(device)?;
    let (mut scheduler, _requests) = filled(engine, sampling, rows, depth, 2, Paged::AsUsual)?;
    let program = scheduler.begin(0)?;
    device.run(&program)?;
    let mut round = || {
        // A step moves its rows on.
        scheduler.begin(0)?;
        device.time(&program)
    };
    let rounds = (0..rounds).map(|_| round()).collect::<Result<Vec<_>>>()?;
    let timed = program.launches.iter().enumerate().map(|(at, launch)| Timed {
        kernel: launch.kernel.name,
        bytes: bytes_of(&program, at, depth as u64),
        seconds: median(rounds.iter().map(|round| round[at]).collect()),
    });
    Ok(timed.collect())
}

/// Positions of a page that is as large as a sequence.
const LARGE_PAGE: usize = 1024;

/// How the cache of a session lies.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Paged {
    AsUsual,
    /// In one page, or in few.
    InOne,
}

/// Sessions with prompts of `depth` tokens, at least one, that part at their first, and room for `more` tokens of each.
fn filled(
    engine: &Engine,
    sampling: &Sampling,
    sessions: usize,
    depth: usize,
    more: usize,
    paged: Paged,
) -> Result<(Scheduler, Vec<Request>)> {
    let vocab = engine.config().vocab_size;
    // No more of the cache than is used: many sessions with the engine's whole context would not fit.
    let context = depth.max(1) + more;
    let usual = SchedulerOptions { sessions, context: Some(context), ..SchedulerOptions::default() };
    let page = if paged == Paged::InOne { context.min(LARGE_PAGE) } else { usual.page };
    let mut scheduler = engine.scheduler(&SchedulerOptions { page, ..usual })?;
    let options = ReplyOptions {
        sampling: sampling.clone(),
        max_tokens: Some(more + 1),
        stop_tokens: Some(Vec::new()),
        ..ReplyOptions::default()
    };
    let mut requests = Vec::new();
    for first in tokens(sessions, vocab) {
        let mut prompt = tokens(depth.max(1), vocab);
        prompt[0] = first;
        requests.push(scheduler.add(&prompt, &options)?);
    }
    scheduler.compute_prompts()?;
    Ok((scheduler, requests))
}
