//! Rotary positions: the frequencies and their scaling (YaRN, Llama 3's, linear), in the f32 steps of transformers'
//! `modeling_rope_utils.py`, and how config files spell them.

use std::f64::consts::TAU;
use std::ops::RangeInclusive;

use super::keys::{Keys, number};
use super::{Family, MAX_TOKENS};
use crate::error::Result;

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// The base of the frequencies.
    pub theta: f64,
    /// How frequencies are stretched for long contexts, if they are.
    pub scaling: Option<Scaling>,
}

/// A way to stretch the frequencies for contexts longer than the model was first trained with.
#[derive(Clone, Debug, PartialEq)]
pub enum Scaling {
    /// A ramp from kept to divided frequencies, and a factor on cos and sin.
    Yarn(Yarn),
    /// Llama 3.1's: bands of kept, blended and divided frequencies.
    Llama3(Llama3),
    /// Every frequency divided by `factor`.
    Linear {
        /// How many times longer the context became.
        factor: f64,
    },
}

/// YaRN: low frequencies divided by `factor`, high ones kept, a ramp between.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// How many times longer the context became.
    pub factor: f64,
    /// Rotations within the original context above which a frequency is kept.
    pub beta_fast: f64,
    /// Rotations within the original context below which a frequency is divided by `factor`.
    pub beta_slow: f64,
    /// The context before stretching.
    pub original_max_position_embeddings: usize,
    /// Whether the ends of the ramp are rounded outwards to whole dimensions. A missing key means yes, as in
    /// transformers; the released models say no.
    pub truncate: bool,
    /// What cos and sin are multiplied by, where the file says so itself.
    pub attention_factor: Option<f64>,
    /// With `mscale_all_dim`, another way to give the attention factor.
    pub mscale: Option<f64>,
    /// See `mscale`.
    pub mscale_all_dim: Option<f64>,
}

/// Llama 3.1's scaling, by wavelength in positions: above `original / low_freq_factor` the frequency is divided by
/// `factor`, below `original / high_freq_factor` it is kept, between the two it is blended.
#[derive(Clone, Debug, PartialEq)]
pub struct Llama3 {
    /// How many times longer the context became.
    pub factor: f64,
    /// Where dividing begins.
    pub low_freq_factor: f64,
    /// Where keeping ends; more than `low_freq_factor`.
    pub high_freq_factor: f64,
    /// The context before stretching.
    pub original_max_position_embeddings: usize,
}

impl RopeConfig {
    /// Angle per position of each pair of dimensions, `[head_dim / 2]`, in the f32 steps of transformers.
    pub fn inv_freq(&self, head_dim: usize) -> Vec<f32> {
        let period = |i: usize| self.theta.powf(f64::from((2 * i) as f32 / head_dim as f32)) as f32;
        let pairs = 0..head_dim / 2;
        match &self.scaling {
            None => pairs.map(|i| 1.0 / period(i)).collect(),
            Some(Scaling::Linear { factor }) => pairs.map(|i| 1.0 / period(i) / *factor as f32).collect(),
            Some(Scaling::Llama3(llama)) => pairs.map(|i| llama.scaled(1.0 / period(i))).collect(),
            Some(Scaling::Yarn(yarn)) => {
                let (low, high) = yarn.ramp(self.theta, head_dim);
                let frequency = |i: usize| {
                    let stretched = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                    let kept = 1.0 - stretched;
                    1.0 / (yarn.factor as f32 * period(i)) * (1.0 - kept) + 1.0 / period(i) * kept
                };
                pairs.map(frequency).collect()
            }
        }
    }

    /// What cos and sin are multiplied by.
    pub fn attention_factor(&self) -> f32 {
        match &self.scaling {
            Some(Scaling::Yarn(yarn)) => yarn.attention_factor() as f32,
            _ => 1.0,
        }
    }

    /// Either spelling: `rope_theta` beside `rope_scaling` (transformers 4), or both within `rope_parameters`
    /// (transformers 5). A gpt-oss config that has neither dictionary, or null, gets the released YaRN, as in
    /// transformers; the other families get plain frequencies, and 10000 where there is no `rope_theta`.
    pub(super) fn read(keys: &Keys, family: Family, max_position_embeddings: usize) -> Result<Self> {
        const THETA: RangeInclusive<f64> = 1.0 + 1e-6..=1e12;
        let old = keys.object("rope_scaling")?;
        let new = keys.object("rope_parameters")?;
        let mut thetas = Vec::new();
        for place in [Some(keys), new.as_ref(), old.as_ref()].into_iter().flatten() {
            thetas.extend(place.optional_float("rope_theta", THETA)?);
            if let Some(part) = place.optional_float("partial_rotary_factor", 0.0..=1.0)?.filter(|part| *part != 1.0) {
                return Err(place.fault("partial_rotary_factor", format!("{part} is not supported, should be 1")));
            }
        }
        let first = thetas.first().copied();
        let theta = match family {
            Family::GptOss => keys.required("rope_theta", first, &number(&THETA))?,
            Family::Qwen3Moe | Family::Qwen3 | Family::Llama => first.unwrap_or(10000.0),
        };
        if let Some(other) = thetas.iter().find(|&&other| other != theta) {
            return Err(keys.fault("rope_theta", format!("given as {theta} and, in another place, as {other}")));
        }

        let read = |place: Option<&Keys>| place.map(|k| Scaling::read(k, family, max_position_embeddings)).transpose();
        let scaling = match (read(old.as_ref())?, read(new.as_ref())?) {
            (None, None) if family == Family::GptOss => Some(Scaling::Yarn(Yarn::released())),
            (None, None) => None,
            (Some(one), None) | (None, Some(one)) => one,
            (Some(old), Some(new)) if old == new => new,
            (Some(_), Some(_)) => return Err(keys.fault("rope_parameters", "contradicts rope_scaling: remove one")),
        };
        Ok(Self { theta, scaling })
    }
}

