//! `config.json` → [`Config`] and `generation_config.json` → [`GenerationConfig`], read and checked once.
//!
//! Fields keep the checkpoint's words. Every number has a range, wide enough for any real model and narrow enough that
//! no product of dimensions overflows; what lies outside is an error that names file, key, value and range. Defaults
//! are those of transformers 5.23 (`models/{gpt_oss,qwen3_moe,qwen3,llama}/configuration_*.py`).

mod generation;
mod keys;
mod layers;
mod patterns;
mod producers;
mod quantization;
mod rope;
#[cfg(test)]
mod tests;

use serde_json::Value;

pub use self::generation::GenerationConfig;
pub use self::layers::LayerType;
pub use self::quantization::{ActivationScheme, KvCacheScheme, Producer, Quantization, Scheme};
pub use self::rope::{Llama3, RopeConfig, Scaling, Yarn};

use self::keys::{Keys, shown};
use crate::checkpoint::{Checkpoint, json};
use crate::error::{Error, Result};

const MAX_TOKENS: usize = 1 << 24;

/// The file in which older ModelOpt exports say how they were quantised.
const HF_QUANT_CONFIG: &str = "hf_quant_config.json";

/// A kind of model: how its tensors are called and what they compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// OpenAI's gpt-oss: experts in every layer, sliding and full attention in turn, sinks, biases.
    GptOss,
    /// Qwen3 with experts: norms on query and key heads.
    Qwen3Moe,
    /// Dense Qwen3: norms on query and key heads.
    Qwen3,
    /// Llama and what copies it.
    Llama,
}

/// A model's dimensions and constants.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// What the rest is to be read as.
    pub family: Family,
    /// V, rows of the embedding.
    pub vocab_size: usize,
    /// D, width of the residual stream; a multiple of 16 (gpt-oss: 32).
    pub hidden_size: usize,
    /// Width inside a dense layer's MLP, gpt-oss: inside an expert; a multiple of 16 (gpt-oss: 32). 0 only where no layer
    /// is dense and the file has none.
    pub intermediate_size: usize,
    /// F, width inside an expert; a multiple of 16, 0 where there are no experts. gpt-oss: a copy of `intermediate_size`.
    pub moe_intermediate_size: usize,
    /// L.
    pub num_hidden_layers: usize,
    /// H, query heads.
    pub num_attention_heads: usize,
    /// Hk, key and value heads; divides H.
    pub num_key_value_heads: usize,
    /// Dh, a multiple of 4.
    pub head_dim: usize,
    /// E; 0 where there are no experts. Some files say `num_experts`.
    pub num_local_experts: usize,
    /// A, at most E; 0 where there are no experts. Some files say `experts_per_token`.
    pub num_experts_per_tok: usize,
    /// Whether the weights of a token's experts are made to sum to 1. gpt-oss does so by its softmax.
    pub norm_topk_prob: bool,
    /// Which layers have experts instead of a dense MLP, `[L]`.
    pub moe_layers: Vec<bool>,
    /// How many positions a sliding layer sees, the token's own included; 0 where no layer slides.
    pub sliding_window: usize,
    /// One per layer. gpt-oss, where the file has none: sliding and full in turn, sliding first.
    pub layer_types: Vec<LayerType>,
    /// The longest context that the model was made for.
    pub max_position_embeddings: usize,
    /// Added to the mean square in every RMSNorm.
    pub rms_norm_eps: f32,
    /// Whether q, k, v and o have biases.
    pub attention_bias: bool,
    /// gpt-oss: the experts' clamp; 7 where the file has none. Infinite for the other families.
    pub swiglu_limit: f32,
    /// gpt-oss: the experts' sigmoid gain; 1.702 where the file has none, as in all released ones. 1 for the others.
    pub swiglu_alpha: f32,
    /// Rotary positions.
    pub rope: RopeConfig,
    /// Whether the output matrix is the embedding, and `lm_head.weight` may be absent.
    pub tie_word_embeddings: bool,
    /// Tokens that end a text.
    pub eos_token_id: Vec<u32>,
    /// The token that begins a text.
    pub bos_token_id: Option<u32>,
    /// What the checkpoint declares about the formats of its weights. The tensors themselves have the last word.
    pub quantization: Quantization,
}

