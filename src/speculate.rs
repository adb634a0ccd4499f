//! Speculative decoding: cheap proposals for the next tokens, which the model verifies in one step.
//!
//! The rule: a token is what the model's own logits, the sampling options and its position make it, with drafts and
//! without. A proposal is kept if it equals the token that was drawn in its place, so that the row computed from it is the
//! row that plain decoding would compute; the first that differs is taken back with all behind it. So drafts change the
//! time and nothing else, for any drafter, greedy or at any temperature.
//!
//! Nothing here knows sessions but [`DraftModel`]: whoever steps a model asks [`Speculation::propose`], computes the rows,
//! and draws from those that [`Speculation::next_row`] gives.

mod lookup;
mod model;
mod pace;

pub use lookup::PromptLookup;
pub use model::DraftModel;

use crate::error::{Error, Result};
use crate::tokenizer::TokenId;
use pace::Pace;
use std::fmt::Debug;
use std::time::{Duration, Instant};

/// Most tokens drafted for a step: with the token drawn last, the rows whose logits a step gives at once.
pub const MOST: usize = 15;

/// Proposes tokens. Whatever it proposes, the reply is the same; good proposals make it faster.
pub trait Drafter: Send + Debug {
    /// Up to `most` tokens that may come after `history`, which is the prompt (the first `n_prompt` tokens) and what was
    /// drawn since. The history may go back behind an earlier one, or be of another conversation. None is a fine answer;
    /// what is more than `most`, or begins with what is no token of the model, is left out.
    ///
    /// # Errors
    /// An error ends the reply with it.
    fn propose(&mut self, history: &[TokenId], n_prompt: usize, most: usize) -> Result<Vec<TokenId>>;
}

/// What drafts did in a reply. Proposals that the reply ended before are not counted anywhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drafts {
    /// Steps with a proposal of one token or more that gave a token.
    pub steps: usize,
    /// By place in the proposal, the first at 0: tokens that were kept or taken back.
    pub drafted: [usize; MOST],
    /// Of these, tokens that were kept: each saved a step.
    pub accepted: [usize; MOST],
}

impl Drafts {
    /// Tokens that were kept or taken back, in all places.
    pub fn drafted(&self) -> usize {
        self.drafted.iter().sum()
    }

    /// Tokens that were kept, in all places.
    pub fn accepted(&self) -> usize {
        self.accepted.iter().sum()
    }

    /// Tokens that a step with a proposal gave, in the mean: those kept, and one of its own. 0 without such a step.
    pub fn tokens_per_step(&self) -> f64 {
        share(self.steps + self.accepted(), self.steps)
    }

    /// How much of what was drafted was kept, 0 to 1.
    pub fn rate(&self) -> f64 {
        share(self.accepted(), self.drafted())
    }

    /// The same by place, as far as there were proposals. What stands behind a wrong token was taken back with it.
    pub fn rates(&self) -> Vec<f64> {
        let places = self.drafted.iter().zip(&self.accepted).take_while(|(drafted, _)| **drafted > 0);
        places.map(|(drafted, accepted)| share(*accepted, *drafted)).collect()
    }
}

fn share(part: usize, of: usize) -> f64 {
    if of == 0 { 0.0 } else { part as f64 / of as f64 }
}

/// The rows of a step: the token drawn last, and what was proposed to come after it.
#[derive(Debug)]
pub struct Rows {
    tokens: Vec<TokenId>,
    taken: usize,
}

impl Rows {
    /// The rows over the token drawn last and a proposal.
    pub fn new(last: TokenId, proposal: Vec<TokenId>) -> Self {
        Self { tokens: [vec![last], proposal].concat(), taken: 0 }
    }

    /// The tokens to compute, one a row.
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// The row whose logits the next token is drawn from, if the token drawn last is the one that it was computed over.
    pub fn next(&mut self, last: TokenId) -> Option<usize> {
        (self.tokens.get(self.taken) == Some(&last)).then(|| self.take())
    }

    fn take(&mut self) -> usize {
        self.taken += 1;
        self.taken - 1
    }
}

/// A drafter, how many tokens it is asked for, and what became of them.
#[derive(Debug)]
pub struct Speculation {
    drafter: Box<dyn Drafter>,
    /// `None`: by what it gains.
    count: Option<usize>,
    pace: Pace,
    drafts: Drafts,
    keeps_wrong: bool,
}

impl Speculation {
    /// Ask this drafter for as many tokens as make most tokens a second: by what steps and drafts have cost so far and how
    /// many were kept, none while drafting loses.
    pub fn new(drafter: impl Drafter + 'static) -> Self {
        Self {
            drafter: Box::new(drafter),
            count: None,
            pace: Pace::default(),
            drafts: Drafts::default(),
            keeps_wrong: false,
        }
    }

    /// Ask for `count` tokens in every step, whether it pays or not: 1 to [`MOST`].
    pub fn with_count(self, count: usize) -> Result<Self> {
        if !(1..=MOST).contains(&count) {
            return Err(Error::option("draft-tokens", format!("{count} is out of range: 1 to {MOST}")));
        }
        Ok(Self { count: Some(count), ..self })
    }

    /// For tests: keep proposals that are wrong, which every comparison has to notice.
    #[doc(hidden)]
    pub fn keeping_wrong(self) -> Self {
        Self { keeps_wrong: true, ..self }
    }

    /// Count drafts from 0 again. What is known of costs stays.
    pub fn begin(&mut self) {
        self.drafts = Drafts::default();
    }

