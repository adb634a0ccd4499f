//! Whether anything but its own history reaches a position: the same tokens run again, alone, in other pieces, beside
//! others, over poisoned scratch; every row of every stage is hashed, and all runs must hash alike.

use super::file::stage_order;
use crate::engine::{Engine, Session, Want, Watch};
use crate::error::Result;
use crate::program::{Slice, Stage};
use crate::tokenizer::TokenId;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

/// How a run differed from the first one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parting {
    /// The first stage, in order of execution, with a row that hashes otherwise.
    pub stage: String,
    /// The first such position.
    pub position: usize,
    /// Positions of that stage that hash otherwise.
    pub positions: usize,
}

/// One way to run the same tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trial {
    /// In words.
    pub name: &'static str,
    /// `None`: equal bits in every row of every stage.
    pub parting: Option<Parting>,
}

/// Tells a neighbour to end.
#[derive(Default)]
struct Stop(AtomicBool);

struct StopOnDrop<'s>(&'s Stop);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}

/// Hashes of a run: by stage, one for each position.
type Hashes = BTreeMap<String, Vec<u64>>;

/// Run `tokens` in every way there is. `new_session` makes the sessions under test; `others` are tokens for neighbours.
pub fn probe(
    engine: &Engine,
    new_session: impl Fn() -> Result<Session>,
    tokens: &[TokenId],
    others: &[TokenId],
) -> Result<Vec<Trial>> {
    let mut session = new_session()?;
    let whole = session.chunk();
    let first = run(&mut session, tokens, whole, || Ok(()))?;
    let mut trials = Vec::new();
    let mut add = |name, hashes: &Hashes| trials.push(Trial { name, parting: parting(&first, hashes) });

    session.clear();
    add("again in the same session", &run(&mut session, tokens, whole, || Ok(()))?);
    session.clear();
    session.feed(others, Want::Last)?;
    session.clear();
    add("after other tokens in the same session", &run(&mut session, tokens, whole, || Ok(()))?);
    for (name, piece) in [("one token a step", 1), ("three tokens a step", 3), ("seven tokens a step", 7)] {
        add(name, &run(&mut new_session()?, tokens, piece.min(whole), || Ok(()))?);
    }
    let mut poisoned = new_session()?;
    poison(&poisoned, &poisoned.state_slices())?;
    add("over scratch and cache full of NaN", &run(&mut poisoned, tokens, whole, || Ok(()))?);
    let mut neighbour = engine.session()?;
    let beside = run(&mut new_session()?, tokens, 3.min(whole), || {
        neighbour.clear();
        neighbour.feed(others, Want::Last).map(drop)
    })?;
    add("between steps of another session", &beside);
    let mut session = new_session()?;
    let busy = while_another_computes(engine, others, || run(&mut session, tokens, whole, || Ok(())))?;
    add("while another thread computes", &busy);
    Ok(trials)
}

/// Run something while another thread feeds tokens to a session of its own, over and over.
pub(crate) fn while_another_computes<R>(
    engine: &Engine,
    tokens: &[TokenId],
    run: impl FnOnce() -> Result<R>,
) -> Result<R> {
    let stop = Stop::default();
    std::thread::scope(|scope| {
        let (started, has_started) = std::sync::mpsc::channel();
        let stop = &stop;
        let other = scope.spawn(move || {
            let mut neighbour = engine.session()?;
            while !stop.0.load(Ordering::Relaxed) {
                neighbour.clear();
                neighbour.feed(tokens, Want::Last)?;
                let _ = started.send(());
            }
            Ok(())
        });
        let stopping = StopOnDrop(stop); // also if what follows panics
        let _ = has_started.recv(); // an error only if the neighbour failed, which `join` tells
        let result = run();
        drop(stopping);
        other.join().expect("the neighbour does not panic").and(result)
    })
}

/// Feed the tokens in pieces and hash every row of every stage. `between` runs after each piece.
fn run(
    session: &mut Session,
    tokens: &[TokenId],
    piece: usize,
    mut between: impl FnMut() -> Result<()>,
) -> Result<Hashes> {
    let mut hashes = Hashes::new();
    for piece in tokens.chunks(piece) {
        let mut see = |stage: &Stage, words: Vec<u32>| {
            hashes.entry(stage.name.clone()).or_default().extend(words.chunks_exact(stage.width).map(hash));
            Ok(())
        };
        session.feed_watching(piece, Want::All, &mut Watch { keep: &|_| true, stats: false, see: &mut see })?;
        between()?;
    }
    Ok(hashes)
}

/// FNV-1a over words, in eight lanes that do not wait for each other's multiplication, which are then taken together.
pub(crate) fn hash(row: &[u32]) -> u64 {
    hash_bytes(bytemuck::cast_slice(row))
}

/// As [`hash`], of words as they lie in memory, wherever they begin. Bytes behind the last word are left out.
pub(crate) fn hash_bytes(bytes: &[u8]) -> u64 {
    let mix = |h: u64, word: u64| (h ^ word).wrapping_mul(0x0000_0100_0000_01b3);
    let mut lanes = [0xcbf2_9ce4_8422_2325; 8];
    for words in bytes.chunks(4 * lanes.len()) {
        for (lane, word) in lanes.iter_mut().zip(words.chunks_exact(4)) {
            *lane = mix(*lane, u64::from(bytemuck::pod_read_unaligned::<u32>(word)));
        }
    }
    lanes.into_iter().fold(0xcbf2_9ce4_8422_2325, mix)
}

/// Fill buffers of a session with NaN.
pub(crate) fn poison(session: &Session, slices: &[Slice]) -> Result<()> {
    for &slice in slices {
        // NaN as an f32, and as two bf16.
        let words = vec![0x7fc0_7fc0u32; (slice.bytes / 4) as usize];
        session.device().write(slice, bytemuck::cast_slice(&words))?;
    }
    Ok(())
}

fn parting(first: &Hashes, other: &Hashes) -> Option<Parting> {
    let mut stages: Vec<&String> = first.keys().collect();
    stages.sort_by_key(|name| stage_order(name));
    stages.into_iter().find_map(|stage| {
        let (a, b) = (&first[stage], other.get(stage)?);
        let wrong: Vec<usize> = (0..a.len().max(b.len())).filter(|i| a.get(*i) != b.get(*i)).collect();
        let position = *wrong.first()?;
        Some(Parting { stage: stage.clone(), position, positions: wrong.len() })
    })
}
