//! How a sequence's tokens are drawn, as numbers that host and device share.

use super::weight::{FAR, weight};
use super::{Sampling, philox};

/// What [`Sampling`] says, all but the repetition penalty and lists of tokens. Zeros: always the likeliest token.
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Rule {
    /// Steps of 2^-19 octaves in a unit of a logit, by the temperature; 0: the likeliest token.
    pub sharp: f32,
    /// How many of the likeliest tokens stay; 0: all.
    pub top_k: u32,
    /// The likeliest stay until they have this many of 2^32 parts of the mass; [`Rule::ALL`]: all.
    pub top_p: u32,
    /// Most steps that a token lies below the likeliest: min-p.
    pub far: u32,
    /// Low and high half.
    pub seed: [u32; 2],
    /// Low and high half.
    pub stream: [u32; 2],
}

impl Rule {
    /// Top-p is off.
    pub const ALL: u32 = u32::MAX;

    /// The rule of options that were checked.
    pub fn new(sampling: &Sampling) -> Self {
        if sampling.temperature == 0.0 {
            return Self::default();
        }
        let sharp = f64::from(1 << 19) * std::f64::consts::LOG2_E / f64::from(sampling.temperature);
        // Exact: an f32 below 1 has no bit behind the 32nd but where it is below 2^-8, where a part more or less is nothing.
        let top_p = if sampling.top_p < 1.0 { (f64::from(sampling.top_p) * 2f64.powi(32)) as u32 } else { Self::ALL };
        Self {
            // Not so sharp that it matters whether a device has numbers below 2^-126.
            sharp: sharp.min(2f64.powi(100)) as f32,
            top_k: u32::try_from(sampling.top_k).unwrap_or(u32::MAX),
            top_p,
            far: far(sampling.min_p),
            seed: philox::halves(sampling.seed),
            stream: philox::halves(sampling.stream),
        }
    }

    /// Digits that have to be found before a token can be drawn: three for each of top-k and top-p.
    pub fn rounds(&self) -> u32 {
        match self.sharp {
            0.0 => 0,
            _ => 3 * (u32::from(self.top_k > 0) + u32::from(self.top_p != Self::ALL)),
        }
    }
}

/// Most steps below the likeliest where a weight is still `min_p` of its.
fn far(min_p: f32) -> u32 {
    let least = (f64::from(min_p) * 2f64.powi(31)).ceil() as u32;
    let (mut far, mut step) = (0, FAR / 2);
    while step > 0 {
        if weight(far + step) >= least {
            far += step;
        }
        step /= 2;
    }
    far
}

/// Of a mass, how much the tokens before one may have for top-p to keep it, and the token after them.
pub(crate) fn share(top_p: u32, mass: u64) -> u64 {
    let reached = (u128::from(mass) * u128::from(top_p)) >> 32;
    (reached as u64).saturating_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn min_p_ends_where_the_weight_does() {
        assert_eq!([far(0.0), far(1.0), far(0.5), far(0.25)], [FAR - 1, 0, 1 << 19, 2 << 19]);
        for min_p in [0.05f32, 0.3, 0.9999, 1e-6, f32::MIN_POSITIVE] {
            let (least, far) = (f64::from(min_p) * 2f64.powi(31), far(min_p));
            assert!(f64::from(weight(far)) >= least && f64::from(weight(far + 1)) < least.max(1.0), "{min_p}");
        }
    }

    #[test]
    fn rules_are_numbers_in_their_ranges() {
        let rule = |temperature: f32, top_p: f32| Rule::new(&Sampling { temperature, top_p, ..Sampling::default() });
        assert_eq!(rule(0.0, 0.5), Rule::default());
        assert!((756_387.0..756_388.0).contains(&rule(1.0, 1.0).sharp));
        assert_eq!([rule(1.0, 0.5).top_p, rule(1.0, 0.0).top_p, rule(1.0, 1.0).top_p], [1 << 31, 0, Rule::ALL]);
        assert!(rule(1.0, 1.0f32.next_down()).top_p < Rule::ALL);
        for temperature in [f32::from_bits(1), 1e-4, 100.0, f32::MAX] {
            let sharp = rule(temperature, 1.0).sharp;
            assert!(sharp.is_normal() && (1e-33..=2f32.powi(100)).contains(&sharp), "{temperature}: {sharp}");
        }
        assert_eq!([share(0, 100), share(1 << 31, 100), share(1 << 31, 101), share(1 << 31, 2)], [0, 49, 49, 0]);
    }
}
