//! Tiny checkpoints of the Qwen3 and Llama families with goldens of transformers' own classes
//! (`tests/fixtures/{qwen3_moe,dense}/README.md`): GPU = twins = golden, for both producers and all activations.

use crate::harness::{Named, cpu, distance, floats, gpus};
use fourfold::device::Device;
use fourfold::{Activations, DeviceChoice, Engine, Error, ReplyOptions, Sampling, Session, Want};
use safetensors::SafeTensors;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A golden file.
struct Golden(Vec<u8>);

impl Golden {
    fn open(fixture_name: &str, file: &str) -> Self {
        Self(std::fs::read(fixture(fixture_name).join(file)).unwrap())
    }

    fn words(&self, name: &str) -> Option<Vec<u32>> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let data = tensors.tensor(name).ok()?.data();
        Some(data.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect())
    }

    fn floats(&self, name: &str) -> Option<Vec<f32>> {
        self.words(name).map(|words| floats(&words))
    }
}

/// The twins, and the GPU as it is.
fn devices() -> Vec<Named> {
    let mut devices = vec![("twins", cpu())];
    devices.extend(gpus().iter().take(1).cloned());
    devices
}

fn engine(name: &str, device: &Arc<dyn Device>, activations: Activations, chunk: usize) -> Engine {
    let builder = Engine::builder().checkpoint(fixture(name)).device(DeviceChoice::Own(device.clone()));
    builder.context(128).chunk(chunk).activations(activations).build().unwrap()
}

type Stages = HashMap<String, Vec<u32>>;

/// All logits of a prompt, and every stage by name, its chunks joined.
fn trace(session: &mut Session, tokens: &[u32]) -> (Vec<f32>, Stages) {
    let mut stages = Stages::new();
    let mut see = |name: &str, _: usize, words: Vec<u32>| {
        stages.entry(name.to_owned()).or_default().extend(words);
        Ok(())
    };
    session.clear();
    let logits = session.feed_seeing(tokens, Want::All, Some(&mut see)).unwrap();
    (logits, stages)
}

fn greedy(session: &mut Session, prompt: &[u32], count: usize) -> Vec<u32> {
    let options = ReplyOptions {
        sampling: Sampling::greedy(),
        max_tokens: Some(count),
        stop_tokens: Some(Vec::new()),
        ..ReplyOptions::default()
    };
    session.clear();
    session.reply(prompt, &options).unwrap().map(|token| token.unwrap().choice.id).collect()
}

#[track_caller]
fn within(what: &str, got: &[f32], want: &[f32], allowed: f32) {
    assert_eq!(got.len(), want.len(), "{what}");
    let most = got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0.0, f32::max);
    assert!(most <= allowed && got.iter().all(|v| v.is_finite()), "{what}: {most:.1e}, allowed {allowed:.0e}");
}

fn nearer(got: &[f32], one: Vec<f32>, other: Vec<f32>) -> Vec<f32> {
    if distance(got, &one).0 <= distance(got, &other).0 { one } else { other }
}

/// What the oracle's README asks of an f32 engine.
const TOLERANCE: f32 = 2e-4;

/// Golden name of a stage, and ours.
const STAGES: [(&str, &str); 7] = [
    ("attn_in", "attn_norm"),
    ("attn_out", "attn_out"),
    ("moe_in", "mlp_norm"),
    ("router_logits", "mlp.router.logits"),
    ("topk_weight", "mlp.router.weights"),
    ("moe_out", "mlp.out"),
    ("mlp_out", "mlp.out"),
];

/// Hold every stage that the golden file has of a prompt to it. Gives how many there were.
fn check_stages(what: &str, golden: &Golden, prompt: &str, layers: usize, stages: &Stages) -> usize {
    let compared = std::cell::Cell::new(0);
    let near = |golden_name: String, ours: String| {
        if let Some(want) = golden.floats(&format!("{prompt}.{golden_name}")) {
            within(&format!("{what}: {ours}"), &floats(&stages[&ours]), &want, TOLERANCE);
            compared.set(compared.get() + 1);
        }
    };
    near("hidden.0".to_owned(), "embed".to_owned());
    near("final_norm".to_owned(), "final_norm".to_owned());
    for layer in 0..layers {
        for (golden_name, ours) in STAGES {
            near(format!("{golden_name}.{layer}"), format!("layers.{layer}.{ours}"));
        }
        near(format!("hidden.{}", layer + 1), format!("layers.{layer}.hidden"));
        if let Some(want) = golden.words(&format!("{prompt}.topk_index.{layer}")) {
            let got = &stages[&format!("layers.{layer}.mlp.router.experts")];
            assert_eq!(*got, want, "{what}: routes of layer {layer}");
            compared.set(compared.get() + 1);
        }
    }
    compared.get()
}

