//! Scales that a file lacks or that are no numbers are no fault to be found later: an engine with them is not built, and
//! the error names the tensor and so the expert. (`tests/stored.rs` has the same for one linear at a time.)

use crate::families::fixture;
use fourfold::{Activations, DeviceChoice, Engine, Want};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize_to_file};
use std::collections::BTreeMap;
use std::path::PathBuf;

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

const MODES: [Activations; 2] = [Activations::F32, Activations::Nvfp4Static];

/// A copy of the ModelOpt fixture with other tensors, gone when dropped.
struct Changed(PathBuf);

impl Changed {
    fn new(test: &str, change: impl Fn(&mut Tensors)) -> Self {
        let (from, dir) = (fixture("qwen3_moe/modelopt"), std::env::temp_dir());
        let dir = dir.join(format!("fourfold-faults-{}-{test}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        for file in ["config.json", "hf_quant_config.json"] {
            std::fs::copy(from.join(file), dir.join(file)).unwrap();
        }
        let bytes = std::fs::read(from.join("model.safetensors")).unwrap();
        let all = SafeTensors::deserialize(&bytes).unwrap();
        let own = |(name, view): (String, TensorView<'_>)| {
            (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        };
        let mut tensors: Tensors = all.tensors().into_iter().map(own).collect();
        change(&mut tensors);
        let views: Vec<(&String, TensorView<'_>)> =
            tensors.iter().map(|(name, (d, s, b))| (name, TensorView::new(*d, s.clone(), b).unwrap())).collect();
        serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
        Self(dir)
    }

    fn build(&self, activations: Activations) -> fourfold::Result<Engine> {
        let builder = Engine::builder().checkpoint(&self.0).device(DeviceChoice::Cpu);
        builder.context(16).activations(activations).build()
    }

    /// In every mode, an error with these words.
    fn refused(&self, words: &[&str]) {
        for activations in MODES {
            let message = self.build(activations).map(|_| ()).unwrap_err().to_string();
            for word in words {
                assert!(message.contains(word), "{activations:?}: no {word:?} in: {message}");
            }
        }
    }
}

impl Drop for Changed {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0); // a copy too many in a temporary folder
    }
}

/// vllm#45212: one expert's input scale was missing, became 0, and its inverse infinite, for prompts that came there.
#[test]
fn a_missing_scale_of_one_expert_is_an_error_that_names_it() {
    for (i, name) in [
        "model.layers.1.mlp.experts.3.up_proj.input_scale",
        "model.layers.2.mlp.experts.5.gate_proj.weight_scale_2",
        "model.layers.0.mlp.experts.7.down_proj.weight_scale",
        "model.layers.0.self_attn.k_proj.input_scale",
    ]
    .into_iter()
    .enumerate()
    {
        let changed = Changed::new(&format!("missing-{i}"), |tensors| assert!(tensors.remove(name).is_some()));
        changed.refused(&[name, "is missing"]);
    }
}

/// compressed-tensors#595: experts that calibration never reached had infinite scales.
#[test]
fn a_scale_that_is_no_number_is_an_error_that_names_it() {
    for (i, bad) in [0.0, -1.0, f32::NAN, f32::INFINITY].into_iter().enumerate() {
        for part in ["input_scale", "weight_scale_2"] {
            let name = format!("model.layers.2.mlp.experts.6.down_proj.{part}");
            let changed = Changed::new(&format!("bad-{i}-{part}"), |tensors| {
                tensors.get_mut(&name).unwrap().2 = bad.to_le_bytes().to_vec();
            });
            changed.refused(&[&name, "a scale is a finite number above zero"]);
        }
    }
}

/// transformers#48372: a tensor that nobody asked for may be a scale that somebody should have.
#[test]
fn a_scale_under_another_name_is_not_passed_over() {
    let name = "model.layers.0.mlp.experts.0.up_proj.weight_scale_3";
    let changed = Changed::new("unknown", |tensors| {
        tensors.insert(name.to_owned(), (Dtype::F32, vec![], 0.5f32.to_le_bytes().to_vec()));
    });
    changed.refused(&[name]);
}

/// A file of weights only runs with activations as they are, to the same bits, and says so where more is asked for.
#[test]
fn weights_without_input_scales_run_and_are_not_taken_for_zero() {
    let changed = Changed::new("weights-only", |tensors| tensors.retain(|name, _| !name.ends_with("input_scale")));
    for (file, key) in [("config.json", "quantization_config"), ("hf_quant_config.json", "quantization")] {
        let path = changed.0.join(file);
        let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        json[key]["quant_algo"] = "W4A16_NVFP4".into();
        if let Some(group) = json[key].pointer_mut("/config_groups/group_0") {
            group.as_object_mut().unwrap().remove("input_activations");
        }
        std::fs::write(path, json.to_string()).unwrap();
    }
    let whole = Changed::new("whole", |_| {});
    let logits = |changed: &Changed, activations| {
        changed.build(activations).unwrap().session().unwrap().feed(&[3, 141, 59, 26], Want::All).unwrap()
    };
    for activations in [Activations::F32, Activations::Nvfp4Token] {
        assert_eq!(logits(&changed, activations), logits(&whole, activations), "{activations:?}");
    }
    let message = changed.build(Activations::Nvfp4Static).map(|_| ()).unwrap_err().to_string();
    for word in ["model.layers.0.mlp.experts.0.gate_proj", "has no calibrated input scale", "nvfp4-token"] {
        assert!(message.contains(word), "{message}");
    }
}
