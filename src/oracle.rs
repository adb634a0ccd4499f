//! Known-answer tests of a device: tiny programs whose results follow from exact arithmetic alone.
//!
//! A twin is a definition, and a definition can be wrong, or run on a machine that is. So nothing here asks a twin, nor
//! the decoders of `format/`: each case states its answer in integers, powers of two and literal values, records a
//! program, runs it, and compares. `fourfold oracle` runs [`Which::All`]; the engine runs [`Which::Quick`] on its device
//! and refuses one that fails ([`admit`]).

mod attention;
mod formats;
mod matmul;
mod quantised;
mod steps;

use self::attention::*;
use self::formats::*;
use self::matmul::*;
use self::quantised::*;
use self::steps::*;
use crate::device::{Buffer, Device};
use crate::error::{Error, Result};
use crate::format::{Format, e4m3, nvfp4};
use crate::ops::{
    Attention, CacheFormat, Experts, KvCache, MoeScatter, RmsNorm, Router, Routes, Row, Step, Weight, WeightBytes,
};
use crate::program::{HostStages, Program, Slice};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How much to check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// What decides whether a device can be trusted at all: six pipelines, a few milliseconds.
    Quick,
    /// Everything.
    All,
}

/// What a check is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A device's kernels, or the twins.
    Device,
    /// Scalar code on the host, which reads and writes files.
    Host,
}

/// A known-answer test.
#[derive(Clone, Copy)]
pub struct Check {
    /// Its name in tables.
    pub name: &'static str,
    /// What is wrong where it fails, in words for a user.
    pub fact: &'static str,
    /// What it is about.
    pub subject: Subject,
    /// Whether [`Which::Quick`] has it (in a shorter form).
    pub quick: bool,
    case: fn(&mut Trial<'_>) -> Result<()>,
}

/// How a check went.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The check's name.
    pub name: &'static str,
    /// What is wrong if it failed.
    pub fact: &'static str,
    /// What it was about.
    pub subject: Subject,
    /// Whether every element was right.
    pub passed: bool,
    /// The first wrong element: which, what it is, what it should be. Empty where there is none.
    pub detail: String,
    /// What the device does that it may do, such as flushing subnormal numbers.
    pub notes: Vec<&'static str>,
    /// How long it took, kernels compiled for it included.
    pub elapsed: Duration,
}

/// Every check.
pub fn checks() -> &'static [Check] {
    &CHECKS
}

/// Run the checks on a device, one after the other; those about the host are part of [`Which::All`].
///
/// # Errors
/// What the device reports. A wrong result is no error but an [`Outcome`].
pub fn run(device: &Arc<dyn Device>, which: Which) -> Result<Vec<Outcome>> {
    CHECKS.iter().filter(|check| which == Which::All || check.quick).map(|check| check.run(device, which)).collect()
}

/// Refuse a device that fails [`Which::Quick`], with what is wrong with it.
///
/// # Errors
/// [`Error::Device`] with the facts, and whatever the device itself reports.
pub fn admit(device: &Arc<dyn Device>) -> Result<()> {
    let failed: Vec<Outcome> = run(device, Which::Quick)?.into_iter().filter(|outcome| !outcome.passed).collect();
    if failed.is_empty() {
        return Ok(());
    }
    let facts: Vec<String> = failed.iter().map(|o| format!("{} ({}: {})", o.fact, o.name, o.detail)).collect();
    Err(Error::Device(format!(
        "{} computes wrongly and is not used: {}; `fourfold oracle` shows all checks; another driver or adapter may help",
        device.describe(),
        facts.join("; ")
    )))
}

impl Check {
    /// Run this check on a device.
    ///
    /// # Errors
    /// What the device reports.
    pub fn run(&self, device: &Arc<dyn Device>, which: Which) -> Result<Outcome> {
        let start = Instant::now();
        let quick = which == Which::Quick;
        let mut trial = Trial { device, quick, buffers: Vec::new(), notes: Vec::new(), first: None, n_wrong: 0 };
        (self.case)(&mut trial)?;
        let detail = trial.first.take().map_or_else(String::new, |first| match trial.n_wrong {
            1 => first,
            n => format!("{first} (and {} more)", n - 1),
        });
        Ok(Outcome {
            name: self.name,
            fact: self.fact,
            subject: self.subject,
            passed: trial.n_wrong == 0,
            detail,
            notes: trial.notes,
            elapsed: start.elapsed(),
        })
    }
}

