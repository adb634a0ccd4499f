//! Known answers of attention, its cache, and rotation.

use super::*;
use crate::program::Role;

/// A cache whose row j holds `key` everywhere, and `value(j, i)`; rows for which `value` is NaN have NaN keys too.
pub(super) fn cache(
    t: &mut Trial<'_>,
    format: CacheFormat,
    capacity: u32,
    key: f64,
    value: impl Fn(usize, usize) -> f64,
) -> Result<KvCache> {
    let dh = HEADS[2] as usize;
    let values: Vec<f64> = (0..capacity as usize * dh).map(|i| value(i / dh, i % dh)).collect();
    let keys = values.iter().map(|v| if v.is_nan() { f64::NAN } else { key }).collect();
    let mut store = |values: Vec<f64>| match format {
        CacheFormat::F32 => t.input(&values.iter().map(|v| *v as f32).collect::<Vec<_>>()),
        CacheFormat::Bf16 => t.input(&values.iter().map(|v| ((*v as f32).to_bits() >> 16) as u16).collect::<Vec<_>>()),
    };
    let (keys, values) = (store(keys)?, store(values)?);
    Ok(KvCache { format, page: capacity, pages: 1, table: t.input(&[0u32])?, keys, values })
}

/// Attention of queries that are all `query`, at these positions, with a sink of this score or none: `[T, H Dh]`, as rows of a
/// prompt and as generated ones.
pub(super) fn attend(
    t: &mut Trial<'_>,
    cache: KvCache,
    window: u32,
    (query, sink): (f64, Option<f64>),
    positions: &[u32],
) -> Result<[Vec<f32>; 2]> {
    let [h, hk, dh] = HEADS;
    let tokens = positions.len();
    let rows: Vec<Row> = positions.iter().map(|&position| Row { position, ..Row::default() }).collect();
    let qkv = vec![exact(query); tokens * ((h + 2 * hk) * dh) as usize];
    let (rows, qkv) = (t.input(&rows)?, t.input(&qkv)?);
    let sinks = sink.map(|sink| t.input(&bf16s(vec![sink; h as usize]))).transpose()?;
    let step = t.input(&[Step { tokens: tokens as u32, pad: [0; 3] }])?;
    let KvCache { page, pages, format, .. } = cache;
    let held = [0, hk];
    let op = Attention { h, hk, dh, held, window, page, pages, format, segments: 0, first: 0, rows: 0 };
    let mut run = |role| {
        let a = t.output(tokens * (h * dh) as usize)?;
        let mut p = program(tokens).of(role);
        p.attention(op, step, [rows, qkv, a], &[cache], sinks, a);
        Ok(floats(&t.run(&p, a)?))
    };
    Ok([run(Role::Prompt)?, run(Role::Generated { reach: CAPACITY })?])
}

