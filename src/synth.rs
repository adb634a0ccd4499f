//! Checkpoints of true shapes with random weights, for measuring: `synth:gpt-oss-20b` in memory, or written as files.
//!
//! Codes are uniform, scales sane (a row's norm is about one, so activations stay finite and routing is spread). All
//! tensors are windows into a few arenas, each at an offset of its own: nothing of the size of the model stands in host
//! memory. There is no tokenizer: such a model takes and gives token ids.

mod bytes;
mod write;

pub use write::{Progress, Written};

use crate::checkpoint::{Checkpoint, Dtype, Mapping, Part};
use crate::error::{Error, Result};
use crate::format::Format;
use bytes::{ARENAS, Arena, Bytes};
use serde_json::{Value, json};
use std::path::Path;

/// What a name that is no directory begins with.
const PREFIX: &str = "synth:";

/// The shapes there are.
pub const SHAPES: [&str; 3] = ["gpt-oss-20b", "gpt-oss-120b", "qwen3-30b-a3b"];

/// Opens what a user may name as a model: a Hugging Face directory, or `synth:SHAPE[:LAYERS][:FORMAT]`.
pub fn open(name: &Path, mapping: Mapping) -> Result<Checkpoint> {
    match name.to_str().and_then(|name| name.strip_prefix(PREFIX)) {
        None => Checkpoint::open(name, mapping),
        Some(rest) => Recipe::parse(rest)?.checkpoint(),
    }
}

/// A checkpoint of a shape of [`SHAPES`], cut to its first `layers` layers if asked.
///
/// # Errors
/// If there is no such shape, or it has fewer layers.
pub fn checkpoint(shape: &str, layers: Option<usize>) -> Result<Checkpoint> {
    Recipe { layers, ..Recipe::new(shape) }.checkpoint()
}

/// What to make: a shape, how deep, in which format, from which seed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// One of [`SHAPES`].
    pub shape: String,
    /// Its first layers only; all if none.
    pub layers: Option<usize>,
    /// The format of its linears (of a gpt-oss: its experts); the one of the published files if none. A gpt-oss is MXFP4
    /// or NVFP4, a Qwen3 NVFP4 or BF16.
    pub format: Option<Format>,
    /// Another one gives other weights.
    pub seed: u64,
}

impl Recipe {
    /// A whole model in its usual format.
    pub fn new(shape: impl Into<String>) -> Self {
        Self { shape: shape.into(), layers: None, format: None, seed: 0 }
    }

    /// What stands behind `synth:` in a name: `SHAPE`, then a number of layers, a format, or both.
    ///
    /// # Errors
    /// If a part is neither.
    pub fn parse(name: &str) -> Result<Self> {
        let mut parts = name.split(':');
        let mut recipe = Self::new(parts.next().unwrap_or_default());
        for part in parts {
            let format = [Format::Mxfp4, Format::Nvfp4, Format::Bf16].into_iter().find(|f| f.name() == part);
            match (format, part.parse()) {
                (Some(format), _) if recipe.format.is_none() => recipe.format = Some(format),
                (_, Ok(layers)) if recipe.layers.is_none() => recipe.layers = Some(layers),
                _ => {
                    let reason = format!("{part} is no number of layers and no format: synth:SHAPE[:LAYERS][:FORMAT]");
                    return Err(Error::option("model", reason));
                }
            }
        }
        Ok(recipe)
    }

    /// The checkpoint, in memory.
    ///
    /// # Errors
    /// If there is no such shape, or it has fewer layers, or does not come in the format.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        Synth::new(self)?.checkpoint(&format!("{PREFIX}{}", self.shape), self.seed)
    }
}

fn gpt_oss(layers: usize, experts: usize) -> Value {
    let types: Vec<&str> =
        (0..layers).map(|i| if i % 2 == 0 { "sliding_attention" } else { "full_attention" }).collect();
    json!({
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_act": "silu", "attention_bias": true,
        "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": layers, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201_088, "sliding_window": 128, "layer_types": types,
        "num_local_experts": experts, "num_experts_per_tok": 4, "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5, "swiglu_limit": 7.0, "tie_word_embeddings": false, "eos_token_id": 200_002,
        "rope_theta": 150_000, "rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false,
            "original_max_position_embeddings": 4096 },
    })
}

fn qwen3_30b_a3b() -> Value {
    json!({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu",
        "attention_bias": false, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "vocab_size": 151_936, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": true,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 40_960, "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0, "rope_scaling": null, "use_sliding_window": false, "sliding_window": null,
        "tie_word_embeddings": false, "eos_token_id": 151_645,
    })
}

/// As ModelOpt declares NVFP4 weights.
fn modelopt(ignore: &[&str]) -> Value {
    json!({ "quant_method": "modelopt", "quant_algo": "W4A16_NVFP4",
        "producer": { "name": "fourfold synth", "version": "1" },
        "config_groups": { "group_0": { "targets": ["Linear"],
            "weights": { "dynamic": false, "num_bits": 4, "type": "float", "group_size": 16 } } },
        "ignore": ignore })
}

