//! The ops: a file each, with its constants, the method that records it, its kernels, and its twin.
//!
//! A twin is the op's plain definition: f64 sums, no tricks, nothing shared with the kernel. It is the oracle of the
//! kernel's tests, and it runs the op where there is no GPU.

mod add;
mod add_norm;
mod amax;
mod argmax;
mod attention;
mod draw;
mod embed;
mod glu;
mod group;
mod head_norm;
mod input;
mod layout;
mod linear;
mod linear_add;
mod moe_down;
mod moe_scatter;
mod moe_up;
mod narrow;
mod norm_linear;
mod norm_moe_up;
mod rms_norm;
mod rope;
mod router;
mod stage_activation;
mod stats;
mod stream;
mod take;
mod views;
mod weigh;
mod weight;

pub use add::Add;
pub use add_norm::{AddNorm, Addend};
pub use amax::Amax;
pub(crate) use argmax::PARTS;
pub use argmax::{Argmax, Peak};
pub(crate) use attention::segments_within;
pub use attention::{Attention, AttentionMerge, Seen};
pub use draw::{Draw, Drawing, Drawn, Draws};
pub use embed::Embed;
pub use glu::{Gate, Glu};
pub use group::{ChosenGroup, Group, Routing};
pub use head_norm::HeadNorm;
pub use input::{Input, InputFormat, decode_staged, staged_words};
pub use layout::Layout;
pub use linear::{Linear, Piece, Projection};
pub use linear_add::LinearAdd;
pub use moe_down::{MoeDown, MoeDownAdd};
pub use moe_scatter::MoeScatter;
pub use moe_up::{ExpertScales, Experts, GateUp, MoeUp, Swiglu};
pub use narrow::Narrow;
pub use norm_linear::{NormLinear, NormLinearFew, Normed};
pub use norm_moe_up::{NormMoeUp, Scored};
pub use rms_norm::RmsNorm;
pub use rope::{CacheFormat, KvCache, Rope, Rotated};
pub use router::{Router, Routes};
pub use stage_activation::{ActScale, Activations, InputScales, StageActivation, Staging};
pub use stats::{STATS_WORDS, Stats};
pub use stream::Stream;
pub use take::Take;
pub use views::Views;
pub(crate) use views::is_written;
pub use weigh::{Kept, Weigh};
pub use weight::{Matrix, Part, Weight, WeightBytes};

use crate::shader::Kernel;

/// Every kernel there is.
pub const KERNELS: [&Kernel; 34] = [
    &add::KERNEL,
    &add_norm::KERNEL,
    &amax::KERNEL,
    &argmax::KERNEL,
    &attention::KERNEL,
    &attention::MERGE,
    &attention::FLASH,
    &draw::KERNEL,
    &embed::KERNEL,
    &glu::KERNEL,
    &group::KERNEL,
    &group::CHOSEN,
    &head_norm::KERNEL,
    &linear::KERNEL,
    &linear::MATRIX,
    &linear_add::KERNEL,
    &moe_down::KERNEL,
    &moe_down::MATRIX,
    &moe_down::ADD,
    &moe_scatter::KERNEL,
    &moe_up::KERNEL,
    &moe_up::MATRIX,
    &narrow::KERNEL,
    &norm_linear::KERNEL,
    &norm_linear::FEW,
    &norm_moe_up::KERNEL,
    &rms_norm::KERNEL,
    &rope::KERNEL,
    &router::KERNEL,
    &stage_activation::KERNEL,
    &stats::KERNEL,
    &stream::KERNEL,
    &take::KERNEL,
    &weigh::KERNEL,
];

/// What a launch computes: an op with its constants.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs, reason = "each variant is documented at its type")]
pub enum Op {
    Add(Add),
    AddNorm(AddNorm),
    Amax(Amax),
    Argmax(Argmax),
    Attention(Attention),
    AttentionMerge(AttentionMerge),
    Draw(Draw),
    Embed(Embed),
    Glu(Glu),
    Group(Group),
    ChosenGroup(ChosenGroup),
    HeadNorm(HeadNorm),
    Linear(Linear),
    LinearAdd(LinearAdd),
    MoeDown(MoeDown),
    MoeDownAdd(MoeDownAdd),
    MoeScatter(MoeScatter),
    MoeUp(MoeUp),
    Narrow(Narrow),
    NormLinear(NormLinear),
    NormLinearFew(NormLinearFew),
    NormMoeUp(NormMoeUp),
    RmsNorm(RmsNorm),
    Rope(Rope),
    Router(Router),
    StageActivation(StageActivation),
    Stats(Stats),
    Stream(Stream),
    Take(Take),
    Weigh(Weigh),
}

impl Op {
    /// Compute the op on the host. The slices are the launch's, `tokens` the rows of the step.
    pub fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        match self {
            Op::Add(op) => op.twin(tokens, views),
            Op::AddNorm(op) => op.twin(tokens, views),
            Op::Amax(op) => op.twin(tokens, views),
            Op::Argmax(op) => op.twin(tokens, views),
            Op::Attention(op) => op.twin(tokens, views),
            Op::AttentionMerge(op) => op.twin(tokens, views),
            Op::Draw(op) => op.twin(views),
            Op::Embed(op) => op.twin(tokens, views),
            Op::Glu(op) => op.twin(tokens, views),
            Op::Group(op) => op.twin(tokens, views),
            Op::ChosenGroup(op) => op.twin(tokens, views),
            Op::HeadNorm(op) => op.twin(tokens, views),
            Op::Linear(op) => op.twin(tokens, views),
            Op::LinearAdd(op) => op.twin(views),
            Op::MoeDown(op) => op.twin(tokens, views),
            Op::MoeDownAdd(op) => op.twin(tokens, views),
            Op::MoeScatter(op) => op.twin(tokens, views),
            Op::MoeUp(op) => op.twin(tokens, views),
            Op::Narrow(op) => op.twin(views),
            Op::NormLinear(op) => op.twin(tokens, views),
            Op::NormLinearFew(op) => op.twin(tokens, views),
            Op::NormMoeUp(op) => op.twin(views),
            Op::RmsNorm(op) => op.twin(tokens, views),
            Op::Rope(op) => op.twin(tokens, views),
            Op::Router(op) => op.twin(tokens, views),
            Op::StageActivation(op) => op.twin(tokens, views),
            Op::Stats(op) => op.twin(tokens, views),
            Op::Stream(op) => op.twin(tokens, views),
            Op::Take(op) => op.twin(tokens, views),
            Op::Weigh(op) => op.twin(views),
        }
    }
}

/// One row of a step: which token, of which sequence, where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Row {
    /// The token's id.
    pub token: u32,
    /// Which of the cache's sequences it belongs to.
    pub sequence: u32,
    /// Its position there, from 0.
    pub position: u32,
    /// Always 0: kernels add it to bounds that compilers shall not know. The GPU's struct is four words.
    pub pad: u32,
}

/// The uniform that changes from step to step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Step {
    /// Rows of the step, T.
    pub tokens: u32,
    /// Nothing; a uniform is at least 16 bytes.
    pub pad: [u32; 3],
}
