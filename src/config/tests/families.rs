//! Configs of Qwen3-MoE, dense Qwen3 and Llama: keys, defaults, layers, rotary positions.

use super::super::*;
use serde_json::json;

/// The sizes of the released models, by family, in the keys of their files.
fn base(family: &str) -> Value {
    let architecture = match family {
        "qwen3_moe" => "Qwen3MoeForCausalLM",
        "qwen3" => "Qwen3ForCausalLM",
        _ => "LlamaForCausalLM",
    };
    let mut value = json!({
        "architectures": [architecture], "model_type": family, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 6, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "vocab_size": 151936, "hidden_act": "silu",
        "bos_token_id": 151643, "eos_token_id": 151645, "rope_theta": 1000000.0
    });
    if family == "qwen3_moe" {
        let more = json!({"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
            "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": []});
        value.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    }
    value
}

/// A released model's config with keys replaced; a key whose value is "absent" is removed.
fn with(family: &str, changes: Value) -> Result<Config> {
    let mut value = base(family);
    for (key, change) in changes.as_object().unwrap() {
        if change == "absent" {
            value.as_object_mut().unwrap().remove(key);
        } else {
            value[key] = change.clone();
        }
    }
    Config::from_json("config.json", value.to_string().as_bytes())
}

#[test]
fn qwen3_moe_has_the_values_of_its_file() {
    let config = with("qwen3_moe", json!({})).unwrap();
    assert_eq!((config.family, config.family.name()), (Family::Qwen3Moe, "qwen3_moe"));
    assert_eq!((config.hidden_size, config.intermediate_size, config.moe_intermediate_size), (2048, 6144, 768));
    assert_eq!((config.num_local_experts, config.num_experts_per_tok, config.norm_topk_prob), (128, 8, true));
    assert_eq!(config.rope, RopeConfig { theta: 1e6, scaling: None });
    assert_eq!((config.moe_layers.clone(), config.is_moe(6)), (vec![true; 6], false));
    assert_eq!((config.layer_types, config.sliding_window), (vec![LayerType::Full; 6], 0));
    assert!(!config.attention_bias && !config.tie_word_embeddings);
    assert_eq!(config.quantization, Quantization::none());
    // Both styles of the fixtures.
    for style in ["modelopt", "compressed_tensors"] {
        let path = format!("{}/tests/fixtures/qwen3_moe/{style}/config.json", env!("CARGO_MANIFEST_DIR"));
        let config = Config::from_json("config.json", &std::fs::read(path).unwrap()).unwrap();
        assert_eq!((config.num_local_experts, config.head_dim, config.rope.theta), (8, 32, 1e6));
        assert!(config.norm_topk_prob);
    }
}

#[test]
fn defaults_are_those_of_transformers() {
    let moe = json!({"norm_topk_prob": "absent", "mlp_only_layers": "absent", "decoder_sparse_step": "absent",
        "rope_theta": "absent", "head_dim": "absent", "intermediate_size": "absent", "architectures": "absent"});
    let config = with("qwen3_moe", moe).unwrap();
    assert_eq!((config.norm_topk_prob, config.head_dim, config.intermediate_size), (false, 64, 0));
    assert_eq!(config.rope.theta, 10000.0);
    assert_eq!(with("qwen3", json!({"head_dim": "absent", "hidden_size": 1024})).unwrap().head_dim, 128);
    let llama = json!({"head_dim": null, "num_key_value_heads": null, "hidden_size": 576, "num_attention_heads": 9});
    let config = with("llama", llama).unwrap();
    assert_eq!((config.head_dim, config.num_key_value_heads), (64, 9));
    // SmolLM2-135M.
    let smol = json!({"head_dim": "absent", "num_key_value_heads": 3, "hidden_size": 576, "num_attention_heads": 9,
        "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": true, "rope_theta": 100000,
        "rope_scaling": null, "mlp_bias": false, "bos_token_id": 1, "eos_token_id": 2});
    let config = with("llama", smol).unwrap();
    assert_eq!((config.hidden_size, config.num_attention_heads, config.num_key_value_heads), (576, 9, 3));
    assert_eq!((config.num_local_experts, config.num_experts_per_tok, config.moe_intermediate_size), (0, 0, 0));
    assert_eq!((config.moe_layers, config.tie_word_embeddings), (vec![false; 6], true));
    assert!(with("qwen3", json!({"attention_bias": true})).unwrap().attention_bias);
}

