//! gpt-oss: names on disk, weights, the buffers of a conversation, and the forward pass.
//!
//! Source of the formulas: openai/gpt-oss `gpt_oss/torch/model.py` and transformers `modeling_gpt_oss.py`. Activations,
//! the residual stream and expert outputs are f32: the released 120b passes f16's range.

use super::Progress;
use crate::checkpoint::{Checkpoint, Dtype, TensorView, check_e8m0, check_finite_bf16};
use crate::config::{Config, LayerType};
use crate::device::{Buffer, Device};
use crate::error::{Error, Result};
use crate::format::Format;
use crate::ops::{
    Attention, CacheFormat, Experts, KvCache, MoeScatter, RmsNorm, Router, Routes, Row, Step, Swiglu, Weight,
    WeightBytes,
};
use crate::program::{HostStages, Program, Slice};
use std::collections::HashSet;
use std::sync::Arc;

/// The weights on a device. Shared by all sessions, never written after loading.
#[derive(Debug)]
pub struct GptOss {
    config: Config,
    norm: RmsNorm,
    router: Router,
    scatter: MoeScatter,
    embed: Weight,
    layers: Vec<Layer>,
    final_norm: Slice,
    /// `None`: the embedding table serves as the head.
    lm_head: Option<Weight>,
    /// cos and sin of every position that the context holds, `[C, Dh/2]` pairs.
    rope_table: Slice,
    _buffers: Vec<Buffer>,
}

#[derive(Debug)]
struct Layer {
    idx: usize,
    window: u32,
    attn_norm: Slice,
    qkv: Linear,
    sinks: Slice,
    out: Linear,
    mlp_norm: Slice,
    router: Linear,
    up: Experts,
    down: Experts,
}

/// A matrix with its bias.
#[derive(Debug)]
struct Linear {
    weight: Weight,
    bias: Slice,
}

/// Sizes of a conversation's buffers.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Positions that the cache of a full layer holds.
    pub context: u32,
    /// Most rows in one step.
    pub chunk: u32,
    /// How keys and values are stored.
    pub cache: CacheFormat,
    /// Stages that the host computes.
    pub host: HostStages,
}

/// The buffers of one conversation: activations of a step, and the KV cache.
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
    /// Most picks at once.
    pub max_picks: u32,
    x: Slice,
    h: Slice,
    qkv: Slice,
    a: Slice,
    delta: Slice,
    scores: Slice,
    routes: Routes,
    e: Slice,
    y: Slice,
    last: Slice,
    last_norm: Slice,
    kv: Vec<KvCache>,
    host: HostStages,
    _buffers: Vec<Buffer>,
}

