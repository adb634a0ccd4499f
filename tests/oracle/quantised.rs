//! Devices that are wrong about NVFP4, FP8, or quantising activations.

use super::{Fault, Wrong, after, before, written};
use fourfold::ops::{ActScale, InputFormat, Linear, Op, staged_words};
use fourfold::program::Launch;

/// What a launch that multiplies quantised rows is.
fn quantised_product(launch: &Launch) -> Option<Linear> {
    match launch.op {
        Op::Linear(op) if op.input == InputFormat::Nvfp4 => Some(op),
        _ => None,
    }
}

/// The bytes of each quantised row, scales and codes apart.
fn change_rows(device: &Wrong, launch: &Launch, name: &str, k: u32, change: impl Fn(&mut [u8], &mut [u8])) {
    let (k, words) = (k as usize, staged_words(k as usize));
    device.change(launch, name, |rows| {
        for row in rows.chunks_exact_mut(words) {
            let (scales, codes) = bytemuck::cast_slice_mut(row).split_at_mut(k.div_ceil(64) * 4);
            change(scales, codes);
        }
    });
}

/// The E4M3 byte of 2^(byte - 127), or zero where it has none.
fn as_e8m0(byte: u8) -> u8 {
    match byte {
        ..118 => 0,                    // below 2^-9
        118..121 => 1 << (byte - 118), // subnormal: 2^-9, 2^-8, 2^-7
        _ => (byte - 120) << 3,
    }
}

const NVFP4: &[&str] = &["nvfp4_weights", "nvfp4_globals", "fp4_products"];

pub(super) fn faults() -> Vec<Fault> {
    let mut faults = of_weights();
    faults.extend(of_staging());
    faults.extend(of_products());
    faults
}

fn of_weights() -> Vec<Fault> {
    vec![
        written(
            "NVFP4 nibbles swapped",
            |label, bytes| {
                if label == "oracle nvfp4 codes" {
                    bytes.iter_mut().for_each(|b| *b = b.rotate_left(4));
                }
            },
            NVFP4,
        ),
        written(
            "E4M3 scales read as E8M0",
            |label, bytes| {
                if label == "oracle nvfp4 scales" {
                    bytes.iter_mut().for_each(|b| *b = as_e8m0(*b));
                }
            },
            NVFP4,
        ),
        written(
            "E4M3 scales read as whole numbers",
            |label, bytes| {
                // 56, which stands for 1, becomes 56: exponent 5, mantissa 6.
                if label == "oracle nvfp4 scales" {
                    bytes.iter_mut().filter(|b| **b == 0x38).for_each(|b| *b = 0x66);
                }
            },
            NVFP4,
        ),
        written(
            "NVFP4 scales shifted by one block",
            |label, bytes| {
                // Not the padded word that a buffer may end with.
                if label == "oracle nvfp4 scales" && bytes.len() > 4 {
                    bytes.rotate_right(1);
                }
            },
            &["nvfp4_weights", "fp4_products"],
        ),
        written(
            "NVFP4 scales in rows read in 128x4 order",
            |label, bytes| {
                // Of 32 rows of 16 scales: the first four tiles' worth, 16 bytes a row of the tile.
                if label == "oracle nvfp4 scales" && bytes.len() == 512 {
                    let old = bytes.to_vec();
                    for (i, byte) in bytes.iter_mut().enumerate() {
                        let (row, k) = (i / 16, i % 16);
                        *byte = old.get(k / 4 * 512 + row % 32 * 16 + row / 32 * 4 + k % 4).copied().unwrap_or(0);
                    }
                }
            },
            &["nvfp4_weights"],
        ),
        written(
            "subnormal E4M3 scales count as zero",
            |label, bytes| {
                if label == "oracle nvfp4 scales" {
                    bytes.iter_mut().filter(|b| **b < 8).for_each(|b| *b = 0);
                }
            },
            &["nvfp4_weights"],
        ),
        written(
            "the tensor scale is ignored",
            |label, bytes| {
                if label == "oracle nvfp4 row scales" {
                    bytes.chunks_exact_mut(4).for_each(|b| b.copy_from_slice(&1f32.to_le_bytes()));
                }
            },
            NVFP4,
        ),
        written(
            "a divisor is taken as a multiplier",
            |label, bytes| {
                if label == "oracle nvfp4 row scales" {
                    for b in bytes.as_chunks_mut::<4>().0 {
                        *b = (1.0 / f32::from_le_bytes(*b)).to_le_bytes();
                    }
                }
            },
            NVFP4,
        ),
        written(
            "up takes the gate's tensor scale",
            |label, bytes| {
                // Of experts with nine gates, then nine ups.
                if label == "oracle nvfp4 row scales" && bytes.len() == 3 * 18 * 4 {
                    bytes.chunks_exact_mut(72).for_each(|expert| expert.copy_within(..36, 36));
                }
            },
            &["nvfp4_globals"],
        ),
        written(
            "the first expert's tensor scale serves all",
            |label, bytes| {
                if label == "oracle nvfp4 row scales" && bytes.len() == 3 * 19 * 4 {
                    let first = bytes[..76].to_vec();
                    bytes.chunks_exact_mut(76).for_each(|expert| expert.copy_from_slice(&first));
                }
            },
            &["nvfp4_globals"],
        ),
        written(
            "subnormal E4M3 weights count as zero",
            |label, bytes| {
                if label.starts_with("oracle fp8") && label.ends_with("codes") {
                    bytes.iter_mut().filter(|b| **b & 0x7f < 8).for_each(|b| *b = 0);
                }
            },
            &["fp8_weights", "fp8_blocks"],
        ),
        written(
            "bytes of an FP8 word swapped",
            |label, bytes| {
                if label.starts_with("oracle fp8") && label.ends_with("codes") {
                    bytes.chunks_exact_mut(4).for_each(|word| word.reverse());
                }
            },
            &["fp8_weights", "fp8_blocks"],
        ),
        written(
            "FP8 row scales are ignored",
            |label, bytes| {
                if label == "oracle fp8 row scales" {
                    bytes.chunks_exact_mut(4).for_each(|b| b.copy_from_slice(&1f32.to_le_bytes()));
                }
            },
            &["fp8_weights"],
        ),
        written(
            "FP8 scales shifted by one block",
            |label, bytes| {
                if label == "oracle fp8-blocks scales" {
                    bytes.rotate_right(4);
                }
            },
            &["fp8_blocks"],
        ),
    ]
}

