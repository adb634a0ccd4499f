//! `Config` against files of fixtures and files with one thing changed.

use std::path::Path;

use serde_json::{Value, json};

use super::*;

mod families;
mod quantization;

fn fixture(name: &str, file: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gpt_oss").join(name).join(file)).unwrap()
}

fn tiny() -> Value {
    serde_json::from_slice(&fixture("tiny", "config.json")).unwrap()
}

fn parse(value: &Value) -> Result<Config> {
    Config::from_json("config.json", value.to_string().as_bytes())
}

/// The tiny config with keys replaced, or removed where the value is null.
fn with(changes: Value) -> Result<Config> {
    let mut value = tiny();
    for (key, change) in changes.as_object().unwrap() {
        if change.is_null() {
            value.as_object_mut().unwrap().remove(key);
        } else {
            value[key] = change.clone();
        }
    }
    parse(&value)
}

#[test]
fn fixtures_have_the_values_of_their_files() {
    let odd = Config::from_json("config.json", &fixture("odd", "config.json")).unwrap();
    use LayerType::{Full, Sliding};
    assert_eq!(
        odd,
        Config {
            family: Family::GptOss,
            vocab_size: 503,
            hidden_size: 96,
            intermediate_size: 160,
            moe_intermediate_size: 160,
            num_hidden_layers: 3,
            num_attention_heads: 6,
            num_key_value_heads: 2,
            head_dim: 64,
            num_local_experts: 7,
            num_experts_per_tok: 3,
            norm_topk_prob: true,
            moe_layers: vec![true; 3],
            sliding_window: 13,
            layer_types: vec![Full, Sliding, Sliding],
            max_position_embeddings: 2048,
            rms_norm_eps: 1e-6,
            attention_bias: true,
            swiglu_limit: 5.0,
            swiglu_alpha: 1.702,
            rope: RopeConfig {
                theta: 10000.0,
                scaling: Some(Scaling::Yarn(Yarn {
                    factor: 8.0,
                    original_max_position_embeddings: 256,
                    ..Yarn::released()
                })),
            },
            tie_word_embeddings: false,
            eos_token_id: vec![501],
            bos_token_id: None,
            quantization: odd.quantization.clone(),
        }
    );
    parse(&tiny()).unwrap();
    Config::from_json("config.json", &fixture("loud", "config.json")).unwrap();
}

#[test]
fn inverse_frequencies_are_the_goldens() {
    for name in ["tiny", "odd", "loud"] {
        let config = Config::from_json("config.json", &fixture(name, "config.json")).unwrap();
        let golden = fixture(name, "golden.safetensors");
        let golden = safetensors::SafeTensors::deserialize(&golden).unwrap();
        let (theirs, _) = golden.tensor("rope.inv_freq").unwrap().data().as_chunks::<4>();
        let ours = config.rope.inv_freq(config.head_dim);
        assert_eq!(ours.len(), theirs.len());
        for (i, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
            let theirs = f32::from_le_bytes(*theirs);
            assert!(ours.to_bits().abs_diff(theirs.to_bits()) <= 1, "{name} {i}: {ours:e}, golden {theirs:e}");
        }
        let golden: Value = serde_json::from_slice(&fixture(name, "golden.json")).unwrap();
        let theirs = golden["rope_attention_scaling"].as_f64().unwrap();
        assert_eq!(config.rope.attention_factor(), theirs as f32);
    }
}

