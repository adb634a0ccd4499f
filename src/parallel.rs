//! Work on rows in several threads, with results in order.

use std::ops::Range;
use std::thread;

/// Fewer elements than this are not worth a thread.
const WORTH_A_THREAD: usize = 1 << 16;

/// How many threads `n` rows of `k` elements are worth, at least 1.
pub(crate) fn threads(n: usize, k: usize) -> usize {
    let cores = thread::available_parallelism().map_or(1, |n| n.get());
    cores.min((n * k).div_ceil(WORTH_A_THREAD)).min(n).max(1)
}

/// Calls `work` on runs of rows that together are `0..n`, each on a thread; the results in order.
pub(crate) fn in_parallel<T: Send>(n: usize, k: usize, work: impl Fn(Range<usize>) -> T + Sync) -> Vec<T> {
    let threads = threads(n, k);
    let each = n.div_ceil(threads).max(1);
    if threads == 1 {
        return vec![work(0..n)];
    }
    let work = &work;
    thread::scope(|scope| {
        let start = |from: usize| scope.spawn(move || work(from..(from + each).min(n)));
        let running: Vec<_> = (0..n).step_by(each).map(start).collect();
        let join = |thread: thread::ScopedJoinHandle<'_, T>| match thread.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        running.into_iter().map(join).collect()
    })
}
