//! Drawing on the device: the token that a step draws becomes the row of the next one there, the host submits ahead and
//! reads behind. And steps over tokens that were proposed, which a conversation holds as they turn out to be right.

use crate::device::{Device, Later};
use crate::engine::{Session, write_rows};
use crate::error::Result;
use crate::ops::{Drawn, Draws, Row};
use crate::parallel::{in_parallel, threads};
use crate::program::{Program, Slice};
use crate::sampler::{Choice, Rule, Sampling, at_fault, sample};
use crate::tokenizer::TokenId;
use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// Programs of decode steps, by rows, reach, and how they draw: each is recorded once, but of those that have not been used for
/// long again.
#[derive(Debug, Default)]
pub(crate) struct DecodePrograms {
    recorded: HashMap<(u32, u32, Draws), (u64, Program)>,
    clock: u64,
}

impl DecodePrograms {
    /// Most programs that are kept: of a large model some 50 MB with what the device keeps for them.
    const MOST: usize = 128;

    /// The launches of all programs in a context of so many positions, to be made ready at once.
    pub(crate) fn of_all_reaches(context: u32, record: impl Fn(u32) -> Program) -> Program {
        let (first, most) = (Self::reach(1), Self::reach(context));
        let mut all = record(first);
        for reach in std::iter::successors(Some(first * 2), |reach| Some(reach * 2)).take_while(|reach| *reach <= most)
        {
            all.launches.extend(record(reach).launches);
        }
        all
    }

    /// One program for all reaches of as many segments, so that few are recorded.
    fn reach(reach: u32) -> u32 {
        reach.max(128).next_power_of_two()
    }

    /// The program over `rows` rows that see `reach` positions at most. `record` is told how many it should be good for.
    pub(crate) fn get(&mut self, rows: u32, reach: u32, draws: Draws, record: impl FnOnce(u32) -> Program) -> &Program {
        let reach = Self::reach(reach);
        let key = (rows, reach, draws);
        self.clock += 1;
        if !self.recorded.contains_key(&key) && self.recorded.len() == Self::MOST {
            let oldest = self.recorded.iter().min_by_key(|(_, (used, _))| *used).map(|(key, _)| *key);
            oldest.and_then(|key| self.recorded.remove(&key));
        }
        let (used, program) = self.recorded.entry(key).or_insert_with(|| (0, record(reach).seal()));
        *used = self.clock;
        program
    }
}

/// Run a program that draws a token for each of its rows into `drawn`, and ask for them without waiting.
pub(crate) fn run_drawing(device: &Arc<dyn Device>, program: &Program, drawn: Slice) -> Result<Box<dyn Later>> {
    device.run(program)?;
    device.read_later(drawn.head(u64::from(program.tokens()) * size_of::<Drawn>() as u64))
}

/// Wait for the tokens that [`run_drawing`] asked for, a row's after the other.
pub(crate) fn drawn(later: Box<dyn Later>) -> Result<Vec<Drawn>> {
    let bytes = later.get()?;
    Ok(bytes.chunks_exact(size_of::<Drawn>()).map(bytemuck::pod_read_unaligned).collect())
}

/// Tokens that are being drawn.
#[derive(Debug)]
pub(crate) struct Ahead {
    /// The token drawn last, which the conversation does not hold yet.
    last: Option<TokenId>,
    /// Drawn, and not yet looked at.
    under_way: VecDeque<Box<dyn Later>>,
    /// Where the next step writes.
    position: usize,
}

impl Session {
    /// Tell the device how tokens are drawn from now on.
    fn draw_by(&mut self, sampling: &Sampling) -> Result<()> {
        let rule = Rule::new(sampling);
        if rule != self.rule {
            self.engine.device().write(self.state.rules(), bytemuck::bytes_of(&rule))?;
            self.rule = rule;
        }
        Ok(())
    }

    /// Begin to draw after the tokens that were fed last, whose logits were computed (`Want::Logits`).
    pub(crate) fn begin_drawing(&mut self, sampling: &Sampling) -> Result<()> {
        self.draw_by(sampling)?;
        let (position, s) = (self.tokens.len(), &self.state);
        let device = self.engine.device().clone();
        // `draw` puts the token here and moves on by one position.
        write_rows(&device, s, &[Row { token: 0, sequence: 0, position: position as u32 - 1, pad: 0 }])?;
        let program = self.engine.model().draw(1, Draws::of([&self.rule]), s);
        let under_way = VecDeque::from([run_drawing(&device, &program, s.drawn)?]);
        self.ahead = Some(Ahead { last: None, under_way, position });
        Ok(())
    }

    /// Begin to draw after `last`, which was drawn, and which the conversation does not hold yet.
    pub(crate) fn draw_after(&mut self, last: TokenId, sampling: &Sampling) -> Result<()> {
        self.draw_by(sampling)?;
        let position = self.tokens.len();
        let row = Row { token: last, sequence: 0, position: position as u32, pad: 0 };
        write_rows(self.engine.device(), &self.state, &[row])?;
        self.ahead = Some(Ahead { last: Some(last), under_way: VecDeque::new(), position });
        Ok(())
    }

