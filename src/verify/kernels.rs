//! Every kernel against its twin, and every row of a kernel alone and among others.

use super::bench::{Bench, Random};
use super::cases::{Case, Output, cases};
use super::{Line, Part};
use crate::device::{Device, Limits, cpu::Cpu};
use crate::error::Result;
use crate::program::Launch;
use std::sync::Arc;
use std::time::Instant;

/// Rows that every case has.
pub(super) const ROWS: usize = 64;

/// Rows of a step, on both sides of where tiles change, for the comparison with the twins.
const STEPS: [usize; 5] = [1, 3, 5, 17, ROWS];

/// The same for the comparison of rows with themselves.
const COUNTS: [usize; 12] = [1, 1, 2, 3, 4, 7, 8, 9, 16, 17, 33, ROWS];

/// Outputs of a run, or a guard that was written over.
type Outputs = std::result::Result<Vec<(Output, Vec<u32>)>, String>;

impl Case {
    /// Run the case over some of its rows.
    fn run(&self, device: &Arc<dyn Device>, which: &[usize]) -> Result<Outputs> {
        let mut bench = Bench::new(device);
        let (program, outputs) = (self.record)(&mut bench, which)?;
        let slices: Vec<_> = outputs.iter().map(|o| o.slice).collect();
        Ok(bench.run(&program, &slices)?.map(|words| outputs.into_iter().zip(words).collect()))
    }
}

/// One line for each kernel: what it gives, held to what its twin gives.
pub(super) fn against_twins(device: &Arc<dyn Device>, done: &mut dyn FnMut(Line)) -> Result<()> {
    let twins: Arc<dyn Device> = Arc::new(Cpu::default());
    each_kernel(Part::Kernels, device, done, |case, line| {
        for count in STEPS {
            let which: Vec<usize> = (0..count).collect();
            let found = match (case.run(device, &which)?, case.run(&twins, &which)?) {
                (Err(why), _) | (_, Err(why)) => Some(why),
                (Ok(got), Ok(want)) => got.iter().zip(&want).enumerate().find_map(|(i, ((output, got), (_, want)))| {
                    output.differs(got, want, case.tolerance).map(|how| format!("output {i}: {how}"))
                }),
            };
            line.add(found.map(|how| format!("{} of {count} rows, {how}", case.what)));
        }
        Ok(())
    })
}

/// One line for each kernel that computes rows: the bits of a row alone and among others, in any order.
pub(super) fn by_rows(device: &Arc<dyn Device>, done: &mut dyn FnMut(Line)) -> Result<()> {
    each_kernel(Part::Rows, device, done, |case, line| {
        if !case.by_row {
            return Ok(());
        }
        let all: Vec<usize> = (0..ROWS).collect();
        let whole = match case.run(device, &all)? {
            Ok(whole) => whole,
            Err(why) => {
                line.add(Some(format!("{}: {why}", case.what)));
                return Ok(());
            }
        };
        let mut random = Random(1);
        for count in COUNTS {
            let mut which = random.shuffled(ROWS);
            which.truncate(count);
            let some = case.run(device, &which)?;
            let found = some.map_or_else(Some, |some| {
                whole.iter().zip(&some).find_map(|((output, whole), (_, some))| {
                    let width = output.width?;
                    let row = |words: &[u32], i: usize| words[i * width..][..width].to_vec();
                    let other = which.iter().enumerate().find(|(i, at)| row(some, *i) != row(whole, **at))?;
                    Some(format!("row {} among {ROWS} and among {count} has other bits", other.1))
                })
            });
            line.add(found.map(|how| format!("{}: {how}", case.what)));
        }
        Ok(())
    })
}

fn each_kernel(
    part: Part,
    device: &Arc<dyn Device>,
    done: &mut dyn FnMut(Line),
    check: impl Fn(&Case, &mut Line) -> Result<()>,
) -> Result<()> {
    for (kernel, cases) in cases(device.limits().matrix) {
        let (start, mut line) = (Instant::now(), Line::new(part, kernel));
        for case in &cases {
            check(case, &mut line)?;
        }
        if line.cases > 0 {
            line.elapsed = start.elapsed();
            done(line);
        }
    }
    Ok(())
}

/// Every launch of every case as a device with matrix units would get it: a test holds them to the tables of kernels.
///
/// # Errors
/// Where a case cannot be recorded.
#[doc(hidden)]
pub fn covered() -> Result<Vec<Launch>> {
    let limits = Limits { matrix: true, ..Cpu::default().limits() };
    let device: Arc<dyn Device> = Arc::new(Cpu::with_limits(limits));
    let mut launches = Vec::new();
    for case in cases(true).into_iter().flat_map(|(_, cases)| cases) {
        for count in COUNTS {
            let which: Vec<usize> = (0..count).collect();
            launches.extend((case.record)(&mut Bench::new(&device), &which)?.0.launches);
        }
    }
    Ok(launches)
}
