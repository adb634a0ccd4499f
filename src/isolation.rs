//! Whether a model's output changes because another model lives in the process: the model alone, beside its twin (a second
//! engine of the same checkpoint), and beside another model, each loaded before it, run, kept, and stepped between its steps.
//!
//! What is looked at is what every layer's experts (or dense MLP) add, in moments, and every layer's output, in hashes.

use crate::device::Device;
use crate::engine::{Engine, Session, Want, Watch};
use crate::error::{Error, Result};
use crate::ops::STATS_WORDS;
use crate::program::Stage;
use crate::tokenizer::TokenId;
use crate::trace::file::split_layer;
use crate::trace::probe::hash;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Rows of a prompt's step: few, so that the other model runs often in between.
const PIECE: usize = 32;

/// Which model is to be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// The one under test.
    Subject,
    /// The one that it lives beside.
    Other,
}

/// What a layer gave over all rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Layer {
    /// The least of what its experts, or its dense MLP, added.
    pub least: f64,
    /// The largest.
    pub largest: f64,
    /// The mean.
    pub mean: f64,
    /// The standard deviation.
    pub deviation: f64,
    /// Hash of the bits of all of it.
    pub mlp: u64,
    /// Hash of the bits of the layer's output.
    pub output: u64,
}

/// A run of the model in one setting.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    /// In words.
    pub name: &'static str,
    /// Its layers, in order.
    pub layers: Vec<Layer>,
    /// Hash of the logits of all positions.
    pub logits: u64,
    /// The tokens that it drew.
    pub drawn: Vec<TokenId>,
}

/// The runs: alone, beside the twin, beside the other model.
#[derive(Clone, Debug)]
pub struct Report {
    /// Who computed.
    pub device: String,
    /// Tokens of the prompt.
    pub tokens: Vec<TokenId>,
    /// The first is the one that the others are held to.
    pub settings: Vec<Setting>,
}

impl Report {
    /// Where each setting first differs from the model alone. Empty: equal bits in all.
    pub fn differences(&self) -> Vec<String> {
        let Some((alone, others)) = self.settings.split_first() else { return Vec::new() };
        others.iter().filter_map(|other| Some(format!("{}: {}", other.name, first_difference(alone, other)?))).collect()
    }
}

fn first_difference(alone: &Setting, other: &Setting) -> Option<String> {
    let layers = alone.layers.iter().zip(&other.layers).enumerate();
    let differ = |(idx, (a, b)): (usize, (&Layer, &Layer))| match (a.mlp == b.mlp, a.output == b.output) {
        (true, true) => None,
        (false, _) => Some(format!("what the MLP of layer {idx} adds has other bits")),
        (true, false) => Some(format!("the output of layer {idx} has other bits")),
    };
    let found = layers.into_iter().find_map(differ);
    let logits = || (alone.logits != other.logits || alone.drawn != other.drawn).then(|| "other logits".to_owned());
    found.or_else(logits)
}

/// Run the experiment. `load` makes a new engine each time: the first one where it likes, the next ones on the device
/// that they are given. `tokens`: the prompt, for the engine under test; `drawn`: how many tokens follow.
///
/// # Errors
/// What loading and running report. A difference is no error: see [`Report::differences`].
pub fn isolation(
    load: &mut dyn FnMut(Who, Option<Arc<dyn Device>>) -> Result<Engine>,
    tokens: &dyn Fn(&Engine) -> Result<Vec<TokenId>>,
    drawn: usize,
) -> Result<Report> {
    let alone = load(Who::Subject, None)?;
    let (device, prompt) = (alone.device().clone(), tokens(&alone)?);
    if prompt.is_empty() {
        return Err(Error::option("tokens", "there is nothing to run: give at least one"));
    }
    alone.check_context(prompt.len().saturating_add(drawn))?;
    let mut settings = vec![observe("alone", &alone, None, &prompt, drawn)?];
    drop(alone);
    for (name, who) in [("beside its twin", Who::Subject), ("beside the other", Who::Other)] {
        let other = load(who, Some(device.clone()))?;
        let mut neighbour = Neighbour::new(&other, &prompt)?;
        neighbour.step()?; // it has run before the subject is there
        let subject = load(Who::Subject, Some(device.clone()))?;
        settings.push(observe(name, &subject, Some(&mut neighbour), &prompt, drawn)?);
    }
    Ok(Report { device: device.describe(), tokens: prompt, settings })
}

/// A model that runs in between.
struct Neighbour {
    session: Session,
    tokens: Vec<TokenId>,
}

