//! Known answers of matmuls, embedding, routing, experts and scatter.

use super::*;
use crate::ops::{Group, Routing, Swiglu};

/// Weights 1.5 and inputs 1.5: 2.25 K, as in seed 2's "72.0 = 1.5^2 x K".
pub(super) fn uniform_fp4(t: &mut Trial<'_>) -> Result<()> {
    let shapes: &[(usize, usize, usize)] = if t.quick {
        &[(9, K, N)]
    } else {
        &[(9, K, N), (1, 32, 5), (9, 32, 5), (1, 64, 5), (9, 64, 5), (1, 2880, 5), (9, 2880, 5)]
    };
    for &(rows, k, n) in shapes {
        let w = t.mxfp4([1, n, k], |_, _| 3, |_, _| UNIT)?;
        let y = t.linear(&w, &vec![1.5; rows * k])?;
        t.equal(&y, |_| 2.25 * k as f64, |i| format!("T {rows}, K {k}, {}", cell(n)(i)));
    }
    Ok(())
}

/// Weight row n holds code n mod 16 and scale 2^(n mod 3): K times the code's value, in column n.
pub(super) fn column_dependent(t: &mut Trial<'_>) -> Result<()> {
    let (rows, n, k) = (3, 43, 64);
    let w = t.mxfp4([1, n, k], |row, _| (row % 16) as u8, |row, _| UNIT + (row % 3) as u8)?;
    let y = t.linear(&w, &vec![1.0; rows * k])?;
    let want = |i: usize| (k as f64) * code_value((i % n % 16) as u8) * two_to((i % n % 3) as i32);
    t.equal(&y, want, cell(n));
    Ok(())
}

/// Position k of a row spells k in binary over eight outputs (and its complement over eight more), so that an input of
/// one element reads back which weight it met.
pub(super) fn element_order(t: &mut Trial<'_>) -> Result<()> {
    let bit = |row: usize, k: usize| row < 16 && (k >> (row % 8) & 1 == 1) == (row < 8);
    // The scale differs from block to block and row to row, so that a shifted scale shows as well.
    let scale = |row: usize, block: usize| UNIT + ((row + 3 * block) % 8) as u8;
    let w = t.mxfp4([1, N, K], |row, k| if bit(row, k) { ONE } else { 0 }, scale)?;
    let places: Vec<usize> = if t.quick { (0..40).map(|i| i * 37 % K).collect() } else { (0..K).collect() };
    let y = t.linear(&w, &one_hot(K, &places, |_| 1.0))?;
    let want = |i: usize| {
        let (row, k) = (i % N, places[i / N]);
        if bit(row, k) { two_to(((row + 3 * (k / 32)) % 8) as i32) } else { 0.0 }
    };
    let read = |i: usize| {
        let row = &y[i / N * N..][..8];
        (0..8).filter(|bit| row[*bit] != 0.0).map(|bit| 1 << bit).sum::<usize>()
    };
    t.equal(&y, want, |i| format!("element {} reads weight {}, output {}", places[i / N], read(i), i % N));
    Ok(())
}

