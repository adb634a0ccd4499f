//! NVFP4: blocks of 16 E2M1 codes in 8 bytes with one E4M3 scale, and one f32 for the whole tensor,
//! value = e2m1(code) * (e4m3(scale) * multiplier).
//!
//! Owns decoding, the two writers of weights found in checkpoints, the cast from MXFP4, the quantiser of activations (W4A4), and the 128x4
//! order of block scales that native NVFP4 matrix units want. On disk scales are row-major, one row of K/16 per row
//! of weights. Sources: NVIDIA ModelOpt 0.47 `nvfp4_tensor.py`, compressed-tensors 0.20 `fp4_utils.py`, vLLM 0.33
//! `nvfp4_emulation_utils.py`, Transformer Engine `swizzle.h`.

use super::{NotFinite, amax, bf16, e2m1, e4m3, mxfp4, require_finite};

/// Elements that share a scale.
pub const BLOCK: usize = 16;

/// Bytes of codes in a block.
pub const BLOCK_BYTES: usize = BLOCK / 2;

/// The largest code times the largest scale: a tensor's amax is mapped to it.
pub const MAX: f32 = e2m1::MAX * e4m3::MAX;

/// The f32 of a whole tensor, in the convention of the file that holds it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Global {
    /// amax/2688, to multiply by when decoding: ModelOpt's and Quark's `weight_scale_2` and `input_scale`.
    Multiplier(f32),
    /// 2688/amax, to divide by when decoding: compressed-tensors' `weight_global_scale` and `input_global_scale`.
    Divisor(f32),
}

impl Global {
    /// What decoding multiplies by.
    pub fn multiplier(self) -> f32 {
        match self {
            Self::Multiplier(m) => m,
            Self::Divisor(d) => 1.0 / d,
        }
    }
}

/// Decodes one block; `multiplier` is [`Global::multiplier`]. The scale is formed first and rounded to f32.
pub fn decode(block: &[u8; BLOCK_BYTES], scale: u8, multiplier: f32, out: &mut [f32; BLOCK]) {
    let scale = e4m3::decode(scale) * multiplier;
    for (pair, byte) in out.as_chunks_mut::<2>().0.iter_mut().zip(block) {
        *pair = [e2m1::decode(byte & 15) * scale, e2m1::decode(byte >> 4) * scale];
    }
}

/// Decodes K = `out.len()` elements from `[K/2]` code bytes and `[K/16]` scales.
///
/// # Panics
/// If the lengths do not fit each other.
pub fn decode_row(codes: &[u8], scales: &[u8], multiplier: f32, out: &mut [f32]) {
    assert!(out.len() == scales.len() * BLOCK && codes.len() == scales.len() * BLOCK_BYTES, "whole NVFP4 blocks");
    for ((block, scale), out) in codes.as_chunks().0.iter().zip(scales).zip(out.as_chunks_mut().0) {
        decode(block, *scale, multiplier, out);
    }
}

/// An encoded tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoded {
    /// Packed codes, `[N, K/2]`.
    pub codes: Vec<u8>,
    /// E4M3 scales, row-major `[N, K/16]`.
    pub scales: Vec<u8>,
    /// The tensor's scale.
    pub global: Global,
}

/// Encodes a weight as ModelOpt does: all in f32, a block of zeros gets scale 1, no scale is below 2^-9, and a negative
/// element keeps its sign when it rounds to zero (-0 itself does not).
///
/// `w` is `[N, K]` row-major with K a multiple of 16.
///
/// # Errors
/// [`NotFinite`] at the first NaN or infinity.
///
/// # Panics
/// If `w` is not whole blocks.
pub fn encode_modelopt(w: &[f32]) -> Result<Encoded, NotFinite> {
    require_finite(w)?;
    let global = amax(w) / MAX;
    let mut encoded = Encoded::with_room_for(w, Global::Multiplier(global));
    for block in whole_blocks(w) {
        let scale = block_scale(block, e2m1::MAX, global);
        encoded.push(scale, block_codes(block, scale, global));
    }
    Ok(encoded)
}

