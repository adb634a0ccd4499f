//! How many launches go into one submission: by what launches have taken so far, so that none keeps the GPU busy for long
//! (a desktop's watchdog resets a GPU that does not answer for two seconds, and its screen stands still for as long as a
//! submission runs). It changes no bit.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What a submission should take at most, with room for launches that take longer than those before them: 100 ms.
const WANTED: Duration = Duration::from_millis(30);
/// Launches of a first submission, of which nothing is known.
const FIRST: usize = 8;
/// Most launches of a submission.
const MOST: usize = 1024;

/// What launches of steps with as many rows have taken.
#[derive(Clone, Debug, Default)]
pub(super) struct Pace(Arc<Mutex<Seen>>);

#[derive(Debug, Default)]
struct Seen {
    /// Seconds a launch, by the rows of the step: the slowest submission lately.
    seconds: HashMap<u32, f64>,
    /// When the last submission was done.
    done: Option<Instant>,
}

impl Pace {
    /// Launches of the next submission of a step over so many rows.
    pub(super) fn launches(&self, rows: u32) -> usize {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = seen.seconds.get(&rows).map_or(FIRST, |each| (WANTED.as_secs_f64() / each) as usize);
        count.clamp(1, MOST)
    }

    /// What to call when a submission of `launches` launches, begun now, is done.
    pub(super) fn watch(&self, rows: u32, launches: usize) -> impl FnOnce() + Send + 'static {
        let (pace, begun) = (self.clone(), Instant::now());
        move || pace.done(rows, launches, begun, Instant::now())
    }

    fn done(&self, rows: u32, launches: usize, begun: Instant, now: Instant) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // It began when it was submitted, or when the one before it was done.
        let start = seen.done.map_or(begun, |done| done.max(begun));
        seen.done = Some(now);
        let each = now.saturating_duration_since(start).as_secs_f64().max(1e-7) / launches.max(1) as f64;
        // A slow one counts at once, a fast one little by little.
        let before = seen.seconds.entry(rows).or_insert(each);
        *before = if each > *before { each } else { 0.9 * *before + 0.1 * each };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn submissions_grow_while_they_are_short_and_shrink_at_once() {
        let (pace, start) = (Pace::default(), Instant::now());
        let at = |ms: u64| start + Duration::from_millis(ms);
        assert_eq!(pace.launches(1), FIRST);
        pace.done(1, 8, at(0), at(8)); // a millisecond each
        assert_eq!(pace.launches(1), 30);
        assert_eq!(pace.launches(512), FIRST, "steps of other sizes are another matter");
        pace.done(1, 30, at(5), at(38)); // began behind the other: still a millisecond each
        assert_eq!(pace.launches(1), 30);
        pace.done(1, 30, at(40), at(640));
        assert_eq!(pace.launches(1), 1);
        for i in 0..200 {
            pace.done(1, 30, at(1000 + 10 * i), at(1001 + 10 * i));
        }
        assert!(pace.launches(1) > 500, "{}", pace.launches(1));
    }
}
