//! Weights with their scales as producers write them: both conventions, every format, both orders of scales, and every
//! missing, doubled or broken scale an error that names its tensor. The bugs of others that this is to keep out are named
//! where they are tested.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use fourfold::checkpoint::{Checkpoint, Mapping, RowScales, ScaleOrder, Stored};
use fourfold::config::{Config, KvCacheScheme, Producer, Quantization};
use fourfold::format::nvfp4::{self, Global};
use fourfold::format::{Format, bf16, e2m1, e4m3, e8m0};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

const MODULE: &str = "model.layers.0.mlp.experts.3.gate_proj";

/// Tensors of a file that is to be written: name after the module, dtype, shape, bytes.
#[derive(Clone)]
struct Tensors(Vec<(String, Dtype, Vec<usize>, Vec<u8>)>);

impl Tensors {
    fn new() -> Self {
        Self(Vec::new())
    }

    /// Adds the tensor, or puts it in the place of the one that has its name.
    fn with(mut self, part: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Self {
        self = self.without(part);
        self.0.push((part.to_owned(), dtype, shape.to_vec(), bytes.to_vec()));
        self
    }

    fn f32(self, part: &str, shape: &[usize], values: &[f32]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.with(part, Dtype::F32, shape, &bytes)
    }

    fn bf16(self, part: &str, shape: &[usize], values: &[f32]) -> Self {
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|v| v.to_bits().to_be_bytes()[..2].iter().rev().copied().collect::<Vec<_>>())
            .collect();
        self.with(part, Dtype::BF16, shape, &bytes)
    }

    fn without(mut self, part: &str) -> Self {
        self.0.retain(|(name, ..)| name != part);
        self
    }

    /// One byte of a tensor replaced.
    fn poke(mut self, part: &str, at: usize, byte: u8) -> Self {
        self.0.iter_mut().find(|(name, ..)| name == part).unwrap().3[at] = byte;
        self
    }

    /// A checkpoint with these tensors below `MODULE`.
    fn open(&self, test: &str) -> Checkpoint {
        self.open_below(test, MODULE)
    }