/// Both cache formats, or for the quick checks the smaller one.
pub(super) fn cache_formats(t: &Trial<'_>) -> &'static [CacheFormat] {
    if t.quick { &[CacheFormat::Bf16] } else { &[CacheFormat::Bf16, CacheFormat::F32] }
}

/// The weight of a sink that nobody feels.
pub(super) const NO_SINK: f64 = -1073741824.0;

/// Query and key of zeros score 0, as the sink does: half of the value, all of the other rows NaN.
pub(super) fn one_key(t: &mut Trial<'_>) -> Result<()> {
    let dh = HEADS[2] as usize;
    for &format in cache_formats(t) {
        let value = |j: usize, i: usize| if j == 0 { uneven(i) } else { f64::NAN };
        let kv = cache(t, format, CAPACITY, 0.0, value)?;
        for a in attend(t, kv, 0, (0.0, Some(0.0)), &[0])? {
            let what = |i: usize| format!("{format:?} cache, element {i}");
            t.near(&a, |i| uneven(i % dh) / 2.0, |_| 3.0, Some(ROUNDS_QUOTIENTS), what);
        }
    }
    Ok(())
}

/// n equal scores: the mean of n integers, exact before the division. Over tiles of keys and a power of two of them.
pub(super) fn attention_mean(t: &mut Trial<'_>) -> Result<()> {
    let (h, dh) = (HEADS[0] as usize, HEADS[2] as usize);
    let positions: &[u32] = if t.quick { &[1, 127] } else { &[0, 1, 3, 7, 15, 31, 63, 127] };
    for &format in cache_formats(t) {
        let value = |j: usize, i: usize| uneven(j * 5 + i);
        let kv = cache(t, format, CAPACITY, 1.0, value)?;
        let want = |i: usize| {
            let n = positions[i / (h * dh)] as usize + 1;
            (0..n).map(|j| value(j, i % dh)).sum::<f64>() / n as f64
        };
        let what =
            |i: usize| format!("{format:?} cache, {} keys, element {}", positions[i / (h * dh)] + 1, i % (h * dh));
        for a in attend(t, kv, 0, (1.0, Some(NO_SINK)), positions)? {
            t.near(&a, want, |_| 3.0, Some(ROUNDS_QUOTIENTS), what);
        }
    }
    Ok(())
}

/// Without a sink the keys share all of the weight, however small their scores: here -8192 each.
pub(super) fn attention_no_sink(t: &mut Trial<'_>) -> Result<()> {
    let (h, dh) = (HEADS[0] as usize, HEADS[2] as usize);
    let positions = [0, 1, 3];
    for &format in cache_formats(t) {
        let value = |j: usize, i: usize| if j < 4 { uneven(j * 5 + i) } else { f64::NAN };
        let kv = cache(t, format, CAPACITY, -64.0, value)?;
        let want = |i: usize| {
            let n = positions[i / (h * dh)] as usize + 1;
            (0..n).map(|j| value(j, i % dh)).sum::<f64>() / n as f64
        };
        let what = |i: usize| format!("{format:?} cache, row {}, element {}", i / (h * dh), i % (h * dh));
        for a in attend(t, kv, 0, (16.0, None), &positions)? {
            t.near(&a, want, |_| 3.0, Some(ROUNDS_QUOTIENTS), what);
        }
    }
    Ok(())
}

/// A window of 4 at position 9, in a cache of 8 rows: keys 6 to 9 in rows 6, 7, 0, 1, and NaN in all others.
pub(super) fn attention_window(t: &mut Trial<'_>) -> Result<()> {
    let dh = HEADS[2] as usize;
    for &format in cache_formats(t) {
        let value = |j: usize, i: usize| match j {
            6 | 7 | 0 | 1 => uneven((j + 2) % 8 * 64 + i),
            _ => f64::NAN,
        };
        let kv = cache(t, format, 8, 1.0, value)?;
        let want = |i: usize| [6, 7, 0, 1].map(|j| value(j, i % dh)).iter().sum::<f64>() / 4.0;
        for a in attend(t, kv, 4, (1.0, Some(NO_SINK)), &[9])? {
            t.near(&a, want, |_| 3.0, Some(ROUNDS_QUOTIENTS), |i| format!("{format:?} cache, element {i}"));
        }
    }
    Ok(())
}

/// What `rope` leaves: the words of `qkv`, and of the cache's keys and values.
pub(super) fn rotate(
    t: &mut Trial<'_>,
    format: CacheFormat,
    table: &[[f32; 2]],
    qkv: &[f32],
    positions: &[u32],
) -> Result<[Vec<u32>; 3]> {
    let rows: Vec<Row> = positions.iter().map(|&position| Row { position, ..Row::default() }).collect();
    let words = format.bytes(u64::from(CAPACITY * HEADS[1] * HEADS[2])) as usize / 4;
    let (rows, table, qkv) = (t.input(&rows)?, t.input(table)?, t.input(qkv)?);
    let (pages, keys, values) = (t.input(&[0u32])?, t.output(words)?, t.output(words)?);
    let kv = KvCache { format, page: CAPACITY, pages: 1, table: pages, keys, values };
    let mut p = program(positions.len());
    p.rope(HEADS, rows, table, qkv, &[kv]);
    Ok([t.run(&p, qkv)?, t.read(kv.keys)?, t.read(kv.values)?])
}

/// Element i of a row of `format` in words.
pub(super) fn stored(format: CacheFormat, words: &[u32], i: usize) -> f32 {
    match format {
        CacheFormat::F32 => f32::from_bits(words[i]),
        CacheFormat::Bf16 => f32::from_bits(words[i / 2] >> (16 * (i % 2)) << 16),
    }
}

/// Position p turns by p quarters: cos and sin are 0, 1 or -1, so rotating moves and negates and rounds nothing.
pub(super) fn rope(t: &mut Trial<'_>) -> Result<()> {
    let [h, hk, dh] = HEADS.map(|n| n as usize);
    let width = (h + 2 * hk) * dh;
    let turns = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]];
    let table: Vec<[f32; 2]> = (0..CAPACITY as usize * dh / 2).map(|i| turns[i / (dh / 2) % 4]).collect();
    let positions = [0, 1, 2, 127, 64];
    // From 1 up: a zero would hide its sign. Values of up to eight bits, exact in a bf16 cache.
    let input = |token: usize, i: usize| ((token * 31 + i * 7) % 251 + 1) as f64;
    let qkv: Vec<f32> = (0..positions.len() * width).map(|i| exact(input(i / width, i % width))).collect();
    // (x, y) turned by a quarter is (-y, x).
    let turned = |token: usize, head: usize, i: usize| {
        let [x, y] = [i % (dh / 2), i % (dh / 2) + dh / 2].map(|i| input(token, head * dh + i));
        let low = i < dh / 2;
        match positions[token] % 4 {
            0 => {
                if low {
                    x
                } else {
                    y
                }
            }
            1 => {
                if low {
                    -y
                } else {
                    x
                }
            }
            2 => {
                if low {
                    -x
                } else {
                    -y
                }
            }
            _ => {
                if low {
                    y
                } else {
                    -x
                }
            }
        }
    };
    for &format in cache_formats(t) {
        let [q, keys, values] = rotate(t, format, &table, &qkv, &positions)?;
        for (token, position) in positions.iter().enumerate() {
            let place = |what: &str, i: usize| format!("{what} at position {position}, element {i}");
            let got = floats(&q[token * width..][..h * dh]);
            t.equal(&got, |i| turned(token, i / dh, i % dh), |i| place("query", i));
            let row = |words: &[u32]| -> Vec<f32> {
                (0..dh).map(|i| stored(format, words, *position as usize * dh + i)).collect()
            };
            t.equal(&row(&keys), |i| turned(token, h, i), |i| place("key", i));
            t.equal(&row(&values), |i| input(token, (h + hk) * dh + i), |i| place("value", i));
        }
    }
    Ok(())
}

