//! Known-answer tests of a device: tiny programs whose results follow from exact arithmetic alone.
//!
//! A twin is a definition, and a definition can be wrong, or run on a machine that is. So nothing here asks a twin, nor
//! the decoders of `format/`: each case states its answer in integers, powers of two and literal values, records a
//! program, runs it, and compares. `fourfold oracle` runs [`Which::All`]; the engine runs [`Which::Quick`] on its device
//! and refuses one that fails ([`admit`]).

use crate::device::{Buffer, Device};
use crate::error::{Error, Result};
use crate::format::{Format, e4m3, nvfp4};
use crate::ops::{Attention, CacheFormat, Experts, KvCache, MoeScatter, RmsNorm, Router, Routes, Row, Step, Weight};
use crate::program::{HostStages, Program, Slice};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How much to check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// What decides whether a device can be trusted at all: four pipelines, a few milliseconds.
    Quick,
    /// Everything.
    All,
}

/// What a check is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A device's kernels, or the twins.
    Device,
    /// Scalar code on the host, where no kernel exists yet.
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

const CHECKS: [Check; 27] = [
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
    kernels("bf16_embed", "bf16 values are not copied as they are", bf16_embed),
    kernels("bf16_linear", "bf16 weights decode to wrong values", bf16_linear),
    kernels("integer_sums", "sums of integers below 2^24 are not exact in f32", integer_sums),
    kernels("fused_multiply_add", "a multiply-add is worse than rounding twice", fused_multiply_add),
    kernels("router_ties", "the router does not take the largest scores, the lower expert among equals", router_ties)
        .quick(),
    kernels("exp", "exp is off", exp).quick(),
    kernels("swiglu", "the clamped SwiGLU is off, or gate and up are mixed up", swiglu),
    kernels("nan_stays", "NaN becomes a number on its way through the experts", nan_stays),
    kernels("experts", "an expert computes with another expert's weights, bias or input", experts),
    kernels("scatter", "the weighted sum over experts takes the wrong weight or row", scatter),
    kernels("attention_one_key", "one key against a sink of equal score does not get half of the weight", one_key)
        .quick(),
    kernels("attention_mean", "equal scores do not give the mean of the values", attention_mean).quick(),
    kernels("attention_window", "attention sees keys outside its window, or misses one inside", attention_window),
    kernels("rope_quarter_turns", "rotary embedding turns the wrong pairs, or changes what it should keep", rope)
        .quick(),
    kernels("bf16_rounding", "rounding to bf16 (nearest, ties to even) is wrong", bf16_rounding).quick(),
    kernels("rms_norm", "division, square root or the sum over a row is off", rms_norm),
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
        let label = "oracle mxfp4";
        let [e, n, k] = [e, n, k].map(|n| n as u32);
        match e {
            1 => Weight::matrix(self.device, label, Format::Mxfp4, [n, k], &[&codes], &[&scales]),
            _ => Weight::experts(self.device, label, Format::Mxfp4, [e, n, k], &codes, &scales),
        }
    }

    fn bf16(&self, [n, k]: [usize; 2], value: impl Fn(usize, usize) -> f64) -> Result<Weight> {
        let values = (0..n).flat_map(|row| (0..k).map(move |i| (row, i))).map(|(row, i)| value(row, i));
        self.bf16_bytes([n, k], &bf16s(values))
    }

    fn bf16_bytes(&self, [n, k]: [usize; 2], bytes: &[u8]) -> Result<Weight> {
        Weight::matrix(self.device, "oracle bf16", Format::Bf16, [n as u32, k as u32], &[bytes], &[])
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

/// Weights 1.5 and inputs 1.5: 2.25 K, as in seed 2's "72.0 = 1.5^2 x K".
fn uniform_fp4(t: &mut Trial<'_>) -> Result<()> {
    let shapes: &[(usize, usize, usize)] = if t.quick {
        &[(9, K, N)]
    } else {
        &[(9, K, N), (1, 32, 5), (9, 32, 5), (1, 64, 5), (9, 64, 5), (1, 2880, 5), (9, 2880, 5)]
    };
    for &(rows, k, n) in shapes {
        let w = t.mxfp4([1, n, k], |_, _| 3, |_, _| UNIT)?;
        let y = t.linear(&w, &vec![1.5; rows * k])?;
        t.equal(&y, |_| 2.25 * k as f64, |i| format!("T {rows}, K {k}, {}", cell(n)(i)));
    }
    Ok(())
}

/// Weight row n holds code n mod 16 and scale 2^(n mod 3): K times the code's value, in column n.
fn column_dependent(t: &mut Trial<'_>) -> Result<()> {
    let (rows, n, k) = (3, 43, 64);
    let w = t.mxfp4([1, n, k], |row, _| (row % 16) as u8, |row, _| UNIT + (row % 3) as u8)?;
    let y = t.linear(&w, &vec![1.0; rows * k])?;
    let want = |i: usize| (k as f64) * code_value((i % n % 16) as u8) * two_to((i % n % 3) as i32);
    t.equal(&y, want, cell(n));
    Ok(())
}

/// Position k of a row spells k in binary over eight outputs (and its complement over eight more), so that an input of
/// one element reads back which weight it met.
fn element_order(t: &mut Trial<'_>) -> Result<()> {
    let bit = |row: usize, k: usize| row < 16 && (k >> (row % 8) & 1 == 1) == (row < 8);
    // The scale differs from block to block and row to row, so that a shifted scale shows as well.
    let scale = |row: usize, block: usize| UNIT + ((row + 3 * block) % 8) as u8;
    let w = t.mxfp4([1, N, K], |row, k| if bit(row, k) { ONE } else { 0 }, scale)?;
    let places: Vec<usize> = if t.quick { (0..40).map(|i| i * 37 % K).collect() } else { (0..K).collect() };
    let y = t.linear(&w, &one_hot(K, &places, |_| 1.0))?;
    let want = |i: usize| {
        let (row, k) = (i % N, places[i / N]);
        if bit(row, k) { two_to(((row + 3 * (k / 32)) % 8) as i32) } else { 0.0 }
    };
    let read = |i: usize| {
        let row = &y[i / N * N..][..8];
        (0..8).filter(|bit| row[*bit] != 0.0).map(|bit| 1 << bit).sum::<usize>()
    };
    t.equal(&y, want, |i| format!("element {} reads weight {}, output {}", places[i / N], read(i), i % N));
    Ok(())
}

/// Every scale byte 0..=252 with every code twice, in a low and in a high nibble. The input undoes most of the scale,
/// so that no result is subnormal or infinite.
fn codes_and_scales(t: &mut Trial<'_>) -> Result<()> {
    // Block b of row n has scale 32 b + n. From 253 on a weight of 6 is above what f32 holds, and 255 is NaN.
    let scale = |row: usize, block: usize| (block * 32 + row).min(252);
    // Codes 0..=15 upwards, then downwards: the parity of a code's place changes.
    let code = |k: usize| if k % 32 < 16 { k % 16 } else { 15 - k % 16 } as u8;
    let w = t.mxfp4([1, N, K], |_, k| code(k), |row, block| scale(row, block) as u8)?;
    let undo = |k: usize| 111 - 32 * (k / 32) as i32;
    let places: Vec<usize> = if t.quick { (0..48).map(|i| i * 21 % K).collect() } else { (0..K).collect() };
    let y = t.linear(&w, &one_hot(K, &places, |k| exact(two_to(undo(k)))))?;
    let parts = |i: usize| (scale(i % N, places[i / N] / 32), code(places[i / N]));
    let want = |i: usize| {
        let (scale, code) = parts(i);
        code_value(code) * two_to(scale as i32 - 127) * two_to(undo(places[i / N]))
    };
    // Scale 0 is 2^-127, subnormal: zero will do.
    let flushed = |i: usize| parts(i).0 == 0 && y[i] == 0.0 && want(i) != 0.0;
    if (0..y.len()).any(flushed) {
        t.note(FLUSHES_SCALES);
    }
    let want = |i: usize| if flushed(i) { 0.0 } else { want(i) };
    t.equal(&y, want, |i| format!("scale {}, code {}", parts(i).0, parts(i).1));
    Ok(())
}

/// Results from 2^-126 on, made by the smallest normal scale.
fn smallest_normal(t: &mut Trial<'_>) -> Result<()> {
    let w = t.mxfp4([1, N, K], |row, _| 2 + (row % 6) as u8, |row, _| 1 + (row / 6) as u8)?;
    let y = t.linear(&w, &one_hot(K, &[0, 77, 140, 255], |_| 1.0))?;
    let want = |i: usize| code_value(2 + (i % N % 6) as u8) * two_to((i % N / 6) as i32 - 126);
    t.equal(&y, want, cell(N));
    Ok(())
}

/// Every lane adds one power of two, each its own: the sum is all ones, whatever the order, and only if every lane is
/// there once. Rows differ by a factor, so that lanes of another row show.
fn reduction_tree(t: &mut Trial<'_>) -> Result<()> {
    // Lanes 0..=3 have the powers 2^-1..=2^2 by code, and 16 times that by the next block's scale; four blocks are
    // two elements' groups of every lane.
    let w = t.mxfp4([1, N, K], |_, k| [1, ONE, 4, 6][k / 8 % 4], |row, block| UNIT + (row + 4 * (block % 4)) as u8)?;
    let mut x = vec![0.0; 16 * K];
    for row in 0..16 {
        // Row t takes element t mod 8 of each group of eight, in the first or second half of the row.
        for k in (0..K).filter(|k| k % 8 == row % 8 && k / 128 == row / 8) {
            x[row * K + k] = 1.0;
        }
    }
    let y = t.linear(&w, &x)?;
    t.equal(&y, |i| 32767.5 * two_to((i % N) as i32), cell(N));
    Ok(())
}

/// All 65280 finite bf16 patterns, by their bits.
fn finite_bf16() -> Vec<u16> {
    (0..=u16::MAX).filter(|bits| bits & 0x7f80 != 0x7f80).collect()
}

fn bytes_of(bits: &[u16]) -> Vec<u8> {
    bits.iter().flat_map(|b| b.to_le_bytes()).collect()
}

/// The table holds all finite bf16 patterns; the rows come out as they are, bit for bit.
fn bf16_embed(t: &mut Trial<'_>) -> Result<()> {
    let (patterns, d) = (finite_bf16(), 256);
    let tokens = patterns.len() / d;
    let table = t.bf16_bytes([tokens, d], &bytes_of(&patterns))?;
    // Backwards, so that a row is not found at its own place.
    let row = |i: usize| Row { token: (tokens - 1 - i) as u32, sequence: 0, position: 0, pad: 0 };
    let rows: Vec<Row> = (0..tokens).map(row).collect();
    let (rows, x) = (t.input(&rows)?, t.output(tokens * d)?);
    let mut p = program(tokens);
    p.embed(&table, rows, x);
    let got = t.run(&p, x)?;
    let pattern = |i: usize| patterns[(tokens - 1 - i / d) * d + i % d];
    let mut want: Vec<u32> = (0..got.len()).map(|i| u32::from(pattern(i)) << 16).collect();
    for (got, want) in got.iter().zip(&mut want) {
        let subnormal = *want << 1 != 0 && *want & 0x7f80_0000 == 0;
        if subnormal && got << 1 == 0 {
            *want = *got;
            t.note(FLUSHES_BF16);
        }
    }
    t.same(&got, &want, |i| format!("bf16 {:#06x}", pattern(i)));
    Ok(())
}

/// The same patterns as weights, met by one input at a time.
fn bf16_linear(t: &mut Trial<'_>) -> Result<()> {
    let patterns = finite_bf16();
    let (n, k) = (patterns.len() / 8, 8);
    let w = t.bf16_bytes([n, k], &bytes_of(&patterns))?;
    let y = t.linear(&w, &one_hot(k, &[0, 1, 2, 3, 4, 5, 6, 7], |_| 1.0))?;
    let pattern = |i: usize| patterns[i % n * k + i / n];
    let want = |i: usize| f64::from(f32::from_bits(u32::from(pattern(i)) << 16));
    let flushed = |i: usize| y[i] == 0.0 && want(i) != 0.0 && pattern(i) & 0x7f80 == 0;
    if (0..y.len()).any(flushed) {
        t.note(FLUSHES_BF16);
    }
    let want = |i: usize| if flushed(i) { 0.0 } else { want(i) };
    t.equal(&y, want, |i| format!("bf16 {:#06x}", pattern(i)));
    Ok(())
}

/// Integer inner products, up to 2^24 exactly; each row of inputs and weights is one pair permuted, so every output
/// sums the same terms or other integers, in another order.
fn integer_sums(t: &mut Trial<'_>) -> Result<()> {
    let (rows, n, k) = (5, 24, 320);
    let place = |row: usize, i: usize| (i * [1, 3, 7, 9, 11][row % 5] + row * 13) % k;
    let weight = |row: usize, i: usize| uneven(place(row, i));
    let input = |row: usize, i: usize| uneven(place(row, i) + 1000) * 19.0;
    let w = t.bf16([n, k], weight)?;
    let x: Vec<f32> = (0..rows * k).map(|i| exact(input(i / k, i % k))).collect();
    let y = t.linear(&w, &x)?;
    // Integers in f64: exact in any order.
    let want = |i: usize| (0..k).map(|j| weight(i % n, j) * input(i / n, j)).sum::<f64>();
    t.equal(&y, want, cell(n));
    // 256 products of 2^16 reach 2^24, the last integer before f32 skips one.
    let w = t.bf16([n, k], |_, i| if i < 256 { 256.0 } else { 0.0 })?;
    let y = t.linear(&w, &vec![256.0; rows * k])?;
    t.equal(&y, |_| two_to(24), cell(n));
    Ok(())
}

/// -(1 + 2^-7 + 2^-23) + (1 + 2^-7)(1 + 2^-23) is 2^-30 if the product is not rounded first, 0 if it is. WGSL allows both.
fn fused_multiply_add(t: &mut Trial<'_>) -> Result<()> {
    let w = t.bf16([8, 8], |row, i| match i {
        0 => -1.0,
        1 => 1.0 + two_to(-7),
        _ => (row * i) as f64, // met by zeros
    })?;
    let x = [1.0 + two_to(-7) + two_to(-23), 1.0 + two_to(-23), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0].map(exact);
    let y = t.linear(&w, &x)?;
    if y.contains(&0.0) {
        t.note(ROUNDS_TWICE);
    }
    let want = |i: usize| if y[i] == 0.0 { 0.0 } else { two_to(-30) };
    t.equal(&y, want, cell(8));
    Ok(())
}

/// Routes of `scores [T, E]`: the experts' and the weights' words.
fn route(t: &mut Trial<'_>, scores: &[f32]) -> Result<(Vec<u32>, Vec<f32>)> {
    let (e, a) = (8, 4);
    let tokens = scores.len() / e;
    let routes = Routes { experts: t.output(tokens * a)?, weights: t.output(tokens * a)? };
    let scores = t.input(scores)?;
    let mut p = program(tokens);
    p.router(Router { e: e as u32, a: a as u32 }, scores, routes);
    let experts = t.run(&p, routes.experts)?;
    Ok((experts, floats(&t.read(routes.weights)?)))
}

/// Order, ties, signs of zero; four equal scores weigh a quarter each.
fn router_ties(t: &mut Trial<'_>) -> Result<()> {
    let cases: [([f32; 8], [u32; 4]); 7] = [
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], [7, 6, 5, 4]),
        ([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], [0, 1, 2, 3]),
        ([0.5; 8], [0, 1, 2, 3]),
        ([-1.0, 2.0, -1.0, 2.0, 2.0, -1.0, 2.0, 2.0], [1, 3, 4, 6]),
        ([-3.0, -0.0, 0.0, -3.0, -0.0, 0.0, -3.0, -3.0], [1, 2, 4, 5]),
        ([-9.0, -8.0, -7.0, -6.0, -5.0, -6.0, -7.0, -8.0], [4, 3, 5, 2]),
        ([1e30, -1e30, 1e-30, -1e-30, 0.0, 1e30, -1e30, 1e-30], [0, 5, 2, 7]),
    ];
    let scores: Vec<f32> = cases.iter().flat_map(|(scores, _)| *scores).collect();
    let (experts, weights) = route(t, &scores)?;
    let want: Vec<u32> = cases.iter().flat_map(|(_, experts)| *experts).collect();
    t.same(&experts, &want, |i| format!("case {}, place {}", i / 4, i % 4));
    let even: Vec<f32> = [2, 3, 4].iter().flat_map(|case| weights[case * 4..][..4].to_vec()).collect();
    // Rounding of exp is no matter at 0; a division may be 2.5 ulp off.
    t.near(&even, |_| 0.25, |_| 3.0, Some(ROUNDS_QUOTIENTS), |i| format!("weight {i} of equal scores"));
    Ok(())
}

