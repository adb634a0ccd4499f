//! Tiny checkpoints with goldens of transformers' own GptOssForCausalLM (`tests/fixtures/gpt_oss/README.md`):
//! GPU = twins = golden, in every chunking, stage by stage.

use crate::harness::{Named, cpu, distance, gpus, small_binding_gpu};
use fourfold::device::Device;
use fourfold::{CacheFormat, DeviceChoice, Engine, HostStages, ReplyOptions, Sampling, Session, Want};
use safetensors::SafeTensors;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gpt_oss").join(name)
}

/// A copy of a fixture whose files may be written in place: no links, unlike the mutator's.
pub fn copy_to_write(name: &str, dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    for entry in std::fs::read_dir(fixture(name)).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.join(entry.file_name())).unwrap();
    }
}

/// A fixture's goldens.
struct Golden {
    name: &'static str,
    tensors: Vec<u8>,
    facts: serde_json::Value,
}

impl Golden {
    fn open(name: &'static str) -> Self {
        let tensors = std::fs::read(fixture(name).join("golden.safetensors")).unwrap();
        let facts = serde_json::from_slice(&std::fs::read(fixture(name).join("golden.json")).unwrap()).unwrap();
        Self { name, tensors, facts }
    }

    fn words(&self, name: &str) -> Option<Vec<u32>> {
        let tensors = SafeTensors::deserialize(&self.tensors).unwrap();
        let view = tensors.tensor(name).ok()?;
        Some(view.data().chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect())
    }

    fn floats(&self, name: &str) -> Option<Vec<f32>> {
        Some(crate::harness::floats(&self.words(name)?))
    }

    fn ids(&self, prompt: &str, what: &str) -> Vec<u32> {
        let ids = self.facts["prompts"][prompt][what].as_array().unwrap();
        ids.iter().map(|id| id.as_u64().unwrap() as u32).collect()
    }

    /// The oracle's README asks for 3e-5; `odd` needs 1e-5, since a hard-coded eps moves it by 1.9e-5 only.
    fn tolerance(&self) -> f64 {
        if self.name == "odd" { 1e-5 } else { 3e-5 }
    }
}

const PROMPTS: [&str; 4] = ["p1", "p7", "p33", "p70"];
const FIXTURES: [&str; 3] = ["tiny", "odd", "loud"];

/// How an engine is set up.
#[derive(Clone, Copy, Default)]
struct Setup {
    chunk: usize,
    host: HostStages,
    cache: CacheFormat,
}

fn session(name: &str, device: &Arc<dyn Device>, setup: Setup) -> Session {
    let engine = Engine::builder()
        .checkpoint(fixture(name))
        .device(DeviceChoice::Own(device.clone()))
        .context(110)
        .chunk(setup.chunk)
        .host(setup.host)
        .cache(setup.cache);
    engine.build().unwrap().session().unwrap()
}

/// All logits of a prompt, and every stage by name, its chunks joined.
fn trace(session: &mut Session, tokens: &[u32]) -> (Vec<f32>, HashMap<String, Vec<u32>>) {
    let mut stages: HashMap<String, Vec<u32>> = HashMap::new();
    let mut see = |name: &str, _: usize, words: Vec<u32>| {
        stages.entry(name.to_owned()).or_default().extend(words);
        Ok(())
    };
    session.clear();
    let logits = session.feed_seeing(tokens, Want::All, Some(&mut see)).unwrap();
    (logits, stages)
}

#[track_caller]
fn assert_logits(what: &str, got: &[f32], want: &[f32], tolerance: f64) {
    let (l2, _) = distance(got, want);
    let most = got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0.0, f32::max);
    assert!(l2 <= tolerance && most <= 5e-4, "{what}: relative L2 {l2:.2e} (allowed {tolerance:.0e}), max {most:.2e}");
}

/// Golden name of a stage, and how to compare it.
const STAGES: [(&str, &str); 5] = [
    ("attn_out", "attn_out"),
    ("router_logits", "mlp.router.logits"),
    ("topk_weight", "mlp.router.weights"),
    ("moe_out", "mlp.out"),
    ("hidden", "hidden"),
];

