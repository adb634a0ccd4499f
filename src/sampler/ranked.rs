//! Tokens by falling logit, sorted only as far as anyone has looked, since a vocabulary is large and the choice nearly always
//! lies near the front.

/// Logits that share a maximum.
const BLOCK: usize = 64;

/// Tokens by falling logit, of equal ones the lowest id first.
pub(super) struct Ranked<'l> {
    logits: &'l [f32],
    /// The largest logit of each block: the front of the line lies in the few blocks where it is large.
    maxima: Vec<f32>,
    /// The tokens whose logits are at least `least`, the first `n_sorted` in order.
    keys: Vec<u64>,
    least: f32,
    n_sorted: usize,
}

impl<'l> Ranked<'l> {
    /// Nothing is sorted yet. NaN and plus infinity have no place in the line.
    pub fn new(logits: &'l [f32]) -> Self {
        let maxima = logits.chunks(BLOCK).map(largest_of).collect();
        Self { logits, maxima, keys: Vec::new(), least: f32::INFINITY, n_sorted: 0 }
    }

    /// The logit and id at a rank.
    pub fn get(&mut self, rank: usize) -> (f32, u32) {
        if rank >= self.n_sorted {
            self.sort_at_least(rank + 1);
        }
        let id = self.keys[rank] as u32;
        (self.logits[id as usize], id)
    }

    fn sort_at_least(&mut self, n: usize) {
        let n = n.max(4 * self.n_sorted).max(BLOCK).min(self.logits.len());
        if n > self.keys.len() {
            self.gather(n);
        }
        let rest = &mut self.keys[self.n_sorted..];
        let n_new = n - self.n_sorted;
        if n_new < rest.len() {
            rest.select_nth_unstable(n_new);
        }
        rest[..n_new].sort_unstable();
        self.n_sorted = n;
    }

    /// Take in `n` tokens at least, which are more than there are.
    fn gather(&mut self, n: usize) {
        // As many blocks as tokens are asked for have a logit of `least` or more.
        let least = match n < self.maxima.len() {
            true => *self.maxima.clone().select_nth_unstable_by(n - 1, |a, b| b.total_cmp(a)).1,
            false => f32::NEG_INFINITY,
        };
        for (block, (logits, &largest)) in self.logits.chunks(BLOCK).zip(&self.maxima).enumerate() {
            if largest >= least {
                let lacking = |(_, logit): &(usize, f32)| (least..self.least).contains(logit);
                let tokens = logits.iter().copied().enumerate().filter(lacking);
                self.keys.extend(tokens.map(|(i, logit)| key(logit, (block * BLOCK + i) as u32)));
            }
        }
        self.least = least;
    }
}

/// Rises as the logit falls, and where logits are equal with the id, which is its low half.
fn key(logit: f32, id: u32) -> u64 {
    let bits = (logit + 0.0).to_bits(); // -0 is 0
    let falling = if bits >> 31 == 0 { !bits ^ 1 << 31 } else { bits };
    u64::from(falling) << 32 | u64::from(id)
}

/// The largest logit, NaN aside; minus infinity if there is none. In lanes, for vector instructions.
pub(super) fn largest_of(logits: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (rows, rest) = logits.as_chunks::<16>();
    for row in rows {
        for (lane, &logit) in lanes.iter_mut().zip(row) {
            *lane = larger(*lane, logit);
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEVER: f32 = f32::NEG_INFINITY;

    /// The definition.
    fn sorted(logits: &[f32]) -> Vec<(f32, u32)> {
        let mut tokens: Vec<(f32, u32)> = logits.iter().copied().zip(0..).collect();
        tokens.sort_by(|a, b| b.0.partial_cmp(&a.0).unwrap().then(a.1.cmp(&b.1)));
        tokens
    }

    fn check(logits: &[f32], what: &str) {
        let want = sorted(logits);
        let n = logits.len();
        assert_eq!(largest_of(logits), want[0].0, "{what}");
        // From the front, from the back, and at places in between, each time anew.
        let walk = |ranks: &mut dyn Iterator<Item = usize>| {
            let mut ranked = Ranked::new(logits);
            for rank in ranks {
                let (logit, id) = ranked.get(rank);
                assert_eq!((logit.to_bits(), id), (want[rank].0.to_bits(), want[rank].1), "{what}: {rank} of {n}");
            }
        };
        walk(&mut (0..n));
        walk(&mut (0..n).rev());
        for first in [1, 62, 63, 64, 65, 255, 256, 1000, 4095, 4096] {
            walk(&mut [first, 0, 2 * first, first + 1, n - 1].into_iter().filter(|&rank| rank < n));
        }
    }

    #[test]
    fn the_line_is_that_of_a_plain_sort() {
        for n in [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000, 4095, 4096, 4097, 4160, 4161, 20_000] {
            let mut state = n as u64;
            let mut random = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1 << 24) as f32
            };
            let uneven: Vec<f32> = (0..n).map(|_| random() * 60.0 - 40.0).collect();
            check(&uneven, "uneven");
            check(&uneven.iter().map(|l| l.round()).collect::<Vec<_>>(), "ties");
            check(&uneven.iter().map(|l| l.signum() * 0.0).collect::<Vec<_>>(), "zeros of both signs");
            check(&uneven.iter().map(|&l| if l < 19.0 { NEVER } else { l }).collect::<Vec<_>>(), "few possible");
            check(&vec![1.5; n], "all equal");
            check(&vec![NEVER; n], "none possible");
            check(&(0..n).map(|i| i as f32).collect::<Vec<_>>(), "rising");
            check(&(0..n).map(|i| -(i as f32)).collect::<Vec<_>>(), "falling");
            check(&(0..n).map(|i| (i % 64) as f32).collect::<Vec<_>>(), "equal blocks");
            check(&(0..n).map(|i| (i / 64 % 7) as f32).collect::<Vec<_>>(), "blocks of equals");
            check(
                &(0..n).map(|i| f32::from_bits(i as u32) * if i % 3 == 0 { -1.0 } else { 1.0 }).collect::<Vec<_>>(),
                "tiny",
            );
            check(&(0..n).map(|i| [f32::MIN, f32::MAX, NEVER, 0.0][i % 4]).collect::<Vec<_>>(), "extremes");
        }
    }
}
