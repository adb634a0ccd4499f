//! Running a program: launches into compute passes, passes into submissions, host stages between them.

use super::Gpu;
use super::pipeline::Pipeline;
use crate::device::{Device, See, run_on_host};
use crate::error::Result;
use crate::ops::is_written;
use crate::program::{Access, BufferId, Launch, Place, Program, Seal, Slice, Stage};
use std::sync::{Arc, PoisonError, Weak};

/// Launches that are timed in one submission.
const LAUNCHES: usize = 64;

/// A pipeline and what its launch binds.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct BindKey {
    pipeline: usize,
    slices: Vec<Slice>,
}

impl BindKey {
    pub(super) fn uses(&self, id: BufferId) -> bool {
        self.slices.iter().any(|s| s.buffer == id)
    }
}

/// What a sealed program runs, as long as it lives.
#[derive(Debug)]
pub(super) struct Kept {
    seal: Weak<Seal>,
    ready: Arc<Vec<Ready>>,
}

/// A launch with all that it needs on the device.
#[derive(Debug)]
pub(super) struct Ready {
    pipeline: Arc<Pipeline>,
    group: wgpu::BindGroup,
    grid: [u32; 3],
}

impl Ready {
    fn record(&self, pass: &mut wgpu::ComputePass<'_>) {
        pass.set_pipeline(&self.pipeline.pipeline);
        pass.set_bind_group(0, &self.group, &[]);
        let [x, y, z] = self.grid;
        pass.dispatch_workgroups(x, y, z);
    }
}

/// Most bytes of stages that wait on the device to be read.
const SEEN: u64 = 64 << 20;

impl Gpu {
    /// As [`Self::run_program`], and copy every stage inside the same stream of commands, right after the launch that
    /// makes it; the copies are read at the end, or when they fill a buffer.
    pub(super) fn run_program_seeing(&self, program: &Program, see: See<'_>) -> Result<()> {
        let largest = program.stages.iter().map(|s| s.slice.bytes).max().unwrap_or(0);
        let total: u64 = program.stages.iter().map(|s| s.slice.bytes).sum();
        let size = total.min(SEEN).max(largest).max(4);
        let usage = wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
        let descriptor = wgpu::BufferDescriptor { label: Some("stages"), size, usage, mapped_at_creation: false };
        let kept = self.scoped("a buffer for stages", size, || self.device.create_buffer(&descriptor))?;
        let mut waiting: Vec<&Stage> = Vec::new();
        let mut used = 0;
        let mut from = 0;
        for stage in &program.stages {
            if used + stage.slice.bytes > size {
                self.show(&kept, &mut waiting, see)?;
                used = 0;
            }
            self.run_launches(&program.launches[from..stage.after], program.tokens)?;
            from = stage.after;
            self.scoped("copying a stage", 0, || {
                let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
                let buffer = self.buffer(stage.slice.buffer);
                encoder.copy_buffer_to_buffer(&buffer, stage.slice.offset, &kept, used, stage.slice.bytes);
                self.queue.submit([encoder.finish()]);
            })?;
            used += stage.slice.bytes;
            waiting.push(stage);
        }
        self.run_launches(&program.launches[from..], program.tokens)?;
        self.show(&kept, &mut waiting, see)
    }

    /// Read the stages that wait in `kept`, one behind the other, and show them.
    fn show(&self, kept: &wgpu::Buffer, waiting: &mut Vec<&Stage>, see: See<'_>) -> Result<()> {
        let mut words = vec![0u32; waiting.iter().map(|s| s.slice.bytes as usize / 4).sum()];
        if !words.is_empty() {
            self.read_buffer(kept, 0, bytemuck::cast_slice_mut(&mut words))?;
        }
        let mut rest = &words[..];
        for stage in waiting.drain(..) {
            let (mine, others) = rest.split_at(stage.slice.bytes as usize / 4);
            see(stage, mine.to_vec())?;
            rest = others;
        }
        Ok(())
    }

    pub(super) fn run_program(&self, program: &Program) -> Result<()> {
        let Some(seal) = program.sealed() else { return self.run_launches(&program.launches, program.tokens) };
        if program.launches.iter().any(|l| l.place == Place::Host) {
            return self.run_launches(&program.launches, program.tokens);
        }
        let sealed = || self.sealed.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = sealed().get(&seal.0).map(|kept| kept.ready.clone());
        let ready = match kept {
            Some(ready) => ready,
            None => {
                let ready = Arc::new(self.ready(&program.launches)?);
                let mut sealed = sealed();
                sealed.retain(|_, kept| kept.seal.strong_count() > 0);
                sealed.insert(seal.0, Kept { seal: Arc::downgrade(seal), ready: ready.clone() });
                ready
            }
        };
        let mut rest = &ready[..];
        while !rest.is_empty() {
            let (next, others) = rest.split_at(self.pace.launches(program.tokens).min(rest.len()));
            self.submit(next, program.tokens)?;
            rest = others;
        }
        Ok(())
    }

    fn run_launches(&self, mut rest: &[Launch], tokens: u32) -> Result<()> {
        while let Some(first) = rest.first() {
            if first.place == Place::Host {
                self.run_host_launch(first, tokens)?;
                rest = &rest[1..];
            } else {
                let most = self.pace.launches(tokens);
                let count = rest.iter().take(most).take_while(|l| l.place == Place::Device).count();
                self.submit(&self.ready(&rest[..count])?, tokens)?;
                rest = &rest[count..];
            }
        }
        Ok(())
    }

