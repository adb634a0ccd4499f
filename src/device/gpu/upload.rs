//! Large writes: host memory → a ring of mapped staging buffers → the device.
//!
//! All cores fill one staging buffer, which for a mapped file is what takes the time: its pages are met for the first
//! time. Meanwhile the device copies out of the others. Copies are submitted before the write returns, so that whatever
//! is submitted later comes after them.

use super::{Gpu, PATIENCE};
use crate::error::{Error, Result};
use crate::ops::Layout;
use crate::program::Slice;
use std::sync::PoisonError;
use std::sync::mpsc::{Receiver, channel};

/// Writes of this many bytes or fewer go with the queue's own, which costs no buffers of ours.
pub(super) const SMALL: usize = 1 << 20;
/// Staging buffers.
const SLOTS: usize = 4;
/// Bytes of the largest staging buffer.
const SLOT: usize = 32 << 20;
/// A thread fills no less than this.
const SHARE: usize = 1 << 20;
/// More threads than this do not copy faster.
const THREADS: usize = 8;

/// Staging buffers that take turns.
#[derive(Debug)]
pub(super) struct Ring {
    slots: Vec<Slot>,
    next: usize,
    /// Bytes of each.
    bytes: usize,
}

#[derive(Debug)]
struct Slot {
    buffer: wgpu::Buffer,
    /// The copy out of it that may still run, and the word that it can be filled again; none if it can be filled now.
    busy: Option<(wgpu::SubmissionIndex, Receiver<Result<(), wgpu::BufferAsyncError>>)>,
}

impl Gpu {
    /// Copy pieces, one behind the other, to the head of a slice; zeros fill up the last word. Codes are laid out on the way, in
    /// pieces of whole words.
    pub(super) fn upload(&self, to: Slice, pieces: &[&[u8]], layout: Layout) -> Result<()> {
        let starts: Vec<usize> = pieces
            .iter()
            .scan(0, |end, piece| {
                let start = *end;
                *end += piece.len();
                Some(start)
            })
            .collect();
        let bytes = starts.last().map_or(0, |last| last + pieces[pieces.len() - 1].len());
        let target = self.buffer(to.buffer);
        let mut kept = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        // Taken out: after an error there is no ring, and the next write makes another.
        let mut ring = match kept.take() {
            Some(ring) if ring.bytes >= bytes.min(SLOT) => ring,
            _ => self.ring(bytes.next_power_of_two().min(SLOT))?,
        };
        let mut from = 0;
        while from < bytes {
            let count = ring.bytes.min(bytes - from);
            let slot = &mut ring.slots[ring.next];
            ring.next = (ring.next + 1) % SLOTS;
            self.free_again(slot)?;
            let padded = count.next_multiple_of(4) as u64;
            if let Err(e) = fill(&slot.buffer, padded, from, (pieces, &starts), layout) {
                self.probe()?;
                return Err(e);
            }
            slot.buffer.unmap();
            let offset = to.offset + from as u64;
            let (tell, told) = channel();
            let submitted = self.scoped("copying to the device", padded, || {
                let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
                encoder.copy_buffer_to_buffer(&slot.buffer, 0, &target, offset, padded);
                let submitted = self.queue.submit([encoder.finish()]);
                slot.buffer.slice(..).map_async(wgpu::MapMode::Write, move |mapped| {
                    let _ = tell.send(mapped);
                });
                submitted
            })?;
            slot.busy = Some((submitted, told));
            from += count;
        }
        *kept = Some(ring);
        Ok(())
    }

    fn ring(&self, bytes: usize) -> Result<Ring> {
        let descriptor = wgpu::BufferDescriptor {
            label: Some("staging"),
            size: bytes as u64,
            usage: wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: true,
        };
        let slot = |_| {
            let made = self.scoped("staging", bytes as u64, || self.device.create_buffer(&descriptor));
            made.map(|buffer| Slot { buffer, busy: None })
        };
        Ok(Ring { slots: (0..SLOTS).map(slot).collect::<Result<_>>()?, next: 0, bytes })
    }

    /// Wait until a staging buffer can be filled again.
    fn free_again(&self, slot: &mut Slot) -> Result<()> {
        let Some((submitted, told)) = slot.busy.take() else { return Ok(()) };
        self.poll_for(Some(submitted))?;
        // Another thread's poll may be the one that answers, a moment after ours returns.
        match told.recv_timeout(PATIENCE) {
            Ok(Ok(())) => Ok(()),
            _ => Err(Error::DeviceLost("a staging buffer did not come back".to_owned())),
        }
    }
}

/// Fill the first `bytes` bytes of a mapped buffer with what stands from byte `from` on in the pieces, which begin at
/// `starts`, and with zeros behind them; in several threads.
fn fill(
    buffer: &wgpu::Buffer,
    bytes: u64,
    from: usize,
    (pieces, starts): (&[&[u8]], &[usize]),
    layout: Layout,
) -> Result<()> {
    debug_assert!(!matches!(layout, Layout::Scales(_)), "scales do not stay in their words");
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = cores.min(THREADS).min(bytes as usize / SHARE).max(1) as u64;
    let share = bytes.div_ceil(threads).next_multiple_of(64);
    let copy = |first: u64, mut to: wgpu::BufferViewMut| {
        let mut to = to.slice(..);
        let mut at = from + first as usize;
        let mut idx = starts.partition_point(|start| *start <= at).saturating_sub(1);
        while let Some(piece) = pieces.get(idx).filter(|_| !to.is_empty()) {
            let piece = &piece[at - starts[idx]..];
            let count = piece.len().min(to.len());
            // A little at a time: staging memory may not be read.
            let mut some = [0; 4096];
            let step = if layout == Layout::Stored { count.max(1) } else { some.len() };
            for piece in piece[..count].chunks(step) {
                let Some(mut head) = to.split_off(..piece.len()) else { break };
                if layout == Layout::Stored {
                    head.copy_from_slice(piece);
                } else {
                    layout.put(piece, &mut some[..piece.len()]);
                    head.copy_from_slice(&some[..piece.len()]);
                }
            }
            at += count;
            idx += 1;
        }
        to.fill(0);
    };
    let view = |first: u64| {
        let view = buffer.slice(first..bytes.min(first + share)).get_mapped_range_mut();
        view.map_err(|e| Error::Device(e.to_string()))
    };
    std::thread::scope(|scope| {
        for first in (share..bytes).step_by(share as usize) {
            let to = view(first)?;
            scope.spawn(move || copy(first, to));
        }
        copy(0, view(0)?);
        Ok(())
    })
}