/// Every scale byte 0..=252 with every code twice, in a low and in a high nibble. The input undoes most of the scale,
/// so that no result is subnormal or infinite.
pub(super) fn codes_and_scales(t: &mut Trial<'_>) -> Result<()> {
    // Block b of row n has scale 32 b + n. From 253 on a weight of 6 is above what f32 holds, and 255 is NaN.
    let scale = |row: usize, block: usize| (block * 32 + row).min(252);
    // Codes 0..=15 upwards, then downwards: the parity of a code's place changes.
    let code = |k: usize| if k % 32 < 16 { k % 16 } else { 15 - k % 16 } as u8;
    let w = t.mxfp4([1, N, K], |_, k| code(k), |row, block| scale(row, block) as u8)?;
    let undo = |k: usize| 111 - 32 * (k / 32) as i32;
    let places: Vec<usize> = if t.quick { (0..48).map(|i| i * 21 % K).collect() } else { (0..K).collect() };
    let y = t.linear(&w, &one_hot(K, &places, |k| exact(two_to(undo(k)))))?;
    let parts = |i: usize| (scale(i % N, places[i / N] / 32), code(places[i / N]));
    let want = |i: usize| {
        let (scale, code) = parts(i);
        code_value(code) * two_to(scale as i32 - 127) * two_to(undo(places[i / N]))
    };
    // Scale 0 is 2^-127, subnormal: zero will do.
    let flushed = |i: usize| parts(i).0 == 0 && y[i] == 0.0 && want(i) != 0.0;
    if (0..y.len()).any(flushed) {
        t.note(FLUSHES_SCALES);
    }
    let want = |i: usize| if flushed(i) { 0.0 } else { want(i) };
    t.equal(&y, want, |i| format!("scale {}, code {}", parts(i).0, parts(i).1));
    Ok(())
}

/// Results from 2^-126 on, made by the smallest normal scale.
pub(super) fn smallest_normal(t: &mut Trial<'_>) -> Result<()> {
    let w = t.mxfp4([1, N, K], |row, _| 2 + (row % 6) as u8, |row, _| 1 + (row / 6) as u8)?;
    let y = t.linear(&w, &one_hot(K, &[0, 77, 140, 255], |_| 1.0))?;
    let want = |i: usize| code_value(2 + (i % N % 6) as u8) * two_to((i % N / 6) as i32 - 126);
    t.equal(&y, want, cell(N));
    Ok(())
}

/// Every lane adds one power of two, each its own: the sum is all ones, whatever the order, and only if every lane is
/// there once. Rows differ by a factor, so that lanes of another row show.
pub(super) fn reduction_tree(t: &mut Trial<'_>) -> Result<()> {
    // Lanes 0..=3 have the powers 2^-1..=2^2 by code, and 16 times that by the next block's scale; four blocks are
    // two elements' groups of every lane.
    let w = t.mxfp4([1, N, K], |_, k| [1, ONE, 4, 6][k / 8 % 4], |row, block| UNIT + (row + 4 * (block % 4)) as u8)?;
    let mut x = vec![0.0; 16 * K];
    for row in 0..16 {
        // Row t takes element t mod 8 of each group of eight, in the first or second half of the row.
        for k in (0..K).filter(|k| k % 8 == row % 8 && k / 128 == row / 8) {
            x[row * K + k] = 1.0;
        }
    }
    let y = t.linear(&w, &x)?;
    t.equal(&y, |i| 32767.5 * two_to((i % N) as i32), cell(N));
    Ok(())
}

/// All 65280 finite bf16 patterns, by their bits.
pub(super) fn finite_bf16() -> Vec<u16> {
    (0..=u16::MAX).filter(|bits| bits & 0x7f80 != 0x7f80).collect()
}

pub(super) fn bytes_of(bits: &[u16]) -> Vec<u8> {
    bits.iter().flat_map(|b| b.to_le_bytes()).collect()
}

/// The table holds all finite bf16 patterns; the rows come out as they are, bit for bit.
pub(super) fn bf16_embed(t: &mut Trial<'_>) -> Result<()> {
    let (patterns, d) = (finite_bf16(), 256);
    let tokens = patterns.len() / d;
    let table = t.bf16_bytes([tokens, d], &bytes_of(&patterns))?;
    // Backwards, so that a row is not found at its own place.
    let row = |i: usize| Row { token: (tokens - 1 - i) as u32, sequence: 0, position: 0, pad: 0 };
    let rows: Vec<Row> = (0..tokens).map(row).collect();
    let (rows, x) = (t.input(&rows)?, t.output(tokens * d)?);
    let mut p = program(tokens);
    p.embed(&table, rows, x);
    let got = t.run(&p, x)?;
    let pattern = |i: usize| patterns[(tokens - 1 - i / d) * d + i % d];
    let mut want: Vec<u32> = (0..got.len()).map(|i| u32::from(pattern(i)) << 16).collect();
    for (got, want) in got.iter().zip(&mut want) {
        let subnormal = *want << 1 != 0 && *want & 0x7f80_0000 == 0;
        if subnormal && got << 1 == 0 {
            *want = *got;
            t.note(FLUSHES_BF16);
        }
    }
    t.same(&got, &want, |i| format!("bf16 {:#06x}", pattern(i)));
    Ok(())
}