/// Scores 0 and -d weigh 1/(1 + e^-d) and e^-d/(1 + e^-d), for d from 0 to 87.
fn exp(t: &mut Trial<'_>) -> Result<()> {
    let points = if t.quick { 60 } else { 700 };
    let d = |i: usize| (i as f64 * 87.0 / points as f64) as f32;
    let scores: Vec<f32> = (0..points).flat_map(|i| [-1e30, -d(i), -1e30, -1e30, 0.0, -1e30, -1e30, -1e30]).collect();
    let (_, weights) = route(t, &scores)?;
    let want = |i: usize| {
        let small = (-f64::from(d(i / 4))).exp();
        match i % 4 {
            0 => 1.0 / (1.0 + small),
            1 => small / (1.0 + small),
            _ => 0.0,
        }
    };
    // exp takes about 1 ulp, the sum half of one, a division 2.5. Where fma rounds twice a driver may merge the two
    // constants of the range reduction; that costs half an ulp of the argument, as if the score had been rounded.
    let good = 6.0;
    if weights.iter().enumerate().any(|(i, w)| ulps(*w, want(i)) > good) {
        t.note(LOOSE_EXP);
    }
    let allowed = |i: usize| good + f64::from(d(i / 4));
    t.near(&weights, want, allowed, None, |i| format!("e^-{} as weight {}", d(i / 4), i % 4));
    Ok(())
}

