//! From traces alone: which input a wrong output follows. A wrong weight in row r, column c of a matrix moves output r of
//! token t by Δ · x[t, c], so the differences over tokens are the input's column c, scaled; a wrong bias moves all alike.

use crate::trace::file::split_layer;

/// Differences of fewer tokens fit some column by chance.
const TOKENS: usize = 6;
/// Cosine between the differences and the column that they follow, and the most that any other column may have.
const FOLLOWS: f64 = 0.9999;
const OTHERS: f64 = 0.999;

/// The stage that a matrix was applied to.
pub(super) struct Source {
    pub(super) values: Vec<f32>,
    pub(super) width: usize,
    /// Parts of a row, one for each of the token's experts; 1 where all share the row.
    pub(super) slots: usize,
    pub(super) positions: Vec<usize>,
}

impl Source {
    /// The inputs of a position (of one of its experts).
    pub(super) fn input(&self, position: usize, slot: usize) -> Option<&[f32]> {
        let row = self.positions.iter().position(|p| *p == position)?;
        let part = self.width / self.slots;
        let slot = if self.slots == 1 { 0 } else { slot };
        self.values.get(row * self.width + slot * part..)?.get(..part)
    }
}

/// The input of a stage that is linear in it.
pub(super) fn input_of(stage: &str) -> Option<String> {
    let Some((layer, name)) = split_layer(stage) else { return (stage == "logits").then(|| "final_norm".to_owned()) };
    let input = match name {
        "qkv" => "attn_norm",
        "attn_out" => "attention",
        "mlp.router.logits" => "mlp_norm",
        "mlp.down" => "mlp.up",
        _ => return None,
    };
    Some(format!("layers.{layer}.{input}"))
}

/// What the differences of one output follow: a column of the inputs, or none and all alike.
pub(super) fn follow(tokens: &[(f64, &[f32])]) -> Option<String> {
    let width = tokens.first()?.1.len();
    if width == 0 || tokens.len() < TOKENS || tokens.iter().any(|(d, x)| !d.is_finite() || x.len() != width) {
        return None;
    }
    let norm = tokens.iter().map(|(d, _)| d * d).sum::<f64>();
    let fit = |of: &dyn Fn(&[f32]) -> f64| {
        let (dot, size) =
            tokens.iter().map(|(d, x)| (d, of(x))).fold((0.0, 0.0), |(dot, size), (d, x)| (dot + d * x, size + x * x));
        (if size > 0.0 { dot.abs() / (norm * size).sqrt() } else { 0.0 }, dot / size)
    };
    let (alike, by) = fit(&|_| 1.0);
    if alike > FOLLOWS {
        return Some(format!("by {by:.3e} for each of them: a bias"));
    }
    let mut fits: Vec<(f64, f64, usize)> = (0..width)
        .map(|column| {
            let (cosine, by) = fit(&|x| f64::from(x[column]));
            (cosine, by, column)
        })
        .collect();
    fits.sort_by(|(a, ..), (b, ..)| b.total_cmp(a));
    let (cosine, by, column) = fits[0];
    let is_alone = fits.get(1).is_none_or(|(other, ..)| *other < OTHERS);
    (cosine > FOLLOWS && is_alone)
        .then(|| format!("the difference follows input column {column}, as if one weight there were off by {by:.3e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_column_of_a_wrong_weight_is_found() {
        let input =
            |t: usize| -> Vec<f32> { (0..40).map(|c| ((t * 31 + c * 17 + t * c * 7) % 101) as f32 - 50.0).collect() };
        let inputs: Vec<Vec<f32>> = (0..9).map(input).collect();
        let off = |of: &dyn Fn(&[f32]) -> f64, n: usize| {
            let tokens: Vec<(f64, &[f32])> = inputs[..n].iter().map(|x| (of(x), &x[..])).collect();
            follow(&tokens)
        };
        let one = |x: &[f32]| 0.5 * f64::from(x[33]);
        let want = "the difference follows input column 33, as if one weight there were off by 5.000e-1";
        assert_eq!(off(&one, 9).as_deref(), Some(want));
        assert_eq!(off(&one, TOKENS - 1), None);
        assert_eq!(off(&|x| f64::from(x[3] + x[4]), 9), None);
        assert_eq!(off(&|_| -0.25, 9).as_deref(), Some("by -2.500e-1 for each of them: a bias"));
    }
}
