//! Every scale of a checkpoint that is no finite number above zero. The engine stops at the first; here all are listed.
//! (compressed-tensors#595: 14 of 92,400 scales were infinite.) E8M0 scales are `scales.rs`'s.

use super::kinds;
use fourfold::checkpoint::{Checkpoint, Dtype, ScaleOrder, TensorView};
use fourfold::format::{bf16, nvfp4};

/// Bad scales that are listed; the rest is counted.
pub(super) const LISTED: usize = 20;

/// What a walk over all scales found.
#[derive(Default)]
pub(super) struct Walk {
    pub(super) n_tensors: u64,
    pub(super) n_scales: u64,
    pub(super) n_bad: u64,
    /// The first of them, [`LISTED`] at most.
    pub(super) bad: Vec<Bad>,
    /// NVFP4 block scales of 0 whose blocks hold codes: they count as zeros. How many, and the first.
    pub(super) n_lost: u64,
    pub(super) first_lost: Option<String>,
}

/// A scale that is no finite number above zero.
pub(super) struct Bad {
    pub(super) file: String,
    pub(super) tensor: String,
    /// Name, place, value.
    pub(super) row: Vec<String>,
}

impl Walk {
    pub(super) fn over(checkpoint: &Checkpoint, order: ScaleOrder) -> Self {
        let mut walk = Self::default();
        for view in checkpoint.tensors().filter(|view| kinds::is_scale(view.name)) {
            match view.dtype {
                Dtype::F8E4M3 => {
                    // Swizzled scales do not lie as their codes do.
                    let codes = kinds::codes(checkpoint, view.name).filter(|_| order == ScaleOrder::Linear);
                    walk.blocks(&view, codes);
                }
                Dtype::F32 => walk.floats(&view, view.bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b))),
                Dtype::Bf16 => {
                    let halves = view.bytes.as_chunks().0.iter();
                    walk.floats(&view, halves.map(|b| bf16::decode(u16::from_le_bytes(*b))));
                }
                _ => {}
            }
        }
        walk
    }

    fn count(&mut self, scales: usize) {
        self.n_tensors += 1;
        self.n_scales += scales as u64;
    }

    fn add(&mut self, view: &TensorView<'_>, position: usize, value: &str) {
        self.n_bad += 1;
        if self.bad.len() < LISTED {
            let row = vec![view.name.to_owned(), format!("{:?}", place(position, view.shape)), value.to_owned()];
            self.bad.push(Bad { file: view.file.to_owned(), tensor: view.name.to_owned(), row });
        }
    }

    fn floats(&mut self, view: &TensorView<'_>, values: impl ExactSizeIterator<Item = f32>) {
        self.count(values.len());
        let divides = view.name.ends_with("_global_scale");
        for (i, value) in values.enumerate() {
            if !(value.is_finite() && value > 0.0) {
                self.add(view, i, &value.to_string());
            } else if divides && !(1.0 / value).is_finite() {
                self.add(view, i, &format!("{value:e}, whose inverse is infinite"));
            }
        }
    }

    /// E4M3: block scales, of which 0 is one that tiny blocks may have.
    fn blocks(&mut self, view: &TensorView<'_>, codes: Option<TensorView<'_>>) {
        self.count(view.bytes.len());
        // Most files have nothing to look at: whole chunks are tested without a branch a byte.
        let odd = |s: u8| s > 0x7e || s == 0;
        let codes = codes.filter(|codes| codes.bytes.len() == view.bytes.len() * nvfp4::BLOCK_BYTES);
        for (chunk_idx, chunk) in view.bytes.chunks(256).enumerate() {
            if !chunk.iter().fold(false, |any, &s| any | odd(s)) {
                continue;
            }
            for (i, &s) in chunk.iter().enumerate().filter(|(_, s)| odd(**s)) {
                let position = 256 * chunk_idx + i;
                match s {
                    0 => {
                        let codes = codes.map(|codes| &codes.bytes[position * nvfp4::BLOCK_BYTES..]);
                        // 0 and 8 are zero and minus zero, twice a byte.
                        let holds = |codes: &[u8]| codes[..nvfp4::BLOCK_BYTES].iter().any(|byte| byte & 0x77 != 0);
                        if codes.is_some_and(holds) {
                            self.n_lost += 1;
                            let name = || format!("{} {:?}", view.name, place(position, view.shape));
                            self.first_lost.get_or_insert_with(name);
                        }
                    }
                    0x7f | 0xff => self.add(view, position, &format!("NaN ({s:#04x})")),
                    0x80 => self.add(view, position, "-0 (0x80)"),
                    _ => self.add(view, position, &format!("negative ({s:#04x})")),
                }
            }
        }
    }
}

/// Where the element at `position` stands in a tensor of this shape.
pub(super) fn place(position: usize, shape: &[usize]) -> Vec<usize> {
    let mut rest = position;
    let mut place: Vec<usize> = shape.iter().rev().map(|&n| (rest % n, rest /= n).0).collect();
    place.reverse();
    place
}