/// What `moe_up` makes of `h [T, 32]`: gate rows meet input 0 with weight 1 or 2 by turns, up rows input 1 with weight 1;
/// the bias of expert e adds e to up. Token t goes to expert t mod 3; nine outputs a token.
fn gate_and_up(t: &mut Trial<'_>, h: &[f32]) -> Result<Vec<f32>> {
    let (e, f, k) = (3, 9, 32);
    let tokens = h.len() / k;
    let code = |row: usize, i: usize| match (row % 2, i) {
        (0, 0) => [ONE, 4][row / 2 % 2],
        (1, 1) => ONE,
        _ => 0,
    };
    let weight = t.mxfp4([e, 2 * f, k], |row, i| code(row % (2 * f), i), |_, _| UNIT)?;
    let bias = t.input(&bf16s((0..e * 2 * f).map(|i| if i % 2 == 1 { (i / (2 * f)) as f64 } else { 0.0 })))?;
    let up = Experts { weight, bias };
    let chosen: Vec<u32> = (0..tokens).map(|token| (token % e) as u32).collect();
    let (chosen, h, y) = (t.input(&chosen)?, t.input(h)?, t.output(tokens * f)?);
    let mut p = program(tokens);
    p.moe_up(&up, 1, [7.0, 1.702], chosen, [h, y]);
    Ok(floats(&t.run(&p, y)?))
}

