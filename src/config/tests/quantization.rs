//! Declarations of every producer: blocks that the real tools wrote, blocks of published checkpoints, and broken ones.

use super::super::*;
use super::tiny;
use serde_json::json;

use ActivationScheme::{Dynamic, StaticGlobal, Unquantised};

const NVFP4: Scheme = Scheme::Nvfp4 { activations: StaticGlobal };

fn fixture(path: &str) -> Value {
    let path = format!("{}/tests/fixtures/{path}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn read(block: &Value) -> Result<Quantization> {
    let block = json!({"quantization_config": block});
    let keys = Keys::new("config.json", block.as_object().unwrap());
    Quantization::read(&keys.object("quantization_config")?.unwrap(), Family::Qwen3Moe)
}

fn read_old(file: &Value) -> Result<Quantization> {
    Quantization::from_hf_quant_config("hf_quant_config.json", file.to_string().as_bytes(), Family::Qwen3Moe)
}

/// Every U8 weight that the tool wrote is declared NVFP4, and what the list excludes is BF16.
fn agrees_with_its_tensors(q: &Quantization, tensors: &Value, scheme: &Scheme) {
    let mut n_packed = 0;
    for (name, entry) in tensors.as_object().unwrap() {
        let dtype = entry[0].as_str().unwrap();
        let module = name.strip_suffix(".weight").or_else(|| name.strip_suffix(".weight_packed"));
        let Some(module) = module else { continue };
        let declared = q.declared(module);
        match dtype {
            "U8" => assert_eq!(declared, Some(scheme), "{module}"),
            _ => assert!(!["lm_head", "model.layers.0.mlp.gate"].contains(&module) || declared.is_none(), "{module}"),
        }
        n_packed += usize::from(dtype == "U8");
    }
    assert!(n_packed >= 8);
}

#[test]
fn what_the_tools_wrote_is_understood() {
    for file in ["qwen3_moe_exports.json", "deepseek_v4_exports.json"] {
        let exports = fixture(&format!("quantization/{file}"));
        for (tool, export) in exports.as_object().unwrap() {
            let q = read(&export["quantization_config"]).unwrap_or_else(|e| panic!("{file} {tool}: {e}"));
            let (producer, version) = match tool.split(' ').next().unwrap() {
                "modelopt" => (Producer::ModelOpt, "0.47.0"),
                "llmcompressor" => (Producer::CompressedTensors, "0.20.0"),
                _ => (Producer::Quark, "0.13"),
            };
            assert_eq!((q.producer, q.producer_version.as_deref()), (producer, Some(version)), "{file} {tool}");
            assert_eq!((&q.kv_cache, q.schemes()), (&KvCacheScheme::None, &[NVFP4][..]));
            if producer != Producer::Quark {
                agrees_with_its_tensors(&q, &export["tensors"], &NVFP4);
            } else {
                assert_eq!(q.declared("lm_head"), None);
                assert_eq!(q.declared("model.layers.0.self_attn.k_proj"), Some(&NVFP4));
            }
            if let Some(old) = export.get("hf_quant_config") {
                let old = read_old(old).unwrap();
                agrees_with_its_tensors(&old, &export["tensors"], &NVFP4);
                assert_eq!((old.producer, old.producer_version.as_deref()), (producer, Some(version)));
            }
        }
    }
}

#[test]
fn old_exports_of_nvidia() {
    // nvidia/Qwen3-30B-A3B-NVFP4: `model_configs/nvidia--Qwen3-30B-A3B-NVFP4_hf_quant_config.json` of
    // ai-dynamo/aiconfigurator.
    let gates = (0..48).map(|l| format!("model.layers.{l}.mlp.gate"));
    let excluded: Vec<String> = std::iter::once("lm_head".to_owned()).chain(gates).collect();
    let q = read_old(&json!({"producer": {"name": "modelopt", "version": "0.33.0"}, "quantization": {
        "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": excluded}}));
    let q = q.unwrap();
    assert_eq!((q.producer_version.as_deref(), &q.kv_cache), (Some("0.33.0"), &KvCacheScheme::Fp8));
    for (module, scheme) in [
        ("lm_head", None),
        ("model.layers.47.mlp.gate", None),
        ("model.layers.48.mlp.gate", Some(&NVFP4)),
        ("model.layers.4.mlp.experts.127.gate_proj", Some(&NVFP4)),
        ("model.layers.4.self_attn.q_proj", Some(&NVFP4)),
    ] {
        assert_eq!(q.declared(module), scheme, "{module}");
    }
}

#[test]
fn mixed_precision_goes_by_the_longest_name() {
    let q = read(&json!({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "ignore": ["*.shared_expert.*"],
        "quantized_layers": {
            "model.layers.0.self_attn": {"quant_algo": "FP8"},
            "model.layers.0.self_attn.o_proj": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
            "model.layers.*.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16},
            "model.layers.1.x": {"quant_algo": "INT4_AWQ"}}}))
    .unwrap();
    for (module, scheme) in [
        ("model.layers.0.self_attn.q_proj", Some(Scheme::Fp8)),
        ("model.layers.0.self_attn.o_proj", Some(Scheme::Nvfp4 { activations: Unquantised })),
        ("model.layers.9.mlp.experts.3.up_proj", Some(NVFP4)),
        ("model.layers.9.mlp.shared_expert.up_proj", None),
        ("model.layers.1.x", Some(Scheme::Other("INT4_AWQ".into()))),
        ("model.layers.1.self_attn.q_proj", None),
    ] {
        assert_eq!(q.declared(module), scheme.as_ref(), "{module}");
    }
    assert_eq!(q.schemes().len(), 4);
}

#[test]
fn deepseek_of_nvidia_is_nvfp4_upon_fp8() {
    let q = read(&fixture("quantization/deepseek_v4_nvfp4_config.json")["quantization_config"]).unwrap();
    assert_eq!((q.producer, q.producer_version.as_deref()), (Producer::ModelOpt, Some("dsv4-nvfp4-experts")));
    assert_eq!(q.declared("layers.3.ffn.experts.7.w2"), Some(&NVFP4));
    assert_eq!(q.declared("layers.3.ffn.shared_experts.w2"), Some(&Scheme::Fp8Blocks));
    assert_eq!(q.declared("layers.3.attn.wq_a"), Some(&Scheme::Fp8Blocks));
    let q = read(&fixture("quantization/deepseek_v4_config.json")["quantization_config"]).unwrap();
    assert_eq!((q.producer, q.schemes()), (Producer::Fp8, &[Scheme::Fp8Blocks][..]));
    // An older file names no layers.
    let q = read(&json!({"quant_method": "fp8", "weight_block_size": [128, 128], "moe_quant_algo": "NVFP4"})).unwrap();
    assert_eq!(q.declared("layers.3.ffn.experts.7.w2"), Some(&NVFP4));
    assert_eq!(q.declared("layers.3.ffn.shared_experts.w2"), Some(&Scheme::Fp8Blocks));
}

#[test]
fn activations_are_what_the_groups_say() {
    let modelopt = |algo: &str, inputs: Value| {
        let weights = json!({"dynamic": false, "num_bits": 4, "type": "float", "group_size": 16});
        let groups = json!({"group_0": {"weights": weights, "input_activations": inputs, "targets": ["Linear"]}});
        let q = read(&json!({"quant_method": "modelopt", "quant_algo": algo, "config_groups": groups})).unwrap();
        q.declared("a").unwrap().clone()
    };
    let fp4 = |dynamic: Value| json!({"dynamic": dynamic, "num_bits": 4, "type": "float", "group_size": 16});
    assert_eq!(modelopt("NVFP4", fp4(json!(false))), NVFP4);
    assert_eq!(modelopt("nvfp4", fp4(json!(true))), Scheme::Nvfp4 { activations: Dynamic });
    assert_eq!(modelopt("W4A16_NVFP4", json!(null)), Scheme::Nvfp4 { activations: Unquantised });
    let plain = read(&json!({"quant_method": "modelopt", "quant_algo": "NVFP4"})).unwrap();
    assert_eq!(plain.declared("a"), Some(&NVFP4));
}

fn group(weights: Value, inputs: Value, targets: Value) -> Value {
    json!({"weights": weights, "input_activations": inputs, "output_activations": null, "targets": targets})
}

#[test]
fn groups_of_compressed_tensors() {
    let nvfp4 = json!({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": false});
    let fp8 = json!({"num_bits": 8, "type": "float", "strategy": "channel", "group_size": null, "dynamic": false});
    let block = json!({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]});
    let mxfp4 = json!({"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32});
    let int4 = json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128});
    let read_groups = |format: &str, groups: Value| {
        read(&json!({"quant_method": "compressed-tensors", "format": format, "config_groups": groups,
            "ignore": ["lm_head", "re:.*mlp.gate$"], "kv_cache_scheme": {"num_bits": 8, "type": "float"}}))
    };
    // NVFP4A16.
    let q =
        read_groups("nvfp4-pack-quantized", json!({"group_0": group(nvfp4.clone(), json!(null), json!(["Linear"]))}));
    let q = q.unwrap();
    assert_eq!(q.declared("a.b"), Some(&Scheme::Nvfp4 { activations: Unquantised }));
    assert_eq!((q.declared("model.layers.0.mlp.gate"), q.declared("lm_head")), (None, None));
    assert!(q.declared("model.layers.0.mlp.gate_proj").is_some());
    assert_eq!(q.kv_cache, KvCacheScheme::Fp8);
    // Several groups, by name before class.
    let local =
        json!({"num_bits": 4, "type": "float", "dynamic": "local", "strategy": "tensor_group", "group_size": 16});
    let groups = json!({
        "group_0": group(fp8.clone(), json!(null), json!(["Linear"])),
        "group_1": group(nvfp4, local, json!(["re:.*experts.*"])),
        "group_2": group(block.clone(), json!(null), json!(["a.exact"])),
        "group_3": group(int4, json!(null), json!(["re:b"]))});
    let q = read_groups("mixed-precision", groups).unwrap();
    assert_eq!(q.declared("model.layers.0.self_attn.q_proj"), Some(&Scheme::Fp8));
    assert_eq!(q.declared("model.layers.0.mlp.experts.3.up_proj"), Some(&NVFP4));
    assert_eq!(q.declared("a.exact"), Some(&Scheme::Fp8Blocks));
    assert_eq!(q.declared("b"), Some(&Scheme::Other("4-bit int".into())));
    for (format, weights, scheme) in [
        ("float-quantized", fp8, Scheme::Fp8),
        ("float-quantized", block, Scheme::Fp8Blocks),
        ("mxfp4-pack-quantized", mxfp4.clone(), Scheme::Mxfp4),
    ] {
        let q = read_groups(format, json!({"g": group(weights, json!(null), json!(["Linear"]))})).unwrap();
        assert_eq!(q.declared("a"), Some(&scheme));
    }
    let error = read_groups("nvfp4-pack-quantized", json!({"g": group(mxfp4, json!(null), json!(["Linear"]))}));
    assert!(error.unwrap_err().to_string().contains("config_groups.g.weights: does not fit the format"));
}

#[test]
fn quark_by_pattern() {
    let mut block = fixture("quantization/qwen3_moe_exports.json")["amd-quark 0.13"]["quantization_config"].clone();
    let fp8 =
        json!({"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "group_size": null}, "input_tensors": null});
    block["layer_quant_config"] = json!({"*.self_attn.*": fp8});
    block["exclude"] = json!(["lm_head", "*.mlp.gate"]);
    let q = read(&block).unwrap();
    assert_eq!(q.declared("model.layers.1.self_attn.v_proj"), Some(&Scheme::Fp8));
    assert_eq!(q.declared("model.layers.1.mlp.experts.0.up_proj"), Some(&NVFP4));
    assert_eq!(q.declared("model.layers.1.mlp.gate"), None);
    block["global_quant_config"]["input_tensors"] = json!(null);
    assert_eq!(read(&block).unwrap().declared("a"), Some(&Scheme::Nvfp4 { activations: Unquantised }));
    block["global_quant_config"]["weight"] = json!({"dtype": "fp4", "qscheme": "per_group", "group_size": 32});
    assert_eq!(read(&block).unwrap().declared("a"), Some(&Scheme::Mxfp4));
}

#[test]
fn official_fp8_and_mxfp4() {
    // Qwen/Qwen3-30B-A3B-FP8.
    let q = read(&json!({"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"]}))
    .unwrap();
    assert_eq!((q.producer, q.declared("lm_head"), q.declared("model.layers.0.mlp.gate")), (Producer::Fp8, None, None));
    assert_eq!(q.declared("model.layers.0.mlp.gate_proj"), Some(&Scheme::Fp8Blocks));
    assert_eq!(read(&json!({"quant_method": "fp8"})).unwrap().declared("a"), Some(&Scheme::Fp8));
    // openai/gpt-oss-20b.
    let q = read(&json!({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn",
        "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}))
    .unwrap();
    assert_eq!(q.declared("model.layers.3.self_attn.q_proj"), None);
    assert_eq!(q.declared("model.layers.3.mlp.experts.gate_up_proj"), Some(&Scheme::Mxfp4));
    assert_eq!(Quantization::none().declared("a"), None);
}

#[test]
fn gpt_oss_takes_mxfp4_and_nvfp4() {
    let with = |block: Value| {
        let mut value = tiny();
        value["quantization_config"] = block;
        Config::from_json("config.json", value.to_string().as_bytes()).map(|c| c.quantization)
    };
    assert_eq!(with(json!(null)).unwrap().producer, Producer::None);
    let own =
        with(json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "fourfold"}})).unwrap();
    assert_eq!((own.producer, own.declared("a")), (Producer::ModelOpt, Some(&NVFP4)));
    for block in [
        json!({"quant_method": "modelopt", "quant_algo": "FP8"}),
        json!({"quant_method": "quark"}),
        json!({"quant_method": "compressed-tensors"}),
    ] {
        assert!(with(block).unwrap_err().to_string().contains("supported: \"mxfp4\""));
    }
    let old = br#"{"quantization": {"quant_algo": "FP8"}}"#;
    let error =
        Quantization::from_hf_quant_config("hf_quant_config.json", old, Family::GptOss).unwrap_err().to_string();
    assert!(error.contains("quantization.quant_algo: is not NVFP4"), "{error}");
}

#[test]
fn broken_declarations_name_file_and_key() {
    let nvfp4 = json!({"num_bits": 4, "type": "float", "group_size": 16});
    let ct = |changes: Value| {
        let mut block = json!({"quant_method": "compressed-tensors", "config_groups":
            {"g": group(nvfp4.clone(), json!(null), json!(["Linear"]))}});
        block.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        block
    };
    let ct_group = |group: Value| json!({"quant_method": "compressed-tensors", "config_groups": {"g": group}});
    for (block, words) in [
        (json!({}), "quant_method: is missing; supported: "),
        (json!({"quant_method": "awq"}), "quant_method: \"awq\" is not supported"),
        (json!({"quant_method": "modelopt"}), "quant_algo: is missing"),
        (json!({"quant_method": "modelopt", "quant_algo": "NVFP5"}), "quant_algo: found \"NVFP5\""),
        (json!({"quant_method": "modelopt", "quant_algo": 4}), "quant_algo: found 4, should be a string"),
        (
            json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}),
            "group_size: found 32, should be 16",
        ),
        (json!({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}), "quantized_layers: is missing"),
        (
            json!({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {"a.b": {"quant_algo": "X"}}}),
            "quantization_config.quantized_layers.a.b.quant_algo: found \"X\"",
        ),
        (json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": "lm_head"}), "ignore: found \"lm_head\""),
        (
            json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": [1]}),
            "ignore: found [1], should be a list",
        ),
        (json!({"quant_method": "fp8", "weight_block_size": [64, 64]}), "weight_block_size: found [64,64], should be"),
        (json!({"quant_method": "fp8", "fmt": "e5m2"}), "fmt: found \"e5m2\""),
        (json!({"quant_method": "compressed-tensors"}), "config_groups: is missing"),
        (ct(json!({"format": "gguf"})), "format: found \"gguf\""),
        (ct(json!({"ignore": ["re:("]})), "quantization_config.ignore: \"re:(\" is not a pattern"),
        (ct(json!({"ignore": [""]})), "ignore: an entry has 0 bytes"),
        (ct(json!({"transform_config": {"config_groups": {"u": {}}}})), "transform_config: weights that were rotated"),
        (ct(json!({"sparsity_config": {"format": "sparse-bitmask"}})), "sparsity_config.format"),
        (ct_group(json!({"weights": {"num_bits": 4, "type": "float"}})), "weights.group_size: is missing"),
        (ct_group(json!({"weights": {"num_bits": 4, "type": "float", "group_size": 8}})), "group_size: found 8"),
        (ct_group(json!({"weights": {"num_bits": 99}})), "weights.num_bits: found 99"),
        (ct_group(json!({"weights": nvfp4})), "g.targets: is missing"),
        (ct_group(json!(7)), "config_groups.g: found 7, should be an object"),
        (
            ct_group(group(nvfp4.clone(), json!({"num_bits": 4, "dynamic": "yes"}), json!(["Linear"]))),
            "input_activations.dynamic: found \"yes\"",
        ),
        (
            json!({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp3"}}}),
            "global_quant_config.weight.dtype: found \"fp3\"",
        ),
        (
            json!({"quant_method": "quark", "global_quant_config": {"weight": [{"dtype": "fp4", "group_size": 16}, {}]}}),
            "global_quant_config.weight: the second entry",
        ),
        (json!({"quant_method": "quark", "global_quant_config": {"weight": []}}), "weight: found [], should be"),
    ] {
        let error = read(&block).unwrap_err().to_string();
        assert!(error.starts_with("config.json: quantization_config.") && error.contains(words), "{block}: {error}");
        assert!(error.len() < 500, "{error}");
    }
    let old = read_old(&json!({"quantization": {"quant_algo": "?"}})).unwrap_err().to_string();
    assert!(old.starts_with("hf_quant_config.json: quantization.quant_algo: "), "{old}");
    assert!(read_old(&json!({})).unwrap_err().to_string().contains("quantization: is missing"));
}

#[test]
fn a_pattern_that_takes_too_long_is_an_error() {
    let q = read(&json!({"quant_method": "compressed-tensors", "ignore": [r"re:(a)(?:\1?){4000000000}"],
        "config_groups": {"g": group(json!({"num_bits": 8, "type": "float"}), json!(null), json!(["Linear"]))}}));
    let q = q.unwrap();
    let module = "a".repeat(60);
    let error = q.resolve(&module).unwrap_err().to_string();
    assert!(error.starts_with("config.json: quantization: the pattern ") && error.contains("too long"), "{error}");
    assert_eq!(q.declared("b"), Some(&Scheme::Fp8));

    // It fits nothing then, and the lists' other patterns still count.
    let slow = r"re:(a)(?:\1?){4000000000}";
    let listed = |ignore: Value, targets: Value| {
        let block = json!({"quant_method": "compressed-tensors", "ignore": ignore,
            "config_groups": {"g": group(json!({"num_bits": 8, "type": "float"}), json!(null), targets)}});
        let q = read(&block).unwrap();
        q.resolve(&module).unwrap_err();
        q.declared(&module).cloned()
    };
    assert_eq!(listed(json!([slow]), json!(["Linear"])), Some(Scheme::Fp8));
    assert_eq!(listed(json!([slow, "re:a+$"]), json!(["Linear"])), None);
    assert_eq!(listed(json!([]), json!([slow, "re:a+$"])), Some(Scheme::Fp8));
    assert_eq!(listed(json!([slow]), json!(["re:b"])), None);
}
