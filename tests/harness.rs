//! Devices to test on, uneven inputs, and the comparison that every kernel test uses.

use fourfold::Gpu;
use fourfold::device::{Buffer, Device, cpu::Cpu, gpu};
use fourfold::ops::Weight;
use fourfold::program::{Program, Slice};
use std::sync::{Arc, OnceLock};

/// A name and a device.
pub type Named = (&'static str, Arc<dyn Device>);

/// The twins.
pub fn cpu() -> Arc<dyn Device> {
    Arc::new(Cpu::default())
}

/// The GPU as it is, and as lesser adapters would be: no subgroups, checked shaders. Empty where there is none.
///
/// # Panics
/// With `REQUIRE_GPU` set and no adapter: CI must not pass without having run a kernel.
pub fn gpus() -> &'static [Named] {
    static GPUS: OnceLock<Vec<Named>> = OnceLock::new();
    GPUS.get_or_init(|| {
        let plain = gpu::Options {
            adapter: std::env::var("FOURFOLD_TEST_ADAPTER").ok(),
            pipeline_cache: gpu::PipelineCache::Off,
            without_matrix_units: true,
            ..Default::default()
        };
        let no_subgroups = gpu::Options { without_subgroups: true, ..plain.clone() };
        let checked = gpu::Options { checked_shaders: true, ..plain.clone() };
        let table = gpu::Options { table_decode: true, ..plain.clone() };
        let variants = [
            ("gpu", plain),
            ("gpu without subgroups", no_subgroups),
            ("gpu, checked shaders", checked),
            ("gpu, codes by a table", table),
        ];
        let mut found: Vec<Named> = Vec::new();
        for (name, options) in variants {
            match Gpu::open(&options) {
                Ok(gpu) => {
                    eprintln!("testing on {name}: {} {:?}", gpu.describe(), gpu.facts());
                    found.push((name, Arc::new(gpu)));
                }
                Err(e) => {
                    assert!(std::env::var_os("REQUIRE_GPU").is_none(), "REQUIRE_GPU is set, but: {e}");
                    eprintln!("SKIPPED: no kernel is run: {e}");
                    break;
                }
            }
        }
        found
    })
}

/// The GPU with its matrix units, if it has any: with `REQUIRE_MATRIX` set it must.
pub fn matrix_gpu() -> Option<Arc<dyn Device>> {
    gpu()?;
    let options = gpu::Options {
        adapter: std::env::var("FOURFOLD_TEST_ADAPTER").ok(),
        pipeline_cache: gpu::PipelineCache::Off,
        ..Default::default()
    };
    let gpu: Arc<dyn Device> = Arc::new(Gpu::open(&options).expect("it opened without matrix units"));
    if !gpu.limits().matrix {
        let why = format!("{} has no matrix units that kernels here can take", gpu.describe());
        assert!(std::env::var_os("REQUIRE_MATRIX").is_none(), "REQUIRE_MATRIX is set, but {why}");
        eprintln!("SKIPPED: {why}");
        return None;
    }
    Some(gpu)
}

/// The GPU as it is, without matrix units.
pub fn gpu() -> Option<Arc<dyn Device>> {
    gpus().first().map(|(_, gpu)| gpu.clone())
}

/// A GPU that binds at most `bytes`, so that weights are split.
pub fn small_binding_gpu(bytes: u64) -> Option<Arc<dyn Device>> {
    gpu()?;
    let adapter = std::env::var("FOURFOLD_TEST_ADAPTER").ok();
    let pipeline_cache = gpu::PipelineCache::Off;
    let options = gpu::Options {
        adapter,
        max_binding_bytes: Some(bytes),
        pipeline_cache,
        without_matrix_units: true,
        ..Default::default()
    };
    Some(Arc::new(Gpu::open(&options).expect("it opened before")))
}

/// A small seeded generator: every value differs from its neighbours, signs and magnitudes are mixed.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        // SplitMix64, https://prng.di.unimi.it/splitmix64.c
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Roughly normal, standard deviation 1.
    pub fn normal(&mut self) -> f32 {
        let sum: f64 = (0..12).map(|_| self.next() as f64 / u64::MAX as f64).sum();
        (sum - 6.0) as f32
    }

    pub fn f32s(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }

    pub fn bf16s(&mut self, n: usize) -> Vec<u8> {
        (0..n).flat_map(|_| half::bf16::from_f32(self.normal()).to_le_bytes()).collect()
    }

    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }
}

