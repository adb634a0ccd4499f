//! What a kernel's case needs: uneven numbers, buffers with guards, matrices in every format.

use crate::device::{Buffer, Device};
use crate::error::Result;
use crate::format::Format;
use crate::ops::{Experts, NormLinear, Step, Weight, WeightBytes};
use crate::program::{Program, Slice};
use std::sync::Arc;

/// Words behind an output that nobody may write.
const GUARD: u64 = 16;

/// A small seeded generator: every value differs from its neighbours, signs and magnitudes are mixed.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        // SplitMix64, https://prng.di.unimi.it/splitmix64.c
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Between -2 and 2, with a full mantissa.
    pub(super) fn f32(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 22) as f32 - 2.0
    }

    pub(super) fn f32s(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.f32()).collect()
    }

    pub(super) fn bf16s(&mut self, n: usize) -> Vec<u8> {
        (0..n).flat_map(|_| half::bf16::from_f32(self.f32()).to_le_bytes()).collect()
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }

    /// FP8 without NaN; `mask` takes bits away.
    fn fp8s(&mut self, n: usize, mask: u8) -> Vec<u8> {
        self.bytes(n).into_iter().map(|b| if b & 0x7f == 0x7f { b - 1 } else { b } & mask).collect()
    }

    /// Uneven scales around 2^-12.
    fn scales(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.f32().abs() + 0.1) / 4096.0).collect()
    }

    /// The bytes of `rows` rows of `k` elements.
    fn weight<R>(&mut self, format: Format, [rows, k]: [usize; 2], make: impl FnOnce(&WeightBytes<'_>) -> R) -> R {
        let (n_codes, n_scales) = (format.row_bytes(k) * rows, format.scale_bytes(k) * rows);
        let codes = match format {
            Format::Bf16 => self.bf16s(rows * k),
            Format::Fp8 | Format::Fp8Blocks => self.fp8s(n_codes, 0xff),
            _ => self.bytes(n_codes),
        };
        let scales = match format {
            Format::Fp8Blocks => bytemuck::cast_slice(&self.scales(n_scales / 4)).to_vec(),
            Format::Nvfp4 => self.fp8s(n_scales, 0x7f),
            // Over a few binades around 2^-6, as trained weights'.
            _ => (0..n_scales).map(|_| 119 + self.below(5) as u8).collect(),
        };
        let row_scales = if format.has_row_scale() { self.scales(rows) } else { Vec::new() };
        make(&WeightBytes { codes: &[&codes], scales: &[&scales], row_scales: &row_scales })
    }

    /// The numbers below `n` in some order.
    pub(super) fn shuffled(&mut self, n: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..n).collect();
        (0..n).for_each(|i| all.swap(i, i + self.below(n - i)));
        all
    }
}

/// The buffers of one case on one device.
pub(super) struct Bench<'a> {
    device: &'a Arc<dyn Device>,
    buffers: Vec<Buffer>,
    weights: Vec<Weight>,
}

impl<'a> Bench<'a> {
    pub(super) fn new(device: &'a Arc<dyn Device>) -> Self {
        Self { device, buffers: Vec::new(), weights: Vec::new() }
    }

    /// Whether the device binds what fused launches need.
    pub(super) fn fuses(&self) -> bool {
        self.device.limits().max_storage_buffers >= NormLinear::BINDINGS
    }

    pub(super) fn input<T: bytemuck::NoUninit>(&mut self, data: &[T]) -> Result<Slice> {
        let buffer = Buffer::with_bytes(self.device, "verify", bytemuck::cast_slice(data))?;
        let slice = buffer.slice();
        self.buffers.push(buffer);
        Ok(slice)
    }

    /// `n` words of NaN, and a guard behind them: what nobody writes is noticed.
    pub(super) fn output(&mut self, n: usize) -> Result<Slice> {
        self.guarded(&vec![f32::NAN; n])
    }

    /// Data that a kernel updates, and a guard behind it.
    pub(super) fn guarded(&mut self, data: &[f32]) -> Result<Slice> {
        let mut words = data.to_vec();
        words.resize(data.len() + GUARD as usize, f32::NAN);
        Ok(self.input(&words)?.head(data.len() as u64 * 4))
    }

    pub(super) fn step(&mut self, tokens: usize) -> Result<Slice> {
        self.input(&[Step { tokens: tokens as u32, pad: [0; 3] }])
    }

    /// Keep a weight as long as the bench.
    pub(super) fn keep(&mut self, weight: Weight) {
        self.weights.push(weight);
    }

    /// A random matrix.
    pub(super) fn matrix(&self, random: &mut Random, format: Format, [n, k]: [usize; 2]) -> Result<Weight> {
        random.weight(format, [n, k], |bytes| {
            Weight::matrix(self.device, "verify", format, [n, k].map(|n| n as u32), bytes)
        })
    }

    /// A random matrix for each of `e` experts, with biases.
    pub(super) fn experts(&mut self, random: &mut Random, format: Format, [e, n, k]: [usize; 3]) -> Result<Experts> {
        let weight = random.weight(format, [e * n, k], |bytes| {
            Weight::experts(self.device, "verify", format, [e, n, k].map(|n| n as u32), bytes)
        })?;
        let bias = Some(self.input(&random.bf16s(e * n))?);
        Ok(Experts { weight, bias, input_scale: None })
    }

    /// Run, and read the outputs. `Err` of the inner one: a guard was written over.
    pub(super) fn run(
        &self,
        program: &Program,
        outputs: &[Slice],
    ) -> Result<std::result::Result<Vec<Vec<u32>>, String>> {
        self.device.run(program)?;
        let mut all = Vec::new();
        for (i, &slice) in outputs.iter().enumerate() {
            let whole = Slice { bytes: slice.bytes + GUARD * 4, ..slice };
            let mut words = vec![0u32; (whole.bytes / 4) as usize];
            self.device.read(whole, bytemuck::cast_slice_mut(&mut words))?;
            let guard = words.split_off((slice.bytes / 4) as usize);
            if guard.iter().any(|w| *w != f32::NAN.to_bits()) {
                return Ok(Err(format!("output {i}: written past its end")));
            }
            all.push(words);
        }
        Ok(Ok(all))
    }
}