#[test]
fn some_layers_have_experts() {
    let layers = |step: usize, dense: Value| {
        with("qwen3_moe", json!({"decoder_sparse_step": step, "mlp_only_layers": dense})).unwrap().moe_layers
    };
    assert_eq!(layers(2, json!([])), [false, true, false, true, false, true]);
    assert_eq!(layers(1, json!([0, 5])), [false, true, true, true, true, false]);
    assert_eq!(layers(3, json!([2])), [false, false, false, false, false, true]);
}

#[test]
fn sliding_windows_follow_transformers() {
    use LayerType::{Full, Sliding};
    let layers = |family: &str, changes: Value| {
        let config = with(family, changes).unwrap();
        (config.layer_types, config.sliding_window)
    };
    let on = json!({"use_sliding_window": true, "sliding_window": 64, "max_window_layers": 4});
    assert_eq!(layers("qwen3", on.clone()), (vec![Full, Full, Full, Full, Sliding, Sliding], 64));
    assert_eq!(layers("qwen3_moe", on.clone()), (vec![Sliding; 6], 64));
    assert_eq!(layers("llama", on), (vec![Full; 6], 0));
    let off = json!({"use_sliding_window": false, "sliding_window": -7, "max_window_layers": 0});
    assert_eq!(layers("qwen3", off.clone()), (vec![Full; 6], 0));
    assert_eq!(layers("qwen3_moe", off), (vec![Full; 6], 0));
    // Null turns the window off; no key is the class default.
    let null = json!({"use_sliding_window": true, "sliding_window": null, "max_window_layers": 0});
    assert_eq!(layers("qwen3", null), (vec![Full; 6], 0));
    let absent = json!({"use_sliding_window": true, "max_window_layers": 0});
    assert_eq!(layers("qwen3", absent), (vec![Sliding; 6], 4096));
    // The class default of max_window_layers, 28, is past the last layer.
    assert_eq!(layers("qwen3", json!({"use_sliding_window": true})), (vec![Full; 6], 0));
    let words = ["sliding_attention", "full_attention"].repeat(3);
    let given = json!({"use_sliding_window": true, "sliding_window": 64, "layer_types": words});
    assert_eq!(layers("qwen3", given), ([Sliding, Full].repeat(3), 64));
    assert_eq!(layers("llama", json!({"layer_types": vec!["full_attention"; 6]})), (vec![Full; 6], 0));
}

#[test]
fn errors_name_the_key() {
    for (family, changes, words) in [
        ("qwen3_moe", json!({"num_experts": "absent"}), "num_local_experts: is missing"),
        ("qwen3_moe", json!({"num_local_experts": 64}), "num_local_experts: 64, but num_experts is 128"),
        (
            "qwen3_moe",
            json!({"moe_intermediate_size": 40}),
            "moe_intermediate_size: found 40, should be a multiple of 16",
        ),
        ("qwen3_moe", json!({"mlp_only_layers": [6]}), "mlp_only_layers: found [6], should be a list of layers below"),
        ("qwen3_moe", json!({"mlp_only_layers": [1], "intermediate_size": null}), "intermediate_size: is null"),
        ("qwen3_moe", json!({"decoder_sparse_step": 0}), "decoder_sparse_step: found 0"),
        ("qwen3_moe", json!({"norm_topk_prob": 1}), "norm_topk_prob: found 1, should be true or false"),
        ("qwen3_moe", json!({"head_dim": null}), "head_dim: is null"),
        ("qwen3_moe", json!({"layer_types": vec!["sliding_attention"; 6]}), "layer_types: contradicts"),
        ("qwen3", json!({"head_dim": null}), "head_dim: is null"),
        ("qwen3", json!({"layer_types": vec!["sliding_attention"; 6]}), "layer_types: has sliding layers, but"),
        ("qwen3", json!({"use_sliding_window": true, "sliding_window": 0}), "sliding_window: found 0"),
        ("qwen3", json!({"rms_norm_eps": "absent"}), "rms_norm_eps: is missing"),
        (
            "qwen3",
            json!({"architectures": ["Qwen3MoeForCausalLM"]}),
            "architectures: [\"Qwen3MoeForCausalLM\"] does not",
        ),
        ("llama", json!({"mlp_bias": true}), "mlp_bias: true is not supported"),
        (
            "llama",
            json!({"head_dim": null, "hidden_size": 2064, "num_attention_heads": 32}),
            "does not divide hidden_size",
        ),
        ("llama", json!({"hidden_size": 100}), "hidden_size: found 100, should be a multiple of 16"),
        ("llama", json!({"hidden_act": "gelu"}), "hidden_act: found \"gelu\", should be \"silu\""),
        ("llama", json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor: 0.5 is not supported"),
        (
            "llama",
            json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}),
            "rope_scaling.rope_type: found \"dynamic\"",
        ),
        ("llama", json!({"rope_scaling": {"rope_type": "linear"}}), "rope_scaling.factor: is missing"),
        ("llama", json!({"rope_scaling": {"rope_type": "llama3", "factor": 8}}), "low_freq_factor: is missing"),
        (
            "llama",
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}}),
            "rope_scaling.high_freq_factor: 4 is not more than low_freq_factor, 4",
        ),
    ] {
        let error = with(family, changes.clone()).unwrap_err().to_string();
        assert!(error.starts_with("config.json: ") && error.contains(words), "{family} {changes}: {error}");
    }
}