const CHECKS: [Check; 38] = [
    kernels("uniform_fp4", "a plain sum of FP4 products is wrong", uniform_fp4).quick(),
    kernels("column_dependent", "results of a matmul land in the wrong column", column_dependent),
    kernels("element_order", "the nibbles, bytes or blocks of packed FP4 are read in the wrong order", element_order)
        .quick(),
    kernels(
        "codes_and_scales",
        "an FP4 code or a block scale decodes to a wrong value (integer shifts, masks or bitcasts are wrong)",
        codes_and_scales,
    )
    .quick(),
    kernels("smallest_normal", "f32 results of scale 2^-126 are flushed to zero", smallest_normal).quick(),
    kernels(
        "reduction_tree",
        "the sum over eight neighbouring lanes is wrong (subgroup shuffles do not pair neighbouring lanes)",
        reduction_tree,
    )
    .quick(),
    kernels(
        "nvfp4_weights",
        "an NVFP4 code, block scale or tensor scale is read from the wrong place or decodes to a wrong value",
        nvfp4_weights,
    )
    .quick(),
    kernels("nvfp4_globals", "NVFP4 experts, or gate and up, take one another's tensor scale", nvfp4_globals),
    kernels("fp8_weights", "FP8 weights or their row scales decode to wrong values", fp8_weights),
    kernels("fp8_blocks", "FP8 weights with a scale for each 128 elements decode to wrong values", fp8_blocks),
    kernels(
        "stage_activation",
        "quantising activations to FP4 rounds or clips wrongly (FP4 and FP8: nearest, ties to even)",
        stage_activation,
    )
    .quick(),
    kernels("act_scales", "activations are quantised with another row's, expert's or tensor's scale", act_scales),
    kernels("fp4_products", "products of FP4 weights and FP4 activations are wrong", fp4_products),
    kernels("bf16_embed", "bf16 values are not copied as they are", bf16_embed),
    kernels("bf16_linear", "bf16 weights decode to wrong values", bf16_linear),
    kernels("integer_sums", "sums of integers below 2^24 are not exact in f32", integer_sums),
    kernels("fused_multiply_add", "a multiply-add is worse than rounding twice", fused_multiply_add),
    kernels("router_ties", "the router does not take the largest scores, the lower expert among equals", router_ties)
        .quick(),
    kernels("router_all", "router weights over all experts do not count those that were not chosen", router_all),
    kernels("exp", "exp is off", exp).quick(),
    kernels("swiglu", "the clamped SwiGLU is off, or gate and up are mixed up", swiglu),
    kernels("silu", "SiLU of gate times up is off", silu),
    kernels("nan_stays", "NaN becomes a number on its way through the experts", nan_stays),
    kernels("experts", "an expert computes with another expert's weights, bias or input", experts),
    kernels("scatter", "the weighted sum over experts takes the wrong weight or row", scatter),
    kernels("attention_one_key", "one key against a sink of equal score does not get half of the weight", one_key)
        .quick(),
    kernels("attention_mean", "equal scores do not give the mean of the values", attention_mean).quick(),
    kernels("attention_no_sink", "attention without a sink loses weight to one", attention_no_sink),
    kernels("attention_window", "attention sees keys outside its window, or misses one inside", attention_window),
    kernels("rope_quarter_turns", "rotary embedding turns the wrong pairs, or changes what it should keep", rope)
        .quick(),
    kernels("bf16_rounding", "rounding to bf16 (nearest, ties to even) is wrong", bf16_rounding).quick(),
    kernels("rms_norm", "division, square root or the sum over a row is off", rms_norm),
    kernels("head_norm", "the norm of query and key heads mixes heads or gains, or touches values", head_norm),
    kernels("add_and_take", "adding to the residual stream or picking rows is wrong", add_and_take),
    kernels("determinism", "the same program gives other bits when it runs again", determinism),
    kernels("stale_scratch", "results depend on what stood in scratch memory before", stale_scratch),
    host("e4m3", "E4M3 block scales decode or round wrongly", e4m3_case),
    host("nvfp4", "NVFP4 blocks decode wrongly, or their swizzled scales lie elsewhere", nvfp4_case),
];

