//! The device that needs no GPU: buffers in host memory, programs run on the twins.

use super::{Device, Limits, next_id};
use crate::error::{Error, Result};
use crate::ops::Views;
use crate::program::{BufferId, Program, Slice};
use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

type Words = Arc<RwLock<Vec<u32>>>;

/// Host memory and the twins.
#[derive(Debug)]
pub struct Cpu {
    buffers: RwLock<HashMap<BufferId, Words>>,
    limits: Limits,
}

impl Default for Cpu {
    fn default() -> Self {
        Self::with_limits(Limits {
            max_binding_bytes: u64::MAX,
            max_grid: u32::MAX,
            max_storage_buffers: u32::MAX,
            matrix: false,
            laid_out: false,
        })
    }
}

/// A locked slice of a launch.
enum Locked<'a> {
    Read(RwLockReadGuard<'a, Vec<u32>>),
    Write(RwLockWriteGuard<'a, Vec<u32>>),
}

impl Cpu {
    /// A device that pretends to have a GPU's limits.
    pub fn with_limits(limits: Limits) -> Self {
        Self { buffers: RwLock::default(), limits }
    }

    fn words(&self, id: BufferId) -> Words {
        let buffers = self.buffers.read().unwrap_or_else(PoisonError::into_inner);
        buffers.get(&id).expect("the buffer was allocated here and not freed").clone()
    }
}

fn range(slice: Slice) -> std::ops::Range<usize> {
    (slice.offset / 4) as usize..((slice.offset + slice.bytes) / 4) as usize
}

impl Device for Cpu {
    fn alloc(&self, label: &str, bytes: u64) -> Result<BufferId> {
        let mut words: Vec<u32> = Vec::new(); // asks whether there is room, without taking it
        let hint = "use a smaller context, or a smaller model";
        words.try_reserve_exact((bytes / 4) as usize).map_err(|_| Error::OutOfMemory {
            what: label.to_owned(),
            bytes,
            hint,
        })?;
        drop(words);
        // Zeroed by the operating system as pages are touched: a cache costs what is used of it.
        let words = vec![0u32; (bytes / 4) as usize];
        let id = next_id();
        let mut buffers = self.buffers.write().unwrap_or_else(PoisonError::into_inner);
        buffers.insert(id, Arc::new(RwLock::new(words)));
        Ok(id)
    }

    fn free(&self, id: BufferId) {
        self.buffers.write().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }

    fn write(&self, to: Slice, bytes: &[u8]) -> Result<()> {
        let words = self.words(to.buffer);
        let mut words = words.write().unwrap_or_else(PoisonError::into_inner);
        bytemuck::cast_slice_mut::<u32, u8>(&mut words[range(to)])[..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn read(&self, from: Slice, bytes: &mut [u8]) -> Result<()> {
        let words = self.words(from.buffer);
        let words = words.read().unwrap_or_else(PoisonError::into_inner);
        bytes.copy_from_slice(&bytemuck::cast_slice::<u32, u8>(&words[range(from)])[..bytes.len()]);
        Ok(())
    }

    fn prepare(&self, _: &Program) -> Result<()> {
        Ok(())
    }

    fn run(&self, program: &Program) -> Result<()> {
        for launch in &program.launches {
            // A launch binds a buffer once, so its locks cannot wait for each other.
            let held: Vec<Words> = launch.args.iter().map(|arg| self.words(arg.slice.buffer)).collect();
            let mut locked: Vec<Locked<'_>> = launch
                .args
                .iter()
                .zip(&held)
                .map(|(arg, words)| match crate::ops::is_written(arg.access) {
                    false => Locked::Read(words.read().unwrap_or_else(PoisonError::into_inner)),
                    true => Locked::Write(words.write().unwrap_or_else(PoisonError::into_inner)),
                })
                .collect();
            let mut views = Views::default();
            for (arg, locked) in launch.args.iter().zip(&mut locked) {
                match locked {
                    Locked::Read(words) => views.add_read(arg.name, &words[range(arg.slice)]),
                    Locked::Write(words) => views.add_write(arg.name, &mut words[range(arg.slice)]),
                }
            }
            launch.op.twin(program.tokens as usize, &mut views);
        }
        Ok(())
    }

    fn wait(&self) -> Result<()> {
        Ok(())
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn describe(&self) -> String {
        "CPU twins".to_owned()
    }
}