/// Every third token is NaN: all of its outputs are, and no others.
fn nan_stays(t: &mut Trial<'_>) -> Result<()> {
    let h: Vec<f32> = (0..9 * 32).map(|i| if i / 32 % 3 == 1 { f32::NAN } else { 0.5 }).collect();
    let y = gate_and_up(t, &h)?;
    for (i, v) in y.iter().enumerate() {
        let want = i / 9 % 3 == 1;
        if v.is_nan() != want {
            t.wrong(|| format!("{}: got {v:e}, want {}", cell(9)(i), if want { "NaN" } else { "a number" }));
        }
    }
    Ok(())
}

/// gate sigmoid(1.702 gate) (up + 1) with gate at most 7 and up within 7, against f64; gate and up are the two inputs.
fn swiglu(t: &mut Trial<'_>) -> Result<()> {
    let (f, tokens) = (9, 150);
    let input = |token: usize| [token as f64 / 8.0 - 12.0, (token * 29 % 161) as f64 / 8.0 - 10.0];
    let h: Vec<f32> = (0..tokens * 32).map(|i| if i % 32 < 2 { exact(input(i / 32)[i % 32]) } else { 0.0 }).collect();
    let y = gate_and_up(t, &h)?;
    let parts = |i: usize| {
        let [gate, up] = input(i / f);
        let gate = (gate * [1.0, 2.0][i % f % 2]).min(7.0);
        (gate, (up + (i / f % 3) as f64).clamp(-7.0, 7.0))
    };
    let alpha = f64::from(1.702f32);
    let want = |i: usize| {
        let (gate, up) = parts(i);
        gate / (1.0 + (-alpha * gate).exp()) * (up + 1.0)
    };
    // Rounding alpha gate to f32 moves the exponential by as many halves of an ulp as its argument is large.
    let allowed = |i: usize| 8.0 + (alpha * parts(i).0).abs();
    t.near(&y, want, allowed, None, |i| format!("gate {}, up {}", parts(i).0, parts(i).1));
    Ok(())
}

/// Expert e multiplies by 2^e and adds its own bias; routes carry inputs of their own.
fn experts(t: &mut Trial<'_>) -> Result<()> {
    let (e, d, k, a, tokens) = (5, 19, 64, 2, 5);
    let weight = t.mxfp4([e, d, k], |_, _| ONE, |row, _| UNIT + (row / d) as u8)?;
    let bias = t.input(&bf16s((0..e * d).map(|i| i as f64)))?;
    let down = Experts { weight, bias };
    let expert = |route: usize| [4, 0, 2, 3, 1, 4, 0, 1, 3, 2][route];
    let chosen: Vec<u32> = (0..tokens * a).map(|route| expert(route) as u32).collect();
    let x: Vec<f32> = (0..tokens * a * k).map(|i| (i / k + 1) as f32).collect();
    let (chosen, x, y) = (t.input(&chosen)?, t.input(&x)?, t.output(tokens * a * d)?);
    let mut p = program(tokens);
    p.moe_down(&down, a as u32, chosen, x, y);
    let y = floats(&t.run(&p, y)?);
    let want = |i: usize| {
        let (route, n) = (i / d, i % d);
        (k * (route + 1)) as f64 * two_to(expert(route) as i32) + (expert(route) * d + n) as f64
    };
    t.equal(&y, want, |i| format!("route {}, expert {}, output {}", i / d, expert(i / d), i % d));
    Ok(())
}

/// Weights and inputs are powers of two, all different: exact, and no two are mixed up.
fn scatter(t: &mut Trial<'_>) -> Result<()> {
    let (a, d, tokens) = (4, 70, 3);
    let exponent = |token: usize, a: usize| -(a as i32) - token as i32;
    let input = |token: usize, a: usize, i: usize| two_to(((token + 5 * a + i * 3) % 11) as i32) * (1 + a) as f64;
    let weights: Vec<f32> = (0..tokens * a).map(|i| exact(two_to(exponent(i / a, i % a)))).collect();
    let x: Vec<f32> = (0..tokens * a * d).map(|i| exact(input(i / (a * d), i / d % a, i % d))).collect();
    let routes = Routes { experts: t.output(tokens * a)?, weights: t.input(&weights)? };
    let (x, y) = (t.input(&x)?, t.output(tokens * d)?);
    let mut p = program(tokens);
    p.moe_scatter(MoeScatter { a: a as u32, d: d as u32 }, routes, x, y);
    let y = floats(&t.run(&p, y)?);
    let want = |i: usize| (0..a).map(|a| two_to(exponent(i / d, a)) * input(i / d, a, i % d)).sum::<f64>();
    t.equal(&y, want, cell(d));
    Ok(())
}