impl Scaling {
    fn read(keys: &Keys, family: Family, max_position_embeddings: usize) -> Result<Option<Self>> {
        const FACTOR: RangeInclusive<f64> = 1.0..=65536.0;
        let key = if keys.map.contains_key("rope_type") { "rope_type" } else { "type" };
        let original = || keys.optional_int("original_max_position_embeddings", 1..=MAX_TOKENS);
        let kind = match keys.present(key) {
            None => return Ok(None),
            Some(value) => (value.as_str().unwrap_or_default(), value),
        };
        match kind {
            ("default", _) => Ok(None),
            ("yarn", _) => Yarn::read(keys, original()?, max_position_embeddings).map(|y| Some(Self::Yarn(y))),
            ("linear", _) if family != Family::GptOss => {
                Ok(Some(Self::Linear { factor: keys.float("factor", FACTOR)? }))
            }
            ("llama3", _) if family != Family::GptOss => {
                let low_freq_factor = keys.float("low_freq_factor", 1e-3..=1e6)?;
                let high_freq_factor = keys.float("high_freq_factor", 1e-3..=1e6)?;
                if high_freq_factor <= low_freq_factor {
                    let reason = format!("{high_freq_factor} is not more than low_freq_factor, {low_freq_factor}");
                    return Err(keys.fault("high_freq_factor", reason));
                }
                Ok(Some(Self::Llama3(Llama3 {
                    factor: keys.float("factor", FACTOR)?,
                    low_freq_factor,
                    high_freq_factor,
                    original_max_position_embeddings: original()?.unwrap_or(max_position_embeddings),
                })))
            }
            (_, other) if family == Family::GptOss => Err(keys.wrong(key, other, "\"yarn\" or \"default\"")),
            (_, other) => Err(keys.wrong(key, other, "\"llama3\", \"yarn\", \"linear\" or \"default\"")),
        }
    }
}

impl Llama3 {
    /// A frequency after scaling. transformers divides a number by a tensor as reciprocal times number.
    fn scaled(&self, inv_freq: f32) -> f32 {
        let (original, factor) = (self.original_max_position_embeddings as f64, self.factor as f32);
        let wavelength = (1.0 / inv_freq) * TAU as f32;
        if wavelength > (original / self.low_freq_factor) as f32 {
            return inv_freq / factor;
        }
        if wavelength < (original / self.high_freq_factor) as f32 {
            return inv_freq;
        }
        let band = (self.high_freq_factor - self.low_freq_factor) as f32;
        let smooth = ((1.0 / wavelength) * original as f32 - self.low_freq_factor as f32) / band;
        (1.0 - smooth) * inv_freq / factor + smooth * inv_freq
    }
}

impl Yarn {
    /// What transformers uses for a gpt-oss config that has no RoPE scaling: the released models' own.
    pub(super) fn released() -> Self {
        Self {
            factor: 32.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_max_position_embeddings: 4096,
            truncate: false,
            attention_factor: None,
            mscale: None,
            mscale_all_dim: None,
        }
    }

    fn read(keys: &Keys, original: Option<usize>, max_position_embeddings: usize) -> Result<Self> {
        let implied = original.map(|original| max_position_embeddings as f64 / original as f64);
        let factor = keys.optional_float("factor", 1.0..=65536.0)?.or(implied.filter(|factor| *factor >= 1.0));
        let beta_fast = keys.optional_float("beta_fast", 1e-3..=1e6)?.unwrap_or(32.0);
        let beta_slow = keys.optional_float("beta_slow", 1e-3..=1e6)?.unwrap_or(1.0);
        if beta_fast < beta_slow {
            return Err(keys.fault("beta_fast", format!("{beta_fast} is less than beta_slow, {beta_slow}")));
        }
        Ok(Self {
            factor: keys.required("factor", factor, &number(&(1.0..=65536.0)))?,
            beta_fast,
            beta_slow,
            original_max_position_embeddings: original.unwrap_or(max_position_embeddings),
            truncate: keys.bool("truncate")?.unwrap_or(true),
            attention_factor: keys.optional_float("attention_factor", 1e-3..=1e3)?,
            mscale: keys.optional_float("mscale", 0.0..=1e3)?,
            mscale_all_dim: keys.optional_float("mscale_all_dim", 0.0..=1e3)?,
        })
    }

    /// Where the ramp begins and ends, in pairs of dimensions.
    fn ramp(&self, theta: f64, head_dim: usize) -> (f64, f64) {
        let original = self.original_max_position_embeddings as f64;
        let dim = |rotations: f64| head_dim as f64 * (original / (rotations * TAU)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (dim(self.beta_fast), dim(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
        if low == high {
            high += 0.001; // as transformers does, against 0 / 0
        }
        (low, high)
    }

    fn attention_factor(&self) -> f64 {
        let scale = |mscale: f64| if self.factor <= 1.0 { 1.0 } else { 0.1 * mscale * self.factor.ln() + 1.0 };
        match (self.attention_factor, self.mscale, self.mscale_all_dim) {
            (Some(factor), _, _) => factor,
            (None, Some(a), Some(b)) if a != 0.0 && b != 0.0 => scale(a) / scale(b),
            _ => scale(1.0),
        }
    }
}
