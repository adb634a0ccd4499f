//! The buffers of a conversation: activations of a step, the KV cache, and rows quantised for W4A4.

use super::{heads, norm, window};
use crate::checkpoint::ScaleOrder;
use crate::config::Config;
use crate::device::{Buffer, Device};
use crate::error::{Error, Result};
use crate::format::Format;
use crate::ops::{
    ActScale, Activations, Addend, CacheFormat, ChosenGroup, Drawing, Drawn, ExpertScales, Experts, Group, HeadNorm,
    Input, InputScales, Kept, KvCache, LinearAdd, MoeDownAdd, MoeScatter, NormLinear, PARTS, Peak, Piece, Projection,
    RmsNorm, Rotated, Router, Routes, Routing, Row, Scored, StageActivation, Staging, Step, Swiglu, Weight,
    segments_within, staged_words,
};
use crate::program::{HostStages, Program, Role, Slice};
use crate::sampler::{POWERS, Rule};
use std::sync::Arc;

/// Positions of a page of a conversation's cache.
const PAGE: u32 = 16;
/// Bytes that the segments of attention may take, of as many rows at a time as fit.
const SEGMENT_BYTES: u64 = 64 << 20;
/// The same for the sums that tokens are drawn by.
const SUM_BYTES: u64 = 16 << 20;

/// Routes of a step, for each expert, from which tiles have four routes instead of two. Below half a route an expert routes
/// go one by one: few would share weights.
const ROUTES_MANY: u32 = 4;
/// The same with matrix units: up to so many, tiles have 16 routes, not 64.
const ROUTES_FEW: u32 = 16;

/// How a model is loaded, and sizes of a conversation's buffers.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Positions that the cache of a full layer holds.
    pub context: u32,
    /// Most rows in one step.
    pub chunk: u32,
    /// A cache whose pages several sequences share; `None`: one conversation's, with pages of its own.
    pub paged: Option<Paged>,
    /// How keys and values are stored.
    pub cache: CacheFormat,
    /// Stages that the host computes.
    pub host: HostStages,
    /// What enters the products with NVFP4 weights.
    pub activations: Activations,
    /// The order of NVFP4 block scales in the file.
    pub scale_order: ScaleOrder,
}

/// A cache of pages that are handed out as sequences grow (`kv.rs`).
#[derive(Clone, Copy, Debug)]
pub struct Paged {
    /// Most sequences at once.
    pub sequences: u32,
    /// Most rows of a step that are drafted.
    pub drafts: u32,
    /// Positions of a page.
    pub page: u32,
    /// Pages of the layers that see everything, and of the sliding ones.
    pub pages: [u32; 2],
}

impl Plan {
    /// The plan is possible for this model.
    pub fn check(&self, config: &Config) -> Result<()> {
        let limit = config.max_position_embeddings;
        if self.context == 0 || self.context as usize > limit {
            let reason = format!("{} is out of range: the model allows 1 to {limit} positions", self.context);
            return Err(Error::option("context", reason));
        }
        if self.chunk == 0 || self.chunk > 2048 {
            return Err(Error::option("chunk", format!("{} is out of range: 1 to 2048 tokens", self.chunk)));
        }
        Ok(())
    }

    /// Positions that layer `idx` keeps of a sequence: a sliding layer its window, and room for two chunks, so that a
    /// whole chunk is appended before its first row looks back, and that 2 chunk + 1 tokens can be taken back.
    fn capacity(&self, config: &Config, idx: usize) -> u32 {
        let positions = match window(config, idx) {
            0 => self.context,
            window => self.context.min(window + 2 * self.chunk),
        };
        positions.next_multiple_of(PAGE)
    }

    /// Rows that a step of generated rows has room for: one of each sequence, and what is drafted.
    fn generated(&self) -> u32 {
        self.paged.map_or(1, |paged| paged.sequences + paged.drafts)
    }

