//! The seam between the engine and what computes: alloc, write, read, run.
//!
//! Two devices stand behind it: `gpu` (wgpu, the only place that knows it) and `cpu` (the twins).

pub mod cpu;
pub mod gpu;
pub mod rehearsal;
pub mod reserved;

use crate::error::Result;
use crate::ops::{Layout, Views};
use crate::program::{Access, BufferId, Launch, Program, Slice, Stage};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Something that holds buffers and runs programs over them.
pub trait Device: Send + Sync + fmt::Debug {
    /// A new buffer of `bytes` bytes (a multiple of 4), filled with zeros.
    fn alloc(&self, label: &str, bytes: u64) -> Result<BufferId>;
    /// Give a buffer back. Its id is never used again.
    fn free(&self, id: BufferId);
    /// Copy bytes to the head of a slice, before any program that runs later.
    fn write(&self, to: Slice, bytes: &[u8]) -> Result<()>;
    /// Copy pieces of any length, one behind the other, to the head of a slice, as [`Device::write`] does. Zeros fill up
    /// the last word.
    fn write_pieces(&self, to: Slice, pieces: &[&[u8]]) -> Result<()> {
        let mut offset = to.offset;
        let mut put = |bytes: &[u8]| {
            let at = Slice { offset, bytes: bytes.len() as u64, ..to };
            offset += at.bytes;
            self.write(at, bytes)
        };
        let mut short: Vec<u8> = Vec::new(); // of a whole word, between two pieces
        for &piece in pieces {
            let missing = if short.is_empty() { 0 } else { (4 - short.len()).min(piece.len()) };
            let (head, rest) = piece.split_at(missing);
            short.extend_from_slice(head);
            if short.len() == 4 {
                put(&short)?;
                short.clear();
            }
            let (whole, tail) = rest.split_at(rest.len() / 4 * 4);
            if !whole.is_empty() {
                put(whole)?;
            }
            short.extend_from_slice(tail);
        }
        if !short.is_empty() {
            short.resize(4, 0);
            put(&short)?;
        }
        Ok(())
    }
    /// The same, laid out for the kernels of a device whose [`Limits`] say so.
    fn write_laid_out(&self, to: Slice, pieces: &[&[u8]], layout: Layout) -> Result<()> {
        match layout {
            Layout::Stored => self.write_pieces(to, pieces),
            _ => self.write_pieces(to, &[&layout.of(pieces)]),
        }
    }
    /// Copy a whole slice out, after every program that ran before.
    fn read(&self, from: Slice, bytes: &mut [u8]) -> Result<()>;
    /// Ask for a whole slice as it is after every program that ran before, without waiting for it.
    fn read_later(&self, from: Slice) -> Result<Box<dyn Later>> {
        let mut bytes = vec![0; from.bytes as usize];
        self.read(from, &mut bytes)?;
        Ok(Box::new(bytes))
    }
    /// Steps that are worth running before the tokens of those before them are looked at.
    fn ahead(&self) -> usize {
        0
    }
    /// Make ready what a program needs, such as compiled kernels, so that the first run is as fast as the next.
    fn prepare(&self, program: &Program) -> Result<()>;
    /// Run the launches in order. Launches placed on the host run there.
    fn run(&self, program: &Program) -> Result<()>;
    /// Run the launches in order and show every named stage: what stands in its rows right after the launch that makes
    /// it, before anything reuses the buffer.
    fn run_seeing(&self, program: &Program, see: See<'_>) -> Result<()> {
        for (part, stage) in program.split_at_stages() {
            self.run(&part)?;
            if let Some(stage) = stage {
                let mut words = vec![0u32; (stage.slice.bytes / 4) as usize];
                self.read(stage.slice, bytemuck::cast_slice_mut(&mut words))?;
                see(stage, words)?;
            }
        }
        Ok(())
    }
    /// Run the launches one by one and time each on the device, in seconds.
    ///
    /// # Errors
    /// Where the device has no clock.
    fn time(&self, program: &Program) -> Result<Vec<f64>> {
        let _ = program;
        Err(crate::Error::Device(format!("{} does not time single launches", self.describe())))
    }
    /// Wait until everything written and run so far is done, and report what went wrong.
    fn wait(&self) -> Result<()>;
    /// What the device can hold and bind.
    fn limits(&self) -> Limits;
    /// Who computes, for people: adapter and backend.
    fn describe(&self) -> String;
    /// The driver and its version; empty where there is none.
    fn driver(&self) -> String {
        String::new()
    }
}

/// Bytes that were asked for.
pub trait Later: Send + fmt::Debug {
    /// Wait for them.
    fn get(self: Box<Self>) -> Result<Vec<u8>>;
}

impl Later for Vec<u8> {
    fn get(self: Box<Self>) -> Result<Vec<u8>> {
        Ok(*self)
    }
}

/// Sees a named stage and its words.
pub type See<'a> = &'a mut dyn FnMut(&Stage, Vec<u32>) -> Result<()>;

/// What a device can hold and bind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Largest slice that a kernel can bind, in bytes.
    pub max_binding_bytes: u64,
    /// Largest number of workgroups in one dimension of a grid.
    pub max_grid: u32,
    /// Storage buffers that a kernel can bind.
    pub max_storage_buffers: u32,
    /// Whether kernels with matrix units run here: 16 x 16 x 16 halves, added in f32.
    pub matrix: bool,
    /// Whether kernels read FP4 weights as [`Layout`] lays them out; else as they lie on disk.
    pub laid_out: bool,
}

/// A buffer that gives itself back.
#[derive(Debug)]
pub struct Buffer {
    device: Arc<dyn Device>,
    slice: Slice,
}

impl Buffer {
    /// Allocate `bytes` bytes, rounded up to whole words.
    pub fn new(device: &Arc<dyn Device>, label: &str, bytes: u64) -> Result<Self> {
        let bytes = bytes.max(4).next_multiple_of(4);
        let limit = device.limits().max_binding_bytes;
        if bytes > limit {
            return Err(crate::Error::Device(format!(
                "{label} takes {bytes} bytes, but {} binds {limit} at most: choose a smaller context or chunk",
                device.describe()
            )));
        }
        let buffer = device.alloc(label, bytes)?;
        Ok(Self { device: device.clone(), slice: Slice { buffer, offset: 0, bytes } })
    }

    /// Allocate and fill.
    pub fn with_bytes(device: &Arc<dyn Device>, label: &str, bytes: &[u8]) -> Result<Self> {
        let buffer = Self::new(device, label, bytes.len() as u64)?;
        device.write_pieces(buffer.slice, &[bytes])?;
        Ok(buffer)
    }

    /// The whole buffer.
    pub fn slice(&self) -> Slice {
        self.slice
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.device.free(self.slice.buffer);
    }
}

/// A fresh id, unique in the process.
fn next_id() -> BufferId {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    BufferId(NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Compute a launch by its twin over copies of its slices.
fn run_on_host(launch: &Launch, tokens: u32, slices: &mut [Vec<u32>]) {
    let mut views = Views::default();
    for (arg, words) in launch.args.iter().zip(slices) {
        match arg.access {
            Access::Read => views.add_read(arg.name, words),
            Access::Update | Access::Write => views.add_write(arg.name, words),
        }
    }
    launch.op.twin(tokens as usize, &mut views);
}