fn check_goldens(golden: &Golden, where_: &str, session: &mut Session, chunk: usize) {
    let layers = session.engine().config().num_hidden_layers;
    for prompt in PROMPTS {
        let what = format!("{} {prompt} in chunks of {chunk} on {where_}", golden.name);
        let (logits, stages) = trace(session, &golden.ids(prompt, "tokens"));
        let near = |golden_name: &str, ours: &str| {
            let want = golden.floats(&format!("{prompt}.{golden_name}"));
            let want = want.unwrap_or_else(|| panic!("{what}: there is no golden {golden_name}"));
            let got = crate::harness::floats(&stages[ours]);
            let (l2, max) = distance(&got, &want);
            // `loud` has a channel of 1e5 that f32 itself holds to 2e-2 only: the largest value is its measure.
            let loud = golden.name == "loud";
            assert!(max <= 3e-5 && (loud || l2 <= 3e-5), "{what}: {ours}: relative L2 {l2:.2e}, max {max:.2e}");
        };
        near("embed", "embed");
        near("final_norm", "final_norm");
        for layer in 0..layers {
            for (golden_name, ours) in STAGES {
                // The longest prompt has no goldens of these two, to bound the file's size.
                if prompt == "p70" && (golden_name == "attn_out" || golden_name == "moe_out") {
                    continue;
                }
                near(&format!("layer{layer}.{golden_name}"), &format!("layers.{layer}.{ours}"));
            }
        }
        for layer in 0..layers {
            let want = golden.words(&format!("{prompt}.layer{layer}.topk_index")).unwrap();
            assert_eq!(stages[&format!("layers.{layer}.mlp.router.experts")], want, "{what}: routes of layer {layer}");
        }
        assert_logits(&what, &logits, &golden.floats(&format!("{prompt}.logits")).unwrap(), golden.tolerance());
    }
}

fn greedy(session: &mut Session, prompt: &[u32], count: usize) -> Vec<u32> {
    let options = ReplyOptions {
        sampling: Sampling::greedy(),
        max_tokens: Some(count),
        stop_tokens: Some(Vec::new()),
        ..ReplyOptions::default()
    };
    let reply = session.reply(prompt, &options).unwrap();
    reply.map(|token| token.unwrap().choice.id).collect()
}

/// The twins, and the GPU as it is.
fn devices() -> Vec<Named> {
    let mut devices = vec![("twins", cpu())];
    devices.extend(gpus().iter().take(1).cloned());
    devices
}

#[test]
fn every_stage_of_every_prompt_is_golden_in_any_chunking() {
    for name in FIXTURES {
        let golden = Golden::open(name);
        for (where_, device) in devices() {
            for chunk in [110, 1, 5, 16] {
                check_goldens(&golden, where_, &mut session(name, &device, Setup { chunk, ..Setup::default() }), chunk);
            }
        }
    }
}

#[test]
fn thirty_two_greedy_tokens_are_golden() {
    for name in FIXTURES {
        let golden = Golden::open(name);
        for (where_, device) in devices() {
            for chunk in [110, 1, 5, 16] {
                let mut session = session(name, &device, Setup { chunk, ..Setup::default() });
                for prompt in PROMPTS {
                    session.clear();
                    let got = greedy(&mut session, &golden.ids(prompt, "tokens"), 32);
                    let what = format!("{name} {prompt} in chunks of {chunk} on {where_}");
                    assert_eq!(got, golden.ids(prompt, "greedy"), "{what}");
                }
            }
        }
    }
}

#[test]
fn the_logits_of_each_greedy_token_are_golden() {
    for name in FIXTURES {
        let golden = Golden::open(name);
        let want = golden.floats("p7.greedy_logits").unwrap();
        for (where_, device) in devices() {
            let mut session = session(name, &device, Setup { chunk: 16, ..Setup::default() });
            let mut got = session.feed(&golden.ids("p7", "tokens"), Want::Last).unwrap();
            for id in &golden.ids("p7", "greedy")[..31] {
                got.extend(session.feed(&[*id], Want::Last).unwrap());
            }
            assert_logits(&format!("{name} on {where_}"), &got, &want, golden.tolerance());
        }
    }
}

#[test]
fn a_wrong_weight_is_noticed() {
    // The comparison can fail: a checkpoint with one flipped bit in one code of the experts' weights is not golden.
    let dir = std::env::temp_dir().join(format!("fourfold-flipped-{}", std::process::id()));
    copy_to_write("tiny", &dir);
    let shard = dir.join("model-00001-of-00001.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    let range = {
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let data = tensors.tensor("model.layers.2.mlp.experts.gate_up_proj_blocks").unwrap().data();
        let start = data.as_ptr() as usize - bytes.as_ptr() as usize;
        start..start + data.len()
    };
    for at in range.step_by(64) {
        bytes[at] ^= 4; // one code in 128
    }
    std::fs::write(&shard, bytes).unwrap();
    let golden = Golden::open("tiny");
    let engine = Engine::builder().checkpoint(&dir).device(DeviceChoice::Cpu).build().unwrap();
    let (logits, _) = trace(&mut engine.session().unwrap(), &golden.ids("p7", "tokens"));
    let (l2, _) = distance(&logits, &golden.floats("p7.logits").unwrap());
    std::fs::remove_dir_all(&dir).unwrap();
    assert!(l2 > 100.0 * golden.tolerance(), "{l2}");
}