/// transformers 5.23.0, torch 2.15.0: `ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(hidden_size=2048, num_attention_heads=32,
/// head_dim=64, max_position_embeddings=131072, rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor":
/// 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}))`, Llama-3.2-1B's
/// values, printed with nine digits.
const LLAMA3: [f64; 32] = [
    1.0,
    0.663601279,
    0.440366626,
    0.292227834,
    0.193922758,
    0.128687382,
    0.0853971019,
    0.0566696189,
    0.0376060307,
    0.0249554086,
    0.0165604409,
    0.0109895291,
    0.00729266508,
    0.00483942125,
    0.00321144611,
    0.00129054801,
    0.000429556705,
    9.70828623e-05,
    1.94616387e-05,
    1.29147675e-05,
    8.57025589e-06,
    5.68723226e-06,
    3.77405445e-06,
    2.50446715e-06,
    1.66196742e-06,
    1.10288363e-06,
    7.31874934e-07,
    4.85673127e-07,
    3.22293289e-07,
    2.1387423e-07,
    1.41927202e-07,
    9.41830649e-08,
];

#[test]
fn llama3_frequencies_are_those_of_transformers() {
    let scaling = json!({"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192});
    let config = with("llama", json!({"rope_theta": 500000.0, "rope_scaling": scaling})).unwrap();
    let mut both = scaling;
    both["rope_theta"] = json!(500000.0);
    let new = with("llama", json!({"rope_theta": "absent", "rope_parameters": both})).unwrap();
    assert_eq!(config.rope, new.rope);
    let ours = config.rope.inv_freq(64);
    for (i, (ours, theirs)) in ours.iter().zip(LLAMA3.map(|x| x as f32)).enumerate() {
        assert!(ours.to_bits().abs_diff(theirs.to_bits()) <= 1, "{i}: {ours:e}, golden {theirs:e}");
    }
    assert_eq!((ours.len(), config.rope.attention_factor()), (32, 1.0));
}

#[test]
fn linear_frequencies_are_those_of_transformers() {
    // As above, "linear", theta 10000, factor 3, head_dim 16.
    let golden = [
        0.333333343,
        0.105409257,
        0.0333333351,
        0.0105409259,
        0.00333333318,
        0.00105409266,
        0.000333333359,
        0.000105409265f64,
    ];
    let scaling = json!({"type": "linear", "factor": 3.0});
    let config = with("llama", json!({"rope_theta": 10000, "rope_scaling": scaling})).unwrap();
    for (ours, theirs) in config.rope.inv_freq(16).iter().zip(golden.map(|x| x as f32)) {
        assert!(ours.to_bits().abs_diff(theirs.to_bits()) <= 1, "{ours:e}, golden {theirs:e}");
    }
}
