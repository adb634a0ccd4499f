//! Attention, its cache in pages, and rotation.

use super::{EPS, check, output_of, program, step};
use crate::harness::{Bench, Random, cpu, gpus, sum_tolerance};
use fourfold::HostStages;
use fourfold::ops::{Attention, CacheFormat, KvCache, Rotated, Row};
use fourfold::program::{Place, Program, Role, Slice};

/// Rows of two sequences in one step, at uneven positions.
fn mixed_rows(t: usize, sequences: u32, last: u32) -> Vec<Row> {
    (0..t as u32)
        .map(|i| Row { token: 0, sequence: i % sequences, position: last - (i * 7) % (last + 1), pad: 0 })
        .collect()
}

/// Positions of a page, for a sequence that has room for so many.
fn page(capacity: usize) -> usize {
    if capacity.is_multiple_of(4) { capacity / 4 } else { capacity }
}

/// Page size, pages a sequence, and a table in which they lie in no order.
fn pages(b: &mut Bench, capacity: usize, sequences: usize) -> (u32, u32, Slice) {
    let pages = capacity / page(capacity);
    let n = pages * sequences;
    let table: Vec<u32> = (0..n).map(|i| ((i * 5 + 3) % n) as u32).collect();
    (page(capacity) as u32, pages as u32, b.input(&table))
}

/// Of two sequences with room for `capacity` rows of `width` elements, each row cut into `parts`.
fn cache(
    b: &mut Bench,
    random: &mut Random,
    format: CacheFormat,
    [capacity, width, parts]: [usize; 3],
) -> Vec<KvCache> {
    let n = 2 * capacity * width;
    let mut fill = || match format {
        CacheFormat::F32 => bytemuck::cast_slice(&random.f32s(n)).to_vec(),
        CacheFormat::Bf16 => random.bf16s(n),
    };
    let (keys, values) = (fill(), fill());
    let (page, pages, table) = pages(b, capacity, 2);
    let bytes = format.bytes(width as u64) as usize / parts;
    let cut = |all: &[u8], part: usize| -> Vec<u8> {
        all.chunks_exact(bytes * parts).flat_map(|row| row[part * bytes..][..bytes].to_vec()).collect()
    };
    let mut part = |part| {
        let (keys, values) = (b.input(&cut(&keys, part)), b.input(&cut(&values, part)));
        KvCache { format, page, pages, table, keys, values }
    };
    (0..parts).map(&mut part).collect()
}

#[test]
fn rope() {
    for format in [CacheFormat::F32, CacheFormat::Bf16] {
        for (t, h, hk, dh, capacity) in [(1, 2, 1, 4, 3), (5, 6, 2, 64, 11), (3, 8, 2, 32, 40)] {
            let what = format!("rope {format:?} T={t} H={h} Hk={hk} Dh={dh}");
            // Two products and a sum.
            check(&what, 4.0 * EPS, |b| {
                let mut random = Random(dh as u64);
                let rows: Vec<Row> = mixed_rows(t, 2, 37)
                    .into_iter()
                    .enumerate()
                    .map(|(i, r)| Row { position: i as u32 * 7, ..r })
                    .collect();
                let table: Vec<f32> =
                    (0..38 * dh / 2).flat_map(|i| [(i as f32).cos() * 1.3, (i as f32).sin() * 1.3]).collect();
                let (rows, table) = (b.input(&rows), b.input(&table));
                let width = (h + 2 * hk) * dh;
                let qkv = b.guarded(&random.f32s(t * width));
                let n = 2 * capacity * hk * dh;
                let [keys, values] = [0; 2].map(|_| match format {
                    CacheFormat::F32 => b.guarded(&vec![0.5f32; n]),
                    CacheFormat::Bf16 => b.guarded(&vec![0.5f32; n / 2]),
                });
                let (page, pages, table_of_pages) = pages(b, capacity, 2);
                let kv = KvCache { format, page, pages, table: table_of_pages, keys, values };
                let mut p = program(t);
                p.rope([h as u32, hk as u32, dh as u32], rows, table, qkv, &[kv]);
                let outputs = if format == CacheFormat::F32 { vec![qkv, keys, values] } else { vec![qkv] };
                (p, outputs)
            });
        }
    }
}