    /// For layer `idx`: positions of a page, a sequence's places in the page table, pages in all.
    fn layout(&self, config: &Config, idx: usize) -> [u32; 3] {
        match self.paged {
            None => {
                let pages = self.capacity(config, idx) / PAGE;
                [PAGE, pages, pages]
            }
            Some(Paged { page, pages, .. }) => {
                [page, self.context.div_ceil(page), pages[usize::from(window(config, idx) > 0)]]
            }
        }
    }

    /// Whether a sequence can be cut back to `len` tokens, given that positions below `written` have been written:
    /// every sliding layer must still have the keys that the row at position `len` looks back to.
    pub fn can_cut(&self, config: &Config, len: usize, written: usize) -> bool {
        (0..config.num_hidden_layers).all(|idx| {
            let (window, capacity) = (window(config, idx) as usize, self.capacity(config, idx) as usize);
            // The next row, at position `len`, looks back to len + 1 - window; older keys than written - capacity
            // have been overwritten.
            window == 0 || written <= capacity || (len + 1).saturating_sub(window) + capacity >= written
        })
    }
}

/// The buffers of one conversation. What a family does not use is as small as a buffer can be.
#[derive(Debug)]
pub struct State {
    /// `Row [T]`.
    pub rows: Slice,
    /// Uniform with T.
    pub step: Slice,
    /// `[P]` u32: rows of the step whose logits are wanted.
    pub picks: Slice,
    /// Uniform with P.
    pub head_step: Slice,
    /// `[P, V]` f32.
    pub logits: Slice,
    /// `[P]` of `ops::Drawn`.
    pub drawn: Slice,
    /// What tokens are drawn from.
    pub(super) drawing: Drawing,
    /// Most picks at once.
    pub max_picks: u32,
    /// The residual stream where a layer begins.
    pub(super) x: Slice,
    /// The residual stream between attention and what follows it.
    pub(super) mid: Slice,
    pub(super) h: Slice,
    pub(super) qkv: Slice,
    pub(super) a: Slice,
    /// What segments of attention leave.
    pub(super) parts: Slice,
    pub(super) delta: Slice,
    pub(super) scores: Slice,
    /// What each sixteen of the residual stream gives to them, where few are chosen from.
    shares: Slice,
    pub(super) routes: Routes,
    /// The routes by expert: `Tile`s.
    tiles: Slice,
    /// Gate and up of a dense MLP.
    pub(super) gate_up: Slice,
    /// What enters the second matrix of experts or of a dense MLP.
    pub(super) e: Slice,
    pub(super) y: Slice,
    pub(super) last: Slice,
    pub(super) last_norm: Slice,
    /// By layer, the parts of its cache: one where a binding holds it.
    pub(super) kv: Vec<Vec<KvCache>>,
    /// cos and sin of every position that the context holds, `[C, Dh/2]` pairs.
    pub(super) rope_table: Slice,
    pub(super) host: HostStages,
    /// Whether the device has matrix units.
    pub(super) matrix: bool,
    max_storage_buffers: u32,
    windows: Vec<u32>,
    activations: Activations,
    staging: Option<Staging>,
    /// Page tables of the layers that see everything, and of the sliding ones.
    tables: [Option<Buffer>; 2],
    /// The powers that weights are made of, and the sequences' rules.
    drawn_by: [Buffer; 2],
    buffers: Vec<Buffer>,
}

/// Which rows are quantised for a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rows {
    /// One for each token.
    Tokens,
    /// One for each of a token's `a` routes.
    Routes { a: u32 },
    /// A token's one row, once for each of its `a` routes: experts with scales of their own.
    Spread { a: u32 },
}

