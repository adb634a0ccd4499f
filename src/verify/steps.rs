//! Whole steps of a model: the same conversation in every setting that must not change a bit of its logits.

use super::bench::Random;
use super::{Line, Options, Part};
use crate::engine::{DeviceChoice, Engine, Session, Want};
use crate::error::Result;
use crate::reply::ReplyOptions;
use crate::sampler::{Sampling, at_fault};
use crate::schedule::{Request, SchedulerOptions};
use crate::speculate::{Drafter, Speculation};
use crate::tokenizer::TokenId;
use crate::trace::probe::{hash, poison, while_another_computes};
use std::time::Instant;

/// A conversation, and the hash of each position's logits when nothing else is there.
struct Trial<'a> {
    engine: &'a Engine,
    new_session: &'a dyn Fn() -> Result<Session>,
    prompt: Vec<TokenId>,
    /// The likeliest tokens after the prompt, one after the other.
    drawn: Vec<TokenId>,
    /// Tokens of others.
    others: Vec<TokenId>,
    alone: Vec<u64>,
    seed: u64,
}

/// What a run in some setting gave.
struct Told {
    /// Which variant of the setting.
    what: String,
    /// The position of the first hash.
    from: usize,
    hashes: Vec<u64>,
}

type Setting = fn(&Trial<'_>) -> Result<Vec<Told>>;

/// What must not matter.
const SETTINGS: [(&str, Setting); 8] = [
    ("again", again),
    ("in other chunks", in_chunks),
    ("several drawn tokens in a step", several_drawn),
    ("scratch full of NaN before each step", over_nan),
    ("between steps of another session", between_steps),
    ("while another thread computes", beside_a_thread),
    ("among sessions of a scheduler", beside_neighbours),
    ("after a second engine came and went", after_second_engine),
];

/// A line for each setting.
pub(super) fn check(
    engine: &Engine,
    new_session: &dyn Fn() -> Result<Session>,
    options: &Options,
    done: &mut dyn FnMut(Line),
) -> Result<()> {
    let seeds = 0..options.cases.max(1) as u64;
    let trials = seeds.map(|seed| Trial::new(engine, new_session, options, seed)).collect::<Result<Vec<_>>>()?;
    let strict: (&str, Setting) = ("the prompt as if it had been drawn", as_drawn);
    for (name, setting) in SETTINGS.into_iter().chain(engine.strict().then_some(strict)) {
        let (start, mut line) = (Instant::now(), Line::new(Part::Steps, name));
        for trial in &trials {
            for told in setting(trial)? {
                line.add(trial.differs(&told));
            }
            if line.tokens.is_empty() && !line.holds() {
                line.tokens.clone_from(&trial.prompt);
            }
        }
        line.elapsed = start.elapsed();
        done(line);
    }
    Ok(())
}

impl<'a> Trial<'a> {
    fn new(
        engine: &'a Engine,
        new_session: &'a dyn Fn() -> Result<Session>,
        options: &Options,
        seed: u64,
    ) -> Result<Self> {
        let mut random = Random(seed);
        let vocab = engine.config().vocab_size;
        let n_drawn = options.drawn.min(engine.context() / 2);
        let n_prompt = options.prompt.clamp(1, (engine.context() - n_drawn).max(1));
        let mut ids = |n: usize| -> Vec<TokenId> { (0..n).map(|_| random.below(vocab) as TokenId).collect() };
        let (prompt, others) = (ids(n_prompt), ids(n_prompt));
        let mut session = new_session()?;
        let (mut drawn, mut alone) = (Vec::new(), Vec::new());
        let mut see = |logits: Vec<f32>| {
            // Equal bits of what is no number say little.
            if logits.iter().any(|v| v.is_nan()) {
                return Err(at_fault("contain NaN"));
            }
            alone.extend(rows(&logits, vocab));
            Ok(likeliest(&logits[logits.len() - vocab..]))
        };
        let mut next = 0;
        for piece in prompt.chunks(session.chunk()) {
            next = see(session.feed(piece, Want::All)?)?;
        }
        for _ in 0..n_drawn {
            drawn.push(next);
            next = see(session.feed_drawn(&[next], Want::Last)?)?;
        }
        Ok(Self { engine, new_session, prompt, drawn, others, alone, seed })
    }

    /// Run the conversation in pieces, of the prompt and of what was drawn, with something before each.
    fn run(
        &self,
        session: &mut Session,
        [prompt, drawn]: [usize; 2],
        mut before: impl FnMut(&mut Session) -> Result<()>,
    ) -> Result<Vec<u64>> {
        let (vocab, mut hashes) = (self.engine.config().vocab_size, Vec::new());
        for piece in self.prompt.chunks(prompt) {
            before(session)?;
            hashes.extend(rows(&session.feed(piece, Want::All)?, vocab));
        }
        for piece in self.drawn.chunks(drawn) {
            before(session)?;
            hashes.extend(rows(&session.feed_drawn(piece, Want::All)?, vocab));
        }
        Ok(hashes)
    }

    /// The usual pieces.
    fn usual(&self, session: &Session) -> [usize; 2] {
        [session.chunk(), 1]
    }

    fn run_as_usual(&self, session: &mut Session) -> Result<Vec<u64>> {
        self.run(session, self.usual(session), |_| Ok(()))
    }

    /// As many as make a neighbour that does not take most of the time.
    fn few_others(&self) -> &[TokenId] {
        &self.others[..self.others.len().min(40)]
    }

    fn recalls(&self) -> Recalls {
        Recalls { drawn: self.drawn.clone(), vocab: self.engine.config().vocab_size as TokenId }
    }

    /// How a run differs from the one alone.
    fn differs(&self, told: &Told) -> Option<String> {
        let want = &self.alone[told.from..];
        let wrong: Vec<usize> = (0..want.len()).filter(|i| told.hashes.get(*i) != Some(&want[*i])).collect();
        let first = told.from + wrong.first()?;
        let role = if first < self.prompt.len() { "prompt" } else { "drawn" };
        let of = want.len();
        Some(format!("{}: position {first} ({role}) is the first of {} in {of} that differ", told.what, wrong.len()))
    }
}

/// Drafts what was drawn, but for every third token.
#[derive(Debug)]
struct Recalls {
    drawn: Vec<TokenId>,
    vocab: TokenId,
}

impl Drafter for Recalls {
    fn propose(&mut self, history: &[TokenId], n_prompt: usize, most: usize) -> Result<Vec<TokenId>> {
        let drawn = self.drawn.iter().zip(0..).skip(history.len() - n_prompt).take(most);
        Ok(drawn.map(|(id, i)| (id + TokenId::from(i % 3 == 2)) % self.vocab).collect())
    }
}

/// A run from the first position on.
fn told(what: impl Into<String>, hashes: Vec<u64>) -> Told {
    Told { what: what.into(), from: 0, hashes }
}

fn rows(logits: &[f32], vocab: usize) -> Vec<u64> {
    logits.chunks_exact(vocab).map(|row| hash(bytemuck::cast_slice(row))).collect()
}

fn likeliest(logits: &[f32]) -> TokenId {
    (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best }) as TokenId
}