    fn ready(&self, launches: &[Launch]) -> Result<Vec<Ready>> {
        launches.iter().map(|launch| self.bind(launch)).collect()
    }

    fn submit(&self, launches: &[Ready], tokens: u32) -> Result<()> {
        let done = self.pace.watch(tokens, launches.len());
        self.scoped("running a step", 0, || {
            let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            for launch in launches {
                launch.record(&mut pass);
            }
            drop(pass);
            self.queue.submit([encoder.finish()]);
            self.queue.on_submitted_work_done(done);
        })
    }

    /// Run each launch in a pass of its own, between two timestamps.
    pub(super) fn time_program(&self, program: &Program) -> Result<Vec<f64>> {
        if !self.device.features().contains(wgpu::Features::TIMESTAMP_QUERY) {
            return Err(crate::Error::Device(format!("{} has no timestamps", self.facts.name)));
        }
        let mut seconds = Vec::new();
        for launches in program.launches.chunks(LAUNCHES) {
            let ready = self.ready(launches)?;
            let count = 2 * launches.len() as u32;
            let bytes = u64::from(count) * 8;
            let resolved = self.scoped("timestamps", bytes, || {
                let ty = wgpu::QueryType::Timestamp;
                let queries = self.device.create_query_set(&wgpu::QuerySetDescriptor { label: None, ty, count });
                let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
                let descriptor =
                    wgpu::BufferDescriptor { label: Some("timestamps"), size: bytes, usage, mapped_at_creation: false };
                let resolved = self.device.create_buffer(&descriptor);
                let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
                for (i, launch) in ready.iter().enumerate() {
                    let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                        label: None,
                        timestamp_writes: Some(wgpu::ComputePassTimestampWrites {
                            query_set: &queries,
                            beginning_of_pass_write_index: Some(2 * i as u32),
                            end_of_pass_write_index: Some(2 * i as u32 + 1),
                        }),
                    });
                    launch.record(&mut pass);
                }
                encoder.resolve_query_set(&queries, 0..count, &resolved, 0);
                self.queue.submit([encoder.finish()]);
                resolved
            })?;
            let mut ticks = vec![0u64; count as usize];
            self.read_buffer(&resolved, 0, bytemuck::cast_slice_mut(&mut ticks))?;
            let period = f64::from(self.queue.get_timestamp_period()) * 1e-9;
            seconds.extend(ticks.chunks_exact(2).map(|t| t[1].saturating_sub(t[0]) as f64 * period));
        }
        Ok(seconds)
    }

    /// The pipeline and bind group of a launch. Bind groups are kept as long as their buffers live.
    fn bind(&self, launch: &Launch) -> Result<Ready> {
        let pipeline = self.pipelines.get(&self.device, launch).or_else(|e| self.probe().and(Err(e)))?;
        let slices = launch.args.iter().map(|a| a.slice).collect();
        let key = BindKey { pipeline: Arc::as_ptr(&pipeline) as usize, slices };
        let mut groups = self.bind_groups.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(group) = groups.get(&key) {
            return Ok(Ready { pipeline, group: group.clone(), grid: launch.grid });
        }
        let buffers: Vec<wgpu::Buffer> = launch.args.iter().map(|a| self.buffer(a.slice.buffer)).collect();
        let entries: Vec<wgpu::BindGroupEntry<'_>> = pipeline
            .bindings
            .iter()
            .map(|binding| {
                let at = launch.args.iter().position(|a| a.name == binding.name);
                let at = at.unwrap_or_else(|| panic!("{} is not bound by {}", binding.name, launch.kernel.name));
                let slice = launch.args[at].slice;
                let size = if binding.uniform { slice.bytes.next_multiple_of(16) } else { slice.bytes };
                wgpu::BindGroupEntry {
                    binding: binding.index,
                    resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                        buffer: &buffers[at],
                        offset: slice.offset,
                        size: std::num::NonZeroU64::new(size),
                    }),
                }
            })
            .collect();
        let label = Some(launch.kernel.name);
        let descriptor = wgpu::BindGroupDescriptor { label, layout: &pipeline.layout, entries: &entries };
        let group = self.scoped(launch.kernel.name, 0, || self.device.create_bind_group(&descriptor))?;
        groups.insert(key, group.clone());
        Ok(Ready { pipeline, group, grid: launch.grid })
    }

    /// Bring a launch's slices to the host, compute its twin, bring back what it wrote.
    fn run_host_launch(&self, launch: &Launch, tokens: u32) -> Result<()> {
        let mut slices = Vec::new();
        for arg in &launch.args {
            let mut words = vec![0u32; (arg.slice.bytes / 4) as usize];
            if arg.access != Access::Write {
                self.read(arg.slice, bytemuck::cast_slice_mut(&mut words))?;
            }
            slices.push(words);
        }
        run_on_host(launch, tokens, &mut slices);
        for (arg, words) in launch.args.iter().zip(&slices) {
            if is_written(arg.access) {
                self.write(arg.slice, bytemuck::cast_slice(words))?;
            }
        }
        Ok(())
    }
}
