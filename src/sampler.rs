//! Logits to token id: penalty, filters, one random number; and stop strings in the text that comes out.
//!
//! A choice is a pure function of the options, the logits, the history and the position: no state, no call order.

use std::collections::HashSet;

use crate::error::{Error, Result};

mod exp;
mod line;
mod philox;
mod ranked;
mod rule;
mod stop;
mod weight;

pub use rule::Rule;
pub use stop::StopStrings;
pub use weight::POWERS;

pub(crate) use line::{bin, random};
pub(crate) use rule::share;
pub(crate) use weight::{FAR, below, scaled, weight};

use exp::sum;
use ranked::{Ranked, largest_of};

/// How tokens are chosen. The steps are applied in the order of the fields, which is the order of transformers:
/// repetition penalty, temperature, top-k, top-p, min-p; each sees what the one before it left, renormalised.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Logits of tokens in the history are divided by it where positive and multiplied where negative, once a token.
    /// Above 0; 1 is off.
    pub repetition_penalty: f32,
    /// Logits are divided by it. 0 is greedy: the largest logit after the penalty, of equal ones the lowest id.
    pub temperature: f32,
    /// Only this many of the likeliest tokens stay; 0 is off. Of equal ones the lowest ids stay (transformers keeps all).
    pub top_k: usize,
    /// The likeliest tokens stay until their probabilities reach this sum, at least one. 0 to 1; 1 is off.
    pub top_p: f32,
    /// Tokens stay that are at least this fraction as likely as the likeliest. 0 to 1; 0 is off.
    pub min_p: f32,
    /// Seed of the random numbers: equal seeds, streams and positions draw equal numbers.
    pub seed: u64,
    /// Tells conversations with the same seed apart.
    pub stream: u64,
    /// How many of the likeliest tokens [`Choice::top`] lists.
    pub top_logprobs: usize,
}

impl Default for Sampling {
    /// The model's own distribution: temperature 1, everything else off, seed 0.
    fn default() -> Self {
        Self {
            repetition_penalty: 1.0,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            stream: 0,
            top_logprobs: 0,
        }
    }
}

impl Sampling {
    /// Always the likeliest token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Whether tokens are drawn on the device: whatever needs neither the history nor a list of tokens.
    pub(crate) fn on_device(&self) -> bool {
        self.repetition_penalty == 1.0 && self.top_logprobs == 0
    }

    /// Checks every range.
    ///
    /// # Errors
    /// [`Error::Option`] names the first option out of its range; NaN is out of every range.
    pub fn validate(&self) -> Result<()> {
        let check = |option, value: f32, ok: bool, range: &str| match ok {
            true => Ok(()),
            false => Err(Error::option(option, format!("{value} is out of range: {range}"))),
        };
        let (penalty, temperature) = (self.repetition_penalty, self.temperature);
        check("repetition_penalty", penalty, penalty.is_finite() && penalty > 0.0, "above 0; 1 turns it off")?;
        check("temperature", temperature, temperature.is_finite() && temperature >= 0.0, "0 (greedy) or more")?;
        check("top_p", self.top_p, (0.0..=1.0).contains(&self.top_p), "0 to 1; 1 turns it off")?;
        check("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "0 to 1; 0 turns it off")
    }
}

/// A chosen token. Log-probabilities are natural logarithms of the model's own distribution, the softmax of the logits
/// as they came: before penalty, temperature and filters, so that they mean the same under all options.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The token.
    pub id: u32,
    /// Its log-probability.
    pub logprob: f32,
    /// The likeliest tokens with their log-probabilities, in falling order, of equal ones the lowest id first;
    /// [`Sampling::top_logprobs`] of them, or the whole vocabulary if that is smaller.
    pub top: Vec<(u32, f32)>,
}

