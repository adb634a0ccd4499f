//! The GPU through wgpu. Nothing outside this folder says `wgpu`, but for the engine's doors that let an application
//! bring its own device.

mod adapter;
mod cache;
mod later;
mod pace;
mod pipeline;
mod run;
mod upload;

pub use adapter::{AdapterFacts, is_hardware, list};
pub use cache::PipelineCache;

use super::{Device, Later, Limits, See, next_id};
use crate::error::{Error, Result};
use crate::ops::Layout;
use crate::program::{BufferId, Program, Slice};
use cache::Cache;
use pipeline::{Compile, Pipelines};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

/// Longest wait for the device before it is reported as hung.
const PATIENCE: Duration = Duration::from_secs(600);
/// Bytes handed to the queue before we wait for it to have copied them.
const IN_FLIGHT: u64 = 128 << 20;

/// A readback buffer larger than this is not kept for the next readback.
const KEPT_READBACK: u64 = 64 << 20;

/// How to open a GPU.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Part of the adapter's name; the best one if none.
    pub adapter: Option<String>,
    /// Keep wgpu's checks in the shaders. Same results, slower.
    pub checked_shaders: bool,
    /// Behave as an adapter without subgroups.
    pub without_subgroups: bool,
    /// Leave matrix units alone: prompts are slower, and have the bits of an adapter without.
    pub without_matrix_units: bool,
    /// Decode FP4 codes by a table: for adapters that flush subnormal halves.
    pub table_decode: bool,
    /// Behave as an adapter that binds no more than this.
    pub max_binding_bytes: Option<u64>,
    /// Behave as an adapter that has no more memory than this for buffers.
    #[doc(hidden)]
    pub max_memory_bytes: Option<u64>,
    /// Where compiled pipelines are kept.
    pub pipeline_cache: PipelineCache,
}

/// A wgpu device with its buffers and pipelines.
#[derive(Debug)]
pub struct Gpu {
    device: wgpu::Device,
    queue: wgpu::Queue,
    facts: AdapterFacts,
    limits: Limits,
    pipelines: Pipelines,
    buffers: RwLock<HashMap<BufferId, wgpu::Buffer>>,
    bind_groups: Mutex<HashMap<run::BindKey, wgpu::BindGroup>>,
    /// What sealed programs run, by their numbers, as long as they live. Emptied when any buffer is given back.
    sealed: Mutex<HashMap<u64, run::Kept>>,
    /// For readbacks.
    staging: Mutex<Option<wgpu::Buffer>>,
    /// How many launches go into one submission.
    pace: pace::Pace,
    /// Small readback buffers that nobody waits for.
    idle: Arc<Mutex<Vec<wgpu::Buffer>>>,
    /// For large writes, until the next wait.
    ring: Mutex<Option<upload::Ring>>,
    /// Bytes of all buffers, and how many there may be.
    allocated: AtomicU64,
    max_memory_bytes: u64,
    unsubmitted: AtomicU64,
    lost: Arc<Mutex<Option<String>>>,
    /// What it was opened on, unless by the application.
    adapter: Option<wgpu::Adapter>,
}

impl Gpu {
    /// Open an adapter.
    pub fn open(options: &Options) -> Result<Self> {
        Self::open_on(adapter::find(options.adapter.as_deref())?, options)
    }

    fn open_on(adapter: wgpu::Adapter, options: &Options) -> Result<Self> {
        let (device, queue, matrix) = adapter::open(&adapter, options)?;
        let lost: Arc<Mutex<Option<String>>> = Arc::default();
        let note = lost.clone();
        device.set_device_lost_callback(move |reason, text| {
            let mut lost = note.lock().unwrap_or_else(PoisonError::into_inner);
            *lost = Some(if text.is_empty() { format!("{reason:?}") } else { text });
        });
        // Errors belong to the scopes around our own calls; what still comes through is logged, not a panic.
        device.on_uncaptured_error(Arc::new(|e: wgpu::Error| tracing::error!("uncaptured wgpu error: {e}")));
        let folder = options.pipeline_cache.of_ours();
        Ok(Self { adapter: Some(adapter), ..Self::new((device, queue, matrix), lost, options, folder) })
    }

    /// Open the first adapter that is not software, whatever its name. The error says why there is none.
    pub fn open_hardware(options: &Options) -> Result<Self, String> {
        let adapters = adapter::adapters();
        let mut why = match adapters.first() {
            None => "no Vulkan, Metal or DirectX 12 adapter was found".to_owned(),
            Some(first) => format!("only a software adapter was found ({})", first.get_info().name),
        };
        for adapter in adapters.into_iter().filter(|a| a.get_info().device_type != wgpu::DeviceType::Cpu) {
            match Self::open_on(adapter, options) {
                Ok(gpu) => return Ok(gpu),
                Err(e) => why = e.to_string(),
            }
        }
        Err(why)
    }

