//! Several conversations in one step: each sequence has its own tokens and its own pages of the cache, and a step gives every
//! one of them its next token. What a sequence gets does not depend on the others.

use crate::decode::choice;
use crate::device::Later;
use crate::engine::{Engine, write_picks, write_rows};
use crate::error::{Error, Result};
use crate::model::State;
use crate::ops::{Drawn, Row};
use crate::program::{Program, Role, Slice};
use crate::tokenizer::TokenId;
use std::collections::{HashMap, VecDeque};

/// N sequences that are stepped together. The likeliest token is found on the device and fed to the next step there; the
/// host submits ahead and reads behind.
#[derive(Debug)]
pub struct Batch {
    engine: Engine,
    state: State,
    /// What each sequence holds in the cache, and the token drawn after it.
    sequences: Vec<(Vec<TokenId>, Option<TokenId>)>,
    programs: HashMap<u32, Program>,
    under_way: VecDeque<Box<dyn Later>>,
    /// Steps that were submitted since the rows were last written.
    ahead: usize,
}

impl Engine {
    /// Room for this many sequences in one step.
    pub fn batch(&self, sequences: usize) -> Result<Batch> {
        let most = self.device().limits().max_binding_bytes / (self.config().vocab_size as u64 * 4);
        if sequences == 0 || sequences as u64 > most.min(1024) {
            let reason = format!("{sequences} sequences: 1 to {} fit a step here", most.min(1024));
            return Err(Error::option("batch", reason));
        }
        let state = self.new_state(sequences as u32)?;
        let sequences = vec![(Vec::new(), None); sequences];
        let (programs, under_way) = (HashMap::new(), VecDeque::new());
        Ok(Batch { engine: self.clone(), state, sequences, programs, under_way, ahead: 0 })
    }
}

impl Batch {
    /// Compute a prompt at the end of a sequence, and draw the token after it, which is given.
    pub fn feed(&mut self, sequence: usize, tokens: &[TokenId]) -> Result<TokenId> {
        // Steps ahead are forgotten: their positions are written again.
        self.under_way.clear();
        self.ahead = 0;
        let (config, context) = (self.engine.config(), self.engine.context());
        let Some((held, _)) = self.sequences.get(sequence) else {
            return Err(Error::option("sequence", format!("{sequence}: there are {}", self.sequences.len())));
        };
        if tokens.is_empty() {
            return Err(Error::option("prompt", "is empty: give at least one token"));
        }
        if let Some(id) = tokens.iter().find(|id| **id as usize >= config.vocab_size) {
            return Err(Error::option("tokens", format!("{id} is not a token: the model has {}", config.vocab_size)));
        }
        let (first, limit) = (held.len(), config.max_position_embeddings);
        if first + tokens.len() > context {
            return Err(Error::ContextFull { context, tokens: first + tokens.len(), limit });
        }
        let (device, s, model) = (self.engine.device(), &self.state, self.engine.model());
        let mut position = first;
        for piece in tokens.chunks(self.engine.chunk()) {
            let row = |(i, &token): (usize, &TokenId)| Row {
                token,
                sequence: sequence as u32,
                position: (position + i) as u32,
                pad: 0,
            };
            let rows: Vec<Row> = piece.iter().enumerate().map(row).collect();
            write_rows(device, s, &rows)?;
            device.run(&model.body(piece.len() as u32, Role::Prompt, false, s))?;
            position += piece.len();
            if position == first + tokens.len() {
                write_picks(device, s, &[piece.len() as u32 - 1])?;
                device.run(&model.head(1, s))?;
                device.run(&model.draw(1, s))?;
            }
        }
        let drawn = self.drawn(device.read_later(self.slice(1))?)?[0];
        let (held, next) = &mut self.sequences[sequence];
        held.extend_from_slice(tokens);
        *next = Some(drawn);
        Ok(drawn)
    }

    /// Compute the token that each sequence drew last, and draw the one after it. Every sequence needs a prompt first.
    pub fn step(&mut self) -> Result<Vec<TokenId>> {
        let context = self.engine.context();
        let longest = self.sequences.iter().map(|(held, _)| held.len()).max().unwrap_or(0);
        if longest + 1 > context {
            let limit = self.engine.config().max_position_embeddings;
            return Err(Error::ContextFull { context, tokens: longest + 1, limit });
        }
        let device = self.engine.device().clone();
        if self.ahead == 0 {
            let row = |(sequence, (held, next)): (usize, &(Vec<TokenId>, Option<TokenId>))| {
                let none = || Error::option("batch", format!("sequence {sequence} has no prompt: feed it first"));
                let token = next.ok_or_else(none)?;
                Ok(Row { token, sequence: sequence as u32, position: held.len() as u32, pad: 0 })
            };
            let rows = self.sequences.iter().enumerate().map(row).collect::<Result<Vec<_>>>()?;
            write_rows(&device, &self.state, &rows)?;
        }
        while self.under_way.len() <= device.ahead() && longest + self.under_way.len() < context {
            let reach = (longest + self.under_way.len() + 1) as u32;
            device.run(self.program(reach))?;
            self.under_way.push_back(device.read_later(self.slice(self.sequences.len()))?);
            self.ahead += 1;
        }
        let drawn = self.under_way.pop_front().expect("one was submitted");
        let drawn = self.drawn(drawn)?;
        for ((held, next), drawn) in self.sequences.iter_mut().zip(&drawn) {
            held.extend(next.replace(*drawn));
        }
        Ok(drawn)
    }

    /// The logits of the last step that was submitted, `[N, V]`: after a [`Self::step`] on a device that does not run ahead,
    /// those of the tokens that it gave.
    pub fn logits(&self) -> Result<Vec<f32>> {
        let mut logits = vec![0.0; self.sequences.len() * self.engine.config().vocab_size];
        let from = self.state.logits.head(logits.len() as u64 * 4);
        self.engine.device().read(from, bytemuck::cast_slice_mut(&mut logits))?;
        Ok(logits)
    }

    /// The tokens that a sequence holds, without the one that it drew last.
    pub fn tokens(&self, sequence: usize) -> &[TokenId] {
        &self.sequences[sequence].0
    }

    /// Forget everything.
    pub fn clear(&mut self) {
        self.under_way.clear();
        self.ahead = 0;
        self.sequences.iter_mut().for_each(|sequence| *sequence = (Vec::new(), None));
    }

    /// The program of a step in which no row sees more than `reach` positions.
    pub(crate) fn program(&mut self, reach: u32) -> &Program {
        let reach = reach.max(128).next_power_of_two();
        let (model, rows, state) = (self.engine.model(), self.sequences.len() as u32, &self.state);
        self.programs.entry(reach).or_insert_with(|| model.decode(rows, reach, false, state).seal())
    }

    fn slice(&self, rows: usize) -> Slice {
        self.state.drawn.head((rows * size_of::<Drawn>()) as u64)
    }

    fn drawn(&self, later: Box<dyn Later>) -> Result<Vec<TokenId>> {
        let bytes = later.get()?;
        let drawn = bytes.chunks_exact(size_of::<Drawn>()).map(bytemuck::pod_read_unaligned::<Drawn>);
        drawn.map(|drawn| choice(&drawn).map(|choice| choice.id)).collect()
    }
}
