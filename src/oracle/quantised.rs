//! Known answers of NVFP4 and FP8 weights, and of activations that are quantised to NVFP4.

use super::*;
use crate::ops::{ActScale, Gate, GateUp, Input, InputScales, StageActivation, Staging, Swiglu, staged_words};

/// The E4M3 byte of 1.
const E4M3_ONE: u8 = 0x38;
/// The E4M3 bytes of 1, 2, 1/2, 4 and 8.
const POWERS: [(u8, f64); 5] = [(E4M3_ONE, 1.0), (0x40, 2.0), (0x30, 0.5), (0x48, 4.0), (0x50, 8.0)];

/// What a block of 16 may hold: each code, and each code but the other way, so that no two neighbours are alike.
fn each_code(k: usize) -> u8 {
    (if k % 32 < 16 { k % 16 } else { 15 - k % 16 }) as u8
}

/// The E4M3 byte's value.
fn e4m3_value(code: u8) -> f64 {
    f64::from(e4m3_units(code)) / 512.0
}

/// Two codes a byte, the even element in the low nibble.
fn nibbles(codes: impl Iterator<Item = u8>) -> Vec<u8> {
    let codes: Vec<u8> = codes.collect();
    codes.chunks_exact(2).map(|pair| pair[0] | pair[1] << 4).collect()
}

/// An NVFP4 matrix from the code of each element, the E4M3 byte of each block of 16, and the f32 of each row.
fn nvfp4(
    t: &Trial<'_>,
    [e, n, k]: [usize; 3],
    code: impl Fn(usize, usize) -> u8,
    scale: impl Fn(usize, usize) -> u8,
    row_scale: impl Fn(usize) -> f32,
) -> Result<Weight> {
    let rows = || 0..e * n;
    let codes = nibbles(rows().flat_map(|row| (0..k).map(move |i| (row, i))).map(|(row, i)| code(row, i)));
    let scales: Vec<u8> = rows().flat_map(|row| (0..k / 16).map(move |b| (row, b))).map(|(r, b)| scale(r, b)).collect();
    let row_scales: Vec<f32> = rows().map(row_scale).collect();
    t.weight(Format::Nvfp4, [e, n, k], [&codes, &scales], &row_scales)
}

/// All 127 scales above or at zero with all 16 codes in low and high nibbles, under row scales from 2^-3 to 2^3. No
/// scale stands beside its like, in a row or below.
pub(super) fn nvfp4_weights(t: &mut Trial<'_>) -> Result<()> {
    // 48: three scales a row, so that rows begin inside a word.
    let shapes: &[(usize, usize)] = if t.quick { &[(K, N)] } else { &[(K, N), (48, 43)] };
    for &(k, n) in shapes {
        let scale = |row: usize, block: usize| ((block * 32 + row * 5) % 127) as u8;
        let row_exponent = |row: usize| (row % 7) as i32 - 3;
        let w = nvfp4(t, [1, n, k], |_, i| each_code(i), scale, |row| exact(two_to(row_exponent(row))))?;
        let places: Vec<usize> = if t.quick { (0..48).map(|i| i * 21 % k).collect() } else { (0..k).collect() };
        let y = t.linear(&w, &one_hot(k, &places, |_| 1.0))?;
        let parts = |i: usize| (scale(i % n, places[i / n] / 16), each_code(places[i / n]), i % n);
        let want = |i: usize| {
            let (scale, code, row) = parts(i);
            code_value(code) * e4m3_value(scale) * two_to(row_exponent(row))
        };
        t.equal(&y, want, |i| format!("K {k}: scale {:#04x}, code {}, row {}", parts(i).0, parts(i).1, parts(i).2));
    }
    Ok(())
}

