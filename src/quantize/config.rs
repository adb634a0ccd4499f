//! What the new checkpoint says about itself: `config.json`, and for NVFP4 `hf_quant_config.json`.

use serde_json::{Map, Value, json};

use super::Options;
use super::plan::Plan;
use crate::checkpoint::write::pretty;
use crate::format::Format;

/// `config.json`, with its keys in their order.
pub(super) fn config(plan: &Plan, options: &Options) -> Vec<u8> {
    let mut config = plan.config.clone();
    for key in ["torch_dtype", "dtype"] {
        if let Some(dtype @ Value::String(_)) = config.get_mut(key) {
            *dtype = "bfloat16".into();
        }
    }
    match options.format {
        Format::Mxfp4 if plan.is_gpt_oss => config.insert("quantization_config".into(), released_mxfp4(plan)),
        Format::Mxfp4 => config.insert("quantization_config".into(), compressed_tensors(plan)),
        Format::Nvfp4 => config.insert("quantization_config".into(), modelopt(plan, options)),
        _ => config.shift_remove("quantization_config"),
    };
    pretty(&Value::Object(config))
}

/// `hf_quant_config.json`, which older readers of NVFP4 want.
pub(super) fn hf_quant_config(plan: &Plan, options: &Options) -> Option<Vec<u8>> {
    let about = json!({
        "producer": producer(),
        "quantization": {
            "quant_algo": algorithm(options),
            "kv_cache_quant_algo": null,
            "group_size": 16,
            "exclude_modules": excluded(plan),
        },
    });
    (options.format == Format::Nvfp4).then(|| pretty(&about))
}

/// As ModelOpt 0.47 writes it.
fn modelopt(plan: &Plan, options: &Options) -> Value {
    let numbers = json!({ "dynamic": false, "num_bits": 4, "type": "float", "group_size": 16 });
    let mut group = Map::new();
    if options.calibration.is_some() {
        group.insert("input_activations".into(), numbers.clone());
    }
    group.insert("weights".into(), numbers);
    group.insert("targets".into(), json!(["Linear"]));
    json!({
        "config_groups": { "group_0": group },
        "ignore": excluded(plan),
        "quant_algo": algorithm(options),
        "producer": producer(),
        "quant_method": "modelopt",
    })
}

/// In the words in which compressed-tensors 0.20 writes NVFP4.
fn compressed_tensors(plan: &Plan) -> Value {
    let mut ignore = plan.ignored.clone();
    ignore.push("lm_head".to_owned());
    json!({
        "config_groups": {
            "group_0": {
                "format": "mxfp4-pack-quantized",
                "input_activations": null,
                "output_activations": null,
                "targets": ["Linear"],
                "weights": {
                    "dynamic": false,
                    "group_size": 32,
                    "num_bits": 4,
                    "observer": "memoryless_minmax",
                    "scale_dtype": "torch.uint8",
                    "strategy": "group",
                    "symmetric": true,
                    "type": "float",
                },
            },
        },
        "format": "mxfp4-pack-quantized",
        "global_compression_ratio": null,
        "ignore": ignore,
        "kv_cache_scheme": null,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.0",
    })
}

/// As the released gpt-oss has it; experts that were left out are named too.
fn released_mxfp4(plan: &Plan) -> Value {
    let always = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"];
    let mut modules: Vec<&str> = always.to_vec();
    modules.extend(plan.ignored.iter().map(String::as_str).filter(|module| module.contains(".experts.")));
    json!({ "quant_method": "mxfp4", "modules_to_not_convert": modules })
}

fn excluded(plan: &Plan) -> Vec<String> {
    let mut modules = vec!["lm_head".to_owned(), "model.embed_tokens".to_owned()];
    modules.extend(plan.ignored.iter().cloned());
    modules
}

fn algorithm(options: &Options) -> &'static str {
    if options.calibration.is_some() { "NVFP4" } else { "W4A16_NVFP4" }
}

fn producer() -> Value {
    json!({ "name": "fourfold", "version": env!("CARGO_PKG_VERSION") })
}
