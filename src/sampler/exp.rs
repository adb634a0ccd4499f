//! `exp` in f32 without branches and tables, so that compilers turn loops over it into vector instructions; and the sum over a
//! vocabulary, in f64.

/// `exp` of arguments up to 0, within 2 units in the last place; 0 from about -87.7 on, where it is below the normal numbers. NaN
/// stays NaN.
#[inline]
fn exp(x: f32) -> f32 {
    // Of ln 2, so few bits that its product with a whole number up to 127 is exact, and the rest.
    const LN_2_HIGH: f32 = 0.693_359_4; // 355 / 512
    const LN_2_LOW: f32 = -2.1219444e-4;
    // Adding it leaves the nearest whole number in the lowest bits.
    const ROUND: f32 = 1.5 * (1 << 23) as f32;
    // Where `k` is -127, the bits of `scale` are those of 0.
    let x = if x < -88.1 { -88.1 } else { x };

    // exp(x) = 2^k exp(r), with |r| up to ln(2) / 2. The polynomial is that of `shaders/shared/exp.wgsl`.
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let k = rounded - ROUND;
    let r = x - k * LN_2_HIGH - k * LN_2_LOW;
    let p =
        ((((1.987_569_2e-4 * r + 1.398_199_9e-3) * r + 8.333_452e-3) * r + 4.166_579_6e-2) * r + 1.666_666_5e-1) * r;
    let y = (p + 0.5) * (r * r) + r + 1.0;
    y * f32::from_bits((rounded.to_bits() << 23).wrapping_add(1f32.to_bits()))
}

/// The sum of e^(logit - largest), in eight sums that take turns: in this order whatever the machine.
pub(super) fn sum(logits: &[f32], largest: f32) -> f64 {
    let mut sums = [0.0; 8];
    let (eights, rest) = logits.as_chunks::<8>();
    for eight in eights {
        let terms = eight.map(|logit| exp(logit - largest));
        sums.iter_mut().zip(terms).for_each(|(sum, term)| *sum += f64::from(term));
    }
    sums.iter_mut().zip(rest).for_each(|(sum, &logit)| *sum += f64::from(exp(logit - largest)));
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_of_what_it_should_be() {
        let dense = (0..4_000_000).map(|i| -87.0 * i as f32 / 4e6);
        let small = (0..100_000).map(|i| -f32::from_bits(i * 10_000));
        for x in dense.chain(small).filter(|x| *x > -87.3) {
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            let unit = f64::from(f32::EPSILON) * want;
            assert!((got - want).abs() <= 2.0 * unit, "exp({x}): {got} and {want}");
        }
    }

    #[test]
    fn exp_has_its_limits() {
        assert_eq!([exp(0.0), exp(-0.0)], [1.0; 2]);
        for x in [f32::NEG_INFINITY, f32::MIN, -1e30, -1e9, -89.0, -88.1] {
            assert_eq!(exp(x).to_bits(), 0, "{x}");
        }
        assert!(exp(-87.0) > 0.0 && (-8900..-8770).all(|i| exp(i as f32 / 100.0) < 1e-37));
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn every_logit_is_in_the_sum() {
        for n in (0..70).chain([1000, 1001]) {
            assert_eq!(sum(&vec![2.5; n], 2.5), n as f64);
            // One of them is far ahead.
            for at in (0..n).step_by(7) {
                let mut logits = vec![-200.0; n];
                logits[at] = 0.0;
                assert_eq!(sum(&logits, 0.0), 1.0);
            }
        }
        let logits: Vec<f32> = (0..1003).map(|i| -0.37 * (i % 41) as f32).collect();
        let plain: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        assert!((sum(&logits, 0.0) / plain - 1.0).abs() < 1e-7);
    }
}
