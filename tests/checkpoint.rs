//! Malformed checkpoints: each broken directory of the mutator gives one clear error, soon, and never a panic.

use std::fs;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fourfold::checkpoint::Mapping;
use fourfold::{DeviceChoice, Engine, Error};

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

/// What a file claims must not be what is allocated: the program, confined to 512 MiB of address space, still gives the
/// same clear errors. Its own code, the embedded model and the mapped checkpoint are in that.
#[cfg(target_os = "linux")]
#[test]
fn broken_checkpoints_do_not_take_the_memory_they_claim() {
    let cases = mutator::cases(&scratch("confined"));
    let mut n_run = 0;
    for case in cases.iter().step_by(3) {
        let program = env!("CARGO_BIN_EXE_fourfold");
        let script = "ulimit -v 524288; exec \"$0\" run --raw x --device cpu --model \"$1\"";
        let output =
            std::process::Command::new("sh").args(["-c", script, program]).arg(&case.dir).output().expect("sh starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{}: {said}", case.name);
        let lacks = case.expect.iter().find(|word| !said.contains(**word));
        assert!(lacks.is_none() && said.trim().lines().count() == 1, "{}: {lacks:?} in {said:?}", case.name);
        n_run += 1;
    }
    assert!(n_run >= 60, "{n_run}");
    scratch("confined");
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
    let engine = Engine::builder().checkpoint(dir).mapping(mapping).device(DeviceChoice::Cpu).context(64);
    engine.build()?.session().map(|_| ())
}

/// Tokenizers and templates that cannot work beside weights that can.
#[test]
fn broken_tokenizers_and_templates_give_one_clear_error() {
    let folder = mutator::copy_fixture("tiny", &scratch("text"));
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/fireside");
    let whole = fs::read(model.join("tokenizer.json")).unwrap();
    let text = String::from_utf8(whole.clone()).unwrap();
    let tokenizer = "tokenizer.json";
    let template = "chat_template.jinja";
    let cases: Vec<(&str, &str, Vec<u8>, &str)> = vec![
        ("empty", tokenizer, Vec::new(), tokenizer),
        ("no object", tokenizer, b"[1, 2]".to_vec(), tokenizer),
        ("no model", tokenizer, b"{}".to_vec(), tokenizer),
        ("half", tokenizer, whole[..whole.len() / 2].to_vec(), tokenizer),
        ("not UTF-8", tokenizer, [&whole[..100], &[0xff, 0xfe][..], &whole[100..]].concat(), tokenizer),
        ("unknown model", tokenizer, text.replace("\"BPE\"", "\"XYZ\"").into_bytes(), tokenizer),
        ("more tokens than the model", tokenizer, whole.clone(), "has a token 4095, but the model has only 512"),
        ("syntax", template, b"{% for m in messages %}{{ m.content }}".to_vec(), template),
        ("unknown filter syntax", template, b"{{ messages | }}".to_vec(), template),
        ("not UTF-8", template, vec![b'a', 0xff], template),
        ("too long", template, vec![b'a'; 2 << 20], template),
    ];
    for (name, file, bytes, expect) in cases {
        folder.write(file, &bytes);
        for mapping in MAPPINGS {
            let message = attempt(&folder.0, mapping).unwrap_or_else(|fault| panic!("{file}, {name}: {fault}"));
            let message = message.unwrap_or_else(|| panic!("{file}, {name}: loaded as if nothing were wrong"));
            assert!(message.contains(expect), "{file}, {name}: {message}");
        }
        fs::remove_file(folder.0.join(file)).unwrap();
    }
    load(&folder.0, Mapping::Mmap).unwrap();
}
