//! Batches: a sequence gets the tokens and the bits of logits that it gets alone, whoever stands beside it.

use crate::harness::{Named, cpu, gpus};
use crate::models;
use fourfold::device::{Device, Later, Limits};
use fourfold::program::{BufferId, Program, Slice};
use fourfold::{Activations, Batch, DeviceChoice, Engine, Error, Result, Want};
use std::path::PathBuf;
use std::sync::Arc;

fn fixtures() -> [PathBuf; 2] {
    [models::fixture("tiny"), crate::families::fixture("qwen3_moe/modelopt")]
}

fn devices() -> Vec<Named> {
    [("twins", cpu())].into_iter().chain(gpus().iter().cloned()).collect()
}

fn engine(dir: &PathBuf, device: &Arc<dyn Device>, context: usize) -> Engine {
    let builder = Engine::builder().checkpoint(dir).device(DeviceChoice::Own(device.clone()));
    builder.context(context).chunk(16).build().unwrap()
}

fn prompt(seed: usize, n: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * 37 + seed * 101 + i * i) % 500) as u32).collect()
}

/// Lengths on both sides of a window, of a chunk, and of the 128 keys that one segment of attention takes.
fn prompts() -> Vec<Vec<u32>> {
    [3, 126, 17, 260, 1].iter().enumerate().map(|(i, n)| prompt(i + 1, *n)).collect()
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|v| v.to_bits()).collect()
}

fn likeliest(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().fold(0, |best, (i, v)| if *v > logits[best] { i } else { best });
    best as u32
}

/// The tokens that a sequence gives, and the bits of the logits of every step.
type Told = (Vec<u32>, Vec<Vec<u32>>);

/// Every sequence's tokens and bits over so many steps.
fn together(engine: &Engine, prompts: &[Vec<u32>], steps: usize) -> Vec<Told> {
    let mut batch = engine.batch(prompts.len()).unwrap();
    let feed = |(i, prompt): (usize, &Vec<u32>)| (vec![batch.feed(i, prompt).unwrap()], Vec::new());
    let mut told: Vec<Told> = prompts.iter().enumerate().map(feed).collect();
    let vocab = engine.config().vocab_size;
    for _ in 0..steps {
        let tokens = batch.step().unwrap();
        let logits = batch.logits().unwrap();
        for ((told, token), logits) in told.iter_mut().zip(tokens).zip(logits.chunks_exact(vocab)) {
            assert_eq!(token, likeliest(logits));
            told.0.push(token);
            told.1.push(bits(logits));
        }
    }
    told
}

/// The same of a session: the plain way.
fn in_a_session(engine: &Engine, prompt: &[u32], steps: usize) -> Told {
    let mut session = engine.session().unwrap();
    let mut tokens = vec![likeliest(&session.feed(prompt, Want::Last).unwrap())];
    let mut all = Vec::new();
    for i in 0..steps {
        let logits = session.feed_drawn(&tokens[i..=i], Want::Last).unwrap();
        tokens.push(likeliest(&logits));
        all.push(bits(&logits));
    }
    (tokens, all)
}

#[test]
fn a_sequence_gets_what_it_gets_alone() {
    for (n, (where_, device)) in devices().into_iter().enumerate() {
        // Lesser adapters than the one that is here run the first fixture only.
        for dir in fixtures().into_iter().take(if n < 2 { 2 } else { 1 }) {
            let engine = engine(&dir, &device, 300);
            let all = prompts();
            let got = together(&engine, &all, 6);
            for (i, prompt) in all.iter().enumerate() {
                let what = format!("sequence {i} of {} on {where_}", dir.display());
                let alone = together(&engine, &all[i..=i], 6).remove(0);
                assert_eq!(got[i].0, alone.0, "{what}");
                assert!(got[i].1 == alone.1, "{what}: other bits than alone");
                let session = in_a_session(&engine, prompt, 6);
                assert_eq!(got[i].0, session.0, "{what}");
                assert!(got[i].1 == session.1, "{what}: other bits than in a session");
            }
        }
    }
}

#[test]
fn neither_order_nor_neighbours_matter() {
    for (where_, device) in devices().into_iter().take(2) {
        for dir in fixtures() {
            let engine = engine(&dir, &device, 300);
            let all = prompts();
            let want = together(&engine, &all, 3);
            let reversed: Vec<Vec<u32>> = all.iter().rev().cloned().collect();
            let mut got = together(&engine, &reversed, 3);
            got.reverse();
            assert!(got == want, "the order matters on {where_}");
            // Everybody else says something different.
            for kept in [0, 2] {
                let other = |(i, p): (usize, &Vec<u32>)| if i == kept { p.clone() } else { prompt(i + 50, 5 + 30 * i) };
                let others: Vec<Vec<u32>> = all.iter().enumerate().map(other).collect();
                let got = together(&engine, &others, 3);
                assert!(got[kept] == want[kept], "the neighbours of {kept} matter on {where_}");
                assert!(got[1] != want[1], "the neighbours were the same, so nothing was tested");
            }
        }
    }
}

/// A device that is worth running ahead on, whatever it is.
#[derive(Debug)]
struct Eager(Arc<dyn Device>);

