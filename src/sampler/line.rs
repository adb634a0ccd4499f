//! The token drawn from a row of logits. Tokens stand in line by how far they lie below the likeliest one, of equals the lowest id
//! first. No sorting: a filter ends where a running sum passes a number, and that place is found digit by digit, from sums over
//! the tokens that share the digits before.

use super::rule::share;
use super::weight::{FAR, nearer, scaled, weight};
use super::{Rule, philox};

/// How many steps below the likeliest a token lies, and its id.
type Token = (u32, u32);

/// The first eight of a place's 24 bits: an eighth of an octave.
pub(crate) fn bin(below: u32) -> u32 {
    below >> 16
}

/// The random bits of a position.
pub(crate) fn random(rule: &Rule, position: u64) -> u64 {
    philox::bits(rule.seed, rule.stream, position)
}

/// A row of logits, none of them NaN or plus infinity.
struct Tokens<'l> {
    logits: &'l [f32],
    largest: f32,
    sharp: f32,
}

/// Tokens whose steps are found at once, by vector instructions.
const BLOCK: usize = 64;

impl Tokens<'_> {
    /// See the steps of each block of tokens, [`FAR`] of those more than `far` below, and the first one's id.
    #[inline]
    fn each(&self, far: u32, mut see: impl FnMut(&[u32], u32)) {
        let (largest, sharp, end) = (self.largest, self.sharp, (far + 1) as f32);
        let (blocks, rest) = self.logits.as_chunks::<BLOCK>();
        let mut steps = [0; BLOCK];
        for (block, id) in blocks.iter().zip((0..).step_by(BLOCK)) {
            for (steps, &logit) in steps.iter_mut().zip(block) {
                *steps = nearer(largest, logit, sharp, end);
            }
            see(&steps, id);
        }
        for (steps, &logit) in steps.iter_mut().zip(rest) {
            *steps = nearer(largest, logit, sharp, end);
        }
        see(&steps[..rest.len()], (blocks.len() * BLOCK) as u32);
    }

    /// By bin, the sum of what tokens up to `far` steps below count.
    #[inline]
    fn sums(&self, far: u32, counts: impl Fn(u32) -> u64) -> [u64; 256] {
        let mut sums = [0; 512]; // beside 256 bins one of tokens too far away
        self.each(far, |steps, _| {
            for &below in steps {
                sums[bin(below) as usize % 512] += counts(below);
            }
        });
        *sums.first_chunk().expect("there are more")
    }

    /// The tokens of these bins, by id.
    fn of(&self, bins: std::ops::RangeInclusive<u32>) -> Vec<Token> {
        let (first, last) = (bins.start() << 16, bins.end() << 16 | 0xffff);
        let is_of = |below: u32| below.wrapping_sub(first) <= last - first;
        let mut tokens = Vec::new();
        self.each(FAR - 1, |steps, id| {
            if steps.iter().fold(false, |any, &below| any | is_of(below)) {
                tokens.extend(steps.iter().copied().zip(id..).filter(|(below, _)| is_of(*below)));
            }
        });
        tokens
    }
}

fn heavy(below: u32) -> u64 {
    u64::from(weight(below))
}

/// Where the running sum passes `target`, and how much of the target is left there.
fn above(sums: &[u64; 256], mut target: u64) -> Option<(u32, u64)> {
    for (at, sum) in (0..).zip(sums) {
        if *sum > target {
            return Some((at, target));
        }
        target -= sum;
    }
    None
}

/// Keep the front of the line up to the token where the running sum passes `target`; all, if it never does. The tokens come and
/// stay in the order of their ids.
fn cut(tokens: &mut Vec<Token>, mut target: u64, counts: impl Fn(u32) -> u64) {
    let mut found = tokens.clone();
    for shift in [16, 8, 0] {
        let digit = |below: u32| (below >> shift) & 255;
        let mut sums = [0; 256];
        found.iter().for_each(|(below, _)| sums[digit(*below) as usize] += counts(*below));
        let Some((at, left)) = above(&sums, target) else { return };
        target = left;
        found.retain(|(below, _)| digit(*below) == at);
    }
    if let Some(last) = by_id(&found, target, counts) {
        tokens.retain(|token| *token <= last);
    }
}

/// The first token, by id, where the running sum passes `target`.
fn by_id(tokens: &[Token], mut target: u64, counts: impl Fn(u32) -> u64) -> Option<Token> {
    tokens.iter().copied().find(|(below, _)| {
        let passes = counts(*below) > target;
        target = target.saturating_sub(counts(*below));
        passes
    })
}

/// The token at `position`, by the rule, from a row whose largest logit is finite.
pub(super) fn draw(rule: &Rule, logits: &[f32], largest: f32, position: u64) -> u32 {
    let likeliest = || {
        // A block at a time, for vector instructions.
        let has = |block: &[f32]| block.iter().fold(false, |has, logit| has | (*logit == largest));
        let first = logits.chunks(BLOCK).position(has).expect("it is one of them") * BLOCK;
        let within = logits[first..].iter().position(|logit| *logit == largest);
        (first + within.expect("it is in this block")) as u32
    };
    if rule.sharp == 0.0 {
        return likeliest();
    }
    let row = Tokens { logits, largest, sharp: rule.sharp };
    let kept = (rule.rounds() > 0).then(|| filtered(rule, &row));
    let sums = match &kept {
        Some(tokens) => {
            let mut sums = [0; 256];
            tokens.iter().for_each(|(below, _)| sums[bin(*below) as usize] += heavy(*below));
            sums
        }
        None => row.sums(rule.far, heavy),
    };
    let target = scaled(random(rule, position), sums.iter().sum());
    let (at, left) = above(&sums, target).expect("the target is below the mass");
    let tokens = kept.unwrap_or_else(|| row.of(at..=at));
    let counts = |below| if bin(below) == at && below <= rule.far { heavy(below) } else { 0 };
    by_id(&tokens, left, counts).map_or_else(likeliest, |(_, id)| id)
}

/// The tokens that the filters leave, by id.
fn filtered(rule: &Rule, row: &Tokens) -> Vec<Token> {
    // Most tokens lie in bins behind the end of the first filter.
    let front = |sums, target| row.of(0..=above(sums, target).map_or(255, |(bin, _)| bin));
    let mut tokens;
    if rule.top_k > 0 {
        let target = u64::from(rule.top_k) - 1;
        tokens = front(&row.sums(FAR - 1, |_| 1), target);
        cut(&mut tokens, target, |_| 1);
        if rule.top_p != Rule::ALL {
            let mass = tokens.iter().map(|(below, _)| heavy(*below)).sum();
            cut(&mut tokens, share(rule.top_p, mass), heavy);
        }
    } else {
        let sums = row.sums(FAR - 1, heavy);
        let target = share(rule.top_p, sums.iter().sum());
        tokens = front(&sums, target);
        cut(&mut tokens, target, heavy);
    }
    tokens.retain(|(below, _)| *below <= rule.far);
    tokens
}