    /// The adapter of this one opened anew, with other options; `None` where the device is the application's.
    pub fn reopen(&self, options: &Options) -> Option<Result<Self>> {
        self.adapter.clone().map(|adapter| Self::open_on(adapter, options))
    }

    /// Work on a device that the application owns. Its callbacks and error handlers are left alone; a panic in one of
    /// its map callbacks, should our wait be what calls it, is taken for a lost device. Pipelines are kept as long as
    /// this value lives, so build engines of one kind on one `Gpu`; on disk only where [`Options::pipeline_cache`] names a
    /// folder and the device has the feature for it.
    pub fn from_wgpu(device: wgpu::Device, queue: wgpu::Queue, options: &Options) -> Self {
        let folder = options.pipeline_cache.of_anothers();
        Self::new((device, queue, false), Arc::default(), options, folder)
    }

    fn new(
        (device, queue, matrix): (wgpu::Device, wgpu::Queue, bool),
        lost: Arc<Mutex<Option<String>>>,
        options: &Options,
        pipelines: Option<PathBuf>,
    ) -> Self {
        let cache = pipelines.and_then(|folder| Cache::open(&device, &folder));
        let facts = adapter::facts(&device.adapter_info(), device.features(), &device.limits(), matrix);
        let limits = Limits {
            max_binding_bytes: facts
                .max_binding_bytes
                .min(facts.max_buffer_bytes)
                .min(options.max_binding_bytes.unwrap_or(u64::MAX)),
            max_grid: facts.max_grid,
            max_storage_buffers: device.limits().max_storage_buffers_per_shader_stage,
            matrix,
            laid_out: true,
        };
        let smallest = device.adapter_info().subgroup_min_size;
        // Without shuffles 32 lanes add up through more workgroup memory (`fold_shared`) than every device has.
        let room = device.limits().max_compute_workgroup_storage_size >= 17 << 10;
        let wide = smallest >= 32 && (facts.subgroup.0 >= 32 || room);
        // Shuffles stay inside 8 or 32 aligned lanes, so any larger size will do.
        let subgroups = facts.subgroup.0 >= if wide { 32 } else { 8 } && !options.without_subgroups;
        let compile = Compile { subgroups, wide, table_decode: options.table_decode, checked: options.checked_shaders };
        Self {
            device,
            queue,
            facts,
            limits,
            pipelines: Pipelines::new(compile, cache),
            buffers: RwLock::default(),
            bind_groups: Mutex::default(),
            sealed: Mutex::default(),
            staging: Mutex::default(),
            pace: pace::Pace::default(),
            idle: Arc::default(),
            ring: Mutex::default(),
            allocated: AtomicU64::new(0),
            max_memory_bytes: options.max_memory_bytes.unwrap_or(u64::MAX),
            unsubmitted: AtomicU64::new(0),
            lost,
            adapter: None,
        }
    }

    /// Facts about the adapter.
    pub fn facts(&self) -> &AdapterFacts {
        &self.facts
    }

    /// Bytes of compiled pipelines that were read from disk when this was opened.
    pub fn pipeline_bytes_from_disk(&self) -> usize {
        self.pipelines.read_bytes()
    }

    fn buffer(&self, id: BufferId) -> wgpu::Buffer {
        let buffers = self.buffers.read().unwrap_or_else(PoisonError::into_inner);
        buffers.get(&id).expect("the buffer was allocated here and not freed").clone()
    }

    /// An error if the device is known to be lost.
    fn check_lost(&self) -> Result<()> {
        let lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        lost.as_ref().map_or(Ok(()), |text| Err(Error::DeviceLost(text.clone())))
    }

    /// Run `work` and turn wgpu's errors into ours. `what` and `bytes` say what was asked for.
    fn scoped<T>(&self, what: &str, bytes: u64, work: impl FnOnce() -> T) -> Result<T> {
        self.check_lost()?;
        match noted(&self.device, work) {
            (done, None) => Ok(done),
            (_, Some(wgpu::Error::OutOfMemory { .. })) => Err(out_of_memory(what, bytes)),
            (_, Some(e)) => {
                self.probe()?;
                Err(Error::Device(format!("{what} on {}: {}", self.facts.name, one_line(&e.to_string()))))
            }
        }
    }