/// Encodes one block of finite elements against the multiplier of its tensor, which may be shared with other tensors and
/// so larger than its own amax asks for. The rules are those of [`encode_modelopt`].
pub fn encode_block(block: &[f32; BLOCK], multiplier: f32) -> ([u8; BLOCK_BYTES], u8) {
    let scale = block_scale(block, e2m1::MAX, multiplier);
    (packed(&block_codes(block, scale, multiplier)), scale)
}

/// As [`encode_block`], with the scale that gives the least squared error: every code from a little below amax/6 to a
/// little above amax/4 ("four over six") is tried. Never worse than [`encode_block`], which wins a tie.
pub fn encode_block_least(block: &[f32; BLOCK], multiplier: f32) -> ([u8; BLOCK_BYTES], u8) {
    let nearest = block_scale(block, e2m1::MAX, multiplier);
    let error = |scale: u8, codes: &[u8; BLOCK]| -> f64 {
        let unit = e4m3::decode(scale) * multiplier;
        let off = |(v, code): (&f32, &u8)| f64::from(e2m1::decode(*code) * unit) - f64::from(*v);
        block.iter().zip(codes).map(off).map(|e| e * e).sum()
    };
    let mut best = (nearest, block_codes(block, nearest, multiplier));
    let mut least = error(best.0, &best.1);
    let (lowest, highest) = (nearest.saturating_sub(2).max(1), block_scale(block, 4.0, multiplier) + 1);
    for scale in lowest..=highest.min(LARGEST_SCALE) {
        let codes = block_codes(block, scale, multiplier);
        let this = error(scale, &codes);
        if this < least {
            (best, least) = ((scale, codes), this);
        }
    }
    (packed(&best.1), best.0)
}

/// The exponent m of the multiplier 2^m with which an MXFP4 tensor of these blocks becomes NVFP4 ([`from_mxfp4`]): the
/// largest block exponent less 8. Blocks of zeros do not count; a tensor of nothing else gives `None`.
///
/// # Panics
/// If the lengths do not fit each other.
pub fn mxfp4_exponent(codes: &[u8], scales: &[u8]) -> Option<i32> {
    assert_eq!(codes.len(), scales.len() * mxfp4::BLOCK_BYTES, "whole MXFP4 blocks");
    let blocks = codes.as_chunks::<{ mxfp4::BLOCK_BYTES }>().0.iter().zip(scales);
    let largest = blocks.filter(|(block, _)| !is_zero(*block)).map(|(_, scale)| i32::from(*scale)).max()?;
    // 2^-126 is the least f32 that every device keeps.
    Some((largest - 127 - 8).max(-126))
}

/// An MXFP4 row in NVFP4.
#[derive(Debug, Clone, PartialEq)]
pub struct Cast {
    /// Packed codes, `[K/2]`: those of the MXFP4 row where the cast is exact.
    pub codes: Vec<u8>,
    /// E4M3 scales, `[K/16]`.
    pub scales: Vec<u8>,
    /// MXFP4 blocks that E4M3 scales cannot say exactly, which were encoded to nearest.
    pub n_inexact: usize,
}

