//! Rotary position embedding, and appending to the KV cache.

use super::{HeadNorm, Op, Row, Views};
use crate::device::Limits;
use crate::program::{Launch, Program, Slice};
use crate::shader::{APPEND, HEADS, Kernel, LANES, REDUCE};

pub(crate) const KERNEL: Kernel =
    Kernel { name: "rope", source: include_str!("../../shaders/rope.wgsl"), slots: &[APPEND, HEADS, LANES, REDUCE] };

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheFormat {
    /// Four bytes an element, as computed.
    #[default]
    F32,
    /// Two bytes an element, rounded to nearest even.
    Bf16,
}

impl CacheFormat {
    /// Bytes of `n` elements.
    pub fn bytes(self, n: u64) -> u64 {
        match self {
            Self::F32 => n * 4,
            Self::Bf16 => n * 2,
        }
    }

    pub(crate) fn filling(self, slot: &'static str) -> &'static str {
        match (slot, self) {
            ("cache", Self::F32) => "cache_f32",
            ("cache", Self::Bf16) => "cache_bf16",
            ("append", Self::F32) => "append_f32",
            ("append", Self::Bf16) => "append_bf16",
            _ => unreachable!("slot {slot} is not the cache's"),
        }
    }

    /// Most elements of one buffer: what the device binds, and no more than kernels count in 32 bits.
    pub(crate) fn most(self, limits: Limits) -> u64 {
        (limits.max_binding_bytes / self.bytes(1)).min(1 << 32)
    }

    /// Element `i` of a cache in host memory.
    pub(crate) fn load(self, words: &[u32], i: usize) -> f32 {
        match self {
            Self::F32 => f32::from_bits(words[i]),
            Self::Bf16 => half::bf16::from_bits((words[i / 2] >> (i % 2 * 16)) as u16).to_f32(),
        }
    }

    fn store(self, words: &mut [u32], i: usize, v: f32) {
        match self {
            Self::F32 => words[i] = v.to_bits(),
            Self::Bf16 => {
                let bits = u32::from(half::bf16::from_f32(v).to_bits());
                let shift = i % 2 * 16;
                words[i / 2] = words[i / 2] & !(0xffff << shift) | bits << shift;
            }
        }
    }
}

/// Keys and values of one layer: pages of so many positions, `[.., page, Hk Dh]` each. Where a binding does not hold them, a
/// layer has several of these, each a part: equally many of the key/value heads, in order.
#[derive(Clone, Copy, Debug)]
pub struct KvCache {
    /// How an element is stored.
    pub format: CacheFormat,
    /// Positions of a page.
    pub page: u32,
    /// Pages that a sequence has room for: those of position p are used again by p + page pages.
    pub pages: u32,
    /// `[S, pages]` u32: which page each is.
    pub table: Slice,
    /// Rotated keys.
    pub keys: Slice,
    /// Values.
    pub values: Slice,
}

/// Of `hk` key/value heads the first that a part of the cache has, and how many it has.
pub(super) fn held(hk: u32, cache: &[KvCache], part: usize) -> [u32; 2] {
    let count = hk / cache.len() as u32;
    [part as u32 * count, count]
}

/// Constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Query heads.
    pub h: u32,
    /// Key/value heads.
    pub hk: u32,
    /// Head size.
    pub dh: u32,
    /// The first key/value head of the cache's part, and how many it has: these are computed, and their queries.
    pub held: [u32; 2],
    /// The cache's.
    pub page: u32,
    /// The cache's.
    pub pages: u32,
    /// The cache's.
    pub format: CacheFormat,
    /// What is added to the mean square of a head, where heads are normalised before.
    pub norm: Option<f32>,
}

/// How queries and keys are turned, and where keys and values go.
#[derive(Clone, Copy, Debug)]
pub struct Rotated<'a> {
    /// Query heads, key/value heads, head size.
    pub heads: [u32; 3],
    /// `Row [T]`.
    pub rows: Slice,
    /// `[C, Dh/2]` pairs of cos and sin.
    pub table: Slice,
    /// The cache, by its parts.
    pub cache: &'a [KvCache],
}

impl Rotated<'_> {
    /// What is done for a part of the cache.
    pub(super) fn op(&self, part: usize) -> Rope {
        let ([h, hk, dh], KvCache { page, pages, format, .. }) = (self.heads, self.cache[part]);
        Rope { h, hk, dh, held: held(hk, self.cache, part), page, pages, format, norm: None }
    }
}

impl Launch {
    /// Set where positions and heads stand in a part of the cache.
    pub(super) fn paged(self, cache: &KvCache, [first, count]: [u32; 2]) -> Self {
        self.constant("PAGE", cache.page)
            .constant("PAGES", cache.pages)
            .constant("PART_FIRST", first)
            .constant("PART", count)
            .read("pages", cache.table)
    }

    /// Bind what a rotation reads and the part of the cache that it appends to, and fill slot `append`.
    pub(super) fn rotated(self, to: Rotated<'_>, part: usize) -> Self {
        let (Rope { h, hk, dh, held, .. }, cache) = (to.op(part), &to.cache[part]);
        self.fill("append", cache.format.filling("append"))
            .constant("H", h)
            .constant("HK", hk)
            .constant("DH", dh)
            .read("rows", to.rows)
            .read("table", to.table)
            .paged(cache, held)
            .update("keys", cache.keys)
            .update("values", cache.values)
    }
}