/// A cache whose row j holds `key` everywhere, and `value(j, i)`; rows for which `value` is NaN have NaN keys too.
fn cache(
    t: &mut Trial<'_>,
    format: CacheFormat,
    capacity: u32,
    key: f64,
    value: impl Fn(usize, usize) -> f64,
) -> Result<KvCache> {
    let dh = HEADS[2] as usize;
    let values: Vec<f64> = (0..capacity as usize * dh).map(|i| value(i / dh, i % dh)).collect();
    let keys = values.iter().map(|v| if v.is_nan() { f64::NAN } else { key }).collect();
    let mut store = |values: Vec<f64>| match format {
        CacheFormat::F32 => t.input(&values.iter().map(|v| *v as f32).collect::<Vec<_>>()),
        CacheFormat::Bf16 => t.input(&values.iter().map(|v| ((*v as f32).to_bits() >> 16) as u16).collect::<Vec<_>>()),
    };
    Ok(KvCache { format, capacity, keys: store(keys)?, values: store(values)? })
}

/// Attention of queries that are all `query`, at these positions: `[T, H Dh]`.
fn attend(
    t: &mut Trial<'_>,
    cache: KvCache,
    window: u32,
    [query, sink]: [f64; 2],
    positions: &[u32],
) -> Result<Vec<f32>> {
    let [h, hk, dh] = HEADS;
    let tokens = positions.len();
    let rows: Vec<Row> = positions.iter().map(|&position| Row { position, ..Row::default() }).collect();
    let qkv = vec![exact(query); tokens * ((h + 2 * hk) * dh) as usize];
    let (rows, qkv, sinks) = (t.input(&rows)?, t.input(&qkv)?, t.input(&bf16s(vec![sink; h as usize]))?);
    let a = t.output(tokens * (h * dh) as usize)?;
    let op = Attention { h, hk, dh, window, capacity: cache.capacity, format: cache.format };
    let mut p = program(tokens);
    p.attention(op, rows, qkv, cache, sinks, a);
    Ok(floats(&t.run(&p, a)?))
}

/// Both cache formats, or for the quick checks the smaller one.
fn cache_formats(t: &Trial<'_>) -> &'static [CacheFormat] {
    if t.quick { &[CacheFormat::Bf16] } else { &[CacheFormat::Bf16, CacheFormat::F32] }
}

/// The weight of a sink that nobody feels.
const NO_SINK: f64 = -1073741824.0;

/// Query and key of zeros score 0, as the sink does: half of the value, all of the other rows NaN.
fn one_key(t: &mut Trial<'_>) -> Result<()> {
    let dh = HEADS[2] as usize;
    for &format in cache_formats(t) {
        let value = |j: usize, i: usize| if j == 0 { uneven(i) } else { f64::NAN };
        let kv = cache(t, format, CAPACITY, 0.0, value)?;
        let a = attend(t, kv, 0, [0.0, 0.0], &[0])?;
        t.near(
            &a,
            |i| uneven(i % dh) / 2.0,
            |_| 3.0,
            Some(ROUNDS_QUOTIENTS),
            |i| format!("{format:?} cache, element {i}"),
        );
    }
    Ok(())
}

/// n equal scores: the mean of n integers, exact before the division. Over tiles of keys and a power of two of them.
fn attention_mean(t: &mut Trial<'_>) -> Result<()> {
    let (h, dh) = (HEADS[0] as usize, HEADS[2] as usize);
    let positions: &[u32] = if t.quick { &[1, 127] } else { &[0, 1, 3, 7, 15, 31, 63, 127] };
    for &format in cache_formats(t) {
        let value = |j: usize, i: usize| uneven(j * 5 + i);
        let kv = cache(t, format, CAPACITY, 1.0, value)?;
        let a = attend(t, kv, 0, [1.0, NO_SINK], positions)?;
        let want = |i: usize| {
            let n = positions[i / (h * dh)] as usize + 1;
            (0..n).map(|j| value(j, i % dh)).sum::<f64>() / n as f64
        };
        let what =
            |i: usize| format!("{format:?} cache, {} keys, element {}", positions[i / (h * dh)] + 1, i % (h * dh));
        t.near(&a, want, |_| 3.0, Some(ROUNDS_QUOTIENTS), what);
    }
    Ok(())
}

/// A window of 4 at position 9, in a cache of 8 rows: keys 6 to 9 in rows 6, 7, 0, 1, and NaN in all others.
fn attention_window(t: &mut Trial<'_>) -> Result<()> {
    let dh = HEADS[2] as usize;
    for &format in cache_formats(t) {
        let value = |j: usize, i: usize| match j {
            6 | 7 | 0 | 1 => uneven((j + 2) % 8 * 64 + i),
            _ => f64::NAN,
        };
        let kv = cache(t, format, 8, 1.0, value)?;
        let a = attend(t, kv, 4, [1.0, NO_SINK], &[9])?;
        let want = |i: usize| [6, 7, 0, 1].map(|j| value(j, i % dh)).iter().sum::<f64>() / 4.0;
        t.near(&a, want, |_| 3.0, Some(ROUNDS_QUOTIENTS), |i| format!("{format:?} cache, element {i}"));
    }
    Ok(())
}

/// What `rope` leaves: the words of `qkv`, and of the cache's keys and values.
fn rotate(
    t: &mut Trial<'_>,
    format: CacheFormat,
    table: &[[f32; 2]],
    qkv: &[f32],
    positions: &[u32],
) -> Result<[Vec<u32>; 3]> {
    let rows: Vec<Row> = positions.iter().map(|&position| Row { position, ..Row::default() }).collect();
    let words = format.bytes(u64::from(CAPACITY * HEADS[1] * HEADS[2])) as usize / 4;
    let (rows, table, qkv) = (t.input(&rows)?, t.input(table)?, t.input(qkv)?);
    let kv = KvCache { format, capacity: CAPACITY, keys: t.output(words)?, values: t.output(words)? };
    let mut p = program(positions.len());
    p.rope(HEADS, rows, table, qkv, kv);
    Ok([t.run(&p, qkv)?, t.read(kv.keys)?, t.read(kv.values)?])
}

/// Element i of a row of `format` in words.
fn stored(format: CacheFormat, words: &[u32], i: usize) -> f32 {
    match format {
        CacheFormat::F32 => f32::from_bits(words[i]),
        CacheFormat::Bf16 => f32::from_bits(words[i / 2] >> (16 * (i % 2)) << 16),
    }
}

/// Position p turns by p quarters: cos and sin are 0, 1 or -1, so rotating moves and negates and rounds nothing.
fn rope(t: &mut Trial<'_>) -> Result<()> {
    let [h, hk, dh] = HEADS.map(|n| n as usize);
    let width = (h + 2 * hk) * dh;
    let turns = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]];
    let table: Vec<[f32; 2]> = (0..CAPACITY as usize * dh / 2).map(|i| turns[i / (dh / 2) % 4]).collect();
    let positions = [0, 1, 2, 127, 64];
    // From 1 up: a zero would hide its sign. Values of up to eight bits, exact in a bf16 cache.
    let input = |token: usize, i: usize| ((token * 31 + i * 7) % 251 + 1) as f64;
    let qkv: Vec<f32> = (0..positions.len() * width).map(|i| exact(input(i / width, i % width))).collect();
    // (x, y) turned by a quarter is (-y, x).
    let turned = |token: usize, head: usize, i: usize| {
        let [x, y] = [i % (dh / 2), i % (dh / 2) + dh / 2].map(|i| input(token, head * dh + i));
        let low = i < dh / 2;
        match positions[token] % 4 {
            0 => {
                if low {
                    x
                } else {
                    y
                }
            }
            1 => {
                if low {
                    -y
                } else {
                    x
                }
            }
            2 => {
                if low {
                    -x
                } else {
                    -y
                }
            }
            _ => {
                if low {
                    y
                } else {
                    -x
                }
            }
        }
    };
    for &format in cache_formats(t) {
        let [q, keys, values] = rotate(t, format, &table, &qkv, &positions)?;
        for (token, position) in positions.iter().enumerate() {
            let place = |what: &str, i: usize| format!("{what} at position {position}, element {i}");
            let got = floats(&q[token * width..][..h * dh]);
            t.equal(&got, |i| turned(token, i / dh, i % dh), |i| place("query", i));
            let row = |words: &[u32]| -> Vec<f32> {
                (0..dh).map(|i| stored(format, words, *position as usize * dh + i)).collect()
            };
            t.equal(&row(&keys), |i| turned(token, h, i), |i| place("key", i));
            t.equal(&row(&values), |i| input(token, (h + hk) * dh + i), |i| place("value", i));
        }
    }
    Ok(())
}

