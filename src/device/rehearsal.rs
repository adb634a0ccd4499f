//! The device of a rehearsal: it keeps books instead of bytes. Loading a model on it first checks all of a checkpoint
//! before a byte is uploaded, and says what the model will take.

use super::{Device, Limits, next_id};
use crate::error::Result;
use crate::ops::Layout;
use crate::program::{BufferId, Program, Slice};
use std::sync::{Mutex, PoisonError};

/// A device with another's limits and no memory.
#[derive(Debug)]
pub struct Rehearsal {
    limits: Limits,
    describe: String,
    allocated: Mutex<Vec<(String, u64)>>,
}

impl Rehearsal {
    /// With these limits, called `describe` in messages.
    pub fn new(limits: Limits, describe: String) -> Self {
        Self { limits, describe, allocated: Mutex::default() }
    }

    /// Labels and bytes of the buffers made since the last time this was asked.
    pub fn take(&self) -> Vec<(String, u64)> {
        std::mem::take(&mut self.allocated.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Device for Rehearsal {
    fn alloc(&self, label: &str, bytes: u64) -> Result<BufferId> {
        self.allocated.lock().unwrap_or_else(PoisonError::into_inner).push((label.to_owned(), bytes));
        Ok(next_id())
    }

    fn free(&self, _: BufferId) {}

    fn write(&self, _: Slice, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn write_pieces(&self, _: Slice, _: &[&[u8]]) -> Result<()> {
        Ok(())
    }

    fn write_laid_out(&self, _: Slice, _: &[&[u8]], _: Layout) -> Result<()> {
        Ok(())
    }

    fn read(&self, _: Slice, bytes: &mut [u8]) -> Result<()> {
        bytes.fill(0);
        Ok(())
    }

    fn prepare(&self, _: &Program) -> Result<()> {
        Ok(())
    }

    fn run(&self, _: &Program) -> Result<()> {
        Ok(())
    }

    fn wait(&self) -> Result<()> {
        Ok(())
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn describe(&self) -> String {
        self.describe.clone()
    }
}