impl Family {
    const ALL: [Self; 4] = [Self::GptOss, Self::Qwen3Moe, Self::Qwen3, Self::Llama];

    /// The `model_type` of config files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::GptOss => "gpt_oss",
            Self::Qwen3Moe => "qwen3_moe",
            Self::Qwen3 => "qwen3",
            Self::Llama => "llama",
        }
    }

    /// Whether some layers have experts.
    pub const fn has_experts(self) -> bool {
        matches!(self, Self::GptOss | Self::Qwen3Moe)
    }

    const fn architecture(self) -> &'static str {
        match self {
            Self::GptOss => "GptOssForCausalLM",
            Self::Qwen3Moe => "Qwen3MoeForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
            Self::Llama => "LlamaForCausalLM",
        }
    }

    fn read(keys: &Keys) -> Result<Self> {
        let supported = || {
            let names = Self::ALL.map(|family| format!("{} ({})", family.name(), family.architecture()));
            format!("supported: {}", names.join(", "))
        };
        let architectures = keys.present("architectures");
        let Some(word) = keys.present("model_type") else {
            let found = architectures.map_or("no architectures either".into(), shown);
            return Err(keys.fault("model_type", format!("is missing ({found}); {}", supported())));
        };
        let Some(family) = Self::ALL.into_iter().find(|family| word == family.name()) else {
            return Err(keys.fault("model_type", format!("{} is not supported; {}", shown(word), supported())));
        };
        match architectures {
            None => Ok(family),
            Some(Value::Array(list)) if list.iter().any(|a| a == family.architecture()) => Ok(family),
            Some(other) => {
                let should = format!("should be [\"{}\"]", family.architecture());
                let reason = format!("{} does not fit model_type {}, {should}", shown(other), shown(word));
                Err(keys.fault("architectures", reason))
            }
        }
    }
}

impl Config {
    /// Reads `config.json` of a checkpoint, and what `hf_quant_config.json` says of its formats where `config.json` says
    /// nothing.
    ///
    /// # Errors
    /// Those of [`Config::from_json`], also for `hf_quant_config.json`.
    pub fn open(checkpoint: &Checkpoint) -> Result<Self> {
        let mut config = Self::from_json(&checkpoint.path("config.json"), checkpoint.require("config.json")?)?;
        if config.quantization.producer == Producer::None
            && let Some(bytes) = checkpoint.file(HF_QUANT_CONFIG)
        {
            let path = checkpoint.path(HF_QUANT_CONFIG);
            config.quantization = Quantization::from_hf_quant_config(&path, bytes, config.family)?;
        }
        Ok(config)
    }

