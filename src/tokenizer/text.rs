//! What a checkpoint's files say about text: tokenizer, chat format, recommended sampling. Checked when it is opened.

use super::{ChatFormat, ChatTemplate, Harmony, TokenId, Tokenizer};
use crate::checkpoint::{Checkpoint, json};
use crate::config::{Config, GenerationConfig};
use crate::error::{Error, Result};

/// The parts of a checkpoint that turn text into tokens and back.
#[derive(Debug)]
pub struct Text {
    /// `None`: the checkpoint takes and gives token ids only.
    pub tokenizer: Option<Tokenizer>,
    /// The token that begins every text ([`leading_token`]), if one does; or why it cannot be told, which a chat need not know.
    pub lead: std::result::Result<Option<TokenId>, String>,
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
        let lead = tokenizer.as_ref().map_or(Ok(None), |tokenizer| leading_token(checkpoint, tokenizer));
        let lead = lead.map_err(|e| e.to_string());
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
        Ok(Self { tokenizer, lead, chat, generation })
    }
}

/// The token that a tokenizer puts before every text: what `post_processor` in `tokenizer.json` begins a single text with,
/// else `bos_token` where `tokenizer_config.json` says `add_bos_token`. [`Tokenizer::encode_with_specials`] leaves it out,
/// since templates write it themselves.
pub fn leading_token(checkpoint: &Checkpoint, tokenizer: &Tokenizer) -> Result<Option<TokenId>> {
    #[derive(serde::Deserialize)]
    struct Tail {
        #[serde(default)]
        post_processor: serde_json::Value,
    }
    if let Some(bytes) = checkpoint.file("tokenizer.json") {
        let path = checkpoint.path("tokenizer.json");
        let tail: Tail = serde_json::from_slice(bytes)
            .map_err(|e| Error::file(path, format!("is not valid JSON: {}", json::clip(&e.to_string(), 200))))?;
        if let Some(id) = template_start(&tail.post_processor) {
            return Ok(Some(id));
        }
    }
    let Some(bytes) = checkpoint.file("tokenizer_config.json") else { return Ok(None) };
    let path = checkpoint.path("tokenizer_config.json");
    let config = json::object(&path, bytes)?;
    if config.get("add_bos_token") != Some(&serde_json::Value::Bool(true)) {
        return Ok(None);
    }
    let named = match config.get("bos_token") {
        Some(serde_json::Value::String(token)) => Some(token.as_str()),
        Some(token) => token.get("content").and_then(serde_json::Value::as_str),
        None => None,
    };
    let fault = |reason: &str| Error::file(&path, format!("says add_bos_token, {reason}"));
    let named = named.ok_or_else(|| fault("but no bos_token"))?;
    tokenizer.token_id(named).map(Some).ok_or_else(|| fault("but its bos_token is not in the vocabulary"))
}

/// The special token that a template processor, alone or in a sequence, begins a single text with.
fn template_start(processor: &serde_json::Value) -> Option<TokenId> {
    if let Some(list) = processor.get("processors").and_then(serde_json::Value::as_array) {
        return list.iter().find_map(template_start);
    }
    let first = processor.get("single")?.get(0)?.get("SpecialToken")?.get("id")?.as_str()?;
    let ids = processor.get("special_tokens")?.get(first)?.get("ids")?;
    TokenId::try_from(ids.get(0)?.as_u64()?).ok()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_say_what_comes_first() {
        let json = r#"{"type": "Sequence", "processors": [{"type": "ByteLevel"}, {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [7], "tokens": ["<s>"]}}}]}"#;
        assert_eq!(template_start(&serde_json::from_str(json).unwrap()), Some(7));
        let after = json.replace(r#"[{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"#, r#"[{"#);
        assert_eq!(template_start(&serde_json::from_str(&after).unwrap()), None);
        assert_eq!(template_start(&serde_json::Value::Null), None);
    }
}
