//! Grouped-query attention over the cache, with optional windows and learned sinks.

use super::rope::held;
use super::{CacheFormat, KvCache, Op, Row, Views};
use crate::program::{Launch, Program, Role, Slice};
use crate::shader::{CACHE, Kernel, RESULT, SINK};

pub(crate) const KERNEL: Kernel =
    Kernel { name: "attention", source: include_str!("../../shaders/attention.wgsl"), slots: &[CACHE, SINK, RESULT] };
pub(crate) const MERGE: Kernel =
    Kernel { name: "attention_merge", source: include_str!("../../shaders/attention_merge.wgsl"), slots: &[SINK] };

/// For a prompt's rows, several at a time.
pub(crate) const FLASH: Kernel = Kernel {
    name: "attention_flash",
    source: include_str!("../../shaders/attention_flash.wgsl"),
    slots: &[CACHE, SINK],
};

/// Keys of a tile.
const KEYS: u32 = 128;
/// Most segments that a row's keys are shared among.
pub(crate) const SEGMENTS: u32 = 64;
/// Most query heads of one workgroup.
const HEADS: u32 = 4;
/// Heads of rows of one workgroup of a prompt.
const LINES: u32 = 64;

/// Constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Query heads.
    pub h: u32,
    /// Key/value heads.
    pub hk: u32,
    /// Head size, a multiple of 4.
    pub dh: u32,
    /// The first key/value head of the cache's part, and how many it has: their queries are computed.
    pub held: [u32; 2],
    /// Keys that a query sees; 0: all before it.
    pub window: u32,
    /// Positions of a page of the cache.
    pub page: u32,
    /// Pages that a sequence has room for.
    pub pages: u32,
    /// How keys and values are stored.
    pub format: CacheFormat,
    /// Segments that each row's keys are shared among at most, each leaving its part to `attention_merge`; 0: one
    /// workgroup sees all keys of a row.
    pub segments: u32,
    /// The first row of the step that is computed here.
    pub first: u32,
    /// How many rows are.
    pub rows: u32,
}

/// Constants of bringing segments together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionMerge(pub Attention);

/// How the visible keys of a row are shared: the keys of a segment, by how many there are.
fn segment_keys(visible: u32) -> u32 {
    visible.div_ceil(KEYS).div_ceil(SEGMENTS) * KEYS
}

/// Most segments of any row that sees no more keys than this.
pub(crate) fn segments_within(visible: u32) -> u32 {
    visible.div_ceil(KEYS).min(SEGMENTS)
}

/// Segments of a row that sees so many keys.
fn segments_of(visible: u32) -> u32 {
    visible.div_ceil(segment_keys(visible))
}

