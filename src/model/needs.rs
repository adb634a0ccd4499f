//! What a model takes of a device's memory, known before any of it is uploaded: the loader's own rules, followed on a
//! device that keeps books instead of bytes.

use super::load::Loader;
use super::{Found, Model, Plan};
use crate::checkpoint::Checkpoint;
use crate::config::Config;
use crate::device::rehearsal::Rehearsal;
use crate::device::reserved::Reserved;
use crate::device::{Device, Limits};
use crate::error::{Error, Result, size};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// What a weight is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum WeightKind {
    /// The table of the tokens' rows.
    Embedding,
    /// Projections, biases and sinks of attention.
    Attention,
    /// What chooses experts.
    Router,
    /// The experts.
    Experts,
    /// Dense MLPs.
    Mlp,
    /// Gains of norms, wherever they are.
    Norms,
    /// The output matrix.
    Head,
    /// What no family has.
    Unknown,
}

impl WeightKind {
    /// By the name of a tensor or of a module.
    pub fn of(name: &str) -> Self {
        let kinds = [
            ("norm.weight", Self::Norms),
            (".self_attn.", Self::Attention),
            (".mlp.router.", Self::Router),
            (".mlp.gate.", Self::Router),
            (".mlp.experts.", Self::Experts),
            (".mlp.", Self::Mlp),
            ("embed_tokens.", Self::Embedding),
            ("lm_head.", Self::Head),
        ];
        kinds.iter().find(|(part, _)| name.contains(part)).map_or(Self::Unknown, |(_, kind)| *kind)
    }

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Attention => "attention",
            Self::Router => "routers",
            Self::Experts => "experts",
            Self::Mlp => "dense MLPs",
            Self::Norms => "norms",
            Self::Head => "head",
            Self::Unknown => "unknown",
        }
    }
}

/// Bytes that a model and one conversation take on a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Weights, by what they are for.
    pub weights: BTreeMap<WeightKind, u64>,
    /// Tables that are made while loading.
    pub tables: u64,
    /// The KV cache of a conversation.
    pub cache: u64,
    /// The other buffers of a conversation.
    pub activations: u64,
    /// By the name of a matrix: how many buffers hold it.
    pub parts: BTreeMap<String, usize>,
}

impl Needs {
    /// The needs of a checkpoint on a device with these limits, and what else was found in it. Everything is checked,
    /// nothing uploaded.
    ///
    /// # Errors
    /// What the engine would refuse.
    pub fn of(checkpoint: &Checkpoint, config: &Config, plan: &Plan, limits: Limits) -> Result<(Self, Found)> {
        let rehearsed = Rehearsed::new(checkpoint, config, plan, limits, "the adapter".to_owned())?;
        Ok((rehearsed.needs, rehearsed.found))
    }

    /// Bytes of all weights.
    pub fn weight_bytes(&self) -> u64 {
        self.weights.values().sum()
    }

    /// Bytes that stay on the device as long as the engine.
    pub fn model_bytes(&self) -> u64 {
        self.weight_bytes() + self.tables
    }

    /// Bytes of one conversation.
    pub fn session_bytes(&self) -> u64 {
        self.cache + self.activations
    }

    fn new(model: &[(String, u64)], session: &[(String, u64)]) -> Self {
        let mut needs = Self::default();
        for (label, bytes) in model {
            if label == "rope table" {
                needs.tables += bytes;
                continue;
            }
            // A label is the name of a module or tensor, and what of it.
            let (name, what) = label.split_once(' ').unwrap_or((label, ""));
            *needs.weights.entry(WeightKind::of(&format!("{name}."))).or_default() += bytes;
            if what == "codes" {
                *needs.parts.entry(name.to_owned()).or_default() += 1;
            }
        }
        for (label, bytes) in session {
            *(if label.starts_with("KV cache") { &mut needs.cache } else { &mut needs.activations }) += bytes;
        }
        needs
    }
}

/// One line: weights by kind, the largest first, and what a conversation takes.
impl fmt::Display for Needs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut kinds: Vec<_> = self.weights.iter().map(|(kind, bytes)| (kind.name(), *bytes)).collect();
        kinds.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        let kinds: Vec<String> = kinds.iter().map(|(name, bytes)| format!("{name} {}", size(*bytes))).collect();
        write!(f, "weights {} ({})", size(self.weight_bytes()), kinds.join(", "))?;
        write!(f, ", tables {}; a conversation {}", size(self.tables), size(self.session_bytes()))?;
        write!(f, " (KV cache {}, activations {})", size(self.cache), size(self.activations))
    }
}