const PRODUCERS: [&str; 2] = ["qwen3_moe/modelopt", "qwen3_moe/compressed_tensors"];
const MODES: [(&str, Activations); 4] = [
    ("w4a16", Activations::F32),
    ("w4a4_dyn_tensor", Activations::Nvfp4Dynamic),
    ("w4a4_dyn_token", Activations::Nvfp4Token),
    ("w4a4_static", Activations::Nvfp4Static),
];

#[test]
fn qwen3_moe_is_golden_from_both_producers_in_every_mode() {
    for name in PRODUCERS {
        for (mode, activations) in MODES {
            let golden = Golden::open(name, &format!("golden_{mode}.safetensors"));
            // Two activations of one file lie on the middle between two codes; transformers goes both ways (the README).
            let other = format!("golden_{mode}_other_way.safetensors");
            let other = fixture(name).join(&other).exists().then(|| Golden::open(name, &other));
            assert_eq!(other.is_some(), (name, mode) == (PRODUCERS[1], "w4a4_dyn_token"));
            for (where_, device) in devices() {
                let mut session = engine(name, &device, activations, 80).session().unwrap();
                let mut compared = 0;
                for prompt in ["p0", "p1", "p2", "p3", "p4"] {
                    let what = format!("{name} {mode} {prompt} on {where_}");
                    let tokens = golden.words(&format!("{prompt}.input_ids")).unwrap();
                    let (logits, stages) = trace(&mut session, &tokens);
                    compared += check_stages(&what, &golden, prompt, 3, &stages);
                    let want = golden.floats(&format!("{prompt}.logits")).unwrap();
                    // The W4A4 files have the last eight rows.
                    let got = &logits[logits.len() - want.len()..];
                    let want = match other.as_ref().and_then(|other| other.floats(&format!("{prompt}.logits"))) {
                        Some(other) => nearer(got, want, other),
                        None => want,
                    };
                    within(&what, got, &want, TOLERANCE);
                }
                assert!(compared >= 2 * 3 * 7, "{compared} stages");
                for i in 0..4 {
                    let prompt = golden.words(&format!("greedy{i}.prompt")).unwrap();
                    let want = golden.words(&format!("greedy{i}.tokens")).unwrap();
                    let got = greedy(&mut session, &prompt, want.len());
                    let other = other.as_ref().and_then(|other| other.words(&format!("greedy{i}.tokens")));
                    let same = got == want || other.is_some_and(|other| got == other);
                    assert!(same, "{name} {mode} greedy{i} on {where_}: {got:?}, not {want:?}");
                }
            }
        }
    }
}

#[test]
fn dense_families_are_golden() {
    for name in ["dense/qwen3", "dense/llama"] {
        let golden = Golden::open(name, "golden.safetensors");
        let facts: serde_json::Value =
            serde_json::from_slice(&std::fs::read(fixture(name).join("golden.json")).unwrap()).unwrap();
        for (where_, device) in devices() {
            for chunk in [80, 7] {
                let mut session = engine(name, &device, Activations::F32, chunk).session().unwrap();
                for prompt in ["p0", "p1", "p2", "p3"] {
                    let what = format!("{name} {prompt} in chunks of {chunk} on {where_}");
                    let tokens = golden.words(&format!("{prompt}.input_ids")).unwrap();
                    let (logits, stages) = trace(&mut session, &tokens);
                    let compared = check_stages(&what, &golden, prompt, 3, &stages);
                    assert!(compared >= 10 || prompt == "p3", "{compared} stages");
                    let want = golden.floats(&format!("{prompt}.logits")).unwrap();
                    within(&what, &logits[logits.len() - want.len()..], &want, 1e-4);
                    let Some(want) = facts["prompts"][prompt]["greedy"].as_array() else { continue };
                    let want: Vec<u32> = want.iter().map(|id| id.as_u64().unwrap() as u32).collect();
                    assert_eq!(greedy(&mut session, &tokens, want.len()), want, "{what}");
                }
            }
        }
    }
}