/// Casts MXFP4 blocks to NVFP4 with multiplier 2^m: both halves of a block of 32 get the scale 2^(k - m), where 2^k is the
/// block's own. Exact where k - m lies in -9..=8; the codes of such a block stay as they are, and those of a block of zeros
/// always. Other blocks are encoded to nearest and counted.
///
/// # Panics
/// If the lengths do not fit each other, or if m is not an exponent of a normal f32.
pub fn from_mxfp4(codes: &[u8], scales: &[u8], m: i32) -> Cast {
    assert_eq!(codes.len(), scales.len() * mxfp4::BLOCK_BYTES, "whole MXFP4 blocks");
    assert!((-126..=127).contains(&m), "2^{m} is no normal f32");
    let mut cast = Cast { codes: codes.to_vec(), scales: Vec::with_capacity(scales.len() * 2), n_inexact: 0 };
    let out = cast.codes.as_chunks_mut::<{ mxfp4::BLOCK_BYTES }>().0;
    for (block, scale) in out.iter_mut().zip(scales) {
        let exponent = i32::from(*scale) - 127 - m;
        if (-9..=8).contains(&exponent) || is_zero(block) {
            cast.scales.extend([e4m3::encode(2f32.powi(exponent.clamp(-9, 8))); 2]);
            continue;
        }
        cast.n_inexact += 1;
        let mut values = [0.0; mxfp4::BLOCK];
        mxfp4::decode(block, *scale, &mut values);
        for (half, to) in values.as_chunks::<BLOCK>().0.iter().zip(block.as_chunks_mut::<BLOCK_BYTES>().0) {
            let (codes, scale) = encode_block(half, 2f32.powi(m));
            *to = codes;
            cast.scales.push(scale);
        }
    }
    cast
}

/// Whether packed codes are all 0 or -0.
fn is_zero(codes: &[u8]) -> bool {
    codes.iter().all(|b| b & 0x77 == 0)
}

/// The E4M3 code that maps the largest magnitude of a block to `to` (6, or less).
fn block_scale(block: &[f32; BLOCK], to: f32, multiplier: f32) -> u8 {
    e4m3::encode(match amax(block) / (to * multiplier) {
        s if s == 0.0 || s.is_nan() => 1.0, // NaN is 0/0: a tensor of zeros, or one too small for its own scale
        s => s.clamp(MIN_SCALE, e4m3::MAX),
    })
}

/// The nearest codes under a scale.
fn block_codes(block: &[f32; BLOCK], scale: u8, multiplier: f32) -> [u8; BLOCK] {
    let unit = e4m3::decode(scale) * multiplier;
    block.map(|v| if v == 0.0 { 0 } else { e2m1::encode(quotient(v, unit)) })
}

fn packed(codes: &[u8; BLOCK]) -> [u8; BLOCK_BYTES] {
    std::array::from_fn(|i| codes[2 * i] | codes[2 * i + 1] << 4)
}

/// Encodes a weight as llm-compressor with compressed-tensors does on a bf16 model: the global scale and each block's
/// amax/6 are computed in bf16, a scale that rounds to zero becomes 2^-3, and the sign of zero is kept.
///
/// `w` is `[N, K]` row-major with K a multiple of 16; it is rounded to bf16 first.
///
/// # Errors
/// [`NotFinite`] at the first NaN or infinity, also one that rounding to bf16 makes.
///
/// # Panics
/// If `w` is not whole blocks.
pub fn encode_compressed_tensors(w: &[f32]) -> Result<Encoded, NotFinite> {
    let w: Vec<f32> = w.iter().map(|&v| bf16::round(v)).collect();
    require_finite(&w)?;
    // Below an amax of about 1e-35 compressed-tensors itself overflows to infinity; the largest bf16 keeps it decodable.
    let global = bf16::round(MAX / amax(&w).max(f32::MIN_POSITIVE)).min(bf16::MAX);
    let mut encoded = Encoded::with_room_for(&w, Global::Divisor(global));
    for block in whole_blocks(&w) {
        let scale = match e4m3::encode(global * bf16::round(amax(block) / e2m1::MAX)) {
            0 => e4m3::encode(0.125),
            s => s,
        };
        let unit = e4m3::decode(scale) / global;
        encoded.push(scale, block.map(|v| e2m1::encode(quotient(v, unit))));
    }
    Ok(encoded)
}

