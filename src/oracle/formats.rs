//! Known answers of the scalar code that reads and writes number formats.

use super::*;

/// The E4M3 code's value in units of 2^-9.
pub(super) fn e4m3_units(code: u8) -> i32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), i32::from(code & 7));
    let units = if exponent == 0 { mantissa } else { (8 + mantissa) << (exponent - 1) };
    if code & 0x80 == 0 { units } else { -units }
}

pub(super) fn e4m3_case(t: &mut Trial<'_>) -> Result<()> {
    e4m3_values(t, e4m3::decode, e4m3::encode);
    Ok(())
}

/// All codes; the tie between all neighbours, and what lies next to it.
pub(super) fn e4m3_values(t: &mut Trial<'_>, decode: impl Fn(u8) -> f32, encode: impl Fn(f32) -> u8) {
    let finite: Vec<u8> = (0..=255).filter(|code| code & 0x7f != 0x7f).collect();
    let got: Vec<f32> = finite.iter().map(|code| decode(*code)).collect();
    t.equal(&got, |i| f64::from(e4m3_units(finite[i])) / 512.0, |i| format!("code {:#04x}", finite[i]));
    if !(decode(0x7f).is_nan() && decode(0xff).is_nan()) {
        t.wrong(|| "codes 0x7f and 0xff are not NaN".to_owned());
    }
    for code in 0..0x7eu8 {
        // In units of 2^-10 the middle is an integer.
        let middle = f64::from(e4m3_units(code) + e4m3_units(code + 1)) / 1024.0;
        let even = code + code % 2;
        let tie = exact(middle);
        for (x, want) in [(tie, even), (-tie, even | 0x80), (tie.next_down(), code), (tie.next_up(), code + 1)] {
            let got = encode(x);
            if got != want {
                t.wrong(|| format!("{x:e} rounds to {got:#04x}, want {want:#04x}"));
            }
        }
    }
    for (x, want) in [(448.0, 0x7e), (464.0, 0x7e), (1e30, 0x7e), (-1e30, 0xfe)] {
        let got = encode(x);
        if got != want {
            t.wrong(|| format!("{x:e} rounds to {got:#04x}, want {want:#04x}"));
        }
    }
}

pub(super) fn nvfp4_case(t: &mut Trial<'_>) -> Result<()> {
    nvfp4_blocks(t, nvfp4::decode_row);
    nvfp4_swizzle(t, nvfp4::swizzled_offset);
    nvfp4_round_trip(t, nvfp4::swizzle, nvfp4::unswizzle);
    Ok(())
}

/// Uniform 1.5 sums to 72 over K 32; all codes with all scales; each element at its place.
pub(super) fn nvfp4_blocks(t: &mut Trial<'_>, decode_row: impl Fn(&[u8], &[u8], f32, &mut [f32])) {
    let mut y = vec![f32::NAN; 32];
    decode_row(&[0x33; 16], &[0x38; 2], 1.0, &mut y);
    let sum: f64 = y.iter().map(|v| f64::from(*v) * 1.5).sum();
    t.equal(&[sum as f32], |_| 72.0, |_| "1.5 x 1.5 over K 32".to_owned());
    // 127 blocks, one for each positive scale; codes ascending, then the multiplier 2^-3.
    let scales: Vec<u8> = (0..0x7f).collect();
    let mut y = vec![f32::NAN; 127 * 16];
    let block = [0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe];
    decode_row(&block.repeat(127), &scales, 0.125, &mut y);
    let want = |i: usize| code_value((i % 16) as u8) * f64::from(e4m3_units((i / 16) as u8)) / 4096.0;
    t.equal(&y, want, |i| format!("scale {:#04x}, code {}", i / 16, i % 16));
    // One code of 1 at each of 48 places, three blocks with scales 1, 2 and 4.
    for place in 0..48 {
        let mut codes = [0; 24];
        codes[place / 2] = if place % 2 == 0 { ONE } else { ONE << 4 };
        let mut y = vec![f32::NAN; 48];
        decode_row(&codes, &[0x38, 0x40, 0x48], 1.0, &mut y);
        let want = |i: usize| if i == place { two_to((place / 16) as i32) } else { 0.0 };
        t.equal(&y, want, |i| format!("a code at {place}: element {i}"));
    }
}

