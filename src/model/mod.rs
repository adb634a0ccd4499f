//! Model families. Each is one file: names on disk, weights, state, and the forward pass spelled out once.

mod gpt_oss;

pub use gpt_oss::{GptOss, Plan, State};

/// Bytes of weights that have reached the device, of how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Uploaded so far.
    pub done_bytes: u64,
    /// To upload in all.
    pub total_bytes: u64,
}
