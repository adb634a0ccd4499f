//! gpt-oss: names on disk, weights, and a layer's forward pass.
//!
//! Source of the formulas: openai/gpt-oss `gpt_oss/torch/model.py` and transformers `modeling_gpt_oss.py`. Activations,
//! the residual stream and expert outputs are f32: the released 120b passes f16's range.

use super::load::{Inputs, Loader};
use super::{Layers, State, attention, norm};
use crate::config::Config;
use crate::error::Result;
use crate::ops::{Addend, Experts, Projection, Router, Swiglu};
use crate::program::{Program, Slice};

/// The layers' weights on a device.
#[derive(Debug)]
pub(super) struct GptOss {
    config: Config,
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    attn_norm: Slice,
    qkv: Projection,
    sinks: Slice,
    out: Projection,
    mlp_norm: Slice,
    router: Projection,
    up: Experts,
    down: Experts,
}

impl GptOss {
    pub(super) fn load(up: &mut Loader<'_>) -> Result<Self> {
        up.refuse_unquantised()?;
        let config = up.config.clone();
        let [d, f, e] = [config.hidden_size, config.intermediate_size, config.num_local_experts].map(|n| n as u32);
        let mut layers = Vec::new();
        for idx in 0..config.num_hidden_layers {
            let n = |name: &str| format!("model.layers.{idx}.{name}");
            let router = [(n("mlp.router"), e)];
            up.kv_scales(idx)?;
            layers.push(Layer {
                attn_norm: up.vector(&n("input_layernorm.weight"), config.hidden_size)?,
                qkv: up.qkv(idx)?,
                sinks: up.vector(&n("self_attn.sinks"), config.num_attention_heads)?,
                out: up.attention_out(idx)?,
                mlp_norm: up.vector(&n("post_attention_layernorm.weight"), config.hidden_size)?,
                router: Projection { bias: up.biases(&router)?, ..up.projection(&router, d, Inputs::Exact)? },
                up: up.fused_experts(&n("mlp.experts.gate_up_proj"), [e, 2 * f, d])?,
                down: up.fused_experts(&n("mlp.experts.down_proj"), [e, d, f])?,
            });
        }
        Ok(Self { config, layers })
    }
}

impl Layers for GptOss {
    fn block(&self, p: &mut Program, idx: usize, s: &State, addend: Option<Addend>) -> Option<Addend> {
        let (l, c) = (&self.layers[idx], &self.config);
        let name = |what: &'static str| move || format!("layers.{idx}.{what}");
        let [e, a] = [c.num_local_experts, c.num_experts_per_tok];
        let form = Swiglu::gpt_oss(a as u32, [c.swiglu_limit, c.swiglu_alpha]);
        let kv = &s.kv[idx];

        s.queries(p, c, idx, addend, (l.attn_norm, &l.qkv, None));
        p.attention(attention(c, idx, kv), s.step, [s.rows, s.qkv, s.parts], kv, Some(l.sinks), s.a);
        p.stage(name("attention"), s.a, c.num_attention_heads * c.head_dim);

        let choice = Router { e: e as u32, a: form.a, normalise: true };
        s.experts_up(p, norm(c), idx, (&l.out, l.mlp_norm, &l.router, choice), [&l.up, &l.down], form);
        s.experts_down(p, idx, [&l.up, &l.down], form.a)
    }
}