    /// Reads the bytes of a `config.json`, called `file` in messages.
    ///
    /// # Errors
    /// One that names file, key, value and range for whatever is missing, out of range, contradictory or not supported.
    pub fn from_json(file: &str, bytes: &[u8]) -> Result<Self> {
        let map = json::object(file, bytes)?;
        let keys = Keys::new(file, &map);
        let family = Family::read(&keys)?;
        let gpt_oss = family == Family::GptOss;
        let quantization = match keys.object("quantization_config")? {
            Some(quantization) => Quantization::read(&quantization, family)?,
            None => Quantization::none(),
        };

        let multiple = if gpt_oss { 32 } else { 16 };
        let hidden_size = keys.multiple("hidden_size", multiple..=1 << 17, multiple)?;
        let num_attention_heads = keys.int("num_attention_heads", 1..=1024)?;
        let num_key_value_heads = match family {
            Family::Llama => keys.optional_int("num_key_value_heads", 1..=1024)?.unwrap_or(num_attention_heads),
            _ => keys.int("num_key_value_heads", 1..=1024)?,
        };
        if num_attention_heads % num_key_value_heads != 0 {
            let reason = format!("{num_key_value_heads} does not divide num_attention_heads, {num_attention_heads}");
            return Err(keys.fault("num_key_value_heads", reason));
        }
        let head_dim = layers::head_dim(&keys, family, hidden_size, num_attention_heads)?;
        let num_hidden_layers = keys.int("num_hidden_layers", 1..=512)?;
        let (num_local_experts, num_experts_per_tok) = match family.has_experts() {
            true => layers::experts(&keys)?,
            false => (0, 0),
        };
        let moe_layers = layers::moe_layers(&keys, family, num_hidden_layers)?;
        let has_dense = gpt_oss || moe_layers.contains(&false);
        let intermediate_size = match has_dense {
            true => keys.multiple("intermediate_size", multiple..=1 << 17, multiple)?,
            false => keys.optional_multiple("intermediate_size", multiple..=1 << 17, multiple)?.unwrap_or(0),
        };
        let moe_intermediate_size = match family {
            Family::GptOss => intermediate_size,
            Family::Qwen3Moe => keys.multiple("moe_intermediate_size", 16..=1 << 17, 16)?,
            Family::Qwen3 | Family::Llama => 0,
        };
        let vocab_size = keys.int("vocab_size", 1..=MAX_TOKENS)?;
        let (layer_types, sliding_window) = layers::attention(&keys, family, num_hidden_layers)?;
        let max_position_embeddings = keys.int("max_position_embeddings", 1..=MAX_TOKENS)?;

        // The largest tensor, in elements: overflows only where usize is 32 bits.
        let largest = [num_local_experts.max(1), 2, intermediate_size.max(moe_intermediate_size), hidden_size];
        if largest.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).is_none() {
            return Err(Error::file(file, "the experts are too large for this machine's addresses"));
        }
        if let Some(act) = keys.present("hidden_act").filter(|act| act.as_str() != Some("silu")) {
            return Err(keys.wrong("hidden_act", act, "\"silu\""));
        }
        let attention_bias = keys.bool("attention_bias")?.unwrap_or(gpt_oss);
        if gpt_oss && !attention_bias {
            return Err(keys.fault("attention_bias", "false is not supported: gpt-oss attention has biases"));
        }
        if !gpt_oss && keys.bool("mlp_bias")? == Some(true) {
            return Err(keys.fault("mlp_bias", "true is not supported: MLPs are read without biases"));
        }
        let (swiglu_limit, swiglu_alpha) = match gpt_oss {
            true => (
                keys.optional_float("swiglu_limit", 1e-3..=1e6)?.unwrap_or(7.0) as f32,
                keys.optional_float("swiglu_alpha", 1e-3..=1e3)?.unwrap_or(1.702) as f32,
            ),
            false => (f32::INFINITY, 1.0),
        };

        Ok(Self {
            family,
            vocab_size,
            hidden_size,
            intermediate_size,
            moe_intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            num_local_experts,
            num_experts_per_tok,
            // The class default of transformers is false; the published Qwen3 files say true.
            norm_topk_prob: gpt_oss || (family.has_experts() && keys.bool("norm_topk_prob")?.unwrap_or(false)),
            moe_layers,
            sliding_window,
            layer_types,
            max_position_embeddings,
            rms_norm_eps: keys.float("rms_norm_eps", 1e-12..=1.0)? as f32,
            attention_bias,
            swiglu_limit,
            swiglu_alpha,
            rope: RopeConfig::read(&keys, family, max_position_embeddings)?,
            tie_word_embeddings: keys.bool("tie_word_embeddings")?.unwrap_or(false),
            eos_token_id: keys.tokens("eos_token_id", vocab_size)?.unwrap_or_default(),
            bos_token_id: keys.token("bos_token_id", vocab_size)?,
            quantization,
        })
    }

    /// Whether layer `layer` has experts; false past the last layer.
    pub fn is_moe(&self, layer: usize) -> bool {
        self.moe_layers.get(layer).copied().unwrap_or(false)
    }
}