/// The global scale that fits `x` (a tensor, or one token's row) without clipping: amax/2688.
///
/// # Errors
/// [`NotFinite`] at the first NaN or infinity.
pub fn dynamic_global(x: &[f32]) -> Result<Global, NotFinite> {
    require_finite(x)?;
    Ok(Global::Multiplier(amax(x) / MAX))
}

/// Quantises activations against a global scale, calibrated or [`dynamic_global`], for a W4A4 product. With
/// `G = 1 / multiplier`, in f32 and in this order, as vLLM's emulation and the CUDA kernels do:
///
/// ```text
/// scale = e4m3(G * (amax_block * (1/6)))    saturates at 448: what calibration did not see is clipped
/// code  = e2m1(x * (G / scale))             saturates at 6; zero where the scale is zero
/// ```
///
/// A multiplier below 2^-126 (a tensor of zeros, or nearly) gives zeros.
/// `x` is whole blocks of 16; the result has the same order.
///
/// # Errors
/// [`NotFinite`] at the first NaN or infinity of `x`.
///
/// # Panics
/// If `x` is not whole blocks, or if the multiplier is negative, infinite or NaN: a loader refuses such files.
pub fn quantize_activations(x: &[f32], global: Global) -> Result<Encoded, NotFinite> {
    let multiplier = global.multiplier();
    assert!(multiplier.is_finite() && multiplier >= 0.0, "an activation scale is finite, got {multiplier}");
    require_finite(x)?;
    let inverse = inverse(multiplier);
    let mut encoded = Encoded::with_room_for(x, global);
    for block in whole_blocks(x) {
        let scale = e4m3::encode(inverse * (amax(block) * (1.0 / 6.0)));
        // The factor may overflow where the block is far below 2^-126: zeros stay zeros, the rest saturates.
        let factor = match e4m3::decode(scale) {
            0.0 => 0.0,
            s => inverse / s,
        };
        encoded.push(scale, block.map(|v| e2m1::encode(if v == 0.0 { v } else { v * factor })));
    }
    Ok(encoded)
}

/// How many blocks of `x` have a larger scale than rounds to E4M3's largest, so that [`quantize_activations`] clips them.
pub fn clipped_blocks(x: &[f32], global: Global) -> usize {
    let inverse = inverse(global.multiplier());
    whole_blocks(x).iter().filter(|block| inverse * (amax(&block[..]) * (1.0 / 6.0)) > 464.0).count()
}

/// G of a quantiser; 0 where a multiplier is below the normal numbers.
fn inverse(multiplier: f32) -> f32 {
    if multiplier < f32::MIN_POSITIVE { 0.0 } else { 1.0 / multiplier }
}

/// Bytes of the block scales of `n_rows` rows of `n_scales` scales in 128x4 order: both padded, to 128 and to 4.
pub const fn swizzled_bytes(n_rows: usize, n_scales: usize) -> usize {
    n_rows.next_multiple_of(128) * n_scales.next_multiple_of(4)
}

/// Where the scale of block `scale_idx` of row `row` lies in 128x4 order, for rows of `n_scales` scales.
pub const fn swizzled_offset(row: usize, scale_idx: usize, n_scales: usize) -> usize {
    let tile = row / 128 * n_scales.div_ceil(4) + scale_idx / 4;
    tile * 512 + row % 32 * 16 + row % 128 / 32 * 4 + scale_idx % 4
}

/// The `(row, scale_idx)` at an offset in 128x4 order; either may lie in the padding. `n_scales` is at least 1.
pub const fn unswizzled_place(offset: usize, n_scales: usize) -> (usize, usize) {
    let (tile, rest) = (offset / 512, offset % 512);
    let tiles_per_row = n_scales.div_ceil(4);
    let row = tile / tiles_per_row * 128 + rest % 16 / 4 * 32 + rest / 16;
    (row, tile % tiles_per_row * 4 + rest % 4)
}