    /// The next token, while up to `more` tokens after it are computed on the device.
    pub(crate) fn draw(&mut self, more: usize) -> Result<Choice> {
        let device = self.engine.device().clone();
        let context = self.engine.context();
        let mut ahead = self.ahead.take().expect("begin_drawing comes first");
        let wanted = 1 + more.min(device.ahead());
        while ahead.under_way.len() < wanted && (ahead.under_way.is_empty() || ahead.position < context) {
            self.engine.check_room(context, ahead.position + 1)?;
            ahead.position += 1;
            self.written = self.written.max(ahead.position);
            let drawn = self.state.drawn;
            let program = self.decode_program(1, ahead.position as u32, Draws::of([&self.rule]));
            ahead.under_way.push_back(run_drawing(&device, program, drawn)?);
        }
        let choice = choice(&drawn(ahead.under_way.pop_front().expect("one was asked for"))?[0])?;
        // The step that gave this token held the one before it.
        self.tokens.extend(ahead.last.replace(choice.id));
        self.ahead = Some(ahead);
        Ok(choice)
    }
}

/// What a step over proposed tokens gave for each of its rows.
#[derive(Debug)]
pub(crate) enum Verified {
    /// `[T, V]`.
    Logits(Vec<f32>),
    /// Tokens that the device drew.
    Drawn(Vec<Drawn>),
}

impl Verified {
    /// The token after a row, whose place in the conversation is behind `history`.
    pub(crate) fn choose(&self, row: usize, vocab: usize, sampling: &Sampling, history: &[TokenId]) -> Result<Choice> {
        match self {
            Self::Logits(logits) => {
                let logits = &logits[row * vocab..(row + 1) * vocab];
                sample(sampling, logits, history, history.len() as u64)
            }
            Self::Drawn(drawn) => choice(&drawn[row]),
        }
    }

    /// Draw from the first rows at once, on the host, as far as that pays. `history` ends before the tokens that were proposed.
    pub(crate) fn sample_rows(&self, sampling: &Sampling, history: &[TokenId], proposed: &[TokenId]) -> Chosen {
        let Self::Logits(logits) = self else { return Chosen::new() };
        let rows = bytemuck::cast_slice(logits).chunks_exact(size_of_val(&logits[..]) / (proposed.len() + 1));
        let candidate = |(row, logits)| Candidate { row, logits, sampling, history, proposed: &proposed[..row] };
        sample_rows(rows.enumerate().map(candidate).collect())
    }
}

impl Session {
    /// One decode step over at most `max_picks` tokens: the one drawn last and proposals. The conversation holds none of
    /// them until [`Self::hold`] says so, one by one; those that it never holds leave no trace: their places are written
    /// again before they are read. Tokens are drawn on the device where that is possible, else logits are read.
    pub(crate) fn verify(&mut self, tokens: &[TokenId], sampling: &Sampling) -> Result<Verified> {
        self.ahead = None;
        self.check(tokens)?;
        let verified = self.run_verify(tokens, sampling);
        if verified.is_err() {
            self.cut(self.tokens.len());
        }
        verified
    }

    fn run_verify(&mut self, tokens: &[TokenId], sampling: &Sampling) -> Result<Verified> {
        let mut draws = Draws::Likeliest;
        if sampling.on_device() {
            self.draw_by(sampling)?;
            draws = Draws::of([&self.rule]);
        }
        self.run_decode(tokens, draws, None)?;
        let (device, s) = (self.engine.device(), &self.state);
        if sampling.on_device() {
            let mut drawn = vec![Drawn::default(); tokens.len()];
            device.read(s.drawn.head(size_of_val(&drawn[..]) as u64), bytemuck::cast_slice_mut(&mut drawn))?;
            return Ok(Verified::Drawn(drawn));
        }
        let mut logits = vec![0.0f32; tokens.len() * self.engine.config().vocab_size];
        device.read(s.logits.head(size_of_val(&logits[..]) as u64), bytemuck::cast_slice_mut(&mut logits))?;
        Ok(Verified::Logits(logits))
    }

    /// The conversation holds the next token of the last step that was verified.
    pub(crate) fn hold(&mut self, token: TokenId) {
        self.tokens.push(token);
    }

    /// Logits of a row of the last step, `[V]`.
    pub(crate) fn logits(&self, row: usize) -> Result<Vec<f32>> {
        let mut logits = vec![0.0f32; self.engine.config().vocab_size];
        let bytes = size_of_val(&logits[..]) as u64;
        let from = Slice { offset: row as u64 * bytes, bytes, ..self.state.logits };
        self.engine.device().read(from, bytemuck::cast_slice_mut(&mut logits))?;
        Ok(logits)
    }
}