impl Program {
    /// Attention of every row over its sequence's cache. `qkv [T, (H + 2 Hk) Dh]` f32: rotated, as `rope` leaves it;
    /// `sinks`: `[H]` bf16; `a`: `[T, H Dh]` f32; `parts`: room for the segments of some rows, at least of one.
    ///
    /// A prompt's rows go several to a workgroup; a generated row's keys are shared among several, by how many they are.
    /// `step`: uniform with T. Each part of the cache has launches of its own, for the heads that it holds.
    pub fn attention(
        &mut self,
        op: Attention,
        step: Slice,
        [rows, qkv, parts]: [Slice; 3],
        cache: &[KvCache],
        sinks: Option<Slice>,
        a: Slice,
    ) {
        let tokens = self.tokens;
        if self.role == Role::Prompt {
            for launch in op.rows(0, tokens, 0).launches(&FLASH, rows, qkv, cache, sinks) {
                self.push(launch.read("step", step).update("a", a));
            }
            return;
        }
        let visible = |reach: u32| if op.window == 0 { reach } else { reach.min(op.window) };
        let segments = match self.role {
            Role::Generated { reach } if !self.host.attention => segments_within(visible(reach)).next_power_of_two(),
            _ => 1,
        };
        if segments == 1 {
            for launch in op.rows(0, tokens, 0).launches(&KERNEL, rows, qkv, cache, sinks) {
                self.push(launch.constant("FIRST", 0).fill("result", "result_whole").update("a", a));
            }
            return;
        }
        // Rows that `parts` has room for at a time.
        let row_bytes = u64::from(op.h * segments * (op.dh + 4)) * 4;
        let at_once = (parts.bytes / row_bytes).clamp(1, u64::from(tokens)) as u32;
        for first in (0..tokens).step_by(at_once as usize) {
            let op = op.rows(first, at_once.min(tokens - first), segments);
            for launch in op.launches(&KERNEL, rows, qkv, cache, sinks) {
                let launch =
                    launch.constant("FIRST", first).fill("result", "result_segment").constant("SEGMENTS", segments);
                self.push(launch.update("parts", parts));
            }
            let merge = Launch::new(Op::AttentionMerge(AttentionMerge(op)), &MERGE, [op.h, op.rows, 1])
                .constant("H", op.h)
                .constant("DH", op.dh)
                .constant("WINDOW", op.window)
                .constant("SEGMENTS", segments)
                .constant("FIRST", first)
                .read("rows", rows)
                .read("parts", parts)
                .sinks(sinks)
                .update("a", a);
            self.push(merge);
        }
    }
}

impl Launch {
    fn sinks(self, sinks: Option<Slice>) -> Self {
        match sinks {
            Some(sinks) => self.fill("sink", "sink_bf16").read("sinks", sinks),
            None => self.fill("sink", "sink_none"),
        }
    }
}

impl Attention {
    /// For these rows of a step and so many segments.
    fn rows(self, first: u32, rows: u32, segments: u32) -> Self {
        Self { segments, first, rows, ..self }
    }

    /// One for each part of the cache.
    fn launches(
        self,
        kernel: &'static Kernel,
        rows: Slice,
        qkv: Slice,
        cache: &[KvCache],
        sinks: Option<Slice>,
    ) -> impl Iterator<Item = Launch> {
        let part =
            move |(i, part)| Self { held: held(self.hk, cache, i), ..self }.launch(kernel, rows, qkv, part, sinks);
        cache.iter().enumerate().map(part)
    }

    fn launch(self, kernel: &'static Kernel, rows: Slice, qkv: Slice, cache: &KvCache, sinks: Option<Slice>) -> Launch {
        // Query heads that share their keys go together, as many as a workgroup takes.
        let (group, flash) = (self.h / self.hk, kernel.name == FLASH.name);
        let most = if flash { LINES } else { HEADS };
        let heads = (1..=most.min(group)).rev().find(|n| group.is_multiple_of(*n)).unwrap_or(1);
        let rows_each = if flash { LINES / heads } else { 1 };
        let grid = [self.held[1] * group / heads, self.rows.div_ceil(rows_each), self.segments.max(1)];
        let launch = Launch::new(Op::Attention(self), kernel, grid)
            .fill("cache", cache.format.filling("cache"))
            .constant("H", self.h)
            .constant("HK", self.hk)
            .constant("DH", self.dh)
            .constant("WINDOW", self.window)
            .constant("HEADS", heads)
            .read("rows", rows)
            .read("qkv", qkv)
            .paged(cache, self.held)
            .read("keys", cache.keys)
            .read("values", cache.values);
        // A merge takes the sinks into account, once for all segments.
        if self.segments == 0 { launch.sinks(sinks) } else { launch }
    }

    pub(crate) fn twin(&self, _: usize, views: &mut Views<'_>) {
        let seen = Seen {
            rows: bytemuck::cast_slice(views.words("rows")),
            qkv: views.f32("qkv"),
            keys: views.words("keys"),
            values: views.words("values"),
            pages: views.words("pages"),
        };
        if self.segments == 0 {
            let sinks = if views.has("sinks") { views.bf16("sinks") } else { &[] };
            self.reference(&seen, sinks, views.f32_mut("a"));
        } else {
            self.reference_segments(&seen, views.f32_mut("parts"));
        }
    }

