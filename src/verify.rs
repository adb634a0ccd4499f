//! Whether the bits of a position depend on anything that they should not depend on, here, on this adapter and driver.
//!
//! Four parts, each resting on the one before: known answers (`oracle`), every kernel against its twin, every row of every
//! kernel alone and among others (`kernels.rs` runs `cases.rs`), and whole steps of a model in every setting that must not
//! matter (`steps.rs`). `trace::probe` then finds the stage where a run went wrong.

mod bench;
mod cases;
mod kernels;
mod steps;

#[doc(hidden)]
pub use kernels::covered;

use crate::engine::{Engine, Session};
use crate::error::{Error, Result};
use crate::ops::Activations;
use crate::oracle::{self, Which};
use crate::tokenizer::TokenId;
use std::time::{Duration, Instant};

/// A part of the whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Programs whose answers are known.
    Oracle,
    /// Every kernel gives what its twin gives.
    Kernels,
    /// A row has the same bits alone and among 2 to 64 others, in any order.
    Rows,
    /// A model's logits have the same bits in every setting.
    Steps,
}

impl Part {
    /// All of them, in the order in which they run.
    pub const ALL: [Self; 4] = [Self::Oracle, Self::Kernels, Self::Rows, Self::Steps];

    /// A word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Oracle => "oracle",
            Self::Kernels => "kernels",
            Self::Rows => "rows",
            Self::Steps => "steps",
        }
    }
}

/// What to check, and how much of it.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which parts.
    pub parts: Vec<Part>,
    /// Different conversations that whole steps are checked with.
    pub cases: usize,
    /// Tokens of each conversation's prompt, as many as the context has room for.
    pub prompt: usize,
    /// Tokens that the model then draws.
    pub drawn: usize,
}

impl Default for Options {
    /// Past 128 positions attention is shared among segments, so a prompt goes on longer.
    fn default() -> Self {
        Self { parts: Part::ALL.to_vec(), cases: 1, prompt: 150, drawn: 12 }
    }
}

/// How a check went.
#[derive(Clone, Debug)]
pub struct Line {
    /// The part that it belongs to.
    pub part: Part,
    /// What was checked.
    pub name: String,
    /// How many times, each time something else.
    pub cases: usize,
    /// How many of them differed.
    pub wrong: usize,
    /// What differed first, and where. Empty where nothing did.
    pub detail: String,
    /// The prompt that shows it, where `probe` can find the stage.
    pub tokens: Vec<TokenId>,
    /// How long it took, kernels compiled for it included.
    pub elapsed: Duration,
}

impl Line {
    /// A check that has seen no case yet.
    fn new(part: Part, name: impl Into<String>) -> Self {
        let name = name.into();
        Self { part, name, cases: 0, wrong: 0, detail: String::new(), tokens: Vec::new(), elapsed: Duration::ZERO }
    }

    /// Whether every case held.
    pub fn holds(&self) -> bool {
        self.wrong == 0
    }

    /// Count a case: `None` held, else what differed.
    fn add(&mut self, difference: Option<String>) {
        self.cases += 1;
        if let Some(difference) = difference {
            self.wrong += 1;
            if self.detail.is_empty() {
                self.detail = difference;
            }
        }
    }
}

/// Run the checks on an engine's device, and whole steps on the engine itself. `see` gets each line when it is done.
///
/// # Errors
/// What the device reports, and options that cannot be. A difference is no error but a [`Line`] that does not hold.
pub fn verify(engine: &Engine, options: &Options, see: &mut dyn FnMut(&Line)) -> Result<Vec<Line>> {
    verify_sessions(engine, &|| engine.session(), options, see)
}

/// As [`verify`], for sessions that somebody else makes: how tests plant faults.
///
/// # Errors
/// As [`verify`].
#[doc(hidden)]
pub fn verify_sessions(
    engine: &Engine,
    new_session: &dyn Fn() -> Result<Session>,
    options: &Options,
    see: &mut dyn FnMut(&Line),
) -> Result<Vec<Line>> {
    if engine.activations() == Activations::Nvfp4Dynamic {
        let reason = "\"nvfp4-dynamic\" has one scale for all rows of a step, so a row depends on its neighbours by \
                      definition: use \"nvfp4-token\" or \"nvfp4-static\"";
        return Err(Error::option("activations", reason));
    }
    let mut lines = Vec::new();
    let mut done = |line: Line| {
        see(&line);
        lines.push(line);
    };
    for part in Part::ALL.into_iter().filter(|part| options.parts.contains(part)) {
        match part {
            Part::Oracle => done(known_answers(engine)?),
            Part::Kernels => kernels::against_twins(engine.device(), &mut done)?,
            Part::Rows => kernels::by_rows(engine.device(), &mut done)?,
            Part::Steps => steps::check(engine, new_session, options, &mut done)?,
        }
    }
    Ok(lines)
}

fn known_answers(engine: &Engine) -> Result<Line> {
    let start = Instant::now();
    let mut line = Line::new(Part::Oracle, "known answers");
    for outcome in oracle::run(engine.device(), Which::All)? {
        let wrong = || format!("{}: {}: {}", outcome.name, outcome.fact, outcome.detail);
        line.add((!outcome.passed).then(wrong));
    }
    line.elapsed = start.elapsed();
    Ok(line)
}
