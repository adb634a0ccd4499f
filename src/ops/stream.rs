//! Reading memory and nothing else: the ceiling that kernels are measured against.

use super::{Op, Views};
use crate::program::{Launch, Program, Slice};
use crate::shader::Kernel;

pub(crate) const KERNEL: Kernel =
    Kernel { name: "stream", source: include_str!("../../shaders/stream.wgsl"), slots: &[] };

/// Lanes of a workgroup.
const LANES: u32 = 256;

/// Constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stream {
    /// Blocks of 16 bytes.
    pub n: u32,
    /// Workgroups.
    pub groups: u32,
}

impl Stream {
    /// Words of the result.
    pub const fn outputs(&self) -> usize {
        (self.groups * LANES) as usize
    }
}

impl Program {
    /// Fold all of `x` into `y`, `[256 groups]` u32.
    pub fn stream(&mut self, op: Stream, x: Slice, y: Slice) {
        let launch = Launch::new(Op::Stream(op), &KERNEL, [op.groups, 1, 1])
            .constant("N", op.n)
            .constant("GROUPS", op.groups)
            .read("x", x)
            .write("y", y);
        self.push(launch);
    }
}

impl Stream {
    pub(crate) fn twin(&self, _: usize, views: &mut Views<'_>) {
        self.reference(&views.words("x")[..self.n as usize * 4], views.words_mut("y"));
    }

    /// `x [N, 4]`, `y [256 groups]`.
    pub fn reference(&self, x: &[u32], y: &mut [u32]) {
        let lanes = self.outputs();
        y[..lanes].fill(0);
        for (i, block) in x.chunks_exact(4).enumerate() {
            y[i % lanes] ^= block[0] ^ block[1] ^ block[2] ^ block[3];
        }
    }
}