/// Numbers of the published 20b, worked out by hand from the formula in f64.
#[test]
fn released_frequencies() {
    let rope = RopeConfig { theta: 150000.0, scaling: Some(Scaling::Yarn(Yarn::released())) };
    let inv_freq = rope.inv_freq(64);
    for (i, expected) in [
        (0, 1.0),
        (8, 0.050_813_273),
        (9, 0.031_705_696),
        (12, 0.006_794_959_3),
        (17, 0.000_129_318_7),
        (18, 3.830_881e-5),
        (31, 3.023_511_5e-7),
    ] {
        assert!((inv_freq[i] / expected - 1.0).abs() < 1e-6, "{i}: {} {expected}", inv_freq[i]);
    }
    assert_eq!(rope.attention_factor(), 1.346_573_6);
    let rounded = RopeConfig { scaling: Some(Scaling::Yarn(Yarn { truncate: true, ..Yarn::released() })), ..rope };
    // Rounded outwards the ramp runs from 8 to 18: dimension 9 is a tenth of the way along it.
    let plain = 150000f64.powf(-18.0 / 64.0);
    let expected = plain * 0.9 + plain / 32.0 * 0.1;
    assert!((f64::from(rounded.inv_freq(64)[9]) / expected - 1.0).abs() < 1e-6);
}

#[test]
fn both_spellings_of_rope_agree() {
    let yarn = tiny()["rope_scaling"].clone();
    let mut new = yarn.clone();
    new["rope_theta"] = json!(150000.0);
    let old_type = {
        let mut old = yarn.clone();
        let kind = old.as_object_mut().unwrap().remove("rope_type").unwrap();
        old["type"] = kind;
        old
    };
    let expected = parse(&tiny()).unwrap().rope;
    for changes in [
        json!({"rope_scaling": null, "rope_theta": null, "rope_parameters": new}),
        json!({"rope_scaling": null, "rope_parameters": new}),
        json!({"rope_parameters": new}),
        json!({"rope_scaling": old_type}),
        json!({"rope_scaling": null}),
    ] {
        assert_eq!(with(changes.clone()).unwrap().rope, expected, "{changes}");
    }
    let mut null = tiny();
    null["rope_scaling"] = Value::Null;
    assert_eq!(parse(&null).unwrap().rope, expected);

    for plain in [json!({"rope_type": "default"}), json!({})] {
        let rope = with(json!({"rope_scaling": plain})).unwrap().rope;
        assert_eq!(rope, RopeConfig { theta: 150000.0, scaling: None });
        assert_eq!(rope.attention_factor(), 1.0);
        assert_eq!(rope.inv_freq(4), [1.0, 1.0 / 150000f64.sqrt() as f32]);
    }
    new["factor"] = json!(16.0);
    let error = with(json!({"rope_parameters": new})).unwrap_err().to_string();
    assert!(error.contains("rope_parameters") && error.contains("contradicts"), "{error}");
    new["rope_theta"] = json!(10000);
    assert!(with(json!({"rope_parameters": new})).unwrap_err().to_string().contains("rope_theta"));
}

#[test]
fn yarn_defaults_are_those_of_transformers() {
    let yarn = |scaling| match with(json!({"rope_scaling": scaling})).unwrap().rope.scaling {
        Some(Scaling::Yarn(yarn)) => yarn,
        other => panic!("{other:?}"),
    };
    let defaults = yarn(json!({"rope_type": "yarn", "factor": 4}));
    assert_eq!(
        defaults,
        Yarn { factor: 4.0, truncate: true, original_max_position_embeddings: 131072, ..Yarn::released() }
    );
    assert_eq!(yarn(json!({"rope_type": "yarn", "original_max_position_embeddings": 4096})).factor, 32.0);
    let factor = |scaling| with(json!({"rope_scaling": scaling})).unwrap().rope.attention_factor();
    assert_eq!(factor(json!({"rope_type": "yarn", "factor": 4, "attention_factor": 1.25})), 1.25);
    let both = json!({"rope_type": "yarn", "factor": 4, "mscale": 0.5, "mscale_all_dim": 2.0});
    let ln4 = 4f64.ln();
    assert_eq!(factor(both), ((0.05 * ln4 + 1.0) / (0.2 * ln4 + 1.0)) as f32);
    assert_eq!(factor(json!({"rope_type": "yarn", "factor": 1, "mscale": 0.5})), 1.0);
}