impl State {
    /// Buffers for one conversation.
    pub(super) fn new(device: &Arc<dyn Device>, c: &Config, plan: &Plan, rope_table: Slice) -> Result<Self> {
        let t = u64::from(plan.chunk.max(plan.generated()));
        let [d, f, moe_f, vocab] =
            [c.hidden_size, c.intermediate_size, c.moe_intermediate_size, c.vocab_size].map(|n| n as u64);
        let [h, hk, dh] = [c.num_attention_heads, c.num_key_value_heads, c.head_dim].map(|n| n as u64);
        let [e, a] = [c.num_local_experts, c.num_experts_per_tok].map(|n| n as u64);
        let dense_f = if c.moe_layers.contains(&false) { f } else { 0 };
        let picks =
            t.min(16).max(u64::from(plan.generated())).min((device.limits().max_binding_bytes / (vocab * 4)).max(1));
        let mut buffers = Vec::new();
        let mut new = |label: &str, bytes: u64| -> Result<Slice> {
            let buffer = Buffer::new(device, label, bytes)?;
            let slice = buffer.slice();
            buffers.push(buffer);
            Ok(slice)
        };
        // Sliding layers share a table, and so do the others.
        let mut tables: [Option<Buffer>; 2] = [None, None];
        let most = plan.cache.most(device.limits());
        let kv = (0..c.num_hidden_layers)
            .map(|idx| {
                let [page, places, pages] = plan.layout(c, idx);
                let table = &mut tables[usize::from(window(c, idx) > 0)];
                if table.is_none() {
                    // A conversation's pages lie in order; others are written down as they are handed out.
                    let entries: Vec<u32> = match plan.paged {
                        None => (0..pages).collect(),
                        Some(paged) => vec![0; paged.sequences as usize * places as usize],
                    };
                    *table = Some(Buffer::with_bytes(device, "page table", bytemuck::cast_slice(&entries))?);
                }
                let table = table.as_ref().expect("just made").slice();
                // As few parts as fit, of whole heads: a row of attention sees all of its keys in one buffer.
                let head = u64::from(pages) * u64::from(page) * dh;
                let fits = |parts: &u64| hk.is_multiple_of(*parts) && hk / parts * head <= most;
                let parts = (1..hk).find(fits).unwrap_or(hk);
                let bytes = plan.cache.bytes(hk / parts * head);
                let mut new = |what: &str| new(&format!("KV cache, {what} of layer {idx}"), bytes);
                let part = |_| {
                    let (keys, values) = (new("keys")?, new("values")?);
                    Ok(KvCache { format: plan.cache, page, pages: places, table, keys, values })
                };
                (0..parts).map(part).collect::<Result<Vec<_>>>()
            })
            .collect::<Result<Vec<_>>>()?;
        let staging = match plan.activations {
            Activations::F32 => None,
            _ => {
                // Every token may go up with a scale for each of its experts.
                let rows = t * a.max(1);
                let words = [d, h * dh, dense_f, moe_f].map(|k| staged_words(k as usize)).into_iter().max();
                Some(Staging {
                    rows: new("quantised rows", rows * words.unwrap_or(0) as u64 * 4)?,
                    scales: new("scales of quantised rows", rows * 4)?,
                    report: new("report of quantised rows", rows * 8)?,
                    amaxes: new("largest magnitudes of rows", rows * 4)?,
                })
            }
        };
        let tile_bytes = |routes| {
            let group = Group { e: e as u32, a: a as u32, routes };
            u64::from(group.tiles(t as u32)) * group.tile_bytes()
        };
        let segment_bytes = SEGMENT_BYTES.min(device.limits().max_binding_bytes);
        // Of generated rows; a prompt's attention leaves no parts.
        let row_parts = h * u64::from(segments_within(plan.context).next_power_of_two()) * (dh + 4) * 4;
        let parts = (row_parts * u64::from(plan.generated()).max(t.min(8))).min(segment_bytes.max(row_parts));
        let powers = Buffer::with_bytes(device, "powers of two", bytemuck::cast_slice(&POWERS))?;
        let sequences = plan.paged.map_or(1, |paged| u64::from(paged.sequences));
        let rules = Buffer::new(device, "rules of drawing", sequences * size_of::<Rule>() as u64)?;
        let (rows, logits) = (new("rows", t * size_of::<Row>() as u64)?, new("logits", picks * vocab * 4)?);
        let row_sums = Drawing::row_bytes(c.vocab_size as u32, device.limits().max_binding_bytes);
        let sums = (picks * row_sums).min(SUM_BYTES.min(device.limits().max_binding_bytes).max(row_sums));
        let drawing = Drawing {
            logits,
            powers: powers.slice(),
            rules: rules.slice(),
            rows,
            parts: new("parts of drawn tokens", picks * u64::from(PARTS) * size_of::<Peak>() as u64)?,
            kept: new("tokens that filters keep", picks * size_of::<Kept>() as u64)?,
            sums: new("sums of weights", sums)?,
        };
        Ok(Self {
            rows,
            step: new("step", size_of::<Step>() as u64)?,
            picks: new("picks", picks * 4)?,
            head_step: new("head step", size_of::<Step>() as u64)?,
            logits,
            drawn: new("drawn tokens", picks * size_of::<Drawn>() as u64)?,
            drawing,
            max_picks: picks as u32,
            x: new("x", t * d * 4)?,
            mid: new("x after attention", t * d * 4)?,
            h: new("h", t * d * 4)?,
            qkv: new("qkv", t * (h + 2 * hk) * dh * 4)?,
            a: new("attention", t * h * dh * 4)?,
            parts: new("segments of attention", parts)?,
            delta: new("delta", t * d * 4)?,
            scores: new("scores", t * e * 4)?,
            shares: new("shares of scores", LinearAdd::share_words(d as u32, e as u32) as u64 * 4)?,
            routes: Routes { experts: new("experts", t * a * 4)?, weights: new("weights", t * a * 4)? },
            tiles: new("tiles of routes", [2, 4, 16, 64].map(tile_bytes).into_iter().max().unwrap_or(0))?,
            gate_up: new("gate and up", t * 2 * dense_f * 4)?,
            e: new("expert activations", t * (a * moe_f).max(dense_f) * 4)?,
            y: new("expert outputs", t * a * d * 4)?,
            last: new("last", picks * d * 4)?,
            last_norm: new("last norm", picks * d * 4)?,
            kv,
            rope_table,
            host: plan.host,
            matrix: device.limits().matrix,
            max_storage_buffers: device.limits().max_storage_buffers,
            windows: (0..c.num_hidden_layers).map(|idx| window(c, idx)).collect(),
            activations: plan.activations,
            staging,
            tables,
            drawn_by: [powers, rules],
            buffers,
        })
    }