fn of_staging() -> Vec<Fault> {
    vec![
        before(
            "the static scale is ignored",
            |_, launch, _| {
                if let Op::StageActivation(op) = &mut launch.op
                    && matches!(op.scale, ActScale::Static | ActScale::Expert)
                {
                    op.scale = ActScale::Token;
                }
            },
            &["stage_activation", "act_scales"],
        ),
        before(
            "the first expert's input scale serves all",
            |_, launch, _| {
                if let Op::StageActivation(op) = &mut launch.op
                    && op.scale == ActScale::Expert
                {
                    op.scale = ActScale::Static;
                }
            },
            &["act_scales"],
        ),
        before(
            "each row has a scale of its own where one is for all",
            |_, launch, _| {
                if let Op::StageActivation(op) = &mut launch.op
                    && op.scale == ActScale::Tensor
                {
                    op.scale = ActScale::Token;
                }
            },
            &["act_scales"],
        ),
        before(
            "half is rounded away from even",
            |device, launch, _| {
                if let Op::StageActivation(_) = launch.op {
                    // The middles under a unit of 1/2 whose even neighbour is the smaller one.
                    let nudge = |x: &mut f32| {
                        *x = if [0.125, 0.625, 1.25, 2.5].contains(&x.abs()) {
                            x.signum() * x.abs().next_up()
                        } else {
                            *x
                        };
                    };
                    device.change_floats(launch, "x", |x| x.iter_mut().for_each(nudge));
                }
            },
            &["stage_activation"],
        ),
        after(
            "a block scale's half is rounded up",
            |device, launch, _| {
                // 17 becomes 18 and not 16.
                if let Op::StageActivation(op) = launch.op {
                    let up = |scales: &mut [u8], _: &mut [u8]| {
                        scales.iter_mut().filter(|b| **b == 0x58).for_each(|b| *b += 1);
                    };
                    change_rows(device, launch, "y", op.k, up);
                }
            },
            &["stage_activation", "act_scales"],
        ),
        after(
            "scales are not clipped at 448",
            |device, launch, _| {
                if let Op::StageActivation(op) = launch.op {
                    let past = |scales: &mut [u8], _: &mut [u8]| {
                        scales.iter_mut().filter(|b| **b == 0x7e).for_each(|b| *b = 0x7f);
                    };
                    change_rows(device, launch, "y", op.k, past);
                }
            },
            &["stage_activation", "act_scales"],
        ),
        after(
            "what is past 6 wraps around",
            |device, launch, _| {
                // Where a block was clipped, a code of 6 becomes 0.
                if let Op::StageActivation(op) = launch.op
                    && device.words(launch, "report").iter().skip(1).step_by(2).any(|clipped| *clipped != 0)
                {
                    let wrap = |_: &mut [u8], codes: &mut [u8]| {
                        codes.iter_mut().filter(|b| **b & 7 == 7).for_each(|b| *b &= 0xf8);
                    };
                    change_rows(device, launch, "y", op.k, wrap);
                }
            },
            &["stage_activation", "act_scales"],
        ),
        after(
            "clipped blocks are not counted",
            |device, launch, _| {
                if let Op::StageActivation(_) = launch.op {
                    device.change(launch, "report", |r| r.iter_mut().skip(1).step_by(2).for_each(|n| *n = 0));
                }
            },
            &["stage_activation", "act_scales"],
        ),
        after(
            "the sign of a small number is lost",
            |device, launch, _| {
                if let Op::StageActivation(op) = launch.op {
                    let lose = |_: &mut [u8], codes: &mut [u8]| {
                        codes.iter_mut().filter(|b| **b >> 4 == 8).for_each(|b| *b &= 0x0f);
                    };
                    change_rows(device, launch, "y", op.k, lose);
                }
            },
            &["stage_activation"],
        ),
    ]
}

fn of_products() -> Vec<Fault> {
    vec![
        before(
            "nibbles of quantised rows swapped",
            |device, launch, _| {
                if let Some(op) = quantised_product(launch) {
                    let swap = |_: &mut [u8], codes: &mut [u8]| {
                        codes.iter_mut().for_each(|b| *b = b.rotate_left(4));
                    };
                    change_rows(device, launch, "x", op.k, swap);
                }
            },
            &["fp4_products"],
        ),
        before(
            "block scales of quantised rows shifted by one",
            |device, launch, _| {
                if let Some(op) = quantised_product(launch) {
                    change_rows(device, launch, "x", op.k, |scales, _| scales.rotate_right(1));
                }
            },
            &["fp4_products"],
        ),
        before(
            "what rows were divided by is not multiplied again",
            |device, launch, _| {
                if quantised_product(launch).is_some() {
                    device.change_floats(launch, "x_scales", |s| s.fill(1.0));
                }
            },
            &["fp4_products"],
        ),
    ]
}
