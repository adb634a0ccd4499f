//! `exp` in f64 without branches and tables, so that compilers turn loops over it into vector instructions; and the sum of
//! weights over a vocabulary.

/// `exp` of arguments up to 0, within 2 units in the last place; 0 from about -708.7 on, where it is below the normal numbers. NaN
/// stays NaN.
#[inline]
pub(super) fn exp(x: f64) -> f64 {
    // Of ln 2, so many bits that its product with a whole number up to 1023 is exact, and the rest.
    const LN_2_HIGH: f64 = 0.6931471803691238;
    const LN_2_LOW: f64 = 1.9082149292705877e-10;
    // Adding it leaves the nearest whole number in the lowest bits.
    const ROUND: f64 = 1.5 * (1u64 << 52) as f64;
    // Where `k` is -1023, the bits of `scale` are those of 0.
    let x = if x < -709.1 { -709.1 } else { x };

    // exp(x) = 2^k exp(r), with |r| up to ln(2) / 2.
    let rounded = x * std::f64::consts::LOG2_E + ROUND;
    let k = rounded - ROUND;
    let r = x - k * LN_2_HIGH - k * LN_2_LOW;
    // As in fdlibm's e_exp.c (Sun Microsystems, 1993), with its polynomial: exp(r) = 1 + r + r c / (2 - c).
    let t = r * r;
    let p = 0.16666666666666602
        + t * (-0.0027777777777015593
            + t * (6.613756321437934e-5 + t * (-1.6533902205465252e-6 + t * 4.1381367970572385e-8)));
    let c = r - t * p;
    let scale = f64::from_bits((rounded.to_bits() << 52).wrapping_add(1f64.to_bits()));
    (1.0 + (r + r * c / (2.0 - c))) * scale
}

/// The sum of the logits' weights, in eight sums that take turns: in this order whatever the machine.
pub(super) fn sum(logits: &[f32], weight: impl Fn(f32) -> f64) -> f64 {
    let mut sums = [0.0; 8];
    let (eights, rest) = logits.as_chunks::<8>();
    for eight in eights {
        for (sum, &logit) in sums.iter_mut().zip(eight) {
            *sum += weight(logit);
        }
    }
    for (sum, &logit) in sums.iter_mut().zip(rest) {
        *sum += weight(logit);
    }
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_of_the_standard_librarys() {
        let ulps = |x: f64| exp(x).to_bits().abs_diff(x.exp().to_bits());
        let dense = (0..4_000_000).map(|i| -708.3 * f64::from(i) / 4e6);
        // Where `k` steps, and near 0 and the end.
        let steps = (0..1022).flat_map(|k| (-9..9).map(move |i| -(f64::from(k) + 0.5 + f64::from(i) * 1e-13) / LOG2_E));
        let small = (1..1100).map(|k| -f64::from(k).exp2().recip());
        let f32s = (0..100_000).map(|i| -f64::from(f32::from_bits(0x2000_0000 + i * 5000)));
        const LOG2_E: f64 = std::f64::consts::LOG2_E;
        for x in dense.chain(steps).chain(small).chain(f32s).filter(|&x| x > -708.3) {
            assert!(ulps(x) <= 2, "exp({x}): {} and {}", exp(x), x.exp());
        }
    }

    #[test]
    fn exp_has_its_limits() {
        assert_eq!([exp(0.0), exp(-0.0)], [1.0; 2]);
        for x in [f64::NEG_INFINITY, f64::MIN, -1e300, -1e9, -746.0, -709.2, -709.0] {
            assert_eq!(exp(x).to_bits(), 0, "{x}");
        }
        assert!(exp(-708.0) > 0.0 && (-70_900..-70_800).all(|i| exp(f64::from(i) / 100.0) < 1e-307));
        assert!(exp(f64::NAN).is_nan());
    }

    #[test]
    fn every_logit_is_in_the_sum() {
        for n in (0..70).chain([1000, 1001]) {
            let logits: Vec<f32> = (0..n).map(|i| i as f32).collect();
            assert_eq!(sum(&logits, f64::from), (0..n).sum::<i32>() as f64);
        }
        let logits: Vec<f32> = (0..1003).map(|i| -0.37 * (i % 41) as f32).collect();
        let plain: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        assert!((sum(&logits, |l| exp(f64::from(l))) / plain - 1.0).abs() < 1e-14);
    }
}