    /// The positions that a row sees.
    fn visible(&self, row: &Row) -> std::ops::Range<usize> {
        let end = row.position as usize + 1;
        let start = if self.window == 0 { 0 } else { end.saturating_sub(self.window as usize) };
        start..end
    }

    /// `sinks [H]` or empty, `a [T, H Dh]`.
    pub fn reference(&self, seen: &Seen<'_>, sinks: &[half::bf16], a: &mut [f32]) {
        let (h, dh) = (self.h as usize, self.dh as usize);
        for t in self.first as usize..(self.first + self.rows) as usize {
            for head in self.heads() {
                let sink = sinks.get(head).map_or(f64::NEG_INFINITY, |s| s.to_f64());
                // Rounded to f32 as a segment is: a row has the same bits whether or not its step has segments.
                let (m, total, sums) = self.over(seen, t, head, self.visible(&seen.rows[t]), f64::NEG_INFINITY);
                let (m, total) = (f64::from(m as f32), f64::from(total as f32));
                let top = sink.max(m);
                let weight = (m - top).exp();
                let total = (sink - top).exp() + weight * total;
                for (i, sum) in sums.iter().enumerate() {
                    a[(t * h + head) * dh + i] = (weight * f64::from(*sum as f32) / total) as f32;
                }
            }
        }
    }

    /// `parts [ROWS, H, SEGMENTS, Dh + 4]`: of each segment the largest score, the sum of weights, two zeros, the sums.
    pub fn reference_segments(&self, seen: &Seen<'_>, parts: &mut [f32]) {
        let [h, dh, segments] = [self.h, self.dh, self.segments].map(|n| n as usize);
        for t in self.first as usize..(self.first + self.rows) as usize {
            let visible = self.visible(&seen.rows[t]);
            let keys = segment_keys(visible.len() as u32) as usize;
            for (s, start) in visible.clone().step_by(keys).enumerate() {
                for head in self.heads() {
                    let range = start..(start + keys).min(visible.end);
                    let (m, total, sums) = self.over(seen, t, head, range, f64::NEG_INFINITY);
                    let at = (((t - self.first as usize) * h + head) * segments + s) * (dh + 4);
                    let part = &mut parts[at..at + dh + 4];
                    part[..4].copy_from_slice(&[m as f32, total as f32, 0.0, 0.0]);
                    for (to, sum) in part[4..].iter_mut().zip(sums) {
                        *to = sum as f32;
                    }
                }
            }
        }
    }

    /// The query heads that are computed.
    fn heads(&self) -> std::ops::Range<usize> {
        let ([first, count], group) = (self.held, self.h / self.hk);
        (first * group) as usize..((first + count) * group) as usize
    }

    /// Of the keys in `range`: the largest score (or `least`), the sum of weights, the weighted sums.
    fn over(
        &self,
        seen: &Seen<'_>,
        t: usize,
        head: usize,
        range: std::ops::Range<usize>,
        least: f64,
    ) -> (f64, f64, Vec<f64>) {
        let [h, hk, dh, page, pages] = [self.h, self.hk, self.dh, self.page, self.pages].map(|n| n as usize);
        let [first, count] = self.held.map(|n| n as usize);
        let sequence = seen.rows[t].sequence as usize;
        let q = &seen.qkv[(t * (h + 2 * hk) + head) * dh..][..dh];
        let at = |j: usize| {
            let row = seen.pages[sequence * pages + j / page % pages] as usize * page + j % page;
            (row * count + head / (h / hk) - first) * dh
        };
        let load = |words: &[u32], i: usize| f64::from(self.format.load(words, i));
        let score = |j: usize| {
            let dot: f64 = (0..dh).map(|i| f64::from(q[i]) * load(seen.keys, at(j) + i)).sum();
            dot / (dh as f64).sqrt()
        };
        let scores: Vec<f64> = range.clone().map(score).collect();
        // Where a score is NaN, `max` passes it over, and the weights below carry it on.
        let m = scores.iter().copied().fold(least, f64::max);
        let (mut total, mut sums) = (0.0, vec![0.0; dh]);
        for (j, s) in range.zip(&scores) {
            let weight = (s - m).exp();
            total += weight;
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum += weight * load(seen.values, at(j) + i);
            }
        }
        (m, total, sums)
    }
}

