//! Quantising the rows that NVFP4 weights are multiplied with (W4A4).

use super::{Amax, Input, Op, Step, Views, staged_words};
use crate::format::{nvfp4, nvfp4::Global};
use crate::program::{Launch, Program, Slice};
use crate::shader::{ACT_SCALE, Kernel};

pub(crate) const KERNEL: Kernel = Kernel {
    name: "stage_activation",
    source: include_str!("../../shaders/stage_activation.wgsl"),
    slots: &[ACT_SCALE],
};

/// What enters the products with NVFP4 weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activations {
    /// f32 rows as they are (W4A16 and better): right for every checkpoint.
    #[default]
    F32,
    /// NVFP4 with one scale, amax/2688, for all rows of a product. A token then depends on its neighbours by definition.
    Nvfp4Dynamic,
    /// NVFP4 with each row's own amax/2688.
    Nvfp4Token,
    /// NVFP4 with the checkpoint's calibrated `input_scale`.
    Nvfp4Static,
}

/// Where a row's scale comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActScale {
    /// The first of `input_scales`.
    Static,
    /// The `input_scales` element of the row's expert.
    Expert,
    /// The row's own amax/2688.
    Token,
    /// amax/2688 of all rows.
    Tensor,
}

/// Constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StageActivation {
    /// Elements in a row.
    pub k: u32,
    /// Rows of the result for each row of the step.
    pub rows_per_token: u32,
    /// Rows of the result that read one row of the input.
    pub share: u32,
    /// Where the scale comes from.
    pub scale: ActScale,
}

/// Buffers for quantised rows, used by one product after the other.
#[derive(Clone, Copy, Debug)]
pub struct Staging {
    /// `[R, staged_words(K)]` words.
    pub rows: Slice,
    /// `[R]` f32.
    pub scales: Slice,
    /// `[R, 2]` f32: amax, and the number of blocks that were clipped.
    pub report: Slice,
    /// `[R]` f32: amax of each row, for [`ActScale::Tensor`].
    pub amaxes: Slice,
}

/// What a static scale is read from.
#[derive(Clone, Copy, Debug)]
pub struct InputScales {
    /// `[1]` or `[E]` f32.
    pub scales: Slice,
    /// `[T, A]` u32, for one scale an expert.
    pub experts: Option<Slice>,
}

impl Program {
    /// Quantise `x [T rows_per_token / share, K]` f32. `step`: uniform with T.
    pub fn stage_activation(
        &mut self,
        op: StageActivation,
        step: Slice,
        x: Slice,
        given: Option<InputScales>,
        to: &Staging,
    ) -> Input {
        let rows = self.tokens * op.rows_per_token;
        let launch = Launch::new(Op::StageActivation(op), &KERNEL, [rows, 1, 1])
            .constant("K", op.k)
            .constant("SHARE", op.share)
            .read("x", x);
        let given = || given.expect("a static scale comes with the checkpoint's scales");
        let launch = match op.scale {
            ActScale::Static => launch.fill("act_scale", "act_scale_static").read("input_scales", given().scales),
            ActScale::Expert => {
                let experts = given().experts.expect("a scale for each expert comes with the routes");
                let launch = launch.fill("act_scale", "act_scale_expert");
                launch.read("input_scales", given().scales).read("experts", experts)
            }
            ActScale::Token => launch.fill("act_scale", "act_scale_token"),
            ActScale::Tensor => {
                let amax = Amax { k: op.k, rows_per_token: op.rows_per_token / op.share };
                self.amax(amax, x, to.amaxes);
                let launch = launch.fill("act_scale", "act_scale_tensor");
                let launch = launch.constant("ROWS_PER_TOKEN", amax.rows_per_token);
                launch.read("step", step).read("amaxes", to.amaxes)
            }
        };
        let launch = launch.write("y", to.rows).write("y_scales", to.scales).write("report", to.report);
        self.push(launch);
        Input::Nvfp4 { rows: to.rows, scales: to.scales }
    }
}

impl StageActivation {
    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        let (k, rows) = (self.k as usize, tokens * self.rows_per_token as usize);
        let x = &views.f32("x")[..rows / self.share as usize * k];
        let scale: Box<dyn Fn(usize, f32) -> f32> = match self.scale {
            ActScale::Static => {
                let scale = views.f32("input_scales")[0];
                Box::new(move |_, _| scale)
            }
            ActScale::Expert => {
                let (scales, experts) = (views.f32("input_scales"), views.words("experts"));
                Box::new(move |row, _| scales[experts[row] as usize])
            }
            ActScale::Token => Box::new(|_, amax| amax / nvfp4::MAX),
            ActScale::Tensor => {
                let step: &[Step] = bytemuck::cast_slice(views.words("step"));
                let amaxes =
                    &views.f32("amaxes")[..step[0].tokens as usize * (self.rows_per_token / self.share) as usize];
                let amax = amaxes.iter().copied().max_by(f32::total_cmp).unwrap_or(0.0);
                Box::new(move |_, _| amax / nvfp4::MAX)
            }
        };
        let [y, y_scales, report] = ["y", "y_scales", "report"].map(|name| views.words_mut(name));
        self.reference(x, &*scale, y, bytemuck::cast_slice_mut(y_scales), bytemuck::cast_slice_mut(report));
    }

    /// `x [R / share, K]`; `scale`: of a row, given its amax; `y [R, staged_words(K)]`, `y_scales [R]`, `report [R, 2]`.
    pub fn reference(
        &self,
        x: &[f32],
        scale: &dyn Fn(usize, f32) -> f32,
        y: &mut [u32],
        y_scales: &mut [f32],
        report: &mut [f32],
    ) {
        let (k, share) = (self.k as usize, self.share as usize);
        let words = staged_words(k);
        for row in 0..x.len() / k * share {
            let x = &x[row / share * k..][..k];
            let amax = x.iter().map(|v| v.abs()).max_by(f32::total_cmp).unwrap_or(0.0);
            let scale = scale(row, amax);
            let usable = amax.is_finite() && scale.is_finite();
            // A row that is no number becomes zeros times NaN.
            let zeros: Vec<f32>;
            let (rows, global) = match usable {
                true => (x, scale),
                false => {
                    zeros = x.iter().map(|v| 0f32.copysign(*v)).collect();
                    (&zeros[..], 0.0)
                }
            };
            let encoded = nvfp4::quantize_activations(rows, Global::Multiplier(global)).expect("all finite");
            let clipped = nvfp4::clipped_blocks(rows, Global::Multiplier(global));
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut y[row * words..][..words]);
            let (scales, codes) = bytes.split_at_mut(k.div_ceil(64) * 4);
            scales.fill(0);
            scales[..k / nvfp4::BLOCK].copy_from_slice(&encoded.scales);
            codes.copy_from_slice(&encoded.codes);
            y_scales[row] = if usable { scale } else { f32::NAN };
            report[2 * row] = amax;
            report[2 * row + 1] = clipped as f32;
        }
    }
}