impl Device for Eager {
    fn alloc(&self, label: &str, bytes: u64) -> Result<BufferId> {
        self.0.alloc(label, bytes)
    }
    fn free(&self, id: BufferId) {
        self.0.free(id);
    }
    fn write(&self, to: Slice, bytes: &[u8]) -> Result<()> {
        self.0.write(to, bytes)
    }
    fn read(&self, from: Slice, bytes: &mut [u8]) -> Result<()> {
        self.0.read(from, bytes)
    }
    fn read_later(&self, from: Slice) -> Result<Box<dyn Later>> {
        self.0.read_later(from)
    }
    fn ahead(&self) -> usize {
        2
    }
    fn prepare(&self, program: &Program) -> Result<()> {
        self.0.prepare(program)
    }
    fn run(&self, program: &Program) -> Result<()> {
        self.0.run(program)
    }
    fn wait(&self) -> Result<()> {
        self.0.wait()
    }
    fn limits(&self) -> Limits {
        self.0.limits()
    }
    fn describe(&self) -> String {
        self.0.describe()
    }
}

fn steps(batch: &mut Batch, count: usize) -> Vec<Vec<u32>> {
    (0..count).map(|_| batch.step().unwrap()).collect()
}

#[test]
fn running_ahead_changes_nothing() {
    for (where_, device) in devices().into_iter().take(2) {
        let eager: Arc<dyn Device> = Arc::new(Eager(device.clone()));
        for dir in fixtures() {
            // With chunks of one, a sliding layer has no place to spare.
            let built = |device: &Arc<dyn Device>| {
                let builder = Engine::builder().checkpoint(&dir).device(DeviceChoice::Own(device.clone()));
                builder.context(64).chunk(1).build().unwrap()
            };
            let run = |engine: &Engine| {
                let mut batch = engine.batch(3).unwrap();
                for (i, n) in [30, 4, 19].into_iter().enumerate() {
                    batch.feed(i, &prompt(i, n)).unwrap();
                }
                let mut all = vec![steps(&mut batch, 7)];
                all.push(vec![bits(&batch.logits().unwrap())]);
                all.push(steps(&mut batch, 2));
                // One goes on with other tokens; what was computed ahead for the others is computed again.
                all.push(vec![vec![batch.feed(1, &prompt(9, 5)).unwrap()]]);
                all.push(steps(&mut batch, 3));
                // Another makes place for a new one.
                batch.clear(2).unwrap();
                assert_eq!(batch.tokens(2), Some(&[][..]));
                all.push(vec![vec![batch.feed(2, &prompt(8, 21)).unwrap()]]);
                all.push(steps(&mut batch, 22));
                assert_eq!([0, 1, 2].map(|i| batch.tokens(i).unwrap().len()), [64, 43, 43]);
                let error = batch.step().unwrap_err();
                assert!(matches!(error, Error::ContextFull { context: 64, tokens: 65, .. }), "{error}");
                all.push(vec![batch.tokens(0).unwrap().to_vec(), batch.tokens(1).unwrap().to_vec()]);
                all
            };
            assert!(run(&built(&eager)) == run(&built(&device)), "on {where_}, {}", dir.display());
        }
    }
}

#[test]
fn what_cannot_work_is_an_error_that_names_it() {
    let device = cpu();
    let tiny = engine(&fixtures()[0], &device, 20);
    let says = |e: Error, words: &[&str]| {
        for word in words {
            assert!(e.to_string().contains(word), "{e} does not say {word}");
        }
    };
    says(tiny.batch(0).unwrap_err(), &["sequences", "1 to 1024"]);
    says(tiny.batch(1025).unwrap_err(), &["sequences", "1025"]);
    let mut batch = tiny.batch(2).unwrap();
    assert_eq!((batch.sequences(), batch.tokens(2)), (2, None));
    says(batch.feed(2, &[1]).unwrap_err(), &["sequence", "no 2", "0 to 1"]);
    says(batch.clear(2).unwrap_err(), &["sequence", "no 2"]);
    says(batch.feed(0, &[]).unwrap_err(), &["tokens", "sequence 0", "at least one"]);
    says(batch.feed(0, &[1, 512]).unwrap_err(), &["512 is not a token"]);
    says(batch.step().unwrap_err(), &["sequences", "0 has no prompt"]);
    batch.feed(0, &prompt(1, 18)).unwrap();
    says(batch.step().unwrap_err(), &["sequences", "1 has no prompt"]);
    assert!(matches!(batch.feed(1, &prompt(2, 21)).unwrap_err(), Error::ContextFull { context: 20, tokens: 21, .. }));
    batch.feed(1, &prompt(2, 2)).unwrap();
    assert!(matches!(batch.feed(0, &prompt(2, 3)).unwrap_err(), Error::ContextFull { context: 20, tokens: 21, .. }));
    says(batch.logits().unwrap_err(), &["logits", "no step"]);
    // What was refused has changed nothing: 18 tokens leave room for two steps.
    let told = steps(&mut batch, 2);
    assert!(matches!(batch.step().unwrap_err(), Error::ContextFull { context: 20, tokens: 21, .. }));
    let mut fresh = tiny.batch(2).unwrap();
    fresh.feed(1, &prompt(2, 2)).unwrap();
    fresh.feed(0, &prompt(1, 18)).unwrap();
    assert_eq!(steps(&mut fresh, 2), told);
    let quantised = Engine::builder().checkpoint(&fixtures()[1]).device(DeviceChoice::Cpu).context(20);
    let quantised = quantised.activations(Activations::Nvfp4Dynamic).build().unwrap();
    says(quantised.batch(2).unwrap_err(), &["activations", "nvfp4-token"]);
}
