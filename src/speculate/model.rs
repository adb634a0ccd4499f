//! A smaller model that drafts for a larger one.

use super::Drafter;
use crate::engine::{Engine, Session, Want};
use crate::error::{Error, Result};
use crate::ops::Activations;
use crate::sampler::Sampling;
use crate::tokenizer::TokenId;

/// Drafts by a model of its own, greedily. Its conversation follows what was really drawn.
#[derive(Debug)]
pub struct DraftModel {
    session: Session,
}

impl DraftModel {
    /// A conversation of `draft` that drafts for sessions of `target`, on the same device or another.
    ///
    /// # Errors
    /// The two do not have the same tokens.
    pub fn new(draft: &Engine, target: &Engine) -> Result<Self> {
        let refuse = |why: String| Err(Error::option("draft", format!("{} {why}", draft.name())));
        let difference = match (draft.tokenizer(), target.tokenizer()) {
            (Ok(ours), Ok(theirs)) => ours.difference(theirs),
            (Err(_), Err(_)) => {
                // Both take and give ids only.
                let [ours, theirs] = [draft, target].map(|engine| engine.config().vocab_size);
                (ours != theirs).then(|| format!("has {ours} tokens instead of {theirs}"))
            }
            (Err(_), _) => Some("has no tokenizer.json to compare".to_owned()),
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
        Ok(Self { session: draft.session()? })
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
        let verified = session.verify(&drawn[last..], true)?;
        drawn[last..].iter().for_each(|&id| session.hold(id));
        let vocab = session.engine().config().vocab_size;
        let mut proposal = vec![verified.choose(drawn.len() - last - 1, vocab, &Sampling::greedy(), history)?.id];
        if most > 1 {
            session.draw_after(proposal[0])?;
        }
        while proposal.len() < most {
            proposal.push(session.draw(most - proposal.len() - 1)?.id);
        }
        Ok(proposal)
    }
}
