//! A smaller model that drafts for a larger one.

use super::Drafter;
use crate::engine::{Engine, Session, Want};
use crate::error::{Error, Result};
use crate::ops::Activations;
use crate::sampler::{Sampling, sample};
use crate::tokenizer::TokenId;

/// Drafts by a model of its own: its likeliest tokens, unless told to draw. Its conversation follows what was really drawn.
#[derive(Debug)]
pub struct DraftModel {
    session: Session,
    sampling: Sampling,
}

impl DraftModel {
    /// A conversation of `draft` that drafts for sessions of `target`, on the same device or another. A draft without a
    /// tokenizer is taken to mean the target's, if it has as many tokens.
    ///
    /// # Errors
    /// The two do not have the same tokens.
    pub fn new(draft: &Engine, target: &Engine) -> Result<Self> {
        let refuse = |why: String| Err(Error::option("draft", format!("{} {why}", draft.name())));
        let difference = match (draft.tokenizer(), target.tokenizer()) {
            (Ok(ours), Ok(theirs)) => ours.difference(theirs),
            (Err(_), theirs) => {
                // It takes and gives ids only, which are the target's or mean nothing.
                let [ours, wanted] = [draft, target].map(|engine| engine.config().vocab_size);
                let unnamed = if theirs.is_ok() { "has no tokenizer.json, and " } else { "has " };
                (ours != wanted).then(|| format!("{unnamed}{ours} tokens instead of {wanted}"))
            }
            (_, Err(_)) => Some("has a tokenizer.json, and the model has none to compare".to_owned()),
        };
        if let Some(difference) = difference {
            let target = target.name();
            return refuse(format!(
                "{difference}: a draft needs the tokens of the model that it drafts for ({target}); choose another, or \
                 \"ngram\""
            ));
        }
        if draft.activations() == Activations::Nvfp4Dynamic {
            return refuse("cannot draft with activations \"nvfp4-dynamic\": use \"nvfp4-token\"".to_owned());
        }
        let mut session = draft.session()?;
        session.prepare_drafts()?; // it computes at once what was kept of its last
        Ok(Self { session, sampling: Sampling::greedy() })
    }

    /// Draw proposals as the reply's own tokens are drawn: by its options and the random number of each place, so that a model
    /// that drafts for itself is right at any temperature. With a repetition penalty it reads the logits of every token that it
    /// proposes.
    pub fn with_sampling(self, sampling: Sampling) -> Self {
        // Nobody sees lists of its tokens.
        Self { sampling: Sampling { top_logprobs: 0, ..sampling }, ..self }
    }
}

impl Drafter for DraftModel {
    fn propose(&mut self, history: &[TokenId], n_prompt: usize, most: usize) -> Result<Vec<TokenId>> {
        let session = &mut self.session;
        let room = (session.engine().context() + 1).saturating_sub(history.len());
        let most = most.min(room);
        // Vocabularies may be padded to different sizes.
        if most == 0 || history.is_empty() || session.engine().check_ids(history).is_err() {
            return Ok(Vec::new());
        }
        let lacking = session.reuse(history)?;
        // The prompt as a prompt and the rest as drawn tokens, so that a model that drafts for itself has its own bits.
        let held = history.len() - lacking.len();
        let (prompt, drawn) = lacking.split_at(n_prompt.saturating_sub(held).min(lacking.len() - 1));
        if !prompt.is_empty() {
            session.feed(prompt, Want::Nothing)?;
            session.set_mark()?;
        }
        let last = drawn.len().saturating_sub(session.max_picks());
        session.feed_drawn(&drawn[..last], Want::Nothing)?;
        let verified = session.verify(&drawn[last..], &self.sampling)?;
        drawn[last..].iter().for_each(|&id| session.hold(id));
        let (row, vocab) = (drawn.len() - last - 1, session.engine().config().vocab_size);
        let mut proposal = vec![verified.choose(row, vocab, &self.sampling, history)?.id];
        if !self.sampling.on_device() {
            let mut text = history.to_vec();
            while proposal.len() < most {
                let token = proposal[proposal.len() - 1];
                text.push(token);
                let logits = session.feed_drawn(&[token], Want::Last)?;
                proposal.push(sample(&self.sampling, &logits, &text, text.len() as u64)?.id);
            }
            return Ok(proposal);
        }
        if most > 1 {
            session.draw_after(proposal[0], &self.sampling)?;
        }
        while proposal.len() < most {
            proposal.push(session.draw(most - proposal.len() - 1)?.id);
        }
        Ok(proposal)
    }
}