/// Bits of all logits of the longest prompt, and of eight tokens after it.
fn bits(session: &mut Session, golden: &Golden) -> Vec<u32> {
    session.clear();
    let mut logits = session.feed(&golden.ids("p70", "tokens"), Want::All).unwrap();
    for id in &golden.ids("p70", "greedy")[..8] {
        logits.extend(session.feed(&[*id], Want::Last).unwrap());
    }
    logits.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn bits_do_not_depend_on_chunks_checks_subgroups_or_splits() {
    for name in FIXTURES {
        let golden = Golden::open(name);
        let Some((_, first)) = gpus().first() else { return };
        let want = bits(&mut session(name, first, Setup { chunk: 110, ..Setup::default() }), &golden);
        for chunk in [1, 3, 4, 16, 69] {
            let got = bits(&mut session(name, first, Setup { chunk, ..Setup::default() }), &golden);
            assert!(got == want, "{name}: chunks of {chunk} have other bits");
        }
        // The twin of each kernel's reduction has the same tree, and checks change no value.
        for (variant, device) in &gpus()[1..] {
            let got = bits(&mut session(name, device, Setup { chunk: 110, ..Setup::default() }), &golden);
            assert!(got == want, "{name}: {variant} has other bits");
        }
        // Room for the widest activations, but not for the experts or the head in one piece.
        let small = small_binding_gpu(60_000).unwrap();
        let got = bits(&mut session(name, &small, Setup { chunk: 16, ..Setup::default() }), &golden);
        assert!(got == want, "{name}: weights in parts have other bits");
    }
}

#[test]
fn stages_on_the_host_agree() {
    let on = |routing, scatter, attention| HostStages { routing, scatter, attention };
    for name in FIXTURES {
        let golden = Golden::open(name);
        let (where_, device) = devices().pop().unwrap();
        for host in [on(true, false, false), on(false, true, false), on(false, false, true), on(true, true, true)] {
            let mut session = session(name, &device, Setup { chunk: 16, host, ..Setup::default() });
            check_goldens(&golden, &format!("{where_} with {host:?}"), &mut session, 16);
            if where_ != "twins" {
                // The host sums in f64: had the device computed these stages, the bits would be the device's.
                let on_device =
                    bits(&mut self::session(name, &device, Setup { chunk: 16, ..Setup::default() }), &golden);
                assert!(bits(&mut session, &golden) != on_device, "{name} {host:?}: did the host compute anything?");
            }
            let got = greedy(&mut session, &golden.ids("p33", "tokens"), 16);
            assert_eq!(got, golden.ids("p33", "greedy")[..16], "{name} {host:?}");
        }
    }
}

#[test]
fn a_bf16_cache_costs_bf16_precision_and_no_more() {
    // Keys and values rounded to 8 bits of mantissa: the logits move, by less than a changed route would move them.
    for name in FIXTURES {
        let golden = Golden::open(name);
        let want = golden.floats("p7.logits").unwrap();
        for (where_, device) in devices() {
            let setup = Setup { chunk: 16, cache: CacheFormat::Bf16, ..Setup::default() };
            let (logits, _) = trace(&mut session(name, &device, setup), &golden.ids("p7", "tokens"));
            let (l2, _) = distance(&logits, &want);
            assert!(l2 > 1e-5 && l2 < 2e-2, "{name} on {where_}: {l2:.2e}");
        }
    }
}

#[test]
fn decoded_weights_and_frequencies_are_golden() {
    use fourfold::checkpoint::{Checkpoint, Mapping};
    use fourfold::format::Format;
    for name in FIXTURES {
        let golden = Golden::open(name);
        let checkpoint = Checkpoint::open(&fixture(name), Mapping::Read).unwrap();
        for projection in ["gate_up_proj", "down_proj"] {
            let want = golden.words(&format!("dequant.layer0.expert0.{projection}")).unwrap();
            let prefix = format!("model.layers.0.mlp.experts.{projection}");
            let blocks = checkpoint.tensor(&format!("{prefix}_blocks")).unwrap();
            let scales = checkpoint.tensor(&format!("{prefix}_scales")).unwrap();
            let k = blocks.shape[2] * 32;
            for (row, want) in want.chunks_exact(k).enumerate() {
                let codes = &blocks.bytes[row * k / 2..(row + 1) * k / 2];
                let scales = &scales.bytes[row * k / 32..(row + 1) * k / 32];
                let mut got = vec![0.0; k];
                Format::Mxfp4.decode_row(codes, scales, 1.0, &mut got);
                let got: Vec<u32> = got.iter().map(|v| v.to_bits()).collect();
                assert_eq!(got, want, "{name} {projection} row {row}");
            }
        }
    }
}