    /// Bytes of all buffers, page tables and rules.
    pub fn bytes(&self) -> u64 {
        self.buffers.iter().chain(self.tables.iter().flatten()).chain(&self.drawn_by).map(|b| b.slice().bytes).sum()
    }

    /// Where the rules of the sequences stand, by which tokens are drawn.
    pub fn rules(&self) -> Slice {
        self.drawing.rules
    }

    /// The page tables, `[S, places]`, of layers that see everything and of sliding ones, as far as there are such.
    pub fn tables(&self) -> [Option<Slice>; 2] {
        self.tables.each_ref().map(|table| table.as_ref().map(Buffer::slice))
    }

    /// Every buffer, in the order in which they are made: the same for all states of one model and plan on devices that bind as much.
    pub fn slices(&self) -> Vec<Slice> {
        self.buffers.iter().map(Buffer::slice).collect()
    }

    /// The keys and values of every layer.
    pub fn cache(&self) -> impl Iterator<Item = Slice> {
        self.kv.iter().flatten().flat_map(|kv| [kv.keys, kv.values])
    }

    /// The caches of the sliding layers, where a position's row is used again by a later one.
    pub fn rings(&self) -> impl Iterator<Item = Slice> {
        let sliding = self.windows.iter().zip(&self.kv).filter(|(window, _)| **window > 0);
        sliding.flat_map(|(_, kv)| kv).flat_map(|kv| [kv.keys, kv.values])
    }

