//! A device whose next buffers are there already: so a whole model is known to fit before any of it is uploaded.

use super::{Device, Limits, See};
use crate::error::{Error, Result};
use crate::ops::Layout;
use crate::program::{BufferId, Program, Slice};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Another device, of which some buffers are taken. Allocations get them in their order.
#[derive(Debug)]
pub struct Reserved {
    device: Arc<dyn Device>,
    waiting: Mutex<VecDeque<(BufferId, u64)>>,
}

impl Reserved {
    /// Allocate buffers, given as label and bytes. Dropped, this gives back what nobody has taken over.
    ///
    /// # Errors
    /// The first allocation that failed, and the bytes of those before it, which are given back.
    pub fn new(device: &Arc<dyn Device>, wanted: &[(String, u64)]) -> Result<Self, (Error, u64)> {
        let reserved = Self { device: device.clone(), waiting: Mutex::default() };
        let mut done = 0;
        for (label, bytes) in wanted {
            let id = device.alloc(label, *bytes).map_err(|e| (e, done))?;
            reserved.waiting.lock().unwrap_or_else(PoisonError::into_inner).push_back((id, *bytes));
            done += bytes;
        }
        Ok(reserved)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        for (id, _) in self.waiting.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            self.device.free(id);
        }
    }
}

impl Device for Reserved {
    fn alloc(&self, label: &str, bytes: u64) -> Result<BufferId> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        // Who asks for something else than was reserved gets it the usual way.
        if waiting.front().is_some_and(|(_, reserved)| *reserved == bytes)
            && let Some((id, _)) = waiting.pop_front()
        {
            return Ok(id);
        }
        self.device.alloc(label, bytes)
    }

    fn free(&self, id: BufferId) {
        self.device.free(id);
    }

    fn write(&self, to: Slice, bytes: &[u8]) -> Result<()> {
        self.device.write(to, bytes)
    }

    fn write_pieces(&self, to: Slice, pieces: &[&[u8]]) -> Result<()> {
        self.device.write_pieces(to, pieces)
    }

    fn write_laid_out(&self, to: Slice, pieces: &[&[u8]], layout: Layout) -> Result<()> {
        self.device.write_laid_out(to, pieces, layout)
    }

    fn read(&self, from: Slice, bytes: &mut [u8]) -> Result<()> {
        self.device.read(from, bytes)
    }

    fn prepare(&self, program: &Program) -> Result<()> {
        self.device.prepare(program)
    }

    fn run(&self, program: &Program) -> Result<()> {
        self.device.run(program)
    }

    fn run_seeing(&self, program: &Program, see: See<'_>) -> Result<()> {
        self.device.run_seeing(program, see)
    }

    fn time(&self, program: &Program) -> Result<Vec<f64>> {
        self.device.time(program)
    }

    fn wait(&self) -> Result<()> {
        self.device.wait()
    }

    fn limits(&self) -> Limits {
        self.device.limits()
    }

    fn describe(&self) -> String {
        self.device.describe()
    }

    fn driver(&self) -> String {
        self.device.driver()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Buffer, cpu::Cpu};

    #[test]
    fn buffers_come_in_their_order_and_leftovers_go_back() {
        let cpu: Arc<dyn Device> = Arc::new(Cpu::default());
        let wanted = [8, 12, 16].map(|bytes| (format!("{bytes} bytes"), bytes));
        let reserved = Arc::new(Reserved::new(&cpu, &wanted).unwrap());
        let ids: Vec<BufferId> = reserved.waiting.lock().unwrap().iter().map(|(id, _)| *id).collect();
        let device: Arc<dyn Device> = reserved;
        let first = Buffer::new(&device, "a", 8).unwrap();
        let other = Buffer::new(&device, "b", 4).unwrap();
        let second = Buffer::with_bytes(&device, "c", &[1; 12]).unwrap();
        assert_eq!([first.slice().buffer, second.slice().buffer], [ids[0], ids[1]]);
        assert!(!ids.contains(&other.slice().buffer));
        let mut bytes = [0; 12];
        cpu.read(second.slice(), &mut bytes).unwrap();
        assert_eq!(bytes, [1; 12]);
    }
}
