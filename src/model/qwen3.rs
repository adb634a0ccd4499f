//! Dense Qwen3: names on disk, weights, and a layer's forward pass.
//!
//! Source of the formulas: transformers `modeling_qwen3.py`.

use super::load::Loader;
use super::mlp::Mlp;
use super::{Layers, State, attention, norm};
use crate::config::Config;
use crate::error::Result;
use crate::ops::{Addend, Projection};
use crate::program::{Program, Slice};

/// The layers' weights on a device.
#[derive(Debug)]
pub(super) struct Qwen3 {
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
    mlp: Mlp,
}

impl Qwen3 {
    pub(super) fn load(up: &mut Loader<'_>) -> Result<Self> {
        let config = up.config.clone();
        let (d, f) = (config.hidden_size as u32, config.intermediate_size as u32);
        let mut layers = Vec::new();
        for idx in 0..config.num_hidden_layers {
            let n = |name: &str| format!("model.layers.{idx}.{name}");
            up.kv_scales(idx)?;
            layers.push(Layer {
                attn_norm: up.vector(&n("input_layernorm.weight"), config.hidden_size)?,
                qkv: up.qkv(idx)?,
                head_gains: [
                    up.vector(&n("self_attn.q_norm.weight"), config.head_dim)?,
                    up.vector(&n("self_attn.k_norm.weight"), config.head_dim)?,
                ],
                out: up.attention_out(idx)?,
                mlp_norm: up.vector(&n("post_attention_layernorm.weight"), config.hidden_size)?,
                mlp: Mlp::load(up, &n("mlp"), [d, f])?,
            });
        }
        Ok(Self { config, layers })
    }
}

impl Layers for Qwen3 {
    fn block(&self, p: &mut Program, idx: usize, s: &State, addend: Option<Addend>) -> Option<Addend> {
        let (l, c) = (&self.layers[idx], &self.config);
        let name = |what: &'static str| move || format!("layers.{idx}.{what}");
        let kv = &s.kv[idx];

        s.queries(p, c, idx, addend, (l.attn_norm, &l.qkv, Some(l.head_gains)));
        p.attention(attention(c, idx, kv), s.step, [s.rows, s.qkv, s.parts], kv, None, s.a);
        p.stage(name("attention"), s.a, c.num_attention_heads * c.head_dim);
        s.attention_out(p, idx, &l.out);

        l.mlp.record(p, norm(c), idx, l.mlp_norm, s);
        Some(Addend::Rows(s.delta))
    }
}