/// Upper halves with lower halves around the tie: 0x8000 goes to the even neighbour, less goes down, more goes up, also
/// over a power of two and into infinity. Keys and values of position 0.
fn bf16_rounding(t: &mut Trial<'_>) -> Result<()> {
    let [h, hk, dh] = HEADS.map(|n| n as usize);
    let halves = [0x3f80, 0x3f81, 0xbfff, 0x4000, 0xc0fe, 0x7f7f, 0x0080, 0xff7e].iter();
    let bits = halves
        .flat_map(|upper: &u32| [0, 1, 0x7fff, 0x8000, 0x8001, 0xc000, 0xfffe, 0xffff].map(|lower| (*upper, lower)));
    let bits: Vec<(u32, u32)> = bits.collect();
    let rounded = |(upper, lower): (u32, u32)| match lower {
        0..0x8000 => upper,
        0x8000 => upper + upper % 2,
        _ => upper + 1,
    };
    let table = vec![[1.0, 0.0]; CAPACITY as usize * dh / 2];
    let mut qkv = vec![1.0; (h + 2 * hk) * dh];
    for (i, (upper, lower)) in bits.iter().enumerate() {
        let v = f32::from_bits(upper << 16 | lower);
        qkv[h * dh + i] = v;
        qkv[(h + hk) * dh + (i + 3) % dh] = v; // shifted: not the same pair in a word
    }
    let [_, keys, values] = rotate(t, CacheFormat::Bf16, &table, &qkv, &[0])?;
    let got =
        |words: &[u32]| -> Vec<u32> { (0..dh).map(|i| stored(CacheFormat::Bf16, words, i).to_bits() >> 16).collect() };
    let want: Vec<u32> = bits.iter().map(|b| rounded(*b)).collect();
    let what = |name: &str, i: usize| format!("{name} {:#010x}", bits[i].0 << 16 | bits[i].1);
    t.same(&got(&keys), &want, |i| what("key", i));
    let shifted: Vec<u32> = (0..dh).map(|i| want[(i + dh - 3) % dh]).collect();
    t.same(&got(&values), &shifted, |i| what("value", (i + dh - 3) % dh));
    Ok(())
}

/// A row of one element 16 and 255 zeros has mean square 1: the gain comes out at its place. Rows of threes become the gain.
fn rms_norm(t: &mut Trial<'_>) -> Result<()> {
    let d = 256;
    let gain = |i: usize| uneven(i) / 4.0;
    let mut x = one_hot(d, &(0..d).collect::<Vec<_>>(), |_| 16.0);
    x.extend(vec![3.0; d]);
    let (g, y) = (t.input(&bf16s((0..d).map(gain)))?, t.output(x.len())?);
    let mut p = program(d + 1);
    let x = t.input(&x)?;
    p.rms_norm(RmsNorm { d: d as u32, eps: 0.0 }, x, g, y);
    let y = floats(&t.run(&p, y)?);
    let want = |i: usize| match (i / d, i % d) {
        (row, i) if row == d => gain(i),
        (row, i) if row == i => 16.0 * gain(i),
        _ => 0.0,
    };
    // A square root and a division of 2.5 to 3 ulp each, and two products.
    t.near(&y, want, |_| 8.0, None, cell(d));
    Ok(())
}

