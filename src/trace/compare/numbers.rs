//! The arithmetic of a comparison: how far apart, what each side looks like by itself, histograms. Sums are f64.

use serde::Serialize;

/// Buckets of a histogram.
pub const BUCKETS: usize = 48;

/// How far stage A is from stage B, the reference. Infinite where one side has a NaN, or an infinity that the other lacks;
/// JSON says `null` for infinite.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Distance {
    /// Largest |a - b|.
    pub max_abs: f64,
    /// Largest |a - b| / max(|a|, |b|), from 0 to 2.
    pub max_rel: f64,
    /// ‖a - b‖ / ‖b‖ over the stage.
    pub rel_l2: f64,
    /// The same over the worst row: this is held against the tolerance.
    pub worst_row: f64,
    /// Largest |a - b| over the larger of |b| and the root mean square of b's row.
    pub worst_element: f64,
    /// Cosine of the angle between a and b over the stage.
    pub cosine: f64,
    /// Largest number of f32 steps between a and b.
    pub max_ulps: u32,
}

/// What one side (or the difference) looks like by itself: the columns of a hand-written debug log.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Column {
    /// Elements.
    pub count: u64,
    /// Of the finite elements, like the rest.
    pub mean: f64,
    /// Population standard deviation.
    pub std: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
    /// The first ten elements of the first row compared.
    pub first: Vec<f32>,
    /// NaN elements.
    pub n_nan: u64,
    /// Infinite elements.
    pub n_inf: u64,
}

/// How often values of A and B fall into each of [`BUCKETS`] equal ranges from `min` to `max`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Histogram {
    /// Start of the first bucket: the smallest finite value of either side.
    pub min: f64,
    /// End of the last: the largest.
    pub max: f64,
    /// Counts of A.
    pub a: Vec<u32>,
    /// Counts of B.
    pub b: Vec<u32>,
}

/// What [`measure`] finds.
pub(crate) struct Measured {
    pub(crate) distance: Distance,
    /// Relative L2 of each row.
    pub(crate) rows: Vec<f64>,
    /// Index of the worst element: the first that is not finite, else the largest |a - b|.
    pub(crate) worst: usize,
}

/// f32 steps from one number to the other; the largest count where one is NaN.
pub fn ulps(a: f32, b: f32) -> u32 {
    if a.is_nan() || b.is_nan() {
        return u32::MAX;
    }
    let ordered = |x: f32| {
        let bits = x.to_bits() as i32;
        if bits < 0 { i32::MIN - bits } else { bits }
    };
    ordered(a).abs_diff(ordered(b))
}

/// |a - b|: infinite where that is no number, 0 for equal infinities.
fn apart(a: f32, b: f32) -> f64 {
    if a == b {
        return 0.0;
    }
    let d = (f64::from(a) - f64::from(b)).abs();
    if d.is_nan() { f64::INFINITY } else { d }
}

fn over(a: f64, b: f64) -> f64 {
    if a == 0.0 { 0.0 } else { a / b }
}

fn squares(row: &[f32]) -> f64 {
    row.iter().filter(|v| v.is_finite()).map(|v| f64::from(*v).powi(2)).sum()
}

/// What an error in an element of `b` is held against: the size of its row, or its own if that is larger.
fn scale(b: f32, rms: f64) -> f64 {
    if b.is_finite() { rms.max(f64::from(b.abs())) } else { rms }
}

