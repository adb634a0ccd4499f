//! Malformed checkpoints: each broken directory of the mutator gives one clear error, soon, and never a panic.

use std::fs;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fourfold::Error;
use fourfold::checkpoint::Mapping;

use crate::mutator::{self, CONFIG, INDEX, Random, SHARDS};

const MAPPINGS: [Mapping; 2] = [Mapping::Mmap, Mapping::Read];
const LIMIT: Duration = Duration::from_secs(1);

#[test]
fn whole_checkpoints_load() {
    for name in ["tiny", "odd", "loud"] {
        for mapping in MAPPINGS {
            load(&mutator::fixture(name), mapping).unwrap();
        }
    }
    // The mutator's own copy too: else its cases could all fail for another reason.
    let dir = scratch("copy");
    mutator::copy_fixture("tiny", &dir);
    load(&dir, Mapping::Mmap).unwrap();
}

#[test]
fn broken_checkpoints_give_one_clear_error() {
    let cases = mutator::cases(&scratch("broken"));
    assert!(cases.len() >= 80);
    let mut names: Vec<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), cases.len(), "two cases have one name");

    let mut faults = Vec::new();
    for case in &cases {
        for mapping in MAPPINGS {
            let fault = match attempt(&case.dir, mapping) {
                Err(fault) => Some(fault),
                Ok(None) => Some("loaded as if nothing were wrong".into()),
                Ok(Some(message)) => {
                    let lacks = case.expect.iter().find(|word| !message.contains(**word));
                    lacks.map(|word| format!("{word:?} is not in {message:?}"))
                }
            };
            faults.extend(fault.map(|fault| format!("{} ({mapping:?}): {fault}", case.name)));
        }
    }
    assert!(faults.is_empty(), "{} of {} cases:\n{}", faults.len(), cases.len(), faults.join("\n"));
    println!("{} broken checkpoints", cases.len());
    scratch("broken"); // left in place only where it explains a failure
}

/// Random bytes changed where structure lies. Some results are whole checkpoints; none may panic or take long.
#[test]
fn flipped_bytes_never_panic() {
    let folder = mutator::copy_fixture("tiny", &scratch("flipped"));
    let mut random = Random(7);
    let (mut n_errors, mut faults) = (0, Vec::new());
    for round in 0..300 {
        let file = [CONFIG, INDEX, SHARDS[0], SHARDS[1]][round % 4];
        let whole = folder.read(file);
        let end = if file.ends_with(".safetensors") { mutator::header(&whole).end } else { whole.len() };
        let mut bytes = whole.clone();
        for _ in 0..=random.below(3) {
            bytes[random.below(end)] ^= 1 << random.below(8);
        }
        folder.write(file, &bytes);
        match attempt(&folder.0, MAPPINGS[round / 4 % 2]) {
            Err(fault) => faults.push(format!("round {round}, {file}: {fault}")),
            Ok(message) => n_errors += usize::from(message.is_some()),
        }
        folder.write(file, &whole);
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    assert!(n_errors > 200, "only {n_errors} of 300 flips were noticed");
    load(&folder.0, Mapping::Mmap).unwrap();
}

/// Loads and judges: `Ok` with the message, if there was an error and it is one short line; `Err` with what was bad.
fn attempt(dir: &Path, mapping: Mapping) -> Result<Option<String>, String> {
    let start = Instant::now();
    let result = catch_unwind(|| load(dir, mapping)).map_err(|_| "panicked".to_owned())?;
    let took = start.elapsed();
    if took > LIMIT {
        return Err(format!("took {took:?}"));
    }
    let Err(error) = result else { return Ok(None) };
    let message = error.to_string();
    if message.len() >= 500 || message.chars().any(char::is_control) {
        return Err(format!("not one short line: {message:?}"));
    }
    Ok(Some(message))
}

/// A directory of this test run's own, not there yet.
fn scratch(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("checkpoint").join(name);
    let _ = fs::remove_dir_all(&dir);
    dir
}

/// Everything that happens to a checkpoint before the first token.
fn load(dir: &Path, mapping: Mapping) -> Result<(), Error> {
    placeholder::load(dir, mapping)
}

/// Stands in for the engine's own loading: to be replaced by `Engine::builder().checkpoint(dir)` on the CPU.
mod placeholder {
    use std::collections::HashSet;

    use fourfold::checkpoint::{Checkpoint, Dtype, check_e8m0};
    use fourfold::config::{Config, GenerationConfig};

    use super::*;

    pub(super) fn load(dir: &Path, mapping: Mapping) -> Result<(), Error> {
        let checkpoint = Checkpoint::open(dir, mapping)?;
        let config = Config::from_json(&checkpoint.path(CONFIG), checkpoint.require(CONFIG)?)?;
        let generation = "generation_config.json";
        if let Some(bytes) = checkpoint.file(generation) {
            GenerationConfig::from_json(&checkpoint.path(generation), bytes, &config)?;
        }
        let mut used = HashSet::new();
        let mut check = |name: String, dtype: Dtype, shape: &[usize]| -> Result<(), Error> {
            let tensor = checkpoint.tensor(&name)?;
            tensor.expect(dtype, shape)?;
            if name.ends_with("_scales") {
                check_e8m0(&tensor)?;
            }
            used.insert(name);
            Ok(())
        };
        let (v, d, f, e) = (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_local_experts);
        let q = config.num_attention_heads * config.head_dim;
        let kv = config.num_key_value_heads * config.head_dim;
        check("model.embed_tokens.weight".into(), Dtype::Bf16, &[v, d])?;
        check("lm_head.weight".into(), Dtype::Bf16, &[v, d])?;
        check("model.norm.weight".into(), Dtype::Bf16, &[d])?;
        for layer in 0..config.num_hidden_layers {
            let name = |rest: &str| format!("model.layers.{layer}.{rest}");
            for (rest, rows, columns) in [
                ("self_attn.q_proj", q, d),
                ("self_attn.k_proj", kv, d),
                ("self_attn.v_proj", kv, d),
                ("self_attn.o_proj", d, q),
                ("mlp.router", e, d),
            ] {
                check(name(rest) + ".weight", Dtype::Bf16, &[rows, columns])?;
                check(name(rest) + ".bias", Dtype::Bf16, &[rows])?;
            }
            check(name("input_layernorm.weight"), Dtype::Bf16, &[d])?;
            check(name("post_attention_layernorm.weight"), Dtype::Bf16, &[d])?;
            check(name("self_attn.sinks"), Dtype::Bf16, &[config.num_attention_heads])?;
            for (rest, rows, columns) in [("gate_up_proj", 2 * f, d), ("down_proj", d, f)] {
                let name = |part: &str| name(&format!("mlp.experts.{rest}_{part}"));
                check(name("blocks"), Dtype::U8, &[e, rows, columns / 32, 16])?;
                check(name("scales"), Dtype::U8, &[e, rows, columns / 32])?;
                check(name("bias"), Dtype::Bf16, &[e, rows])?;
            }
        }
        checkpoint.check_all_used(&used)
    }
}