/// x += y of integers, then rows picked backwards and twice.
fn add_and_take(t: &mut Trial<'_>) -> Result<()> {
    let (d, tokens) = (70, 5);
    let y: Vec<f32> = (0..tokens * d).map(|i| exact(uneven(i) * 1024.0)).collect();
    let x: Vec<f32> = (0..tokens * d).map(|i| exact(uneven(i + 500))).collect();
    let (y, x) = (t.input(&y)?, t.input(&x)?);
    let mut p = program(tokens);
    p.add(d as u32, y, x);
    t.device.run(&p)?;
    let picks = [4u32, 0, 3, 3, 1];
    let (slice, out) = (t.input(&picks)?, t.output(picks.len() * d)?);
    let mut p = program(picks.len());
    p.take(d as u32, slice, x, out);
    let got = floats(&t.run(&p, out)?);
    let want = |i: usize| {
        let from = picks[i / d] as usize * d + i % d;
        uneven(from) * 1024.0 + uneven(from + 500)
    };
    t.equal(&got, want, cell(d));
    Ok(())
}

/// A small block of a model over nine tokens (a whole tile and a part), its scratch filled with `scratch`, run `times`
/// times: every buffer's words after each run.
fn block(t: &mut Trial<'_>, scratch: f32, times: usize) -> Result<Vec<Vec<u32>>> {
    let (tokens, room, d, e, a) = (9, 16, 32, 4, 2);
    let router = t.bf16([e, d], |row, i| uneven(row * 91 + i * 3) / 64.0)?;
    let code = |row: usize, i: usize| ((row * 5 + i * 3 + row * i / 4) % 16) as u8;
    let scale = |row: usize, _: usize| UNIT - 4 + (row % 3) as u8;
    let up = t.mxfp4([e, 2 * d, d], code, scale)?;
    let down = t.mxfp4([e, d, d], |row, i| code(row + 7, i + 1), scale)?;
    let up_bias = t.input(&bf16s((0..e * 2 * d).map(|i| uneven(i) / 32.0)))?;
    let down_bias = t.input(&bf16s((0..e * d).map(|i| uneven(i + 9) / 32.0)))?;
    let (up, down) = (Experts { weight: up, bias: up_bias }, Experts { weight: down, bias: down_bias });
    // Inputs of this step, and behind them whatever an earlier step left.
    let x: Vec<f32> = (0..room * d).map(|i| if i < tokens * d { exact(uneven(i) / 16.0) } else { scratch }).collect();
    let step = t.input(&[Step { tokens: tokens as u32, pad: [0; 3] }])?;
    let (x, gain) = (t.input(&x)?, t.input(&bf16s((0..d).map(|i| uneven(i) / 32.0)))?);
    let mut scratch_of = |width: usize| t.input(&vec![scratch; room * width]);
    let (normed, scores, inner) = (scratch_of(d)?, scratch_of(e)?, scratch_of(a * d)?);
    let (outer, sum) = (scratch_of(a * d)?, scratch_of(d)?);
    let routes = Routes { experts: scratch_of(a)?, weights: scratch_of(a)? };
    let mut p = program(tokens);
    p.rms_norm(RmsNorm { d: d as u32, eps: 1e-5 }, x, gain, normed);
    p.linear(step, &router, None, normed, scores);
    p.router(Router { e: e as u32, a: a as u32 }, scores, routes);
    p.moe_up(&up, a as u32, [7.0, 1.702], routes.experts, [normed, inner]);
    p.moe_down(&down, a as u32, routes.experts, inner, outer);
    p.moe_scatter(MoeScatter { a: a as u32, d: d as u32 }, routes, outer, sum);
    let widths =
        [(normed, d), (scores, e), (routes.experts, a), (routes.weights, a), (inner, a * d), (outer, a * d), (sum, d)];
    let mut runs = Vec::new();
    for _ in 0..times {
        t.device.run(&p)?;
        let mut words = Vec::new();
        for (slice, width) in widths {
            words.extend(t.read(slice.head((tokens * width * 4) as u64))?);
        }
        runs.push(words);
    }
    Ok(runs)
}

/// Four runs of one program.
fn determinism(t: &mut Trial<'_>) -> Result<()> {
    let runs = block(t, 0.0, 4)?;
    for (i, run) in runs.iter().enumerate().skip(1) {
        t.same(run, &runs[0], |at| format!("run {}, word {at}", i + 1));
    }
    Ok(())
}

/// Scratch of zeros and scratch of NaN.
fn stale_scratch(t: &mut Trial<'_>) -> Result<()> {
    let clean = block(t, 0.0, 1)?.swap_remove(0);
    let poisoned = block(t, f32::NAN, 1)?.swap_remove(0);
    t.same(&poisoned, &clean, |at| format!("after NaN, word {at}"));
    Ok(())
}

/// The E4M3 code's value in units of 2^-9.
fn e4m3_units(code: u8) -> i32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), i32::from(code & 7));
    let units = if exponent == 0 { mantissa } else { (8 + mantissa) << (exponent - 1) };
    if code & 0x80 == 0 { units } else { -units }
}

fn e4m3_case(t: &mut Trial<'_>) -> Result<()> {
    e4m3_values(t, e4m3::decode, e4m3::encode);
    Ok(())
}