    /// An error if the device is lost, also where it is the application's own and the callback is not ours: wgpu makes
    /// no error of work on a lost device, but a buffer made there cannot be written.
    fn probe(&self) -> Result<()> {
        self.check_lost()?;
        let usage = wgpu::BufferUsages::COPY_DST;
        let descriptor = wgpu::BufferDescriptor { label: Some("probe"), size: 4, usage, mapped_at_creation: false };
        let write = || self.queue.write_buffer(&self.device.create_buffer(&descriptor), 0, &[0; 4]);
        match noted(&self.device, write).1 {
            // A device without memory is there.
            None | Some(wgpu::Error::OutOfMemory { .. }) => self.check_lost(),
            Some(_) => Err(Error::DeviceLost(format!("{} takes no more work", self.facts.name))),
        }
    }

    /// Submit what was written, and wait for everything so far.
    fn settle(&self) -> Result<()> {
        self.scoped("submitting", 0, || self.queue.submit([]))?;
        self.poll()?;
        self.probe()
    }

    /// Wait for everything submitted so far.
    fn poll(&self) -> Result<()> {
        self.poll_for(None)
    }

    /// Wait for one submission and all before it, or for everything so far.
    fn poll_for(&self, submission_index: Option<wgpu::SubmissionIndex>) -> Result<()> {
        let wait = wgpu::PollType::Wait { submission_index, timeout: Some(PATIENCE) };
        // wgpu panics in `poll` when the device is lost while it waits; that is an error like any other to us.
        let polled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.device.poll(wait)));
        self.check_lost()?;
        match polled {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(wgpu::PollError::Timeout)) => Err(Error::Device(format!(
                "{} did not finish within {} s: it hangs, or the step is too large for it",
                self.facts.name,
                PATIENCE.as_secs()
            ))),
            Ok(Err(e)) => Err(Error::Device(e.to_string())),
            Err(_) => Err(Error::DeviceLost("while waiting for it".to_owned())),
        }
    }

    /// Copy `bytes.len()` bytes out of a buffer, through the readback buffer.
    fn read_buffer(&self, from: &wgpu::Buffer, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let size = bytes.len() as u64;
        let buffer = match staging.take() {
            Some(buffer) if buffer.size() >= size => buffer,
            _ => {
                let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
                let label = Some("readback");
                let size = size.next_power_of_two().max(1 << 16).min(self.device.limits().max_buffer_size);
                let descriptor = wgpu::BufferDescriptor { label, size, usage, mapped_at_creation: false };
                self.scoped("readback", size, || self.device.create_buffer(&descriptor))?
            }
        };
        let (tell, told) = std::sync::mpsc::channel();
        self.scoped("reading back", size, || {
            let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            encoder.copy_buffer_to_buffer(from, offset, &buffer, 0, size);
            self.queue.submit([encoder.finish()]);
            buffer.slice(..size).map_async(wgpu::MapMode::Read, move |mapped| {
                let _ = tell.send(mapped);
            });
        })?;
        self.poll()?;
        // Another thread's poll may be the one that answers, a moment after ours returns.
        match told.recv_timeout(PATIENCE) {
            Ok(Ok(())) => {}
            _ => return Err(Error::DeviceLost("a readback was not answered".to_owned())),
        }
        let mapped = buffer.slice(..size).get_mapped_range().map_err(|e| Error::Device(e.to_string()))?;
        bytes.copy_from_slice(&mapped);
        drop(mapped);
        buffer.unmap();
        if buffer.size() <= KEPT_READBACK {
            *staging = Some(buffer);
        }
        Ok(())
    }
}

/// Do `work`, and what wgpu has against it. An error that no scope catches would go to the application's handler, which panics unless
/// it was replaced.
fn noted<T>(device: &wgpu::Device, work: impl FnOnce() -> T) -> (T, Option<wgpu::Error>) {
    let validation = device.push_error_scope(wgpu::ErrorFilter::Validation);
    let internal = device.push_error_scope(wgpu::ErrorFilter::Internal);
    let memory = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
    let done = work();
    let errors = [memory.pop(), internal.pop(), validation.pop()].map(pollster::block_on);
    (done, errors.into_iter().flatten().next())
}

