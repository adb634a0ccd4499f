//! Checkpoints that `quantize` made, run: against a bf16 model of the very values they hold, and against their source.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use fourfold::checkpoint::{Checkpoint, RowScales, ScaleOrder, Stored};
use fourfold::config::Config;
use fourfold::device::Device;
use fourfold::format::Format;
use fourfold::quantize::{Calibration, Options, Report, ScaleSearch, calibrate};
use fourfold::{Activations, DeviceChoice, Engine, Want};
use safetensors::Dtype as Raw;
use safetensors::tensor::TensorView;

use super::{Scratch, Tensors, floats, make, open, put};
use crate::families::fixture;
use crate::harness::{Named, cpu, distance, gpus};

/// The twins, and the GPU as it is.
fn devices() -> Vec<Named> {
    let mut devices = vec![("twins", cpu())];
    devices.extend(gpus().iter().take(1).cloned());
    devices
}

fn engine(dir: &Path, device: &Arc<dyn Device>, activations: Activations) -> Engine {
    let builder = Engine::builder().checkpoint(dir).device(DeviceChoice::Own(device.clone()));
    builder.context(128).activations(activations).build().unwrap()
}

const PROMPT: [u32; 24] =
    [3, 141, 59, 26, 5, 358, 97, 93, 238, 46, 264, 338, 327, 95, 28, 84, 197, 169, 399, 375, 10, 58, 209, 74];

fn logits(dir: &Path, device: &Arc<dyn Device>, activations: Activations) -> Vec<f32> {
    engine(dir, device, activations).session().unwrap().feed(&PROMPT, Want::All).unwrap()
}

/// How far `got` is from `want`, relative to it.
fn off(got: &[f32], want: &[f32]) -> f32 {
    assert!(got.iter().all(|v| v.is_finite()));
    distance(got, want).0 as f32
}

/// Every linear of a checkpoint, decoded, by module.
fn decoded(dir: &Path) -> HashMap<String, (Format, Vec<f32>)> {
    let checkpoint = open(dir);
    let config = Config::open(&checkpoint).unwrap();
    let modules: Vec<(String, Vec<usize>)> = checkpoint
        .tensors()
        .filter(|t| t.name.contains("_proj.weight") && t.shape.len() == 2 && !t.name.ends_with("scale"))
        .map(|t| (t.name.rsplit_once('.').unwrap().0.to_owned(), t.shape.to_vec()))
        .collect();
    let values = |(module, shape): (String, Vec<usize>)| {
        let whole = checkpoint.tensor(&format!("{module}.weight")).is_ok_and(|t| t.dtype.bits() > 8);
        let k = if whole { shape[1] } else { 2 * shape[1] };
        let stored: Stored =
            checkpoint.stored(&module, [shape[0], k], &config.quantization, ScaleOrder::Linear).unwrap();
        assert!(stored.format != Format::Nvfp4 || matches!(stored.row_scales, RowScales::Tensor(_)));
        let mut all = vec![0.0; shape[0] * k];
        all.chunks_mut(k).enumerate().for_each(|(row, out)| stored.decode_row(row, out));
        let format = stored.format;
        (module, (format, all))
    };
    modules.into_iter().map(values).collect()
}

/// Makes a bf16 model of what a quantised checkpoint holds, its values rounded to bf16.
fn in_bf16(dir: &Path, to: &Path) {
    let checkpoint = open(dir);
    let linears = decoded(dir);
    let mut tensors = Tensors::new();
    for view in checkpoint.tensors() {
        let module = view.name.rsplit_once('.').unwrap().0;
        match linears.get(module) {
            None => {
                assert_eq!(view.dtype.bits(), 16, "{}", view.name);
                tensors.insert(view.name.into(), (Raw::BF16, view.shape.to_vec(), view.bytes.to_vec()));
            }
            Some((_, values)) if view.name.ends_with(".weight") || view.name.ends_with(".weight_packed") => {
                let shape = [view.shape[0], values.len() / view.shape[0]];
                put(&mut tensors, &format!("{module}.weight"), Raw::BF16, &shape, values);
            }
            // A bias beside a linear.
            Some(_) if view.name.ends_with(".bias") => {
                tensors.insert(view.name.into(), (Raw::BF16, view.shape.to_vec(), view.bytes.to_vec()));
            }
            Some(_) => {}
        }
    }
    let mut config = super::config(dir, "config.json");
    config.as_object_mut().unwrap().remove("quantization_config");
    super::save(to, &config.to_string(), &tensors);
}