/// A model as it was loaded on a device without memory.
pub(super) struct Rehearsed {
    pub(super) needs: Needs,
    pub(super) found: Found,
    /// The buffers of the model and of a conversation, as label and bytes, in their order.
    model: Vec<(String, u64)>,
    session: Vec<(String, u64)>,
}

impl Rehearsed {
    /// Checks all of a checkpoint.
    pub(super) fn new(
        checkpoint: &Checkpoint,
        config: &Config,
        plan: &Plan,
        limits: Limits,
        describe: String,
    ) -> Result<Self> {
        let books = Arc::new(Rehearsal::new(limits, describe));
        let device: Arc<dyn Device> = books.clone();
        let mut silent = |_| ();
        let mut loader = Loader::new(checkpoint, config, &device, plan, &mut silent).rehearsing();
        let rehearsed = Model::from_loader(&mut loader)?;
        loader.check_whole(&rehearsed.found)?;
        let model = books.take();
        let _state = rehearsed.state(&device, plan)?;
        let session = books.take();
        let needs = Needs::new(&model, &session);
        Ok(Self { needs, found: rehearsed.found, model, session })
    }

    /// Allocates all that the model takes, and makes sure that there is room for a conversation as well.
    ///
    /// # Errors
    /// If there is not: with what is needed, and how much there was.
    pub(super) fn reserve(&self, device: &Arc<dyn Device>) -> Result<Arc<dyn Device>> {
        let too_much = |(e, done): (Error, u64)| match e {
            Error::OutOfMemory { .. } => Error::DoesNotFit {
                device: device.describe(),
                model_bytes: self.needs.model_bytes(),
                session_bytes: self.needs.session_bytes(),
                allocated_bytes: done,
            },
            other => other,
        };
        let model = Reserved::new(device, &self.model).map_err(too_much)?;
        let done = self.needs.model_bytes();
        // Taken and given back: a conversation begins later.
        Reserved::new(device, &self.session).map_err(|(e, more)| too_much((e, done + more)))?;
        Ok(Arc::new(model))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_show_their_kind() {
        let names = [
            ("model.layers.17.mlp.experts.down_proj_blocks", "experts"),
            ("model.layers.1.mlp.router.bias", "routers"),
            ("model.layers.1.mlp.gate.weight", "routers"),
            ("model.layers.1.mlp.gate_proj.weight", "dense MLPs"),
            ("model.layers.1.self_attn.q_norm.weight", "norms"),
            ("model.norm.weight", "norms"),
            ("lm_head.weight", "head"),
            ("rotary", "unknown"),
        ];
        for (name, kind) in names {
            assert_eq!(WeightKind::of(name).name(), kind, "{name}");
        }
    }

    #[test]
    fn labels_are_counted_by_kind() {
        let label = |label: &str, bytes| (label.to_owned(), bytes);
        let model = [
            label("model.embed_tokens.weight codes", 1 << 30),
            label("model.layers.0.mlp.router codes", 10),
            label("model.layers.0.mlp.experts.gate_up_proj codes", 200),
            label("model.layers.0.mlp.experts.gate_up_proj codes", 100),
            label("model.layers.0.mlp.experts.gate_up_proj_bias", 5),
            label("model.layers.0.mlp.experts.0.up_proj input scale", 4),
            label("lm_head codes", 7),
            label("rope table", 64),
        ];
        let session = [label("KV cache, keys of layer 0", 11), label("x", 13)];
        let needs = Needs::new(&model, &session);
        let of = |kind| needs.weights.get(&kind).copied();
        assert_eq!(
            [of(WeightKind::Experts), of(WeightKind::Router), of(WeightKind::Head), of(WeightKind::Mlp)],
            [Some(309), Some(10), Some(7), None]
        );
        assert_eq!([needs.tables, needs.cache, needs.activations], [64, 11, 13]);
        assert_eq!(needs.parts["model.layers.0.mlp.experts.gate_up_proj"], 2);
        let line = needs.to_string();
        assert!(line.starts_with("weights 1.0 GiB (embedding 1.0 GiB, experts 309 bytes, "), "{line}");
        assert!(line.ends_with("a conversation 24 bytes (KV cache 11 bytes, activations 13 bytes)"), "{line}");
    }
}
