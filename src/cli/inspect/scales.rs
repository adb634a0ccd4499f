//! The E8M0 block scales of MXFP4 tensors: their statistics, and the ones that look wrong.

use super::bad;
use fourfold::checkpoint::{Dtype, TensorView};
use fourfold::format::Format;

/// Suspects that are listed; the rest is counted.
pub(super) const LISTED: usize = 20;
/// How far from the median, in powers of two, a scale is no accident of training.
const FAR: u8 = 40;

/// Whether a tensor holds E8M0 scales.
pub(super) fn is_scales(view: &TensorView<'_>) -> bool {
    let is_named = view.name.ends_with("_scales") || view.name.ends_with(".weight_scale");
    is_named && matches!(view.dtype, Dtype::U8 | Dtype::F8E8M0)
}

/// Bytes of codes to a scale.
pub(super) fn block_bytes() -> usize {
    Format::Mxfp4.row_bytes(Format::Mxfp4.block())
}

/// What the scales of one tensor look like.
pub(super) struct Found {
    sum: u64,
    mean: f64,
    std: f64,
    median: u8,
    min: u8,
    max: u8,
    /// All suspects there are.
    pub(super) n_suspects: u64,
    /// The first of them, [`LISTED`] at most.
    pub(super) suspects: Vec<Suspect>,
}

/// A scale that looks wrong.
pub(super) struct Suspect {
    position: usize,
    scale: u8,
    median: u8,
}

impl Found {
    /// Look at every scale. Without codes, every block counts as one that holds something.
    pub(super) fn read(scales: &TensorView<'_>, codes: Option<&[u8]>) -> Self {
        let mut histogram = [0u64; 256];
        scales.bytes.iter().for_each(|&s| histogram[usize::from(s)] += 1);
        let each = || (0u8..=255).zip(histogram);
        let n = scales.bytes.len().max(1) as f64;
        let sum: u64 = each().map(|(s, n)| u64::from(s) * n).sum();
        let mean = sum as f64 / n;
        let variance = each().map(|(s, n)| (f64::from(s) - mean).powi(2) * n as f64).sum::<f64>() / n;
        let median = median(&histogram);
        let odd = |s: u8| s == 255 || s == 0 || s.abs_diff(median) > FAR;
        let holds_something = |i: usize| {
            let block = codes.map(|codes| &codes[i * block_bytes()..][..block_bytes()]);
            // 0 and 8 are zero and minus zero, twice a byte.
            block.is_none_or(|block| block.iter().any(|byte| byte & 0x77 != 0))
        };
        let (mut n_suspects, mut suspects) = (0, Vec::new());
        if each().any(|(s, n)| n > 0 && odd(s)) {
            for (position, &scale) in scales.bytes.iter().enumerate() {
                if odd(scale) && (scale == 255 || holds_something(position)) {
                    n_suspects += 1;
                    if suspects.len() < LISTED {
                        suspects.push(Suspect { position, scale, median });
                    }
                }
            }
        }
        let (min, max) = (scales.bytes.iter().copied().min(), scales.bytes.iter().copied().max());
        let (min, max) = (min.unwrap_or_default(), max.unwrap_or_default());
        Self { sum, mean, std: variance.sqrt(), median, min, max, n_suspects, suspects }
    }

    /// Name, shape, sum, mean, std, median, min, max, first 10.
    pub(super) fn row(&self, scales: &TensorView<'_>) -> Vec<String> {
        let first: Vec<String> = scales.bytes.iter().take(10).map(u8::to_string).collect();
        let Self { sum, mean, std, median, min, max, .. } = self;
        vec![
            scales.name.to_owned(),
            format!("{:?}", scales.shape),
            sum.to_string(),
            format!("{mean:.3}"),
            format!("{std:.3}"),
            median.to_string(),
            min.to_string(),
            max.to_string(),
            format!("[{}]", first.join(", ")),
        ]
    }
}

impl Suspect {
    /// Name, place, scale, median, reason.
    pub(super) fn row(&self, scales: &TensorView<'_>) -> Vec<String> {
        let place = bad::place(self.position, scales.shape);
        let reason = match self.scale {
            255 => "NaN".to_owned(),
            0 => "2^-127, which GPUs may take for 0".to_owned(),
            scale => format!("2^{} times the median", i32::from(scale) - i32::from(self.median)),
        };
        let numbers = [self.scale, self.median].map(|n| n.to_string());
        let [scale, median] = numbers;
        vec![scales.name.to_owned(), format!("{place:?}"), scale, median, reason]
    }
}

/// The median of the bytes from 1 to 254; of none, 127.
fn median(histogram: &[u64; 256]) -> u8 {
    let n: u64 = histogram[1..255].iter().sum();
    let mut seen = 0;
    (1..255u8).find(|&s| (seen += histogram[usize::from(s)], 2 * seen >= n).1 && n > 0).unwrap_or(127)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8], codes: Option<&[u8]>) -> Found {
        let shape = [2, bytes.len() / 2];
        Found::read(&TensorView { name: "x_scales", file: "f", dtype: Dtype::U8, shape: &shape, bytes }, codes)
    }

    #[test]
    fn statistics_are_those_of_the_bytes() {
        let found = read(&[120, 121, 122, 121], None);
        assert_eq!((found.sum, found.mean, found.median, found.min, found.max), (484, 121.0, 121, 120, 122));
        assert!((found.std - 0.5f64.sqrt()).abs() < 1e-12 && found.n_suspects == 0);
    }

    #[test]
    fn suspects_have_codes_unless_they_are_nan() {
        let scales = [120, 120, 120, 255, 0, 161, 79, 160];
        let all = read(&scales, None);
        assert_eq!(all.suspects.iter().map(|s| s.scale).collect::<Vec<_>>(), [255, 0, 161, 79]);
        // Zeros of both signs hide all but the NaN; one code brings its scale back.
        let mut codes = vec![0x80u8; 8 * 16];
        assert_eq!(read(&scales, Some(&codes)).n_suspects, 1);
        codes[5 * 16 + 3] = 0x10;
        let found = read(&scales, Some(&codes));
        assert_eq!(found.suspects.iter().map(|s| s.position).collect::<Vec<_>>(), [3, 5]);
        let view = TensorView { name: "x_scales", file: "f", dtype: Dtype::U8, shape: &[2, 4], bytes: &scales };
        assert_eq!(found.suspects[1].row(&view)[1..4], ["[1, 1]", "161", "120"]);
        assert_eq!(found.suspects[1].row(&view)[4], "2^41 times the median");
    }

    #[test]
    fn many_suspects_are_counted() {
        let found = read(&[255; 64], None);
        assert_eq!((found.n_suspects, found.suspects.len(), found.median), (64, LISTED, 127));
    }
}
