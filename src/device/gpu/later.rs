//! Reading behind the queue: a copy is ordered with the work before it, and waited for when somebody wants it.

use super::{Gpu, PATIENCE};
use crate::device::Later;
use crate::error::{Error, Result};
use crate::program::Slice;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};

/// A copy under way to host memory.
#[derive(Debug)]
struct Copy {
    buffer: wgpu::Buffer,
    device: wgpu::Device,
    lost: Arc<Mutex<Option<String>>>,
    idle: Arc<Mutex<Vec<wgpu::Buffer>>>,
    submission: wgpu::SubmissionIndex,
    told: Receiver<Result<(), wgpu::BufferAsyncError>>,
    bytes: u64,
}

impl Gpu {
    pub(super) fn copy_out(&self, from: Slice) -> Result<Box<dyn Later>> {
        let bytes = from.bytes;
        let kept = {
            let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
            idle.iter().position(|buffer| buffer.size() >= bytes).map(|at| idle.swap_remove(at))
        };
        let buffer = match kept {
            Some(buffer) => buffer,
            None => {
                let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
                let (label, size) = (Some("later"), bytes.next_power_of_two().max(256));
                let descriptor = wgpu::BufferDescriptor { label, size, usage, mapped_at_creation: false };
                self.scoped("readback", size, || self.device.create_buffer(&descriptor))?
            }
        };
        let (tell, told) = channel();
        let submission = self.scoped("reading back", bytes, || {
            let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            encoder.copy_buffer_to_buffer(&self.buffer(from.buffer), from.offset, &buffer, 0, bytes);
            let submission = self.queue.submit([encoder.finish()]);
            buffer.slice(..bytes).map_async(wgpu::MapMode::Read, move |mapped| {
                let _ = tell.send(mapped);
            });
            submission
        })?;
        let (device, lost, idle) = (self.device.clone(), self.lost.clone(), self.idle.clone());
        Ok(Box::new(Copy { buffer, device, lost, idle, submission, told, bytes }))
    }
}

impl Later for Copy {
    fn get(self: Box<Self>) -> Result<Vec<u8>> {
        let wait = wgpu::PollType::Wait { submission_index: Some(self.submission.clone()), timeout: Some(PATIENCE) };
        // As in `Gpu::poll`: wgpu panics when the device is lost while it waits.
        let polled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.device.poll(wait)));
        let lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match (lost, polled) {
            (Some(text), _) => return Err(Error::DeviceLost(text)),
            (None, Ok(Ok(_))) => {}
            (None, Ok(Err(e))) => return Err(Error::Device(e.to_string())),
            (None, Err(_)) => return Err(Error::DeviceLost("while waiting for it".to_owned())),
        }
        // Another thread's poll may be the one that answers, a moment after ours returns.
        match self.told.recv_timeout(PATIENCE) {
            Ok(Ok(())) => {}
            _ => return Err(Error::DeviceLost("a readback was not answered".to_owned())),
        }
        let mapped = self.buffer.slice(..self.bytes).get_mapped_range().map_err(|e| Error::Device(e.to_string()))?;
        let bytes = mapped.to_vec();
        drop(mapped);
        self.buffer.unmap();
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(self.buffer);
        Ok(bytes)
    }
}