/// Room for windows to differ in.
const SLACK: usize = 1 << 20;

struct Synth {
    config: Value,
    format: Format,
    parts: Vec<Part>,
    /// Bytes of the largest window into each arena.
    largest: [usize; 6],
}

impl Synth {
    fn new(recipe: &Recipe) -> Result<Self> {
        let shape = recipe.shape.as_str();
        let (config, formats) = match shape {
            "gpt-oss-20b" => (gpt_oss(24, 32), [Format::Mxfp4, Format::Nvfp4]),
            "gpt-oss-120b" => (gpt_oss(36, 128), [Format::Mxfp4, Format::Nvfp4]),
            "qwen3-30b-a3b" => (qwen3_30b_a3b(), [Format::Nvfp4, Format::Bf16]),
            other => {
                let shapes = SHAPES.join(", ");
                return Err(Error::option("model", format!("there is no shape {other}; there are {shapes}")));
            }
        };
        let format = recipe.format.unwrap_or(formats[0]);
        if !formats.contains(&format) {
            let reason = format!("{shape} is made in {} or {}, not in {format}", formats[0].name(), formats[1].name());
            return Err(Error::option("format", reason));
        }
        let mut s = Self { config, format, parts: Vec::new(), largest: [0; 6] };
        let all = s.int("num_hidden_layers");
        let layers = recipe.layers.unwrap_or(all);
        if layers == 0 || layers > all {
            return Err(Error::option("layers", format!("{shape} has 1 to {all} layers, not {layers}")));
        }
        s.config["num_hidden_layers"] = layers.into();
        if let Some(types) = s.config.get_mut("layer_types").and_then(Value::as_array_mut) {
            types.truncate(layers);
        }
        let gpt_oss = s.config["model_type"] == "gpt_oss";
        let quantization = match format {
            Format::Mxfp4 => Some(json!({ "quant_method": "mxfp4" })),
            Format::Nvfp4 if gpt_oss => {
                Some(modelopt(&["lm_head", "model.embed_tokens", "*.self_attn.*", "*.mlp.router"]))
            }
            Format::Nvfp4 => Some(modelopt(&["lm_head", "model.embed_tokens", "*.mlp.gate"])),
            _ => None,
        };
        if let Some(quantization) = quantization {
            s.config["quantization_config"] = quantization;
        }
        s.tensors(layers);
        Ok(s)
    }

    fn tensors(&mut self, layers: usize) {
        match self.config["model_type"].as_str() {
            Some("gpt_oss") => self.gpt_oss_tensors(layers),
            _ => self.qwen3_moe_tensors(layers),
        }
    }

    fn checkpoint(&self, name: &str, seed: u64) -> Result<Checkpoint> {
        let bytes = self.bytes(seed);
        let arenas = ARENAS.map(|arena| match self.largest[arena as usize] {
            0 => Vec::new(),
            largest => bytes.arena(arena, largest + SLACK),
        });
        let config = serde_json::to_vec(&self.config).expect("a value of our own");
        Checkpoint::from_parts(name, vec![("config.json", config)], arenas.into(), self.parts.clone())
    }

    fn bytes(&self, seed: u64) -> Bytes {
        Bytes::new(self.int("hidden_size"), seed)
    }

    fn int(&self, key: &str) -> usize {
        self.config[key].as_u64().expect("the shapes above have it") as usize
    }

    fn add(&mut self, name: String, arena: Arena, dtype: Dtype, shape: &[usize]) {
        let bytes = shape.iter().product::<usize>() * dtype.bits() / 8;
        let idx = arena as usize;
        self.largest[idx] = self.largest[idx].max(bytes);
        // Any offset that differs from the other tensors': whole cache lines.
        let offset = self.parts.len() * 4097 * 64 % SLACK;
        let offset = if matches!(arena, Arena::Gains | Arena::Globals) { 0 } else { offset };
        self.parts.push(Part { name, dtype, shape: shape.to_vec(), source: idx, range: offset..offset + bytes });
    }

    fn bf16(&mut self, name: String, shape: &[usize]) {
        self.add(name, Arena::Bf16, Dtype::Bf16, shape);
    }

    fn gain(&mut self, name: String, n: usize) {
        self.add(name, Arena::Gains, Dtype::Bf16, &[n]);
    }

    fn ends(&mut self, d: usize) {
        let vocab = self.int("vocab_size");
        self.bf16("model.embed_tokens.weight".to_owned(), &[vocab, d]);
        self.bf16("lm_head.weight".to_owned(), &[vocab, d]);
        self.gain("model.norm.weight".to_owned(), d);
    }

