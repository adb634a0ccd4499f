//! The models that are embedded in the binary, so that the first run needs no download.

use crate::checkpoint::Checkpoint;
use crate::error::Result;

#[cfg(feature = "default-model")]
macro_rules! files {
    ($($dir:literal / $name:literal),* $(,)?) => {
        &[$(($name, include_bytes!(concat!("../models/", $dir, "/", $name)).as_slice())),*]
    };
}

/// The default model, `models/fireside`. An error in a binary built without the feature `default-model`.
#[cfg(feature = "default-model")]
pub fn main() -> Result<Checkpoint> {
    Checkpoint::embedded(
        "fireside",
        files!(
            "fireside" / "config.json",
            "fireside" / "generation_config.json",
            "fireside" / "tokenizer.json",
            "fireside" / "tokenizer_config.json",
            "fireside" / "chat_template.jinja",
            "fireside" / "model.safetensors.index.json",
            "fireside" / "model-00001-of-00002.safetensors",
            "fireside" / "model-00002-of-00002.safetensors",
        ),
    )
}

/// The default model's small draft, `models/fireside-draft`; the tokenizer is the default model's.
#[cfg(feature = "default-model")]
pub fn draft() -> Result<Checkpoint> {
    Checkpoint::embedded(
        "fireside-draft",
        files!(
            "fireside-draft" / "config.json",
            "fireside-draft" / "generation_config.json",
            "fireside" / "tokenizer.json",
            "fireside" / "tokenizer_config.json",
            "fireside" / "chat_template.jinja",
            "fireside-draft" / "model.safetensors",
        ),
    )
}

#[cfg(not(feature = "default-model"))]
fn missing() -> Result<Checkpoint> {
    Err(crate::Error::option(
        "model",
        "this binary was built without the default model: name a checkpoint's directory, or build with the feature \
         `default-model`",
    ))
}

/// The default model, `models/fireside`. An error: this binary was built without the feature `default-model`.
#[cfg(not(feature = "default-model"))]
pub fn main() -> Result<Checkpoint> {
    missing()
}

/// The default model's draft. An error: this binary was built without the feature `default-model`.
#[cfg(not(feature = "default-model"))]
pub fn draft() -> Result<Checkpoint> {
    missing()
}