/// Each expert's gate and up have tensor scales of their own, said as a multiplier by some experts and as a divisor by
/// others. A gate of 256 or more has a sigmoid of 1. Then the second matrix, a scale for each expert.
pub(super) fn nvfp4_globals(t: &mut Trial<'_>) -> Result<()> {
    let (e, f, k) = (3, 9, 32);
    // As the file of one producer or of the other has it; 2^exponent is meant.
    let global = |expert: usize, exponent: i32| match expert % 2 {
        0 => nvfp4::Global::Multiplier(exact(two_to(exponent))).multiplier(),
        _ => nvfp4::Global::Divisor(exact(two_to(-exponent))).multiplier(),
    };
    let is_up = |row: usize| row % (2 * f) >= f;
    let exponent = |expert: usize, up: bool| if up { 4 - 3 * expert as i32 } else { expert as i32 + 1 };
    // Gates meet input 0, ups input 17.
    let code = |row: usize, i: usize| if i == if is_up(row) { 17 } else { 0 } { ONE } else { 0 };
    let row_scale = |row: usize| global(row / (2 * f), exponent(row / (2 * f), is_up(row)));
    let weight = nvfp4(t, [e, 2 * f, k], code, |_, _| E4M3_ONE, row_scale)?;
    let up = Experts { weight, bias: None, input_scale: None };
    let chosen: Vec<u32> = vec![2, 0, 1, 1, 2];
    let tokens = chosen.len();
    let input = |token: usize| uneven(token * 3 + 1);
    let h: Vec<f32> = (0..tokens * k)
        .map(|i| match i % k {
            0 => 256.0,
            17 => exact(input(i / k)),
            _ => 0.0,
        })
        .collect();
    let (experts, h, y) = (t.input(&chosen)?, t.input(&h)?, t.output(tokens * f)?);
    let mut p = program(tokens);
    p.moe_up(&up, Swiglu { a: 1, rows: GateUp::Halves, gate: Gate::Silu }, experts, (h, 1), y);
    let y = floats(&t.run(&p, y)?);
    let want = |i: usize| {
        let (token, expert) = (i / f, chosen[i / f] as usize);
        256.0 * two_to(exponent(expert, false)) * input(token) * two_to(exponent(expert, true))
    };
    t.near(&y, want, |_| 3.0, Some(ROUNDS_QUOTIENTS), |i| format!("gate and up of expert {}", chosen[i / f]));

    let d = 19;
    let weight = nvfp4(t, [e, d, k], |_, _| ONE, |_, _| E4M3_ONE, |row| global(row / d, 2 - row as i32 / d as i32))?;
    let down = Experts { weight, bias: None, input_scale: None };
    let x: Vec<f32> = (0..tokens * k).map(|i| (i / k + 1) as f32).collect();
    let (x, y) = (t.input(&x)?, t.output(tokens * d)?);
    let mut p = program(tokens);
    p.moe_down(&down, 1, experts, x, y);
    let y = floats(&t.run(&p, y)?);
    let want = |i: usize| (k * (i / d + 1)) as f64 * two_to(2 - chosen[i / d] as i32);
    t.equal(&y, want, |i| format!("down of expert {}", chosen[i / d]));
    Ok(())
}

/// All 254 E4M3 codes that are numbers, under row scales from 2^-4 to 2^4.
pub(super) fn fp8_weights(t: &mut Trial<'_>) -> Result<()> {
    // One byte further in every row, so that a code meets all places of a word.
    let code = |row: usize, i: usize| number((i + row) as u8);
    let row_scale = |row: usize| two_to((row % 9) as i32 - 4);
    let codes: Vec<u8> = (0..N * K).map(|i| code(i / K, i % K)).collect();
    let row_scales: Vec<f32> = (0..N).map(|row| exact(row_scale(row))).collect();
    let w = t.weight(Format::Fp8, [1, N, K], [&codes, &[]], &row_scales)?;
    let y = t.linear(&w, &one_hot(K, &(0..K).collect::<Vec<_>>(), |_| 1.0))?;
    let parts = |i: usize| (code(i % N, i / N), i % N);
    let want = |i: usize| e4m3_value(parts(i).0) * row_scale(parts(i).1);
    t.equal(&y, want, |i| format!("code {:#04x}, row {}", parts(i).0, parts(i).1));
    Ok(())
}