fn again(trial: &Trial<'_>) -> Result<Vec<Told>> {
    let mut session = (trial.new_session)()?;
    let first = trial.run_as_usual(&mut session)?;
    session.clear();
    let second = trial.run_as_usual(&mut session)?;
    session.clear();
    session.feed(&trial.others, Want::Last)?;
    session.clear();
    let third = trial.run_as_usual(&mut session)?;
    let names = ["in another session", "in the same session", "after other tokens"];
    Ok(names.into_iter().zip([first, second, third]).map(|(name, hashes)| told(name, hashes)).collect())
}

fn in_chunks(trial: &Trial<'_>) -> Result<Vec<Told>> {
    let run = |chunk: usize| {
        let hashes = trial.run(&mut (trial.new_session)()?, [chunk, 1], |_| Ok(()))?;
        Ok(told(format!("chunks of {chunk}"), hashes))
    };
    [1, 3, 17, 64].into_iter().map(run).collect()
}

fn several_drawn(trial: &Trial<'_>) -> Result<Vec<Told>> {
    let run = |count: usize| {
        let mut session = (trial.new_session)()?;
        let pieces = [session.chunk(), count];
        let hashes = trial.run(&mut session, pieces, |_| Ok(()))?;
        Ok(told(format!("{count} in a step"), hashes))
    };
    [2, 5, 8].into_iter().map(run).collect()
}

fn over_nan(trial: &Trial<'_>) -> Result<Vec<Told>> {
    let run = |chunk: usize| {
        let mut session = (trial.new_session)()?;
        poison(&session, &session.state_slices())?; // the cache, too: nothing of it is read before it is written
        let before = |session: &mut Session| poison(session, &session.scratch_slices());
        Ok(told(format!("chunks of {chunk}"), trial.run(&mut session, [chunk, 1], before)?))
    };
    [1, 5, 64].into_iter().map(run).collect()
}

