//! The library's one error: every variant says what is wrong, where, and what to do about it.

use std::path::PathBuf;

/// Everything that can go wrong in the library. The text names the file, tensor, option or adapter at fault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file that could not be read or written.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file is there but is not what it should be: truncated, not JSON, lying offsets, a missing shard.
    #[error("{file}: {reason}")]
    File {
        /// The file, as the user would find it.
        file: String,
        /// What is wrong with it and what would be right.
        reason: String,
    },
    /// A tensor is missing, unexpected, or has the wrong dtype, shape or content.
    #[error("{file}: tensor {tensor}: {reason}")]
    Tensor {
        /// The file that holds (or should hold) the tensor.
        file: String,
        /// The tensor's name on disk.
        tensor: String,
        /// What is wrong, with both shapes or dtypes where they differ.
        reason: String,
    },
    /// An option or argument that cannot work.
    #[error("{option}: {reason}")]
    Option {
        /// The option as the user set it (`context`, `temperature`, ...).
        option: &'static str,
        /// Why it cannot work, and the range that does.
        reason: String,
    },
    /// A chat template or tokenizer could not process a text.
    #[error("{what}: {reason}")]
    Text {
        /// The template or tokenizer at fault.
        what: String,
        /// What it said.
        reason: String,
    },
    /// No usable adapter, or the adapter lacks what a kernel needs.
    #[error("{0}")]
    Device(String),
    /// An allocation that the device or host cannot serve.
    #[error("out of memory: {what} needs {bytes} bytes: {hint}")]
    OutOfMemory {
        /// What was being allocated.
        what: String,
        /// Its size.
        bytes: u64,
        /// What to do about it.
        hint: &'static str,
    },
    /// A model, and a conversation with it, do not fit into the device's memory. Found before anything was uploaded, and
    /// what was taken is given back.
    #[error(
        "out of memory: the model takes {} on {device} and a conversation {} more, but only {} could be had: {}",
        size(*model_bytes), size(*session_bytes), size(*allocated_bytes),
        remedy(*model_bytes, *allocated_bytes)
    )]
    DoesNotFit {
        /// Adapter and backend.
        device: String,
        /// Bytes of the weights, and of tables beside them.
        model_bytes: u64,
        /// Bytes of a conversation: its KV cache and activations.
        session_bytes: u64,
        /// Bytes that could be allocated before the device refused.
        allocated_bytes: u64,
    },
    /// The device was lost (driver reset, unplugged, watchdog); the engine must be built again.
    #[error("the device was lost: {0}; build the engine again")]
    DeviceLost(String),
    /// The conversation does not fit the context.
    #[error(
        "the context holds {context} tokens; {tokens} are needed: shorten the text or raise the context (the model allows {limit})"
    )]
    ContextFull {
        /// Tokens that the session can hold.
        context: usize,
        /// Tokens that were asked for.
        tokens: usize,
        /// The largest context that the model allows.
        limit: usize,
    },
}

/// What to do where a device has room for `allocated` bytes: not even for the model, or for no conversation beside it.
fn remedy(model: u64, allocated: u64) -> &'static str {
    if allocated < model {
        "choose a smaller model, another adapter (--adapter; `fourfold devices` lists them), or --device cpu"
    } else {
        "choose a smaller --context, --kv bf16, a smaller --chunk, or another --adapter"
    }
}

/// Bytes for people: `20.2 MiB`.
pub fn size(n: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let step = (n.max(1).ilog2() / 10).min(4);
    if step == 0 {
        format!("{n} bytes")
    } else {
        format!("{:.1} {}", n as f64 / f64::from(step * 10).exp2(), units[step as usize])
    }
}

/// The library's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn file(file: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::File { file: file.into(), reason: reason.into() }
    }

    pub(crate) fn tensor(file: impl Into<String>, tensor: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Tensor { file: file.into(), tensor: tensor.into(), reason: reason.into() }
    }

    pub(crate) fn option(option: &'static str, reason: impl Into<String>) -> Self {
        Self::Option { option, reason: reason.into() }
    }
}
