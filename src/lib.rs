//! Fourfold runs FP4 language models, with experts or dense, in WGSL compute shaders through wgpu, in pure Rust.
//!
//! ```no_run
//! use fourfold::{Engine, ReplyOptions};
//!
//! let engine = Engine::builder().build()?; // the embedded model, on the best device
//! let mut session = engine.session()?;
//! let prompt = engine.text_tokens("Once upon a time")?;
//! for token in session.reply(&prompt, &ReplyOptions { max_tokens: Some(40), ..Default::default() })? {
//!     print!("{}", token?.text);
//! }
//! # Ok::<(), fourfold::Error>(())
//! ```
//!
//! An [`Engine`] holds a model's weights on a device; a [`Session`] holds one conversation; a [`Scheduler`] steps many
//! sessions together. All are `Send`, and nothing is global: several engines live in one process without seeing each other. Families are gpt_oss, qwen3_moe, qwen3 and
//! llama; linears are bf16, FP8, MXFP4 or NVFP4, each as its checkpoint has it, and [`Activations`] says whether NVFP4
//! weights meet f32 rows (W4A16) or quantised ones (W4A4).
//!
//! A session draws faster where [`speculate`] drafts for it, and the same to the bit.
//!
//! Around the engine: [`quantize`] makes FP4 checkpoints, [`eval`] measures what they cost, [`trace`] finds where two runs
//! part, [`oracle`] checks a device by known answers, [`verify`] that bits depend on nothing that they should not,
//! [`isolation`] that models do not see each other, [`bench`] and [`synth`] measure speed. ARCHITECTURE.md says how it works
//! inside.

pub mod bench;
mod chat;
pub mod checkpoint;
pub mod config;
mod decode;
mod default_model;
pub mod device;
mod engine;
mod error;
pub mod eval;
pub mod format;
pub mod isolation;
mod kv;
// The engine's inside, open for tests and tools and no promise: a program that is not recorded by a model can index past
// its slices, which the GPU does not check unless asked to (`Options::checked_shaders`).
#[doc(hidden)]
pub mod model;
#[doc(hidden)]
pub mod ops;
pub mod oracle;
mod parallel;
#[doc(hidden)]
pub mod program;
pub mod quantize;
mod reply;
pub mod sampler;
mod schedule;
#[doc(hidden)]
pub mod shader;
pub mod speculate;
pub mod synth;
pub mod tokenizer;
pub mod trace;
pub mod verify;

pub use chat::{Answer, Chat, Piece};
pub use default_model::{draft as default_draft_checkpoint, main as default_checkpoint};
pub use device::gpu::Gpu;
pub use engine::{
    Cancel, DEFAULT_CHUNK, DEFAULT_CONTEXT, DeviceChoice, Edit, Engine, EngineBuilder, MATRIX_CHUNK, See, Session,
    Want, Watch,
};
pub use error::{Error, Result};
pub use kv::Pages;
pub use model::{Found, InputScale, Needs, Progress, WeightKind};
pub use ops::{Activations, CacheFormat};
pub use program::HostStages;
pub use reply::{Finish, Reply, ReplyOptions, Stats, Token};
pub use sampler::Sampling;
#[doc(hidden)]
pub use schedule::hash;
pub use schedule::{Part, Request, Scheduler, SchedulerOptions};
pub use speculate::Speculation;
/// The wgpu that [`Gpu::from_wgpu`] takes devices of.
pub use wgpu;
