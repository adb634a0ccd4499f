//! Several sequences decoded together: one step gives each of them its next token, and reads the weights once for all.

use crate::decode::{DecodePrograms, drawn, run_drawing};
use crate::device::Later;
use crate::engine::{Engine, write_picks, write_rows};
use crate::error::{Error, Result};
use crate::model::{Plan, State};
use crate::ops::{Activations, Row};
use crate::program::{Program, Role};
use crate::tokenizer::TokenId;
use std::collections::VecDeque;

/// Most sequences of a batch.
const MOST: usize = 1024;

/// A fixed number of sequences, each with a cache of its own, that go on together. [`Batch::feed`] gives each a prompt,
/// [`Batch::step`] draws the likeliest next token of all of them.
///
/// What a sequence gets does not depend on the others: its logits have the bits that it has alone.
///
/// ```no_run
/// let engine = fourfold::Engine::builder().build()?;
/// let mut batch = engine.batch(2)?;
/// let first = [batch.feed(0, &[7, 21])?, batch.feed(1, &[90])?];
/// let second = batch.step()?; // one token of each sequence, after `first`
/// # Ok::<(), fourfold::Error>(())
/// ```
#[derive(Debug)]
pub struct Batch {
    engine: Engine,
    state: State,
    /// Positions that a sequence has room for.
    context: usize,
    chunk: usize,
    decode: DecodePrograms,
    sequences: Vec<Sequence>,
    /// Steps on the device whose tokens nobody has looked at.
    under_way: VecDeque<Box<dyn Later>>,
    /// Whether the last thing computed was a step.
    stepped: bool,
}

#[derive(Clone, Debug, Default)]
struct Sequence {
    /// What the cache holds.
    tokens: Vec<TokenId>,
    /// The token drawn last, which the cache does not hold yet.
    next: Option<TokenId>,
}