/// The same patterns as weights, met by one input at a time.
pub(super) fn bf16_linear(t: &mut Trial<'_>) -> Result<()> {
    let patterns = finite_bf16();
    let (n, k) = (patterns.len() / 16, 16);
    let w = t.bf16_bytes([n, k], &bytes_of(&patterns))?;
    let every: Vec<usize> = (0..k).collect();
    let y = t.linear(&w, &one_hot(k, &every, |_| 1.0))?;
    let pattern = |i: usize| patterns[i % n * k + i / n];
    let want = |i: usize| f64::from(f32::from_bits(u32::from(pattern(i)) << 16));
    let flushed = |i: usize| y[i] == 0.0 && want(i) != 0.0 && pattern(i) & 0x7f80 == 0;
    if (0..y.len()).any(flushed) {
        t.note(FLUSHES_BF16);
    }
    let want = |i: usize| if flushed(i) { 0.0 } else { want(i) };
    t.equal(&y, want, |i| format!("bf16 {:#06x}", pattern(i)));
    Ok(())
}

/// Integer inner products, up to 2^24 exactly; each row of inputs and weights is one pair permuted, so every output
/// sums the same terms or other integers, in another order.
pub(super) fn integer_sums(t: &mut Trial<'_>) -> Result<()> {
    let (rows, n, k) = (5, 24, 320);
    let place = |row: usize, i: usize| (i * [1, 3, 7, 9, 11][row % 5] + row * 13) % k;
    let weight = |row: usize, i: usize| uneven(place(row, i));
    let input = |row: usize, i: usize| uneven(place(row, i) + 1000) * 19.0;
    let w = t.bf16([n, k], weight)?;
    let x: Vec<f32> = (0..rows * k).map(|i| exact(input(i / k, i % k))).collect();
    let y = t.linear(&w, &x)?;
    // Integers in f64: exact in any order.
    let want = |i: usize| (0..k).map(|j| weight(i % n, j) * input(i / n, j)).sum::<f64>();
    t.equal(&y, want, cell(n));
    // 256 products of 2^16 reach 2^24, the last integer before f32 skips one.
    let w = t.bf16([n, k], |_, i| if i < 256 { 256.0 } else { 0.0 })?;
    let y = t.linear(&w, &vec![256.0; rows * k])?;
    t.equal(&y, |_| two_to(24), cell(n));
    Ok(())
}

/// -(1 + 2^-7 + 2^-23) + (1 + 2^-7)(1 + 2^-23) is 2^-30 if the product is not rounded first, 0 if it is. WGSL allows both.
pub(super) fn fused_multiply_add(t: &mut Trial<'_>) -> Result<()> {
    let w = t.bf16([8, 16], |row, i| match i {
        0 => -1.0,
        1 => 1.0 + two_to(-7),
        _ => (row * i) as f64, // met by zeros
    })?;
    let mut x = [0.0; 16];
    x[..2].copy_from_slice(&[1.0 + two_to(-7) + two_to(-23), 1.0 + two_to(-23)].map(exact));
    let y = t.linear(&w, &x)?;
    if y.contains(&0.0) {
        t.note(ROUNDS_TWICE);
    }
    let want = |i: usize| if y[i] == 0.0 { 0.0 } else { two_to(-30) };
    t.equal(&y, want, cell(8));
    Ok(())
}

