//! The likeliest token of each part of the vocabulary.

use super::{Op, Views};
use crate::program::{Launch, Program, Slice};
use crate::shader::Kernel;

pub(crate) const KERNEL: Kernel =
    Kernel { name: "argmax", source: include_str!("../../shaders/argmax.wgsl"), slots: &[] };

/// Parts of the vocabulary that are searched side by side.
pub(crate) const PARTS: u32 = 64;

/// Constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Argmax {
    /// Logits of a row.
    pub v: u32,
}

/// What is known of some of a row's logits.
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Peak {
    /// The largest logit's token, of equal ones the lowest id.
    pub id: u32,
    /// Its logit; minus infinity if there is none.
    pub logit: f32,
    /// The sum of e^(logit - largest) over these tokens.
    pub sum: f32,
    /// Not zero: a logit was NaN or plus infinity.
    pub bad: u32,
}

impl Program {
    /// The likeliest token of each of 64 parts of `logits [T, V]` f32, into `parts [T, 64]` ([`Peak`]).
    pub fn argmax(&mut self, v: u32, logits: Slice, parts: Slice) {
        let launch = Launch::new(Op::Argmax(Argmax { v }), &KERNEL, [PARTS, self.tokens, 1])
            .constant("V", v)
            .constant("PARTS", PARTS)
            .read("logits", logits)
            .write("parts", parts);
        self.push(launch);
    }
}

/// The largest logit of a row's parts.
pub(super) fn largest(parts: &[Peak]) -> f32 {
    parts.iter().fold(f32::NEG_INFINITY, |most, part| most.max(part.logit))
}

impl Argmax {
    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        let (v, parts) = (self.v as usize, PARTS as usize);
        let logits = &views.f32("logits")[..tokens * v];
        let to: &mut [Peak] = bytemuck::cast_slice_mut(views.words_mut("parts"));
        let each = v.div_ceil(parts);
        for (row, to) in logits.chunks_exact(v).zip(to.chunks_exact_mut(parts)) {
            for (p, to) in to.iter_mut().enumerate() {
                let first = (p * each).min(v);
                *to = self.reference(&row[first..(first + each).min(v)], first as u32);
            }
        }
    }

    /// The likeliest of these logits, whose first is token `first`'s.
    pub fn reference(&self, logits: &[f32], first: u32) -> Peak {
        let bad = |l: &&f32| l.is_nan() || **l == f32::INFINITY;
        let (mut id, mut largest) = (first, f32::NEG_INFINITY);
        for (i, l) in logits.iter().enumerate().filter(|(_, l)| !bad(l)) {
            if *l > largest {
                (id, largest) = (first + i as u32, *l);
            }
        }
        let sum: f64 = logits.iter().map(|l| f64::from(l - largest.max(f32::MIN)).exp()).sum();
        Peak { id, logit: largest, sum: sum as f32, bad: u32::from(logits.iter().any(|l| bad(&l))) }
    }
}
