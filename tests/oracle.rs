//! The known-answer tests hold on the twins and on every GPU variant, and each fails on a device that is wrong in the
//! way it is there to notice. And what came from outside: the trace that transformers recorded, and its script's writer.

mod plain;
mod quantised;

use crate::harness::{cpu, distance, floats, gpus};
use fourfold::Result;
use fourfold::device::{Device, Limits, cpu::Cpu};
use fourfold::oracle::{self, Subject, Which};
use fourfold::program::{BufferId, Launch, Program, Slice};
use safetensors::SafeTensors;
use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

#[test]
fn twins_and_gpus_know_the_answers() {
    let twins: (&str, Arc<dyn Device>) = ("twins", cpu());
    for (name, device) in [twins].iter().chain(gpus()) {
        let outcomes = oracle::run(device, Which::All).unwrap();
        assert_eq!(outcomes.len(), oracle::checks().len());
        for outcome in outcomes {
            assert!(outcome.passed, "{} on {name}: {}", outcome.name, outcome.detail);
            outcome.notes.iter().for_each(|note| eprintln!("{} on {name}: {note}", outcome.name));
        }
        oracle::admit(device).unwrap();
    }
}

/// Not a limit that a loaded machine must hold, but one that a check grown a hundredfold would not.
#[test]
fn quick_checks_are_quick() {
    let twins: (&str, Arc<dyn Device>) = ("twins", cpu());
    for (name, device) in [twins].iter().chain(gpus()) {
        oracle::admit(device).unwrap(); // compiles
        let times: Vec<_> = (0..5)
            .map(|_| {
                let start = Instant::now();
                oracle::admit(device).unwrap();
                start.elapsed()
            })
            .collect();
        eprintln!("quick checks on {name}: {times:?}");
        assert!(times.iter().min().unwrap().as_millis() < 500, "{name}: {times:?}");
    }
}

/// What a wrong device does to a launch, before its twin computes or after. `n` counts launches.
type Spoil = fn(&Wrong, &mut Launch, n: u32);

/// The twins, made wrong.
#[derive(Debug)]
struct Wrong {
    twins: Cpu,
    /// Labels of buffers, by id.
    labels: Mutex<HashMap<BufferId, String>>,
    /// What becomes of bytes on their way into a buffer of this label.
    write: fn(&str, &mut [u8]),
    before: Spoil,
    after: Spoil,
    launches: AtomicU32,
}

impl Wrong {
    fn device(write: fn(&str, &mut [u8]), before: Spoil, after: Spoil) -> Arc<dyn Device> {
        let (twins, labels, launches) = (Cpu::default(), Mutex::default(), AtomicU32::new(0));
        Arc::new(Self { twins, labels, write, before, after, launches })
    }

    fn slice(launch: &Launch, name: &str) -> Slice {
        launch.args.iter().find(|arg| arg.name == name).expect("the fault knows the op's slices").slice
    }

    fn words(&self, launch: &Launch, name: &str) -> Vec<u32> {
        let slice = Self::slice(launch, name);
        let mut words = vec![0u32; (slice.bytes / 4) as usize];
        self.twins.read(slice, bytemuck::cast_slice_mut(&mut words)).unwrap();
        words
    }

    fn change(&self, launch: &Launch, name: &str, change: impl FnOnce(&mut [u32])) {
        let mut words = self.words(launch, name);
        change(&mut words);
        self.twins.write(Self::slice(launch, name), bytemuck::cast_slice(&words)).unwrap();
    }

    fn change_floats(&self, launch: &Launch, name: &str, change: impl FnOnce(&mut [f32])) {
        self.change(launch, name, |words| change(bytemuck::cast_slice_mut(words)));
    }
}

impl Device for Wrong {
    fn alloc(&self, label: &str, bytes: u64) -> Result<BufferId> {
        let id = self.twins.alloc(label, bytes)?;
        self.labels.lock().unwrap().insert(id, label.to_owned());
        Ok(id)
    }
    fn free(&self, id: BufferId) {
        self.twins.free(id);
    }
    fn write(&self, to: Slice, bytes: &[u8]) -> Result<()> {
        let label = self.labels.lock().unwrap()[&to.buffer].clone();
        let mut bytes = bytes.to_vec();
        (self.write)(&label, &mut bytes);
        self.twins.write(to, &bytes)
    }
    fn read(&self, from: Slice, bytes: &mut [u8]) -> Result<()> {
        self.twins.read(from, bytes)
    }
    fn prepare(&self, program: &Program) -> Result<()> {
        self.twins.prepare(program)
    }
    fn run(&self, program: &Program) -> Result<()> {
        for launch in &program.launches {
            let n = self.launches.fetch_add(1, Ordering::Relaxed);
            let mut launch = launch.clone();
            (self.before)(self, &mut launch, n);
            let mut one = program.clone();
            one.launches = vec![launch.clone()];
            self.twins.run(&one)?;
            (self.after)(self, &mut launch, n);
        }
        Ok(())
    }
    fn wait(&self) -> Result<()> {
        self.twins.wait()
    }
    fn limits(&self) -> Limits {
        self.twins.limits()
    }
    fn describe(&self) -> String {
        "a wrong device".to_owned()
    }
}

