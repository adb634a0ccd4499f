//! Known answers of the small stages, and of a few stages run together: the same bits twice, no old scratch.

use super::*;
use crate::ops::{Gate, Glu, Group, HeadNorm, Routing, Swiglu};

/// A row of one element 16 and 255 zeros has mean square 1: the gain comes out at its place. Rows of threes become the gain.
pub(super) fn rms_norm(t: &mut Trial<'_>) -> Result<()> {
    let d = 256;
    let gain = |i: usize| uneven(i) / 4.0;
    let mut x = one_hot(d, &(0..d).collect::<Vec<_>>(), |_| 16.0);
    x.extend(vec![3.0; d]);
    let (g, y) = (t.input(&bf16s((0..d).map(gain)))?, t.output(x.len())?);
    let mut p = program(d + 1);
    let x = t.input(&x)?;
    p.rms_norm(RmsNorm { d: d as u32, eps: 0.0 }, x, g, y);
    let y = floats(&t.run(&p, y)?);
    let want = |i: usize| match (i / d, i % d) {
        (row, i) if row == d => gain(i),
        (row, i) if row == i => 16.0 * gain(i),
        _ => 0.0,
    };
    // A square root and a division of 2.5 to 3 ulp each, and two products.
    t.near(&y, want, |_| 8.0, None, cell(d));
    Ok(())
}

/// A head of one element 8 and 63 zeros has mean square 1: the gain comes out, of queries or of keys. Each head has its
/// element at another place; values stay as they are.
pub(super) fn head_norm(t: &mut Trial<'_>) -> Result<()> {
    let [h, hk, dh] = HEADS.map(|n| n as usize);
    let width = (h + 2 * hk) * dh;
    let gain = |head: usize, i: usize| if head < h { uneven(i) / 4.0 } else { uneven(i + 40) };
    let part = |i: usize| (i / width, i % width / dh, i % dh);
    let at = |token: usize, head: usize| (token + 5 * head) % dh;
    let x = |i: usize| match part(i) {
        (_, head, i) if head >= h + hk => uneven(i + head),
        (token, head, i) if i == at(token, head) => 8.0,
        _ => 0.0,
    };
    let gains = [t.input(&bf16s((0..dh).map(|i| gain(0, i))))?, t.input(&bf16s((0..dh).map(|i| gain(h, i))))?];
    let data: Vec<f32> = (0..dh * width).map(|i| exact(x(i))).collect();
    let qkv = t.input(&data)?;
    let mut p = program(dh);
    p.head_norm(HeadNorm { h: h as u32, hk: hk as u32, dh: dh as u32, eps: 0.0 }, gains, qkv);
    let y = floats(&t.run(&p, qkv)?);
    let is_value = |i: usize| part(i).1 >= h + hk;
    let want = |i: usize| if is_value(i) { x(i) } else { x(i) * gain(part(i).1, part(i).2) };
    // As for rms_norm; what is left alone is exact.
    let what = |i: usize| format!("row {}, head {}, element {}", part(i).0, part(i).1, part(i).2);
    t.near(&y, want, |i| if is_value(i) { 0.0 } else { 8.0 }, None, what);
    Ok(())
}

/// gate sigmoid(gate) up against f64; gates from 128 on have a sigmoid of 1, so that the product is exact.
pub(super) fn silu(t: &mut Trial<'_>) -> Result<()> {
    let (f, tokens) = (9, 40);
    let gate = |i: usize| match i % f {
        0 => two_to(7 + (i / f % 4) as i32),
        _ => (i / f * 8 + i % f) as f64 / 16.0 - 10.0,
    };
    let up = |i: usize| uneven(i) / 8.0;
    let row = |token: usize| (0..f).map(move |i| gate(token * f + i)).chain((0..f).map(move |i| up(token * f + i)));
    let x: Vec<f32> = (0..tokens).flat_map(row).map(exact).collect();
    let (x, y) = (t.input(&x)?, t.output(tokens * f)?);
    let mut p = program(tokens);
    p.glu(Glu { f: f as u32, gate: Gate::Silu }, x, y);
    let y = floats(&t.run(&p, y)?);
    let want = |i: usize| gate(i) / (1.0 + (-gate(i)).exp()) * up(i);
    // exp, a sum, a division and a product; a driver may round exp's argument once more.
    let allowed = |i: usize| if i.is_multiple_of(f) { 3.0 } else { 8.0 + gate(i).abs() };
    t.near(&y, want, allowed, None, |i| format!("gate {}, up {}", gate(i), up(i)));
    Ok(())
}

