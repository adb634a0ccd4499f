//! Ctrl-C: the first one during an answer stops the answer, any other ends the program.
//!
//! At the prompt of a chat the line editor reads Ctrl-C as a key, so it does not come here.

use fourfold::Cancel;
use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

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
        let answer = self.answer.lock().unwrap_or_else(PoisonError::into_inner);
        match &*answer {
            Some(cancel) if !self.asked.swap(true, Ordering::Relaxed) => cancel.cancel(),
            _ => {
                if io::stderr().is_terminal() {
                    let _ = io::stderr().write_all(b"\x1b[0m\n");
                }
                std::process::exit(super::INTERRUPTED.into());
            }
        }
    }

    /// Ctrl-C stops this answer until [`Self::end`].
    pub(super) fn begin(&self, answer: Cancel) {
        self.asked.store(false, Ordering::Relaxed);
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
    }

    /// The answer is over. Whether Ctrl-C was pressed during it.
    pub(super) fn end(&self) -> bool {
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.asked.load(Ordering::Relaxed)
    }
}