fn out_of_memory(what: &str, bytes: u64) -> Error {
    let hint = "choose a smaller context or chunk, a smaller model, or another adapter";
    Error::OutOfMemory { what: what.to_owned(), bytes, hint }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

impl Device for Gpu {
    fn alloc(&self, label: &str, bytes: u64) -> Result<BufferId> {
        let usage = wgpu::BufferUsages::STORAGE
            | wgpu::BufferUsages::UNIFORM
            | wgpu::BufferUsages::COPY_DST
            | wgpu::BufferUsages::COPY_SRC;
        // A uniform binds at least 16 bytes.
        let size = bytes.next_multiple_of(16);
        let descriptor = wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: false };
        let before = self.allocated.fetch_add(size, Ordering::Relaxed);
        let made = match before.saturating_add(size) > self.max_memory_bytes {
            true => Err(out_of_memory(label, bytes)),
            false => self.scoped(label, bytes, || self.device.create_buffer(&descriptor)),
        };
        let buffer = made.inspect_err(|_| _ = self.allocated.fetch_sub(size, Ordering::Relaxed))?;
        let id = next_id();
        self.buffers.write().unwrap_or_else(PoisonError::into_inner).insert(id, buffer);
        Ok(id)
    }

    fn free(&self, id: BufferId) {
        if let Some(buffer) = self.buffers.write().unwrap_or_else(PoisonError::into_inner).remove(&id) {
            self.allocated.fetch_sub(buffer.size(), Ordering::Relaxed);
        }
        let mut groups = self.bind_groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.retain(|key, _| !key.uses(id));
        self.sealed.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn write(&self, to: Slice, bytes: &[u8]) -> Result<()> {
        debug_assert!(bytes.len().is_multiple_of(4) && bytes.len() as u64 <= to.bytes);
        if bytes.len() > upload::SMALL {
            return self.upload(to, &[bytes], Layout::Stored);
        }
        let buffer = self.buffer(to.buffer);
        self.scoped("copying to the device", bytes.len() as u64, || {
            self.queue.write_buffer(&buffer, to.offset, bytes);
        })?;
        // write_buffer keeps a copy until the next submission: do not let those copies pile up.
        let waiting = self.unsubmitted.fetch_add(bytes.len() as u64, Ordering::Relaxed) + bytes.len() as u64;
        if waiting > IN_FLIGHT {
            self.unsubmitted.store(0, Ordering::Relaxed);
            self.settle()?;
        }
        Ok(())
    }

    fn write_pieces(&self, to: Slice, pieces: &[&[u8]]) -> Result<()> {
        if pieces.iter().map(|piece| piece.len()).sum::<usize>() > upload::SMALL {
            return self.upload(to, pieces, Layout::Stored);
        }
        if let [piece] = pieces
            && piece.len().is_multiple_of(4)
        {
            return self.write(to, piece);
        }
        let mut bytes = pieces.concat();
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        self.write(to, &bytes)
    }

    fn write_laid_out(&self, to: Slice, pieces: &[&[u8]], layout: Layout) -> Result<()> {
        let large = pieces.iter().map(|piece| piece.len()).sum::<usize>() > upload::SMALL;
        match layout {
            Layout::Stored => self.write_pieces(to, pieces),
            // Words are laid out while they are copied.
            Layout::Codes if large && pieces.iter().all(|piece| piece.len() % 4 == 0) => {
                self.upload(to, pieces, layout)
            }
            _ => self.write_pieces(to, &[&layout.of(pieces)]),
        }
    }

    fn read(&self, from: Slice, bytes: &mut [u8]) -> Result<()> {
        self.read_buffer(&self.buffer(from.buffer), from.offset, bytes)
    }

    fn read_later(&self, from: Slice) -> Result<Box<dyn Later>> {
        self.copy_out(from)
    }

    fn ahead(&self) -> usize {
        if is_hardware(&self.facts) { 2 } else { 0 }
    }

    fn prepare(&self, program: &Program) -> Result<()> {
        self.probe()?;
        self.pipelines.prepare(&self.device, &program.launches).or_else(|e| self.probe().and(Err(e)))
    }

    fn run(&self, program: &Program) -> Result<()> {
        self.run_program(program)
    }

    fn run_seeing(&self, program: &Program, see: See<'_>) -> Result<()> {
        self.run_program_seeing(program, see)
    }

    fn time(&self, program: &Program) -> Result<Vec<f64>> {
        self.time_program(program)
    }

    fn wait(&self) -> Result<()> {
        self.settle()?;
        // Large writes are over, most likely: their staging buffers go back.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner).take();
        Ok(())
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn driver(&self) -> String {
        self.facts.driver.clone()
    }

    fn describe(&self) -> String {
        format!("{} ({})", self.facts.name, self.facts.backend)
    }
}