/// A fault, and exactly the checks that notice it.
struct Fault {
    what: &'static str,
    device: Arc<dyn Device>,
    noticed: &'static [&'static str],
}

/// A fault of what is written.
fn written(what: &'static str, write: fn(&str, &mut [u8]), noticed: &'static [&'static str]) -> Fault {
    Fault { what, device: Wrong::device(write, |_, _, _| {}, |_, _, _| {}), noticed }
}

/// A fault of what is computed, from what.
fn before(what: &'static str, spoil: Spoil, noticed: &'static [&'static str]) -> Fault {
    Fault { what, device: Wrong::device(|_, _| {}, spoil, |_, _, _| {}), noticed }
}

/// A fault of what came out.
fn after(what: &'static str, spoil: Spoil, noticed: &'static [&'static str]) -> Fault {
    Fault { what, device: Wrong::device(|_, _| {}, |_, _, _| {}, spoil), noticed }
}

fn faults() -> Vec<Fault> {
    let mut faults = plain::faults();
    faults.extend(quantised::faults());
    faults
}

#[test]
fn each_wrong_device_fails_exactly_the_checks_that_are_about_it() {
    let mut able_to_fail = BTreeSet::new();
    let mut unlike = Vec::new();
    for Fault { what, device, noticed } in faults() {
        let outcomes = oracle::run(&device, Which::All).unwrap();
        let failed: BTreeSet<&str> = outcomes.iter().filter(|o| !o.passed).map(|o| o.name).collect();
        for outcome in outcomes.iter().filter(|o| !o.passed) {
            assert!(outcome.detail.contains("got "), "{what}: {}: {}", outcome.name, outcome.detail);
        }
        let want: BTreeSet<&str> = noticed.iter().copied().collect();
        if failed != want {
            unlike.push(format!("{what}: failed {failed:?}, should fail {want:?}"));
        }
        able_to_fail.extend(failed);
        // The quick checks see the same fault, if one of theirs is about it; and the engine is told what it is.
        let quick = |name: &&str| oracle::checks().iter().any(|check| check.quick && check.name == *name);
        match oracle::admit(&device) {
            Ok(()) => assert!(!want.iter().any(quick), "{what}: the quick checks let it pass"),
            Err(e) => {
                let text = e.to_string();
                assert!(text.contains("a wrong device computes wrongly"), "{text}");
                let facts = oracle::checks().iter().filter(|check| want.contains(check.name) && check.quick);
                assert!(facts.clone().count() > 0, "{what}: only the quick checks fail: {text}");
                assert!(facts.clone().any(|check| text.contains(check.fact)), "{what}: {text}");
            }
        }
    }
    assert!(unlike.is_empty(), "{}", unlike.join("\n"));
    let all: BTreeSet<&str> =
        oracle::checks().iter().filter(|check| check.subject == Subject::Device).map(|check| check.name).collect();
    assert_eq!(able_to_fail, all, "every check must be able to fail");
}

#[test]
fn what_a_device_may_do_is_noted() {
    let notes = |what: &str| -> BTreeSet<&str> {
        let fault = faults().into_iter().find(|fault| fault.what.starts_with(what)).unwrap();
        oracle::run(&fault.device, Which::All).unwrap().iter().flat_map(|o| o.notes.clone()).collect()
    };
    assert_eq!(notes("subnormal results"), BTreeSet::from(["flushes subnormal bf16 weights"]));
    assert_eq!(notes("a subnormal scale"), BTreeSet::from(["flushes subnormal block scales"]));
    assert_eq!(notes("a product is rounded"), BTreeSet::from(["multiply-add rounds twice"]));
    assert!(notes("exp rounds").contains("exp is as far off as if its argument were rounded once more"));
    assert_eq!(notes("division rounds"), BTreeSet::from(["division by a power of two is not exact"]));
    assert!(oracle::run(&cpu(), Which::All).unwrap().iter().all(|o| o.notes.is_empty()), "the twins need no excuse");
}

#[test]
fn the_command_prints_a_table_and_an_exit_code() {
    let run = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_fourfold")).arg("oracle").args(args).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    };
    let (code, out, err) = run(&["--device", "cpu"]);
    assert_eq!(code, 0, "{out}{err}");
    for check in oracle::checks() {
        let line = out.lines().find(|line| line.split_whitespace().next() == Some(check.name));
        let line = line.unwrap_or_else(|| panic!("{} is not in the table: {out}", check.name));
        assert_eq!(line.split_whitespace().nth(1), Some("ok"), "{line}");
    }
    let (code, out, _) = run(&["--device", "cpu", "--json", "--quick"]);
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    let checks = json["devices"][0]["checks"].as_array().unwrap();
    assert_eq!((code, checks.len()), (0, oracle::checks().iter().filter(|check| check.quick).count()));
    assert!(checks.iter().all(|check| check["passed"] == true), "{out}");
    let (code, _, err) = run(&["--device", "gpu", "--adapter", "no such adapter"]);
    assert_eq!(code, 1, "{err}");
    let (code, _, err) = run(&["--device", "cpu", "--adapter", "x"]);
    assert_eq!(code, 2, "{err}");
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn the_transformers_script_checks_its_writer() {
    let script = root().join("tools/trace_transformers.py");
    let Ok(output) = Command::new("python3").arg(script).arg("--self-check").output() else {
        eprintln!("SKIPPED: the writer of tools/trace_transformers.py is not checked: there is no python3");
        return;
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("self-check passed"), "{text}");
}

#[test]
fn the_recorded_trace_of_transformers_is_the_golden() {
    let read = |path: &str| std::fs::read(root().join("tests/fixtures").join(path)).unwrap();
    let recorded = read("traces/tiny_p7_transformers.safetensors");
    let golden = read("gpt_oss/tiny/golden.safetensors");
    let facts: serde_json::Value = serde_json::from_slice(&read("gpt_oss/tiny/golden.json")).unwrap();
    let (trace, golden) = (SafeTensors::deserialize(&recorded).unwrap(), SafeTensors::deserialize(&golden).unwrap());
    let (_, header) = SafeTensors::read_metadata(&recorded).unwrap();
    let metadata = header.metadata().clone().unwrap();
    for (key, want) in [("format", "fourfold-trace"), ("version", "1"), ("kind", "full"), ("dtype", "float32")] {
        assert_eq!(metadata[key], want, "{key}");
    }
    assert!(metadata["engine"].starts_with("transformers "), "{}", metadata["engine"]);
    let config = serde_json::from_slice::<serde_json::Value>(&read("gpt_oss/tiny/config.json")).unwrap();
    assert_eq!(serde_json::from_str::<serde_json::Value>(&metadata["config"]).unwrap(), config);
    let tokens: serde_json::Value = serde_json::from_str(&metadata["tokens"]).unwrap();
    assert_eq!(tokens, facts["prompts"]["p7"]["tokens"]);
    let words = |tensors: &SafeTensors<'_>, name: &str| -> Vec<u32> {
        let view = tensors.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        view.data().chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    let mut names: Vec<(String, String)> = ["embed", "final_norm", "logits"].map(|n| (n.into(), n.into())).into();
    // Of the stages that the goldens have too.
    let stages = [
        ("attn_out", "attn_out"),
        ("mlp.router.logits", "router_logits"),
        ("mlp.router.experts", "topk_index"),
        ("mlp.router.weights", "topk_weight"),
        ("mlp.out", "moe_out"),
        ("hidden", "hidden"),
    ];
    for layer in 0..4 {
        names.extend(stages.map(|(ours, theirs)| (format!("layers.{layer}.{ours}"), format!("layer{layer}.{theirs}"))));
    }
    let finer = ["attn_norm", "attention", "mlp_norm"].len() * 4;
    assert_eq!(trace.len(), names.len() + finer, "the script records these stages and no others");
    for (ours, theirs) in names {
        let shape = trace.tensor(&ours).unwrap().shape().to_vec();
        let (got, want) = (words(&trace, &ours), words(&golden, &format!("p7.{theirs}")));
        assert_eq!((shape.len(), shape[0], got.len()), (2, 7, want.len()), "{ours}: [tokens, width]");
        if ours.ends_with("experts") {
            assert_eq!(got, want, "{ours}");
        } else {
            // Another processor's BLAS sums in another order; measured 2e-6.
            let (l2, max) = distance(&floats(&got), &floats(&want));
            assert!(l2 <= 1e-5 && max <= 1e-5, "{ours}: relative L2 {l2:.1e}, max {max:.1e}");
        }
    }
}
