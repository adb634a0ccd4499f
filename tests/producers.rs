//! The same model as other producers would write it, run from end to end: AMD Quark's names, ModelOpt's old config with
//! FP8 KV scales, FP8 by rows.

use crate::families::fixture;
use crate::harness::{distance, gpus};
use fourfold::checkpoint::{Checkpoint, Mapping, ScaleOrder};
use fourfold::config::Config;
use fourfold::format::e4m3;
use fourfold::{Activations, DeviceChoice, Engine, Want};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;

type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

const MODELOPT: &str = "qwen3_moe/modelopt";

fn tensors() -> Vec<Tensor> {
    let bytes = std::fs::read(fixture(MODELOPT).join("model.safetensors")).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let owned = |(name, t): (&str, TensorView<'_>)| (name.to_owned(), t.dtype(), t.shape().to_vec(), t.data().to_vec());
    all.iter().map(owned).collect()
}

fn config() -> Value {
    serde_json::from_slice(&std::fs::read(fixture(MODELOPT).join("config.json")).unwrap()).unwrap()
}

/// A new checkpoint directory.
fn write(name: &str, config: &Value, more: &[(&str, Value)], tensors: &[Tensor]) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("fourfold-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    for (file, value) in more {
        std::fs::write(dir.join(file), value.to_string()).unwrap();
    }
    let views =
        tensors.iter().map(|(name, dtype, shape, data)| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    std::fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    dir
}

const TOKENS: [u32; 9] = [7, 300, 41, 8, 8, 511, 0, 129, 64];

fn logits(dir: &Path, activations: Activations, device: DeviceChoice) -> Vec<f32> {
    let engine = Engine::builder().checkpoint(dir).device(device).context(32).activations(activations).build().unwrap();
    engine.session().unwrap().feed(&TOKENS, Want::All).unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn quark_s_names_give_modelopt_s_bits() {
    let exports = fixture("quantization/qwen3_moe_exports.json");
    let exports: Value = serde_json::from_slice(&std::fs::read(exports).unwrap()).unwrap();
    let mut config = config();
    config["quantization_config"] = exports["amd-quark 0.13"]["quantization_config"].clone();
    config["quantization_config"]["exclude"] = json!(["lm_head", "*.mlp.gate"]);
    let mut renamed = tensors();
    for (name, ..) in &mut renamed {
        if name.ends_with(".input_scale") {
            name.push_str("_2");
        }
    }
    let dir = write("quark", &config, &[], &renamed);
    for activations in [Activations::F32, Activations::Nvfp4Static] {
        let [got, want] =
            [dir.clone(), fixture(MODELOPT)].map(|dir| bits(&logits(&dir, activations, DeviceChoice::Cpu)));
        assert_eq!(got, want, "{activations:?}");
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn an_old_export_with_scales_of_its_kv_cache_is_the_same_model() {
    // As nvidia/Qwen3-30B-A3B-NVFP4: no quantization_config in config.json, FP8 KV scales beside k and v.
    let mut config = config();
    config.as_object_mut().unwrap().remove("quantization_config");
    let old = json!({ "producer": { "name": "modelopt", "version": "0.33.0" }, "quantization": {
        "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16,
        "exclude_modules": ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "model.layers.2.mlp.gate"] } });
    let mut with = tensors();
    for layer in 0..3 {
        for name in ["k_proj.k_scale", "v_proj.v_scale"] {
            let name = format!("model.layers.{layer}.self_attn.{name}");
            with.push((name, Dtype::F32, Vec::new(), 0.02f32.to_le_bytes().to_vec()));
        }
    }
    let dir = write("old", &config, &[("hf_quant_config.json", old)], &with);
    let engine = Engine::builder().checkpoint(&dir).device(DeviceChoice::Cpu).build().unwrap();
    assert_eq!(engine.found().kv_scales, [0, 1, 2].map(|layer| (layer, [0.02, 0.02])));
    let [got, want] =
        [dir.clone(), fixture(MODELOPT)].map(|dir| bits(&logits(&dir, Activations::F32, DeviceChoice::Cpu)));
    assert_eq!(got, want);
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn fp8_by_rows_is_the_bf16_model_of_the_same_values() {
    // Each linear of the fixture in E4M3 with a power of two for each row, and the same values in bf16, which holds them.
    let checkpoint = Checkpoint::open(&fixture(MODELOPT), Mapping::Read).unwrap();
    let declared = Config::open(&checkpoint).unwrap().quantization;
    let (mut fp8, mut bf16) = (Vec::new(), Vec::new());
    for (name, dtype, shape, data) in tensors() {
        let Some(module) = name.strip_suffix(".weight").filter(|_| dtype == Dtype::U8) else {
            if dtype == Dtype::BF16 {
                fp8.push((name.clone(), dtype, shape.clone(), data.clone()));
                bf16.push((name, dtype, shape, data));
            }
            continue;
        };
        let (n, k) = (shape[0], shape[1] * 2);
        let stored = checkpoint.stored(module, [n, k], &declared, ScaleOrder::Linear).unwrap();
        let (mut codes, mut scales, mut values) = (Vec::new(), Vec::new(), Vec::new());
        let mut row = vec![0.0; k];
        for i in 0..n {
            stored.decode_row(i, &mut row);
            let amax = row.iter().fold(0f32, |m, v| m.max(v.abs())).max(1e-6);
            let scale = (amax / 448.0).log2().ceil().exp2();
            scales.extend(scale.to_le_bytes());
            for v in &row {
                let code = e4m3::encode(v / scale);
                codes.push(code);
                let value = half::bf16::from_f32(e4m3::decode(code) * scale);
                // Four significant bits, or the smallest step where a weight is far below its row's largest.
                let off = (value.to_f32() - v).abs();
                assert!(off <= v.abs() / 16.0 + scale / 1024.0, "{module} row {i}: {v} became {value}");
                values.extend(value.to_le_bytes());
            }
        }
        fp8.push((format!("{module}.weight"), Dtype::F8_E4M3, vec![n, k], codes));
        fp8.push((format!("{module}.weight_scale"), Dtype::F32, vec![n, 1], scales));
        bf16.push((format!("{module}.weight"), Dtype::BF16, vec![n, k], values));
    }
    let mut plain = config();
    plain.as_object_mut().unwrap().remove("quantization_config");
    let mut quantised = plain.clone();
    quantised["quantization_config"] = json!({ "quant_method": "modelopt", "quant_algo": "FP8",
        "producer": { "name": "modelopt", "version": "0.47.0" }, "ignore": ["lm_head", "*.mlp.gate"] });
    let (fp8, bf16) = (write("fp8", &quantised, &[], &fp8), write("bf16", &plain, &[], &bf16));
    let want = logits(&bf16, Activations::F32, DeviceChoice::Cpu);
    assert_eq!(bits(&logits(&fp8, Activations::F32, DeviceChoice::Cpu)), bits(&want));
    for (name, device) in gpus().iter().take(1) {
        let got = logits(&fp8, Activations::F32, DeviceChoice::Own(Arc::clone(device)));
        let (l2, _) = distance(&got, &want);
        assert!(l2 < 3e-5, "{name}: {l2}");
    }
    for dir in [fp8, bf16] {
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
