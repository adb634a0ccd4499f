//! Attention, with or without sinks, grouped heads and an optional sliding window.

use super::{CacheFormat, KvCache, Op, Row, Views};
use crate::program::{Launch, Program, Slice};
use crate::shader::{CACHE, Kernel, SINK};

pub(crate) const KERNEL: Kernel =
    Kernel { name: "attention", source: include_str!("../../shaders/attention.wgsl"), slots: &[CACHE, SINK] };

/// Constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Query heads.
    pub h: u32,
    /// Key/value heads.
    pub hk: u32,
    /// Head size.
    pub dh: u32,
    /// Keys that a query sees, itself included; 0: all.
    pub window: u32,
    /// The cache's.
    pub capacity: u32,
    /// The cache's.
    pub format: CacheFormat,
}

impl Program {
    /// `a[t,h] = sum_j softmax_j(q k_j / sqrt(Dh)) v_j` with the sink, if there is one, in the denominator. `qkv`: rotated, as `rope`
    /// leaves it; `sinks`: `[H]` bf16; `a`: `[T, H Dh]` f32.
    pub fn attention(
        &mut self,
        op: Attention,
        rows: Slice,
        qkv: Slice,
        cache: KvCache,
        sinks: Option<Slice>,
        a: Slice,
    ) {
        let launch = Launch::new(Op::Attention(op), &KERNEL, [op.h, self.tokens, 1])
            .fill("cache", cache.format.filling("cache"))
            .constant("H", op.h)
            .constant("HK", op.hk)
            .constant("DH", op.dh)
            .constant("CAPACITY", op.capacity)
            .constant("WINDOW", op.window)
            .read("rows", rows)
            .read("qkv", qkv)
            .read("keys", cache.keys)
            .read("values", cache.values)
            .write("a", a);
        self.push(match sinks {
            Some(sinks) => launch.fill("sink", "sink_bf16").read("sinks", sinks),
            None => launch.fill("sink", "sink_none"),
        });
    }
}

impl Attention {
    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        let rows = &bytemuck::cast_slice(views.words("rows"))[..tokens];
        let (keys, values) = (views.words("keys"), views.words("values"));
        let sinks = if views.has("sinks") { views.bf16("sinks") } else { &[] };
        self.reference(rows, views.f32("qkv"), keys, values, sinks, views.f32_mut("a"));
    }

    /// `rows [T]`, `qkv [T, (H + 2 Hk) Dh]`, `keys`, `values`: words of `[S, capacity, Hk Dh]`, `sinks [H]` or
    /// empty, `a [T, H Dh]`.
    pub fn reference(
        &self,
        rows: &[Row],
        qkv: &[f32],
        keys: &[u32],
        values: &[u32],
        sinks: &[half::bf16],
        a: &mut [f32],
    ) {
        let [h, hk, dh, capacity] = [self.h, self.hk, self.dh, self.capacity].map(|n| n as usize);
        for (t, row) in rows.iter().enumerate() {
            let end = row.position as usize + 1;
            let start = if self.window == 0 { 0 } else { end.saturating_sub(self.window as usize) };
            for head in 0..h {
                let q = &qkv[(t * (h + 2 * hk) + head) * dh..][..dh];
                let at = |j: usize| ((row.sequence as usize * capacity + j % capacity) * hk + head / (h / hk)) * dh;
                let load = |words: &[u32], i: usize| f64::from(self.format.load(words, i));
                let score = |j: usize| {
                    let dot: f64 = (0..dh).map(|i| f64::from(q[i]) * load(keys, at(j) + i)).sum();
                    dot / (dh as f64).sqrt()
                };
                let scores: Vec<f64> = (start..end).map(score).collect();
                let sink = sinks.get(head).map_or(f64::NEG_INFINITY, |s| s.to_f64());
                // Where a score is NaN, `max` passes it over, and the weights below carry it on.
                let m = scores.iter().copied().fold(sink, f64::max);
                let mut total = (sink - m).exp();
                let mut sums = vec![0.0; dh];
                for (j, s) in (start..end).zip(&scores) {
                    let weight = (s - m).exp();
                    total += weight;
                    for (i, sum) in sums.iter_mut().enumerate() {
                        *sum += weight * load(values, at(j) + i);
                    }
                }
                for (i, sum) in sums.iter().enumerate() {
                    a[(t * h + head) * dh + i] = (sum / total) as f32;
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
        let op = Attention { h: 1, hk: 1, dh: 4, window: 0, capacity: 2, format: CacheFormat::F32 };
        let qkv = [0.0; 12]; // score 0
        let values = [8.0f32, 4.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0].map(f32::to_bits);
        let mut a = [f32::NAN; 4];
        let sink = [half::bf16::from_f32(0.0)];
        op.reference(&[Row::default()], &qkv, &[0; 8], &values, &sink, &mut a);
        assert_eq!(a, [4.0, 2.0, 1.0, 0.5]);
    }
}
