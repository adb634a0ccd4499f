//! How likely a token is beside the likeliest one, in whole numbers, whose sums follow no order: the same on every machine and
//! device (`shaders/shared/line.wgsl`).

/// Steps below the likeliest from which on all tokens are alike, and out of the line: 32 octaves of 2^19 steps. The last octave has no
/// weight.
pub(crate) const FAR: u32 = 1 << 24;

/// Steps of a part of an octave: in between, weights lie on a straight line.
const PART: u32 = 10;

/// `2^(31 - i/512)` for i in 0..512, to the nearest, and how far it is from there to the next.
pub const POWERS: [[u32; 2]; 512] = powers();

const fn powers() -> [[u32; 2]; 512] {
    // 2^(-1/512) in 63 bits behind the point: nine square roots of a half.
    let mut root = 1u128 << 62;
    let mut k = 0;
    while k < 9 {
        root = (root << 63).isqrt();
        k += 1;
    }
    let mut powers = [[0; 2]; 512];
    let (mut i, mut power) = (0, 1u128 << 63);
    while i < 512 {
        let next = (power * root + (1 << 62)) >> 63;
        let [here, there] = [(power + (1 << 31)) >> 32, (next + (1 << 31)) >> 32];
        powers[i] = [here as u32, (here - there) as u32];
        power = next;
        i += 1;
    }
    powers
}

/// Steps that a logit lies below the largest, at most [`FAR`]: `sharp` of them for each unit. None of the logits is NaN or plus
/// infinity.
#[inline]
pub(crate) fn below(largest: f32, logit: f32, sharp: f32) -> u32 {
    nearer(largest, logit, sharp, FAR as f32)
}

/// The same for tokens of fewer steps than `end`; [`FAR`] for others.
#[inline]
pub(super) fn nearer(largest: f32, logit: f32, sharp: f32, end: f32) -> u32 {
    // A difference and a product, each rounded once.
    let steps = (largest - logit) * sharp;
    whole(if steps < end { steps } else { FAR as f32 })
}

/// `x as u32` for x from 0 to 2^24, by vector instructions: casts look for what cannot be here, in six times as long.
#[inline]
fn whole(x: f32) -> u32 {
    // Adding it leaves the nearest whole number in the lowest bits.
    const ROUND: f32 = (1 << 23) as f32;
    let half = x * 0.5 + ROUND;
    let even = 2.0 * (half - ROUND); // the nearest even number, or one as near
    let nearest = 2 * (half.to_bits() - ROUND.to_bits());
    nearest + u32::from(x - even >= 1.0) - u32::from(x < even)
}

/// The weight of a token so many steps below the likeliest, at most [`FAR`]: 2^31, and half as much with each octave.
#[inline]
pub(crate) fn weight(below: u32) -> u32 {
    let [here, fall] = POWERS[(below >> PART) as usize % 512];
    let whole = here - ((fall * (below & ((1 << PART) - 1))) >> PART);
    (u64::from(whole) >> (below >> 19)) as u32
}

/// The high half of a product: of the random `bits` and a mass, a number below the mass.
pub(crate) fn scaled(bits: u64, mass: u64) -> u64 {
    ((u128::from(bits) * u128::from(mass)) >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_fall_and_are_powers_of_two_but_for_a_unit_and_2_to_the_minus_22() {
        let (mut last, mut most) = (u32::MAX, 0.0f64);
        for b in 0..FAR {
            let w = weight(b);
            assert!(w <= last, "it rises at {b}");
            last = w;
            let exact = (31.0 - f64::from(b) / f64::from(1 << 19)).exp2();
            // What a shift takes away is less than a unit, always downward.
            let over = (f64::from(w) - exact) / exact;
            let under = (exact - f64::from(w) - 1.0) / exact;
            most = most.max(over).max(under);
        }
        assert!(most < 2f64.powi(-22), "{most:e}");
        assert_eq!([0, 1 << 19, 31 << 19, (31 << 19) + 1, FAR].map(weight), [1 << 31, 1 << 30, 1, 0, 0]);
    }

    #[test]
    fn steps_are_whole_and_end() {
        assert_eq!(below(3.5, 3.5, 9e9), 0);
        assert_eq!(below(1.0, 0.0, 756_388.5), 756_388);
        for far in [f32::NEG_INFINITY, f32::MIN, -1e9] {
            assert_eq!(below(f32::MAX, far, 1.0), FAR);
            assert_eq!(below(2.0, far, 1e30), FAR);
        }
        assert_eq!(below(0.0, -0.0, 1e30), 0);
        // As casts have them: all halves and what is next to them, and much in between.
        let halves = (0..4_000_000).map(|i| (i * 9 % (FAR * 2 + 1)) as f32 / 2.0);
        for x in halves.chain((0..300_000).map(|i| f32::from_bits(i * 4200))).filter(|x| *x <= FAR as f32) {
            for x in [x, x.next_up(), x.next_down()].into_iter().filter(|x| (0.0..=FAR as f32).contains(x)) {
                assert_eq!(whole(x), x as u32, "{x}");
            }
        }
    }

    #[test]
    fn a_scaled_number_is_below_the_mass() {
        assert_eq!([scaled(0, 7), scaled(u64::MAX, 7), scaled(1 << 63, 7)], [0, 6, 3]);
        assert_eq!(scaled(u64::MAX, u64::MAX), u64::MAX - 1);
    }
}