/// Routes of `scores [T, E]`, the weights a softmax over the chosen or over all: the experts' and the weights' words.
pub(super) fn route(t: &mut Trial<'_>, scores: &[f32], normalise: bool) -> Result<(Vec<u32>, Vec<f32>)> {
    let (e, a) = (8, 4);
    let tokens = scores.len() / e;
    let routes = Routes { experts: t.output(tokens * a)?, weights: t.output(tokens * a)? };
    let scores = t.input(scores)?;
    let mut p = program(tokens);
    p.router(Router { e: e as u32, a: a as u32, normalise }, scores, routes);
    let experts = t.run(&p, routes.experts)?;
    Ok((experts, floats(&t.read(routes.weights)?)))
}

/// Order, ties, signs of zero; four equal scores weigh a quarter each.
pub(super) fn router_ties(t: &mut Trial<'_>) -> Result<()> {
    let cases: [([f32; 8], [u32; 4]); 7] = [
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], [7, 6, 5, 4]),
        ([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], [0, 1, 2, 3]),
        ([0.5; 8], [0, 1, 2, 3]),
        ([-1.0, 2.0, -1.0, 2.0, 2.0, -1.0, 2.0, 2.0], [1, 3, 4, 6]),
        ([-3.0, -0.0, 0.0, -3.0, -0.0, 0.0, -3.0, -3.0], [1, 2, 4, 5]),
        ([-9.0, -8.0, -7.0, -6.0, -5.0, -6.0, -7.0, -8.0], [4, 3, 5, 2]),
        ([1e30, -1e30, 1e-30, -1e-30, 0.0, 1e30, -1e30, 1e-30], [0, 5, 2, 7]),
    ];
    let scores: Vec<f32> = cases.iter().flat_map(|(scores, _)| *scores).collect();
    let (experts, weights) = route(t, &scores, true)?;
    let want: Vec<u32> = cases.iter().flat_map(|(_, experts)| *experts).collect();
    t.same(&experts, &want, |i| format!("case {}, place {}", i / 4, i % 4));
    let even: Vec<f32> = [2, 3, 4].iter().flat_map(|case| weights[case * 4..][..4].to_vec()).collect();
    // Rounding of exp is no matter at 0; a division may be 2.5 ulp off.
    t.near(&even, |_| 0.25, |_| 3.0, Some(ROUNDS_QUOTIENTS), |i| format!("weight {i} of equal scores"));
    Ok(())
}

/// Softmax over all eight: equal ones have an eighth each, though four are chosen; seven that count for nothing leave one.
pub(super) fn router_all(t: &mut Trial<'_>) -> Result<()> {
    let low = -1e30;
    let cases: [([f32; 8], [f64; 4]); 4] = [
        ([0.5; 8], [0.125; 4]),
        ([low, 3.0, low, 3.0, low, 3.0, low, 3.0], [0.25; 4]),
        ([low, low, low, low, low, low, -7.0, low], [1.0, 0.0, 0.0, 0.0]),
        ([-2.0, -2.0, low, low, low, low, low, low], [0.5, 0.5, 0.0, 0.0]),
    ];
    let scores: Vec<f32> = cases.iter().flat_map(|(scores, _)| *scores).collect();
    let (_, weights) = route(t, &scores, false)?;
    let want = |i: usize| cases[i / 4].1[i % 4];
    t.near(&weights, want, |_| 3.0, Some(ROUNDS_QUOTIENTS), |i| format!("case {}, weight {}", i / 4, i % 4));
    Ok(())
}