/// Buffers of one test on one device.
pub struct Bench {
    pub device: Arc<dyn Device>,
    buffers: Vec<Buffer>,
    weights: Vec<Weight>,
}

/// Words after an output that nobody may write.
const GUARD: u64 = 16;

impl Bench {
    pub fn new(device: &Arc<dyn Device>) -> Self {
        Self { device: device.clone(), buffers: Vec::new(), weights: Vec::new() }
    }

    pub fn input<T: bytemuck::NoUninit>(&mut self, data: &[T]) -> Slice {
        let buffer = Buffer::with_bytes(&self.device, "input", bytemuck::cast_slice(data)).unwrap();
        let slice = buffer.slice();
        self.buffers.push(buffer);
        slice
    }

    /// `n` words of NaN, and a guard behind them.
    pub fn output(&mut self, n: usize) -> Slice {
        self.guarded(&vec![f32::NAN; n])
    }

    /// Data that a kernel updates, and a guard behind it.
    pub fn guarded(&mut self, data: &[f32]) -> Slice {
        let mut words = data.to_vec();
        words.resize(data.len() + GUARD as usize, f32::NAN);
        self.input(&words).head(data.len() as u64 * 4)
    }

    /// Keep a weight as long as the bench.
    pub fn keep(&mut self, weight: Weight) {
        self.weights.push(weight);
    }

    pub fn words(&self, slice: Slice) -> Vec<u32> {
        let mut words = vec![0u32; (slice.bytes / 4) as usize];
        self.device.read(slice, bytemuck::cast_slice_mut(&mut words)).unwrap();
        words
    }

    /// Run, and read an output. Its guard must be untouched.
    pub fn run(&self, program: &Program, outputs: &[Slice]) -> Vec<Vec<u32>> {
        self.device.run(program).unwrap();
        outputs
            .iter()
            .map(|&slice| {
                let guarded = self.words(Slice { bytes: slice.bytes + GUARD * 4, ..slice });
                let (words, guard) = guarded.split_at((slice.bytes / 4) as usize);
                assert!(guard.iter().all(|w| *w == f32::NAN.to_bits()), "the kernel wrote past its output");
                words.to_vec()
            })
            .collect()
    }
}

pub fn floats(words: &[u32]) -> Vec<f32> {
    words.iter().map(|w| f32::from_bits(*w)).collect()
}

/// How far `got` is from `want`: (relative L2, largest difference over largest value). NaN in either is infinitely far.
pub fn distance(got: &[f32], want: &[f32]) -> (f64, f64) {
    assert_eq!(got.len(), want.len(), "lengths differ");
    let (mut difference, mut norm, mut largest, mut most) = (0.0f64, 0.0f64, 0.0f64, 0.0f64);
    for (g, w) in got.iter().zip(want) {
        let (g, w) = (f64::from(*g), f64::from(*w));
        if !g.is_finite() || !w.is_finite() {
            return (f64::INFINITY, f64::INFINITY);
        }
        difference += (g - w) * (g - w);
        norm += w * w;
        largest = largest.max((g - w).abs());
        most = most.max(w.abs());
    }
    let over = |a: f64, b: f64| if a == 0.0 { 0.0 } else { a / b };
    (over(difference.sqrt(), norm.sqrt()), over(largest, most))
}

/// Both distances are within `tolerance`.
#[track_caller]
pub fn assert_near(what: &str, got: &[u32], want: &[u32], tolerance: f64) {
    let (l2, max) = distance(&floats(got), &floats(want));
    assert!(
        l2 <= tolerance && max <= tolerance,
        "{what}: relative L2 {l2:.2e}, max {max:.2e}, allowed {tolerance:.2e}"
    );
}

/// Rounding of a sum of `k` products in f32, order unknown: relative to the result's size for random signs, with room
/// for a result that cancels to a third of its terms' size.
pub fn sum_tolerance(k: usize) -> f64 {
    3.0 * f64::from(f32::EPSILON) * (k as f64).sqrt().max(2.0)
}

#[test]
fn one_corrupted_element_is_noticed() {
    let want = Random(1).f32s(1000);
    assert_eq!(distance(&want, &want), (0.0, 0.0));
    for at in [0, 499, 999] {
        let mut got = want.clone();
        got[at] += 1e-3;
        let (_, max) = distance(&got, &want);
        assert!(max > sum_tolerance(2880), "{max}");
        got[at] = f32::NAN;
        assert_eq!(distance(&got, &want), (f64::INFINITY, f64::INFINITY));
    }
}
