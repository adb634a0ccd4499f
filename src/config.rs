//! `config.json` → [`Config`] and `generation_config.json` → [`GenerationConfig`], read and checked once.
//!
//! Fields keep the checkpoint's words. Every number has a range, wide enough for any real model and narrow enough that
//! no product of dimensions overflows; what lies outside is an error that names file, key, value and range.

use std::f64::consts::TAU;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::checkpoint::json;
use crate::error::{Error, Result};

const FAMILIES: &str = "supported: gpt_oss (GptOssForCausalLM)";
const MAX_TOKENS: usize = 1 << 24;

/// A gpt-oss model's dimensions and constants.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// V, rows of the embedding.
    pub vocab_size: usize,
    /// D, width of the residual stream; a multiple of 32.
    pub hidden_size: usize,
    /// F, width inside an expert; a multiple of 32.
    pub intermediate_size: usize,
    /// L.
    pub num_hidden_layers: usize,
    /// H, query heads.
    pub num_attention_heads: usize,
    /// Hk, key and value heads; divides H.
    pub num_key_value_heads: usize,
    /// Dh, a multiple of 4.
    pub head_dim: usize,
    /// E.
    pub num_local_experts: usize,
    /// A, at most E. Some files say `experts_per_token`.
    pub num_experts_per_tok: usize,
    /// How many positions a sliding layer sees, the token's own included.
    pub sliding_window: usize,
    /// One per layer. Where the file has none: sliding and full in turn, sliding first.
    pub layer_types: Vec<LayerType>,
    /// The longest context that the model was made for.
    pub max_position_embeddings: usize,
    /// Added to the mean square in every RMSNorm.
    pub rms_norm_eps: f32,
    /// The experts' clamp; 7 where the file has none.
    pub swiglu_limit: f32,
    /// The experts' sigmoid gain; 1.702 where the file has none, as in all released ones.
    pub swiglu_alpha: f32,
    /// Rotary positions.
    pub rope: RopeConfig,
    /// Whether the output matrix is the embedding, and `lm_head.weight` may be absent.
    pub tie_word_embeddings: bool,
    /// Tokens that end a text.
    pub eos_token_id: Vec<u32>,
    /// The token that begins a text.
    pub bos_token_id: Option<u32>,
    /// The token that fills up batches in training.
    pub pad_token_id: Option<u32>,
}

/// What a layer's attention sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerType {
    /// The last `sliding_window` positions.
    Sliding,
    /// Every position so far.
    Full,
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// The base of the frequencies.
    pub theta: f64,
    /// How frequencies are stretched for long contexts, if they are.
    pub scaling: Option<Yarn>,
}

/// YaRN: low frequencies divided by `factor`, high ones kept, a ramp between.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// How many times longer the context became.
    pub factor: f64,
    /// Rotations within the original context above which a frequency is kept.
    pub beta_fast: f64,
    /// Rotations within the original context below which a frequency is divided by `factor`.
    pub beta_slow: f64,
    /// The context before stretching.
    pub original_max_position_embeddings: usize,
    /// Whether the ends of the ramp are rounded outwards to whole dimensions. A missing key means yes, as in
    /// transformers; the released models say no.
    pub truncate: bool,
    /// What cos and sin are multiplied by, where the file says so itself.
    pub attention_factor: Option<f64>,
    /// With `mscale_all_dim`, another way to give the attention factor.
    pub mscale: Option<f64>,
    /// See `mscale`.
    pub mscale_all_dim: Option<f64>,
}

/// What `generation_config.json` recommends. Keys that the file lacks are `None`: the caller's defaults hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Tokens that end a text; the model config's where this file has none.
    pub eos_token_id: Vec<u32>,
    /// Whether to sample at all.
    pub do_sample: Option<bool>,
    /// Sampling temperature, 0 to 100.
    pub temperature: Option<f32>,
    /// Nucleus sampling, above 0 and up to 1.
    pub top_p: Option<f32>,
    /// Top-k sampling; 0 means off.
    pub top_k: Option<usize>,
}