/// All codes; the tie between all neighbours, and what lies next to it.
fn e4m3_values(t: &mut Trial<'_>, decode: impl Fn(u8) -> f32, encode: impl Fn(f32) -> u8) {
    let finite: Vec<u8> = (0..=255).filter(|code| code & 0x7f != 0x7f).collect();
    let got: Vec<f32> = finite.iter().map(|code| decode(*code)).collect();
    t.equal(&got, |i| f64::from(e4m3_units(finite[i])) / 512.0, |i| format!("code {:#04x}", finite[i]));
    if !(decode(0x7f).is_nan() && decode(0xff).is_nan()) {
        t.wrong(|| "codes 0x7f and 0xff are not NaN".to_owned());
    }
    for code in 0..0x7eu8 {
        // In units of 2^-10 the middle is an integer.
        let middle = f64::from(e4m3_units(code) + e4m3_units(code + 1)) / 1024.0;
        let even = code + code % 2;
        let tie = exact(middle);
        for (x, want) in [(tie, even), (-tie, even | 0x80), (tie.next_down(), code), (tie.next_up(), code + 1)] {
            let got = encode(x);
            if got != want {
                t.wrong(|| format!("{x:e} rounds to {got:#04x}, want {want:#04x}"));
            }
        }
    }
    for (x, want) in [(448.0, 0x7e), (464.0, 0x7e), (1e30, 0x7e), (-1e30, 0xfe)] {
        let got = encode(x);
        if got != want {
            t.wrong(|| format!("{x:e} rounds to {got:#04x}, want {want:#04x}"));
        }
    }
}

fn nvfp4_case(t: &mut Trial<'_>) -> Result<()> {
    nvfp4_blocks(t, nvfp4::decode_row);
    nvfp4_swizzle(t, nvfp4::swizzled_offset);
    Ok(())
}

/// Uniform 1.5 sums to 72 over K 32; all codes with all scales; each element at its place.
fn nvfp4_blocks(t: &mut Trial<'_>, decode_row: impl Fn(&[u8], &[u8], f32, &mut [f32])) {
    let mut y = vec![f32::NAN; 32];
    decode_row(&[0x33; 16], &[0x38; 2], 1.0, &mut y);
    let sum: f64 = y.iter().map(|v| f64::from(*v) * 1.5).sum();
    t.equal(&[sum as f32], |_| 72.0, |_| "1.5 x 1.5 over K 32".to_owned());
    // 127 blocks, one for each positive scale; codes ascending, then the multiplier 2^-3.
    let scales: Vec<u8> = (0..0x7f).collect();
    let mut y = vec![f32::NAN; 127 * 16];
    let block = [0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe];
    decode_row(&block.repeat(127), &scales, 0.125, &mut y);
    let want = |i: usize| code_value((i % 16) as u8) * f64::from(e4m3_units((i / 16) as u8)) / 4096.0;
    t.equal(&y, want, |i| format!("scale {:#04x}, code {}", i / 16, i % 16));
    // One code of 1 at each of 48 places, three blocks with scales 1, 2 and 4.
    for place in 0..48 {
        let mut codes = [0; 24];
        codes[place / 2] = if place % 2 == 0 { ONE } else { ONE << 4 };
        let mut y = vec![f32::NAN; 48];
        decode_row(&codes, &[0x38, 0x40, 0x48], 1.0, &mut y);
        let want = |i: usize| if i == place { two_to((place / 16) as i32) } else { 0.0 };
        t.equal(&y, want, |i| format!("a code at {place}: element {i}"));
    }
}

/// 128x4 order is `[M/128, 4, 32, K/4, 4]` with its axes in the order 0, 3, 2, 1, 4: counted out, place by place.
fn nvfp4_swizzle(t: &mut Trial<'_>, offset: impl Fn(usize, usize, usize) -> usize) {
    let (m_tiles, k_tiles) = (2, 3);
    let mut at = 0;
    for m_tile in 0..m_tiles {
        for k_tile in 0..k_tiles {
            for m_low in 0..32 {
                for m_high in 0..4 {
                    for k_low in 0..4 {
                        let (row, k) = (m_tile * 128 + m_high * 32 + m_low, k_tile * 4 + k_low);
                        let got = offset(row, k, k_tiles * 4);
                        if got != at {
                            t.wrong(|| format!("scale {k} of row {row} at {got}, want {at}"));
                        }
                        at += 1;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::Cpu;

    /// Whether scalar code fails a case of the host.
    fn fails(case: impl Fn(&mut Trial<'_>)) -> bool {
        let device: Arc<dyn Device> = Arc::new(Cpu::default());
        let mut trial =
            Trial { device: &device, quick: false, buffers: vec![], notes: vec![], first: None, n_wrong: 0 };
        case(&mut trial);
        trial.n_wrong > 0
    }

    #[test]
    fn cases_of_the_host_notice_wrong_code() {
        assert!(!fails(|t| e4m3_values(t, e4m3::decode, e4m3::encode)));
        assert!(fails(|t| e4m3_values(t, |code| e4m3::decode(code) * 2.0, e4m3::encode)));
        assert!(fails(|t| e4m3_values(t, |code| if code == 0xff { 480.0 } else { e4m3::decode(code) }, e4m3::encode)));
        let truncates =
            |x: f32| if e4m3::decode(e4m3::encode(x)).abs() > x.abs() { e4m3::encode(x) - 1 } else { e4m3::encode(x) };
        assert!(fails(|t| e4m3_values(t, e4m3::decode, truncates)));
        assert!(!fails(|t| nvfp4_blocks(t, nvfp4::decode_row)));
        let swapped = |codes: &[u8], scales: &[u8], global: f32, out: &mut [f32]| {
            let codes: Vec<u8> = codes.iter().map(|c| c.rotate_left(4)).collect();
            nvfp4::decode_row(&codes, scales, global, out);
        };
        assert!(fails(|t| nvfp4_blocks(t, swapped)));
        let inverted = |codes: &[u8], scales: &[u8], global: f32, out: &mut [f32]| {
            nvfp4::decode_row(codes, scales, 1.0 / global, out);
        };
        assert!(fails(|t| nvfp4_blocks(t, inverted)));
        assert!(!fails(|t| nvfp4_swizzle(t, nvfp4::swizzled_offset)));
        assert!(fails(|t| nvfp4_swizzle(t, |row, k, n| row * n + k)));
    }

    #[test]
    fn a_unit_of_the_last_place_is_that_of_f32() {
        assert_eq!(ulps(1.0f32.next_up(), 1.0), 1.0);
        assert_eq!(ulps(0.5f32.next_up(), 0.5), 1.0);
        assert_eq!(ulps(f32::from_bits(1), 0.0), 1.0);
        assert!(ulps(f32::NAN, 1.0).is_nan() && ulps(f32::INFINITY, 1.0) > 1e30);
    }
}