    fn gpt_oss_tensors(&mut self, layers: usize) {
        let [d, f, e] = ["hidden_size", "intermediate_size", "num_local_experts"].map(|key| self.int(key));
        let [h, hk, dh] = ["num_attention_heads", "num_key_value_heads", "head_dim"].map(|key| self.int(key));
        self.ends(d);
        for layer in 0..layers {
            let n = |name: &str| format!("model.layers.{layer}.{name}");
            for (name, rows, k) in
                [("q_proj", h * dh, d), ("k_proj", hk * dh, d), ("v_proj", hk * dh, d), ("o_proj", d, h * dh)]
            {
                self.bf16(n(&format!("self_attn.{name}.weight")), &[rows, k]);
                self.bf16(n(&format!("self_attn.{name}.bias")), &[rows]);
            }
            self.bf16(n("self_attn.sinks"), &[h]);
            self.gain(n("input_layernorm.weight"), d);
            self.gain(n("post_attention_layernorm.weight"), d);
            self.bf16(n("mlp.router.weight"), &[e, d]);
            self.bf16(n("mlp.router.bias"), &[e]);
            for (name, rows, k) in [("gate_up_proj", 2 * f, d), ("down_proj", d, f)] {
                let n = |what: &str| n(&format!("mlp.experts.{name}{what}"));
                if self.format == Format::Mxfp4 {
                    self.add(n("_blocks"), Arena::Codes, Dtype::U8, &[e, rows, k / 32, 16]);
                    self.add(n("_scales"), Arena::E8m0, Dtype::U8, &[e, rows, k / 32]);
                } else {
                    self.add(n(""), Arena::Codes, Dtype::U8, &[e, rows, k / 2]);
                    self.add(n("_weight_scale"), Arena::E4m3, Dtype::F8E4M3, &[e, rows, k / 16]);
                    self.add(n("_weight_scale_2"), Arena::Globals, Dtype::F32, &[e]);
                }
                self.bf16(n("_bias"), &[e, rows]);
            }
        }
    }

    fn qwen3_moe_tensors(&mut self, layers: usize) {
        let [d, f, e] = ["hidden_size", "moe_intermediate_size", "num_experts"].map(|key| self.int(key));
        let [h, hk, dh] = ["num_attention_heads", "num_key_value_heads", "head_dim"].map(|key| self.int(key));
        self.ends(d);
        for layer in 0..layers {
            let n = |name: &str| format!("model.layers.{layer}.{name}");
            let attention =
                [("q_proj", h * dh, d), ("k_proj", hk * dh, d), ("v_proj", hk * dh, d), ("o_proj", d, h * dh)];
            for (name, rows, k) in attention {
                self.linear(n(&format!("self_attn.{name}")), [rows, k]);
            }
            for name in ["self_attn.q_norm.weight", "self_attn.k_norm.weight"] {
                self.gain(n(name), dh);
            }
            self.gain(n("input_layernorm.weight"), d);
            self.gain(n("post_attention_layernorm.weight"), d);
            self.bf16(n("mlp.gate.weight"), &[e, d]);
            for expert in 0..e {
                for (name, rows, k) in [("gate_proj", f, d), ("up_proj", f, d), ("down_proj", d, f)] {
                    self.linear(n(&format!("mlp.experts.{expert}.{name}")), [rows, k]);
                }
            }
        }
    }

    fn linear(&mut self, module: String, [n, k]: [usize; 2]) {
        if self.format == Format::Bf16 {
            return self.bf16(format!("{module}.weight"), &[n, k]);
        }
        self.add(format!("{module}.weight"), Arena::Codes, Dtype::U8, &[n, k / 2]);
        self.add(format!("{module}.weight_scale"), Arena::E4m3, Dtype::F8E4M3, &[n, k / 16]);
        self.add(format!("{module}.weight_scale_2"), Arena::Globals, Dtype::F32, &[]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_published_files() {
        // model.safetensors.index.json of openai/gpt-oss-20b: total_size. Only shapes are asked for here, not bytes.
        let total = |name: &str| {
            let s = Synth::new(&Recipe::parse(name).unwrap()).unwrap();
            s.parts.iter().map(|part| part.range.len() as u64).sum::<u64>()
        };
        assert_eq!(total("gpt-oss-20b"), 13_761_264_768);
        assert_eq!(total("gpt-oss-120b"), 65_248_815_744);
        assert!(total("qwen3-30b-a3b") > 17_000_000_000);
        // Qwen/Qwen3-30B-A3B, the same.
        assert_eq!(total("qwen3-30b-a3b:bf16"), 61_064_245_248);
    }

    #[test]
    fn unknown_shapes_depths_and_formats_are_refused() {
        for name in [
            "synth:gpt-5",
            "synth:",
            "synth:gpt-oss-20b:0",
            "synth:gpt-oss-20b:25",
            "synth:gpt-oss-20b:x",
            "synth:gpt-oss-20b:1:2",
            "synth:gpt-oss-20b:bf16",
            "synth:qwen3-30b-a3b:1:mxfp4",
            "synth:qwen3-30b-a3b:nvfp4:bf16",
        ] {
            assert!(matches!(open(Path::new(name), Mapping::Mmap), Err(Error::Option { .. })), "{name}");
        }
    }
}