    /// What became of the drafts since [`Self::begin`].
    pub fn drafts(&self) -> Drafts {
        self.drafts
    }

    /// Tokens to draw without drafts before [`Self::propose`] is asked again: drafting loses, or a token's cost without it
    /// is not known yet.
    pub fn rest(&self) -> usize {
        if self.count.is_some() { 0 } else { self.pace.rest() }
    }

    /// Up to `most` tokens to verify in the next step; ids from `vocab` on are no tokens. `history`, `n_prompt`: as for
    /// [`Drafter::propose`].
    pub fn propose(&mut self, history: &[TokenId], n_prompt: usize, most: usize, vocab: usize) -> Result<Vec<TokenId>> {
        let most = most.min(MOST);
        let count = match self.count {
            Some(count) => count.min(most),
            None if self.pace.rest() > 0 => 0,
            None => self.pace.count(most),
        };
        if count == 0 {
            return Ok(Vec::new());
        }
        let started = Instant::now();
        let mut proposal = self.drafter.propose(history, n_prompt, count)?;
        let legal = proposal.iter().take(count).take_while(|id| (**id as usize) < vocab).count();
        proposal.truncate(legal);
        self.pace.drafted(legal, started.elapsed().as_secs_f64());
        Ok(proposal)
    }

    /// A token was drawn without asking for a proposal.
    pub fn rested(&mut self, took: Duration) {
        self.pace.rested(took.as_secs_f64());
    }

    /// A step over the rows of a proposal was made.
    pub fn stepped(&mut self, rows: &Rows, took: Duration) {
        self.pace.stepped(rows.tokens.len(), took.as_secs_f64());
    }

    /// As [`Rows::next`], and count what became of the proposal.
    pub fn next_row(&mut self, rows: &mut Rows, last: TokenId) -> Option<usize> {
        let (at, end) = (rows.taken, rows.tokens.len());
        if at == end {
            return None;
        }
        let right = rows.tokens[at] == last;
        if at == 0 {
            self.drafts.steps += usize::from(right && end > 1);
            return rows.next(last);
        }
        self.pace.judged(at - 1, right);
        if right || self.keeps_wrong {
            self.drafts.drafted[at - 1] += 1;
            self.drafts.accepted[at - 1] += 1;
            return Some(rows.take());
        }
        // What stands behind a wrong token is wrong with it.
        self.drafts.drafted[at - 1..end - 1].iter_mut().for_each(|n| *n += 1);
        rows.taken = end;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Says(Vec<TokenId>);

    impl Drafter for Says {
        fn propose(&mut self, _: &[TokenId], _: usize, _: usize) -> Result<Vec<TokenId>> {
            Ok(self.0.clone())
        }
    }

    #[test]
    fn proposals_are_cut_where_they_are_too_long_or_no_tokens() {
        let propose = |said: &[TokenId], most| {
            let mut speculation = Speculation::new(Says(said.to_vec())).with_count(MOST).unwrap();
            speculation.propose(&[1], 1, most, 100).unwrap()
        };
        assert_eq!(propose(&[5, 6, 7], 2), [5, 6]);
        assert_eq!(propose(&[5, 99, 100, 7], 15), [5, 99]);
        assert_eq!(propose(&[TokenId::MAX, 7], 15), [0; 0]);
        assert_eq!(propose(&vec![3; 100], 400).len(), MOST);
        assert_eq!(propose(&[5], 0), [0; 0]);
        for count in [0, MOST + 1] {
            let error = Speculation::new(PromptLookup).with_count(count).unwrap_err().to_string();
            assert!(error.contains("draft-tokens") && error.contains("1 to 15"), "{error}");
        }
    }

    #[test]
    fn rows_are_taken_up_to_the_first_that_is_wrong() {
        let mut speculation = Speculation::new(PromptLookup);
        let mut rows = Rows::new(7, vec![1, 2, 3, 4]);
        let drawn = [7, 1, 2, 9];
        let taken: Vec<Option<usize>> = drawn.iter().map(|id| speculation.next_row(&mut rows, *id)).collect();
        assert_eq!(taken, [Some(0), Some(1), Some(2), None]);
        assert_eq!(speculation.next_row(&mut rows, 9), None);
        let drafts = speculation.drafts();
        assert_eq!((drafts.steps, drafts.drafted(), drafts.accepted()), (1, 4, 2));
        assert_eq!(drafts.drafted[..5], [1, 1, 1, 1, 0]);
        assert_eq!(drafts.accepted[..5], [1, 1, 0, 0, 0]);
        assert_eq!((drafts.tokens_per_step(), drafts.rate()), (3.0, 0.5));
        // All right, and then one that the reply ends before.
        let mut rows = Rows::new(9, vec![1, 2]);
        assert_eq!([9, 1].map(|id| speculation.next_row(&mut rows, id)), [Some(0), Some(1)]);
        let drafts = speculation.drafts();
        assert_eq!((drafts.steps, drafts.drafted(), drafts.accepted()), (2, 5, 3));
        assert_eq!(drafts.rates(), [1.0, 1.0, 0.0, 0.0]);
        // A step over one row is none that drafts made.
        let mut rows = Rows::new(9, vec![]);
        assert_eq!([speculation.next_row(&mut rows, 9), speculation.next_row(&mut rows, 9)], [Some(0), None]);
        assert_eq!(speculation.drafts(), drafts);
        speculation.begin();
        assert_eq!(speculation.drafts(), Drafts::default());
    }
}