    /// Whether a step's one generated row goes through launches that do several ops: the same bits in less time.
    fn fuses(&self, p: &Program) -> bool {
        let alone = p.tokens() == 1 && p.role != Role::Prompt && !p.in_parts;
        let exact = self.activations == Activations::F32 && self.host == HostStages::default();
        alone && exact && self.max_storage_buffers >= NormLinear::BINDINGS
    }

    /// Record the beginning of layer `idx`: what the layer before adds, the norm, queries, keys and values, which are
    /// rotated and appended. `head_gains`: of norms in between.
    pub(super) fn queries(
        &self,
        p: &mut Program,
        c: &Config,
        idx: usize,
        addend: Option<Addend>,
        (gain, w, head_gains): (Slice, &Projection, Option<[Slice; 2]>),
    ) {
        let name = |what: &'static str| move || format!("layers.{idx}.{what}");
        let (norm, heads, kv) = (norm(c), heads(c), &self.kv[idx]);
        let to = Rotated { heads, rows: self.rows, table: self.rope_table, cache: kv };
        let mut rotated = false;
        if self.fuses(p) && NormLinear::takes(w) {
            rotated = head_gains.is_none() && kv.len() == 1;
            let to = rotated.then_some(to);
            match addend {
                None => p.norm_linear(norm, (self.x, None, gain), self.h, w, to, self.qkv),
                Some(addend) => {
                    p.norm_linear(norm, (self.mid, Some((addend, self.x)), gain), self.h, w, to, self.qkv);
                    p.stage(|| format!("layers.{}.hidden", idx - 1), self.x, norm.d as usize);
                }
            }
            p.stage(name("attn_norm"), self.h, norm.d as usize);
        } else {
            match addend {
                Some(addend) => self.end_layer(p, norm, addend, gain, idx - 1),
                None => p.rms_norm(norm, self.x, gain, self.h),
            }
            p.stage(name("attn_norm"), self.h, norm.d as usize);
            self.project(p, w, self.h, self.qkv, name("attn_norm.staged"));
        }
        if !rotated {
            p.stage(name("qkv"), self.qkv, w.n as usize);
            match head_gains {
                Some(gains) if p.in_parts => {
                    let [h, hk, dh] = heads;
                    p.head_norm(HeadNorm { h, hk, dh, eps: norm.eps }, gains, self.qkv);
                    p.stage(name("qkv_norm"), self.qkv, w.n as usize);
                    p.rope(heads, self.rows, self.rope_table, self.qkv, kv);
                }
                Some(gains) => p.norm_rope(norm.eps, gains, to, self.qkv),
                None => p.rope(heads, self.rows, self.rope_table, self.qkv, kv),
            }
        }
    }

    /// Record what follows attention in layer `idx`: its output into the residual stream, the norm. Whether `y = w h + bias`
    /// was recorded, too; if not, it is the caller's.
    pub(super) fn after_attention(
        &self,
        p: &mut Program,
        norm: RmsNorm,
        idx: usize,
        gain: Slice,
        (w, y): (&Projection, Slice),
    ) -> bool {
        let fused = self.fuses(p) && NormLinear::takes(w);
        if fused {
            let added = (Addend::Rows(self.delta), self.mid);
            p.norm_linear(norm, (self.x, Some(added), gain), self.h, w, None, y);
            p.stage(|| format!("layers.{idx}.mlp_norm"), self.h, norm.d as usize);
        } else {
            self.mlp_norm(p, norm, idx, gain);
        }
        fused
    }