/// Scores 0 and -d weigh 1/(1 + e^-d) and e^-d/(1 + e^-d), for d from 0 to 87.
pub(super) fn exp(t: &mut Trial<'_>) -> Result<()> {
    let points = if t.quick { 60 } else { 700 };
    let d = |i: usize| (i as f64 * 87.0 / points as f64) as f32;
    let scores: Vec<f32> = (0..points).flat_map(|i| [-1e30, -d(i), -1e30, -1e30, 0.0, -1e30, -1e30, -1e30]).collect();
    let (_, weights) = route(t, &scores, true)?;
    let want = |i: usize| {
        let small = (-f64::from(d(i / 4))).exp();
        match i % 4 {
            0 => 1.0 / (1.0 + small),
            1 => small / (1.0 + small),
            _ => 0.0,
        }
    };
    // exp takes about 1 ulp, the sum half of one, a division 2.5. Where fma rounds twice a driver may merge the two
    // constants of the range reduction; that costs half an ulp of the argument, as if the score had been rounded.
    let good = 6.0;
    if weights.iter().enumerate().any(|(i, w)| ulps(*w, want(i)) > good) {
        t.note(LOOSE_EXP);
    }
    let allowed = |i: usize| good + f64::from(d(i / 4));
    t.near(&weights, want, allowed, None, |i| format!("e^-{} as weight {}", d(i / 4), i % 4));
    Ok(())
}

/// What `moe_up` makes of `h [T, 32]`: gate rows meet input 0 with weight 1 or 2 by turns, up rows input 1 with weight 1;
/// the bias of expert e adds e to up. Token t goes to expert t mod 3; nine outputs a token.
pub(super) fn gate_and_up(t: &mut Trial<'_>, h: &[f32]) -> Result<Vec<f32>> {
    let (e, f, k) = (3, 9, 32);
    let tokens = h.len() / k;
    let code = |row: usize, i: usize| match (row % 2, i) {
        (0, 0) => [ONE, 4][row / 2 % 2],
        (1, 1) => ONE,
        _ => 0,
    };
    let weight = t.mxfp4([e, 2 * f, k], |row, i| code(row % (2 * f), i), |_, _| UNIT)?;
    let bias = t.input(&bf16s((0..e * 2 * f).map(|i| if i % 2 == 1 { (i / (2 * f)) as f64 } else { 0.0 })))?;
    let up = Experts { weight, bias: Some(bias), input_scale: None };
    let chosen: Vec<u32> = (0..tokens).map(|token| (token % e) as u32).collect();
    let (chosen, h, y) = (t.input(&chosen)?, t.input(h)?, t.output(tokens * f)?);
    let mut p = program(tokens);
    p.moe_up(&up, Swiglu::gpt_oss(1, [7.0, 1.702]), chosen, (h, 1), y);
    Ok(floats(&t.run(&p, y)?))
}

/// Every third token is NaN: all of its outputs are, and no others.
pub(super) fn nan_stays(t: &mut Trial<'_>) -> Result<()> {
    let h: Vec<f32> = (0..9 * 32).map(|i| if i / 32 % 3 == 1 { f32::NAN } else { 0.5 }).collect();
    let y = gate_and_up(t, &h)?;
    for (i, v) in y.iter().enumerate() {
        let want = i / 9 % 3 == 1;
        if v.is_nan() != want {
            t.wrong(|| format!("{}: got {v:e}, want {}", cell(9)(i), if want { "NaN" } else { "a number" }));
        }
    }
    Ok(())
}

/// gate sigmoid(1.702 gate) (up + 1) with gate at most 7 and up within 7, against f64; gate and up are the two inputs.
pub(super) fn swiglu(t: &mut Trial<'_>) -> Result<()> {
    let (f, tokens) = (9, 150);
    let input = |token: usize| [token as f64 / 8.0 - 12.0, (token * 29 % 161) as f64 / 8.0 - 10.0];
    let h: Vec<f32> = (0..tokens * 32).map(|i| if i % 32 < 2 { exact(input(i / 32)[i % 32]) } else { 0.0 }).collect();
    let y = gate_and_up(t, &h)?;
    let parts = |i: usize| {
        let [gate, up] = input(i / f);
        let gate = (gate * [1.0, 2.0][i % f % 2]).min(7.0);
        (gate, (up + (i / f % 3) as f64).clamp(-7.0, 7.0))
    };
    let alpha = f64::from(1.702f32);
    let want = |i: usize| {
        let (gate, up) = parts(i);
        gate / (1.0 + (-alpha * gate).exp()) * (up + 1.0)
    };
    // Rounding alpha gate to f32 moves the exponential by as many halves of an ulp as its argument is large.
    let allowed = |i: usize| 8.0 + (alpha * parts(i).0).abs();
    t.near(&y, want, allowed, None, |i| format!("gate {}, up {}", parts(i).0, parts(i).1));
    Ok(())
}

