//! `isolation`: a model keeps its bits beside its twin and beside others, and a device that lets one model's constants
//! reach the other is caught as seed runs of other engines showed it: right beside the twin, wrong beside the other.

use crate::families::fixture;
use crate::verify::{Fault, faulty, under_test};
use fourfold::device::{Device, cpu::Cpu};
use fourfold::isolation::{Report, Who, isolation};
use fourfold::{DeviceChoice, Engine, Result};
use std::sync::Arc;

fn run(subject: &str, other: &str, device: &Arc<dyn Device>) -> Report {
    let mut first = true;
    let mut load = |who, given: Option<Arc<dyn Device>>| -> Result<Engine> {
        assert_eq!(given.is_none(), std::mem::take(&mut first), "only the first engine chooses its device");
        let name = if who == Who::Subject { subject } else { other };
        let device = given.unwrap_or_else(|| device.clone());
        Engine::builder().checkpoint(fixture(name)).device(DeviceChoice::Own(device)).context(128).chunk(64).build()
    };
    let tokens: Vec<u32> = (0..79).map(|i| (i * 37 + i * i) % 250).collect();
    isolation(&mut load, &|_| Ok(tokens.clone()), 5).unwrap()
}

#[test]
fn models_of_all_families_keep_their_bits() {
    for (subject, other) in
        [("gpt_oss/tiny", "qwen3_moe/modelopt"), ("dense/llama", "gpt_oss/odd"), ("qwen3_moe/modelopt", "dense/qwen3")]
    {
        let report = run(subject, other, &under_test());
        assert!(report.differences().is_empty(), "{subject} beside {other}: {:?}", report.differences());
        let names: Vec<&str> = report.settings.iter().map(|s| s.name).collect();
        assert_eq!(names, ["alone", "beside its twin", "beside the other"]);
        for setting in &report.settings {
            assert_eq!((setting.layers.len() > 2, setting.drawn.len()), (true, 5));
            for layer in &setting.layers {
                assert!(layer.least < layer.mean && layer.mean < layer.largest, "{layer:?}");
                assert!(layer.deviation > 0.0 && layer.mlp != layer.output, "{layer:?}");
            }
        }
    }
}

#[test]
fn the_moments_are_those_of_the_values() {
    // Against a trace of the values themselves, over the same steps.
    let device: Arc<dyn Device> = Arc::new(Cpu::default());
    let report = run("gpt_oss/tiny", "dense/llama", &device);
    let engine = Engine::builder()
        .checkpoint(fixture("gpt_oss/tiny"))
        .device(DeviceChoice::Own(device))
        .context(128)
        .build()
        .unwrap();
    let mut session = engine.session().unwrap();
    let mut values: Vec<f64> = Vec::new();
    let mut see = |stage: &fourfold::program::Stage, words: Vec<u32>| {
        assert_eq!(stage.name, "layers.2.mlp.out");
        values.extend(words.iter().map(|w| f64::from(f32::from_bits(*w))));
        Ok(())
    };
    let mut watch = fourfold::Watch { keep: &|name| name == "layers.2.mlp.out", stats: false, see: &mut see };
    session.feed_watching(&report.tokens, fourfold::Want::Nothing, &mut watch).unwrap();
    let drawn = &report.settings[0].drawn;
    session.feed_drawn_watching(drawn, fourfold::Want::Nothing, &mut watch).unwrap();
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let deviation = (values.iter().map(|v| v * v).sum::<f64>() / n - mean * mean).sqrt();
    let layer = report.settings[0].layers[2];
    assert!((layer.mean - mean).abs() < 1e-6 * deviation && (layer.deviation - deviation).abs() < 1e-5 * deviation);
    assert_eq!(layer.least, values.iter().copied().fold(f64::INFINITY, f64::min));
    assert_eq!(layer.largest, values.iter().copied().fold(f64::NEG_INFINITY, f64::max));
}

#[test]
fn a_constant_that_reaches_the_other_model_is_caught() {
    // Norms with the constant of whoever ran before: the twin has the same one, the other model has not.
    let device = faulty(under_test(), Fault::LastModelsConstant);
    let report = run("gpt_oss/tiny", "qwen3_moe/modelopt", &device);
    let differences = report.differences();
    assert!(differences.len() == 1 && differences[0].starts_with("beside the other: "), "{differences:?}");
    assert!(differences[0].contains("layer 0"), "{differences:?}");
}

#[test]
fn the_command_prints_the_verdict() {
    use crate::cli::{err, fails, fourfold, out, root};
    let [tiny, llama] = ["gpt_oss/tiny", "dense/llama"].map(|name| root("tests/fixtures").join(name));
    let [tiny, llama] = [tiny.to_str().unwrap(), llama.to_str().unwrap()];
    let common = ["isolation", "--model", tiny, "--beside", llama, "--device", "cpu", "--context", "128", "-n", "2"];
    let table = fourfold(&common);
    assert!(table.status.success(), "{}", err(&table));
    assert!(out(&table).contains("79 tokens given, 2 drawn") && out(&table).contains("Equal bits"), "{}", out(&table));
    let json = fourfold(&[&common, &["--tokens", "1,2,3", "--json"][..]].concat());
    let facts: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(facts["equal"], true);
    assert_eq!(facts["settings"].as_array().unwrap().len(), 3);
    assert_eq!(facts["tokens"], serde_json::json!([1, 2, 3]));
    fails(&["isolation", "--device", "cpu"], 2, &["--beside"]);
    fails(&["isolation", "--beside", "nowhere", "--device", "cpu", "--model", tiny], 3, &["nowhere"]);
}