fn between_steps(trial: &Trial<'_>) -> Result<Vec<Told>> {
    let mut neighbour = trial.engine.session()?;
    let before = |_: &mut Session| {
        neighbour.clear();
        neighbour.feed(trial.few_others(), Want::Last).map(drop)
    };
    Ok(vec![told("chunks of 16", trial.run(&mut (trial.new_session)()?, [16, 1], before)?)])
}

fn beside_a_thread(trial: &Trial<'_>) -> Result<Vec<Told>> {
    let mut session = (trial.new_session)()?;
    let run = || trial.run_as_usual(&mut session);
    let hashes = while_another_computes(trial.engine, trial.few_others(), run)?;
    Ok(vec![told("another session", hashes)])
}

/// The conversation as one of several that come and go, with other pages and chunks; and then once more, where its prefix
/// is known already, with drafts. Of its prompt only the last logits are looked at.
fn beside_neighbours(trial: &Trial<'_>) -> Result<Vec<Told>> {
    let options = |tokens: usize| ReplyOptions {
        sampling: Sampling::greedy(),
        max_tokens: Some(tokens),
        stop_tokens: Some(Vec::new()),
        ..ReplyOptions::default()
    };
    let drawn = 1 + trial.drawn.len();
    let run = |(count, page, chunk): (usize, usize, Option<usize>)| {
        let mut random = Random(trial.seed * 100 + count as u64);
        let at = random.below(count);
        let how = SchedulerOptions { sessions: count, page, chunk, ..SchedulerOptions::default() };
        let mut scheduler = trial.engine.scheduler(&how)?;
        scheduler.hash_logits();
        let mut requests = Vec::new();
        for neighbour in 0..count {
            requests.push(if neighbour == at {
                scheduler.add(&trial.prompt, &options(drawn))?
            } else {
                // One is as long as the conversation, the others are short and leave when they like.
                let long = neighbour == (at + 1) % count;
                let (len, n) =
                    if long { (trial.others.len(), drawn) } else { (1 + random.below(40), 1 + random.below(drawn)) };
                scheduler.add(&trial.others[..len.min(trial.others.len())], &options(n))?
            });
        }
        while scheduler.step()? {}
        let again = scheduler.add(&trial.prompt, &options(drawn))?;
        scheduler.set_speculation(&again, Some(Speculation::new(trial.recalls()).with_count(4)?));
        while scheduler.step()? {}
        let told = |what: &str, request: &Request| Told {
            what: format!("{what}, {at} of {count} sessions, pages of {page}"),
            from: trial.prompt.len() - 1,
            hashes: request.logit_hashes(),
        };
        Ok([told("beside others", &requests[at]), told("once more, with drafts", &again)])
    };
    // As many as 16 logits are bound at once everywhere.
    let all = [(1, 16, None), (2, 1, Some(3)), (5, 7, Some(64)), (16, 16, None)];
    Ok(all.into_iter().map(run).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
}

fn after_second_engine(trial: &Trial<'_>) -> Result<Vec<Told>> {
    let mut begun = (trial.new_session)()?;
    let mut steps = 0;
    let before = |_: &mut Session| {
        steps += 1;
        if steps == 2 { second_engine(trial) } else { Ok(()) }
    };
    let half = trial.prompt.len().div_ceil(2).min(begun.chunk());
    let begun = trial.run(&mut begun, [half, 1], before)?;
    let fresh = trial.run_as_usual(&mut (trial.new_session)()?)?;
    Ok(vec![told("a session that had begun", begun), told("a session after it", fresh)])
}

/// Load another model on the device, run it, drop it.
fn second_engine(trial: &Trial<'_>) -> Result<()> {
    let builder = Engine::builder().device(DeviceChoice::Own(trial.engine.device().clone())).context(64);
    let builder = match cfg!(feature = "default-model") {
        true => builder.default_draft(),
        false => builder.checkpoint(trial.engine.name()),
    };
    let engine = builder.build()?;
    let vocab = engine.config().vocab_size as TokenId;
    let tokens: Vec<TokenId> = trial.others.iter().take(48).map(|id| id % vocab).collect();
    engine.session()?.feed(&tokens, Want::Last).map(drop)
}

/// With `strict`, a token's bits do not follow whether it was given or drawn.
fn as_drawn(trial: &Trial<'_>) -> Result<Vec<Told>> {
    let mut session = (trial.new_session)()?;
    let mut hashes = Vec::new();
    for piece in [&trial.prompt[..], &trial.drawn].concat().chunks(7) {
        hashes.extend(rows(&session.feed_drawn(piece, Want::All)?, trial.engine.config().vocab_size));
    }
    Ok(vec![told("seven in a step", hashes)])
}