/// The code, or 0 in the place of a NaN.
fn number(code: u8) -> u8 {
    if code & 0x7f == 0x7f { 0 } else { code }
}

/// Blocks of 128, each with a power of two of its own.
pub(super) fn fp8_blocks(t: &mut Trial<'_>) -> Result<()> {
    let (n, k) = (24, 384);
    let code = |row: usize, i: usize| number((i * 37 + row * 11) as u8);
    let scale = |row: usize, block: usize| two_to(((row + 5 * block) % 13) as i32 - 6);
    let codes: Vec<u8> = (0..n * k).map(|i| code(i / k, i % k)).collect();
    let scales: Vec<u8> = (0..n * 3).flat_map(|i| exact(scale(i / 3, i % 3)).to_le_bytes()).collect();
    let w = t.weight(Format::Fp8Blocks, [1, n, k], [&codes, &scales], &[])?;
    let y = t.linear(&w, &one_hot(k, &(0..k).collect::<Vec<_>>(), |_| 1.0))?;
    let want = |i: usize| e4m3_value(code(i % n, i / n)) * scale(i % n, i / n / 128);
    t.equal(&y, want, |i| format!("row {}, element {}", i % n, i / n));
    Ok(())
}

/// Elements of the rows that are quantised here: four blocks, one word of scales.
const STAGED_K: usize = 64;

/// What `stage_activation` made of rows: by row, four scale bytes and 64 codes, the row's scale, amax and clipped blocks.
struct Staged {
    scales: Vec<u32>,
    codes: Vec<u32>,
    row_scales: Vec<u32>,
    amax: Vec<u32>,
    clipped: Vec<u32>,
}

/// Quantise `x [T, 64]`, each row `share` times; with a static scale, or one of several by the row's expert.
fn stage(t: &mut Trial<'_>, x: &[f32], scale: ActScale, share: usize, given: (&[f32], &[u32])) -> Result<Staged> {
    let tokens = x.len() / STAGED_K;
    let rows = tokens * share;
    let to = Staging {
        rows: t.output(rows * staged_words(STAGED_K))?,
        scales: t.output(rows)?,
        report: t.output(rows * 2)?,
        amaxes: t.output(rows)?,
    };
    let step = t.input(&[Step { tokens: tokens as u32, pad: [0; 3] }])?;
    let x = t.input(x)?;
    let given = match given {
        ([], _) => None,
        (scales, []) => Some(InputScales { scales: t.input(scales)?, experts: None }),
        (scales, experts) => Some(InputScales { scales: t.input(scales)?, experts: Some(t.input(experts)?) }),
    };
    let op = StageActivation { k: STAGED_K as u32, rows_per_token: share as u32, share: share as u32, scale };
    let mut p = program(tokens);
    p.stage_activation(op, step, x, given, &to);
    let words = t.run(&p, to.rows)?;
    let report = t.read(to.report)?;
    let row = |row: usize| &words[row * staged_words(STAGED_K)..][..staged_words(STAGED_K)];
    let scales = (0..rows * 4).map(|i| row(i / 4)[0] >> (8 * (i % 4)) & 255).collect();
    let codes = (0..rows * 64).map(|i| row(i / 64)[1 + i % 64 / 8] >> (4 * (i % 8)) & 15).collect();
    let [amax, clipped] = [0, 1].map(|at| report.iter().skip(at).step_by(2).copied().collect());
    Ok(Staged { scales, codes, row_scales: t.read(to.scales)?, amax, clipped })
}