/// Hold two stages of equal shape against each other, `width` elements a row.
pub(crate) fn measure(a: &[f32], b: &[f32], width: usize) -> Measured {
    assert!(a.len() == b.len() && width > 0, "rows were aligned before");
    let mut far = Distance {
        max_abs: 0.0,
        max_rel: 0.0,
        rel_l2: 0.0,
        worst_row: 0.0,
        worst_element: 0.0,
        cosine: 1.0,
        max_ulps: 0,
    };
    let (mut worst, mut rows) = (0, Vec::with_capacity(a.len() / width));
    let (mut all_d, mut all_a, mut all_b, mut dot) = (0.0, 0.0, 0.0, 0.0);
    for (t, (row_a, row_b)) in a.chunks(width).zip(b.chunks(width)).enumerate() {
        let norm = squares(row_b);
        let rms = (norm / width as f64).sqrt();
        let mut row_d = 0.0;
        for (i, (&a, &b)) in row_a.iter().zip(row_b).enumerate() {
            let d = apart(a, b);
            row_d += d * d;
            if d > far.max_abs {
                (far.max_abs, worst) = (d, t * width + i);
            }
            if d > 0.0 {
                let size = f64::from(a.abs().max(b.abs()));
                let rel = if d.is_finite() { d / size } else { f64::INFINITY };
                far.max_rel = far.max_rel.max(rel);
                far.worst_element = far.worst_element.max(d / scale(b, rms));
                far.max_ulps = far.max_ulps.max(ulps(a, b));
            }
            if a.is_finite() && b.is_finite() {
                dot += f64::from(a) * f64::from(b);
            }
        }
        (all_d, all_a, all_b) = (all_d + row_d, all_a + squares(row_a), all_b + norm);
        let row = over(row_d.sqrt(), norm.sqrt());
        far.worst_row = far.worst_row.max(row);
        rows.push(row);
    }
    far.rel_l2 = over(all_d.sqrt(), all_b.sqrt());
    // Two stages of zeros point the same way; one of zeros and another do not.
    let sizes = (all_a * all_b).sqrt();
    far.cosine = if sizes > 0.0 { (dot / sizes).clamp(-1.0, 1.0) } else { f64::from(u8::from(all_a == all_b)) };
    Measured { distance: far, rows, worst }
}

/// Names the elements, by row and column, that are further apart than `limit` times their scale.
pub(super) fn elements_beyond(a: &[f32], b: &[f32], width: usize, limit: f64, see: &mut dyn FnMut(usize, usize)) {
    for (t, (row_a, row_b)) in a.chunks(width).zip(b.chunks(width)).enumerate() {
        let rms = (squares(row_b) / width as f64).sqrt();
        for (i, (&a, &b)) in row_a.iter().zip(row_b).enumerate() {
            let d = apart(a, b);
            if d > 0.0 && d > limit * scale(b, rms) {
                see(t, i);
            }
        }
    }
}

/// One side by itself.
pub(super) fn column(values: &[f32]) -> Column {
    let finite = || values.iter().filter(|v| v.is_finite()).map(|v| f64::from(*v));
    let n_nan = values.iter().filter(|v| v.is_nan()).count();
    let n_inf = values.iter().filter(|v| v.is_infinite()).count();
    let n = (values.len() - n_nan - n_inf).max(1) as f64;
    let mean = finite().sum::<f64>() / n;
    let variance = finite().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
    let bound = |pick: fn(f64, f64) -> f64| finite().reduce(pick).unwrap_or_default();
    Column {
        count: values.len() as u64,
        mean,
        std: variance.sqrt(),
        min: bound(f64::min),
        max: bound(f64::max),
        first: values.iter().take(10).copied().collect(),
        n_nan: n_nan as u64,
        n_inf: n_inf as u64,
    }
}