impl Config {
    /// Reads the bytes of a `config.json`, called `file` in messages.
    pub fn from_json(file: &str, bytes: &[u8]) -> Result<Self> {
        let map = json::object(file, bytes)?;
        let keys = Keys { file, path: "", map: &map };
        keys.check_family()?;
        keys.check_quantization()?;

        let hidden_size = keys.multiple("hidden_size", 32..=1 << 17, 32)?;
        let intermediate_size = keys.multiple("intermediate_size", 32..=1 << 17, 32)?;
        let num_attention_heads = keys.int("num_attention_heads", 1..=1024)?;
        let num_key_value_heads = keys.int("num_key_value_heads", 1..=1024)?;
        if num_attention_heads % num_key_value_heads != 0 {
            let reason = format!("{num_key_value_heads} does not divide num_attention_heads, {num_attention_heads}");
            return Err(keys.fault("num_key_value_heads", reason));
        }
        let head_dim = keys.multiple("head_dim", 4..=256, 4)?;
        if num_attention_heads * head_dim % 8 != 0 {
            let reason = format!("{head_dim} times num_attention_heads, {num_attention_heads}, is no multiple of 8");
            return Err(keys.fault("head_dim", reason));
        }
        let num_hidden_layers = keys.int("num_hidden_layers", 1..=512)?;
        let num_local_experts = keys.int("num_local_experts", 1..=1024)?;
        let num_experts_per_tok = keys.experts_per_tok(num_local_experts)?;
        let vocab_size = keys.int("vocab_size", 1..=MAX_TOKENS)?;
        let sliding_window = keys.int("sliding_window", 1..=MAX_TOKENS)?;
        let max_position_embeddings = keys.int("max_position_embeddings", 1..=MAX_TOKENS)?;
        let layer_types = keys.layer_types(num_hidden_layers)?;

        // The largest tensor, in elements: overflows only where usize is 32 bits.
        let largest = [num_local_experts, 2, intermediate_size, hidden_size];
        if largest.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).is_none() {
            return Err(Error::file(file, "the experts are too large for this machine's addresses"));
        }
        if let Some(act) = keys.present("hidden_act").filter(|act| act.as_str() != Some("silu")) {
            return Err(keys.wrong("hidden_act", act, "\"silu\""));
        }
        if !keys.bool("attention_bias")?.unwrap_or(true) {
            return Err(keys.fault("attention_bias", "false is not supported: gpt-oss attention has biases"));
        }

        Ok(Self {
            vocab_size,
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            num_local_experts,
            num_experts_per_tok,
            sliding_window,
            layer_types,
            max_position_embeddings,
            rms_norm_eps: keys.float("rms_norm_eps", 1e-12..=1.0)? as f32,
            swiglu_limit: keys.optional_float("swiglu_limit", 1e-3..=1e6)?.unwrap_or(7.0) as f32,
            swiglu_alpha: keys.optional_float("swiglu_alpha", 1e-3..=1e3)?.unwrap_or(1.702) as f32,
            rope: keys.rope(max_position_embeddings)?,
            tie_word_embeddings: keys.bool("tie_word_embeddings")?.unwrap_or(false),
            eos_token_id: keys.tokens("eos_token_id", vocab_size)?.unwrap_or_default(),
            bos_token_id: keys.token("bos_token_id", vocab_size)?,
            pad_token_id: keys.token("pad_token_id", vocab_size)?,
        })
    }
}