/// A copy of a checkpoint in which one scale is wrong: NVFP4's f32 of the tensor twice as large, MXFP4's block scales.
fn with_wrong_scale(dir: &Path, to: &Path, module: &str) {
    fs::create_dir_all(to).unwrap();
    fs::copy(dir.join("config.json"), to.join("config.json")).unwrap();
    let checkpoint = open(dir);
    let tensors: Vec<(String, Raw, Vec<usize>, Vec<u8>)> = checkpoint
        .tensors()
        .map(|t| {
            let raw = match t.dtype.word() {
                "BF16" => Raw::BF16,
                "U8" => Raw::U8,
                "F8_E4M3" => Raw::F8_E4M3,
                "F32" => Raw::F32,
                other => panic!("{other}"),
            };
            let mut bytes = t.bytes.to_vec();
            if t.name == format!("{module}.weight_scale_2") {
                bytes = (2.0 * f32::from_le_bytes(bytes.try_into().unwrap())).to_le_bytes().to_vec();
            } else if t.name == format!("{module}.weight_scale") && raw == Raw::U8 {
                bytes.iter_mut().for_each(|scale| *scale += 1);
            }
            (t.name.to_owned(), raw, t.shape.to_vec(), bytes)
        })
        .collect();
    let views = tensors.iter().map(|(n, d, s, b)| (n.as_str(), TensorView::new(*d, s.clone(), b).unwrap()));
    fs::write(to.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
}

/// Linears whose scale reaches the logits (not so q and k where they are normalised).
const FELT: [&str; 5] = ["self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"];

/// How far rounding each weight by `rms` moves the logits of a model of three layers, relatively: each layer is four
/// products in a row (qkv, o, gate and up, down), whose errors of about `rms` are independent and add as squares; a fifth
/// on top for what attention and SiLU make of it. Measured: 3.6 to 4.0 times `rms`.
fn expected(rms: f64) -> f32 {
    (1.2 * 12f64.sqrt() * rms) as f32
}

fn mean_rms(report: &Report) -> f64 {
    let squares = report.changed.iter().map(|c| c.deviation.relative_rms().powi(2));
    (squares.sum::<f64>() / report.changed.len() as f64).sqrt()
}

#[test]
fn dense_models_run_in_both_formats() {
    let scratch = Scratch::new("models-dense");
    for name in ["dense/qwen3", "dense/llama"] {
        let source = fixture(name);
        for (format, search) in [
            (Format::Nvfp4, ScaleSearch::Rtn),
            (Format::Nvfp4, ScaleSearch::Mse),
            (Format::Mxfp4, ScaleSearch::Rtn),
            (Format::Mxfp4, ScaleSearch::Mse),
        ] {
            let made = scratch.join(format!("{name}-{format}-{search:?}"));
            let report = make(&source, &made, &Options { search, ..Options::new(format) });
            let linears = decoded(&made);
            assert_eq!((linears.len(), report.changed.len()), (21, 21), "{name}");
            assert!(linears.values().all(|(own, _)| *own == format));
            let plain = made.with_extension("bf16");
            in_bf16(&made, &plain);
            let allowed = expected(mean_rms(&report));
            for (where_, device) in devices() {
                let what = format!("{name} {format} {search:?} on {where_}");
                let got = logits(&made, &device, Activations::F32);
                // What MXFP4 means are bf16 numbers: the same bits come out. What NVFP4 means is rounded to them, by up to
                // 2^-9 of a number, 2^-9 / sqrt 3 in the mean.
                let same = off(&got, &logits(&plain, &device, Activations::F32));
                let rounding = if format == Format::Mxfp4 { 0.0 } else { expected(2f64.powi(-9)) };
                assert!(same <= rounding, "{what}: {same:.1e} from its own values, allowed {rounding:.1e}");
                let was = off(&got, &logits(&source, &device, Activations::F32));
                assert!(was <= allowed && was > allowed / 2.0, "{what}: {was} from its source, allowed {allowed}");
            }
            // A wrong scale of any one linear would be noticed.
            let want = logits(&source, &cpu(), Activations::F32);
            for module in FELT {
                let wrong = made.with_extension(format!("wrong-{module}"));
                with_wrong_scale(&made, &wrong, &format!("model.layers.1.{module}"));
                let off = off(&logits(&wrong, &cpu(), Activations::F32), &want);
                assert!(off > allowed, "{name} {format} {search:?}, wrong {module}: {off}, not above {allowed}");
            }
        }
    }
}

#[test]
fn calibrated_scales_serve() {
    let scratch = Scratch::new("models-calibrated");
    for name in ["dense/qwen3", "dense/llama"] {
        let source = fixture(name);
        let seen = calibrate(&engine(&source, &cpu(), Activations::F32), &CALIBRATION, None, 96, &mut |_| ()).unwrap();
        let with = |times: f32, to: &str| {
            let mut calibration = Calibration::default();
            calibration.amax.extend(seen.amax.iter().map(|(stage, amax)| (stage.clone(), amax * times)));
            let made = scratch.join(to).join(name);
            let options = Options { calibration: Some(calibration), ..Options::new(Format::Nvfp4) };
            make(&source, &made, &options);
            made
        };
        let (made, small) = (with(1.0, "right"), with(1.0 / 8.0, "small"));
        for (where_, device) in devices() {
            let plain = logits(&made, &device, Activations::F32);
            let token = off(&logits(&made, &device, Activations::Nvfp4Token), &plain);
            let fixed = off(&logits(&made, &device, Activations::Nvfp4Static), &plain);
            let wrong = off(&logits(&small, &device, Activations::Nvfp4Static), &plain);
            let what = format!(
                "{name} on {where_}: {fixed} from f32, {wrong} with scales too small, {token} with each row's own"
            );
            // The tokens are others than those that were seen, but as large; scales an eighth as large clip.
            assert!((token / 1.25..token * 1.25).contains(&fixed) && token < 0.45, "{what}");
            assert!(wrong > 2.0 * fixed, "{what}");
        }
    }
}

#[test]
fn a_qwen3_moe_goes_from_bf16_to_the_nvfp4_that_it_was() {
    let scratch = Scratch::new("models-moe");
    let theirs = fixture("qwen3_moe/modelopt");
    let source = scratch.join("bf16");
    in_bf16(&theirs, &source);
    let from = engine(&source, &cpu(), Activations::F32);
    let seen = calibrate(&from, &CALIBRATION, None, 96, &mut |_| ()).unwrap();
    let made = scratch.join("nvfp4");
    let report = make(&source, &made, &Options { calibration: Some(seen), ..Options::new(Format::Nvfp4) });
    let (ours, were) = (open(&made), open(&theirs));
    assert_eq!(report.changed.len(), 3 * (4 + 3 * 8));
    // The same tensors, to the last name, dtype and shape.
    let listed = |c: &Checkpoint| -> Vec<(String, String, Vec<usize>)> {
        c.tensors().map(|t| (t.name.to_owned(), t.dtype.to_string(), t.shape.to_vec())).collect()
    };
    assert_eq!(listed(&ours), listed(&were));
    let (a, b) = (decoded(&made), decoded(&theirs));
    for (module, (_, values)) in &a {
        let in_last = module.starts_with("model.layers.2.");
        let off = off(values, &b[module].1);
        // In the last layer theirs has q, k and v, gate and up apart: one scale for them rounds the block scales again, by
        // up to 2^-4 of each, where they are not powers of two apart.
        assert!(if in_last { off < 0.04 } else { off == 0.0 }, "{module}: {off}");
        let name = format!("{module}.input_scale");
        // Theirs was halved there.
        let halved =
            in_last && (module.ends_with("gate_proj") || module.ends_with("up_proj")) && module.contains("experts");
        let want = floats(&were, &name)[0] * if halved { 2.0 } else { 1.0 };
        let ratio = floats(&ours, &name)[0] / want;
        // Theirs saw the model before it was quantised, whose first layer differs least; what enters its q, k and v is not
        // quantised at all. In the last layer each expert has its own scale for `down_proj`, and here the largest of them.
        let (low, high) = match module.strip_prefix("model.layers.").unwrap() {
            own if own.ends_with("down_proj") && in_last => (0.75, 2.0),
            "0.self_attn.q_proj" | "0.self_attn.k_proj" | "0.self_attn.v_proj" => (1.0 - 1e-6, 1.0 + 1e-6),
            own if own.starts_with("0.") => (0.9, 1.1),
            _ => (0.8, 1.25),
        };
        assert!((low..=high).contains(&ratio), "{name}: {ratio} times theirs");
    }
    for (where_, device) in devices() {
        let run = |dir: &Path, activations| logits(dir, &device, activations);
        let plain = run(&made, Activations::F32);
        let same = off(&plain, &run(&theirs, Activations::F32));
        assert!(same < 0.02, "{where_}: {same} from theirs");
        for activations in [Activations::Nvfp4Static, Activations::Nvfp4Token] {
            // A step of an activation's code may change a route: far from W4A16, but no farther than theirs is.
            let ours = off(&run(&made, activations), &plain);
            let were = off(&run(&theirs, activations), &run(&theirs, Activations::F32));
            assert!(ours < 1.2 * were, "{where_} {activations:?}: {ours} from W4A16, theirs {were}");
        }
    }
}

#[test]
fn gpt_oss_in_nvfp4_is_gpt_oss() {
    let scratch = Scratch::new("models-gpt-oss");
    for name in ["tiny", "odd", "loud"] {
        let source = super::fixture(name);
        let cast = scratch.join(name);
        make(&source, &cast, &Options::new(Format::Nvfp4));
        for (where_, device) in devices() {
            let want = logits(&source, &device, Activations::F32);
            assert_eq!(logits(&cast, &device, Activations::F32), want, "{name} on {where_}: the cast is exact");
            // Its experts now also take FP4 activations: the error of two products a layer.
            let quantised = off(&logits(&cast, &device, Activations::Nvfp4Token), &want);
            assert!((0.05..0.4).contains(&quantised), "{name} on {where_}: {quantised}");
        }
    }
}

#[test]
fn a_tensor_of_zeros_has_a_scale_that_readers_take() {
    let scratch = Scratch::new("models-zeros");
    let source = fixture("dense/qwen3");
    let config = fs::read_to_string(source.join("config.json")).unwrap();
    let mut tensors = Tensors::new();
    for view in open(&source).tensors() {
        let mut bytes = view.bytes.to_vec();
        match view.name.strip_prefix("model.layers.1.") {
            Some("self_attn.o_proj.weight" | "mlp.gate_proj.weight" | "mlp.up_proj.weight") => bytes.fill(0),
            // So small that amax/2688 is no normal number: 2^-133 and less.
            Some("mlp.down_proj.weight") => bytes.as_chunks_mut::<2>().0.iter_mut().for_each(|b| *b = [1, b[1] & 0x80]),
            _ => {}
        }
        tensors.insert(view.name.into(), (Raw::BF16, view.shape.to_vec(), bytes));
    }
    let source = scratch.join("src");
    super::save(&source, &config, &tensors);
    for search in [ScaleSearch::Rtn, ScaleSearch::Mse] {
        let made = scratch.join(format!("{search:?}"));
        let report = make(&source, &made, &Options { search, ..Options::new(Format::Nvfp4) });
        let checkpoint = open(&made);
        for (own, want) in [("self_attn.o_proj", 1.0), ("mlp.up_proj", 1.0), ("mlp.down_proj", f32::MIN_POSITIVE)] {
            let module = format!("model.layers.1.{own}");
            assert_eq!(floats(&checkpoint, &format!("{module}.weight_scale_2")), [want], "{own}");
            let values = super::nvfp4_values(&checkpoint, &module);
            assert!(values.iter().all(|v| v.abs() < 1e-37 && (*v == 0.0 || want < 1.0)), "{own}");
        }
        let allowed = expected(mean_rms(&report));
        for (where_, device) in devices() {
            let [got, want] = [&made, &source].map(|dir| logits(dir, &device, Activations::F32));
            assert!(off(&got, &want) <= allowed, "{where_}: {} above {allowed}", off(&got, &want));
        }
    }
}

/// The tokens that the fixture's makers calibrated with (`tools/oracle/qwen3_moe/build.py`, seed 12), on the model before
/// it was quantised.
const CALIBRATION: [u32; 384] = [
    331, 155, 390, 253, 241, 130, 259, 451, 332, 432, 278, 49, 436, 389, 141, 473, 418, 459, 118, 74, 384, 373, 104,
    204, 269, 82, 89, 291, 446, 100, 419, 417, 158, 119, 447, 352, 146, 470, 434, 208, 468, 134, 123, 109, 73, 173,
    414, 240, 160, 110, 27, 187, 473, 187, 472, 335, 25, 246, 225, 312, 260, 480, 452, 65, 491, 300, 421, 203, 245,
    371, 324, 181, 203, 309, 107, 175, 60, 480, 170, 198, 326, 109, 451, 130, 156, 458, 58, 59, 84, 355, 377, 182, 183,
    212, 491, 237, 481, 20, 413, 105, 197, 179, 501, 299, 160, 299, 274, 121, 493, 246, 116, 503, 70, 114, 91, 499,
    418, 486, 100, 309, 58, 256, 112, 165, 148, 511, 336, 451, 493, 215, 57, 438, 184, 102, 239, 97, 452, 153, 300,
    406, 325, 490, 9, 187, 155, 28, 2, 452, 432, 248, 300, 436, 196, 163, 327, 115, 54, 414, 433, 420, 46, 138, 76,
    211, 328, 154, 328, 278, 489, 312, 462, 452, 345, 79, 132, 97, 284, 148, 465, 282, 235, 260, 219, 403, 370, 216,
    299, 108, 93, 192, 225, 382, 196, 223, 422, 165, 148, 194, 218, 330, 96, 95, 113, 162, 501, 458, 178, 208, 17, 148,
    426, 359, 295, 158, 505, 273, 70, 465, 451, 15, 384, 33, 172, 45, 376, 276, 282, 296, 72, 472, 264, 15, 76, 318,
    431, 147, 233, 398, 158, 171, 271, 398, 261, 65, 399, 278, 243, 82, 147, 284, 145, 217, 221, 286, 19, 322, 98, 175,
    238, 443, 136, 425, 115, 165, 185, 129, 55, 292, 189, 13, 464, 174, 349, 232, 371, 209, 164, 10, 55, 450, 242, 399,
    318, 350, 36, 224, 472, 435, 133, 98, 319, 511, 410, 260, 30, 407, 477, 181, 32, 155, 450, 76, 452, 191, 22, 486,
    413, 434, 215, 434, 117, 417, 453, 211, 302, 375, 429, 219, 239, 359, 145, 114, 17, 213, 312, 96, 280, 38, 53, 454,
    219, 68, 471, 72, 183, 353, 88, 315, 178, 466, 455, 288, 273, 160, 501, 329, 448, 319, 77, 303, 47, 223, 448, 475,
    279, 317, 478, 500, 419, 31, 290, 246, 339, 356, 412, 4, 361, 254, 455, 141, 18, 402, 154, 99, 336, 51, 55, 303,
    312, 369, 390, 417, 8, 70,
];
