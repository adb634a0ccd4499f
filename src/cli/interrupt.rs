//! Ctrl-C: the first one during an answer stops the answer, any other ends the program.
//!
//! At the prompt of a chat the line editor reads Ctrl-C as a key, so it does not come here.

use fourfold::Cancel;
use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// An answer that stops sooner needs no word about it.
const SOON: Duration = Duration::from_millis(300);

/// Whether Ctrl-C was pressed, for who writes files: the first takes back what was written; the second ends at once, and leaves
/// what no command takes for whole.
pub(super) fn asked() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let asked = stop.clone();
    ctrlc::set_handler(move || {
        if asked.swap(true, Ordering::Relaxed) {
            std::process::exit(super::INTERRUPTED.into());
        }
    })?;
    Ok(stop)
}

/// What Ctrl-C means at the moment.
#[derive(Default)]
pub(super) struct Interrupt {
    /// The answer that it would stop.
    answer: Mutex<Option<Cancel>>,
    asked: AtomicBool,
}

impl Interrupt {
    /// Listen from now on.
    pub(super) fn install() -> anyhow::Result<Arc<Self>> {
        let interrupt = Arc::new(Self::default());
        let heard = interrupt.clone();
        ctrlc::set_handler(move || heard.hear())?;
        Ok(interrupt)
    }

    fn hear(&self) {
        if !self.stop_answer() {
            if io::stderr().is_terminal() {
                let _ = io::stderr().write_all(b"\x1b[0m\n");
            }
            std::process::exit(super::INTERRUPTED.into());
        }
        // It stops at the next token or chunk of the prompt, which on a slow device may be a while.
        std::thread::sleep(SOON);
        if self.asked.load(Ordering::Relaxed) && self.answer().is_some() {
            super::terminal::note("\nstopping after this step; Ctrl-C again ends the program");
        }
    }

    /// Whether there was an answer that had not been asked to stop.
    fn stop_answer(&self) -> bool {
        let answer = self.answer();
        answer.as_ref().is_some_and(|cancel| {
            let first = !self.asked.swap(true, Ordering::Relaxed);
            cancel.cancel();
            first
        })
    }

    fn answer(&self) -> MutexGuard<'_, Option<Cancel>> {
        self.answer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ctrl-C stops this answer until [`Self::end`].
    pub(super) fn begin(&self, answer: Cancel) {
        self.asked.store(false, Ordering::Relaxed);
        *self.answer() = Some(answer);
    }

    /// The answer is over. Whether Ctrl-C was pressed during it.
    pub(super) fn end(&self) -> bool {
        *self.answer() = None;
        self.asked.load(Ordering::Relaxed)
    }
}
