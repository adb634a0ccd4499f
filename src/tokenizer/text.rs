//! What a checkpoint's files say about text: tokenizer, chat format, recommended sampling. Checked when it is opened.

use super::{ChatFormat, ChatTemplate, Harmony, Tokenizer};
use crate::checkpoint::Checkpoint;
use crate::config::{Config, GenerationConfig};
use crate::error::{Error, Result};

/// The parts of a checkpoint that turn text into tokens and back.
#[derive(Debug)]
pub struct Text {
    /// `None`: the checkpoint takes and gives token ids only.
    pub tokenizer: Option<Tokenizer>,
    /// `None`: it cannot chat.
    pub chat: Option<ChatFormat>,
    /// Where it stops, and how it likes to be sampled.
    pub generation: GenerationConfig,
}

impl Text {
    /// Reads `tokenizer.json`, `chat_template.jinja`, `tokenizer_config.json` and `generation_config.json`, as far as
    /// they are there.
    pub fn load(checkpoint: &Checkpoint, config: &Config) -> Result<Self> {
        let generation = match checkpoint.file("generation_config.json") {
            Some(json) => GenerationConfig::from_json(&checkpoint.path("generation_config.json"), json, config)?,
            None => GenerationConfig::from_config(config),
        };
        let path = checkpoint.path("tokenizer.json");
        let tokenizer = checkpoint.file("tokenizer.json").map(|json| Tokenizer::from_bytes(&path, json)).transpose()?;
        if let Some(tokenizer) = &tokenizer {
            let (largest, rows) = (tokenizer.max_id(), config.vocab_size);
            if largest as usize >= rows {
                let reason =
                    format!("has a token {largest}, but the model has only {rows} (vocab_size in config.json)");
                return Err(Error::file(path, reason));
            }
        }
        let chat = match (checkpoint.file("chat_template.jinja"), &tokenizer) {
            (Some(source), _) => {
                let path = checkpoint.path("chat_template.jinja");
                let source =
                    std::str::from_utf8(source).map_err(|e| Error::file(&path, format!("is not UTF-8: {e}")))?;
                let [bos, eos] = special_tokens(checkpoint);
                Some(ChatFormat::Template(ChatTemplate::new(&path, source)?.with_tokens(&bos, &eos)))
            }
            // gpt-oss without its template is still gpt-oss.
            (None, Some(tokenizer)) => Harmony::new(tokenizer).ok().map(ChatFormat::Harmony),
            (None, None) => None,
        };
        Ok(Self { tokenizer, chat, generation })
    }
}

/// `bos_token` and `eos_token` of tokenizer_config.json: each a string, or an object with its text in `content`.
fn special_tokens(checkpoint: &Checkpoint) -> [String; 2] {
    let json = checkpoint.file("tokenizer_config.json").unwrap_or_default();
    let config: serde_json::Value = serde_json::from_slice(json).unwrap_or_default();
    ["bos_token", "eos_token"].map(|key| {
        let token = &config[key];
        token.as_str().or_else(|| token["content"].as_str()).unwrap_or_default().to_owned()
    })
}