/// 128x4 order is `[M/128, 4, 32, K/4, 4]` with its axes in the order 0, 3, 2, 1, 4: counted out, place by place.
pub(super) fn nvfp4_swizzle(t: &mut Trial<'_>, offset: impl Fn(usize, usize, usize) -> usize) {
    let (m_tiles, k_tiles) = (2, 3);
    let mut at = 0;
    for m_tile in 0..m_tiles {
        for k_tile in 0..k_tiles {
            for m_low in 0..32 {
                for m_high in 0..4 {
                    for k_low in 0..4 {
                        let (row, k) = (m_tile * 128 + m_high * 32 + m_low, k_tile * 4 + k_low);
                        let got = offset(row, k, k_tiles * 4);
                        if got != at {
                            t.wrong(|| format!("scale {k} of row {row} at {got}, want {at}"));
                        }
                        at += 1;
                    }
                }
            }
        }
    }
}

/// Row, scale, offset.
type Place = (usize, usize, usize);
/// Rows, scales a row; then places with their offsets, worked out by hand from
/// `((row/128) ceil(scales/4) + k/4) 512 + (row%32) 16 + (row%128)/32 4 + k%4`.
const OFFSETS: [(usize, usize, &[Place]); 3] = [
    (
        256,
        8,
        &[
            (0, 0, 0),
            (1, 0, 16),
            (31, 3, 499),
            (32, 0, 4),
            (33, 1, 21),
            (127, 3, 511),
            (0, 4, 512),
            (128, 0, 1024),
            (129, 5, 1553),
            (255, 7, 2047),
        ],
    ),
    (130, 5, &[(0, 3, 3), (0, 4, 512), (127, 4, 1020), (128, 0, 1024), (129, 4, 1552)]),
    (131, 1, &[(0, 0, 0), (96, 0, 12), (130, 0, 544)]),
];