/// Chooses the token at `position` of a conversation.
///
/// `logits` is `[V]`; minus infinity forbids a token. `history` holds the ids that the repetition penalty counts
/// (prompt and answer; ids of V and above are ignored). `position` makes each draw of a conversation a new one.
///
/// A token has a weight in whole numbers: 2^31 for the likeliest, half as much for each octave that it lies below it, counted in steps
/// of 2^-19 octaves; more than 31 octaves below it has none, and is never drawn. Tokens stand in line by their steps, of equals the lowest id
/// first: top-k keeps the front of that line, and top-p what comes before the place where the weights reach its share of all.
/// The random number picks along what is left, by eighths of an octave and within one by id (inverse CDF). Sums of whole numbers
/// follow no order, so the same logits give the same token on every machine, and on a device ([`Rule`]).
///
/// # Errors
/// What [`Sampling::validate`] refuses; [`Error::Device`] if the logits contain NaN or plus infinity, or no token that
/// can be chosen: then a kernel or the checkpoint is at fault, and any choice would hide it.
pub fn sample(sampling: &Sampling, logits: &[f32], history: &[u32], position: u64) -> Result<Choice> {
    sampling.validate()?;
    let largest = largest_of(logits);
    // NaN passes through to the sum.
    let mass = sum(logits, largest);
    if !largest.is_finite() || mass.is_nan() {
        return Err(refusal(logits));
    }

    let rule = Rule::new(sampling);
    let id = match sampling.repetition_penalty {
        1.0 => line::draw(&rule, logits, largest, position),
        penalty => {
            let penalised = penalise(logits, history, penalty);
            line::draw(&rule, &penalised, largest_of(&penalised), position)
        }
    };

    let logprob = |logit: f32| (f64::from(logit) - f64::from(largest) - mass.ln()) as f32;
    let n_top = sampling.top_logprobs.min(logits.len());
    let mut top = Vec::new();
    if n_top > 0 {
        let mut ranked = Ranked::new(logits);
        top.extend((0..n_top).map(|rank| ranked.get(rank)).map(|(logit, id)| (id, logprob(logit))));
    }
    Ok(Choice { id, logprob: logprob(logits[id as usize]), top })
}

/// What is wrong with logits that nothing can be drawn from.
fn refusal(logits: &[f32]) -> Error {
    let what = match logits.iter().position(|l| l.is_nan() || *l == f32::INFINITY) {
        Some(id) => {
            let what = if logits[id].is_nan() { "NaN" } else { "infinity" };
            format!("contain {what} (first at token {id} of {})", logits.len())
        }
        None => format!("leave no token to choose ({} tokens)", logits.len()),
    };
    at_fault(&what)
}

/// Logits that are no numbers, and what finds out why.
pub(crate) fn at_fault(what: &str) -> Error {
    let look = "`fourfold inspect` reads through the one, `fourfold oracle` asks the other";
    Error::Device(format!("the logits {what}: the checkpoint or a kernel is at fault; {look}"))
}