/// Expert e multiplies by 2^e and adds its own bias; routes carry inputs of their own, and go one by one or in tiles.
pub(super) fn experts(t: &mut Trial<'_>) -> Result<()> {
    let (e, d, k, a, tokens) = (5, 19, 64, 2, 5);
    let weight = t.mxfp4([e, d, k], |_, _| ONE, |row, _| UNIT + (row / d) as u8)?;
    let bias = t.input(&bf16s((0..e * d).map(|i| i as f64)))?;
    let down = Experts { weight, bias: Some(bias), input_scale: None };
    let expert = |route: usize| [4, 0, 2, 3, 1, 4, 0, 1, 3, 2][route];
    let chosen: Vec<u32> = (0..tokens * a).map(|route| expert(route) as u32).collect();
    let x: Vec<f32> = (0..tokens * a * k).map(|i| (i / k + 1) as f32).collect();
    let (chosen, x) = (t.input(&chosen)?, t.input(&x)?);
    let step = t.input(&[Step { tokens: tokens as u32, pad: [0; 3] }])?;
    let group = Group { e: e as u32, a: a as u32, routes: 4 };
    let tiles = t.output(group.tiles(tokens as u32) as usize * group.words())?;
    for routing in [Routing::Each(chosen), Routing::Grouped(tiles, 4)] {
        let y = t.output(tokens * a * d)?;
        let mut p = program(tokens);
        if let Routing::Grouped(tiles, _) = routing {
            p.group(group, step, chosen, tiles);
        }
        p.moe_down(&down, a as u32, routing, x, y);
        let y = floats(&t.run(&p, y)?);
        let want = |i: usize| {
            let (route, n) = (i / d, i % d);
            (k * (route + 1)) as f64 * two_to(expert(route) as i32) + (expert(route) * d + n) as f64
        };
        t.equal(&y, want, |i| format!("route {}, expert {}, output {}", i / d, expert(i / d), i % d));
    }
    Ok(())
}

/// Weights and inputs are powers of two, all different: exact, and no two are mixed up.
pub(super) fn scatter(t: &mut Trial<'_>) -> Result<()> {
    let (a, d, tokens) = (4, 70, 3);
    let exponent = |token: usize, a: usize| -(a as i32) - token as i32;
    let input = |token: usize, a: usize, i: usize| two_to(((token + 5 * a + i * 3) % 11) as i32) * (1 + a) as f64;
    let weights: Vec<f32> = (0..tokens * a).map(|i| exact(two_to(exponent(i / a, i % a)))).collect();
    let x: Vec<f32> = (0..tokens * a * d).map(|i| exact(input(i / (a * d), i / d % a, i % d))).collect();
    let routes = Routes { experts: t.output(tokens * a)?, weights: t.input(&weights)? };
    let (x, y) = (t.input(&x)?, t.output(tokens * d)?);
    let mut p = program(tokens);
    p.moe_scatter(MoeScatter { a: a as u32, d: d as u32 }, routes, x, y);
    let y = floats(&t.run(&p, y)?);
    let want = |i: usize| (0..a).map(|a| two_to(exponent(i / d, a)) * input(i / d, a, i % d)).sum::<f64>();
    t.equal(&y, want, cell(d));
    Ok(())
}