/// Row-major scales `[n_rows, n_scales]` in 128x4 order, padded with zeros.
///
/// # Panics
/// If `scales` is not `[n_rows, n_scales]`.
pub fn swizzle(scales: &[u8], n_rows: usize, n_scales: usize) -> Vec<u8> {
    assert_eq!(scales.len(), n_rows * n_scales, "scales are [{n_rows}, {n_scales}]");
    let mut out = vec![0; swizzled_bytes(n_rows, n_scales)];
    for (i, scale) in scales.iter().enumerate() {
        out[swizzled_offset(i / n_scales, i % n_scales, n_scales)] = *scale;
    }
    out
}

/// The inverse of [`swizzle`]: row-major scales `[n_rows, n_scales]`, the padding left out.
///
/// # Panics
/// If `swizzled` does not have [`swizzled_bytes`].
pub fn unswizzle(swizzled: &[u8], n_rows: usize, n_scales: usize) -> Vec<u8> {
    assert_eq!(swizzled.len(), swizzled_bytes(n_rows, n_scales), "swizzled scales of [{n_rows}, {n_scales}]");
    (0..n_rows * n_scales).map(|i| swizzled[swizzled_offset(i / n_scales, i % n_scales, n_scales)]).collect()
}

/// The smallest E4M3 number above zero.
const MIN_SCALE: f32 = 1.0 / 512.0;

/// The E4M3 code of 448.
const LARGEST_SCALE: u8 = 0x7e;

impl Encoded {
    fn with_room_for(x: &[f32], global: Global) -> Self {
        Self { codes: Vec::with_capacity(x.len() / 2), scales: Vec::with_capacity(x.len() / BLOCK), global }
    }

    fn push(&mut self, scale: u8, codes: [u8; BLOCK]) {
        self.scales.push(scale);
        self.codes.extend(e2m1::pack(&codes));
    }
}

fn whole_blocks(x: &[f32]) -> &[[f32; BLOCK]] {
    let (blocks, rest) = x.as_chunks();
    assert!(rest.is_empty(), "NVFP4 encodes whole blocks of {BLOCK}");
    blocks
}

