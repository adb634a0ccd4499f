//! Devices that are wrong about anything but NVFP4, FP8 and quantised activations.

use super::{Fault, after, before, written};
use fourfold::ops::{CacheFormat, Gate, InputFormat, Op};
use fourfold::program::Launch;

fn has(launch: &Launch, name: &str) -> bool {
    launch.args.iter().any(|arg| arg.name == name)
}

const fn is_subnormal(bits: u32) -> bool {
    bits & 0x7f80_0000 == 0 && bits << 1 != 0
}

pub(super) fn faults() -> Vec<Fault> {
    vec![
        written(
            "nibbles swapped",
            |label, bytes| {
                if label == "oracle mxfp4 codes" {
                    bytes.iter_mut().for_each(|b| *b = b.rotate_left(4));
                }
            },
            &["element_order", "codes_and_scales", "swiglu"],
        ),
        written(
            "bytes of a word swapped",
            |label, bytes| {
                if label == "oracle mxfp4 codes" {
                    bytes.chunks_exact_mut(4).for_each(|word| word.reverse());
                }
            },
            &["element_order", "codes_and_scales", "swiglu"],
        ),
        written(
            "the scale's exponent is off by one",
            |label, bytes| {
                if label == "oracle mxfp4 scales" {
                    bytes.iter_mut().for_each(|b| *b = b.wrapping_add(1));
                }
            },
            &[
                "uniform_fp4",
                "column_dependent",
                "element_order",
                "codes_and_scales",
                "smallest_normal",
                "reduction_tree",
                "swiglu",
                "experts",
            ],
        ),
        written(
            "scales shifted by one block",
            |label, bytes| {
                // Not the padded word that a buffer may end with.
                if label == "oracle mxfp4 scales" && bytes.len() > 4 {
                    bytes.rotate_right(1);
                }
            },
            &["column_dependent", "element_order", "codes_and_scales", "smallest_normal", "reduction_tree", "experts"],
        ),
        written(
            "one code of sixteen decodes as another",
            |label, bytes| {
                if label == "oracle mxfp4 codes" {
                    bytes.iter_mut().filter(|b| **b & 15 == 13).for_each(|b| *b = *b & 0xf0 | 12);
                }
            },
            &["column_dependent", "codes_and_scales"],
        ),
        written(
            "halves of a bf16 word swapped",
            |label, bytes| {
                if label == "oracle bf16 codes" {
                    bytes.chunks_exact_mut(4).for_each(|word| word.rotate_left(2));
                }
            },
            &["bf16_embed", "bf16_linear", "integer_sums", "fused_multiply_add"],
        ),
        written(
            "the sign of zero is lost in bf16",
            |label, bytes| {
                if label == "oracle bf16 codes" {
                    let bits = bytes.chunks_exact_mut(2).filter(|b| b[0] == 0 && b[1] == 0x80);
                    bits.for_each(|b| b[1] = 0);
                }
            },
            &["bf16_embed"],
        ),
        after(
            "results below 2^-125 are flushed",
            |device, launch, _| {
                if let Op::Linear(_) = launch.op {
                    let flush = |v: &mut f32| *v = if v.abs() < 2.0 * f32::MIN_POSITIVE { 0.0 } else { *v };
                    device.change_floats(launch, "y", |y| y.iter_mut().for_each(flush));
                }
            },
            &["smallest_normal", "bf16_linear"],
        ),
        after(
            "subnormal results are flushed, which is allowed",
            |device, launch, _| {
                if matches!(launch.op, Op::Linear(_) | Op::Embed(_)) {
                    let name = if matches!(launch.op, Op::Embed(_)) { "x" } else { "y" };
                    let flush = |w: &mut u32| *w = if is_subnormal(*w) { 0 } else { *w };
                    device.change(launch, name, |y| y.iter_mut().for_each(flush));
                }
            },
            &[],
        ),
        written(
            "a subnormal scale is flushed, which is allowed",
            |label, bytes| {
                // Nothing is zero in E8M0, so the block's codes become zero instead: rows of 8 blocks of 16 bytes.
                if label == "oracle mxfp4 codes" && bytes.len() == 32 * 128 && bytes[..8] == bytes[16..24] {
                    let ascending = [0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe];
                    if bytes[..8] == ascending {
                        bytes[..16].fill(0);
                    }
                }
            },
            &[],
        ),
        before(
            "one lane of eight is left out of a sum",
            |device, launch, _| {
                if let Op::Linear(op) = launch.op
                    && op.input == InputFormat::F32
                {
                    let k = op.k as usize;
                    device.change_floats(launch, "x", |x| {
                        x.iter_mut().enumerate().filter(|(i, _)| i % k / 8 % 8 == 7).for_each(|(_, x)| *x = 0.0);
                    });
                }
            },
            &[
                "uniform_fp4",
                "column_dependent",
                "element_order",
                "codes_and_scales",
                "smallest_normal",
                "reduction_tree",
                "integer_sums",
                "nvfp4_weights",
                "fp8_weights",
                "fp8_blocks",
            ],
        ),
        after(
            "neighbouring rows of a matrix are mixed up",
            |device, launch, _| {
                if let Op::Linear(op) = launch.op {
                    let n = op.n as usize;
                    device.change(launch, "y", |y| y.chunks_exact_mut(n).for_each(|row| row.swap(2, 3)));
                }
            },
            &[
                "column_dependent",
                "element_order",
                "codes_and_scales",
                "smallest_normal",
                "reduction_tree",
                "bf16_linear",
                "integer_sums",
                "nvfp4_weights",
                "fp8_weights",
                "fp8_blocks",
                "fp4_products",
            ],
        ),
        after(
            "sums are off by one unit of the last place",
            |device, launch, _| {
                if let Op::Linear(_) = launch.op {
                    let off = |v: &mut f32| *v = if *v == 0.0 { 0.0 } else { v.next_up() };
                    device.change_floats(launch, "y", |y| y.iter_mut().for_each(off));
                }
            },
            &[
                "uniform_fp4",
                "column_dependent",
                "element_order",
                "codes_and_scales",
                "smallest_normal",
                "reduction_tree",
                "bf16_linear",
                "integer_sums",
                "fused_multiply_add",
                "nvfp4_weights",
                "fp8_weights",
                "fp8_blocks",
                "fp4_products",
            ],
        ),
        after(
            "a product is rounded before it is added, which is allowed",
            |device, launch, _| {
                if let Op::Linear(_) = launch.op {
                    let lose = |v: &mut f32| *v = if *v == 2f32.powi(-30) { 0.0 } else { *v };
                    device.change_floats(launch, "y", |y| y.iter_mut().for_each(lose));
                }
            },
            &["bf16_linear"], // which has a weight of 2^-30
        ),
        before(
            "ties go to the higher expert",
            |device, launch, _| {
                if let Op::Router(op) = launch.op {
                    device.change_floats(launch, "scores", |s| {
                        s.chunks_exact_mut(op.e as usize).for_each(<[f32]>::reverse)
                    });
                }
            },
            &["router_ties"],
        ),
        after(
            "exp is off by ten units of the last place",
            |device, launch, _| {
                if let Op::Router(_) = launch.op {
                    let off = |w: &mut u32| *w += if *w == 0.25f32.to_bits() || *w == 0 { 0 } else { 10 };
                    device.change(launch, "weights", |w| w.iter_mut().for_each(off));
                }
            },
            &["exp", "router_all"],
        ),
        after(
            "exp rounds its argument, which is allowed",
            |device, launch, _| {
                if let Op::Router(_) = launch.op {
                    let off = |w: &mut f32| *w = if *w == 0.0 { 0.0 } else { *w * (1.0 - w.ln() * 2f32.powi(-25)) };
                    device.change_floats(launch, "weights", |w| w.iter_mut().for_each(off));
                }
            },
            &[],
        ),
        after(
            "division rounds, which is allowed",
            |device, launch, _| match launch.op {
                Op::Router(_) => {
                    device.change(launch, "weights", |w| w.iter_mut().filter(|w| **w != 0).for_each(|w| *w += 1))
                }
                Op::Attention(_) => device.change(launch, "a", |a| {
                    a.iter_mut().filter(|a| **a << 1 != 0).for_each(|a| *a += 1);
                }),
                _ => {}
            },
            &[],
        ),
        before(
            "the factor inside the sigmoid is 1.7",
            |_, launch, _| {
                if let Op::MoeUp(op) = &mut launch.op
                    && op.gate != Gate::Silu
                {
                    op.gate = Gate::Clamped { limit: 7.0, alpha: 1.7 };
                }
            },
            &["swiglu"],
        ),
        before(
            "gate and up are not clamped",
            |_, launch, _| {
                if let Op::MoeUp(op) = &mut launch.op
                    && op.gate != Gate::Silu
                {
                    op.gate = Gate::Clamped { limit: 1e30, alpha: 1.702 };
                }
            },
            &["swiglu"],
        ),
        before(
            "another expert computes",
            |device, launch, _| {
                if let Op::MoeUp(_) | Op::MoeDown(_) = launch.op
                    && has(launch, "experts")
                {
                    device.change(launch, "experts", |e| e.iter_mut().for_each(|e| *e = if *e == 1 { 0 } else { *e }));
                }
            },
            &["swiglu", "experts", "nvfp4_globals"],
        ),
        before(
            "the last route of a tile is left out",
            |device, launch, _| {
                if let Op::MoeDown(_) = launch.op
                    && has(launch, "tiles")
                {
                    // Expert and count, and eight routes.
                    let leave_out = |count: &mut u32| *count = count.saturating_sub(1);
                    device.change(launch, "tiles", |w| w.chunks_exact_mut(10).for_each(|tile| leave_out(&mut tile[1])));
                }
            },
            &["experts", "stale_scratch"],
        ),
        after(
            "NaN becomes the limit",
            |device, launch, _| {
                if let Op::MoeUp(_) = launch.op {
                    device.change_floats(launch, "y", |y| y.iter_mut().filter(|y| y.is_nan()).for_each(|y| *y = 7.0));
                }
            },
            &["nan_stays"],
        ),
        before(
            "routing weights are taken in the wrong order",
            |device, launch, _| {
                if let Op::MoeScatter(op) = launch.op {
                    let a = op.a as usize;
                    device.change(launch, "weights", |w| w.chunks_exact_mut(a).for_each(|w| w.swap(0, 1)));
                }
            },
            &["scatter"],
        ),
        before(
            "the sink is dropped",
            |device, launch, _| {
                if let Op::Attention(_) = launch.op
                    && has(launch, "sinks")
                {
                    device.change(launch, "sinks", |s| s.fill(0xff7f_ff7f));
                }
            },
            &["attention_one_key"],
        ),
        before(
            "the first of several keys is missed",
            |_, launch, _| {
                if let Op::Attention(op) = &mut launch.op
                    && op.window == 0
                {
                    op.window = 127;
                }
            },
            &["attention_mean"],
        ),
        before(
            "the window is one key too wide",
            |_, launch, _| {
                if let Op::Attention(op) = &mut launch.op {
                    op.window += u32::from(op.window > 0);
                }
            },
            &["attention_window"],
        ),
        before(
            "the window is one key too narrow",
            |_, launch, _| {
                if let Op::Attention(op) = &mut launch.op {
                    op.window -= u32::from(op.window > 0);
                }
            },
            &["attention_window"],
        ),
        before(
            "rotation goes the other way",
            |device, launch, _| {
                if let Op::Rope(_) = launch.op {
                    let back = |pair: &mut [f32]| pair[1] = -pair[1];
                    device.change_floats(launch, "table", |t| t.chunks_exact_mut(2).for_each(back));
                }
            },
            &["rope_quarter_turns"],
        ),
        before(
            "bf16 is cut off and not rounded",
            |device, launch, _| {
                if let Op::Rope(op) = launch.op
                    && op.format == CacheFormat::Bf16
                {
                    device.change(launch, "qkv", |v| v.iter_mut().for_each(|v| *v &= 0xffff_0000));
                }
            },
            &["bf16_rounding"],
        ),
        before(
            "bf16 ties go up",
            |device, launch, _| {
                if let Op::Rope(op) = launch.op
                    && op.format == CacheFormat::Bf16
                {
                    let nudge = |v: &mut u32| *v |= u32::from(*v & 0xffff == 0x8000);
                    device.change(launch, "qkv", |v| v.iter_mut().for_each(nudge));
                }
            },
            &["bf16_rounding"],
        ),
        before(
            "the mean of squares misses an element",
            |device, launch, _| {
                if let Op::RmsNorm(op) = launch.op
                    && op.eps == 0.0
                {
                    let d = op.d as usize;
                    device.change_floats(launch, "x", |x| x.chunks_exact_mut(d).for_each(|x| x[d - 1] = 0.0));
                }
            },
            &["rms_norm"],
        ),
        before(
            "key heads take the gain of query heads",
            |device, launch, _| {
                if let Op::HeadNorm(_) = launch.op {
                    let gains = device.words(launch, "q_gain");
                    device.change(launch, "k_gain", |k| k.copy_from_slice(&gains));
                }
            },
            &["head_norm"],
        ),
        before(
            "values are normalised too",
            |_, launch, _| {
                if let Op::HeadNorm(op) = &mut launch.op {
                    // Three query heads and no key heads: the gain of queries for all but the values' own place.
                    (op.h, op.hk) = (op.h + 2 * op.hk, 0);
                }
            },
            &["head_norm"],
        ),
        before(
            "SiLU is the clamped activation",
            |_, launch, _| {
                if let Op::Glu(op) = &mut launch.op {
                    op.gate = Gate::Clamped { limit: 1e30, alpha: 1.0 };
                }
            },
            &["silu"],
        ),
        before(
            "gate and up stand the other way round",
            |device, launch, _| {
                if let Op::Glu(op) = launch.op {
                    let f = op.f as usize;
                    device.change(launch, "x", |x| x.chunks_exact_mut(2 * f).for_each(|row| row.rotate_left(f)));
                }
            },
            &["silu"],
        ),
        after(
            "a sink of equal score where there is none",
            |device, launch, _| {
                if let Op::Attention(_) = launch.op
                    && !has(launch, "sinks")
                {
                    device.change_floats(launch, "a", |a| a.iter_mut().for_each(|a| *a /= 2.0));
                }
            },
            &["attention_no_sink"],
        ),
        before(
            "router weights are always renormalised",
            |_, launch, _| {
                if let Op::Router(op) = &mut launch.op {
                    op.normalise = true;
                }
            },
            &["router_all"],
        ),
        before(
            "rows are picked one too early",
            |device, launch, _| {
                if let Op::Take(_) = launch.op {
                    device.change(launch, "picks", |p| p.iter_mut().for_each(|p| *p = p.saturating_sub(1)));
                }
            },
            &["add_and_take"],
        ),
        after(
            "every other run is off by a unit of the last place",
            |device, launch, n| {
                // The block's own: seven launches a run, so that every other n is even.
                if let Op::MoeScatter(op) = launch.op
                    && op.a == 2
                {
                    let off = |y: &mut u32| *y ^= u32::from(n.is_multiple_of(2) && *y << 1 != 0);
                    device.change(launch, "y", |y| y.iter_mut().for_each(off));
                }
            },
            &["determinism", "stale_scratch"],
        ),
        before(
            "sums begin with what stood in the output",
            |device, launch, _| {
                if let Op::MoeScatter(_) = launch.op {
                    // 0 NaN is NaN.
                    let stale = device.words(launch, "y");
                    device.change_floats(launch, "weights", |w| w[0] += f32::from_bits(stale[0]) * 0.0);
                }
            },
            &["scatter", "stale_scratch"],
        ),
    ]
}
