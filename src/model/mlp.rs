//! The dense gated MLP: `down(silu(gate x) up x)`.

use super::load::{Inputs, Loader};
use super::state::State;
use crate::error::Result;
use crate::ops::{Gate, Glu, Projection, RmsNorm};
use crate::program::{Program, Slice};

/// A dense MLP's weights.
#[derive(Debug)]
pub(super) struct Mlp {
    f: u32,
    /// Gates, then ups.
    gate_up: Projection,
    down: Projection,
}

impl Mlp {
    /// `PREFIX.gate_proj`, `.up_proj` `[F, D]` and `.down_proj` `[D, F]`.
    pub(super) fn load(up: &mut Loader<'_>, prefix: &str, [d, f]: [u32; 2]) -> Result<Self> {
        let gate_up = ["gate_proj", "up_proj"].map(|name| (format!("{prefix}.{name}"), f));
        let gate_up = up.projection(&gate_up, d, Inputs::AsPlanned)?;
        let down = up.projection(&[(format!("{prefix}.down_proj"), d)], f, Inputs::AsPlanned)?;
        Ok(Self { f, gate_up, down })
    }

    /// Record it, and the norm before it: to `s.delta`.
    pub(super) fn record(&self, p: &mut Program, norm: RmsNorm, idx: usize, gain: Slice, s: &State) {
        let name = |what: &'static str| move || format!("layers.{idx}.{what}");
        if !s.after_attention(p, norm, idx, gain, (&self.gate_up, s.gate_up)) {
            s.project(p, &self.gate_up, s.h, s.gate_up, name("mlp_norm.staged"));
        }
        p.stage(name("mlp.gate_up"), s.gate_up, 2 * self.f as usize);
        p.glu(Glu { f: self.f, gate: Gate::Silu }, s.gate_up, s.e);
        p.stage(name("mlp.up"), s.e, self.f as usize);
        s.project(p, &self.down, s.e, s.delta, name("mlp.up.staged"));
        p.stage(name("mlp.out"), s.delta, self.down.n as usize);
    }
}