impl Batch {
    pub(crate) fn new(engine: &Engine, sequences: usize, context: usize) -> Result<Self> {
        if sequences == 0 || sequences > MOST {
            let reason = format!("{sequences} is out of range: a batch has 1 to {MOST} sequences");
            return Err(Error::option("sequences", reason));
        }
        if engine.activations() == Activations::Nvfp4Dynamic {
            let reason = "\"nvfp4-dynamic\" has one scale for all rows of a step, so sequences would change each other: use \
                          \"nvfp4-token\"";
            return Err(Error::option("activations", reason));
        }
        let context = context.min(engine.context());
        if (sequences as u64) * (context as u64) > u64::from(u32::MAX) / 2 {
            let reason = format!("{sequences} with {context} positions each are too many: choose a smaller context");
            return Err(Error::option("sequences", reason));
        }
        let chunk = engine.plan().chunk.min(context as u32);
        let plan = Plan { sequences: sequences as u32, context: context as u32, chunk, ..*engine.plan() };
        let (model, device) = (engine.model(), engine.device());
        let state = model.state(device, &plan)?;
        if (state.max_picks as usize) < sequences {
            let reason = format!(
                "{sequences} are too many: {} binds the logits of {} at most",
                device.describe(),
                state.max_picks
            );
            return Err(Error::option("sequences", reason));
        }
        for program in [
            &model.body(1, Role::Prompt, false, &state),
            &model.body(plan.chunk, Role::Prompt, false, &state),
            &model.head(1, &state),
            &model.decode(sequences as u32, 1, false, &state),
        ] {
            device.prepare(program)?;
        }
        Ok(Self {
            engine: engine.clone(),
            state,
            context,
            chunk: chunk as usize,
            decode: DecodePrograms::default(),
            sequences: vec![Sequence::default(); sequences],
            under_way: VecDeque::new(),
            stepped: false,
        })
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// How many sequences there are.
    pub fn sequences(&self) -> usize {
        self.sequences.len()
    }

    /// The tokens that the cache holds of a sequence: not yet the one that was drawn last. `None`: there is no such
    /// sequence.
    pub fn tokens(&self, sequence: usize) -> Option<&[TokenId]> {
        self.sequences.get(sequence).map(|s| s.tokens.as_slice())
    }

    /// Append tokens to a sequence, compute them, and give its likeliest next token, which the next step goes on from. If
    /// it fails half-way, the sequence is empty; the others are as they were.
    pub fn feed(&mut self, sequence: usize, tokens: &[TokenId]) -> Result<TokenId> {
        let held = self.known(sequence)?.tokens.len();
        if tokens.is_empty() {
            return Err(Error::option("tokens", format!("none for sequence {sequence}: give at least one")));
        }
        self.engine.check_ids(tokens)?;
        self.engine.check_room(self.context, held + tokens.len())?;
        self.forget_ahead();
        self.stepped = false;
        // Half-way, positions past the end may have taken the places of keys in sliding layers.
        let before = std::mem::take(&mut self.sequences[sequence]).tokens;
        let next = self.prompt(sequence, before.len(), tokens)?;
        self.sequences[sequence] = Sequence { tokens: [&before, tokens].concat(), next: Some(next) };
        Ok(next)
    }

    /// Forget a sequence's tokens, so that another can take its place.
    pub fn clear(&mut self, sequence: usize) -> Result<()> {
        self.known(sequence)?;
        self.forget_ahead();
        self.stepped = false;
        self.sequences[sequence] = Sequence::default();
        Ok(())
    }

    /// The next token of each sequence, the likeliest after the one that [`Self::feed`] or the step before gave, while
    /// further steps are computed on the device. If it fails, all sequences are as they were.
    pub fn step(&mut self) -> Result<Vec<TokenId>> {
        let longest = self.ready()?;
        let choices = match self.step_from(longest) {
            Ok(choices) => choices,
            Err(e) => {
                self.forget_ahead();
                return Err(e);
            }
        };
        for (sequence, id) in self.sequences.iter_mut().zip(&choices) {
            sequence.tokens.extend(sequence.next.replace(*id));
        }
        self.stepped = true;
        Ok(choices)
    }

    /// The logits of the last step, `[N, V]`: those that its tokens were drawn from. For tests: where the device has gone
    /// ahead, the step is computed again, and what was ahead is lost.
    #[doc(hidden)]
    pub fn logits(&mut self) -> Result<Vec<f32>> {
        if !self.stepped {
            return Err(Error::option("logits", "there was no step since the last prompt: make one"));
        }
        let device = self.engine.device().clone();
        if !self.under_way.is_empty() {
            self.forget_ahead();
            let last = |s: &Sequence| (s.tokens[s.tokens.len() - 1], s.tokens.len() - 1);
            self.place(last)?;
            let longest = self.longest();
            device.run(self.program(longest))?;
        }
        let mut logits = vec![0.0; self.sequences.len() * self.engine.config().vocab_size];
        device.read(self.state.logits.head(logits.len() as u64 * 4), bytemuck::cast_slice_mut(&mut logits))?;
        Ok(logits)
    }

    /// For measuring: put the rows of the next step in their places, and give its program, which moves them on.
    pub(crate) fn begin(&mut self) -> Result<Program> {
        let longest = self.ready()?;
        self.forget_ahead();
        self.stepped = false;
        self.place_next()?;
        Ok(self.program(longest + 1).clone())
    }

    fn known(&self, sequence: usize) -> Result<&Sequence> {
        let count = self.sequences.len();
        let unknown = || Error::option("sequence", format!("there is no {sequence}: the batch has 0 to {}", count - 1));
        self.sequences.get(sequence).ok_or_else(unknown)
    }

    /// The device's steps that nobody has looked at do not count: the next step puts the rows in their places again.
    fn forget_ahead(&mut self) {
        self.under_way.clear();
    }

    fn longest(&self) -> usize {
        self.sequences.iter().map(|s| s.tokens.len()).max().unwrap_or(0)
    }

    /// Every sequence has a prompt and room for one more token. Gives the longest's tokens.
    fn ready(&self) -> Result<usize> {
        if let Some(i) = self.sequences.iter().position(|s| s.next.is_none()) {
            return Err(Error::option("sequences", format!("{i} has no prompt: `feed` every sequence before a step")));
        }
        let longest = self.longest();
        self.engine.check_room(self.context, longest + 1)?;
        Ok(longest)
    }

    /// Compute a prompt's tokens, and find the likeliest after them.
    fn prompt(&mut self, sequence: usize, first: usize, tokens: &[TokenId]) -> Result<TokenId> {
        let (device, model, s) = (self.engine.device(), self.engine.model(), &self.state);
        let mut position = first as u32;
        for piece in tokens.chunks(self.chunk) {
            let row = |(&token, position)| Row { token, sequence: sequence as u32, position, pad: 0 };
            let rows: Vec<Row> = piece.iter().zip(position..).map(row).collect();
            write_rows(device, s, &rows)?;
            device.run(&model.body(rows.len() as u32, Role::Prompt, false, s))?;
            position += rows.len() as u32;
            if position as usize == first + tokens.len() {
                write_picks(device, s, &[rows.len() as u32 - 1])?;
            }
        }
        device.run(&model.head(1, s))?;
        Ok(drawn(run_drawing(device, &model.draw(1, s), s.drawn)?)?[0].id)
    }

    /// The next step's choices; `longest`: the most tokens that any sequence holds.
    fn step_from(&mut self, longest: usize) -> Result<Vec<TokenId>> {
        if self.under_way.is_empty() {
            self.place_next()?;
        }
        let (device, drawn_at) = (self.engine.device().clone(), self.state.drawn);
        let wanted = 1 + device.ahead();
        while self.under_way.len() < wanted && longest + self.under_way.len() < self.context {
            let program = self.program(longest + self.under_way.len() + 1);
            let later = run_drawing(&device, program, drawn_at)?;
            self.under_way.push_back(later);
        }
        let later = self.under_way.pop_front().expect("there was room for one");
        Ok(drawn(later)?.iter().map(|choice| choice.id).collect())
    }

    /// The rows of the next step: each sequence's last token, behind what the cache holds.
    fn place_next(&self) -> Result<()> {
        self.place(|s| (s.next.expect("every sequence has a prompt"), s.tokens.len()))
    }

    /// Put the rows of a step in their places: a token and its position for each sequence.
    fn place(&self, of: impl Fn(&Sequence) -> (TokenId, usize)) -> Result<()> {
        let row = |(i, s): (usize, &Sequence)| {
            let (token, position) = of(s);
            Row { token, sequence: i as u32, position: position as u32, pad: 0 }
        };
        let rows: Vec<Row> = self.sequences.iter().enumerate().map(row).collect();
        write_rows(self.engine.device(), &self.state, &rows)
    }

    /// The program of a step whose rows see `reach` positions at most.
    fn program(&mut self, reach: usize) -> &Program {
        let (model, state, rows) = (self.engine.model(), &self.state, self.sequences.len() as u32);
        self.decode.get(rows, reach as u32, |reach| model.decode(rows, reach, false, state))
    }
}