#[test]
fn a_bf16_cache_holds_what_an_f32_cache_holds_rounded_to_nearest_even() {
    // The same step into both caches, on each device: keys and values, two sequences, positions past the capacity.
    let (t, h, hk, dh, capacity) = (7, 4, 2, 8, 5);
    let mut random = Random(3);
    let mut qkv = random.f32s(t * (h + 2 * hk) * dh);
    qkv[(h + hk) * dh] = f32::from_bits(0x3f80_8000); // a value that is a tie
    qkv[(h + hk) * dh + 1] = f32::from_bits(0x3f81_8000);
    let table: Vec<f32> = (0..40 * dh / 2).flat_map(|i| [(i as f32).cos() * 1.3, (i as f32).sin() * 1.3]).collect();
    let row = |i: u32| Row { token: 0, sequence: i % 2, position: i * 3 + 1, pad: 0 };
    let rows: Vec<Row> = (0..t as u32).map(row).collect();
    for (name, device) in gpus() {
        let cached = |format: CacheFormat, words: usize| {
            let mut b = Bench::new(device);
            let (rows, table, qkv) = (b.input(&rows), b.input(&table), b.guarded(&qkv));
            let [keys, values] = [0; 2].map(|_| b.guarded(&vec![0.0f32; words]));
            let (page, pages, table_of_pages) = pages(&mut b, capacity, 2);
            let kv = KvCache { format, page, pages, table: table_of_pages, keys, values };
            let mut p = program(t);
            p.rope([h as u32, hk as u32, dh as u32], rows, table, qkv, &[kv]);
            b.run(&p, &[keys, values]).concat()
        };
        let n = 2 * capacity * hk * dh;
        let want = cached(CacheFormat::F32, n).into_iter().map(|w| half::bf16::from_f32(f32::from_bits(w)).to_bits());
        let got = cached(CacheFormat::Bf16, n / 2).into_iter().flat_map(|w| [w as u16, (w >> 16) as u16]);
        let (got, want): (Vec<u16>, Vec<u16>) = (got.collect(), want.collect());
        assert_eq!(got, want, "on {name}");
        assert!(got.contains(&0x3f80) && got.contains(&0x3f82), "ties went to even on {name}");
        assert!(got.iter().filter(|w| **w != 0).count() > n, "most of both caches was written on {name}");
    }
}

/// A case of attention, its outputs, and room for segments.
struct Case {
    op: Attention,
    role: Role,
    /// Rows whose segments there is room for at once.
    room: usize,
    /// Parts of the cache.
    parts: usize,
}

fn op([h, hk, dh, window]: [u32; 4], capacity: u32, format: CacheFormat) -> Attention {
    let page = page(capacity as usize) as u32;
    let (held, pages) = ([0, hk], capacity / page);
    Attention { h, hk, dh, held, window, page, pages, format, segments: 0, first: 0, rows: 0 }
}

fn attention_case(b: &mut Bench, case: &Case, rows: &[Row], which: std::ops::Range<usize>) -> (Program, Vec<Slice>) {
    let op = case.op;
    let [h, hk, dh] = [op.h, op.hk, op.dh].map(|n| n as usize);
    let mut random = Random((dh + op.window as usize) as u64);
    let width = (h + 2 * hk) * dh;
    let qkv = random.f32s(rows.len() * width);
    let kv = cache(b, &mut random, op.format, [(op.page * op.pages) as usize, hk * dh, case.parts]);
    let sinks = (op.window != 13).then(|| b.input(&random.bf16s(h + h % 2)));
    let t = which.len();
    let (qkv, rows) = (b.input(&qkv[which.start * width..which.end * width]), b.input(&rows[which]));
    let parts = b.output(case.room * h * 8 * (dh + 4));
    let a = b.output(t * h * dh);
    let mut p = program(t).of(case.role);
    p.attention(op, step(b, t), [rows, qkv, parts], &kv, sinks, a);
    (p, vec![a])
}