impl GenerationConfig {
    /// Reads the bytes of a `generation_config.json`, called `file` in messages.
    pub fn from_json(file: &str, bytes: &[u8], config: &Config) -> Result<Self> {
        let map = json::object(file, bytes)?;
        let keys = Keys { file, path: "", map: &map };
        Ok(Self {
            eos_token_id: keys
                .tokens("eos_token_id", config.vocab_size)?
                .unwrap_or_else(|| config.eos_token_id.clone()),
            do_sample: keys.bool("do_sample")?,
            temperature: keys.optional_float("temperature", 0.0..=100.0)?.map(|t| t as f32),
            top_p: keys.optional_float("top_p", 1e-6..=1.0)?.map(|p| p as f32),
            top_k: keys.optional_int("top_k", 0..=MAX_TOKENS)?,
        })
    }

    /// What holds where there is no `generation_config.json`.
    pub fn from_config(config: &Config) -> Self {
        Self { eos_token_id: config.eos_token_id.clone(), ..Self::default() }
    }
}

impl RopeConfig {
    /// Angle per position of each pair of dimensions, `[head_dim / 2]`, in the f32 steps of transformers.
    pub fn inv_freq(&self, head_dim: usize) -> Vec<f32> {
        let period = |i: usize| self.theta.powf(f64::from((2 * i) as f32 / head_dim as f32)) as f32;
        let Some(yarn) = &self.scaling else { return (0..head_dim / 2).map(|i| 1.0 / period(i)).collect() };
        let (low, high) = yarn.ramp(self.theta, head_dim);
        let frequency = |i: usize| {
            let stretched = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            let kept = 1.0 - stretched;
            1.0 / (yarn.factor as f32 * period(i)) * (1.0 - kept) + 1.0 / period(i) * kept
        };
        (0..head_dim / 2).map(frequency).collect()
    }

    /// What cos and sin are multiplied by.
    pub fn attention_factor(&self) -> f32 {
        self.scaling.as_ref().map_or(1.0, Yarn::attention_factor) as f32
    }
}

impl Yarn {
    /// What transformers uses for a gpt-oss config that has no RoPE scaling: the released models' own.
    fn released() -> Self {
        Self {
            factor: 32.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_max_position_embeddings: 4096,
            truncate: false,
            attention_factor: None,
            mscale: None,
            mscale_all_dim: None,
        }
    }

