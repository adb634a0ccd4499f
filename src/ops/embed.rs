//! Token ids to rows of the embedding table.

use super::{Op, Row, Views, Weight};
use crate::program::{Launch, Program, Slice};
use crate::shader::Kernel;

pub(crate) const KERNEL: Kernel =
    Kernel { name: "embed", source: include_str!("../../shaders/embed.wgsl"), slots: &[] };

/// Constants of one part of the table.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Embed {
    /// Hidden size.
    pub d: u32,
    /// First token of the part.
    pub first: u32,
    /// Tokens in the part.
    pub count: u32,
}

impl Program {
    /// `x[t] = table[token of row t]`. `rows`: `Row [T]`; `x`: `[T, D]` f32.
    pub fn embed(&mut self, table: &Weight, rows: Slice, x: Slice) {
        for part in &table.parts {
            let op = Embed { d: table.k, first: part.first, count: part.count };
            let launch = Launch::new(Op::Embed(op), &KERNEL, [op.d.div_ceil(128), self.tokens, 1])
                .constant("D", op.d)
                .constant("FIRST", op.first)
                .constant("COUNT", op.count)
                .read("rows", rows)
                .read("e", part.codes)
                .update("x", x);
            self.push(launch);
        }
    }
}

impl Embed {
    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        self.reference(&bytemuck::cast_slice(views.words("rows"))[..tokens], views.bf16("e"), views.f32_mut("x"));
    }

    /// `rows [T]`, `e [COUNT, D]`, `x [T, D]`.
    pub fn reference(&self, rows: &[Row], e: &[half::bf16], x: &mut [f32]) {
        let d = self.d as usize;
        for (t, row) in rows.iter().enumerate() {
            if (self.first..self.first + self.count).contains(&row.token) {
                let from = (row.token - self.first) as usize * d;
                for i in 0..d {
                    x[t * d + i] = e[from + i].to_f32();
                }
            }
        }
    }
}