/// Bits of the logits of a prompt and of what follows, for a chunk size.
fn bits(engine: &Engine, prompt: &[u32], next: &[u32]) -> Vec<u32> {
    let mut session = engine.session().unwrap();
    let mut logits = session.feed(prompt, Want::All).unwrap();
    for id in next {
        logits.extend(session.feed(&[*id], Want::Last).unwrap());
    }
    logits.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn bits_do_not_depend_on_chunks_unless_one_scale_is_for_all() {
    let Some((_, device)) = gpus().first() else { return };
    let golden = Golden::open(PRODUCERS[0], "golden_w4a16.safetensors");
    let prompt = golden.words("p3.input_ids").unwrap();
    let next = golden.words("greedy3.tokens").unwrap();
    for activations in [Activations::F32, Activations::Nvfp4Token, Activations::Nvfp4Static] {
        for name in PRODUCERS {
            let want = bits(&engine(name, device, activations, 80), &prompt, &next[..5]);
            for chunk in [1, 3, 16] {
                let got = bits(&engine(name, device, activations, chunk), &prompt, &next[..5]);
                assert!(got == want, "{name} {activations:?}: chunks of {chunk} have other bits");
            }
        }
    }
}

#[test]
fn one_scale_for_all_rows_is_for_a_prompt_that_is_one_step() {
    let engine = engine(PRODUCERS[0], &cpu(), Activations::Nvfp4Dynamic, 16);
    let mut session = engine.session().unwrap();
    let refused = |result: fourfold::Result<Vec<f32>>| match result {
        Err(Error::Option { .. }) => {}
        other => panic!("not refused: {other:?}"),
    };
    refused(session.feed(&[1; 17], Want::Last));
    session.feed(&[1; 16], Want::Last).unwrap();
    session.feed(&[2], Want::Last).unwrap();
    refused(session.feed(&[3, 4], Want::Last));
    assert_eq!(session.tokens().len(), 17, "a refusal changes nothing");
    // A reply computes its prompt anew, whatever the cache holds of it.
    let options = ReplyOptions { max_tokens: Some(2), ..ReplyOptions::default() };
    let prompt: Vec<u32> = session.tokens()[..16].to_vec();
    assert_eq!(session.reply(&prompt, &options).unwrap().count(), 2);
}

#[test]
fn quantised_activations_want_nvfp4_weights() {
    for (name, activations) in [("gpt_oss/tiny", Activations::Nvfp4Token), ("dense/qwen3", Activations::Nvfp4Static)] {
        let built =
            Engine::builder().checkpoint(fixture(name)).device(DeviceChoice::Cpu).activations(activations).build();
        let message = built.unwrap_err().to_string();
        assert!(message.contains("NVFP4 weights") && message.contains("none"), "{message}");
    }
}

#[test]
fn calibrated_scales_belong_to_stages_that_there_are() {
    for name in PRODUCERS {
        let engine = engine(name, &cpu(), Activations::Nvfp4Static, 8);
        let (_, stages) = trace(&mut engine.session().unwrap(), &[1, 2, 3]);
        let scales = &engine.found().input_scales;
        assert_eq!(scales.len(), 3 * (4 + 8 * 3), "{name}: q, k, v, o and three a expert, in three layers");
        for scale in scales {
            assert!(stages.contains_key(&scale.stage), "{name}: {} is said to read {}", scale.module, scale.stage);
            assert!(stages.contains_key(&format!("{}.staged", scale.stage)), "{name}: {}", scale.stage);
        }
    }
}

/// A copy of the modelopt fixture whose tensors `change` may replace: dtype, shape, bytes.
fn changed(
    dir: &std::path::Path,
    change: impl Fn(&str, safetensors::Dtype, Vec<usize>, &[u8]) -> (safetensors::Dtype, Vec<usize>, Vec<u8>),
) {
    std::fs::create_dir_all(dir).unwrap();
    for file in ["config.json", "hf_quant_config.json"] {
        std::fs::copy(fixture(PRODUCERS[0]).join(file), dir.join(file)).unwrap();
    }
    let bytes = std::fs::read(fixture(PRODUCERS[0]).join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let all: Vec<_> =
        tensors.iter().map(|(n, t)| (n.to_owned(), change(n, t.dtype(), t.shape().to_vec(), t.data()))).collect();
    let views = all.iter().map(|(name, (dtype, shape, data))| {
        (name, safetensors::tensor::TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    std::fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn q_k_and_v_with_input_scales_of_their_own_are_quantised_apart() {
    let dir = std::env::temp_dir().join(format!("fourfold-apart-{}", std::process::id()));
    changed(&dir, |name, dtype, shape, data| {
        // k's calibration saw less, v's more.
        let factor = match name {
            "model.layers.1.self_attn.k_proj.input_scale" => 0.5,
            "model.layers.1.self_attn.v_proj.input_scale" => 3.0,
            _ => 1.0f32,
        };
        let scaled = |data: &[u8]| (f32::from_le_bytes(data.try_into().unwrap()) * factor).to_le_bytes().to_vec();
        (dtype, shape, if factor == 1.0 { data.to_vec() } else { scaled(data) })
    });
    let golden = Golden::open(PRODUCERS[0], "golden_w4a4_static.safetensors");
    let tokens = golden.words("p1.input_ids").unwrap();
    let run = |device: &Arc<dyn Device>| {
        let builder = Engine::builder().checkpoint(&dir).device(DeviceChoice::Own(device.clone())).context(64);
        let engine = builder.activations(Activations::Nvfp4Static).build().unwrap();
        trace(&mut engine.session().unwrap(), &tokens)
    };
    let (logits, stages) = run(&cpu());
    assert!(stages.contains_key("layers.1.attn_norm.staged.3") && !stages.contains_key("layers.0.attn_norm.staged.2"));
    // q alone is as it was: its columns of the stage are those of the fixture, the others are not.
    let mut session = engine(PRODUCERS[0], &cpu(), Activations::Nvfp4Static, 80).session().unwrap();
    let (_, plain) = trace(&mut session, &tokens);
    let columns = |stages: &Stages, range: std::ops::Range<usize>| -> Vec<u32> {
        stages["layers.1.qkv"].chunks_exact(256).flat_map(|row| row[range.clone()].to_vec()).collect()
    };
    assert_eq!(columns(&stages, 0..128), columns(&plain, 0..128));
    for range in [128..192, 192..256] {
        let (got, was) = (floats(&columns(&stages, range.clone())), floats(&columns(&plain, range)));
        let (l2, _) = distance(&got, &was);
        assert!(l2 > 1e-2 && l2 < 1.0, "{l2}");
    }
    for (name, device) in gpus() {
        let (got, _) = run(device);
        within(&format!("q, k, v apart on {name}"), &got, &logits, TOLERANCE);
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn a_projection_may_be_of_several_formats() {
    // q as bf16 beside k and v in NVFP4: as the fixture, but for bf16's rounding of q.
    use fourfold::checkpoint::{Checkpoint, Mapping, ScaleOrder};
    let checkpoint = Checkpoint::open(&fixture(PRODUCERS[0]), Mapping::Read).unwrap();
    let config = fourfold::config::Config::open(&checkpoint).unwrap();
    let module = "model.layers.1.self_attn.q_proj";
    let stored = checkpoint.stored(module, [128, 96], &config.quantization, ScaleOrder::Linear).unwrap();
    let mut row = vec![0.0; 96];
    let mut q = Vec::new();
    for n in 0..128 {
        stored.decode_row(n, &mut row);
        q.extend(row.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()));
    }
    let dir = std::env::temp_dir().join(format!("fourfold-mixed-{}", std::process::id()));
    changed(&dir, |name, dtype, shape, data| match name.strip_prefix(module) {
        Some(".weight") => (safetensors::Dtype::BF16, vec![128, 96], q.clone()),
        _ => (dtype, shape, data.to_vec()),
    });
    let path = dir.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let kept = tensors.iter().filter(|(name, _)| !name.starts_with(&format!("{module}.")) || name.ends_with(".weight"));
    std::fs::write(&path, safetensors::serialize(kept, None).unwrap()).unwrap();
    let golden = Golden::open(PRODUCERS[0], "golden_w4a16.safetensors");
    let tokens = golden.words("p2.input_ids").unwrap();
    let want = golden.floats("p2.logits").unwrap();
    for (name, device) in devices() {
        for activations in [Activations::F32, Activations::Nvfp4Token] {
            let builder = Engine::builder().checkpoint(&dir).device(DeviceChoice::Own(device.clone())).context(64);
            let mut session = builder.activations(activations).build().unwrap().session().unwrap();
            let (logits, stages) = trace(&mut session, &tokens);
            if activations == Activations::F32 {
                let (l2, _) = distance(&logits, &want);
                assert!(l2 > 1e-6 && l2 < 2e-2, "{name}: {l2}");
            } else {
                assert!(stages.contains_key("layers.1.attn_norm.staged.2") && logits.iter().all(|v| v.is_finite()));
            }
        }
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn the_modes_are_apart() {
    // Were one mode taken for another, the goldens of another would fit as well.
    let golden =
        |mode: &str| Golden::open(PRODUCERS[0], &format!("golden_{mode}.safetensors")).floats("p2.logits").unwrap();
    let tail = |v: Vec<f32>| v[v.len() - 8 * 512..].to_vec();
    let all: Vec<Vec<f32>> = MODES.iter().map(|(mode, _)| tail(golden(mode))).collect();
    for i in 0..4 {
        for j in 0..i {
            let (l2, _) = distance(&all[i], &all[j]);
            assert!(l2 > 1e-2, "{} and {}: {l2}", MODES[i].0, MODES[j].0);
        }
    }
}
