//! What goes where: the library's own books of a model's memory, and words for them.

use fourfold::Result;
use fourfold::checkpoint::Checkpoint;
use fourfold::config::Config;
use fourfold::device::Limits;
use fourfold::device::gpu::AdapterFacts;
use fourfold::model::{Found, Needs, Plan};

/// Bytes by purpose, and the parts that matrices were split into.
pub(super) struct Ledger {
    pub(super) needs: Needs,
    /// What there is besides weights.
    pub(super) found: Found,
}

impl Ledger {
    /// The books of a model and one conversation on a device with these limits.
    pub(super) fn fill(checkpoint: &Checkpoint, config: &Config, plan: &Plan, limits: Limits) -> Result<Self> {
        let (needs, found) = Needs::of(checkpoint, config, plan, limits)?;
        Ok(Self { needs, found })
    }

    /// Which weights are split, in words.
    pub(super) fn splits(&self) -> String {
        let parts = self.needs.parts.iter();
        let split: Vec<String> =
            parts.filter(|(_, n)| **n > 1).map(|(name, n)| format!("{name} in {n} parts")).collect();
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
    Limits {
        max_binding_bytes: adapter.max_binding_bytes.min(adapter.max_buffer_bytes),
        max_grid: adapter.max_grid,
        max_storage_buffers: 8,
        matrix: false,
        laid_out: true,
    }
}