/// A row of a step that a token may be drawn from on the host.
pub(crate) struct Candidate<'a> {
    /// Its place in the step.
    pub row: usize,
    /// Its logits, `[V]`, as bytes.
    pub logits: &'a [u8],
    /// How its token is drawn.
    pub sampling: &'a Sampling,
    /// What the conversation was before the step.
    pub history: &'a [TokenId],
    /// What was proposed to come between that and the token. The row counts if all of it is right.
    pub proposed: &'a [TokenId],
}

impl Candidate<'_> {
    fn sample(&self) -> Result<Choice> {
        let history = match self.proposed {
            [] => Cow::Borrowed(self.history),
            proposed => Cow::Owned([self.history, proposed].concat()),
        };
        sample(self.sampling, &floats(self.logits), &history, history.len() as u64)
    }
}

/// What is drawn from rows, by their places in the step.
pub(crate) type Chosen = HashMap<usize, Result<Choice>>;

/// Draw from several rows at once: from those that count for certain, and, of those that count if proposals are right, from as
/// many as take no longer, since threads would be idle.
pub(crate) fn sample_rows(mut rows: Vec<Candidate>) -> Chosen {
    let Some(vocab) = rows.first().map(|row| row.logits.len() / 4) else { return Chosen::new() };
    let certain = rows.iter().filter(|row| row.proposed.is_empty()).count();
    rows.sort_by_key(|row| row.proposed.len());
    rows.truncate(certain.next_multiple_of(threads(rows.len(), vocab)));
    let draw = |row: &Candidate| (row.row, row.sample());
    let chosen = in_parallel(rows.len(), vocab, |run| rows[run].iter().map(draw).collect::<Vec<_>>());
    chosen.into_iter().flatten().collect()
}

/// Logits that were read as bytes.
pub(crate) fn floats(bytes: &[u8]) -> Cow<'_, [f32]> {
    match bytemuck::try_cast_slice(bytes) {
        Ok(floats) => Cow::Borrowed(floats),
        Err(_) => bytes.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect(), // not aligned
    }
}

/// The token of a row, or why there is none.
pub(crate) fn choice(drawn: &Drawn) -> Result<Choice> {
    if drawn.bad != 0 {
        return Err(at_fault("contain NaN or infinity"));
    }
    if drawn.sum.is_nan() || drawn.sum <= 0.0 {
        return Err(at_fault("leave no token to choose"));
    }
    Ok(Choice { id: drawn.id, logprob: drawn.logit - drawn.sum.ln(), top: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_drawn_at_once_are_those_drawn_one_by_one() {
        const V: usize = 40_000;
        let n = 9;
        let mut logits: Vec<f32> = (0..n * V).map(|i| (i * 7919 % 10_007) as f32 * 1e-3).collect();
        logits[4 * V + 3] = f32::NAN;
        let sampling = Sampling { repetition_penalty: 1.3, top_logprobs: 2, ..Sampling::default() };
        let (history, proposed) = (vec![5, 9, 700], vec![8, 1, 2, 3, 4, 5, 6, 7]);
        let text = |row: usize| [&history[..], &proposed[..row]].concat();
        let want = |row: usize| sample(&sampling, &logits[row * V..(row + 1) * V], &text(row), 3 + row as u64);
        let show = |result: Result<Choice>| result.map_err(|e| e.to_string());

        let verified = Verified::Logits(logits.clone());
        let mut chosen = verified.sample_rows(&sampling, &history, &proposed);
        for row in 0..n {
            // What is left out is drawn when it is asked for; what is certain is never left out.
            assert!(row > 0 || chosen.contains_key(&0));
            if let Some(got) = chosen.remove(&row) {
                assert_eq!(show(got), show(want(row)), "{row}");
            }
            assert_eq!(show(verified.choose(row, V, &sampling, &text(row))), show(want(row)), "{row}");
        }
        assert!(chosen.is_empty());

        let bytes: &[u8] = bytemuck::cast_slice(&logits);
        let candidate = |row: usize| {
            let logits = &bytes[row * V * 4..(row + 1) * V * 4];
            Candidate { row, logits, sampling: &sampling, history: &history, proposed: &[] }
        };
        let chosen = sample_rows((0..n).rev().map(candidate).collect());
        assert_eq!(chosen.len(), n, "all are certain");
        for (row, got) in chosen {
            let want = sample(&sampling, &logits[row * V..(row + 1) * V], &history, 3);
            assert_eq!(show(got), show(want), "{row}");
        }
        assert!(sample_rows(Vec::new()).is_empty());
        assert!(Verified::Drawn(Vec::new()).sample_rows(&sampling, &history, &[]).is_empty());
    }

    #[test]
    fn floats_may_lie_anywhere() {
        let values = [1.5f32, -2.0, f32::MAX];
        let bytes: &[u8] = bytemuck::cast_slice(&values);
        let shifted = [&[0], bytes].concat();
        assert_eq!(*floats(bytes), values);
        assert_eq!(*floats(&shifted[1..]), values);
    }
}