impl Staged {
    /// Each word as it should be, floats by their bits.
    fn check(&self, t: &mut Trial<'_>, what: &str, want: &Staged) {
        t.same(&self.scales, &want.scales, |i| format!("{what}: scale of row {}, block {}", i / 4, i % 4));
        t.same(&self.codes, &want.codes, |i| format!("{what}: code of row {}, element {}", i / 64, i % 64));
        t.same(&self.row_scales, &want.row_scales, |i| format!("{what}: scale of row {i}"));
        t.same(&self.amax, &want.amax, |i| format!("{what}: amax of row {i}"));
        t.same(&self.clipped, &want.clipped, |i| format!("{what}: clipped blocks of row {i}"));
    }
}

fn bits(values: impl IntoIterator<Item = f64>) -> Vec<u32> {
    values.into_iter().map(|v| exact(v).to_bits()).collect()
}

/// Blocks under the static scale 1/2, their elements with the code that each becomes: all ties of E2M1 and what lies on
/// both sides of them, ties of E4M3 (17 and 19), saturation at 6, at 448 and past it, blocks of zeros, blocks so faint
/// that their scale is 0, and what is just not.
pub(super) fn stage_activation(t: &mut Trial<'_>) -> Result<()> {
    type Block<'a> = (u32, &'a [(f32, u32)]);
    let (up, down) = (|v: f32| v.next_up(), |v: f32| v.next_down());
    // The scale is 1 and so a unit is 1/2: 0.125 is the middle between 0 and 0.5, and so on.
    let ties: Block<'_> = (
        0x38,
        &[
            (3.0, 7),
            (0.125, 0),
            (0.375, 2),
            (0.625, 2),
            (0.875, 4),
            (1.25, 4),
            (1.75, 6),
            (2.5, 6),
            (-3.0, 15),
            (-0.125, 8),
            (-0.375, 10),
            (-0.625, 10),
            (-0.875, 12),
            (-1.25, 12),
            (-1.75, 14),
            (-2.5, 14),
        ],
    );
    let beside = [
        (3.0, 7),
        (up(0.125), 1),
        (down(0.125), 0),
        (up(0.375), 2),
        (down(0.375), 1),
        (up(0.625), 3),
        (down(0.625), 2),
        (up(0.875), 4),
        (down(0.875), 3),
        (up(1.25), 5),
        (down(1.25), 4),
        (up(1.75), 6),
        (down(1.75), 5),
        (up(2.5), 7),
        (down(2.5), 6),
    ];
    let beside: Block<'_> = (0x38, &beside);
    let zeros: Block<'_> = (0, &[]);
    let rows: [([Block<'_>; 4], f64, f64); 5] = [
        // amax 51 asks for the scale 17: 16 is even. A unit is 8.
        ([ties, beside, zeros, (0x58, &[(51.0, 7), (-8.0, 10), (4.0, 1), (2.0, 0)])], 51.0, 0.0),
        // 57 asks for 19: 20 is even. 1344 asks for 448, 1392 for 464, which still rounds there, 1395 for 465.
        (
            [
                (0x5a, &[(57.0, 7), (40.0, 6), (-20.0, 12), (10.0, 2)]),
                (0x7e, &[(1344.0, 7), (-224.0, 10)]),
                (0x7e, &[(1392.0, 7), (-224.0, 10)]),
                (0x7e, &[(-1395.0, 15), (448.0, 4)]),
            ],
            1395.0,
            1.0,
        ),
        ([zeros; 4], 0.0, 0.0),
        // 3 x 2^-10 asks for 2^-10, half of the least scale: 0 is even. Twice that is the least scale.
        (
            [
                (0, &[(3.0 / 1024.0, 0), (1.5 / 1024.0, 0)]),
                (1, &[(6.0 / 1024.0, 7), (-1.0 / 1024.0, 10)]),
                (0x7e, &[(1e30, 7), (224.0, 2)]),
                (0x7e, &[(-2688.0, 15), (112.0, 1)]),
            ],
            f64::from(1e30f32),
            2.0,
        ),
        ([zeros, zeros, zeros, (0x38, &[(3.0, 7)])], 3.0, 0.0),
    ];
    let element = |i: usize| {
        let block = rows[i / 64].0[i % 64 / 16].1;
        block.get(i % 16).copied().unwrap_or((0.0, 0))
    };
    let n = rows.len() * 64;
    let x: Vec<f32> = (0..n).map(|i| element(i).0).collect();
    let want = Staged {
        scales: rows.iter().flat_map(|(blocks, ..)| blocks.map(|(scale, _)| scale)).collect(),
        codes: (0..n).map(|i| element(i).1).collect(),
        row_scales: bits(rows.iter().map(|_| 0.5)),
        amax: bits(rows.iter().map(|(_, amax, _)| *amax)),
        clipped: bits(rows.iter().map(|(.., clipped)| *clipped)),
    };
    let got = stage(t, &x, ActScale::Static, 1, (&[0.5], &[]))?;
    got.check(t, "one static scale", &want);
    Ok(())
}

/// Row t is 2^t times a row whose own scale is 2^-3, its blocks with E4M3 scales 448, 4, none and 64. Under the scale 2^e
/// the block scales move by j = t - 3 - e exponents, which is 8 j in their code; past 448 they saturate, and the block's
/// elements come out 2^j times as large, at most 6.
pub(super) fn act_scales(t: &mut Trial<'_>) -> Result<()> {
    let blocks: [(u32, f64); 4] = [(0x7e, 56.0), (0x48, 0.5), (0, 0.0), (0x68, 8.0)];
    let tokens = 4;
    let element = |i: usize| code_value((i % 16) as u8) * blocks[i % 64 / 16].1 * two_to((i / 64) as i32);
    let x: Vec<f32> = (0..tokens * 64).map(|i| exact(element(i) + 0.0)).collect(); // no negative zeros
    // For each row of the result: the row that it reads, and e.
    let want = |rows: &[(usize, i32)]| {
        let shift = |row: usize| rows[row].0 as i32 - 3 - rows[row].1;
        let code = |i: usize| {
            let (row, block, code) = (i / 64, i % 64 / 16, (i % 16) as u32);
            let times = if block == 0 { shift(row).clamp(0, 2) as u32 } else { 0 };
            // Codes of a magnitude once doubled, by code; 6 stays 6.
            let doubled = (0..times).fold(code & 7, |code, _| [0, 2, 4, 5, 6, 7, 7, 7][code as usize]);
            // The pattern's code 8 is a plain zero; there is nothing in the block of zeros.
            if block == 2 || doubled == 0 { 0 } else { doubled | code & 8 }
        };
        Staged {
            scales: (0..rows.len() * 4)
                .map(|i| match blocks[i % 4].0 {
                    0 => 0,
                    scale => (scale as i32 + 8 * shift(i / 4)).min(0x7e) as u32,
                })
                .collect(),
            codes: (0..rows.len() * 64).map(code).collect(),
            row_scales: bits(rows.iter().map(|(_, e)| two_to(*e))),
            amax: bits(rows.iter().map(|(row, _)| 336.0 * two_to(*row as i32))),
            clipped: bits((0..rows.len()).map(|row| if shift(row) > 0 { 1.0 } else { 0.0 })),
        }
    };
    let each = |e: fn(usize) -> i32| (0..tokens).map(|row| (row, e(row))).collect::<Vec<_>>();
    let got = stage(t, &x, ActScale::Token, 1, (&[], &[]))?;
    got.check(t, "a scale a token", &want(&each(|row| row as i32 - 3)));
    let got = stage(t, &x, ActScale::Tensor, 1, (&[], &[]))?;
    got.check(t, "a scale for all", &want(&each(|_| 0)));
    let got = stage(t, &x, ActScale::Static, 1, (&[0.25], &[]))?;
    got.check(t, "a static scale", &want(&each(|_| -2)));
    // Expert n has the scale 2^(n - 3); two routes read each row.
    let experts = [0, 3, 1, 2, 2, 1, 1, 3];
    let rows: Vec<(usize, i32)> = experts.iter().enumerate().map(|(route, n)| (route / 2, *n as i32 - 3)).collect();
    let got = stage(t, &x, ActScale::Expert, 2, (&[0.125, 0.25, 0.5, 1.0], &experts))?;
    got.check(t, "a scale an expert", &want(&rows));
    Ok(())
}

/// The product of an NVFP4 matrix with rows that hold these codes and scales: `[T, N]`.
fn product(
    t: &mut Trial<'_>,
    w: &Weight,
    rows: usize,
    code: impl Fn(usize, usize) -> u8,
    scale: impl Fn(usize, usize) -> u8,
    row_scale: impl Fn(usize) -> f64,
) -> Result<Vec<f32>> {
    let k = w.k as usize;
    let mut bytes = Vec::new();
    for row in 0..rows {
        // Scales in whole words, then the codes.
        let mut scales: Vec<u8> = (0..k / 16).map(|block| scale(row, block)).collect();
        scales.resize(k.div_ceil(64) * 4, 0);
        bytes.extend(scales);
        bytes.extend(nibbles((0..k).map(|i| code(row, i))));
    }
    let scales: Vec<f32> = (0..rows).map(|row| exact(row_scale(row))).collect();
    let x = Input::Nvfp4 { rows: t.input(&bytes)?, scales: t.input(&scales)? };
    let step = t.input(&[Step { tokens: rows as u32, pad: [0; 3] }])?;
    let y = t.output(rows * w.n as usize)?;
    let mut p = program(rows);
    p.linear(step, w, None, x, y);
    Ok(floats(&t.run(&p, y)?))
}

/// The reference's own values: 1.5 x 1.5 over K 32 is 72; a row of one code times ones over K 64 is 64 times its value; then
/// one element at a time, with all scales powers of two and all different.
pub(super) fn fp4_products(t: &mut Trial<'_>) -> Result<()> {
    let w = nvfp4(t, [1, 5, 32], |_, _| 3, |_, _| E4M3_ONE, |_| 1.0)?;
    let y = product(t, &w, 9, |_, _| 3, |_, _| E4M3_ONE, |_| 1.0)?;
    t.equal(&y, |_| 72.0, |i| format!("1.5 x 1.5 over K 32, {}", cell(5)(i)));
    let w = nvfp4(t, [1, 16, 64], |row, _| row as u8, |_, _| E4M3_ONE, |_| 1.0)?;
    let y = product(t, &w, 3, |_, _| ONE, |_, _| E4M3_ONE, |_| 1.0)?;
    t.equal(&y, |i| 64.0 * code_value((i % 16) as u8), |i| format!("code {} over K 64", i % 16));

    // Five blocks: two words of scales, the second with one scale and padding.
    let (n, k) = (17, 80);
    let code = |row: usize, i: usize| ((row * 5 + i * 3 + i / 16) % 16) as u8;
    let own = |row: usize, block: usize| POWERS[(row + block) % 5];
    let theirs = |row: usize, block: usize| POWERS[(row / 16 + 2 * block + 1) % 5];
    let exponent = |row: usize| (row % 7) as i32 - 3;
    let w = nvfp4(t, [1, n, k], code, |row, block| own(row, block).0, |row| exact(two_to(exponent(row))))?;
    let hot = |row: usize, i: usize| if i == row { 4 } else { 0 };
    let y = product(t, &w, k, hot, |row, block| theirs(row, block).0, |row| two_to(2 - exponent(row)))?;
    let want = |i: usize| {
        let (place, row) = (i / n, i % n);
        let scales = own(row, place / 16).1 * theirs(place, place / 16).1 * two_to(exponent(row) + 2 - exponent(place));
        2.0 * code_value(code(row, place)) * scales
    };
    t.equal(&y, want, |i| format!("element {}, output {}", i / n, i % n));
    Ok(())
}