/// What attention reads.
pub struct Seen<'a> {
    /// `Row [T]`.
    pub rows: &'a [Row],
    /// `[T, (H + 2 Hk) Dh]`.
    pub qkv: &'a [f32],
    /// Words of `[.., page, held Dh]`.
    pub keys: &'a [u32],
    /// As `keys`.
    pub values: &'a [u32],
    /// `[S, pages]`.
    pub pages: &'a [u32],
}

impl AttentionMerge {
    pub(crate) fn twin(&self, _: usize, views: &mut Views<'_>) {
        let rows = bytemuck::cast_slice(views.words("rows"));
        let sinks = if views.has("sinks") { views.bf16("sinks") } else { &[] };
        self.reference(rows, views.f32("parts"), sinks, views.f32_mut("a"));
    }

    /// `rows [T]`, `parts [ROWS, H, SEGMENTS, Dh + 4]`, `sinks [H]` or empty, `a [T, H Dh]`.
    pub fn reference(&self, rows: &[Row], parts: &[f32], sinks: &[half::bf16], a: &mut [f32]) {
        let op = &self.0;
        let [h, dh, segments] = [op.h, op.dh, op.segments].map(|n| n as usize);
        for t in op.first as usize..(op.first + op.rows) as usize {
            let count = segments_of(op.visible(&rows[t]).len() as u32) as usize;
            for head in 0..h {
                let sink = sinks.get(head).map_or(f64::NEG_INFINITY, |s| s.to_f64());
                let at = ((t - op.first as usize) * h + head) * segments * (dh + 4);
                let parts = &parts[at..at + count * (dh + 4)];
                let parts = parts.chunks_exact(dh + 4);
                let m = parts.clone().fold(sink, |m, part| m.max(f64::from(part[0])));
                let (mut total, mut sums) = ((sink - m).exp(), vec![0.0; dh]);
                for part in parts {
                    let weight = (f64::from(part[0]) - m).exp();
                    total += weight * f64::from(part[1]);
                    for (sum, v) in sums.iter_mut().zip(&part[4..]) {
                        *sum += weight * f64::from(*v);
                    }
                }
                for (to, sum) in a[(t * h + head) * dh..].iter_mut().zip(sums) {
                    *to = (sum / total) as f32;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_key_shares_its_weight_with_the_sink_only() {
        let format = CacheFormat::F32;
        let (window, held) = (0, [0, 1]);
        let op =
            Attention { h: 1, hk: 1, dh: 4, held, window, page: 2, pages: 1, format, segments: 0, first: 0, rows: 1 };
        let values = [8.0f32, 4.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0].map(f32::to_bits);
        let seen = Seen { rows: &[Row::default()], qkv: &[0.0; 12], keys: &[0; 8], values: &values, pages: &[0] };
        let mut a = [f32::NAN; 4];
        op.reference(&seen, &[half::bf16::from_f32(0.0)], &mut a);
        assert_eq!(a, [4.0, 2.0, 1.0, 0.5]);
    }

    #[test]
    fn segments_follow_the_number_of_keys_and_are_at_most_64() {
        assert_eq!([1, 128, 129, 4096, 8192, 8193, 1 << 20].map(segments_of), [1, 1, 2, 32, 64, 33, 64]);
    }
}