#[test]
fn optional_keys_and_aliases() {
    let config = with(json!({"layer_types": null, "swiglu_limit": null, "swiglu_alpha": 1.5, "hidden_act": null,
        "attention_bias": null, "tie_word_embeddings": true, "eos_token_id": [1, 2], "num_experts_per_tok": null}));
    let config = config.unwrap();
    use LayerType::{Full, Sliding};
    assert_eq!(config.layer_types, [Sliding, Full, Sliding, Full]);
    assert_eq!((config.swiglu_limit, config.swiglu_alpha), (7.0, 1.5));
    assert_eq!((config.eos_token_id, config.num_experts_per_tok), (vec![1, 2], 4));
    assert!(config.tie_word_embeddings);
    assert!(with(json!({"eos_token_id": null})).unwrap().eos_token_id.is_empty());
    // Published files have -1 and the size of the vocabulary here. Nothing reads it.
    for unused in [json!(-1), json!(512), json!(1u64 << 40), json!("none")] {
        with(json!({"pad_token_id": unused})).unwrap();
    }
}

#[test]
fn errors_name_the_key_the_value_and_the_range() {
    for (changes, words) in [
        (json!({"hidden_size": 100}), "config.json: hidden_size: found 100, should be a multiple of 32"),
        (json!({"head_dim": 260}), "head_dim: found 260, should be a whole number from 4 to 256"),
        (json!({"vocab_size": null}), "vocab_size: is missing, should be a whole number from 1 to 16777216"),
        (json!({"num_experts_per_tok": 5}), "num_experts_per_tok: 5, but experts_per_token is 4"),
        (json!({"num_local_experts": 3}), "experts_per_token: found 4, should be a whole number from 1 to 3"),
        (json!({"rms_norm_eps": 0}), "rms_norm_eps: found 0, should be a number from 1e-12 to 1.0"),
        (json!({"model_type": "mistral"}), "\"mistral\" is not supported; supported: gpt_oss"),
        (json!({"model_type": "llama"}), "does not fit model_type \"llama\", should be [\"LlamaForCausalLM\"]"),
        (json!({"quantization_config": {"quant_method": "fp8"}}), "quantization_config.quant_method: \"fp8\""),
        (json!({"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 4}), "is no multiple of 16"),
    ] {
        let error = with(changes.clone()).unwrap_err().to_string();
        assert!(error.contains(words), "{changes}: {error}");
    }
}

#[test]
fn generation_config_falls_back_to_the_model() {
    let config = parse(&tiny()).unwrap();
    let read = |text: &str| GenerationConfig::from_json("generation_config.json", text.as_bytes(), &config);
    assert_eq!(read("{}").unwrap(), GenerationConfig::from_config(&config));
    assert_eq!(read("{}").unwrap().eos_token_id, [510]);
    let full = r#"{"do_sample": true, "eos_token_id": [2, 0, 8], "temperature": 0.7, "top_p": 0.9, "top_k": 50,
        "min_p": 0.05, "repetition_penalty": 1.1}"#;
    assert_eq!(
        read(full).unwrap(),
        GenerationConfig {
            eos_token_id: vec![2, 0, 8],
            do_sample: Some(true),
            temperature: Some(0.7),
            top_p: Some(0.9),
            top_k: Some(50),
            min_p: Some(0.05),
            repetition_penalty: Some(1.1),
        }
    );
    let bad = [("temperature", "-1"), ("top_p", "2"), ("eos_token_id", "[512]"), ("top_k", "-1"), ("min_p", "3")];
    for (key, value) in bad.into_iter().chain([("repetition_penalty", "0"), ("repetition_penalty", "-1")]) {
        let bad = &format!(r#"{{"{key}": {value}}}"#);
        let error = read(bad).unwrap_err().to_string();
        assert!(error.starts_with("generation_config.json: "), "{error}");
    }
}
