//! What a step gave: each session gets what it has drawn.

use super::{Feed, Running, Scheduler, Submitted};
use crate::decode::{Candidate, Chosen, choice, drawn, floats, sample_rows};
use crate::device::Later;
use crate::error::Result;
use crate::kv::Held;
use crate::trace::probe::hash_bytes;
use std::time::Instant;

impl Scheduler {
    /// Wait for a step, begun at `started`, and give its sessions what they have drawn.
    pub(super) fn deliver(&mut self, step: Submitted, started: Instant) -> Result<()> {
        let logits = step.logits.map(Later::get).transpose()?;
        let drawn = match step.drawn {
            Some(later) => drawn(later)?,
            None => {
                // A step that nobody reads must still fail here, not in a later one.
                self.engine.device().wait()?;
                Vec::new()
            }
        };
        let (took, row_bytes) = (started.elapsed(), self.engine.config().vocab_size * 4);
        let mut chosen = match &logits {
            Some(bytes) => sample_rows(self.candidates(&step.feeds, &step.places, bytes)),
            None => Chosen::new(),
        };
        for (feed, place) in step.feeds.iter().zip(step.places) {
            let Some(at) = self.index(feed.id) else { continue }; // it was cancelled
            let Running { slot, task } = &mut self.running[at];
            if !feed.draws {
                self.kv.commit(*slot, &task.tokens, feed.first + feed.count);
                continue;
            }
            let asked = task.rows.is_some();
            let mut rows = task.take_rows();
            let (first, proposed) = (place + 1 - rows.tokens().len(), rows.tokens().len() - 1);
            match &mut task.speculation {
                Some(speculation) if asked => speculation.stepped(&rows, took),
                // The first token, and those that were given, say nothing of what one costs.
                Some(speculation) if feed.first >= task.given => speculation.rested(took),
                _ => {}
            }
            let mut error = None;
            while let Some(row) = task.next_row(&mut rows) {
                let row = first + row;
                let logits = logits.as_ref().filter(|_| feed.logits);
                let logits = logits.map(|bytes| &bytes[row * row_bytes..(row + 1) * row_bytes]);
                let hash = logits.filter(|_| self.hashing).map(hash_bytes);
                let chosen = match logits.filter(|_| !task.output.on_device()) {
                    Some(bytes) => chosen.remove(&row).unwrap_or_else(|| task.output.sample(&floats(bytes))),
                    None => choice(&drawn[row]),
                };
                let chosen = match chosen {
                    Ok(chosen) => chosen,
                    Err(e) => {
                        error = Some(e);
                        break;
                    }
                };
                task.tokens.push(Held { token: chosen.id, drawn: true });
                let token = task.output.say(&self.engine, chosen);
                task.outbox.tell(token, hash, task.output.stats);
                if task.output.finish.is_some() {
                    break;
                }
            }
            match &error {
                None => self.kv.commit(*slot, &task.tokens, task.tokens.len() - 1),
                // Logits that are no numbers: an earlier part of this prompt may be what is wrong.
                Some(_) => self.kv.distrust(*slot),
            }
            if error.is_some() || task.output.finish.is_some() {
                self.dismiss(at, error);
            } else if proposed > 0 {
                self.kv.shrink(*slot);
            }
        }
        Ok(())
    }

    /// The rows of a step that tokens may be drawn from on the host. `logits`: those of all its rows, as bytes.
    fn candidates<'a>(&'a self, feeds: &[Feed], places: &[usize], logits: &'a [u8]) -> Vec<Candidate<'a>> {
        let row_bytes = self.engine.config().vocab_size * 4;
        let mut candidates = Vec::new();
        for (feed, place) in feeds.iter().zip(places).filter(|(feed, _)| feed.draws && feed.logits) {
            let Some(task) = self.index(feed.id).map(|at| &self.running[at].task) else { continue };
            if task.output.on_device() {
                continue;
            }
            let proposal = task.rows.as_ref().map_or(&[][..], |rows| &rows.tokens()[1..]);
            let candidate = |n: usize| {
                let row = place - proposal.len() + n;
                let logits = &logits[row * row_bytes..(row + 1) * row_bytes];
                let (sampling, history) = (task.output.sampling(), task.output.history());
                Candidate { row, logits, sampling, history, proposed: &proposal[..n] }
            };
            candidates.extend((0..=proposal.len()).map(candidate));
        }
        candidates
    }
}