/// Every scale has a number of its own, its low and its high byte swizzled one after the other: each lies at its offset,
/// the padding is zero, and all come back.
pub(super) fn nvfp4_round_trip(
    t: &mut Trial<'_>,
    swizzle: impl Fn(&[u8], usize, usize) -> Vec<u8>,
    unswizzle: impl Fn(&[u8], usize, usize) -> Vec<u8>,
) {
    for (rows, n, places) in OFFSETS {
        let halves = [0, 8].map(|shift| (1..=rows * n).map(|i| (i >> shift) as u8).collect::<Vec<_>>());
        let swizzled = halves.each_ref().map(|half| swizzle(half, rows, n));
        let whole = |[low, high]: &[Vec<u8>; 2], at: usize| match (low.get(at), high.get(at)) {
            (Some(low), Some(high)) => usize::from(*low) | usize::from(*high) << 8,
            _ => usize::MAX,
        };
        let bytes = rows.div_ceil(128) * 128 * n.div_ceil(4) * 4;
        if swizzled.iter().any(|half| half.len() != bytes) {
            t.wrong(|| format!("{rows} rows of {n}: got {} bytes, want {bytes}", swizzled[0].len()));
        }
        for (row, k, at) in places {
            let (got, want) = (whole(&swizzled, *at), row * n + k + 1);
            if got != want {
                t.wrong(|| format!("{rows} rows of {n}, scale {k} of row {row} at {at}: got {got}, want {want}"));
            }
        }
        let kept = (0..bytes).filter(|at| whole(&swizzled, *at) != 0).count();
        let back = swizzled.each_ref().map(|half| if half.len() == bytes { unswizzle(half, rows, n) } else { vec![] });
        if kept != rows * n || back != halves {
            t.wrong(|| format!("{rows} rows of {n}: got {kept} scales, not all {} as they were", rows * n));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::Cpu;

    /// Whether scalar code fails a case of the host.
    fn fails(case: impl Fn(&mut Trial<'_>)) -> bool {
        let device: Arc<dyn Device> = Arc::new(Cpu::default());
        let mut trial =
            Trial { device: &device, quick: false, buffers: vec![], notes: vec![], first: None, n_wrong: 0 };
        case(&mut trial);
        trial.n_wrong > 0
    }

    #[test]
    fn cases_of_the_host_notice_wrong_code() {
        assert!(!fails(|t| e4m3_values(t, e4m3::decode, e4m3::encode)));
        assert!(fails(|t| e4m3_values(t, |code| e4m3::decode(code) * 2.0, e4m3::encode)));
        assert!(fails(|t| e4m3_values(t, |code| if code == 0xff { 480.0 } else { e4m3::decode(code) }, e4m3::encode)));
        let truncates =
            |x: f32| if e4m3::decode(e4m3::encode(x)).abs() > x.abs() { e4m3::encode(x) - 1 } else { e4m3::encode(x) };
        assert!(fails(|t| e4m3_values(t, e4m3::decode, truncates)));
        assert!(!fails(|t| nvfp4_blocks(t, nvfp4::decode_row)));
        let swapped = |codes: &[u8], scales: &[u8], global: f32, out: &mut [f32]| {
            let codes: Vec<u8> = codes.iter().map(|c| c.rotate_left(4)).collect();
            nvfp4::decode_row(&codes, scales, global, out);
        };
        assert!(fails(|t| nvfp4_blocks(t, swapped)));
        let inverted = |codes: &[u8], scales: &[u8], global: f32, out: &mut [f32]| {
            nvfp4::decode_row(codes, scales, 1.0 / global, out);
        };
        assert!(fails(|t| nvfp4_blocks(t, inverted)));
        assert!(!fails(|t| nvfp4_swizzle(t, nvfp4::swizzled_offset)));
        assert!(fails(|t| nvfp4_swizzle(t, |row, k, n| row * n + k)));
        assert!(!fails(|t| nvfp4_round_trip(t, nvfp4::swizzle, nvfp4::unswizzle)));
        // Never swizzled; swizzled twice; back in another way; rows not padded.
        let padded = |scales: &[u8], rows: usize, n: usize| {
            let mut out = scales.to_vec();
            out.resize(nvfp4::swizzled_bytes(rows, n), 0);
            out
        };
        assert!(fails(|t| nvfp4_round_trip(t, padded, |scales, rows, n| scales[..rows * n].to_vec())));
        let twice = |scales: &[u8], rows: usize, n: usize| {
            let once = nvfp4::swizzle(scales, rows, n);
            nvfp4::swizzle(&once, rows.next_multiple_of(128), n.next_multiple_of(4))
        };
        assert!(fails(|t| nvfp4_round_trip(t, twice, nvfp4::unswizzle)));
        assert!(fails(|t| nvfp4_round_trip(t, nvfp4::swizzle, |scales, rows, n| scales[..rows * n].to_vec())));
        let short = |scales: &[u8], rows: usize, n: usize| {
            let mut out = nvfp4::swizzle(scales, rows, n);
            out.truncate(rows * n.next_multiple_of(4));
            out
        };
        assert!(fails(|t| nvfp4_round_trip(t, short, nvfp4::unswizzle)));
    }

    #[test]
    fn a_unit_of_the_last_place_is_that_of_f32() {
        assert_eq!(ulps(1.0f32.next_up(), 1.0), 1.0);
        assert_eq!(ulps(0.5f32.next_up(), 0.5), 1.0);
        assert_eq!(ulps(f32::from_bits(1), 0.0), 1.0);
        assert!(ulps(f32::NAN, 1.0).is_nan() && ulps(f32::INFINITY, 1.0) > 1e30);
    }
}
