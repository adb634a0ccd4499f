//! What a forward pass is: a flat list of launches over slices of buffers. Plain data, no wgpu.
//!
//! `ops/` records launches, `device/` runs them: on the GPU as kernels, on the host as twins.

use crate::ops::Op;
use crate::shader::Kernel;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A buffer on some device. Ids are never used twice in a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BufferId(pub(crate) u64);

/// A byte range of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slice {
    /// The buffer.
    pub buffer: BufferId,
    /// First byte, a multiple of the device's binding alignment.
    pub offset: u64,
    /// Length in bytes, a multiple of 4.
    pub bytes: u64,
}

impl Slice {
    /// The first `bytes` bytes of this slice.
    pub fn head(self, bytes: u64) -> Self {
        assert!(bytes <= self.bytes, "head of {bytes} bytes from a slice of {}", self.bytes);
        Self { bytes, ..self }
    }
}

/// What a launch does with a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Only reads it.
    Read,
    /// Reads or keeps part of it and writes the rest.
    Update,
    /// Writes every element that it is responsible for and reads none.
    Write,
}

/// A slice bound to one of a kernel's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Arg {
    /// The variable's name in the WGSL source.
    pub name: &'static str,
    /// What is bound to it.
    pub slice: Slice,
    /// What the launch does with it.
    pub access: Access,
}

/// Where a launch runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// On the program's device.
    Device,
    /// On the host, by the op's twin.
    Host,
}

/// One kernel over one grid.
#[derive(Clone, Debug)]
pub struct Launch {
    /// What is computed, with the constants that the twin needs.
    pub op: Op,
    /// The kernel that computes it on a GPU.
    pub kernel: &'static Kernel,
    /// The file that fills each slot which the op decides (the device decides the others).
    pub fillings: Vec<(&'static str, &'static str)>,
    /// The kernel's `override`s.
    pub constants: Vec<(&'static str, f64)>,
    /// The slices, by name.
    pub args: Vec<Arg>,
    /// Workgroups in x, y and z.
    pub grid: [u32; 3],
    /// Where it runs.
    pub place: Place,
}

impl Launch {
    pub(crate) fn new(op: Op, kernel: &'static Kernel, grid: [u32; 3]) -> Self {
        let place = Place::Device;
        Self { op, kernel, fillings: Vec::new(), constants: Vec::new(), args: Vec::new(), grid, place }
    }

    pub(crate) fn fill(mut self, slot: &'static str, file: &'static str) -> Self {
        self.fillings.push((slot, file));
        self
    }

    pub(crate) fn constant(mut self, name: &'static str, value: impl Into<f64>) -> Self {
        self.constants.push((name, value.into()));
        self
    }

    pub(crate) fn read(self, name: &'static str, slice: Slice) -> Self {
        self.arg(name, slice, Access::Read)
    }

    pub(crate) fn write(self, name: &'static str, slice: Slice) -> Self {
        self.arg(name, slice, Access::Write)
    }

    pub(crate) fn update(self, name: &'static str, slice: Slice) -> Self {
        self.arg(name, slice, Access::Update)
    }

    fn arg(mut self, name: &'static str, slice: Slice, access: Access) -> Self {
        self.args.push(Arg { name, slice, access });
        self
    }
}

/// Which stages the host computes instead of the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostStages {
    /// Choosing experts from the router's scores.
    pub routing: bool,
    /// The weighted sum of expert outputs.
    pub scatter: bool,
    /// Attention over the cache (which is copied to the host for it).
    pub attention: bool,
}

/// What the rows of a step are to their sequences. The kernels of a step follow it, never the number of its rows: so a
/// position has the same bits whoever stands beside it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// Tokens that were given.
    #[default]
    Prompt,
    /// Tokens that the model drew, or a draft proposed.
    Generated {
        /// No row sees more positions than this.
        reach: u32,
    },
}

/// A value worth looking at: what stands in a slice after some launch.
#[derive(Clone, Debug)]
pub struct Stage {
    /// A stable name, such as `layers.3.mlp.out`.
    pub name: String,
    /// Number of launches that come before it.
    pub after: usize,
    /// Where the value stands, as `[rows, width]` elements of four bytes.
    pub slice: Slice,
    /// Elements in a row.
    pub width: usize,
    /// Whether the elements are indices (u32) and not f32.
    pub indices: bool,
}