#[test]
fn attention() {
    for format in [CacheFormat::F32, CacheFormat::Bf16] {
        for (shape, capacity, last) in [
            ([1, 1, 4, 0], 1, 0),      // one key
            ([8, 2, 32, 0], 300, 299), // several tiles, the last one partial
            ([6, 2, 64, 13], 20, 500), // a window inside a ring that has wrapped many times; without sinks
            ([6, 2, 64, 0], 100, 99),
            ([24, 2, 20, 0], 1000, 970),  // twelve heads share keys; teams of five lanes
            ([5, 1, 128, 150], 200, 450), // five heads, which go one by one
            ([4, 4, 128, 128], 200, 450),
            ([2, 1, 256, 64], 64, 63),   // the window is the whole ring
            ([4, 2, 64, 200], 256, 700), // a window of two segments
        ] {
            let op = op(shape, capacity, format);
            // A dot product of Dh, then a weighted mean of the keys; scores pass through exp.
            let tolerance = 2.0 * sum_tolerance((op.dh + last) as usize);
            for role in [Role::Prompt, Role::Generated { reach: last + 1 }] {
                let case = Case { op, role, room: 2, parts: 1 };
                let rows = mixed_rows(5, 2, last);
                check(&format!("{op:?} {role:?}"), tolerance, |b| attention_case(b, &case, &rows, 0..5));
            }
        }
    }
}

#[test]
fn a_segment_of_several_tiles() {
    // More than 64 tiles: two in each segment. Teams of four lanes, and of five; four heads a workgroup, and three.
    for (shape, format) in [([4, 1, 16, 0], CacheFormat::F32), ([3, 1, 20, 0], CacheFormat::Bf16)] {
        let op = op(shape, 8600, format);
        let case = Case { op, role: Role::Generated { reach: 8501 }, room: 16, parts: 1 };
        let mut rows = mixed_rows(4, 2, 8500);
        rows[2].position = 8319; // the last segment has one tile
        check(&format!("{op:?}"), 2.0 * sum_tolerance(8500), |b| attention_case(b, &case, &rows, 0..4));
    }
}

#[test]
fn a_row_of_attention_does_not_depend_on_its_neighbours_or_the_room_for_segments() {
    // Three heads a workgroup, and four; teams of lanes that take keys in full batches, and not.
    for shape in [[6, 2, 64, 0], [16, 2, 20, 0]] {
        let (op, width) = (op(shape, 300, CacheFormat::F32), (shape[0] * shape[2]) as usize);
        let mut rows = mixed_rows(5, 2, 299);
        // One segment, which a merge has to leave as it is where others have several; a full one; two.
        for (row, position) in rows.iter_mut().zip([0, 127, 128]) {
            row.position = position;
        }
        for (name, device) in gpus() {
            for role in [Role::Prompt, Role::Generated { reach: 300 }] {
                let all = output_of(device, |b| attention_case(b, &Case { op, role, room: 5, parts: 1 }, &rows, 0..5));
                let case = Case { op, role, room: 2, parts: 1 };
                let by_two = output_of(device, |b| attention_case(b, &case, &rows, 0..5));
                assert!(by_two == all, "{op:?}: rows by twos have other bits, on {name}");
                for row in 0..5 {
                    let (reach, case) = (rows[row].position + 1, |role| Case { op, role, room: 1, parts: 1 });
                    let role = if role == Role::Prompt { role } else { Role::Generated { reach } };
                    let alone = output_of(device, |b| attention_case(b, &case(role), &rows, row..row + 1));
                    assert!(alone == all[row * width..][..width], "{op:?}: row {row} has other bits alone, on {name}");
                }
            }
        }
    }
}