/// Both sides over one range.
pub(super) fn histogram(a: &[f32], b: &[f32]) -> Histogram {
    let finite = |side: &[f32]| side.iter().copied().filter(|v| v.is_finite()).map(f64::from).collect::<Vec<_>>();
    let (a, b) = (finite(a), finite(b));
    let (min, max) =
        a.iter().chain(&b).fold((f64::INFINITY, f64::NEG_INFINITY), |(min, max), v| (min.min(*v), max.max(*v)));
    let (min, max) = if min <= max { (min, max) } else { (0.0, 0.0) };
    let count = |side: &[f64]| {
        let mut counts = vec![0; BUCKETS];
        for v in side {
            let bucket = over(v - min, max - min) * BUCKETS as f64;
            counts[(bucket as usize).min(BUCKETS - 1)] += 1;
        }
        counts
    };
    Histogram { min, max, a: count(&a), b: count(&b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ulps_are_counted_through_zero() {
        assert_eq!(ulps(1.0, 1.0), 0);
        assert_eq!(ulps(1.0, 1.0 + f32::EPSILON), 1);
        assert_eq!(ulps(-1.0, -1.0 - f32::EPSILON), 1);
        assert_eq!(ulps(0.0, -0.0), 0);
        assert_eq!(ulps(f32::from_bits(1), -f32::from_bits(1)), 2);
        assert_eq!(ulps(f32::MAX, f32::INFINITY), 1);
        assert_eq!(ulps(f32::NAN, f32::NAN), u32::MAX);
    }

    #[test]
    fn distances_by_hand() {
        let m = measure(&[3.0, 4.0, 1.0, 0.0], &[3.0, 4.0, 0.0, 2.0], 2);
        let d = m.distance;
        assert_eq!((d.max_abs, d.max_rel, m.worst), (2.0, 1.0, 3));
        assert_eq!(m.rows, [0.0, 5f64.sqrt() / 2.0]);
        assert_eq!(d.rel_l2, 5f64.sqrt() / 29f64.sqrt());
        assert_eq!(d.worst_row, m.rows[1]);
        // The first element's own size is 0, so its row's is its measure: rms = sqrt(4 / 2).
        assert_eq!(d.worst_element, 1.0);
        assert!((d.cosine - 25.0 / (26f64 * 29.0).sqrt()).abs() < 1e-15);
    }

    #[test]
    fn cosine_of_equal_opposite_and_empty() {
        let a = [1.0, -2.0, 3.0];
        assert!((measure(&a, &a, 3).distance.cosine - 1.0).abs() < 1e-15);
        assert!((measure(&a, &a.map(|v| -v), 3).distance.cosine + 1.0).abs() < 1e-15);
        assert_eq!(measure(&[0.0; 3], &[0.0; 3], 3).distance.cosine, 1.0);
        let d = measure(&a, &[0.0; 3], 3).distance;
        assert_eq!((d.cosine, d.rel_l2), (0.0, f64::INFINITY));
    }

    #[test]
    fn nan_agrees_with_nothing_and_equal_infinities_do() {
        let inf = f32::INFINITY;
        assert_eq!(measure(&[1.0, inf], &[1.0, inf], 2).distance.worst_row, 0.0);
        for (a, b) in [(f32::NAN, 1.0), (1.0, f32::NAN), (f32::NAN, f32::NAN), (inf, -inf), (1.0, inf)] {
            let m = measure(&[1.0, a], &[1.0, b], 2);
            let d = m.distance;
            assert_eq!(
                (d.max_abs, d.worst_row, d.worst_element, m.worst),
                (inf.into(), inf.into(), inf.into(), 1),
                "{a} {b}"
            );
        }
    }

    #[test]
    fn one_corrupted_element_is_noticed() {
        let b: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect();
        for at in [0, 499, 999] {
            let mut a = b.clone();
            a[at] += 1e-2;
            let m = measure(&a, &b, 100);
            assert!(
                m.worst == at && m.distance.worst_element > 9e-3 && m.distance.worst_row > 1e-3,
                "{:?}",
                m.distance
            );
            let mut found = Vec::new();
            elements_beyond(&a, &b, 100, 1e-3, &mut |row, column| found.push(row * 100 + column));
            assert_eq!(found, [at]);
        }
    }

    #[test]
    fn a_column_counts_what_is_not_finite() {
        let c = column(&[1.0, f32::NAN, 3.0, f32::NEG_INFINITY]);
        assert_eq!((c.mean, c.std, c.min, c.max, c.n_nan, c.n_inf, c.count), (2.0, 1.0, 1.0, 3.0, 1, 1, 4));
        let empty = column(&[f32::NAN]);
        assert_eq!((empty.mean, empty.min, empty.max), (0.0, 0.0, 0.0));
    }

    #[test]
    fn histograms_share_their_range() {
        let h = histogram(&[0.0, 1.0, 1.0, f32::NAN], &[2.0]);
        assert_eq!((h.min, h.max), (0.0, 2.0));
        assert_eq!((h.a[0], h.a[BUCKETS / 2], h.b[BUCKETS - 1]), (1, 2, 1));
        assert_eq!(histogram(&[1.0; 5], &[1.0; 5]).a[0], 5);
    }
}