impl Program {
    /// Rotate the queries of `qkv [T, (H + 2 Hk) Dh]` in place; append rotated keys, and values, to the parts of
    /// the cache, in a launch each. `table`: `[C, Dh/2]` pairs of cos and sin.
    pub fn rope(&mut self, heads: [u32; 3], rows: Slice, table: Slice, qkv: Slice, cache: &[KvCache]) {
        self.rope_after(None, Rotated { heads, rows, table, cache }, qkv);
    }

    /// [`Program::head_norm`] with `eps` and `gains`, then [`Program::rope`], in the same launches; `qkv` keeps keys as they were.
    pub fn norm_rope(&mut self, eps: f32, gains: [Slice; 2], to: Rotated<'_>, qkv: Slice) {
        self.rope_after(Some((eps, gains)), to, qkv);
    }

    fn rope_after(&mut self, norm: Option<(f32, [Slice; 2])>, to: Rotated<'_>, qkv: Slice) {
        let [h, hk, _] = to.heads;
        for part in 0..to.cache.len() {
            let op = Rope { norm: norm.map(|(eps, _)| eps), ..to.op(part) };
            let grid = [op.held[1] * (h / hk + 2), self.tokens, 1];
            let launch = Launch::new(Op::Rope(op), &KERNEL, grid).rotated(to, part).update("qkv", qkv);
            self.push(match norm {
                None => launch.fill("heads", "heads_plain"),
                Some((eps, gains)) => launch.fill("heads", "heads_normed").head_gains(eps, gains),
            });
        }
    }
}

impl Rope {
    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        let rows = &bytemuck::cast_slice(views.words("rows"))[..tokens];
        let (keys, values) = (views.words_mut("keys"), views.words_mut("values"));
        let (table, pages, qkv) = (views.f32("table"), views.words("pages"), views.f32_mut("qkv"));
        let Some(eps) = self.norm else {
            return self.reference(rows, table, pages, qkv, keys, values);
        };
        let Self { h, hk, dh, held: [first, count], .. } = *self;
        let (width, of_each) = (((h + 2 * hk) * dh) as usize, h / hk * dh);
        let queries = (first * of_each) as usize..((first + count) * of_each) as usize;
        let mut normed = qkv[..tokens * width].to_vec();
        HeadNorm { h, hk, dh, eps }.reference([views.bf16("q_gain"), views.bf16("k_gain")], &mut normed);
        self.reference(rows, table, pages, &mut normed, keys, values);
        for (row, normed) in qkv.chunks_exact_mut(width).zip(normed.chunks_exact(width)) {
            row[queries.clone()].copy_from_slice(&normed[queries.clone()]);
        }
    }

    /// `rows [T]`, `table [C, Dh/2, 2]`, `pages [S, pages]`, `qkv [T, (H + 2 Hk) Dh]`, `keys`, `values`: words of
    /// `[.., page, held Dh]`.
    pub fn reference(
        &self,
        rows: &[Row],
        table: &[f32],
        pages: &[u32],
        qkv: &mut [f32],
        keys: &mut [u32],
        values: &mut [u32],
    ) {
        let [h, hk, dh, page, places] = [self.h, self.hk, self.dh, self.page, self.pages].map(|n| n as usize);
        let [first, count] = self.held.map(|n| n as usize);
        for (t, row) in rows.iter().enumerate() {
            let position = row.position as usize;
            let held = pages[row.sequence as usize * places + position / page % places] as usize;
            let slot = held * page + position % page;
            let table = &table[position * dh..][..dh];
            for head in 0..h + 2 * hk {
                let kv = if head < h { head / (h / hk) } else { (head - h) % hk };
                if !(first..first + count).contains(&kv) {
                    continue; // another part's
                }
                let v = &mut qkv[(t * (h + 2 * hk) + head) * dh..][..dh];
                if head < h + hk {
                    let old = v.to_vec();
                    for i in 0..dh / 2 {
                        let (cos, sin) = (f64::from(table[2 * i]), f64::from(table[2 * i + 1]));
                        let (a, b) = (f64::from(old[i]), f64::from(old[i + dh / 2]));
                        v[i] = (a * cos - b * sin) as f32;
                        v[i + dh / 2] = (b * cos + a * sin) as f32;
                    }
                    if head >= h {
                        for (i, rotated) in v.iter().enumerate() {
                            self.format.store(keys, (slot * count + kv - first) * dh + i, *rotated);
                        }
                        v.copy_from_slice(&old); // the kernel leaves keys in `qkv` as they were
                    }
                } else {
                    for (i, value) in v.iter().enumerate() {
                        self.format.store(values, (slot * count + kv - first) * dh + i, *value);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Device, cpu::Cpu};

    #[test]
    fn a_buffer_holds_what_is_bound_and_what_32_bits_count() {
        let limits = |max_binding_bytes| Limits { max_binding_bytes, ..Cpu::default().limits() };
        let [f32, bf16] = [CacheFormat::F32, CacheFormat::Bf16];
        assert_eq!([f32, bf16].map(|format| format.most(limits(128 << 20))), [32 << 20, 64 << 20]);
        assert_eq!([f32, bf16].map(|format| format.most(limits(12 << 30))), [3 << 30, 1 << 32]);
    }
}