/// x + y of integers, then rows picked backwards and twice.
pub(super) fn add_and_take(t: &mut Trial<'_>) -> Result<()> {
    let (d, tokens) = (70, 5);
    let y: Vec<f32> = (0..tokens * d).map(|i| exact(uneven(i) * 1024.0)).collect();
    let x: Vec<f32> = (0..tokens * d).map(|i| exact(uneven(i + 500))).collect();
    let (y, x) = (t.input(&y)?, t.input(&x)?);
    let mut p = program(tokens);
    let sum = t.output(tokens * d)?;
    p.add(d as u32, x, y, sum);
    t.device.run(&p)?;
    let picks = [4u32, 0, 3, 3, 1];
    let (slice, out) = (t.input(&picks)?, t.output(picks.len() * d)?);
    let mut p = program(picks.len());
    p.take(d as u32, slice, sum, out);
    let got = floats(&t.run(&p, out)?);
    let want = |i: usize| {
        let from = picks[i / d] as usize * d + i % d;
        uneven(from) * 1024.0 + uneven(from + 500)
    };
    t.equal(&got, want, cell(d));
    Ok(())
}

/// A small block of a model over nine tokens (a whole tile and a part), its scratch filled with `scratch`, run `times`
/// times: every buffer's words after each run.
pub(super) fn block(t: &mut Trial<'_>, scratch: f32, times: usize) -> Result<Vec<Vec<u32>>> {
    let (tokens, room, d, e, a) = (9, 16, 32, 4, 2);
    let router = t.bf16([e, d], |row, i| uneven(row * 91 + i * 3) / 64.0)?;
    let code = |row: usize, i: usize| ((row * 5 + i * 3 + row * i / 4) % 16) as u8;
    let scale = |row: usize, _: usize| UNIT - 4 + (row % 3) as u8;
    let up = t.mxfp4([e, 2 * d, d], code, scale)?;
    let down = t.mxfp4([e, d, d], |row, i| code(row + 7, i + 1), scale)?;
    let up_bias = t.input(&bf16s((0..e * 2 * d).map(|i| uneven(i) / 32.0)))?;
    let down_bias = t.input(&bf16s((0..e * d).map(|i| uneven(i + 9) / 32.0)))?;
    let experts = |weight, bias| Experts { weight, bias: Some(bias), input_scale: None };
    let (up, down) = (experts(up, up_bias), experts(down, down_bias));
    // Inputs of this step, and behind them whatever an earlier step left.
    let x: Vec<f32> = (0..room * d).map(|i| if i < tokens * d { exact(uneven(i) / 16.0) } else { scratch }).collect();
    let step = t.input(&[Step { tokens: tokens as u32, pad: [0; 3] }])?;
    let (x, gain) = (t.input(&x)?, t.input(&bf16s((0..d).map(|i| uneven(i) / 32.0)))?);
    let mut scratch_of = |width: usize| t.input(&vec![scratch; room * width]);
    let (normed, scores, inner) = (scratch_of(d)?, scratch_of(e)?, scratch_of(a * d)?);
    let (outer, sum) = (scratch_of(a * d)?, scratch_of(d)?);
    let routes = Routes { experts: scratch_of(a)?, weights: scratch_of(a)? };
    let group = Group { e: e as u32, a: a as u32, routes: 4 };
    let tiles = t.input(&vec![scratch; group.tiles(room as u32) as usize * group.words()])?;
    let grouped = Routing::Grouped(tiles, 4);
    let mut p = program(tokens);
    p.rms_norm(RmsNorm { d: d as u32, eps: 1e-5 }, x, gain, normed);
    p.linear(step, &router, None, normed, scores);
    p.router(Router { e: e as u32, a: a as u32, normalise: true }, scores, routes);
    p.group(group, step, routes.experts, tiles);
    p.moe_up(&up, Swiglu::gpt_oss(a as u32, [7.0, 1.702]), grouped, (normed, a as u32), inner);
    p.moe_down(&down, a as u32, grouped, inner, outer);
    p.moe_scatter(MoeScatter { a: a as u32, d: d as u32 }, routes, outer, sum);
    let widths =
        [(normed, d), (scores, e), (routes.experts, a), (routes.weights, a), (inner, a * d), (outer, a * d), (sum, d)];
    let mut runs = Vec::new();
    for _ in 0..times {
        t.device.run(&p)?;
        let mut words = Vec::new();
        for (slice, width) in widths {
            words.extend(t.read(slice.head((tokens * width * 4) as u64))?);
        }
        runs.push(words);
    }
    Ok(runs)
}

/// Four runs of one program.
pub(super) fn determinism(t: &mut Trial<'_>) -> Result<()> {
    let runs = block(t, 0.0, 4)?;
    for (i, run) in runs.iter().enumerate().skip(1) {
        t.same(run, &runs[0], |at| format!("run {}, word {at}", i + 1));
    }
    Ok(())
}

/// Scratch of zeros and scratch of NaN.
pub(super) fn stale_scratch(t: &mut Trial<'_>) -> Result<()> {
    let clean = block(t, 0.0, 1)?.swap_remove(0);
    let poisoned = block(t, f32::NAN, 1)?.swap_remove(0);
    t.same(&poisoned, &clean, |at| format!("after NaN, word {at}"));
    Ok(())
}