    /// Where the ramp begins and ends, in pairs of dimensions.
    fn ramp(&self, theta: f64, head_dim: usize) -> (f64, f64) {
        let original = self.original_max_position_embeddings as f64;
        let dim = |rotations: f64| head_dim as f64 * (original / (rotations * TAU)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (dim(self.beta_fast), dim(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
        if low == high {
            high += 0.001; // as transformers does, against 0 / 0
        }
        (low, high)
    }

    fn attention_factor(&self) -> f64 {
        let scale = |mscale: f64| if self.factor <= 1.0 { 1.0 } else { 0.1 * mscale * self.factor.ln() + 1.0 };
        match (self.attention_factor, self.mscale, self.mscale_all_dim) {
            (Some(factor), _, _) => factor,
            (None, Some(a), Some(b)) if a != 0.0 && b != 0.0 => scale(a) / scale(b),
            _ => scale(1.0),
        }
    }
}

/// An object of a JSON file, with what its errors need to say where they are.
#[derive(Clone, Copy)]
struct Keys<'a> {
    file: &'a str,
    /// Path of the object within the file, empty or ending in a dot.
    path: &'a str,
    map: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    fn fault(&self, key: &str, reason: impl AsRef<str>) -> Error {
        Error::file(self.file, format!("{}{key}: {}", self.path, reason.as_ref()))
    }

    fn wrong(&self, key: &str, found: &Value, should: &str) -> Error {
        self.fault(key, format!("found {}, should be {should}", json::clip(&found.to_string(), 60)))
    }

    /// A key's value; null counts as absent.
    fn present(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn required<T>(&self, key: &str, value: Option<T>, should: &str) -> Result<T> {
        let found = if self.map.contains_key(key) { "is null" } else { "is missing" };
        value.ok_or_else(|| self.fault(key, format!("{found}, should be {should}")))
    }

    fn int(&self, key: &str, range: RangeInclusive<usize>) -> Result<usize> {
        let value = self.optional_int(key, range.clone())?;
        self.required(key, value, &whole(&range))
    }

    fn optional_int(&self, key: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        let Some(value) = self.present(key) else { return Ok(None) };
        let int = value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| range.contains(n));
        int.map(Some).ok_or_else(|| self.wrong(key, value, &whole(&range)))
    }

    fn multiple(&self, key: &str, range: RangeInclusive<usize>, of: usize) -> Result<usize> {
        let n = self.int(key, range)?;
        if n % of != 0 {
            return Err(self.fault(key, format!("found {n}, should be a multiple of {of}")));
        }
        Ok(n)
    }

    fn float(&self, key: &str, range: RangeInclusive<f64>) -> Result<f64> {
        let value = self.optional_float(key, range.clone())?;
        self.required(key, value, &number(&range))
    }

    fn optional_float(&self, key: &str, range: RangeInclusive<f64>) -> Result<Option<f64>> {
        let Some(value) = self.present(key) else { return Ok(None) };
        let float = value.as_f64().filter(|x| range.contains(x));
        float.map(Some).ok_or_else(|| self.wrong(key, value, &number(&range)))
    }

    fn bool(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.present(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong(key, value, "true or false"))
    }

    fn object(&self, key: &str, path: &'a str) -> Result<Option<Keys<'a>>> {
        match self.present(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Keys { file: self.file, path, map })),
            Some(other) => Err(self.wrong(key, other, "an object")),
        }
    }

    fn token(&self, key: &str, vocab_size: usize) -> Result<Option<u32>> {
        Ok(self.optional_int(key, 0..=vocab_size - 1)?.map(|id| id as u32))
    }

    /// One id or a list of them.
    fn tokens(&self, key: &str, vocab_size: usize) -> Result<Option<Vec<u32>>> {
        let Some(Value::Array(list)) = self.present(key) else {
            return Ok(self.token(key, vocab_size)?.map(|id| vec![id]));
        };
        let id = |value: &Value| {
            let id = value.as_u64().filter(|&id| id < vocab_size as u64);
            let should = || format!("token ids below vocab_size, {vocab_size}");
            id.map(|id| id as u32).ok_or_else(|| self.wrong(key, value, &should()))
        };
        list.iter().map(id).collect::<Result<_>>().map(Some)
    }

    fn check_family(&self) -> Result<()> {
        let architectures = self.present("architectures");
        let Some(family) = self.present("model_type") else {
            let found = architectures.map_or("no architectures either".into(), |a| json::clip(&a.to_string(), 60));
            return Err(self.fault("model_type", format!("is missing ({found}); {FAMILIES}")));
        };
        if family != "gpt_oss" {
            return Err(self.fault("model_type", format!("{} is not supported; {FAMILIES}", shown(family))));
        }
        match architectures {
            Some(Value::Array(list)) if list.iter().any(|a| a == "GptOssForCausalLM") => Ok(()),
            None => Ok(()),
            Some(other) => Err(self.fault("architectures", format!("{} is not supported; {FAMILIES}", shown(other)))),
        }
    }

    fn check_quantization(&self) -> Result<()> {
        const SUPPORTED: &str = "supported: \"mxfp4\", as openai/gpt-oss-20b is published";
        let Some(quantization) = self.object("quantization_config", "quantization_config.")? else {
            let reason = format!("is missing, and unquantised gpt-oss exports are not supported; {SUPPORTED}");
            return Err(self.fault("quantization_config", reason));
        };
        match quantization.present("quant_method") {
            Some(method) if method == "mxfp4" => Ok(()),
            Some(other) => {
                Err(quantization.fault("quant_method", format!("{} is not supported; {SUPPORTED}", shown(other))))
            }
            None => Err(quantization.fault("quant_method", format!("is missing; {SUPPORTED}"))),
        }
    }

    fn experts_per_tok(&self, num_local_experts: usize) -> Result<usize> {
        let range = 1..=num_local_experts.min(16);
        let alias = self.optional_int("experts_per_token", range.clone())?;
        let own = self.optional_int("num_experts_per_tok", range.clone())?;
        if let (Some(own), Some(alias)) = (own, alias)
            && own != alias
        {
            return Err(self.fault("num_experts_per_tok", format!("{own}, but experts_per_token is {alias}")));
        }
        self.required("num_experts_per_tok", own.or(alias), &whole(&range))
    }

    fn layer_types(&self, num_hidden_layers: usize) -> Result<Vec<LayerType>> {
        let words = "\"sliding_attention\" or \"full_attention\"";
        let Some(value) = self.present("layer_types") else {
            let alternate = [LayerType::Sliding, LayerType::Full].into_iter().cycle();
            return Ok(alternate.take(num_hidden_layers).collect());
        };
        let Value::Array(list) = value else {
            return Err(self.wrong("layer_types", value, &format!("a list of {words}")));
        };
        if list.len() != num_hidden_layers {
            let reason = format!("has {} entries, but num_hidden_layers is {num_hidden_layers}", list.len());
            return Err(self.fault("layer_types", reason));
        }
        let layer = |value: &Value| match value.as_str() {
            Some("sliding_attention") => Ok(LayerType::Sliding),
            Some("full_attention") => Ok(LayerType::Full),
            _ => Err(self.wrong("layer_types", value, words)),
        };
        list.iter().map(layer).collect()
    }

    /// Either spelling: `rope_theta` beside `rope_scaling` (transformers 4), or both within `rope_parameters`
    /// (transformers 5). A config that has neither dictionary, or null, gets the released YaRN, as in transformers.
    fn rope(&self, max_position_embeddings: usize) -> Result<RopeConfig> {
        const THETA: RangeInclusive<f64> = 1.0 + 1e-6..=1e12;
        let old = self.object("rope_scaling", "rope_scaling.")?;
        let new = self.object("rope_parameters", "rope_parameters.")?;
        let mut thetas = Vec::new();
        for keys in [Some(*self), new, old].into_iter().flatten() {
            thetas.extend(keys.optional_float("rope_theta", THETA)?);
        }
        let theta = self.required("rope_theta", thetas.first().copied(), &number(&THETA))?;
        if let Some(other) = thetas.iter().find(|&&other| other != theta) {
            return Err(self.fault("rope_theta", format!("given as {theta} and, in another place, as {other}")));
        }

        let read = |keys: Option<Keys>| keys.map(|keys| keys.scaling(max_position_embeddings)).transpose();
        let scaling = match (read(old)?, read(new)?) {
            (None, None) => Some(Yarn::released()),
            (Some(one), None) | (None, Some(one)) => one,
            (Some(old), Some(new)) if old == new => new,
            (Some(_), Some(_)) => return Err(self.fault("rope_parameters", "contradicts rope_scaling: remove one")),
        };
        Ok(RopeConfig { theta, scaling })
    }

    fn scaling(&self, max_position_embeddings: usize) -> Result<Option<Yarn>> {
        let key = if self.map.contains_key("rope_type") { "rope_type" } else { "type" };
        match self.present(key) {
            None => return Ok(None),
            Some(kind) if kind == "default" => return Ok(None),
            Some(kind) if kind == "yarn" => {}
            Some(other) => return Err(self.wrong(key, other, "\"yarn\" or \"default\"")),
        }
        let original = self.optional_int("original_max_position_embeddings", 1..=MAX_TOKENS)?;
        let implied = original.map(|original| max_position_embeddings as f64 / original as f64);
        let factor = self.optional_float("factor", 1.0..=65536.0)?.or(implied.filter(|factor| *factor >= 1.0));
        let beta_fast = self.optional_float("beta_fast", 1e-3..=1e6)?.unwrap_or(32.0);
        let beta_slow = self.optional_float("beta_slow", 1e-3..=1e6)?.unwrap_or(1.0);
        if beta_fast < beta_slow {
            return Err(self.fault("beta_fast", format!("{beta_fast} is less than beta_slow, {beta_slow}")));
        }
        Ok(Some(Yarn {
            factor: self.required("factor", factor, &number(&(1.0..=65536.0)))?,
            beta_fast,
            beta_slow,
            original_max_position_embeddings: original.unwrap_or(max_position_embeddings),
            truncate: self.bool("truncate")?.unwrap_or(true),
            attention_factor: self.optional_float("attention_factor", 1e-3..=1e3)?,
            mscale: self.optional_float("mscale", 0.0..=1e3)?,
            mscale_all_dim: self.optional_float("mscale_all_dim", 0.0..=1e3)?,
        }))
    }
}

fn shown(value: &Value) -> String {
    json::clip(&value.to_string(), 60)
}

fn whole(range: &RangeInclusive<usize>) -> String {
    format!("a whole number from {} to {}", range.start(), range.end())
}

fn number(range: &RangeInclusive<f64>) -> String {
    format!("a number from {:?} to {:?}", range.start(), range.end())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    fn fixture(name: &str, file: &str) -> Vec<u8> {
        std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gpt_oss").join(name).join(file))
            .unwrap()
    }

    fn tiny() -> Value {
        serde_json::from_slice(&fixture("tiny", "config.json")).unwrap()
    }

    fn parse(value: &Value) -> Result<Config> {
        Config::from_json("config.json", value.to_string().as_bytes())
    }

    /// The tiny config with keys replaced, or removed where the value is null.
    fn with(changes: Value) -> Result<Config> {
        let mut value = tiny();
        for (key, change) in changes.as_object().unwrap() {
            if change.is_null() {
                value.as_object_mut().unwrap().remove(key);
            } else {
                value[key] = change.clone();
            }
        }
        parse(&value)
    }

    #[test]
    fn fixtures_have_the_values_of_their_files() {
        let odd = Config::from_json("config.json", &fixture("odd", "config.json")).unwrap();
        use LayerType::{Full, Sliding};
        assert_eq!(
            odd,
            Config {
                vocab_size: 503,
                hidden_size: 96,
                intermediate_size: 160,
                num_hidden_layers: 3,
                num_attention_heads: 6,
                num_key_value_heads: 2,
                head_dim: 64,
                num_local_experts: 7,
                num_experts_per_tok: 3,
                sliding_window: 13,
                layer_types: vec![Full, Sliding, Sliding],
                max_position_embeddings: 2048,
                rms_norm_eps: 1e-6,
                swiglu_limit: 5.0,
                swiglu_alpha: 1.702,
                rope: RopeConfig {
                    theta: 10000.0,
                    scaling: Some(Yarn { factor: 8.0, original_max_position_embeddings: 256, ..Yarn::released() }),
                },
                tie_word_embeddings: false,
                eos_token_id: vec![501],
                bos_token_id: None,
                pad_token_id: Some(502),
            }
        );
        parse(&tiny()).unwrap();
        Config::from_json("config.json", &fixture("loud", "config.json")).unwrap();
    }

    #[test]
    fn inverse_frequencies_are_the_goldens() {
        for name in ["tiny", "odd", "loud"] {
            let config = Config::from_json("config.json", &fixture(name, "config.json")).unwrap();
            let golden = fixture(name, "golden.safetensors");
            let golden = safetensors::SafeTensors::deserialize(&golden).unwrap();
            let (theirs, _) = golden.tensor("rope.inv_freq").unwrap().data().as_chunks::<4>();
            let ours = config.rope.inv_freq(config.head_dim);
            assert_eq!(ours.len(), theirs.len());
            for (i, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                let theirs = f32::from_le_bytes(*theirs);
                assert!(ours.to_bits().abs_diff(theirs.to_bits()) <= 1, "{name} {i}: {ours:e}, golden {theirs:e}");
            }
            let golden: Value = serde_json::from_slice(&fixture(name, "golden.json")).unwrap();
            let theirs = golden["rope_attention_scaling"].as_f64().unwrap();
            assert_eq!(config.rope.attention_factor(), theirs as f32);
        }
    }

    /// Numbers of the published 20b, worked out by hand from the formula in f64.
    #[test]
    fn released_frequencies() {
        let rope = RopeConfig { theta: 150000.0, scaling: Some(Yarn::released()) };
        let inv_freq = rope.inv_freq(64);
        for (i, expected) in [
            (0, 1.0),
            (8, 0.050_813_273),
            (9, 0.031_705_696),
            (12, 0.006_794_959_3),
            (17, 0.000_129_318_7),
            (18, 3.830_881e-5),
            (31, 3.023_511_5e-7),
        ] {
            assert!((inv_freq[i] / expected - 1.0).abs() < 1e-6, "{i}: {} {expected}", inv_freq[i]);
        }
        assert_eq!(rope.attention_factor(), 1.346_573_6);
        let rounded = RopeConfig { scaling: Some(Yarn { truncate: true, ..Yarn::released() }), ..rope };
        // Rounded outwards the ramp runs from 8 to 18: dimension 9 is a tenth of the way along it.
        let plain = 150000f64.powf(-18.0 / 64.0);
        let expected = plain * 0.9 + plain / 32.0 * 0.1;
        assert!((f64::from(rounded.inv_freq(64)[9]) / expected - 1.0).abs() < 1e-6);
    }

    #[test]
    fn both_spellings_of_rope_agree() {
        let yarn = tiny()["rope_scaling"].clone();
        let mut new = yarn.clone();
        new["rope_theta"] = json!(150000.0);
        let old_type = {
            let mut old = yarn.clone();
            let kind = old.as_object_mut().unwrap().remove("rope_type").unwrap();
            old["type"] = kind;
            old
        };
        let expected = parse(&tiny()).unwrap().rope;
        for changes in [
            json!({"rope_scaling": null, "rope_theta": null, "rope_parameters": new}),
            json!({"rope_scaling": null, "rope_parameters": new}),
            json!({"rope_parameters": new}),
            json!({"rope_scaling": old_type}),
            json!({"rope_scaling": null}),
        ] {
            assert_eq!(with(changes.clone()).unwrap().rope, expected, "{changes}");
        }
        let mut null = tiny();
        null["rope_scaling"] = Value::Null;
        assert_eq!(parse(&null).unwrap().rope, expected);

        for plain in [json!({"rope_type": "default"}), json!({})] {
            let rope = with(json!({"rope_scaling": plain})).unwrap().rope;
            assert_eq!(rope, RopeConfig { theta: 150000.0, scaling: None });
            assert_eq!(rope.attention_factor(), 1.0);
            assert_eq!(rope.inv_freq(4), [1.0, 1.0 / 150000f64.sqrt() as f32]);
        }
        new["factor"] = json!(16.0);
        let error = with(json!({"rope_parameters": new})).unwrap_err().to_string();
        assert!(error.contains("rope_parameters") && error.contains("contradicts"), "{error}");
        new["rope_theta"] = json!(10000);
        assert!(with(json!({"rope_parameters": new})).unwrap_err().to_string().contains("rope_theta"));
    }

    #[test]
    fn yarn_defaults_are_those_of_transformers() {
        let yarn = |scaling| with(json!({"rope_scaling": scaling})).unwrap().rope.scaling.unwrap();
        let defaults = yarn(json!({"rope_type": "yarn", "factor": 4}));
        assert_eq!(
            defaults,
            Yarn { factor: 4.0, truncate: true, original_max_position_embeddings: 131072, ..Yarn::released() }
        );
        assert_eq!(yarn(json!({"rope_type": "yarn", "original_max_position_embeddings": 4096})).factor, 32.0);
        let factor = |scaling| with(json!({"rope_scaling": scaling})).unwrap().rope.attention_factor();
        assert_eq!(factor(json!({"rope_type": "yarn", "factor": 4, "attention_factor": 1.25})), 1.25);
        let both = json!({"rope_type": "yarn", "factor": 4, "mscale": 0.5, "mscale_all_dim": 2.0});
        let ln4 = 4f64.ln();
        assert_eq!(factor(both), ((0.05 * ln4 + 1.0) / (0.2 * ln4 + 1.0)) as f32);
        assert_eq!(factor(json!({"rope_type": "yarn", "factor": 1, "mscale": 0.5})), 1.0);
    }

    #[test]
    fn optional_keys_and_aliases() {
        let config = with(json!({"layer_types": null, "swiglu_limit": null, "swiglu_alpha": 1.5, "hidden_act": null,
            "attention_bias": null, "tie_word_embeddings": true, "eos_token_id": [1, 2], "num_experts_per_tok": null}));
        let config = config.unwrap();
        use LayerType::{Full, Sliding};
        assert_eq!(config.layer_types, [Sliding, Full, Sliding, Full]);
        assert_eq!((config.swiglu_limit, config.swiglu_alpha), (7.0, 1.5));
        assert_eq!((config.eos_token_id, config.num_experts_per_tok), (vec![1, 2], 4));
        assert!(config.tie_word_embeddings);
        assert!(with(json!({"eos_token_id": null})).unwrap().eos_token_id.is_empty());
    }

    #[test]
    fn errors_name_the_key_the_value_and_the_range() {
        for (changes, words) in [
            (json!({"hidden_size": 100}), "config.json: hidden_size: found 100, should be a multiple of 32"),
            (json!({"head_dim": 260}), "head_dim: found 260, should be a whole number from 4 to 256"),
            (json!({"vocab_size": null}), "vocab_size: is missing, should be a whole number from 1 to 16777216"),
            (json!({"num_experts_per_tok": 5}), "num_experts_per_tok: 5, but experts_per_token is 4"),
            (json!({"num_local_experts": 3}), "experts_per_token: found 4, should be a whole number from 1 to 3"),
            (json!({"rms_norm_eps": 0}), "rms_norm_eps: found 0, should be a number from 1e-12 to 1.0"),
            (json!({"model_type": "llama"}), "\"llama\" is not supported; supported: gpt_oss"),
            (json!({"quantization_config": null}), "unquantised gpt-oss exports are not supported"),
            (json!({"quantization_config": {"quant_method": "fp8"}}), "quantization_config.quant_method: \"fp8\""),
            (json!({"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 4}), "is no multiple of 8"),
        ] {
            let error = with(changes.clone()).unwrap_err().to_string();
            assert!(error.contains(words), "{changes}: {error}");
        }
    }

    #[test]
    fn generation_config_falls_back_to_the_model() {
        let config = parse(&tiny()).unwrap();
        let read = |text: &str| GenerationConfig::from_json("generation_config.json", text.as_bytes(), &config);
        assert_eq!(read("{}").unwrap(), GenerationConfig::from_config(&config));
        assert_eq!(read("{}").unwrap().eos_token_id, [510]);
        let full = r#"{"do_sample": true, "eos_token_id": [2, 0, 8], "temperature": 0.7, "top_p": 0.9, "top_k": 50}"#;
        assert_eq!(
            read(full).unwrap(),
            GenerationConfig {
                eos_token_id: vec![2, 0, 8],
                do_sample: Some(true),
                temperature: Some(0.7),
                top_p: Some(0.9),
                top_k: Some(50)
            }
        );
        for bad in [r#"{"temperature": -1}"#, r#"{"top_p": 2}"#, r#"{"eos_token_id": [512]}"#, r#"{"top_k": -1}"#] {
            let error = read(bad).unwrap_err().to_string();
            assert!(error.starts_with("generation_config.json: "), "{error}");
        }
    }
}
