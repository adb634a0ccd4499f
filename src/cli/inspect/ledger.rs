//! What a model allocates, found by loading it on a device that keeps books instead of bytes: the loader's own rules,
//! not a second copy of them.

use fourfold::Result;
use fourfold::checkpoint::Checkpoint;
use fourfold::config::Config;
use fourfold::device::gpu::AdapterFacts;
use fourfold::device::rehearsal::Rehearsal;
use fourfold::device::{Device, Limits};
use fourfold::model::{Found, Model, Plan};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes by purpose, and the parts that matrices were split into.
pub(super) struct Ledger {
    pub(super) weights: u64,
    pub(super) cache: u64,
    /// Activations and tables.
    pub(super) rest: u64,
    /// By the label of the weight: how many buffers hold it.
    parts: BTreeMap<String, usize>,
    /// What there is besides weights.
    pub(super) found: Found,
}

impl Ledger {
    /// The books of a model and one conversation on a device with these limits.
    pub(super) fn fill(checkpoint: &Checkpoint, config: &Config, plan: &Plan, limits: Limits) -> Result<Self> {
        let books = Arc::new(Rehearsal::new(limits, "the adapter".to_owned()));
        let device: Arc<dyn Device> = books.clone();
        let model = Model::load(checkpoint, config.clone(), &device, plan, &mut |_| ())?;
        let loaded = books.take();
        let _state = model.state(&device, plan)?;
        let mut ledger = Self { weights: 0, cache: 0, rest: 0, parts: BTreeMap::new(), found: model.found().clone() };
        for (label, bytes) in loaded {
            if label == "rope table" {
                ledger.rest += bytes;
            } else {
                ledger.weights += bytes;
                if let Some(name) = label.strip_suffix(" codes") {
                    *ledger.parts.entry(name.to_owned()).or_default() += 1;
                }
            }
        }
        for (label, bytes) in books.take() {
            *(if label.starts_with("KV cache") { &mut ledger.cache } else { &mut ledger.rest }) += bytes;
        }
        Ok(ledger)
    }

    /// Which weights are split, in words.
    pub(super) fn splits(&self) -> String {
        let split: Vec<String> =
            self.parts.iter().filter(|(_, n)| **n > 1).map(|(name, n)| format!("{name} in {n} parts")).collect();
        match split.len() {
            0 => "every tensor fits one binding".to_owned(),
            1..=4 => format!("split to fit its bindings: {}", split.join(", ")),
            n => format!("{n} tensors are split to fit its bindings: {}, ...", split[..4].join(", ")),
        }
    }
}

/// The limits that an adapter states.
pub(super) fn limits(adapter: &AdapterFacts) -> Limits {
    // Every adapter allows at least this grid, and Vulkan, Metal and DirectX name no more.
    Limits { max_binding_bytes: adapter.max_binding_bytes.min(adapter.max_buffer_bytes), max_grid: adapter.max_grid }
}