/// Upper halves with lower halves around the tie: 0x8000 goes to the even neighbour, less goes down, more goes up, also
/// over a power of two and into infinity. Keys and values of position 0.
pub(super) fn bf16_rounding(t: &mut Trial<'_>) -> Result<()> {
    let [h, hk, dh] = HEADS.map(|n| n as usize);
    let halves = [0x3f80, 0x3f81, 0xbfff, 0x4000, 0xc0fe, 0x7f7f, 0x0080, 0xff7e].iter();
    let bits = halves
        .flat_map(|upper: &u32| [0, 1, 0x7fff, 0x8000, 0x8001, 0xc000, 0xfffe, 0xffff].map(|lower| (*upper, lower)));
    let bits: Vec<(u32, u32)> = bits.collect();
    let rounded = |(upper, lower): (u32, u32)| match lower {
        0..0x8000 => upper,
        0x8000 => upper + upper % 2,
        _ => upper + 1,
    };
    let table = vec![[1.0, 0.0]; CAPACITY as usize * dh / 2];
    let mut qkv = vec![1.0; (h + 2 * hk) * dh];
    for (i, (upper, lower)) in bits.iter().enumerate() {
        let v = f32::from_bits(upper << 16 | lower);
        qkv[h * dh + i] = v;
        qkv[(h + hk) * dh + (i + 3) % dh] = v; // shifted: not the same pair in a word
    }
    let [_, keys, values] = rotate(t, CacheFormat::Bf16, &table, &qkv, &[0])?;
    let got =
        |words: &[u32]| -> Vec<u32> { (0..dh).map(|i| stored(CacheFormat::Bf16, words, i).to_bits() >> 16).collect() };
    let want: Vec<u32> = bits.iter().map(|b| rounded(*b)).collect();
    let what = |name: &str, i: usize| format!("{name} {:#010x}", bits[i].0 << 16 | bits[i].1);
    t.same(&got(&keys), &want, |i| what("key", i));
    let shifted: Vec<u32> = (0..dh).map(|i| want[(i + dh - 3) % dh]).collect();
    t.same(&got(&values), &shifted, |i| what("value", (i + dh - 3) % dh));
    Ok(())
}
