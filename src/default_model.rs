//! The models that are embedded in the binary, so that the first run needs no download.

use crate::checkpoint::Checkpoint;
use crate::error::Result;

#[cfg(feature = "default-model")]
macro_rules! files {
    ($dir:literal: $($name:literal),* $(,)?) => {
        &[$(($name, include_bytes!(concat!("../models/", $dir, "/", $name)).as_slice())),*]
    };
}

/// The default model, `models/fireside`.
#[cfg(feature = "default-model")]
pub fn main() -> Result<Checkpoint> {
    Checkpoint::embedded(
        "fireside",
        files!(
            "fireside":
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "model.safetensors.index.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ),
    )
}

/// The default model is not in this binary.
#[cfg(not(feature = "default-model"))]
pub fn main() -> Result<Checkpoint> {
    Err(crate::Error::option(
        "model",
        "this binary was built without the default model: name a checkpoint's directory, or build with the feature \
         `default-model`",
    ))
}