impl GptOss {
    /// Check every tensor of a checkpoint, then put them on the device. `context`: positions to have angles for.
    pub fn load(
        checkpoint: &Checkpoint,
        config: Config,
        device: &Arc<dyn Device>,
        context: u32,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self> {
        let found = Tensors::check(checkpoint, &config)?;
        let mut up = Uploader { checkpoint, device, buffers: Vec::new(), done: 0, progress };
        let [d, f, e] = [config.hidden_size, config.intermediate_size, config.num_local_experts].map(|n| n as u32);
        let [h, hk, dh] = [config.num_attention_heads, config.num_key_value_heads, config.head_dim].map(|n| n as u32);
        let vocab = config.vocab_size as u32;
        let mut layers = Vec::new();
        for (idx, kind) in config.layer_types.iter().enumerate() {
            let n = |name: &str| format!("model.layers.{idx}.{name}");
            let qkv = ["q_proj", "k_proj", "v_proj"].map(|p| n(&format!("self_attn.{p}")));
            let mut linear = |names: &[String], rows, k| up.linear(names, rows, k);
            let qkv = linear(&qkv, (h + 2 * hk) * dh, d)?;
            let out = linear(&[n("self_attn.o_proj")], d, h * dh)?;
            let router = linear(&[n("mlp.router")], e, d)?;
            layers.push(Layer {
                idx,
                window: if *kind == LayerType::Sliding { config.sliding_window as u32 } else { 0 },
                attn_norm: up.vector(&n("input_layernorm.weight"))?,
                qkv,
                sinks: up.vector(&n("self_attn.sinks"))?,
                out,
                mlp_norm: up.vector(&n("post_attention_layernorm.weight"))?,
                router,
                up: up.experts(&n("mlp.experts.gate_up_proj"), [e, 2 * f, d])?,
                down: up.experts(&n("mlp.experts.down_proj"), [e, d, f])?,
            });
        }
        let embed = up.matrix("model.embed_tokens.weight", &["model.embed_tokens.weight".to_owned()], vocab, d)?;
        let lm_head = match found.has_head {
            true => Some(up.matrix("lm_head.weight", &["lm_head.weight".to_owned()], vocab, d)?),
            false => None,
        };
        let final_norm = up.vector("model.norm.weight")?;
        let rope = Buffer::new(device, "rope table", u64::from(context) * u64::from(dh) * 4)?;
        // In pieces: a table for millions of positions must not stand in host memory as a whole.
        let positions: Vec<u32> = (0..context).collect();
        for piece in positions.chunks(1 << 16) {
            let table = rope_table(&config, piece);
            let offset = u64::from(piece[0]) * u64::from(dh) * 4;
            let to = Slice { offset, bytes: table.len() as u64 * 4, ..rope.slice() };
            device.write(to, bytemuck::cast_slice(&table))?;
        }
        let rope_table = rope.slice();
        up.buffers.push(rope);
        device.wait()?;
        Ok(Self {
            norm: RmsNorm { d, eps: config.rms_norm_eps },
            router: Router { e, a: config.num_experts_per_tok as u32, normalise: true },
            scatter: MoeScatter { a: config.num_experts_per_tok as u32, d },
            embed,
            layers,
            final_norm,
            lm_head,
            rope_table,
            _buffers: up.buffers,
            config,
        })
    }

    /// The checkpoint's configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Positions that layer `idx` keeps of a sequence: a sliding layer its window, and room for two chunks, so that a
    /// whole chunk is appended before its first row looks back, and that 2 chunk + 1 tokens can be taken back.
    fn capacity(&self, idx: usize, plan: &Plan) -> u32 {
        match self.layers[idx].window {
            0 => plan.context,
            window => plan.context.min(window + 2 * plan.chunk),
        }
    }

    /// Whether a sequence can be cut back to `len` tokens, given that positions below `written` have been written:
    /// every sliding layer must still have the keys that the row at position `len` looks back to.
    pub fn can_cut(&self, plan: &Plan, len: usize, written: usize) -> bool {
        (0..self.layers.len()).all(|idx| {
            let (window, capacity) = (self.layers[idx].window as usize, self.capacity(idx, plan) as usize);
            // The next row, at position `len`, looks back to len + 1 - window; older keys than written - capacity
            // have been overwritten.
            window == 0 || written <= capacity || (len + 1).saturating_sub(window) + capacity >= written
        })
    }

    /// The caches of the sliding layers, where a position's row is used again by a later one.
    pub fn rings<'s>(&'s self, state: &'s State) -> impl Iterator<Item = Slice> + 's {
        let sliding = self.layers.iter().filter(|l| l.window > 0);
        sliding.flat_map(|l| [state.kv[l.idx].keys, state.kv[l.idx].values])
    }

    /// Buffers for one conversation.
    pub fn state(&self, device: &Arc<dyn Device>, plan: &Plan) -> Result<State> {
        let c = &self.config;
        let t = u64::from(plan.chunk);
        let [d, f, vocab] = [c.hidden_size, c.intermediate_size, c.vocab_size].map(|n| n as u64);
        let [h, hk, dh] = [c.num_attention_heads, c.num_key_value_heads, c.head_dim].map(|n| n as u64);
        let [e, a] = [c.num_local_experts, c.num_experts_per_tok].map(|n| n as u64);
        let picks = t.min(16).min((device.limits().max_binding_bytes / (vocab * 4)).max(1));
        let mut buffers = Vec::new();
        let mut new = |label: &str, bytes: u64| -> Result<Slice> {
            let buffer = Buffer::new(device, label, bytes)?;
            let slice = buffer.slice();
            buffers.push(buffer);
            Ok(slice)
        };
        let kv = (0..self.layers.len())
            .map(|idx| {
                let capacity = self.capacity(idx, plan);
                let bytes = plan.cache.bytes(u64::from(capacity) * hk * dh);
                Ok(KvCache {
                    format: plan.cache,
                    capacity,
                    keys: new(&format!("KV cache, keys of layer {idx}"), bytes)?,
                    values: new(&format!("KV cache, values of layer {idx}"), bytes)?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(State {
            rows: new("rows", t * size_of::<Row>() as u64)?,
            step: new("step", size_of::<Step>() as u64)?,
            picks: new("picks", picks * 4)?,
            head_step: new("head step", size_of::<Step>() as u64)?,
            logits: new("logits", picks * vocab * 4)?,
            max_picks: picks as u32,
            x: new("x", t * d * 4)?,
            h: new("h", t * d * 4)?,
            qkv: new("qkv", t * (h + 2 * hk) * dh * 4)?,
            a: new("attention", t * h * dh * 4)?,
            delta: new("delta", t * d * 4)?,
            scores: new("scores", t * e * 4)?,
            routes: Routes { experts: new("experts", t * a * 4)?, weights: new("weights", t * a * 4)? },
            e: new("expert activations", t * a * f * 4)?,
            y: new("expert outputs", t * a * d * 4)?,
            last: new("last", picks * d * 4)?,
            last_norm: new("last norm", picks * d * 4)?,
            kv,
            host: plan.host,
            _buffers: buffers,
        })
    }

    /// The step over `tokens` rows: embedding and all layers. Reads `rows` and `step` of the state.
    pub fn body(&self, tokens: u32, s: &State) -> Program {
        let mut p = Program::new(tokens, s.host);
        p.embed(&self.embed, s.rows, s.x);
        p.stage(|| "embed".to_owned(), s.x, self.config.hidden_size);
        for layer in &self.layers {
            self.block(&mut p, layer, s);
        }
        p
    }

    /// Logits of `picks` rows of the last step. Reads `picks` and `head_step` of the state.
    pub fn head(&self, picks: u32, s: &State) -> Program {
        let mut p = Program::new(picks, s.host);
        p.take(self.norm.d, s.picks, s.x, s.last);
        p.rms_norm(self.norm, s.last, self.final_norm, s.last_norm);
        p.stage(|| "final_norm".to_owned(), s.last_norm, self.config.hidden_size);
        p.linear(s.head_step, self.lm_head.as_ref().unwrap_or(&self.embed), None, s.last_norm, s.logits);
        p.stage(|| "logits".to_owned(), s.logits, self.config.vocab_size);
        p
    }

    fn block(&self, p: &mut Program, l: &Layer, s: &State) {
        let name = |what: &'static str| move || format!("layers.{}.{what}", l.idx);
        let c = &self.config;
        let [d, e, a] = [c.hidden_size, c.num_local_experts, c.num_experts_per_tok];
        let [h, hk, dh] = [c.num_attention_heads, c.num_key_value_heads, c.head_dim];
        let kv = s.kv[l.idx];

        p.rms_norm(self.norm, s.x, l.attn_norm, s.h);
        p.stage(name("attn_norm"), s.h, d);
        p.linear(s.step, &l.qkv.weight, Some(l.qkv.bias), s.h, s.qkv);
        p.stage(name("qkv"), s.qkv, (h + 2 * hk) * dh);
        p.rope([h as u32, hk as u32, dh as u32], s.rows, self.rope_table, s.qkv, kv);
        p.attention(self.attention(l, kv), s.rows, s.qkv, kv, Some(l.sinks), s.a);
        p.stage(name("attention"), s.a, h * dh);
        p.linear(s.step, &l.out.weight, Some(l.out.bias), s.a, s.delta);
        p.stage(name("attn_out"), s.delta, d);
        p.add(self.norm.d, s.delta, s.x);

        p.rms_norm(self.norm, s.x, l.mlp_norm, s.h);
        p.stage(name("mlp_norm"), s.h, d);
        p.linear(s.step, &l.router.weight, Some(l.router.bias), s.h, s.scores);
        p.stage(name("mlp.router.logits"), s.scores, e);
        p.router(self.router, s.scores, s.routes);
        p.index_stage(name("mlp.router.experts"), s.routes.experts, a);
        p.stage(name("mlp.router.weights"), s.routes.weights, a);
        let form = Swiglu::gpt_oss(self.router.a, [c.swiglu_limit, c.swiglu_alpha]);
        p.moe_up(&l.up, form, s.routes.experts, (s.h, self.router.a), s.e);
        p.stage(name("mlp.up"), s.e, a * c.intermediate_size);
        p.moe_down(&l.down, self.router.a, s.routes.experts, s.e, s.y);
        p.stage(name("mlp.down"), s.y, a * d);
        p.moe_scatter(self.scatter, s.routes, s.y, s.delta);
        p.stage(name("mlp.out"), s.delta, d);
        p.add(self.norm.d, s.delta, s.x);
        p.stage(name("hidden"), s.x, d);
    }

    fn attention(&self, l: &Layer, kv: KvCache) -> Attention {
        let c = &self.config;
        let [h, hk, dh] = [c.num_attention_heads, c.num_key_value_heads, c.head_dim].map(|n| n as u32);
        Attention { h, hk, dh, window: l.window, capacity: kv.capacity, format: kv.format }
    }
}

/// cos and sin by position, YaRN's factor included. The angle is rounded to f32 first, as in the references.
fn rope_table(config: &Config, positions: &[u32]) -> Vec<f32> {
    let inv_freq = config.rope.inv_freq(config.head_dim);
    let factor = f64::from(config.rope.attention_factor());
    let angles = |&p: &u32| {
        inv_freq.clone().into_iter().flat_map(move |f| {
            let angle = f64::from(p as f32 * f);
            [(angle.cos() * factor) as f32, (angle.sin() * factor) as f32]
        })
    };
    positions.iter().flat_map(angles).collect()
}

impl State {
    /// Every buffer, in the order in which they are made: the same for all states of one model and plan.
    pub fn slices(&self) -> Vec<Slice> {
        self._buffers.iter().map(Buffer::slice).collect()
    }
}

/// What was found while checking.
struct Tensors {
    has_head: bool,
}

impl Tensors {
    /// Every tensor is there with the right dtype and shape, none is unknown, and no block scale is NaN.
    fn check(checkpoint: &Checkpoint, c: &Config) -> Result<Self> {
        use Dtype::{Bf16, U8};
        let [d, f, e, vocab] = [c.hidden_size, c.intermediate_size, c.num_local_experts, c.vocab_size];
        let (q, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let mut used = HashSet::new();
        let (mut scales, mut vectors) = (Vec::new(), Vec::new());
        let mut want = |name: String, dtype: Dtype, shape: &[usize]| -> Result<()> {
            let view = checkpoint.tensor(&name)?;
            view.expect(dtype, shape)?;
            if name.ends_with("_scales") {
                scales.push(name.clone());
            } else if shape.len() == 1 || name.ends_with("bias") {
                vectors.push(name.clone());
            }
            used.insert(name);
            Ok(())
        };
        want("model.embed_tokens.weight".to_owned(), Bf16, &[vocab, d])?;
        for idx in 0..c.num_hidden_layers {
            let n = |name: &str| format!("model.layers.{idx}.{name}");
            want(n("input_layernorm.weight"), Bf16, &[d])?;
            for (name, rows, cols) in [("q_proj", q, d), ("k_proj", kv, d), ("v_proj", kv, d), ("o_proj", d, q)] {
                want(n(&format!("self_attn.{name}.weight")), Bf16, &[rows, cols])?;
                want(n(&format!("self_attn.{name}.bias")), Bf16, &[rows])?;
            }
            want(n("self_attn.sinks"), Bf16, &[c.num_attention_heads])?;
            want(n("post_attention_layernorm.weight"), Bf16, &[d])?;
            want(n("mlp.router.weight"), Bf16, &[e, d])?;
            want(n("mlp.router.bias"), Bf16, &[e])?;
            for (name, rows, cols) in [("gate_up_proj", 2 * f, d), ("down_proj", d, f)] {
                let n = |what: &str| n(&format!("mlp.experts.{name}_{what}"));
                want(n("blocks"), U8, &[e, rows, cols / 32, 16])?;
                want(n("scales"), U8, &[e, rows, cols / 32])?;
                want(n("bias"), Bf16, &[e, rows])?;
            }
        }
        want("model.norm.weight".to_owned(), Bf16, &[d])?;
        let has_head = !c.tie_word_embeddings || checkpoint.tensor("lm_head.weight").is_ok();
        if has_head {
            want("lm_head.weight".to_owned(), Bf16, &[vocab, d])?;
        }
        checkpoint.check_all_used(&used)?;
        for name in scales {
            check_e8m0(&checkpoint.tensor(&name)?)?;
        }
        for name in vectors {
            check_finite_bf16(&checkpoint.tensor(&name)?)?;
        }
        Ok(Self { has_head })
    }
}

/// Takes checked tensors to the device, counting bytes.
struct Uploader<'a> {
    checkpoint: &'a Checkpoint,
    device: &'a Arc<dyn Device>,
    buffers: Vec<Buffer>,
    done: u64,
    progress: &'a mut dyn FnMut(Progress),
}

impl<'a> Uploader<'a> {
    fn bytes(&mut self, name: &str) -> Result<&'a [u8]> {
        let view: TensorView<'a> = self.checkpoint.tensor(name)?;
        self.done += view.bytes.len() as u64;
        (self.progress)(Progress { done_bytes: self.done, total_bytes: self.checkpoint.total_bytes() });
        Ok(view.bytes)
    }

    /// Several tensors, one after the other.
    fn stacked(&mut self, names: &[String]) -> Result<Vec<&'a [u8]>> {
        names.iter().map(|name| self.bytes(name)).collect()
    }

    /// A bf16 vector.
    fn vector(&mut self, name: &str) -> Result<Slice> {
        let bytes = self.bytes(name)?;
        self.put(name, bytes)
    }

    fn put(&mut self, label: &str, bytes: &[u8]) -> Result<Slice> {
        let buffer = Buffer::with_bytes(self.device, label, bytes)?;
        let slice = buffer.slice();
        self.buffers.push(buffer);
        Ok(slice)
    }

    /// A bf16 matrix, its rows stacked from several tensors.
    fn matrix(&mut self, label: &str, names: &[String], n: u32, k: u32) -> Result<Weight> {
        let pieces = self.stacked(names)?;
        Weight::matrix(
            self.device,
            label,
            Format::Bf16,
            [n, k],
            &WeightBytes { codes: &pieces, ..WeightBytes::default() },
        )
    }

    /// `NAME.weight` and `NAME.bias`, stacked over the names.
    fn linear(&mut self, names: &[String], n: u32, k: u32) -> Result<Linear> {
        let with = |what: &str| names.iter().map(|name| format!("{name}.{what}")).collect::<Vec<_>>();
        let weight = self.matrix(&names[0], &with("weight"), n, k)?;
        let bias = self.stacked(&with("bias"))?.concat();
        Ok(Linear { weight, bias: self.put(&names[0], &bias)? })
    }

    /// `NAME_blocks`, `NAME_scales` and `NAME_bias`.
    fn experts(&mut self, name: &str, shape: [u32; 3]) -> Result<Experts> {
        let blocks = self.bytes(&format!("{name}_blocks"))?;
        let scales = self.bytes(&format!("{name}_scales"))?;
        let weight = Weight::experts(
            self.device,
            name,
            Format::Mxfp4,
            shape,
            &WeightBytes { codes: &[blocks], scales: &[scales], row_scales: &[] },
        )?;
        let bias = Some(self.vector(&format!("{name}_bias"))?);
        Ok(Experts { weight, bias, input_scale: None })
    }
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
}