#[test]
fn a_prompt_of_several_sequences_has_the_bits_of_its_rows_alone() {
    // Two prompts, one behind the other, and a row of the first again: three runs within the rows of a workgroup. Pages in use.
    for shape in [[8, 1, 64, 0], [4, 4, 20, 0], [6, 2, 64, 40], [14, 2, 128, 0], [2, 1, 256, 0]] {
        let op = op(shape, 300, CacheFormat::F32);
        let row = |sequence, position| Row { token: 0, sequence, position, pad: 0 };
        let first = (60..130).map(|position| row(0, position));
        let rows: Vec<Row> = first.chain((0..40).map(|position| row(1, position))).chain([row(0, 299)]).collect();
        let (n, width) = (rows.len(), (shape[0] * shape[2]) as usize);
        let case = Case { op, role: Role::Prompt, room: 1, parts: 1 };
        check(&format!("{op:?}"), 2.0 * sum_tolerance(op.dh as usize + 300), |b| attention_case(b, &case, &rows, 0..n));
        for (name, device) in gpus() {
            let all = output_of(device, |b| attention_case(b, &case, &rows, 0..n));
            for row in [0, 5, 69, 70, 71, 109, 110] {
                let alone = output_of(device, |b| attention_case(b, &case, &rows, row..row + 1));
                assert!(alone == all[row * width..][..width], "{op:?}: row {row} has other bits alone, on {name}");
            }
            let run = output_of(device, |b| attention_case(b, &case, &rows, 33..77));
            assert!(run == all[33 * width..77 * width], "{op:?}: rows 33 to 76 have other bits alone, on {name}");
        }
    }
}

#[test]
fn what_a_row_does_not_see_may_be_anything() {
    // Position 5 holds NaN or infinity, and all of another sequence: rows before it do not feel them, those after it do.
    let op = op([4, 2, 8, 0], 16, CacheFormat::F32);
    let row = |sequence, position| Row { token: 0, sequence, position, pad: 0 };
    let rows: Vec<Row> = (0..8).map(|i| row(0, i)).chain((0..3).map(|i| row(1, i))).collect();
    for ((name, device), role) in
        gpus().iter().flat_map(|gpu| [Role::Prompt, Role::Generated { reach: 8 }].map(|role| (gpu, role)))
    {
        let run = |odd: [Option<f32>; 2]| {
            output_of(device, |b| {
                let (mut random, width) = (Random(3), 16);
                let qkv = random.f32s(11 * 64);
                let [keys, values] = odd.map(|odd| {
                    let mut cache = random.f32s(32 * width);
                    if let Some(odd) = odd {
                        cache[5 * width..6 * width].fill(odd);
                        cache[16 * width..].fill(odd);
                    }
                    cache
                });
                let table = b.input(&[0u32, 1]);
                let (keys, values) = (b.input(&keys), b.input(&values));
                let kv = KvCache { format: CacheFormat::F32, page: 16, pages: 1, table, keys, values };
                let (rows, qkv, a) = (b.input(&rows), b.input(&qkv), b.output(11 * 32));
                let mut p = program(11).of(role);
                p.attention(Attention { page: 16, pages: 1, ..op }, step(b, 11), [rows, qkv, a], &[kv], None, a);
                (p, vec![a])
            })
        };
        let plain = run([None; 2]);
        for odd in [[None, Some(f32::NAN)], [None, Some(f32::INFINITY)], [Some(f32::NAN), None], [Some(f32::NAN); 2]] {
            let got = run(odd);
            assert!(got[..5 * 32] == plain[..5 * 32], "{odd:?} reaches rows before it, on {name}");
            assert!(got[5 * 32..].iter().all(|v| !f32::from_bits(*v).is_finite()), "{odd:?} is lost, on {name}");
        }
    }
}