    /// Record attention's output into the residual stream, and the norm.
    fn mlp_norm(&self, p: &mut Program, norm: RmsNorm, idx: usize, gain: Slice) {
        if p.in_parts {
            p.add(norm.d, self.x, self.delta, self.mid);
            p.rms_norm(norm, self.mid, gain, self.h);
        } else {
            p.add_norm(norm, self.x, Addend::Rows(self.delta), gain, [self.mid, self.h]);
        }
        p.stage(|| format!("layers.{idx}.mlp_norm"), self.h, norm.d as usize);
    }

    /// Record attention's output into the residual stream, the norm, and the router's scores.
    fn router_scores(&self, p: &mut Program, norm: RmsNorm, idx: usize, gain: Slice, router: &Projection) {
        if p.role != Role::Prompt && NormLinear::takes_few(router) {
            p.norm_linear_few(norm, (self.x, self.delta, gain), [self.mid, self.h], router, self.scores);
            p.stage(|| format!("layers.{idx}.mlp_norm"), self.h, norm.d as usize);
        } else {
            self.mlp_norm(p, norm, idx, gain);
            p.projection(self.step, router, self.h, self.scores);
        }
        p.stage(|| format!("layers.{idx}.mlp.router.logits"), self.scores, router.n as usize);
    }

    /// Record the end of layer `idx`, and the norm that follows it.
    pub(super) fn end_layer(&self, p: &mut Program, norm: RmsNorm, addend: Addend, gain: Slice, idx: usize) {
        let routed = matches!(addend, Addend::Routes { .. });
        if p.in_parts || (routed && p.host.scatter) {
            self.add(p, norm, addend, idx);
            p.rms_norm(norm, self.x, gain, self.h);
            return;
        }
        p.add_norm(norm, self.mid, addend, gain, [self.x, self.h]);
        p.stage(|| format!("layers.{idx}.hidden"), self.x, norm.d as usize);
    }

    /// Record what layer `idx` ends with: the residual stream with what it adds.
    pub(super) fn add(&self, p: &mut Program, norm: RmsNorm, addend: Addend, idx: usize) {
        let y = match addend {
            Addend::Rows(y) => y,
            Addend::Routes { a, routes, x, sum } => {
                p.moe_scatter(MoeScatter { a, d: norm.d }, routes, x, sum);
                p.stage(|| format!("layers.{idx}.mlp.out"), sum, norm.d as usize);
                sum
            }
        };
        p.add(norm.d, self.mid, y, self.x);
        p.stage(|| format!("layers.{idx}.hidden"), self.x, norm.d as usize);
    }

    /// Record `y = w x + bias` by row, with x quantised first where the plan says so and the weight is NVFP4. `name`: of
    /// the stage that reports on quantising.
    pub(super) fn project(&self, p: &mut Program, w: &Projection, x: Slice, y: Slice, name: impl Fn() -> String) {
        // Either all NVFP4 pieces have a calibrated scale or none: what is shared is not overwritten between its uses.
        let calibrated = |piece: &Piece| piece.weight.format == Format::Nvfp4 && piece.input_scale.is_some();
        let own = |piece: &Piece| piece.weight.format == Format::Nvfp4 && piece.input_scale.is_none();
        debug_assert!(!(w.pieces.iter().any(calibrated) && w.pieces.iter().any(own)), "one mode for all pieces");
        let mut shared = None;
        for (i, piece) in w.pieces.iter().enumerate() {
            // Pieces with calibrated scales of their own quantise the same rows again: `.staged.2` and so on.
            let name = || if i == 0 { name() } else { format!("{}.{}", name(), i + 1) };
            let input = match (shared, piece.input_scale) {
                // What is quantised by its own measure serves all pieces; a calibrated scale serves its own.
                (Some(input), None) if piece.weight.format == Format::Nvfp4 => input,
                (_, scale) => {
                    let given = scale.map(|scales| InputScales { scales, experts: None });
                    self.quantised(p, &piece.weight, x, Rows::Tokens, given, &name)
                }
            };
            if let (Input::Nvfp4 { .. }, None) = (input, piece.input_scale) {
                shared = Some(input);
            }
            p.linear_by_matrix(self.step, w, piece, input, y);
        }
    }