    fn open_below(&self, test: &str, module: &str) -> Checkpoint {
        let dir = scratch(test);
        let views = self.0.iter().map(|(part, dtype, shape, bytes)| {
            (format!("{module}.{part}"), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
        fs::write(dir.join("config.json"), "{}").unwrap();
        Checkpoint::open(&dir, Mapping::Read).unwrap()
    }

    /// The message of loading these as `[n, k]`.
    fn refused(&self, test: &str, shape: [usize; 2]) -> String {
        let checkpoint = self.open(test);
        let error =
            checkpoint.stored(MODULE, shape, &Quantization::none(), ScaleOrder::Linear).map(|_| ()).unwrap_err();
        let text = error.to_string();
        assert!(text.len() < 500 && !text.chars().any(char::is_control), "{text:?}");
        text
    }
}

/// A new directory of this test's own.
fn scratch(test: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("stored").join(test);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    dir
}

/// What a config with this `quantization_config` declares.
fn declaration(block: Value) -> Quantization {
    let config = json!({"model_type": "qwen3", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6, "vocab_size": 64, "quantization_config": block});
    Config::from_json("config.json", config.to_string().as_bytes()).unwrap().quantization
}

fn modelopt() -> Quantization {
    declaration(json!({"quant_method": "modelopt", "quant_algo": "NVFP4"}))
}

fn compressed_tensors(inputs: Value) -> Quantization {
    let weights = json!({"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"});
    declaration(json!({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups":
        {"group_0": {"weights": weights, "input_activations": inputs, "targets": ["Linear"]}}}))
}

/// Bytes that look random, the same every time.
fn bytes(n: usize, seed: usize) -> Vec<u8> {
    (0..n).map(|i| ((i + seed).wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

/// E4M3 scales above zero and below NaN.
fn scales(n: usize, seed: usize) -> Vec<u8> {
    bytes(n, seed).iter().map(|b| b % 0x7e + 1).collect()
}

/// A number that is no power of two and its inverse, each of which is exactly the f32 inverse of the other.
fn inverse_pair(from: f32) -> (f32, f32) {
    let candidates = (0..1000).map(|i| from * (1.0 + i as f32 / 1024.0));
    let exact = |m: &f32| 1.0 / (1.0 / m) == *m && m.to_bits() & 0x7f_ffff != 0;
    candidates.filter(exact).map(|m| (m, 1.0 / m)).next().unwrap()
}

const N: usize = 6;
const K: usize = 96;

fn modelopt_tensors() -> Tensors {
    Tensors::new()
        .with("weight", Dtype::U8, &[N, K / 2], &bytes(N * K / 2, 1))
        .with("weight_scale", Dtype::F8_E4M3, &[N, K / 16], &scales(N * K / 16, 2))
        .f32("weight_scale_2", &[], &[inverse_pair(4.65e-5).0])
        .f32("input_scale", &[], &[inverse_pair(2.86e-4).0])
}

fn compressed_tensors_tensors() -> Tensors {
    Tensors::new()
        .with("weight_packed", Dtype::U8, &[N, K / 2], &bytes(N * K / 2, 1))
        .with("weight_scale", Dtype::F8_E4M3, &[N, K / 16], &scales(N * K / 16, 2))
        .f32("weight_global_scale", &[1], &[inverse_pair(4.65e-5).1])
        .f32("input_global_scale", &[1], &[inverse_pair(2.86e-4).1])
}

fn decoded(stored: &Stored) -> Vec<u32> {
    let mut out = vec![f32::NAN; stored.n * stored.k];
    out.chunks_mut(stored.k).enumerate().for_each(|(row, out)| stored.decode_row(row, out));
    out.iter().map(|v| v.to_bits()).collect()
}

fn all_used(checkpoint: &Checkpoint, tensors: &[&str]) {
    checkpoint.check_all_used(&tensors.iter().map(|name| name.to_string()).collect()).unwrap();
}

/// modular#6600: the divisor of one producer taken for the multiplier of another. transformers#48372: experts
/// dequantised without the tensor's scale, the scale left over.
#[test]
fn every_convention_gives_the_same_bits() {
    let quark = modelopt_tensors().without("input_scale").f32("input_scale_2", &[1], &[inverse_pair(2.86e-4).0]);
    let local = compressed_tensors(json!({"num_bits": 4, "type": "float", "dynamic": "local"}));
    let layouts = [
        ("modelopt", modelopt_tensors(), modelopt()),
        ("quark", quark, Quantization::none()),
        ("compressed-tensors", compressed_tensors_tensors(), local),
    ];
    let mut found = Vec::new();
    for (name, tensors, declared) in layouts {
        let checkpoint = tensors.open(&format!("convention-{name}"));
        let stored = checkpoint.stored(MODULE, [N, K], &declared, ScaleOrder::Linear).unwrap();
        assert_eq!((stored.format, stored.n, stored.k, stored.module.as_str()), (Format::Nvfp4, N, K, MODULE));
        assert_eq!(stored.tensors.len(), 4, "{name}");
        all_used(&checkpoint, &stored.tensors);
        assert_eq!(stored.row_scale_values(), vec![stored.row_scale(0); N]);
        let input = stored.input.unwrap();
        assert_eq!(matches!(input, Global::Divisor(_)), name == "compressed-tensors");
        found.push((decoded(&stored), stored.row_scale(N - 1), input.multiplier()));
    }
    assert_eq!(found[0], found[1]);
    assert_eq!(found[0], found[2]);
    assert_eq!(found[0].1, inverse_pair(4.65e-5).0);
    // By hand: low nibble first, sixteen to a scale.
    let (codes, scales, m) = (bytes(N * K / 2, 1), scales(N * K / 16, 2), inverse_pair(4.65e-5).0);
    for (i, bits) in found[0].0.iter().enumerate() {
        let nibble = codes[i / 2] >> (i % 2 * 4) & 15;
        let want = e2m1::decode(nibble) * (e4m3::decode(scales[i / 16]) * m);
        assert_eq!(*bits, want.to_bits(), "{i}");
    }
}

#[test]
fn scalars_may_be_bf16_and_of_either_shape() {
    for shape in [&[][..], &[1]] {
        let tensors = modelopt_tensors().bf16("weight_scale_2", shape, &[0.125]).bf16("input_scale", shape, &[0.75]);
        let checkpoint = tensors.open(&format!("scalars-{}", shape.len()));
        let stored = checkpoint.stored(MODULE, [N, K], &modelopt(), ScaleOrder::Linear).unwrap();
        assert_eq!((stored.row_scale(0), stored.input), (0.125, Some(Global::Multiplier(0.75))));
    }
    let two = modelopt_tensors().f32("weight_scale_2", &[2], &[1.0, 1.0]).refused("scalars-two", [N, K]);
    assert!(two.contains("weight_scale_2: is F32 [2], but should be one number, [] or [1]"), "{two}");
    let half = modelopt_tensors().with("input_scale", Dtype::F16, &[], &[0, 60]).refused("scalars-half", [N, K]);
    assert!(half.contains("input_scale: is F16 [], but scales are F32 or BF16"), "{half}");
}

#[test]
fn the_other_formats_decode() {
    let none = Quantization::none();
    let load =
        |tensors: &Tensors, name: &str, shape: [usize; 2], format: Format, scaled: &dyn Fn(usize, usize) -> f32| {
            let checkpoint = tensors.open(&format!("format-{name}"));
            let stored = checkpoint.stored(MODULE, shape, &none, ScaleOrder::Linear).unwrap();
            assert_eq!((stored.format, stored.input), (format, None), "{name}");
            all_used(&checkpoint, &stored.tensors);
            assert_eq!(stored.row_scale_values().len(), if format.has_row_scale() { shape[0] } else { 0 });
            for (i, bits) in decoded(&stored).into_iter().enumerate() {
                assert_eq!(bits, scaled(i / shape[1], i % shape[1]).to_bits(), "{name} {i}");
            }
            stored.row_scales.clone()
        };

    let values: Vec<f32> = (0..N * K).map(|i| bf16::round((i as f32).sin())).collect();
    let plain = Tensors::new().bf16("weight", &[N, K], &values);
    assert_eq!(load(&plain, "bf16", [N, K], Format::Bf16, &|r, c| values[r * K + c]), RowScales::None);

    // MXFP4, under the names of all who write it.
    let (codes, exponents) = (bytes(N * K / 2, 3), bytes(N * K / 32, 4).iter().map(|b| b % 250).collect::<Vec<_>>());
    let element = |r: usize, c: usize| e2m1::decode(codes[(r * K + c) / 2] >> (c % 2 * 4) & 15);
    for (name, weight, dtype) in
        [("mx-1", "weight", Dtype::U8), ("mx-2", "weight_packed", Dtype::U8), ("mx-3", "weight", Dtype::F8_E8M0)]
    {
        let tensors = Tensors::new().with(weight, Dtype::U8, &[N, K / 2], &codes).with(
            "weight_scale",
            dtype,
            &[N, K / 32],
            &exponents,
        );
        let want = |r: usize, c: usize| element(r, c) * e8m0::decode(exponents[(r * K + c) / 32]);
        assert_eq!(load(&tensors, name, [N, K], Format::Mxfp4, &want), RowScales::None);
    }

    // FP8: the tensor's scale, or each row's, with and without a scale of inputs.
    let codes: Vec<u8> = bytes(N * K, 5).iter().map(|b| if b & 0x7f == 0x7f { 0x7e } else { *b }).collect();
    let fp8 = Tensors::new().with("weight", Dtype::F8_E4M3, &[N, K], &codes);
    let rows: Vec<f32> = (0..N).map(|r| bf16::round(0.01 * (r as f32 + 1.3))).collect();
    let at = |r: usize, c: usize| e4m3::decode(codes[r * K + c]);
    for (i, shape) in [&[][..], &[1]].into_iter().enumerate() {
        let tensors = fp8.clone().f32("weight_scale", shape, &[0.3]).f32("input_scale", shape, &[0.1]);
        let found = load(&tensors, &format!("fp8-tensor-{i}"), [N, K], Format::Fp8, &|r, c| at(r, c) * 0.3);
        assert_eq!(found, RowScales::Tensor(Global::Multiplier(0.3)));
    }
    for (i, shape) in [&[N][..], &[N, 1]].into_iter().enumerate() {
        for tensors in [fp8.clone().f32("weight_scale", shape, &rows), fp8.clone().bf16("weight_scale", shape, &rows)] {
            let found = load(&tensors, &format!("fp8-rows-{i}"), [N, K], Format::Fp8, &|r, c| at(r, c) * rows[r]);
            assert_eq!(found, RowScales::Rows(rows.clone()));
        }
    }

    // FP8 in blocks: a last block of rows that is not whole.
    let (n, k) = (130, 384);
    let codes: Vec<u8> = bytes(n * k, 6).iter().map(|b| b & 0x7e).collect();
    let grid: Vec<f32> = (0..6).map(|i| bf16::round(0.01 * (i as f32 + 1.7))).collect();
    let fp8 = Tensors::new().with("weight", Dtype::F8_E4M3, &[n, k], &codes);
    let want = |r: usize, c: usize| e4m3::decode(codes[r * k + c]) * grid[r / 128 * 3 + c / 128];
    for (name, tensors) in [
        ("blocks-1", fp8.clone().f32("weight_scale_inv", &[2, 3], &grid)),
        ("blocks-2", fp8.clone().bf16("weight_scale_inv", &[2, 3], &grid)),
        ("blocks-3", fp8.clone().f32("weight_scale", &[2, 3], &grid)),
    ] {
        assert_eq!(load(&tensors, name, [n, k], Format::Fp8Blocks, &want), RowScales::None);
    }
}

/// vllm#45212: a missing scale loaded as 0, and 1/0 reached the model for prompts that route to one expert.
/// compressed-tensors#595: scales of experts that calibration never reached were infinite.
#[test]
fn a_scale_is_there_and_a_finite_number_above_zero() {
    let fp8 = |part: &str, shape: &[usize], n: usize| {
        let weight = Tensors::new().with("weight", Dtype::F8_E4M3, &[N, 128], &[0x38; N * 128]);
        weight.f32(part, shape, &vec![0.5; n]).f32("input_scale", &[], &[1.0])
    };
    // Whether the tensor must be there for the weight to mean anything.
    for (layout, tensors, k, part, needed) in [
        ("modelopt", modelopt_tensors(), K, "weight_scale_2", true),
        ("modelopt", modelopt_tensors(), K, "input_scale", false),
        ("compressed", compressed_tensors_tensors(), K, "weight_global_scale", true),
        ("compressed", compressed_tensors_tensors(), K, "input_global_scale", false),
        ("fp8", fp8("weight_scale", &[], 1), 128, "weight_scale", true),
        ("fp8", fp8("weight_scale", &[], 1), 128, "input_scale", false),
        ("fp8 rows", fp8("weight_scale", &[N], N), 128, "weight_scale", true),
        ("fp8 blocks", fp8("weight_scale_inv", &[1, 1], 1), 128, "weight_scale_inv", true),
    ] {
        let shape = tensors.0.iter().find(|(name, ..)| name == part).unwrap().2.clone();
        let n = shape.iter().product::<usize>();
        for bad in [0.0, -0.0, -1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = vec![0.5; n];
            values[n - 1] = bad;
            let said = tensors.clone().f32(part, &shape, &values).refused("bad-scale", [N, k]);
            let named = said.contains(&format!("tensor {MODULE}.{part}: "));
            assert!(named && said.contains("but a scale is a finite number above zero: "), "{layout} {bad}: {said}");
            assert!(said.contains("export"), "{layout}: what to do: {said}");
            let index = if layout == "fp8 rows" { "[5]" } else { "" };
            assert!(said.contains(index), "{said}");
        }
        if needed {
            let said = tensors.clone().without(part).refused("no-scale", [N, k]);
            assert!(said.contains("is missing, and ") && said.contains("weight_"), "{layout}: {said}");
        }
    }
    // A divisor whose inverse is infinite.
    let said = compressed_tensors_tensors().f32("weight_global_scale", &[1], &[1e-40]).refused("inverse", [N, K]);
    assert!(said.contains("weight_global_scale: its inverse, 1 / 1e-40, is not a finite f32"), "{said}");
}

#[test]
fn declared_scales_of_inputs_must_be_there() {
    let local = || json!({"num_bits": 4, "type": "float", "dynamic": "local"});
    let quark = |inputs: Value| {
        let scales = json!({"dtype": "fp8_e4m3", "is_scale_quant": true});
        let weight = json!([{"dtype": "fp4", "group_size": 16}, scales]);
        declaration(
            json!({"quant_method": "quark", "global_quant_config": {"weight": weight, "input_tensors": inputs}}),
        )
    };
    let static_quark = json!([{"dtype": "fp4", "is_dynamic": true}, {"dtype": "fp8_e4m3", "is_dynamic": false}]);
    let (m, c) =
        (modelopt_tensors().without("input_scale"), compressed_tensors_tensors().without("input_global_scale"));
    for (tensors, declared, part) in [
        (&m, modelopt(), "input_scale"),
        (&m, quark(static_quark), "input_scale_2"),
        (&c, compressed_tensors(local()), "input_global_scale"),
    ] {
        let checkpoint = tensors.open("inputs-missing");
        let error = checkpoint.stored(MODULE, [N, K], &declared, ScaleOrder::Linear).unwrap_err().to_string();
        let words = format!("tensor {MODULE}.{part}: is missing, but the config declares calibrated inputs");
        assert!(error.contains(&words) && error.contains("W4A16"), "{error}");
    }
    // Weights only, scales made at run time, or excluded (the dtype decides all the same): nothing is missing.
    let dynamic = json!({"num_bits": 4, "type": "float", "dynamic": true});
    let excluded = json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["model.layers.0.*"]});
    for (tensors, declared) in [
        (&m, declaration(json!({"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}))),
        (&m, declaration(excluded)),
        (&m, quark(json!(null))),
        (&m, declaration(json!({"quant_method": "fp8"}))),
        (&c, compressed_tensors(json!(null))),
        (&c, compressed_tensors(dynamic)),
    ] {
        let checkpoint = tensors.open("inputs-none");
        let stored = checkpoint.stored(MODULE, [N, K], &declared, ScaleOrder::Linear).unwrap();
        assert_eq!((stored.format, stored.input), (Format::Nvfp4, None));
    }
}

/// The `input_scale` of FP8 inputs is amax / 448: six times what NVFP4's would be.
#[test]
fn scales_of_other_inputs_are_checked_and_left() {
    let layer = |algo: &str| {
        json!({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers":
        {MODULE: {"quant_algo": algo, "group_size": 16}}})
    };
    let other = json!({"num_bits": 8, "type": "float", "dynamic": false});
    let dynamic = json!({"num_bits": 4, "type": "float", "dynamic": true});
    let m = modelopt_tensors();
    let quark = m.clone().without("input_scale").f32("input_scale_2", &[], &[0.5]);
    let c = compressed_tensors_tensors();
    let excluded = json!({"quant_method": "modelopt", "quant_algo": "W4A8_NVFP4_FP8", "ignore": ["model.layers.0.*"]});
    for (tensors, declared, kept) in [
        (&m, declaration(json!({"quant_method": "modelopt", "quant_algo": "W4A8_NVFP4_FP8"})), false),
        (&m, declaration(layer("W4A8_NVFP4_FP8")), false),
        (&m, declaration(layer("NVFP4")), true),
        (&m, declaration(json!({"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"})), false),
        (&m, declaration(json!({"quant_method": "fp8"})), false),
        (&m, declaration(excluded), true),
        (&m, Quantization::none(), true),
        (&m, modelopt(), true),
        (&quark, declaration(json!({"quant_method": "modelopt", "quant_algo": "W4A8_NVFP4_FP8"})), false),
        (&c, compressed_tensors(other), false),
        (&c, compressed_tensors(dynamic), false),
        (&c, compressed_tensors(json!({"num_bits": 4, "type": "float", "dynamic": "local"})), true),
    ] {
        let checkpoint = tensors.open("inputs-other");
        let stored = checkpoint.stored(MODULE, [N, K], &declared, ScaleOrder::Linear).unwrap();
        assert_eq!((stored.format, stored.input.is_some()), (Format::Nvfp4, kept), "{declared:?}");
        assert_eq!(stored.tensors.len(), 4);
        all_used(&checkpoint, &stored.tensors);
        let part = &tensors.0[3].0;
        let broken = tensors.clone().f32(part, &[], &[f32::NAN]).open("inputs-other-bad");
        let error = broken.stored(MODULE, [N, K], &declared, ScaleOrder::Linear).unwrap_err().to_string();
        assert!(error.contains(&format!("{MODULE}.{part}: it is NaN")), "{error}");
    }
}

#[test]
fn a_linear_has_elements() {
    let large = 1 << 60;
    for shape in [[large, 0], [0, large], [0, 0]] {
        let blocks = Tensors::new().with("weight", Dtype::F8_E4M3, &shape, &[]).f32(
            "weight_scale_inv",
            &[shape[0].div_ceil(128), shape[1].div_ceil(128)],
            &[],
        );
        let nvfp4 = Tensors::new()
            .with("weight", Dtype::U8, &[shape[0], shape[1] / 2], &[])
            .with("weight_scale", Dtype::F8_E4M3, &[shape[0], shape[1] / 16], &[])
            .f32("weight_scale_2", &[], &[1.0]);
        for tensors in [blocks, nvfp4] {
            let said = tensors.refused("empty", shape);
            assert!(
                said.contains(&format!("{MODULE}.weight: is ")) && said.contains("a linear has elements"),
                "{said}"
            );
        }
    }
}

#[test]
fn nan_and_negative_codes_are_found_by_place() {
    for (byte, what) in [(0x7f, "NaN"), (0xff, "NaN"), (0x80, "negative"), (0xb8, "negative")] {
        for at in [0, 7, N * K / 16 - 1] {
            let said = modelopt_tensors().poke("weight_scale", at, byte).refused("bad-block", [N, K]);
            let index =
                format!("weight_scale: the E4M3 scale at [{}, {}] is {byte:#04x}, which is {what}", at / 6, at % 6);
            assert!(said.contains(&index), "{said}");
        }
    }
    let mx = Tensors::new().with("weight", Dtype::U8, &[N, K / 2], &bytes(N * K / 2, 3)).with(
        "weight_scale",
        Dtype::U8,
        &[N, K / 32],
        &[127; N * K / 32],
    );
    let said = mx.poke("weight_scale", 7, 255).refused("bad-e8m0", [N, K]);
    assert!(said.contains("weight_scale: the E8M0 scale at [2, 1] is 255, which is NaN"), "{said}");
    let fp8 = Tensors::new().with("weight", Dtype::F8_E4M3, &[N, K], &[0xfe; N * K]).f32("weight_scale", &[], &[1.0]);
    fp8.open("bad-fp8").stored(MODULE, [N, K], &Quantization::none(), ScaleOrder::Linear).unwrap();
    for byte in [0x7f, 0xff] {
        let said = fp8.clone().poke("weight", 3 * K + 5, byte).refused("bad-fp8", [N, K]);
        assert!(said.contains("weight: the E4M3 code at [3, 5] is") && said.contains("NaN"), "{said}");
    }
}

#[test]
fn tensors_that_do_not_go_together_are_refused() {
    let f8 = |shape: &[usize]| Tensors::new().with("weight", Dtype::F8_E4M3, shape, &vec![0; shape.iter().product()]);
    let plain = || Tensors::new().bf16("weight", &[N, K], &[0.0; N * K]);
    let one = |t: Tensors, part: &str| t.f32(part, &[], &[1.0]);
    let mx = || {
        let codes = Tensors::new().with("weight", Dtype::U8, &[N, K / 2], &[0; N * K / 2]);
        codes.with("weight_scale", Dtype::U8, &[N, K / 32], &[127; N * K / 32])
    };
    for (tensors, shape, words) in [
        (Tensors::new().f32("bias", &[1], &[0.0]), [N, K], "gate_proj.weight: is missing"),
        (
            modelopt_tensors().with("weight_packed", Dtype::U8, &[N, K / 2], &[0; N * K / 2]),
            [N, K],
            "weight_packed: stands beside",
        ),
        (modelopt_tensors(), [N, 64], "weight: is U8 [6, 48], but should be U8 [6, 32]"),
        (modelopt_tensors(), [N, 72], "weight: has rows of 72 elements, which are not whole nvfp4 blocks of 16"),
        (modelopt_tensors().without("weight_scale"), [N, K], "weight_scale: is missing, and "),
        (
            modelopt_tensors().with("weight_scale", Dtype::F8_E4M3, &[N, 5], &[1; 30]),
            [N, K],
            "weight_scale: is F8_E4M3 [6, 5], but should be F8_E4M3 [6, 6]",
        ),
        (
            modelopt_tensors().f32("weight_scale", &[], &[1.0]),
            [N, K],
            "weight_scale: is F32 [], but should be F8_E4M3 (NVFP4)",
        ),
        // The other producer's scale does not stand in.
        (
            one(modelopt_tensors().without("weight_scale_2"), "weight_global_scale"),
            [N, K],
            "weight_scale_2: is missing",
        ),
        (
            one(compressed_tensors_tensors().without("weight_global_scale"), "weight_scale_2"),
            [N, K],
            "weight_global_scale: is missing",
        ),
        (one(modelopt_tensors(), "weight_global_scale"), [N, K], "weight_global_scale: stands beside"),
        (one(modelopt_tensors(), "input_scale_2"), [N, K], "input_scale_2: stands beside"),
        (one(modelopt_tensors(), "input_global_scale"), [N, K], "input_global_scale: stands beside"),
        (one(compressed_tensors_tensors(), "input_scale"), [N, K], "input_scale: stands beside"),
        (one(mx(), "weight_scale_2"), [N, K], "which is mxfp4 and has no such scale"),
        (mx(), [N, 80], "not whole mxfp4 blocks of 32"),
        (
            mx().with("weight_scale", Dtype::U8, &[N, K / 16], &[127; N * K / 16]),
            [N, K],
            "is U8 [6, 6], but should be U8 [6, 3]",
        ),
        (one(plain(), "weight_scale"), [N, K], "weight_scale: stands beside"),
        (one(plain(), "input_scale"), [N, K], "which is bf16 and has no such scale"),
        (plain(), [K, N], "weight: is BF16 [6, 96], but should be BF16 [96, 6]"),
        (one(Tensors::new(), "weight"), [1, 1], "weight: is F32 [], but should be BF16 [1, 1]"),
        (
            Tensors::new().with("weight", Dtype::F16, &[1, 1], &[0, 0]),
            [1, 1],
            "`fourfold quantize --format bf16` converts it",
        ),
        (Tensors::new().with("weight", Dtype::I8, &[1, 1], &[0]), [1, 1], "weight: is I8 [1, 1], but should be BF16"),
        (
            Tensors::new().bf16("weight_packed", &[1, 1], &[0.0]),
            [1, 1],
            "weight_packed: is BF16 [1, 1], but should be U8",
        ),
        (f8(&[N, K]), [N, K], "weight_scale: is missing, and "),
        (
            one(one(f8(&[N, 128]), "weight_scale"), "weight_scale_inv"),
            [N, 128],
            "weight_scale_inv: is F32 [], but should be [1, 1]",
        ),
        (
            f8(&[N, 128]).f32("weight_scale_inv", &[1, 1], &[1.0]).f32("weight_scale", &[], &[1.0]),
            [N, 128],
            "weight_scale: stands beside",
        ),
        (f8(&[N, K]).f32("weight_scale_inv", &[1, 1], &[1.0]), [N, K], "not whole fp8-blocks blocks of 128"),
        (
            f8(&[N, K]).f32("weight_scale", &[3], &[1.0; 3]),
            [N, K],
            "is F32 [3], but should be [], [1], [6] or [6, 1] for rows",
        ),
        (
            f8(&[N, K]).with("weight_scale", Dtype::F8_E8M0, &[], &[127]),
            [N, K],
            "is F8_E8M0 [], but scales are F32 or BF16",
        ),
    ] {
        let said = tensors.refused("together", shape);
        assert!(said.contains(words) && said.contains(MODULE), "{words:?} is not in {said:?}");
    }
}

/// vllm#50084: scales written swizzled and read in rows, shapes and dtypes all right. modular#6600: swizzled twice.
#[test]
fn swizzled_scales_come_back_into_rows() {
    // As many different scales as there are: no two of a row, or of a column, are alike.
    let unique = |n: usize, blocks: usize| -> Vec<u8> {
        (0..n * blocks).map(|i| ((i / blocks * 11 + i % blocks) % 0x7e + 1) as u8).collect()
    };
    let tensors = |n: usize, blocks: usize, shape: &[usize], scales: &[u8]| {
        Tensors::new()
            .with("weight", Dtype::U8, &[n, blocks * 8], &bytes(n * blocks * 8, 9))
            .with("weight_scale", Dtype::F8_E4M3, shape, scales)
            .f32("weight_scale_2", &[], &[0.25])
    };
    let none = Quantization::none();
    for (n, blocks) in [(6, 6), (128, 4), (130, 5), (256, 8), (1, 1)] {
        let scales = unique(n, blocks);
        let padded = [n.next_multiple_of(128), blocks.next_multiple_of(4)];
        let swizzled = nvfp4::swizzle(&scales, n, blocks);
        let (rows, tiles) = (tensors(n, blocks, &[n, blocks], &scales), tensors(n, blocks, &padded, &swizzled));
        let (rows, tiles) = (rows.open("order-rows"), tiles.open("order-tiles"));
        let linear = rows.stored(MODULE, [n, blocks * 16], &none, ScaleOrder::Linear).unwrap();
        let back = tiles.stored(MODULE, [n, blocks * 16], &none, ScaleOrder::Swizzled).unwrap();
        assert_eq!((&linear.scales, &back.scales), (&scales.into(), &linear.scales), "{n} {blocks}");
        assert_eq!(decoded(&linear), decoded(&back));

        // Where the shapes tell the orders apart, the wrong one is an error that says so.
        let wrong = [
            (tiles.stored(MODULE, [n, blocks * 16], &none, ScaleOrder::Linear), "the size of scales in 128x4 order"),
            (
                rows.stored(MODULE, [n, blocks * 16], &none, ScaleOrder::Swizzled),
                "which is row-major, but should be in 128x4",
            ),
        ];
        for (result, words) in wrong {
            match result {
                Ok(_) => assert_eq!([n, blocks], padded),
                Err(e) => {
                    assert!(e.to_string().contains(words) && e.to_string().contains("weight_scale: is F8_E4M3"), "{e}")
                }
            }
        }
    }
    // A NaN is named by its row and block, not by where it lies.
    let mut scales = unique(130, 5);
    scales[129 * 5 + 4] = 0x7f;
    let file = tensors(130, 5, &[256, 8], &nvfp4::swizzle(&scales, 130, 5)).open("order-nan");
    let error = file.stored(MODULE, [130, 80], &none, ScaleOrder::Swizzled).unwrap_err().to_string();
    assert!(error.contains("at [129, 4] is 0x7f"), "{error}");
    let odd = tensors(6, 6, &[36], &[1; 36]).open("order-odd");
    for order in [ScaleOrder::Linear, ScaleOrder::Swizzled] {
        let error = odd.stored(MODULE, [6, 96], &none, order).unwrap_err().to_string();
        assert!(error.contains("is F8_E4M3 [36], but should be"), "{error}");
    }
}

#[test]
fn scales_of_the_cache() {
    let attention = "model.layers.0.self_attn";
    let open = |tensors: &Tensors| tensors.open_below("kv", attention);
    let two = |k: &str, v: &str| Tensors::new().f32(k, &[], &[0.25]).bf16(v, &[1], &[0.5]);
    for (k, v) in
        [("k_proj.k_scale", "v_proj.v_scale"), ("k_scale", "v_scale"), ("k_proj.output_scale", "v_proj.output_scale")]
    {
        let checkpoint = open(&two(k, v));
        let found = checkpoint.kv_scales(attention).unwrap().unwrap();
        assert_eq!((found.k, found.v), (0.25, 0.5));
        all_used(&checkpoint, &found.tensors);
        assert_eq!(checkpoint.kv_scales("model.layers.1.self_attn").unwrap(), None);
        let says = |tensors: &Tensors| open(tensors).kv_scales(attention).unwrap_err().to_string();
        let missing = says(&two(k, v).without(v));
        assert!(missing.contains(&format!("{attention}.{v}: is missing, but {attention}.{k} is there")), "{missing}");
        assert!(says(&two(k, v).without(k)).contains(&format!("{attention}.{k}: is missing")));
        for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            let said = says(&two(k, v).f32(v, &[], &[bad]));
            assert!(said.contains(&format!("{attention}.{v}: it is {bad}, but a scale is a finite")), "{said}");
        }
        assert!(says(&two(k, v).f32(k, &[2], &[1.0; 2])).contains("should be one number"));
    }
    let both = two("k_scale", "v_scale").f32("k_proj.k_scale", &[], &[1.0]).f32("v_proj.v_scale", &[], &[1.0]);
    let error = open(&both).kv_scales(attention).unwrap_err().to_string();
    assert!(error.contains("k_scale: stands beside"), "{error}");

    // AutoFP8's, for both.
    let one = |value: f32| Tensors::new().f32("kv_scale", &[], &[value]);
    let checkpoint = open(&one(0.25));
    let found = checkpoint.kv_scales(attention).unwrap().unwrap();
    assert_eq!((found.k, found.v, found.tensors.len()), (0.25, 0.25, 1));
    all_used(&checkpoint, &found.tensors);
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let said = open(&one(bad)).kv_scales(attention).unwrap_err().to_string();
        assert!(said.contains(&format!("{attention}.kv_scale: it is {bad}, but a scale is a finite")), "{said}");
    }
    let error = open(&two("k_scale", "v_scale").f32("kv_scale", &[], &[1.0])).kv_scales(attention).unwrap_err();
    assert!(error.to_string().contains("kv_scale: stands beside"), "{error}");
}

fn fixture(style: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/qwen3_moe").join(style)
}

type Shapes = Vec<(String, [usize; 2])>;

/// Matrices of the tiny Qwen3-MoE and their shapes: those that were quantised, and those that were not.
fn linears(c: &Config) -> (Shapes, Shapes) {
    let (d, f) = (c.hidden_size, c.moe_intermediate_size);
    let (q, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
    let (mut quantised, mut plain) = (Vec::new(), Vec::new());
    for layer in 0..c.num_hidden_layers {
        let n = |name: String| format!("model.layers.{layer}.{name}");
        for (name, shape) in [("q_proj", [q, d]), ("k_proj", [kv, d]), ("v_proj", [kv, d]), ("o_proj", [d, q])] {
            quantised.push((n(format!("self_attn.{name}")), shape));
        }
        for e in 0..c.num_local_experts {
            for (name, shape) in [("gate_proj", [f, d]), ("up_proj", [f, d]), ("down_proj", [d, f])] {
                quantised.push((n(format!("mlp.experts.{e}.{name}")), shape));
            }
        }
        plain.push((n("mlp.gate".into()), [c.num_local_experts, d]));
    }
    plain.extend(["lm_head", "model.embed_tokens"].map(|name| (name.to_owned(), [c.vocab_size, d])));
    (quantised, plain)
}

#[test]
fn both_exports_of_one_model_agree() {
    let styles = ["modelopt", "compressed_tensors"];
    let checkpoints = styles.map(|style| Checkpoint::open(&fixture(style), Mapping::Mmap).unwrap());
    let configs = checkpoints.each_ref().map(|c| Config::open(c).unwrap());
    assert_eq!(configs[0].quantization.producer, Producer::ModelOpt);
    assert_eq!(configs[1].quantization.producer, Producer::CompressedTensors);
    let (quantised, plain) = linears(&configs[0]);
    assert_eq!((&quantised, &plain), (&linears(&configs[1]).0, &linears(&configs[1]).1));
    let mut used = [HashSet::new(), HashSet::new()];
    let mut load = |i: usize, module: &str, shape: [usize; 2]| -> (Format, Vec<f32>, Vec<f32>) {
        let stored = checkpoints[i].stored(module, shape, &configs[i].quantization, ScaleOrder::Linear).unwrap();
        // An embedding is no linear: what is declared for those says nothing about it.
        let declared = module != "model.embed_tokens" && configs[i].quantization.declared(module).is_some();
        assert_eq!((declared, stored.input.is_some()), (stored.format == Format::Nvfp4, declared), "{module}");
        used[i].extend(stored.tensors.iter().map(|name| name.to_string()));
        (stored.format, stored.row_scale_values(), decoded(&stored).into_iter().map(f32::from_bits).collect())
    };
    let mut worst = 0f64;
    for (module, shape) in &quantised {
        let [(a_format, _, a), (b_format, _, b)] = [load(0, module, *shape), load(1, module, *shape)];
        assert_eq!((a_format, b_format), (Format::Nvfp4, Format::Nvfp4), "{module}");
        let square = |x: f64| x * x;
        let norm: f64 = a.iter().map(|v| square(f64::from(*v))).sum();
        let apart: f64 = a.iter().zip(&b).map(|(a, b)| square(f64::from(a - b))).sum();
        worst = worst.max((apart / norm).sqrt());
    }
    // Each lies about a tenth from the bf16 model. A scale taken the wrong way round would be thousands of times off.
    println!("the two exports lie at most {worst:.4} apart");
    assert!(worst < 0.15, "{worst}");
    for (module, shape) in &plain {
        let [(a_format, a_rows, a), (b_format, _, b)] = [load(0, module, *shape), load(1, module, *shape)];
        assert_eq!((a_format, b_format, a_rows.len()), (Format::Bf16, Format::Bf16, 0), "{module}");
        assert_eq!(a, b);
    }
    // vllm#54150: gate and up of one expert have scales of their own, and keep them.
    for i in 0..2 {
        let [gate, up] =
            ["gate_proj", "up_proj"].map(|p| load(i, &format!("model.layers.2.mlp.experts.5.{p}"), [48, 96]).1);
        assert_ne!(gate[0], up[0]);
    }
    // Nothing is left over but the norms.
    for (checkpoint, used) in checkpoints.iter().zip(&mut used) {
        used.extend(checkpoint.tensors().map(|t| t.name.to_owned()).filter(|name| name.contains("norm.weight")));
        checkpoint.check_all_used(used).unwrap();
    }
}

#[test]
fn older_exports_say_it_in_a_file_of_their_own() {
    let dir = scratch("old-export");
    for file in ["model.safetensors", "hf_quant_config.json"] {
        fs::copy(fixture("modelopt").join(file), dir.join(file)).unwrap();
    }
    let mut config: Value =
        serde_json::from_slice(&fs::read(fixture("modelopt").join("config.json")).unwrap()).unwrap();
    config.as_object_mut().unwrap().remove("quantization_config");
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let open = || Checkpoint::open(&dir, Mapping::Read).unwrap();
    let q = Config::open(&open()).unwrap().quantization;
    assert_eq!((q.producer, q.producer_version.as_deref()), (Producer::ModelOpt, Some("0.47.0")));
    assert!(q.declared("model.layers.0.mlp.experts.0.up_proj").is_some() && q.declared("lm_head").is_none());
    let old = json!({"producer": {"name": "modelopt", "version": "0.33.0"},
        "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}});
    fs::write(dir.join("hf_quant_config.json"), old.to_string()).unwrap();
    assert_eq!(Config::open(&open()).unwrap().quantization.kv_cache, KvCacheScheme::Fp8);
    fs::write(dir.join("hf_quant_config.json"), r#"{"quantization": {"quant_algo": "NVFP7"}}"#).unwrap();
    let error = Config::open(&open()).unwrap_err().to_string();
    assert!(error.contains("hf_quant_config.json: quantization.quant_algo: found \"NVFP7\""), "{error}");
    // What config.json says itself comes first.
    fs::copy(fixture("modelopt").join("config.json"), dir.join("config.json")).unwrap();
    assert_eq!(Config::open(&open()).unwrap().quantization.kv_cache, KvCacheScheme::None);
}
