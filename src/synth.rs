//! Checkpoints of true shapes with random weights, for measuring: `synth:gpt-oss-20b`.
//!
//! Codes are uniform, scales sane (a row's norm is about one, so activations stay finite and routing is spread). All
//! tensors are windows into a few arenas, each at an offset of its own: nothing of the size of the model stands in host
//! memory. There is no tokenizer: such a model takes and gives token ids.

use crate::checkpoint::{Checkpoint, Dtype, Mapping, Part};
use crate::error::{Error, Result};
use serde_json::{Value, json};
use std::path::Path;

/// What a name that is no directory begins with.
const PREFIX: &str = "synth:";

/// The shapes there are.
pub const SHAPES: [&str; 3] = ["gpt-oss-20b", "gpt-oss-120b", "qwen3-30b-a3b"];

/// Opens what a user may name as a model: a Hugging Face directory, or `synth:SHAPE`, or `synth:SHAPE:LAYERS`.
pub fn open(name: &Path, mapping: Mapping) -> Result<Checkpoint> {
    match name.to_str().and_then(|name| name.strip_prefix(PREFIX)) {
        None => Checkpoint::open(name, mapping),
        Some(rest) => {
            let (shape, layers) = match rest.split_once(':') {
                None => (rest, None),
                Some((shape, layers)) => {
                    let fault =
                        || Error::option("model", format!("{layers} is no number of layers: synth:SHAPE:LAYERS"));
                    (shape, Some(layers.parse().map_err(|_| fault())?))
                }
            };
            checkpoint(shape, layers)
        }
    }
}

/// A checkpoint of a shape of [`SHAPES`], cut to its first `layers` layers if asked.
///
/// # Errors
/// If there is no such shape, or it has fewer layers.
pub fn checkpoint(shape: &str, layers: Option<usize>) -> Result<Checkpoint> {
    let mut s = Synth::new(match shape {
        "gpt-oss-20b" => gpt_oss(24, 32),
        "gpt-oss-120b" => gpt_oss(36, 128),
        "qwen3-30b-a3b" => qwen3_30b_a3b(),
        other => {
            return Err(Error::option("model", format!("there is no shape {other}; there are {}", SHAPES.join(", "))));
        }
    });
    let all = s.int("num_hidden_layers");
    let layers = layers.unwrap_or(all);
    if layers == 0 || layers > all {
        return Err(Error::option("model", format!("{shape} has 1 to {all} layers, not {layers}")));
    }
    s.config["num_hidden_layers"] = layers.into();
    if let Some(types) = s.config.get_mut("layer_types").and_then(Value::as_array_mut) {
        types.truncate(layers);
    }
    match s.config["model_type"].as_str() {
        Some("gpt_oss") => s.gpt_oss_tensors(layers),
        _ => s.qwen3_moe_tensors(layers),
    }
    s.finish(&format!("{PREFIX}{shape}"))
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
        "quantization_config": { "quant_method": "mxfp4" },
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
        "quantization_config": { "quant_method": "modelopt", "quant_algo": "W4A16_NVFP4",
            "producer": { "name": "fourfold synth", "version": "1" },
            "config_groups": { "group_0": { "targets": ["Linear"],
                "weights": { "dynamic": false, "num_bits": 4, "type": "float", "group_size": 16 } } },
            "ignore": ["lm_head", "model.embed_tokens", "*.mlp.gate"] },
    })
}

/// Random bytes of one kind, from which tensors take windows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Arena {
    /// Any byte.
    Codes,
    /// Scales of MXFP4: a row of uniform codes times these has a norm of about one.
    E8m0,
    /// Scales of NVFP4 from 64 to 448.
    E4m3,
    /// Normal numbers whose rows have a norm of about one.
    Bf16,
    /// Ones.
    Gains,
    /// The one f32 of NVFP4 tensors.
    Globals,
}

const ARENAS: [Arena; 6] = [Arena::Codes, Arena::E8m0, Arena::E4m3, Arena::Bf16, Arena::Gains, Arena::Globals];

/// Room for windows to differ in.
const SLACK: usize = 1 << 20;

struct Synth {
    config: Value,
    parts: Vec<Part>,
    /// Bytes of the largest window into each arena.
    largest: [usize; 6],
}

