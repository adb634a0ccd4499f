//! `generation_config.json` → [`GenerationConfig`]: what the makers of a model recommend.

use super::keys::Keys;
use super::{Config, MAX_TOKENS};
use crate::checkpoint::json;
use crate::error::Result;

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
    /// Sampling of tokens that are at least so likely beside the likeliest, 0 to 1; 0 means off.
    pub min_p: Option<f32>,
    /// What the logits of tokens that occurred are divided by, above 0; 1 means off.
    pub repetition_penalty: Option<f32>,
}

impl GenerationConfig {
    /// Reads the bytes of a `generation_config.json`, called `file` in messages.
    pub fn from_json(file: &str, bytes: &[u8], config: &Config) -> Result<Self> {
        let map = json::object(file, bytes)?;
        let keys = Keys::new(file, &map);
        Ok(Self {
            eos_token_id: keys
                .tokens("eos_token_id", config.vocab_size)?
                .unwrap_or_else(|| config.eos_token_id.clone()),
            do_sample: keys.bool("do_sample")?,
            temperature: keys.optional_float("temperature", 0.0..=100.0)?.map(|t| t as f32),
            top_p: keys.optional_float("top_p", 1e-6..=1.0)?.map(|p| p as f32),
            top_k: keys.optional_int("top_k", 0..=MAX_TOKENS)?,
            min_p: keys.optional_float("min_p", 0.0..=1.0)?.map(|p| p as f32),
            repetition_penalty: keys.optional_float("repetition_penalty", 1e-6..=100.0)?.map(|p| p as f32),
        })
    }

    /// What holds where there is no `generation_config.json`.
    pub fn from_config(config: &Config) -> Self {
        Self { eos_token_id: config.eos_token_id.clone(), ..Self::default() }
    }
}
