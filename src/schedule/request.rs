//! A request as its owner holds it: tokens to pull, a handle that cancels.

use crate::engine::Cancel;
use crate::error::{Error, Result};
use crate::reply::{Finish, Output, Stats, Token};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A session of a [`crate::Scheduler`], as whoever asked for it holds it. It may go to another thread. Drop it to cancel.
#[derive(Debug)]
#[must_use = "a request that is dropped is cancelled"]
pub struct Request(pub(super) Arc<Outbox>);

/// What passes between a scheduler and the owner of a request.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    cancel: Cancel,
    told: Mutex<Told>,
}

#[derive(Debug, Default)]
struct Told {
    tokens: VecDeque<Token>,
    /// Of the logits that each token was drawn from.
    hashes: Vec<u64>,
    error: Option<Error>,
    finish: Option<Finish>,
    rest: String,
    stats: Stats,
    over: bool,
}

impl Request {
    /// The next token, if a step has drawn one that was not pulled yet. An error that ended the session comes once, after its
    /// tokens.
    pub fn pull(&self) -> Result<Option<Token>> {
        let mut told = self.0.told();
        let token = told.tokens.pop_front();
        match told.error.take_if(|_| token.is_none()) {
            Some(e) => Err(e),
            None => Ok(token),
        }
    }

    /// Whether it has ended and everything was pulled.
    pub fn is_over(&self) -> bool {
        let told = self.0.told();
        told.over && told.tokens.is_empty() && told.error.is_none()
    }

    /// Why it ended, once it has; `None` as well where an error ended it.
    pub fn finish(&self) -> Option<Finish> {
        self.0.told().finish
    }

    /// What it took so far. Time counts from when it was added.
    pub fn stats(&self) -> Stats {
        self.0.told().stats
    }

    /// Text that was held back because it might have become a stop string or a whole character, where there is no last token to
    /// give it out: after a cancel or an error.
    pub fn take_rest(&self) -> String {
        std::mem::take(&mut self.0.told().rest)
    }

    /// End it at the scheduler's next step.
    pub fn cancel(&self) {
        self.0.cancel.cancel();
    }

    /// A handle that ends it from elsewhere.
    pub fn cancel_handle(&self) -> Cancel {
        self.0.cancel.clone()
    }

    /// Hashes of the logits that its tokens were drawn from, where the scheduler was told to take them.
    #[doc(hidden)]
    pub fn logit_hashes(&self) -> Vec<u64> {
        self.0.told().hashes.clone()
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        self.cancel();
    }
}

impl Outbox {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn cancelled(&self) -> bool {
        self.cancel.asked()
    }

    /// A token was drawn, from logits with this hash if that was asked for.
    pub fn tell(&self, token: Token, hash: Option<u64>, stats: Stats) {
        let mut told = self.told();
        told.tokens.push_back(token);
        told.hashes.extend(hash);
        told.stats = stats;
    }

    /// The session has ended: as its output says, or by an error, or else it was cancelled.
    pub fn end(&self, output: &mut Output, error: Option<Error>) {
        let mut told = self.told();
        told.finish = output.finish.or(if error.is_none() { Some(Finish::Cancelled) } else { None });
        told.error = error;
        told.rest = output.take_rest();
        told.stats = output.stats;
        told.over = true;
    }
}
