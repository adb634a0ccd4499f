//! What there is to say about each row of a stage: moments, extremes, NaN and infinity counts, a hash.

use super::{Op, Views};
use crate::program::{Launch, Program, Slice, Stage};
use crate::shader::Kernel;

pub(crate) const KERNEL: Kernel =
    Kernel { name: "stats", source: include_str!("../../shaders/stats.wgsl"), slots: &[] };

/// Words that a row's statistics take.
pub const STATS_WORDS: usize = 8;

/// Constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stats {
    /// Elements in a row.
    pub w: u32,
    /// Whether they are indices and not f32.
    pub indices: bool,
}

impl Program {
    /// The launch that writes a stage's statistics to `s`: `[T, 8]` words. To be put right after the stage.
    pub(crate) fn stats_of(&self, stage: &Stage, s: Slice) -> Launch {
        let op = Stats { w: stage.width as u32, indices: stage.indices };
        Launch::new(Op::Stats(op), &KERNEL, [self.tokens, 1, 1])
            .constant("W", op.w)
            .constant("INDICES", u32::from(op.indices))
            .read("x", stage.slice)
            .write("s", s)
    }
}

impl Stats {
    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        self.reference(&views.words("x")[..tokens * self.w as usize], views.words_mut("s"));
    }

    /// `x [T, W]` words, `s [T, 8]` words.
    pub fn reference(&self, x: &[u32], s: &mut [u32]) {
        let w = self.w as usize;
        for (t, row) in x.chunks_exact(w).enumerate() {
            let (mut sum, mut squares) = (0.0f64, 0.0f64);
            let (mut least, mut largest) = (f32::MAX, f32::MIN);
            let (mut nan, mut infinite) = (0u32, 0u32);
            let mut hash = [0u32; 2];
            for (i, &word) in row.iter().enumerate() {
                let place = ((t * w + i) as u32).wrapping_mul(0x9e37_79b9);
                hash[0] = hash[0].wrapping_add(mix(word ^ place));
                hash[1] = hash[1].wrapping_add(mix(word.wrapping_add(place).wrapping_add(0x7f4a_7c15)));
                let v = if self.indices { word as f32 } else { f32::from_bits(word) };
                nan += u32::from(v.is_nan());
                infinite += u32::from(v.is_infinite());
                if v.is_finite() {
                    sum += f64::from(v);
                    squares += f64::from(v) * f64::from(v);
                    (least, largest) = (least.min(v), largest.max(v));
                }
            }
            let numbers = [sum as f32, squares as f32, least, largest].map(f32::to_bits);
            let row = &mut s[t * STATS_WORDS..][..STATS_WORDS];
            row[..4].copy_from_slice(&numbers);
            row[4..].copy_from_slice(&[nan, infinite, hash[0], hash[1]]);
        }
    }
}

/// MurmurHash3's finaliser, <https://github.com/aappleby/smhasher>.
fn mix(v: u32) -> u32 {
    let mut h = v;
    h = (h ^ (h >> 16)).wrapping_mul(0x85eb_ca6b);
    h = (h ^ (h >> 13)).wrapping_mul(0xc2b2_ae35);
    h ^ (h >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_sees_every_bit_and_every_place() {
        let op = Stats { w: 5, indices: false };
        let of = |x: &[f32; 10]| {
            let mut s = [0; 16];
            op.reference(bytemuck::cast_slice(x), &mut s);
            s
        };
        let x = [1.0, 2.0, 3.0, -0.0, 0.5, 1.0, 2.0, 3.0, -0.0, 0.5];
        let base = of(&x);
        assert_ne!(base[6..8], base[14..16], "equal rows in other places hash alike");
        let mut swapped = x;
        swapped.swap(0, 1);
        assert_ne!(of(&swapped)[6..8], base[6..8]);
        let mut signed = x;
        signed[3] = 0.0;
        assert_ne!(of(&signed)[6..8], base[6..8]);
        assert_eq!(f32::from_bits(base[0]), 6.5);
        let nan = of(&[f32::NAN, f32::INFINITY, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!((nan[4], nan[5], f32::from_bits(nan[0])), (1, 1, 3.0));
    }
}