#[test]
fn attention_over_a_cache_in_parts_has_the_bits_of_one() {
    let devices: Vec<_> = [("twins", cpu())].into_iter().chain(gpus().iter().cloned()).collect();
    for (shape, capacity, last, parts) in [
        ([16, 8, 32, 0], 300, 299, &[2, 4, 8][..]), // several segments
        ([6, 3, 64, 13], 20, 500, &[3]),            // without sinks
        ([4, 4, 128, 128], 200, 450, &[2, 4]),
        ([24, 4, 20, 0], 1000, 970, &[4]), // heads of two workgroups share keys
    ] {
        for format in [CacheFormat::F32, CacheFormat::Bf16] {
            let op = op(shape, capacity, format);
            let rows = mixed_rows(5, 2, last);
            let host = HostStages { attention: true, ..HostStages::default() };
            for (role, host) in [
                (Role::Prompt, HostStages::default()),
                (Role::Generated { reach: last + 1 }, HostStages::default()),
                (Role::Prompt, host),
            ] {
                for (name, device) in &devices {
                    let run = |parts: usize| {
                        output_of(device, |b| {
                            let case = Case { op, role, room: 2, parts };
                            let (mut p, outputs) = attention_case(b, &case, &rows, 0..5);
                            let place = if host.attention { Place::Host } else { Place::Device };
                            p.launches.iter_mut().for_each(|launch| launch.place = place);
                            (p, outputs)
                        })
                    };
                    let whole = run(1);
                    for &parts in parts {
                        assert!(run(parts) == whole, "{op:?} {role:?} {host:?}, {parts} parts: other bits on {name}");
                    }
                }
            }
        }
    }
}

#[test]
fn rope_into_a_cache_in_parts_has_the_bits_of_one() {
    let devices: Vec<_> = [("twins", cpu())].into_iter().chain(gpus().iter().cloned()).collect();
    let (tokens, capacity) = (5, 40);
    for ([h, hk, dh], parts) in [([16, 8, 32], &[2, 4, 8][..]), ([6, 3, 20], &[3]), ([2, 2, 128], &[2])] {
        for (format, norm) in
            [(CacheFormat::F32, false), (CacheFormat::F32, true), (CacheFormat::Bf16, false), (CacheFormat::Bf16, true)]
        {
            // Queries, then the words of the cache as one part has them.
            let run = |device, parts: usize| {
                let (mut b, mut random) = (Bench::new(device), Random(dh as u64));
                let width = (h + 2 * hk) * dh;
                let row = |i: u32| Row { token: 0, sequence: i % 2, position: i * 7 + 30, pad: 0 };
                let rows = b.input(&(0..tokens as u32).map(row).collect::<Vec<_>>());
                let table = b.input(&random.f32s(80 * dh));
                let qkv = b.guarded(&random.f32s(tokens * width));
                let gains = [b.input(&random.bf16s(dh)), b.input(&random.bf16s(dh))];
                let row = format.bytes((hk * dh) as u64) as usize / 4 / parts;
                let (page, pages, of_pages) = pages(&mut b, capacity, 2);
                let mut part = |_| {
                    let [keys, values] = [7.0, 8.0].map(|old| b.guarded(&vec![old; 2 * capacity * row]));
                    KvCache { format, page, pages, table: of_pages, keys, values }
                };
                let cache: Vec<KvCache> = (0..parts).map(&mut part).collect();
                let mut p = program(tokens);
                let heads = [h, hk, dh].map(|n| n as u32);
                if norm {
                    p.norm_rope(1e-5, gains, Rotated { heads, rows, table, cache: &cache }, qkv);
                } else {
                    p.rope(heads, rows, table, qkv, &cache);
                }
                assert_eq!(p.launches.len(), parts);
                let joined = |b: &Bench, slices: Vec<Slice>| -> Vec<u32> {
                    let words = b.run(&Program::default(), &slices);
                    let of_row = |at: usize| words.iter().flat_map(move |part| part[at * row..][..row].to_vec());
                    (0..2 * capacity).flat_map(of_row).collect()
                };
                let qkv = b.run(&p, &[qkv]).swap_remove(0);
                let keys = joined(&b, cache.iter().map(|part| part.keys).collect());
                [qkv, keys, joined(&b, cache.iter().map(|part| part.values).collect())]
            };
            for (name, device) in &devices {
                let whole = run(device, 1);
                for &parts in parts {
                    let what = format!("H={h} Hk={hk} Dh={dh} {format:?} norm: {norm}, {parts} parts");
                    assert!(run(device, parts) == whole, "{what}: other bits on {name}");
                }
            }
        }
    }
}