    /// How a layer's experts, by both of their matrices, take the routes of the step.
    fn routing(&self, p: &Program, a: u32, experts: [&Experts; 2]) -> Routing {
        let exact = self.activations == Activations::F32;
        let (routes, e) = (p.tokens() * a, experts[0].weight.experts);
        if p.by_matrix() && exact && experts.iter().all(|experts| experts.weight.format.fits_half()) {
            let few = routes <= ROUTES_FEW * e;
            return Routing::ByMatrix(self.tiles, if few { 16 } else { 64 });
        }
        match routes {
            _ if routes * 2 <= e || p.tokens() == 1 => Routing::Each(self.routes.experts),
            _ if routes < ROUTES_MANY * e => Routing::Grouped(self.tiles, 2),
            _ => Routing::Grouped(self.tiles, 4),
        }
    }

    /// Record attention's projection in layer `idx`, to `delta`.
    pub(super) fn attention_out(&self, p: &mut Program, idx: usize, out: &Projection) {
        self.project(p, out, self.a, self.delta, || format!("layers.{idx}.attention.staged"));
        p.stage(|| format!("layers.{idx}.attn_out"), self.delta, out.n as usize);
    }

    /// Record what follows attention in layer `idx`: its projection, the norm, router, the choice of experts, and their first
    /// matrix, to `e`.
    pub(super) fn experts_up(
        &self,
        p: &mut Program,
        norm: RmsNorm,
        idx: usize,
        (out, gain, router, choice): (&Projection, Slice, &Projection, Router),
        experts: [&Experts; 2],
        form: Swiglu,
    ) {
        let name = |what: &'static str| move || format!("layers.{idx}.{what}");
        let up = experts[0];
        let chosen = |p: &mut Program| {
            p.index_stage(name("mlp.router.experts"), self.routes.experts, form.a as usize);
            p.stage(name("mlp.router.weights"), self.routes.weights, form.a as usize);
        };
        let routing = self.routing(p, form.a, experts);
        // Where a workgroup carries one route, it can choose it.
        let chooses = matches!(routing, Routing::Each(_)) && self.fuses(p) && up.weight.parts.len() == 1;
        if let Some(bias) = LinearAdd::takes(out, router).filter(|_| chooses) {
            let scored = Scored { x: self.mid, g: gain, shares: self.shares, bias };
            p.linear_add(out, [self.a, self.x], (gain, router), [self.delta, self.mid, self.shares]);
            p.stage(name("attn_out"), self.delta, norm.d as usize);
            p.norm_moe_up((norm, choice), scored, (up, form), [self.h, self.scores], self.routes, self.e);
            p.stage(name("mlp_norm"), self.h, norm.d as usize);
            p.stage(name("mlp.router.logits"), self.scores, router.n as usize);
            chosen(p);
            p.stage(name("mlp.up"), self.e, (form.a * up.weight.n / 2) as usize);
            return;
        }
        self.attention_out(p, idx, out);
        self.router_scores(p, norm, idx, gain, router);
        let routing = match routing {
            Routing::Each(_) if chooses => Routing::Chosen(choice, self.scores, self.routes),
            routing @ (Routing::Grouped(tiles, _) | Routing::ByMatrix(tiles, _)) => {
                let group = Group { e: up.weight.experts, a: form.a, routes: routing.routes() };
                if !p.in_parts && !p.host.routing && ChosenGroup::takes(&choice, p.tokens()) {
                    let op = ChosenGroup { router: choice, group };
                    p.choose_and_group(op, self.step, self.scores, self.routes, tiles);
                    chosen(p);
                } else {
                    p.router(choice, self.scores, self.routes);
                    chosen(p);
                    p.group(group, self.step, self.routes.experts, tiles);
                }
                routing
            }
            routing => {
                p.router(choice, self.scores, self.routes);
                chosen(p);
                routing
            }
        };
        let (given, each) = self.expert_scales(up);
        let rows = if each { Rows::Spread { a: form.a } } else { Rows::Tokens };
        let input = self.quantised(p, &up.weight, self.h, rows, given, &name("mlp_norm.staged"));
        p.moe_up(up, form, routing, (input, if each { 1 } else { form.a }), self.e);
        if matches!(routing, Routing::Chosen(..)) {
            chosen(p);
        }
        p.stage(name("mlp.up"), self.e, (form.a * up.weight.n / 2) as usize);
    }