/// v / unit where an underflown unit makes zero of zero, not NaN.
fn quotient(v: f32, unit: f32) -> f32 {
    if v == 0.0 { v } else { v / unit }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_conventions_mean_the_same_number() {
        assert_eq!(Global::Multiplier(0.125).multiplier(), Global::Divisor(8.0).multiplier());
    }

    #[test]
    fn tensors_of_zeros_decode_to_zeros() {
        let x = [0.0; 32];
        let dynamic = dynamic_global(&x).unwrap();
        for e in [encode_modelopt(&x), encode_compressed_tensors(&x), quantize_activations(&x, dynamic)] {
            let e = e.unwrap();
            let mut y = [f32::NAN; 32];
            decode_row(&e.codes, &e.scales, e.global.multiplier(), &mut y);
            assert_eq!(y, x);
        }
    }

    #[test]
    fn the_smallest_numbers_do_not_make_nan() {
        let mut x = [0.0; 16];
        (x[0], x[1]) = (f32::from_bits(1), -1e-37);
        let dynamic = dynamic_global(&x).unwrap();
        for e in [encode_modelopt(&x), encode_compressed_tensors(&x), quantize_activations(&x, dynamic)] {
            let e = e.unwrap();
            let mut y = [f32::NAN; 16];
            decode_row(&e.codes, &e.scales, e.global.multiplier(), &mut y);
            assert!(y.iter().all(|v| v.abs() <= 2e-37), "{y:?}");
        }
    }

    #[test]
    fn modelopt_clamps_a_faint_scale() {
        let mut x = [0.0; 32];
        (x[0], x[16]) = (1.0, 1e-7); // amax_block / (6 * global) is 4.5e-5, which rounds to zero in e4m3
        let e = encode_modelopt(&x).unwrap();
        assert_eq!((e.scales, e.codes[8]), (vec![0x7e, 0x01], 0)); // 2^-9; here the element is too small all the same
    }

    #[test]
    fn the_least_error_is_never_more_than_that_of_the_nearest_scale() {
        let error = |x: &[f32; 16], (codes, scale): ([u8; 8], u8), multiplier: f32| -> f64 {
            let mut y = [0.0; 16];
            decode(&codes, scale, multiplier, &mut y);
            x.iter().zip(y).map(|(a, b)| (f64::from(*a) - f64::from(b)).powi(2)).sum()
        };
        let (mut seed, mut better) = (1u32, 0);
        for case in 0..2000 {
            let x: [f32; 16] = std::array::from_fn(|_| {
                seed = seed.wrapping_mul(1664525).wrapping_add(1013904223);
                (seed >> 8) as f32 / 8388608.0 - 1.0
            });
            let x = x.map(|v| v * v * v * 2f32.powi(case % 40 - 20));
            let multiplier = amax(&x) / MAX * 2f32.powi(case % 12);
            let (nearest, least) = (encode_block(&x, multiplier), encode_block_least(&x, multiplier));
            let (nearest, least) = (error(&x, nearest, multiplier), error(&x, least, multiplier));
            assert!(least <= nearest, "{case}: {least} {nearest}");
            better += usize::from(least < nearest);
        }
        assert!(better > 800, "only {better} of 2000 became better: the search does nothing");
        assert_eq!(encode_block_least(&[0.0; 16], 0.0), encode_block(&[0.0; 16], 0.0));
        assert_eq!(encode_block_least(&[0.0; 16], 1.0), ([0; 8], 0x38));
    }

    #[test]
    fn casts_from_mxfp4_are_exact_over_eighteen_exponents() {
        let codes: Vec<u8> = (0..=255).cycle().take(16 * 20).collect();
        let scales: Vec<u8> = (0..20).map(|i| 130 - i).collect();
        let m = mxfp4_exponent(&codes, &scales).unwrap();
        assert_eq!(m, 3 - 8);
        let cast = from_mxfp4(&codes, &scales, m);
        assert_eq!((cast.n_inexact, &cast.codes[..16 * 18]), (2, &codes[..16 * 18]));
        let (mut theirs, mut ours) = (vec![0.0; 640], vec![0.0; 640]);
        mxfp4::decode_row(&codes, &scales, &mut theirs);
        decode_row(&cast.codes, &cast.scales, 2f32.powi(m), &mut ours);
        assert_eq!(ours[..576], theirs[..576]);
        // The blocks below are rounded to halves of their least unit.
        let unit = 2f32.powi(m - 9);
        for (a, b) in ours.iter().zip(&theirs) {
            assert!((a - b).abs() <= unit / 4.0 || a == b, "{a} {b}");
        }
        assert_eq!(mxfp4_exponent(&[0x80; 16], &[200]), None);
        assert_eq!(
            from_mxfp4(&[0x80; 16], &[200], 0),
            Cast { codes: vec![0x80; 16], scales: vec![0x78; 2], n_inexact: 0 }
        );
        // A block of zeros with a large scale does not push the others out.
        let (two, far) = ([[0x80; 16], [0x12; 16]].concat(), [250, 120]);
        assert_eq!(mxfp4_exponent(&two, &far), Some(120 - 127 - 8));
        assert_eq!(mxfp4_exponent(&[0x11; 16], &[0]), Some(-126));
    }

    #[test]
    fn nan_and_infinity_are_refused_by_place() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1.0; 32];
            x[19] = bad;
            assert_eq!(encode_modelopt(&x).unwrap_err().idx, 19);
            assert_eq!(encode_compressed_tensors(&x).unwrap_err().idx, 19);
            assert_eq!(dynamic_global(&x).unwrap_err().idx, 19);
            assert_eq!(quantize_activations(&x, Global::Multiplier(1.0)).unwrap_err().idx, 19);
        }
    }
}
