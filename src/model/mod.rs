//! Models: what all families share, which is little: the embedding before the layers and the head behind them.
//!
//! A family is one file: its names on disk, its weights, and the forward pass of a layer, spelled out once.

mod gpt_oss;
mod llama;
mod load;
mod mlp;
mod needs;
mod qwen3;
mod qwen3_moe;
mod state;

pub use crate::error::size;
pub use load::{Found, InputScale};
pub use needs::{Needs, WeightKind};
pub use state::{Paged, Plan, State};

use crate::checkpoint::Checkpoint;
use crate::config::{Config, Family, LayerType};
use crate::device::{Buffer, Device};
use crate::error::Result;
use crate::ops::{Addend, Attention, Draws, KvCache, Projection, RmsNorm, Weight};
use crate::program::{Program, Role, Slice};
use load::{Inputs, Loader};
use needs::Rehearsed;
use std::fmt::Debug;
use std::sync::Arc;

/// Bytes of weights that have reached the device, of how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Uploaded so far.
    pub done_bytes: u64,
    /// To upload in all.
    pub total_bytes: u64,
}

/// A family's weights, and how it records a layer.
trait Layers: Debug + Send + Sync {
    /// Record layer `idx`: from the residual stream `s.x`, to which the layer before still has to add `addend`, to what
    /// this one adds, if it has not done so itself.
    fn block(&self, p: &mut Program, idx: usize, s: &State, addend: Option<Addend>) -> Option<Addend>;
}

/// A model's weights on a device. Shared by all sessions, never written after loading.
#[derive(Debug)]
pub struct Model {
    config: Config,
    embed: Weight,
    layers: Box<dyn Layers>,
    final_norm: Slice,
    /// `None`: the embedding table serves as the head.
    lm_head: Option<Projection>,
    /// cos and sin of every position that the context holds, `[C, Dh/2]` pairs.
    rope_table: Slice,
    found: Found,
    needs: Needs,
    _buffers: Vec<Buffer>,
}