const fn kernels(name: &'static str, fact: &'static str, case: fn(&mut Trial<'_>) -> Result<()>) -> Check {
    Check { name, fact, subject: Subject::Device, quick: false, case }
}

const fn host(name: &'static str, fact: &'static str, case: fn(&mut Trial<'_>) -> Result<()>) -> Check {
    Check { name, fact, subject: Subject::Host, quick: false, case }
}

impl Check {
    const fn quick(mut self) -> Self {
        self.quick = true;
        self
    }
}

const FLUSHES_BF16: &str = "flushes subnormal bf16 weights";
const FLUSHES_SCALES: &str = "flushes subnormal block scales";
const ROUNDS_TWICE: &str = "multiply-add rounds twice";
const LOOSE_EXP: &str = "exp is as far off as if its argument were rounded once more";
const ROUNDS_QUOTIENTS: &str = "division by a power of two is not exact";

/// Twice the value of each E2M1 code.
const TWICE: [i32; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];
/// The code of 1.
const ONE: u8 = 2;
/// The scale byte of 1.
const UNIT: u8 = 127;
/// Inputs and outputs of the matrices that quick checks share, so that they share a pipeline.
const K: usize = 256;
const N: usize = 32;
/// The attention and rotary shape that quick checks share: query heads, key/value heads, head size, cache rows.
const HEADS: [u32; 3] = [2, 1, 64];
const CAPACITY: u32 = 128;

fn code_value(code: u8) -> f64 {
    f64::from(TWICE[usize::from(code)]) / 2.0
}

/// 2^e, exactly, for exponents of normal f64 numbers.
fn two_to(e: i32) -> f64 {
    f64::from_bits(((e + 1023) as u64) << 52)
}

/// An f32 that is a number exactly. A case that asks for another is wrong itself.
fn exact(x: f64) -> f32 {
    let y = x as f32;
    assert!(f64::from(y) == x, "{x} is no f32");
    y
}

/// How far `got` is from `want`, in units of the last place of an f32 like `want`.
fn ulps(got: f32, want: f64) -> f64 {
    let exponent = ((want.abs().to_bits() >> 52) as i32 - 1023).max(-126);
    (f64::from(got) - want).abs() / two_to(exponent - 23)
}

/// bf16 values as bytes; each must be one.
fn bf16s(values: impl IntoIterator<Item = f64>) -> Vec<u8> {
    let bits = values.into_iter().map(|v| exact(v).to_bits());
    bits.inspect(|b| assert!(b & 0xffff == 0, "{b:#x} is no bf16"))
        .flat_map(|b| ((b >> 16) as u16).to_le_bytes())
        .collect()
}

/// Small uneven integers, -50 to 50.
fn uneven(i: usize) -> f64 {
    ((i * 37 + i / 7 * 11 + 13) % 101) as f64 - 50.0
}

/// One run of one check: its buffers, and what was found wrong.
struct Trial<'a> {
    device: &'a Arc<dyn Device>,
    quick: bool,
    buffers: Vec<Buffer>,
    notes: Vec<&'static str>,
    first: Option<String>,
    n_wrong: usize,
}

impl Trial<'_> {
    fn input<T: bytemuck::NoUninit>(&mut self, data: &[T]) -> Result<Slice> {
        let buffer = Buffer::with_bytes(self.device, "oracle input", bytemuck::cast_slice(data))?;
        let slice = buffer.slice();
        self.buffers.push(buffer);
        Ok(slice)
    }

    /// `n` words of NaN: what nobody writes is noticed.
    fn output(&mut self, n: usize) -> Result<Slice> {
        self.input(&vec![f32::NAN; n])
    }

    /// An MXFP4 matrix from the code and the scale byte of each element, packed as the OCP specification says.
    fn mxfp4(
        &self,
        [e, n, k]: [usize; 3],
        code: impl Fn(usize, usize) -> u8,
        scale: impl Fn(usize, usize) -> u8,
    ) -> Result<Weight> {
        let pairs = (0..e * n).flat_map(|row| (0..k / 2).map(move |pair| (row, pair * 2)));
        let codes: Vec<u8> = pairs.map(|(row, i)| code(row, i) | code(row, i + 1) << 4).collect();
        let blocks = (0..e * n).flat_map(|row| (0..k / 32).map(move |block| (row, block)));
        let scales: Vec<u8> = blocks.map(|(row, block)| scale(row, block)).collect();
        self.weight(Format::Mxfp4, [e, n, k], [&codes, &scales], &[])
    }

    /// A matrix of `format`, or one for each of `e` experts, from its bytes: codes, block scales, and row scales.
    fn weight(
        &self,
        format: Format,
        [e, n, k]: [usize; 3],
        [codes, scales]: [&[u8]; 2],
        row_scales: &[f32],
    ) -> Result<Weight> {
        let label = format!("oracle {format}");
        let [e, n, k] = [e, n, k].map(|n| n as u32);
        let bytes = WeightBytes { codes: &[codes], scales: &[scales], row_scales };
        match e {
            1 => Weight::matrix(self.device, &label, format, [n, k], &bytes),
            _ => Weight::experts(self.device, &label, format, [e, n, k], &bytes),
        }
    }

    fn bf16(&self, [n, k]: [usize; 2], value: impl Fn(usize, usize) -> f64) -> Result<Weight> {
        let values = (0..n).flat_map(|row| (0..k).map(move |i| (row, i))).map(|(row, i)| value(row, i));
        self.bf16_bytes([n, k], &bf16s(values))
    }

    fn bf16_bytes(&self, [n, k]: [usize; 2], bytes: &[u8]) -> Result<Weight> {
        Weight::matrix(
            self.device,
            "oracle bf16",
            Format::Bf16,
            [n as u32, k as u32],
            &WeightBytes { codes: &[bytes], ..Default::default() },
        )
    }

    fn run(&self, program: &Program, output: Slice) -> Result<Vec<u32>> {
        self.device.run(program)?;
        self.read(output)
    }

    fn read(&self, slice: Slice) -> Result<Vec<u32>> {
        let mut words = vec![0u32; (slice.bytes / 4) as usize];
        self.device.read(slice, bytemuck::cast_slice_mut(&mut words))?;
        Ok(words)
    }

    /// `[T, N]`: the rows of `x [T, K]` times a matrix.
    fn linear(&mut self, w: &Weight, x: &[f32]) -> Result<Vec<f32>> {
        let t = x.len() / w.k as usize;
        let step = self.input(&[Step { tokens: t as u32, pad: [0; 3] }])?;
        let (x, y) = (self.input(x)?, self.output(t * w.n as usize)?);
        let mut p = program(t);
        p.linear(step, w, None, x, y);
        Ok(floats(&self.run(&p, y)?))
    }

    fn note(&mut self, note: &'static str) {
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    fn wrong(&mut self, text: impl FnOnce() -> String) {
        self.n_wrong += 1;
        if self.first.is_none() {
            self.first = Some(text());
        }
    }

    /// Each element is the exact number (0 and -0 alike).
    fn equal(&mut self, got: &[f32], want: impl Fn(usize) -> f64, what: impl Fn(usize) -> String) {
        self.near(got, want, |_| 0.0, None, what);
    }

    /// Each element is within some units of the last place. One that is not exact but within them earns the note.
    fn near(
        &mut self,
        got: &[f32],
        want: impl Fn(usize) -> f64,
        allowed: impl Fn(usize) -> f64,
        note: Option<&'static str>,
        what: impl Fn(usize) -> String,
    ) {
        for (i, &g) in got.iter().enumerate() {
            let w = want(i);
            if f64::from(g) == w {
                continue;
            }
            let allowed = allowed(i);
            let off = ulps(g, w);
            if off <= allowed {
                note.into_iter().for_each(|note| self.note(note));
            } else if allowed == 0.0 {
                self.wrong(|| format!("{}: got {g:e}, want {w:e}", what(i)));
            } else {
                self.wrong(|| format!("{}: got {g:e}, want {w:e}: {off:.1} ulp off, {allowed:.0} allowed", what(i)));
            }
        }
    }

    /// Each word is the same.
    fn same(&mut self, got: &[u32], want: &[u32], what: impl Fn(usize) -> String) {
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            if g != w {
                self.wrong(|| format!("{}: got {g:#010x}, want {w:#010x}", what(i)));
            }
        }
    }
}

fn program(tokens: usize) -> Program {
    Program::new(tokens as u32, HostStages::default())
}

fn floats(words: &[u32]) -> Vec<f32> {
    words.iter().map(|w| f32::from_bits(*w)).collect()
}

/// Names element i of `[T, N]`.
fn cell(n: usize) -> impl Fn(usize) -> String {
    move |i| format!("row {}, output {}", i / n, i % n)
}

/// Rows that are zero but for one element, at the places given.
fn one_hot(k: usize, places: &[usize], value: impl Fn(usize) -> f32) -> Vec<f32> {
    let mut x = vec![0.0; places.len() * k];
    for (t, &place) in places.iter().enumerate() {
        x[t * k + place] = value(place);
    }
    x
}