impl Synth {
    fn new(config: Value) -> Self {
        Self { config, parts: Vec::new(), largest: [0; 6] }
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
                let n = |what: &str| n(&format!("mlp.experts.{name}_{what}"));
                self.add(n("blocks"), Arena::Codes, Dtype::U8, &[e, rows, k / 32, 16]);
                self.add(n("scales"), Arena::E8m0, Dtype::U8, &[e, rows, k / 32]);
                self.bf16(n("bias"), &[e, rows]);
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
                self.nvfp4(n(&format!("self_attn.{name}")), [rows, k]);
            }
            for name in ["self_attn.q_norm.weight", "self_attn.k_norm.weight"] {
                self.gain(n(name), dh);
            }
            self.gain(n("input_layernorm.weight"), d);
            self.gain(n("post_attention_layernorm.weight"), d);
            self.bf16(n("mlp.gate.weight"), &[e, d]);
            for expert in 0..e {
                for (name, rows, k) in [("gate_proj", f, d), ("up_proj", f, d), ("down_proj", d, f)] {
                    self.nvfp4(n(&format!("mlp.experts.{expert}.{name}")), [rows, k]);
                }
            }
        }
    }

    fn nvfp4(&mut self, module: String, [n, k]: [usize; 2]) {
        self.add(format!("{module}.weight"), Arena::Codes, Dtype::U8, &[n, k / 2]);
        self.add(format!("{module}.weight_scale"), Arena::E4m3, Dtype::F8E4M3, &[n, k / 16]);
        self.add(format!("{module}.weight_scale_2"), Arena::Globals, Dtype::F32, &[]);
    }

    fn finish(self, name: &str) -> Result<Checkpoint> {
        let d = self.int("hidden_size") as f64;
        // The root mean square of E2M1 codes is 2.93.
        let norm = 1.0 / d.sqrt();
        let e8m0 = (norm / 2.93).log2().round() as i32 + 127;
        let normal = normal_table(norm);
        let global = (norm / (2.93 * 200.0)) as f32;
        let fill = |arena: Arena, len: usize| -> Vec<u8> {
            match arena {
                Arena::Codes => random(len, 1, |r, out| out.copy_from_slice(&r.to_le_bytes()[..out.len()])),
                Arena::E8m0 => random(len, 2, |r, out| {
                    out.iter_mut().zip(r.to_le_bytes()).for_each(|(o, b)| *o = (e8m0 - 1) as u8 + b % 3);
                }),
                Arena::E4m3 => random(len, 3, |r, out| {
                    out.iter_mut().zip(r.to_le_bytes()).for_each(|(o, b)| *o = 0x68 + b % 23);
                }),
                Arena::Bf16 => random(len, 4, |r, out| {
                    for (i, pair) in out.chunks_exact_mut(2).enumerate() {
                        pair.copy_from_slice(&normal[(r >> (16 * i)) as usize & 0xfff].to_le_bytes());
                    }
                }),
                Arena::Gains => [0x80, 0x3f].repeat(len.div_ceil(2)),
                Arena::Globals => global.to_le_bytes().repeat(len.div_ceil(4)),
            }
        };
        let arenas = ARENAS.map(|arena| match self.largest[arena as usize] {
            0 => Vec::new(),
            largest => fill(arena, largest + SLACK),
        });
        let config = serde_json::to_vec(&self.config).expect("a value of our own");
        Checkpoint::from_parts(name, vec![("config.json", config)], arenas.into(), self.parts)
    }
}

/// 4096 bf16 numbers whose distribution is normal with this standard deviation, in no order.
fn normal_table(sigma: f64) -> Vec<u16> {
    let mut state = 7;
    let uniform = |state: &mut u64| splitmix(state) as f64 / u64::MAX as f64;
    let sum = |state: &mut u64| (0..12).map(|_| uniform(state)).sum::<f64>() - 6.0;
    (0..4096).map(|_| half::bf16::from_f64(sum(&mut state) * sigma).to_bits()).collect()
}

/// `len` bytes, eight from each random number, made by all cores.
fn random(len: usize, seed: u64, fill: impl Fn(u64, &mut [u8]) + Sync) -> Vec<u8> {
    const PIECE: usize = 1 << 22;
    let mut bytes = vec![0; len];
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let per_thread = len.div_ceil(threads).next_multiple_of(PIECE);
    std::thread::scope(|scope| {
        for (i, run) in bytes.chunks_mut(per_thread).enumerate() {
            let fill = &fill;
            scope.spawn(move || {
                for (j, piece) in run.chunks_mut(PIECE).enumerate() {
                    // By place, so that the bytes do not depend on the number of cores.
                    let mut state = seed << 56 ^ ((i * per_thread / PIECE + j) as u64) << 24;
                    for eight in piece.chunks_mut(8) {
                        fill(splitmix(&mut state), eight);
                    }
                }
            });
        }
    });
    bytes
}

/// Steele, Lea and Flood's generator: good enough for weights that mean nothing.
fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_published_files() {
        // model.safetensors.index.json of openai/gpt-oss-20b: total_size. Only shapes are asked for here, not bytes.
        let total = |shape: Value, gpt_oss: bool| {
            let mut s = Synth::new(shape);
            let layers = s.int("num_hidden_layers");
            if gpt_oss {
                s.gpt_oss_tensors(layers)
            } else {
                s.qwen3_moe_tensors(layers)
            }
            s.parts.iter().map(|part| part.range.len() as u64).sum::<u64>()
        };
        assert_eq!(total(gpt_oss(24, 32), true), 13_761_264_768);
        assert_eq!(total(gpt_oss(36, 128), true), 65_248_815_744);
        assert!(total(qwen3_30b_a3b(), false) > 17_000_000_000);
    }

    #[test]
    fn unknown_shapes_and_depths_are_refused() {
        for name in ["synth:gpt-5", "synth:gpt-oss-20b:0", "synth:gpt-oss-20b:25", "synth:gpt-oss-20b:x"] {
            assert!(matches!(open(Path::new(name), Mapping::Mmap), Err(Error::Option { .. })), "{name}");
        }
    }
}