    /// Record the experts' second matrix in layer `idx`, from `e`. What is still to be added to the residual stream, if that was
    /// not done in the same launch.
    pub(super) fn experts_down(&self, p: &mut Program, idx: usize, experts: [&Experts; 2], a: u32) -> Option<Addend> {
        let name = |what: &'static str| move || format!("layers.{idx}.{what}");
        let (down, d) = (experts[1], experts[1].weight.n as usize);
        if self.adds_routes(p, a, experts) {
            p.moe_down_add(down, a, self.routes, self.e, [self.mid, self.x]);
            p.stage(name("hidden"), self.x, d);
            return None;
        }
        let (given, _) = self.expert_scales(down);
        let input = self.quantised(p, &down.weight, self.e, Rows::Routes { a }, given, &name("mlp.up.staged"));
        let routing = self.routing(p, a, experts);
        p.moe_down(down, a, routing, input, self.y);
        p.stage(name("mlp.down"), self.y, a as usize * d);
        Some(Addend::Routes { a, routes: self.routes, x: self.y, sum: self.delta })
    }

    /// Whether routes are weighted, summed and added by the launch of the experts' second matrix: the same bits in less time.
    fn adds_routes(&self, p: &Program, a: u32, experts: [&Experts; 2]) -> bool {
        let one_by_one = matches!(self.routing(p, a, experts), Routing::Each(_));
        one_by_one && self.fuses(p) && MoeDownAdd::takes(experts[1], a)
    }

    /// The calibrated scales of experts, and whether each has its own.
    fn expert_scales(&self, experts: &Experts) -> (Option<InputScales>, bool) {
        match experts.input_scale {
            None => (None, false),
            Some(ExpertScales::Shared(scales)) => (Some(InputScales { scales, experts: None }), false),
            Some(ExpertScales::Each(scales)) => {
                (Some(InputScales { scales, experts: Some(self.routes.experts) }), true)
            }
        }
    }

    /// x as it is, or quantised where the plan says so and the weight is NVFP4.
    fn quantised(
        &self,
        p: &mut Program,
        weight: &Weight,
        x: Slice,
        rows: Rows,
        given: Option<InputScales>,
        name: &impl Fn() -> String,
    ) -> Input {
        let Some(staging) = self.staging.as_ref().filter(|_| weight.format == Format::Nvfp4) else {
            return Input::F32(x);
        };
        let scale = match self.activations {
            Activations::F32 => return Input::F32(x),
            Activations::Nvfp4Dynamic => ActScale::Tensor,
            Activations::Nvfp4Token => ActScale::Token,
            Activations::Nvfp4Static if given.is_some_and(|g| g.experts.is_some()) => ActScale::Expert,
            Activations::Nvfp4Static => ActScale::Static,
        };
        let (rows_per_token, share) = match rows {
            Rows::Tokens => (1, 1),
            Rows::Routes { a } => (a, 1),
            Rows::Spread { a } => (a, a),
        };
        let op = StageActivation { k: weight.k, rows_per_token, share, scale };
        let input = p.stage_activation(op, self.step, x, given, staging);
        p.stage(name, staging.report, 2 * rows_per_token as usize);
        input
    }
}