/// Once for each distinct id, however often it occurs. In f32, as transformers does; clamped where that overflows.
fn penalise(logits: &[f32], history: &[u32], penalty: f32) -> Vec<f32> {
    let mut out = logits.to_vec();
    for id in history.iter().map(|&id| id as usize).filter(|&id| id < logits.len()).collect::<HashSet<_>>() {
        let logit = logits[id];
        let penalised = if logit < 0.0 { logit * penalty } else { logit / penalty };
        // A forbidden token stays forbidden, a possible one possible.
        out[id] = if logit.is_finite() { penalised.clamp(f32::MIN, f32::MAX) } else { logit };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cmp::Ordering;

    fn by_rank(a: &(f32, u32), b: &(f32, u32)) -> Ordering {
        b.0.partial_cmp(&a.0).expect("no NaN").then(a.1.cmp(&b.1))
    }

    /// The definition, step by step, over all tokens in order.
    fn plain(sampling: &Sampling, logits: &[f32], history: &[u32], position: u64) -> Choice {
        let sorted = |logits: &[f32]| {
            let mut tokens: Vec<(f32, u32)> = logits.iter().copied().zip(0..).collect();
            tokens.sort_by(by_rank);
            tokens
        };
        let line = sorted(&penalise(logits, history, sampling.repetition_penalty));
        let mut id = line[0].1;
        if sampling.temperature > 0.0 {
            let rule = Rule::new(sampling);
            let mut kept: Vec<(u32, u32)> = line.iter().map(|&(l, id)| (below(line[0].0, l, rule.sharp), id)).collect();
            kept.retain(|(below, _)| *below < FAR);
            kept.sort_unstable(); // logits that differ by less than a step are equals
            let mass = |kept: &[(u32, u32)]| kept.iter().map(|(below, _)| u128::from(weight(*below))).sum::<u128>();
            if sampling.top_k > 0 {
                kept.truncate(sampling.top_k);
            }
            if sampling.top_p < 1.0 {
                let share = (f64::from(sampling.top_p) * 2f64.powi(32)).floor() as u128;
                let most = ((share * mass(&kept)) >> 32).max(1);
                let n_kept = (1..=kept.len()).take_while(|n| mass(&kept[..n - 1]) < most).count();
                kept.truncate(n_kept);
            }
            let least = (f64::from(sampling.min_p) * 2f64.powi(31)).ceil();
            kept.retain(|(below, _)| f64::from(weight(*below)) >= least);
            kept.sort_by_key(|&(below, id)| (below >> 16, id));
            let halves = philox::halves;
            let bits = philox::bits(halves(sampling.seed), halves(sampling.stream), position);
            let target = (u128::from(bits) * mass(&kept)) >> 64;
            id = kept[(1..).find(|n| mass(&kept[..*n]) > target).unwrap() - 1].1;
        }
        let own = sorted(logits);
        let sum: f64 = logits.iter().map(|&l| (f64::from(l) - f64::from(own[0].0)).exp()).sum();
        let logprob = |l: f32| (f64::from(l) - f64::from(own[0].0) - sum.ln()) as f32;
        let top = own.iter().take(sampling.top_logprobs).map(|&(l, id)| (id, logprob(l))).collect();
        Choice { id, logprob: logprob(logits[id as usize]), top }
    }

    #[test]
    fn choices_are_those_of_the_definition() {
        let number = |i: u64| philox::uniform(11, 3, i);
        for case in 0..3000u64 {
            let at = |i: u64| number(case * 100 + i);
            let pick = |i: u64, options: &[f32]| options[(at(i) * options.len() as f64) as usize];
            let n = pick(0, &[1.0, 2.0, 63.0, 64.0, 65.0, 300.0, 1500.0, 5000.0]) as usize;
            let (spread, step) = (pick(1, &[1.0, 8.0, 30.0, 2000.0]), pick(2, &[0.0, 0.0, 0.5]));
            let logit = |i: u64| {
                let l = philox::uniform(case, 1, i) as f32 * spread - spread / 2.0;
                let l = if step > 0.0 { (l / step).round() * step } else { l };
                if i > 0 && philox::uniform(case, 2, i) < 0.1 { f32::NEG_INFINITY } else { l }
            };
            let logits: Vec<f32> = (0..n as u64).map(logit).collect();
            let history: Vec<u32> = (0..20).map(|i| (at(20 + i) * 400.0) as u32).collect();
            let sampling = Sampling {
                repetition_penalty: pick(3, &[1.0, 1.0, 1.1, 0.9]),
                temperature: pick(4, &[0.0, 1.0, 1.0, 0.8, 0.1, 3.0, 1e-4, 100.0]),
                top_k: pick(5, &[0.0, 0.0, 1.0, 40.0, 64.0, 100.0, 2000.0]) as usize,
                top_p: pick(6, &[1.0, 1.0, 0.95, 0.3, 0.0, 1e-6, 0.999_999]),
                min_p: pick(7, &[0.0, 0.0, 0.05, 0.5, 1.0]),
                seed: case,
                stream: case % 3,
                top_logprobs: pick(8, &[0.0, 1.0, 20.0, 6000.0]) as usize,
            };
            let (got, want) =
                (sample(&sampling, &logits, &history, case).unwrap(), plain(&sampling, &logits, &history, case));
            // f32 is no finer where log-probabilities are large.
            let near = |a: f32, b: f32| a == b || (a - b).abs() < 1e-6 * b.abs().max(1.0);
            assert_eq!(got.id, want.id, "{case}: {n} tokens, {sampling:?}");
            assert!(near(got.logprob, want.logprob), "{case}: {} and {}", got.logprob, want.logprob);
            assert_eq!(got.top.len(), want.top.len());
            assert!(got.top.iter().zip(&want.top).all(|(a, b)| a.0 == b.0 && near(a.1, b.1)), "{case}");
        }
    }

    /// Ids drawn at positions 0..n.
    fn ids(sampling: &Sampling, logits: &[f32], n: u64) -> Vec<u32> {
        (0..n).map(|p| sample(sampling, logits, &[], p).unwrap().id).collect()
    }

    /// The distinct ids among many draws.
    fn support(sampling: &Sampling, logits: &[f32]) -> Vec<u32> {
        let mut ids = ids(sampling, logits, 4000);
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    fn log(p: &[f32]) -> Vec<f32> {
        p.iter().map(|p| p.ln()).collect()
    }

    /// Uneven logits without a pattern.
    fn uneven(n: usize) -> Vec<f32> {
        (0..n).map(|i| philox::uniform(7, 0, i as u64) as f32 * 8.0 - 4.0).collect()
    }

    /// Chi-square of 20000 draws against probabilities.
    fn chi_square(sampling: &Sampling, logits: &[f32], want: &[f64]) -> f64 {
        const N: u64 = 20_000;
        let mut counts = vec![0.0; want.len()];
        for id in ids(sampling, logits, N) {
            counts[id as usize] += 1.0;
        }
        let term = |(c, p): (&f64, &f64)| if *p == 0.0 { c * 1e9 } else { (c - p * N as f64).powi(2) / (p * N as f64) };
        counts.iter().zip(want).map(term).sum()
    }

    #[test]
    fn greedy_takes_the_largest_and_the_lowest_id_of_equals() {
        let choice = |logits: &[f32]| sample(&Sampling::greedy(), logits, &[], 0).unwrap().id;
        assert_eq!(choice(&[0.0, 2.0, -1.0, 2.0]), 1);
        assert_eq!(choice(&[-0.0, 0.0]), 0);
        assert_eq!(choice(&[f32::NEG_INFINITY, f32::MIN]), 1);
        let mut large = uneven(1000);
        (large[900], large[123]) = (9.0, 9.0);
        assert_eq!(choice(&large), 123);
    }

    #[test]
    fn logprobs_are_the_models_own() {
        let logits = log(&[0.1, 0.2, 0.3, 0.4]).iter().map(|l| l + 5.0).collect::<Vec<_>>();
        let filtered = Sampling { top_k: 1, temperature: 0.3, top_logprobs: 2, ..Sampling::default() };
        let choice = sample(&filtered, &logits, &[], 0).unwrap();
        let near = |a: f32, b: f32| (a - b.ln()).abs() < 1e-6;
        assert_eq!(choice.id, 3);
        assert!(near(choice.logprob, 0.4), "{choice:?}");
        assert!(
            choice.top[0].0 == 3 && near(choice.top[0].1, 0.4) && choice.top[1].0 == 2 && near(choice.top[1].1, 0.3)
        );
        let all = Sampling { top_logprobs: 9, ..Sampling::greedy() };
        assert_eq!(
            sample(&all, &[1.0, 3.0, 3.0], &[], 0).unwrap().top.iter().map(|t| t.0).collect::<Vec<_>>(),
            [1, 2, 0]
        );
    }

    #[test]
    fn repetition_penalty_weakens_both_signs_once() {
        assert_eq!(penalise(&[4.0, -4.0, 1.0, 0.0], &[0, 1, 1, 0, 3, 99], 2.0), [2.0, -8.0, 1.0, 0.0]);
        assert_eq!(
            penalise(&[f32::NEG_INFINITY, f32::MIN, f32::MAX], &[0, 1, 2], 2.0)[..2],
            [f32::NEG_INFINITY, f32::MIN]
        );
        let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::greedy() };
        assert_eq!(sample(&sampling, &[4.0, 3.0], &[], 0).unwrap().id, 0);
        assert_eq!(sample(&sampling, &[4.0, 3.0], &[0], 0).unwrap().id, 1);
    }

    #[test]
    fn top_k_keeps_the_likeliest_and_the_lowest_ids_of_equals() {
        let logits = [1.0, 2.0, 1.5, 1.5, 1.5];
        assert_eq!(support(&Sampling { top_k: 3, ..Sampling::default() }, &logits), [1, 2, 3]);
        assert_eq!(support(&Sampling { top_k: 0, ..Sampling::default() }, &logits), [0, 1, 2, 3, 4]);
        assert_eq!(support(&Sampling { top_k: 50, ..Sampling::default() }, &logits), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn top_p_keeps_tokens_until_the_sum_is_reached() {
        let logits = log(&[0.1, 0.4, 0.3, 0.2]);
        let kept = |top_p: f32| support(&Sampling { top_p, ..Sampling::default() }, &logits);
        assert_eq!(kept(0.0), [1]);
        assert_eq!(kept(0.39), [1]);
        assert_eq!(kept(0.41), [1, 2]);
        assert_eq!(kept(0.71), [1, 2, 3]);
        assert_eq!(kept(0.95), [0, 1, 2, 3]);
        // The sum is that of what top-k left: 0.4 and 0.3 become 0.57 and 0.43.
        assert_eq!(support(&Sampling { top_k: 2, top_p: 0.5, ..Sampling::default() }, &logits), [1]);
        // Temperature comes first: at 0.25 the best token alone has 0.72.
        assert_eq!(support(&Sampling { temperature: 0.25, top_p: 0.7, ..Sampling::default() }, &logits), [1]);
    }

    #[test]
    fn min_p_compares_with_the_likeliest() {
        let logits = log(&[0.1, 0.4, 0.3, 0.2]);
        let kept = |min_p: f32| support(&Sampling { min_p, ..Sampling::default() }, &logits);
        assert_eq!(kept(0.2), [0, 1, 2, 3]);
        assert_eq!(kept(0.3), [1, 2, 3]);
        assert_eq!(kept(0.7), [1, 2]);
        assert_eq!(kept(1.0), [1]);
        assert_eq!(support(&Sampling { min_p: 1.0, ..Sampling::default() }, &[1.0, 1.0, 0.0]), [0, 1]);
    }

    #[test]
    fn draws_follow_the_distribution() {
        // Bounds: the 0.999 quantile of chi-square with 3, 1 and 299 degrees of freedom. Seeds are fixed.
        let logits = log(&[0.1, 0.4, 0.3, 0.2]);
        for seed in [0, 1, u64::MAX] {
            let plain = Sampling { seed, ..Sampling::default() };
            assert!(chi_square(&plain, &logits, &[0.1, 0.4, 0.3, 0.2].map(f64::from)) < 16.27);
            let sharp = Sampling { temperature: 0.5, ..plain.clone() };
            assert!(chi_square(&sharp, &logits, &[0.01, 0.16, 0.09, 0.04].map(|p| p / 0.3)) < 16.27);
            let filtered = Sampling { top_k: 3, top_p: 0.6, stream: 5, ..plain.clone() };
            assert!(chi_square(&filtered, &logits, &[0.0, 0.4 / 0.7, 0.3 / 0.7, 0.0]) < 10.83);
            // The comparison can fail.
            assert!(chi_square(&plain, &logits, &[0.12, 0.38, 0.3, 0.2]) > 16.27);

            let many = uneven(300);
            let sum: f64 = many.iter().map(|&l| f64::from(l).exp()).sum();
            let want: Vec<f64> = many.iter().map(|&l| f64::from(l).exp() / sum).collect();
            assert!(chi_square(&plain, &many, &want) < 381.0);
        }
    }

    #[test]
    fn a_draw_depends_on_its_place_alone() {
        let logits = uneven(100);
        let sampling = Sampling { seed: 9, top_p: 0.9, ..Sampling::default() };
        let forward = ids(&sampling, &logits, 200);
        let mut backward: Vec<u32> = (0..200).rev().map(|p| sample(&sampling, &logits, &[], p).unwrap().id).collect();
        backward.reverse();
        assert_eq!(forward, backward);
        assert_ne!(forward, ids(&Sampling { stream: 1, ..sampling.clone() }, &logits, 200));
        assert_ne!(forward, ids(&Sampling { seed: 10, ..sampling.clone() }, &logits, 200));
    }

    #[test]
    fn extreme_temperatures_stay_numbers() {
        let logits = uneven(100);
        let best = sample(&Sampling::greedy(), &logits, &[], 0).unwrap().id;
        assert_eq!(support(&Sampling { temperature: f32::from_bits(1), ..Sampling::default() }, &logits), [best]);
        assert_eq!(support(&Sampling { temperature: f32::MAX, ..Sampling::default() }, &logits).len(), 100);
        assert_eq!(support(&Sampling::default(), &[f32::MIN, f32::MAX]), [1]);
    }

    #[test]
    fn options_out_of_range_are_named() {
        let ok = Sampling::default();
        let bad = [
            ("temperature", Sampling { temperature: -0.1, ..ok.clone() }),
            ("temperature", Sampling { temperature: f32::NAN, ..ok.clone() }),
            ("temperature", Sampling { temperature: f32::INFINITY, ..ok.clone() }),
            ("top_p", Sampling { top_p: 1.1, ..ok.clone() }),
            ("top_p", Sampling { top_p: f32::NAN, ..ok.clone() }),
            ("min_p", Sampling { min_p: -0.5, ..ok.clone() }),
            ("min_p", Sampling { min_p: f32::NAN, ..ok.clone() }),
            ("repetition_penalty", Sampling { repetition_penalty: 0.0, ..ok.clone() }),
            ("repetition_penalty", Sampling { repetition_penalty: f32::NAN, ..ok.clone() }),
        ];
        for (name, sampling) in bad {
            for result in [sampling.validate(), sample(&sampling, &[1.0], &[], 0).map(|_| ())] {
                match result {
                    Err(Error::Option { option, .. }) => assert_eq!(option, name),
                    other => panic!("{name}: {other:?}"),
                }
            }
        }
        ok.validate().unwrap();
        Sampling::greedy().validate().unwrap();
    }

    #[test]
    fn broken_logits_are_an_error() {
        let bad: [(&[f32], &str); 4] = [
            (&[1.0, f32::NAN], "contain NaN"),
            (&[1.0, f32::INFINITY], "contain infinity"),
            (&[f32::NEG_INFINITY; 3], "leave no token"),
            (&[], "leave no token"),
        ];
        for (logits, text) in bad {
            for sampling in [Sampling::default(), Sampling::greedy()] {
                let error = sample(&sampling, logits, &[], 0).unwrap_err();
                assert!(matches!(&error, Error::Device(_)) && error.to_string().contains(text), "{error}");
            }
        }
    }
}