impl Neighbour {
    fn new(engine: &Engine, tokens: &[TokenId]) -> Result<Self> {
        let vocab = engine.config().vocab_size as TokenId;
        // The same tokens where it has them: a twin computes the very same next to the subject.
        let tokens = tokens.iter().map(|id| id % vocab).take(engine.context().min(PIECE)).collect();
        Ok(Self { session: engine.session()?, tokens })
    }

    /// A prompt's step, and one of a drawn token where there is room.
    fn step(&mut self) -> Result<()> {
        self.session.clear();
        self.session.feed(&self.tokens, Want::Last)?;
        if self.tokens.len() < self.session.engine().context() {
            self.session.feed_drawn(&self.tokens[..1], Want::Last)?;
        }
        Ok(())
    }
}

/// What is seen of a stage, over all steps.
#[derive(Debug)]
struct Seen {
    n: f64,
    sum: f64,
    squares: f64,
    least: f64,
    largest: f64,
    hash: u64,
}

impl Seen {
    const NOTHING: Self =
        Self { n: 0.0, sum: 0.0, squares: 0.0, least: f64::INFINITY, largest: f64::NEG_INFINITY, hash: 0 };

    /// Rows of `ops::Stats`.
    fn add(&mut self, width: usize, words: &[u32]) {
        for row in words.chunks_exact(STATS_WORDS) {
            let [sum, squares, least, largest] = [0, 1, 2, 3].map(|i| f64::from(f32::from_bits(row[i])));
            // Numbers only: NaN and infinity are counted apart.
            self.n += width as f64 - f64::from(row[4]) - f64::from(row[5]);
            self.sum += sum;
            self.squares += squares;
            self.least = self.least.min(least);
            self.largest = self.largest.max(largest);
        }
        self.hash = chain(self.hash, words);
    }
}

/// The hash of what came before and these words.
fn chain(before: u64, words: &[u32]) -> u64 {
    before.rotate_left(17) ^ hash(words)
}

/// Run the subject, with a step of the neighbour before each of its own.
fn observe(
    name: &'static str,
    engine: &Engine,
    mut neighbour: Option<&mut Neighbour>,
    tokens: &[TokenId],
    drawn: usize,
) -> Result<Setting> {
    let mut seen: BTreeMap<(usize, bool), Seen> = BTreeMap::new();
    let mut session = engine.session()?;
    let piece = PIECE.min(session.chunk());
    let (mut all, mut last, mut hashed) = (Vec::new(), Vec::new(), 0);
    let mut step = |tokens: &[TokenId], is_drawn: bool| -> Result<Vec<f32>> {
        if let Some(neighbour) = &mut neighbour {
            neighbour.step()?;
        }
        let place = |stage: &str| {
            let (layer, what) = split_layer(stage)?;
            matches!(what, "mlp.out" | "hidden").then_some((layer, what == "hidden"))
        };
        let mut see = |stage: &Stage, words: Vec<u32>| {
            let place = place(&stage.name).expect("only these are kept");
            seen.entry(place).or_insert(Seen::NOTHING).add(stage.width, &words);
            Ok(())
        };
        let mut watch = Watch { keep: &|name| place(name).is_some(), stats: true, see: &mut see };
        match is_drawn {
            true => session.feed_drawn_watching(tokens, Want::All, &mut watch),
            false => session.feed_watching(tokens, Want::All, &mut watch),
        }
    };
    for piece in tokens.chunks(piece) {
        last = step(piece, false)?;
        hashed = chain(hashed, bytemuck::cast_slice(&last));
    }
    let vocab = engine.config().vocab_size;
    for _ in 0..drawn {
        let row = &last[last.len() - vocab..];
        let next = (0..vocab).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as TokenId;
        all.push(next);
        last = step(&[next], true)?;
        hashed = chain(hashed, bytemuck::cast_slice(&last));
    }
    let of = |idx, output| seen.get(&(idx, output)).expect("every family names what its MLP adds, and its output");
    let layer = |idx: usize| {
        let mlp = of(idx, false);
        let mean = mlp.sum / mlp.n;
        let deviation = (mlp.squares / mlp.n - mean * mean).max(0.0).sqrt();
        Layer { least: mlp.least, largest: mlp.largest, mean, deviation, mlp: mlp.hash, output: of(idx, true).hash }
    };
    let layers = (0..engine.config().num_hidden_layers).map(layer).collect();
    Ok(Setting { name, layers, logits: hashed, drawn: all })
}