/// The launches of one forward pass, in order.
#[derive(Clone, Debug, Default)]
pub struct Program {
    /// The launches.
    pub launches: Vec<Launch>,
    /// The values that have names. Naming costs nothing: no launch, no copy.
    pub stages: Vec<Stage>,
    /// Rows of the step, T.
    pub(crate) tokens: u32,
    pub(crate) host: HostStages,
    pub(crate) role: Role,
    /// Prompts may take matrix units.
    pub(crate) matrix: bool,
    /// Record what fused ops do as launches of their own, with the same bits: the lab looks between them.
    pub(crate) in_parts: bool,
    /// Of this very list of launches, which will not change any more.
    sealed: Option<Arc<Seal>>,
}

/// A number that no other list of launches has. It lives as long as its program does, and so may what a device keeps for it.
#[derive(Debug)]
pub(crate) struct Seal(pub(crate) u64);

impl Program {
    /// An empty program for steps of `tokens` rows.
    pub fn new(tokens: u32, host: HostStages) -> Self {
        Self { tokens, host, ..Self::default() }
    }

    /// The same for rows of this role.
    pub fn of(self, role: Role) -> Self {
        Self { role, ..self }
    }

    /// The same with fused ops recorded as their parts.
    pub fn in_parts(self, in_parts: bool) -> Self {
        Self { in_parts, ..self }
    }

    /// The same for a device that has matrix units, or has not.
    pub fn with_matrix(self, matrix: bool) -> Self {
        Self { matrix, ..self }
    }

    /// Whether this program's products are made by matrix units where they can be.
    pub(crate) fn by_matrix(&self) -> bool {
        self.matrix && self.role == Role::Prompt
    }

    /// Promise that the launches stay as they are, so that a device may keep what it made of them.
    pub(crate) fn seal(mut self) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        self.sealed = Some(Arc::new(Seal(NEXT.fetch_add(1, Ordering::Relaxed))));
        self
    }

    /// The seal of a sealed program.
    pub(crate) fn sealed(&self) -> Option<&Arc<Seal>> {
        self.sealed.as_ref()
    }

    pub(crate) fn push(&mut self, mut launch: Launch) {
        self.sealed = None;
        let on_host = match launch.op {
            Op::Router(_) => self.host.routing,
            Op::MoeScatter(_) => self.host.scatter,
            Op::Attention(_) | Op::AttentionMerge(_) => self.host.attention,
            _ => false,
        };
        launch.place = if on_host { Place::Host } else { Place::Device };
        self.launches.push(launch);
    }

    /// Name what stands in the first T rows of `slice` now.
    pub(crate) fn stage(&mut self, name: impl FnOnce() -> String, slice: Slice, width: usize) {
        let slice = slice.head(u64::from(self.tokens) * width as u64 * 4);
        self.stages.push(Stage { name: name(), after: self.launches.len(), slice, width, indices: false });
    }

    /// As [`Self::stage`], for u32 indices.
    pub(crate) fn index_stage(&mut self, name: impl FnOnce() -> String, slice: Slice, width: usize) {
        self.stage(name, slice, width);
        self.stages.last_mut().expect("just pushed").indices = true;
    }

    /// Put launches before launch `at`, behind the stages that end there. Stages after it move along.
    pub(crate) fn insert(&mut self, at: usize, launches: Vec<Launch>) {
        self.sealed = None;
        let count = launches.len();
        self.launches.splice(at..at, launches);
        for stage in self.stages.iter_mut().filter(|s| s.after > at) {
            stage.after += count;
        }
    }

    /// Put launches in the place of launch `at`. Stages that follow it follow the last of them.
    pub fn replace(&mut self, at: usize, launches: Vec<Launch>) {
        self.sealed = None;
        let count = launches.len();
        self.launches.splice(at..=at, launches);
        for stage in self.stages.iter_mut().filter(|s| s.after > at) {
            stage.after = stage.after - 1 + count;
        }
    }

    /// The launches between two stages.
    pub(crate) fn between(&self, from: &str, to: &str) -> Option<&[Launch]> {
        let after = |name: &str| self.stages.iter().find(|stage| stage.name == name).map(|stage| stage.after);
        self.launches.get(after(from)?..after(to)?)
    }

    /// Rows of the step.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    /// The launches before, between and after the named stages, as programs of their own.
    pub(crate) fn split_at_stages(&self) -> Vec<(Program, Option<&Stage>)> {
        let mut parts = Vec::new();
        let mut from = 0;
        for stage in &self.stages {
            parts.push((self.part(from, stage.after), Some(stage)));
            from = stage.after;
        }
        parts.push((self.part(from, self.launches.len()), None));
        parts
    }

    fn part(&self, from: usize, to: usize) -> Program {
        let launches = self.launches[from..to].to_vec();
        let Program { tokens, host, role, matrix, in_parts, .. } = *self;
        Program { launches, stages: Vec::new(), tokens, host, role, matrix, in_parts, sealed: None }
    }
}
