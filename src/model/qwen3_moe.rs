//! Qwen3-MoE: names on disk, weights, and a layer's forward pass.
//!
//! Source of the formulas: transformers `modeling_qwen3_moe.py`.

use super::load::{Inputs, Loader};
use super::mlp::Mlp;
use super::{Layers, State, attention, norm};
use crate::config::Config;
use crate::error::Result;
use crate::ops::{Addend, Experts, Gate, GateUp, Projection, Router, Swiglu};
use crate::program::{Program, Slice};

/// The layers' weights on a device.
#[derive(Debug)]
pub(super) struct Qwen3Moe {
    config: Config,
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    attn_norm: Slice,
    qkv: Projection,
    /// Of query heads and of key heads.
    head_gains: [Slice; 2],
    out: Projection,
    mlp_norm: Slice,
    mlp: Feed,
}

/// What follows attention in a layer.
#[derive(Debug)]
enum Feed {
    Dense(Mlp),
    Experts { router: Projection, up: Experts, down: Experts },
}

impl Qwen3Moe {
    pub(super) fn load(up: &mut Loader<'_>) -> Result<Self> {
        let config = up.config.clone();
        let [d, f, e] = [config.hidden_size, config.moe_intermediate_size, config.num_local_experts].map(|n| n as u32);
        let mut layers = Vec::new();
        for idx in 0..config.num_hidden_layers {
            let n = |name: &str| format!("model.layers.{idx}.{name}");
            up.kv_scales(idx)?;
            let mlp = match config.is_moe(idx) {
                false => Feed::Dense(Mlp::load(up, &n("mlp"), [d, config.intermediate_size as u32])?),
                true => Feed::Experts {
                    router: up.projection(&[(n("mlp.gate"), e)], d, Inputs::Exact)?,
                    up: up.experts(&n("mlp.experts"), &["gate_proj", "up_proj"], [e, f, d])?,
                    down: up.experts(&n("mlp.experts"), &["down_proj"], [e, d, f])?,
                },
            };
            layers.push(Layer {
                attn_norm: up.vector(&n("input_layernorm.weight"), config.hidden_size)?,
                qkv: up.qkv(idx)?,
                head_gains: [
                    up.vector(&n("self_attn.q_norm.weight"), config.head_dim)?,
                    up.vector(&n("self_attn.k_norm.weight"), config.head_dim)?,
                ],
                out: up.attention_out(idx)?,
                mlp_norm: up.vector(&n("post_attention_layernorm.weight"), config.hidden_size)?,
                mlp,
            });
        }
        Ok(Self { config, layers })
    }
}

impl Layers for Qwen3Moe {
    fn block(&self, p: &mut Program, idx: usize, s: &State, addend: Option<Addend>) -> Option<Addend> {
        let (l, c) = (&self.layers[idx], &self.config);
        let name = |what: &'static str| move || format!("layers.{idx}.{what}");
        let kv = &s.kv[idx];

        s.queries(p, c, idx, addend, (l.attn_norm, &l.qkv, Some(l.head_gains)));
        p.attention(attention(c, idx, kv), s.step, [s.rows, s.qkv, s.parts], kv, None, s.a);
        p.stage(name("attention"), s.a, c.num_attention_heads * c.head_dim);

        match &l.mlp {
            Feed::Dense(mlp) => {
                s.attention_out(p, idx, &l.out);
                mlp.record(p, norm(c), idx, l.mlp_norm, s);
                Some(Addend::Rows(s.delta))
            }
            Feed::Experts { router, up, down } => {
                let [e, a] = [c.num_local_experts, c.num_experts_per_tok];
                let form = Swiglu { a: a as u32, rows: GateUp::Halves, gate: Gate::Silu };
                let choice = Router { e: e as u32, a: form.a, normalise: c.norm_topk_prob };
                s.experts_up(p, norm(c), idx, (&l.out, l.mlp_norm, router, choice), [up, down], form);
                s.experts_down(p, idx, [up, down], form.a)
            }
        }
    }
}
