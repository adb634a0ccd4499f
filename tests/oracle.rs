//! The known-answer tests hold on the twins and on every GPU variant, and each fails on a device that is wrong in the
//! way it is there to notice. And what came from outside: the trace that transformers recorded, and its script's writer.

use crate::harness::{cpu, distance, floats, gpus};
use fourfold::Result;
use fourfold::device::{Device, Limits, cpu::Cpu};
use fourfold::ops::{CacheFormat, Gate, Op};
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

const fn is_subnormal(bits: u32) -> bool {
    bits & 0x7f80_0000 == 0 && bits << 1 != 0
}

fn faults() -> Vec<Fault> {
    vec![
        written(
            "nibbles swapped",
            |label, bytes| {
                if label == "oracle mxfp4 codes" {
                    bytes.iter_mut().for_each(|b| *b = b.rotate_left(4));
                }
            },
            &["element_order", "codes_and_scales", "swiglu"],
        ),
        written(
            "bytes of a word swapped",
            |label, bytes| {
                if label == "oracle mxfp4 codes" {
                    bytes.chunks_exact_mut(4).for_each(|word| word.reverse());
                }
            },
            &["element_order", "codes_and_scales", "swiglu"],
        ),
        written(
            "the scale's exponent is off by one",
            |label, bytes| {
                if label == "oracle mxfp4 scales" {
                    bytes.iter_mut().for_each(|b| *b = b.wrapping_add(1));
                }
            },
            &[
                "uniform_fp4",
                "column_dependent",
                "element_order",
                "codes_and_scales",
                "smallest_normal",
                "reduction_tree",
                "swiglu",
                "experts",
            ],
        ),
        written(
            "scales shifted by one block",
            |label, bytes| {
                // Not the padded word that a buffer may end with.
                if label == "oracle mxfp4 scales" && bytes.len() > 4 {
                    bytes.rotate_right(1);
                }
            },
            &["column_dependent", "element_order", "codes_and_scales", "smallest_normal", "reduction_tree", "experts"],
        ),
        written(
            "one code of sixteen decodes as another",
            |label, bytes| {
                if label == "oracle mxfp4 codes" {
                    bytes.iter_mut().filter(|b| **b & 15 == 13).for_each(|b| *b = *b & 0xf0 | 12);
                }
            },
            &["column_dependent", "codes_and_scales"],
        ),
        written(
            "halves of a bf16 word swapped",
            |label, bytes| {
                if label == "oracle bf16 codes" {
                    bytes.chunks_exact_mut(4).for_each(|word| word.rotate_left(2));
                }
            },
            &["bf16_embed", "bf16_linear", "integer_sums", "fused_multiply_add"],
        ),
        written(
            "the sign of zero is lost in bf16",
            |label, bytes| {
                if label == "oracle bf16 codes" {
                    let bits = bytes.chunks_exact_mut(2).filter(|b| b[0] == 0 && b[1] == 0x80);
                    bits.for_each(|b| b[1] = 0);
                }
            },
            &["bf16_embed"],
        ),
        after(
            "results below 2^-125 are flushed",
            |device, launch, _| {
                if let Op::Linear(_) = launch.op {
                    let flush = |v: &mut f32| *v = if v.abs() < 2.0 * f32::MIN_POSITIVE { 0.0 } else { *v };
                    device.change_floats(launch, "y", |y| y.iter_mut().for_each(flush));
                }
            },
            &["smallest_normal", "bf16_linear"],
        ),
        after(
            "subnormal results are flushed, which is allowed",
            |device, launch, _| {
                if matches!(launch.op, Op::Linear(_) | Op::Embed(_)) {
                    let name = if matches!(launch.op, Op::Embed(_)) { "x" } else { "y" };
                    let flush = |w: &mut u32| *w = if is_subnormal(*w) { 0 } else { *w };
                    device.change(launch, name, |y| y.iter_mut().for_each(flush));
                }
            },
            &[],
        ),
        written(
            "a subnormal scale is flushed, which is allowed",
            |label, bytes| {
                // Nothing is zero in E8M0, so the block's codes become zero instead: rows of 8 blocks of 16 bytes.
                if label == "oracle mxfp4 codes" && bytes.len() == 32 * 128 && bytes[..8] == bytes[16..24] {
                    let ascending = [0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe];
                    if bytes[..8] == ascending {
                        bytes[..16].fill(0);
                    }
                }
            },
            &[],
        ),
        before(
            "one lane of eight is left out of a sum",
            |device, launch, _| {
                if let Op::Linear(op) = launch.op {
                    let k = op.k as usize;
                    device.change_floats(launch, "x", |x| {
                        x.iter_mut().enumerate().filter(|(i, _)| i % k / 8 % 8 == 7).for_each(|(_, x)| *x = 0.0);
                    });
                }
            },
            &[
                "uniform_fp4",
                "column_dependent",
                "element_order",
                "codes_and_scales",
                "smallest_normal",
                "reduction_tree",
                "integer_sums",
            ],
        ),
        after(
            "neighbouring rows of a matrix are mixed up",
            |device, launch, _| {
                if let Op::Linear(op) = launch.op {
                    let n = op.n as usize;
                    device.change(launch, "y", |y| y.chunks_exact_mut(n).for_each(|row| row.swap(2, 3)));
                }
            },
            &[
                "column_dependent",
                "element_order",
                "codes_and_scales",
                "smallest_normal",
                "reduction_tree",
                "bf16_linear",
                "integer_sums",
            ],
        ),
        after(
            "sums are off by one unit of the last place",
            |device, launch, _| {
                if let Op::Linear(_) = launch.op {
                    let off = |v: &mut f32| *v = if *v == 0.0 { 0.0 } else { v.next_up() };
                    device.change_floats(launch, "y", |y| y.iter_mut().for_each(off));
                }
            },
            &[
                "uniform_fp4",
                "column_dependent",
                "element_order",
                "codes_and_scales",
                "smallest_normal",
                "reduction_tree",
                "bf16_linear",
                "integer_sums",
                "fused_multiply_add",
            ],
        ),
        after(
            "a product is rounded before it is added, which is allowed",
            |device, launch, _| {
                if let Op::Linear(_) = launch.op {
                    let lose = |v: &mut f32| *v = if *v == 2f32.powi(-30) { 0.0 } else { *v };
                    device.change_floats(launch, "y", |y| y.iter_mut().for_each(lose));
                }
            },
            &["bf16_linear"], // which has a weight of 2^-30
        ),
        before(
            "ties go to the higher expert",
            |device, launch, _| {
                if let Op::Router(op) = launch.op {
                    device.change_floats(launch, "scores", |s| {
                        s.chunks_exact_mut(op.e as usize).for_each(<[f32]>::reverse)
                    });
                }
            },
            &["router_ties"],
        ),
        after(
            "exp is off by ten units of the last place",
            |device, launch, _| {
                if let Op::Router(_) = launch.op {
                    let off = |w: &mut u32| *w += if *w == 0.25f32.to_bits() || *w == 0 { 0 } else { 10 };
                    device.change(launch, "weights", |w| w.iter_mut().for_each(off));
                }
            },
            &["exp"],
        ),
        after(
            "exp rounds its argument, which is allowed",
            |device, launch, _| {
                if let Op::Router(_) = launch.op {
                    let off = |w: &mut f32| *w = if *w == 0.0 { 0.0 } else { *w * (1.0 - w.ln() * 2f32.powi(-25)) };
                    device.change_floats(launch, "weights", |w| w.iter_mut().for_each(off));
                }
            },
            &[],
        ),
        after(
            "division rounds, which is allowed",
            |device, launch, _| match launch.op {
                Op::Router(_) => {
                    device.change(launch, "weights", |w| w.iter_mut().filter(|w| **w != 0).for_each(|w| *w += 1))
                }
                Op::Attention(_) => device.change(launch, "a", |a| {
                    a.iter_mut().filter(|a| **a << 1 != 0).for_each(|a| *a += 1);
                }),
                _ => {}
            },
            &[],
        ),
        before(
            "the factor inside the sigmoid is 1.7",
            |_, launch, _| {
                if let Op::MoeUp(op) = &mut launch.op {
                    op.gate = Gate::Clamped { limit: 7.0, alpha: 1.7 };
                }
            },
            &["swiglu"],
        ),
        before(
            "gate and up are not clamped",
            |_, launch, _| {
                if let Op::MoeUp(op) = &mut launch.op {
                    op.gate = Gate::Clamped { limit: 1e30, alpha: 1.702 };
                }
            },
            &["swiglu"],
        ),
        before(
            "another expert computes",
            |device, launch, _| {
                if let Op::MoeUp(_) | Op::MoeDown(_) = launch.op {
                    device.change(launch, "experts", |e| e.iter_mut().for_each(|e| *e = if *e == 1 { 0 } else { *e }));
                }
            },
            &["swiglu", "experts"],
        ),
        after(
            "NaN becomes the limit",
            |device, launch, _| {
                if let Op::MoeUp(_) = launch.op {
                    device.change_floats(launch, "y", |y| y.iter_mut().filter(|y| y.is_nan()).for_each(|y| *y = 7.0));
                }
            },
            &["nan_stays"],
        ),
        before(
            "routing weights are taken in the wrong order",
            |device, launch, _| {
                if let Op::MoeScatter(op) = launch.op {
                    let a = op.a as usize;
                    device.change(launch, "weights", |w| w.chunks_exact_mut(a).for_each(|w| w.swap(0, 1)));
                }
            },
            &["scatter"],
        ),
        before(
            "the sink is dropped",
            |device, launch, _| {
                if let Op::Attention(_) = launch.op {
                    device.change(launch, "sinks", |s| s.fill(0xff7f_ff7f));
                }
            },
            &["attention_one_key"],
        ),
        before(
            "the first of several keys is missed",
            |_, launch, _| {
                if let Op::Attention(op) = &mut launch.op
                    && op.window == 0
                {
                    op.window = 127;
                }
            },
            &["attention_mean"],
        ),
        before(
            "the window is one key too wide",
            |_, launch, _| {
                if let Op::Attention(op) = &mut launch.op {
                    op.window += u32::from(op.window > 0);
                }
            },
            &["attention_window"],
        ),
        before(
            "the window is one key too narrow",
            |_, launch, _| {
                if let Op::Attention(op) = &mut launch.op {
                    op.window -= u32::from(op.window > 0);
                }
            },
            &["attention_window"],
        ),
        before(
            "rotation goes the other way",
            |device, launch, _| {
                if let Op::Rope(_) = launch.op {
                    let back = |pair: &mut [f32]| pair[1] = -pair[1];
                    device.change_floats(launch, "table", |t| t.chunks_exact_mut(2).for_each(back));
                }
            },
            &["rope_quarter_turns"],
        ),
        before(
            "bf16 is cut off and not rounded",
            |device, launch, _| {
                if let Op::Rope(op) = launch.op
                    && op.format == CacheFormat::Bf16
                {
                    device.change(launch, "qkv", |v| v.iter_mut().for_each(|v| *v &= 0xffff_0000));
                }
            },
            &["bf16_rounding"],
        ),
        before(
            "bf16 ties go up",
            |device, launch, _| {
                if let Op::Rope(op) = launch.op
                    && op.format == CacheFormat::Bf16
                {
                    let nudge = |v: &mut u32| *v |= u32::from(*v & 0xffff == 0x8000);
                    device.change(launch, "qkv", |v| v.iter_mut().for_each(nudge));
                }
            },
            &["bf16_rounding"],
        ),
        before(
            "the mean of squares misses an element",
            |device, launch, _| {
                if let Op::RmsNorm(op) = launch.op
                    && op.eps == 0.0
                {
                    let d = op.d as usize;
                    device.change_floats(launch, "x", |x| x.chunks_exact_mut(d).for_each(|x| x[d - 1] = 0.0));
                }
            },
            &["rms_norm"],
        ),
        before(
            "rows are picked one too early",
            |device, launch, _| {
                if let Op::Take(_) = launch.op {
                    device.change(launch, "picks", |p| p.iter_mut().for_each(|p| *p = p.saturating_sub(1)));
                }
            },
            &["add_and_take"],
        ),
        after(
            "every other run is off by a unit of the last place",
            |device, launch, n| {
                // The block's own: six launches a run, and one more counted here, so that every other n is even.
                if let Op::MoeScatter(op) = launch.op
                    && op.a == 2
                {
                    device.launches.fetch_add(1, Ordering::Relaxed);
                    let off = |y: &mut u32| *y ^= u32::from(n.is_multiple_of(2) && *y << 1 != 0);
                    device.change(launch, "y", |y| y.iter_mut().for_each(off));
                }
            },
            &["determinism", "stale_scratch"],
        ),
        before(
            "sums begin with what stood in the output",
            |device, launch, _| {
                if let Op::MoeScatter(_) = launch.op {
                    // 0 NaN is NaN.
                    let stale = device.words(launch, "y");
                    device.change_floats(launch, "weights", |w| w[0] += f32::from_bits(stale[0]) * 0.0);
                }
            },
            &["scatter", "stale_scratch"],
        ),
    ]
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