impl Model {
    /// Check every tensor of a checkpoint, take the memory for all of it, then put it on the device.
    pub fn load(
        checkpoint: &Checkpoint,
        config: Config,
        device: &Arc<dyn Device>,
        plan: &Plan,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self> {
        let rehearsed = Rehearsed::new(checkpoint, &config, plan, device.limits(), device.describe())?;
        tracing::info!("{} on {}: {}", checkpoint.name(), device.describe(), rehearsed.needs);
        let reserved = rehearsed.reserve(device)?;
        let model = Self::from_loader(&mut Loader::new(checkpoint, &config, &reserved, plan, progress))?;
        device.wait()?;
        Ok(Self { needs: rehearsed.needs, ..model })
    }

    fn from_loader(up: &mut Loader<'_>) -> Result<Self> {
        let config = up.config.clone();
        let (d, vocab) = (config.hidden_size as u32, config.vocab_size as u32);
        let embed = up.table("model.embed_tokens.weight", [vocab, d])?;
        let layers: Box<dyn Layers> = match config.family {
            Family::GptOss => Box::new(gpt_oss::GptOss::load(up)?),
            Family::Qwen3Moe => Box::new(qwen3_moe::Qwen3Moe::load(up)?),
            Family::Qwen3 => Box::new(qwen3::Qwen3::load(up)?),
            Family::Llama => Box::new(llama::Llama::load(up)?),
        };
        let lm_head = match !config.tie_word_embeddings || up.has("lm_head.weight") || up.has("lm_head.weight_packed") {
            true => Some(up.projection(&[("lm_head".to_owned(), vocab)], d, Inputs::Exact)?),
            false => None,
        };
        let final_norm = up.vector("model.norm.weight", config.hidden_size)?;
        let rope_table = up.rope_table()?;
        let (found, _buffers) = up.take();
        let needs = Needs::default();
        Ok(Self { embed, layers, final_norm, lm_head, rope_table, found, needs, _buffers, config })
    }

    /// Buffers for one conversation.
    pub fn state(&self, device: &Arc<dyn Device>, plan: &Plan) -> Result<State> {
        State::new(device, &self.config, plan, self.rope_table)
    }

    /// The checkpoint's configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What the loader found in the checkpoint besides weights.
    pub fn found(&self) -> &Found {
        &self.found
    }

    /// What the model and a conversation take of the device's memory.
    pub fn needs(&self) -> &Needs {
        &self.needs
    }

    /// The step over `tokens` rows: embedding and all layers. Reads `rows` and `step` of the state. `in_parts`: with a
    /// launch for every stage, to look between those that are fused; the bits are the same.
    pub fn body(&self, tokens: u32, role: Role, in_parts: bool, s: &State) -> Program {
        let mut p = Program::new(tokens, s.host).of(role).in_parts(in_parts).with_matrix(s.matrix);
        p.embed(&self.embed, s.rows, s.x);
        p.stage(|| "embed".to_owned(), s.x, self.config.hidden_size);
        if let Some(addend) = self.layers(&mut p, s) {
            s.add(&mut p, norm(&self.config), addend, self.config.num_hidden_layers - 1);
        }
        p
    }

    fn layers(&self, p: &mut Program, s: &State) -> Option<Addend> {
        let layers = 0..self.config.num_hidden_layers;
        layers.fold(None, |addend, idx| self.layers.block(p, idx, s, addend))
    }

    /// The step over `tokens` generated rows that see `reach` positions at most, the logits of all of them, and a token
    /// drawn from each, which becomes the row of the next step. Reads `rows`, `step` and `rules` of the state.
    pub fn decode(&self, tokens: u32, reach: u32, in_parts: bool, draws: Draws, s: &State) -> Program {
        let mut p = Program::new(tokens, s.host).of(Role::Generated { reach }).in_parts(in_parts);
        let norm = norm(&self.config);
        p.embed(&self.embed, s.rows, s.x);
        p.stage(|| "embed".to_owned(), s.x, self.config.hidden_size);
        match self.layers(&mut p, s) {
            Some(addend) => {
                let last = self.config.num_hidden_layers - 1;
                s.end_layer(&mut p, norm, addend, self.final_norm, last);
            }
            None => p.rms_norm(norm, s.x, self.final_norm, s.h),
        }
        p.stage(|| "final_norm".to_owned(), s.h, self.config.hidden_size);
        match &self.lm_head {
            None => p.linear(s.step, &self.embed, None, s.h, s.logits),
            Some(head) => p.projection(s.step, head, s.h, s.logits),
        }
        p.stage(|| "logits".to_owned(), s.logits, self.config.vocab_size);
        p.draw(self.config.vocab_size as u32, draws, &s.drawing, s.drawn);
        p
    }

    /// A token drawn from each of the `picks` logits of the last step, which becomes a row of the next step. Reads `rows`: where
    /// the tokens before stand.
    pub fn draw(&self, picks: u32, draws: Draws, s: &State) -> Program {
        let mut p = Program::new(picks, s.host);
        p.draw(self.config.vocab_size as u32, draws, &s.drawing, s.drawn);
        p
    }

    /// Logits of `picks` rows of the last step. Reads `picks` and `head_step` of the state.
    pub fn head(&self, picks: u32, s: &State) -> Program {
        let mut p = Program::new(picks, s.host);
        let norm = norm(&self.config);
        p.take(norm.d, s.picks, s.x, s.last);
        p.rms_norm(norm, s.last, self.final_norm, s.last_norm);
        p.stage(|| "final_norm".to_owned(), s.last_norm, self.config.hidden_size);
        match &self.lm_head {
            None => p.linear(s.head_step, &self.embed, None, s.last_norm, s.logits),
            Some(head) => p.projection(s.head_step, head, s.last_norm, s.logits),
        }
        p.stage(|| "logits".to_owned(), s.logits, self.config.vocab_size);
        p
    }
}

fn norm(c: &Config) -> RmsNorm {
    RmsNorm { d: c.hidden_size as u32, eps: c.rms_norm_eps }
}

/// Query heads, key/value heads, head size.
fn heads(c: &Config) -> [u32; 3] {
    [c.num_attention_heads, c.num_key_value_heads, c.head_dim].map(|n| n as u32)
}

/// Keys that a query of a layer sees; 0: all.
fn window(c: &Config, idx: usize) -> u32 {
    if c.layer_types[idx] == LayerType::Sliding { c.sliding_window as u32 } else { 0 }
}

fn attention(c: &Config, idx: usize, kv: &[KvCache]) -> Attention {
    let [h, hk, dh] = heads(c);
    let KvCache { page, pages, format, .. } = kv[0];
    let (held, window) = ([0, hk], window(c, idx));
    Attention { h, hk, dh, held, window, page, pages, format, segments: 0, first: 0, rows: 0 }
}
