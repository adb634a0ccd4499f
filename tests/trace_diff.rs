//! Traces: their file, and what `fourfold diff` finds between two. The goldens of the tiny checkpoint are the foreign
//! trace: transformers wrote them, names and all.

use crate::models::fixture;
use fourfold::checkpoint::{Checkpoint, Mapping};
use fourfold::trace::compare::{Comparison, Options, Outcome, Tolerances, compare, weights};
use fourfold::trace::file::{Element, IfThere, StepStats, TraceFile, TraceWriter, Values};
use fourfold::trace::report;
use fourfold::{DeviceChoice, Engine, Want};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};

/// A directory of one test, removed when it ends.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("fourfold-diff-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn tokens(prompt: &str) -> Vec<u32> {
    let facts: serde_json::Value =
        serde_json::from_slice(&std::fs::read(fixture("tiny").join("golden.json")).unwrap()).unwrap();
    let ids = facts["prompts"][prompt]["tokens"].as_array().unwrap();
    ids.iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// A trace of a checkpoint on the twins, with every stage that there is, fed in chunks.
fn record(dir: &Path, prompt: &str, chunk: usize) -> TraceWriter {
    let engine = Engine::builder().checkpoint(dir).device(DeviceChoice::Cpu).chunk(chunk).build().unwrap();
    let config = std::fs::read_to_string(dir.join("config.json")).unwrap();
    let ids = tokens(prompt);
    let facts = [("engine", "tests".to_owned()), ("config", config), ("tokens", format!("{ids:?}"))];
    let mut writer = TraceWriter::new(facts.map(|(key, value)| (key.to_owned(), value)));
    let mut see = |name: &str, width: usize, words: Vec<u32>| {
        let element = if name.ends_with(".experts") { Element::I32 } else { Element::F32 };
        writer.push(name, words.len() / width, width, element, &words);
        Ok(())
    };
    engine.session().unwrap().feed_seeing(&ids, Want::All, Some(&mut see)).unwrap();
    writer
}

/// The trace of a prompt by the tiny checkpoint, in a file.
fn ours(scratch: &Scratch, prompt: &str) -> PathBuf {
    let path = scratch.file(&format!("{prompt}.safetensors"));
    record(&fixture("tiny"), prompt, 16).write(&path, IfThere::Replace).unwrap();
    path
}

fn golden() -> PathBuf {
    fixture("tiny").join("golden.safetensors")
}

fn compared(a: &Path, b: &Path) -> Comparison {
    compare(&TraceFile::open(a).unwrap(), &TraceFile::open(b).unwrap(), &Options::default()).unwrap()
}

fn diff(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fourfold")).arg("diff").args(args).env_remove("RUST_LOG").output().unwrap()
}

fn out(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The tiny checkpoint with the byte at `at` of a tensor changed.
fn flipped(scratch: &Scratch, tensor: &str, at: usize, change: u8) -> PathBuf {
    let dir = scratch.file("checkpoint");
    std::fs::create_dir_all(&dir).unwrap();
    let mut found = false;
    for entry in std::fs::read_dir(fixture("tiny")).unwrap() {
        let entry = entry.unwrap();
        let mut bytes = std::fs::read(entry.path()).unwrap();
        if entry.file_name().to_str().unwrap().starts_with("model-") {
            let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let data = tensors.tensor(tensor).ok().map(|t| t.data().as_ptr() as usize - bytes.as_ptr() as usize);
            if let Some(data) = data {
                bytes[data + at] ^= change;
                found = true;
            }
        }
        std::fs::write(dir.join(entry.file_name()), bytes).unwrap();
    }
    assert!(found, "{tensor} is in no shard");
    dir
}

#[test]
fn a_trace_of_the_twins_agrees_with_transformers() {
    let scratch = Scratch::new();
    for prompt in ["p7", "p33"] {
        let ours = ours(&scratch, prompt);
        let prefix = format!("{prompt}.");
        let (a, b) = (TraceFile::open(&ours).unwrap(), TraceFile::open_part(&golden(), &prefix).unwrap());
        let comparison = compare(&a, &b, &Options::default()).unwrap();
        assert_eq!((comparison.outcome, comparison.first), (Outcome::Agrees, None), "{}", comparison.verdict);
        // embed, final_norm, logits, and six stages of each of four layers; what is finer is ours only.
        assert_eq!(comparison.stages.len(), 3 + 4 * 6, "{:?}", comparison.stages);
        assert_eq!(comparison.only_a.len(), 4 * 6);
        // The golden's logits of its greedy run belong to no stage of ours.
        let foreign: &[&str] = if prompt == "p7" { &["greedy_logits"] } else { &[] };
        assert_eq!(comparison.only_b, foreign);

        let output = diff(&[text(&ours), text(&golden()), "--prefix-b", &prefix]);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert!(out(&output).starts_with("A agrees with B in 27 stages"), "{}", out(&output));
        // A tolerance below f32's own noise is not met.
        let output = diff(&[text(&ours), text(&golden()), "--prefix-b", &prefix, "--tolerance", "1e-9"]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(out(&output).starts_with("A differs from B first at layers.0.attn_out"), "{}", out(&output));
    }
}

#[test]
fn a_trace_that_transformers_recorded_agrees_too() {
    // `tools/trace_transformers.py` wrote it: the finer stages that hooks can see are in it.
    let theirs = fixture("tiny").join("../../traces/tiny_p7_transformers.safetensors");
    let scratch = Scratch::new();
    let comparison = compared(&ours(&scratch, "p7"), &theirs);
    assert_eq!(comparison.outcome, Outcome::Agrees, "{}", comparison.verdict);
    assert!(comparison.stages.len() >= 39 && comparison.only_b.is_empty(), "{:?}", comparison.only_b);
}

#[test]
fn chunks_make_no_difference() {
    let scratch = Scratch::new();
    let chunked = scratch.file("chunked.safetensors");
    record(&fixture("tiny"), "p33", 5).write(&chunked, IfThere::Fail).unwrap();
    let comparison = compared(&chunked, &ours(&scratch, "p33"));
    assert_eq!(comparison.verdict, "A equals B in 51 stages");
}

#[test]
fn a_flipped_weight_byte_is_named() {
    // Of layer 2: expert and row that the byte belongs to, chosen among experts that p33 routes to.
    let (blocks, rows_up, rows_down) = (4, 256, 128);
    let (expert, row, block, byte) = (3, 34, 2, 5);
    for (tensor, at, change, stage, output, follows, words) in [
        (
            "gate_up_proj_blocks",
            ((expert * rows_up + row) * blocks + block) * 16 + byte,
            0x04,
            "mlp.up",
            17,
            "",
            "expert 3, row 34 (gate of output 17), block 2, byte 5 (columns 74, 75)",
        ),
        (
            "gate_up_proj_scales",
            (expert * rows_up + row + 1) * blocks + block,
            0x02,
            "mlp.up",
            17,
            "",
            "expert 3, row 35 (up of output 17), block 2, scale ",
        ),
        (
            "down_proj_blocks",
            ((expert * rows_down + row) * blocks + block) * 16 + byte,
            0x40,
            "mlp.down",
            34,
            "follows input column 75, ",
            "expert 3, row 34, block 2, byte 5 (columns 74, 75)",
        ),
        (
            "down_proj_bias",
            (expert * rows_down + row) * 2 + 1,
            0x01,
            "mlp.down",
            34,
            "for each of them: a bias",
            "expert 3, row 34, ",
        ),
    ] {
        let scratch = Scratch::new();
        let name = format!("model.layers.2.mlp.experts.{tensor}");
        let broken = flipped(&scratch, &name, at, change);
        let (a, b) = (scratch.file("broken.safetensors"), ours(&scratch, "p33"));
        record(&broken, "p33", 16).write(&a, IfThere::Fail).unwrap();
        let comparison = compared(&a, &b);
        let first = comparison.first_stage().unwrap();
        assert_eq!(first.name, format!("layers.2.{stage}"), "{tensor}: {}", comparison.verdict);
        let spread = first.spread.as_ref().unwrap();
        assert_eq!((&spread.experts[..], &spread.outputs[..]), (&[3][..], &[output][..]), "{tensor}: {}", spread.what);
        let worst = first.worst.as_ref().unwrap();
        assert_eq!((worst.expert, worst.output), (Some(3), output), "{tensor}");
        let only = format!("every token routed to expert 3: row {output} only (27 tokens)");
        assert!(
            spread.what.contains(&only) && spread.what.contains("all else in the stage is equal"),
            "{}",
            spread.what
        );
        // What is linear in its inputs tells the weight's column from the traces alone.
        assert!(spread.what.contains(follows), "{tensor}: {}", spread.what);

        // With both checkpoints the byte itself.
        let output = diff(&[text(&a), text(&b), "--checkpoints", text(&broken), text(&fixture("tiny"))]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let one = format!("  {name}: 1 of ");
        assert!(out(&output).contains(&one) && out(&output).contains(words), "{tensor}: {}", out(&output));
    }
}

#[test]
fn a_flipped_byte_outside_experts_is_named() {
    let scratch = Scratch::new();
    // Row 37 of k_proj, column 9, of layer 1: row 8 × 32 + 37 of q, k, v; head 1, dimension 5 of the keys.
    let broken = flipped(&scratch, "model.layers.1.self_attn.k_proj.weight", (37 * 128 + 9) * 2 + 1, 0x01);
    let (a, b) = (scratch.file("broken.safetensors"), ours(&scratch, "p33"));
    record(&broken, "p33", 16).write(&a, IfThere::Fail).unwrap();
    let comparison = compared(&a, &b);
    let first = comparison.first_stage().unwrap();
    assert_eq!(first.name, "layers.1.qkv");
    let worst = first.worst.as_ref().unwrap();
    assert_eq!(worst.what, "key head 1, dimension 5 (row 293 of q, k, v)");
    let spread = first.spread.as_ref().unwrap();
    assert_eq!(spread.outputs, [293]);
    assert!(spread.what.starts_with("every token (33): column 293 only"), "{}", spread.what);
    assert!(spread.what.contains("follows input column 9, "), "{}", spread.what);
    let [x, y] = [&broken, &fixture("tiny")].map(|dir| Checkpoint::open(dir, Mapping::Read).unwrap());
    let names = weights::tensors_of(&first.name, comparison.last_agreeing(), 4);
    let found = weights::differences(&x, &y, &names);
    assert_eq!(found.len(), 1);
    assert!(found[0].places[0].what.starts_with("row 37, column 9: "), "{:?}", found[0]);
    // From the golden, which has no such stage, it is the next one that differs; the bytes are found all the same.
    let golden = [text(&a), &*text(&golden()).to_owned(), "--prefix-b", "p33.", "--checkpoints", text(&broken)]
        .map(str::to_owned);
    let tiny = fixture("tiny");
    let args: Vec<&str> = golden.iter().map(String::as_str).chain([text(&tiny)]).collect();
    let output = diff(&args);
    assert!(out(&output).starts_with("A differs from B first at layers.1.attn_out"), "{}", out(&output));
    assert!(out(&output).contains("k_proj.weight: 1 of") && out(&output).contains("row 37, column 9"), "{output:?}");
}

/// The stages of a small made-up trace.
type Stages<'a> = &'a [(&'a str, [usize; 2], Vec<f32>)];

fn write(path: &Path, facts: &[(&str, &str)], stages: Stages) {
    let facts = facts.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    let mut writer = TraceWriter::new(facts);
    for (name, [rows, width], values) in stages {
        let words: Vec<u32> = values.iter().map(|v| v.to_bits()).collect();
        writer.push(name, *rows, *width, Element::F32, &words);
    }
    writer.write(path, IfThere::Replace).unwrap();
}

fn uneven(n: usize) -> Vec<f32> {
    crate::harness::Random(n as u64).f32s(n)
}

#[test]
fn one_corrupted_element_is_noticed_wherever_it_is() {
    let scratch = Scratch::new();
    let (a, b) = (scratch.file("a.safetensors"), scratch.file("b.safetensors"));
    let good = uneven(4000);
    write(&b, &[], &[("embed", [4, 1000], good.clone()), ("logits", [4, 1000], good.clone())]);
    for at in [0, 1999, 3999] {
        for (change, is_seen) in [(f32::NAN, true), (f32::INFINITY, true), (0.02, true), (1e-6, false)] {
            let mut bad = good.clone();
            bad[at] += change;
            write(&a, &[], &[("embed", [4, 1000], good.clone()), ("logits", [4, 1000], bad)]);
            let comparison = compared(&a, &b);
            assert_eq!(comparison.outcome == Outcome::Differs, is_seen, "{at} {change}: {}", comparison.verdict);
            if is_seen {
                let first = comparison.first_stage().unwrap();
                let worst = first.worst.as_ref().unwrap();
                assert_eq!((first.name.as_str(), worst.position * 1000 + worst.column), ("logits", at));
                assert!(comparison.verdict.contains(&format!("token {}, token id {}", at / 1000, at % 1000)));
            }
        }
    }
    // NaN on both sides is no agreement either.
    write(&b, &[], &[("embed", [1, 2], vec![1.0, f32::NAN])]);
    let comparison = compared(&b, &b);
    assert_eq!(comparison.outcome, Outcome::Differs, "{}", comparison.verdict);
    assert_eq!(comparison.stages[0].columns.as_ref().unwrap()[0].n_nan, 1);
}

#[test]
fn tolerances_follow_the_dtype_and_the_user() {
    let scratch = Scratch::new();
    let (a, b) = (scratch.file("a.safetensors"), scratch.file("b.safetensors"));
    let good = uneven(1000);
    let off: Vec<f32> = good.iter().map(|v| v * 1.01).collect();
    write(&b, &[], &[("embed", [4, 250], good)]);
    write(&a, &[], &[("embed", [4, 250], off.clone())]);
    assert_eq!(compared(&a, &b).outcome, Outcome::Differs);
    let names = [text(&a), text(&b)];
    let code = |flags: &[&str]| diff(&[&names, flags].concat()).status.code();
    assert_eq!(code(&["--tolerance", "0.02"]), Some(0));
    assert_eq!(code(&["--tolerance", "emb*=0.02"]), Some(0));
    assert_eq!(code(&["--tolerance", "0.02", "--tolerance", "embed=0.001"]), Some(1));
    write(&a, &[("dtype", "torch.bfloat16")], &[("embed", [4, 250], off)]);
    assert_eq!(compared(&a, &b).stages[0].tolerance, Tolerances::HALF);
    assert_eq!(code(&[]), Some(0));
}

#[test]
fn rows_are_aligned_by_position() {
    let scratch = Scratch::new();
    let (some, all) = (scratch.file("some.safetensors"), scratch.file("all.safetensors"));
    let values = uneven(50);
    let pick =
        |rows: &[usize]| rows.iter().flat_map(|r| &values[r * 10..][..10]).map(|v| v.to_bits()).collect::<Vec<_>>();
    let facts = || [("tokens".to_owned(), "[9, 8, 7, 6, 5]".to_owned())];
    let mut writer = TraceWriter::new(facts());
    writer.push("embed", 2, 10, Element::F32, &pick(&[3, 1]));
    writer.push_positions(&[3, 1]);
    // Logits of the last token only, as a run that generates has them.
    writer.push("logits", 1, 10, Element::F32, &pick(&[1]));
    writer.write(&some, IfThere::Fail).unwrap();
    let mut writer = TraceWriter::new(facts());
    writer.push("embed", 5, 10, Element::F32, &pick(&[0, 1, 2, 3, 4]));
    writer.push("logits", 5, 10, Element::F32, &pick(&[0, 1, 2, 3, 4]));
    writer.write(&all, IfThere::Fail).unwrap();
    let comparison = compared(&some, &all);
    assert_eq!(comparison.verdict, "A equals B in 2 stages");
    assert_eq!(comparison.stages[0].positions, [3, 1]);
    assert_eq!(comparison.stages[1].positions, [1]);
    // The runs must have been fed the same tokens, as far as they are compared.
    let mut writer = TraceWriter::new([("tokens".to_owned(), "[9, 8, 7, 0]".to_owned())]);
    writer.push("embed", 4, 10, Element::F32, &pick(&[0, 1, 2, 3]));
    writer.write(&some, IfThere::Replace).unwrap();
    let output = diff(&[text(&some), text(&all)]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("the shapes differ"), "{output:?}");
    let mut writer = TraceWriter::new([("tokens".to_owned(), "[9, 8, 7, 0, 5]".to_owned())]);
    writer.push("embed", 5, 10, Element::F32, &pick(&[0, 1, 2, 3, 4]));
    writer.write(&some, IfThere::Replace).unwrap();
    let verdict = compared(&some, &all).verdict;
    assert!(verdict.contains("fed other tokens: at position 3 A has 0, B 6"), "{verdict}");
}

#[test]
fn routes_are_compared_as_sets_and_their_order_is_told() {
    let scratch = Scratch::new();
    let (a, b) = (scratch.file("a.safetensors"), scratch.file("b.safetensors"));
    let (good, experts) = (uneven(24), "layers.0.mlp.router.experts");
    let routed = |path: &Path, routes: [u32; 6], up: &[f32]| {
        let mut writer = TraceWriter::new([]);
        let scores: Vec<u32> = [0.1f32, 0.5, 0.9, 0.3, 0.9001].repeat(3).iter().map(|v| v.to_bits()).collect();
        writer.push("layers.0.mlp.router.logits", 3, 5, Element::F32, &scores);
        writer.push(experts, 3, 2, Element::I32, &routes);
        let up: Vec<u32> = up.iter().map(|v| v.to_bits()).collect();
        writer.push("layers.0.mlp.up", 3, 8, Element::F32, &up);
        writer.write(path, IfThere::Replace).unwrap();
    };
    routed(&b, [4, 2, 1, 2, 2, 3], &good);
    // Token 0 has its experts, and so its parts, the other way round.
    let turned = [&good[4..8], &good[..4], &good[8..]].concat();
    routed(&a, [2, 4, 1, 2, 2, 3], &turned);
    let comparison = compared(&a, &b);
    assert_eq!(comparison.outcome, Outcome::Agrees, "{}", comparison.verdict);
    let notes: Vec<_> = comparison.stages.iter().filter_map(|stage| stage.note.as_deref()).collect();
    assert_eq!(
        notes,
        ["the same experts, in another order for 1 token", "1 token in another order of experts; compared by expert"]
    );
    routed(&a, [4, 2, 1, 4, 2, 3], &good);
    let comparison = compared(&a, &b);
    let first = comparison.first_stage().unwrap();
    assert_eq!(first.name, experts);
    let note = first.note.as_deref().unwrap();
    assert!(note.starts_with("other experts for 1 of 3 tokens, first token 1: A [1, 4], B [1, 2]"), "{note}");
    assert!(note.contains("the logits of experts 4 and 2 are 1.0002e-4 apart"), "{note}");
}

#[test]
fn what_is_missing_or_of_another_shape_is_said() {
    let scratch = Scratch::new();
    let (a, b) = (scratch.file("a.safetensors"), scratch.file("b.safetensors"));
    write(&a, &[], &[("embed", [2, 4], uneven(8)), ("logits", [2, 6], uneven(12)), ("final_norm", [2, 4], uneven(8))]);
    write(&b, &[], &[("embed", [2, 4], uneven(8)), ("logits", [2, 4], uneven(8)), ("layers.0.qkv", [2, 4], uneven(8))]);
    let output = diff(&[text(&a), text(&b)]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(err.contains("at logits: the shapes differ: A [2, 6], B [2, 4]"), "{err}");
    assert!(out(&output).contains("only in A: 1 stages (final_norm)"), "{}", out(&output));
    assert!(out(&output).contains("only in B: 1 stages (layers.0.qkv)"), "{}", out(&output));
    let output = diff(&[text(&a), text(&b), "--stage", "embed"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let nothing = diff(&[text(&a), text(&b), "--stage", "layers.*"]);
    assert_eq!(nothing.status.code(), Some(2));
    let err = String::from_utf8_lossy(&nothing.stderr).into_owned();
    assert!(err.contains("no stage among those asked for is in both") && err.contains("embed"), "{err}");
    for flags in [&["--layers", "3-1"][..], &["--tolerance", "x"], &["--checkpoints", "one"]] {
        assert_eq!(diff(&[&[text(&a), text(&b)], flags].concat()).status.code(), Some(2), "{flags:?}");
    }
}

#[test]
fn files_that_are_no_traces_are_refused_in_words() {
    let scratch = Scratch::new();
    let good = scratch.file("good.safetensors");
    write(&good, &[("tokens", "[1, 2]")], &[("embed", [2, 4], uneven(8))]);
    let bytes = std::fs::read(&good).unwrap();
    let made = |json: &str, data: usize| {
        let mut file = (json.len() as u64).to_le_bytes().to_vec();
        file.extend(json.as_bytes());
        file.resize(file.len() + data, 0);
        file
    };
    let text_of = String::from_utf8_lossy(&bytes[8..]).into_owned();
    let header = &text_of[..text_of.rfind('}').unwrap() + 1];
    let changed = |from: &str, to: &str| {
        assert!(header.contains(from), "{from} in {header}");
        made(&header.replace(from, to), 32)
    };
    let embed = |dtype: &str, shape: &str, bytes: usize| {
        format!(r#"{{"embed":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{bytes}]}}}}"#)
    };
    for (name, content, words) in [
        ("empty", Vec::new(), "is empty"),
        ("short", bytes[..5].to_vec(), "truncated"),
        ("header cut", bytes[..40].to_vec(), "is truncated"),
        ("data cut", bytes[..bytes.len() - 1].to_vec(), "is truncated"),
        ("too long", [&bytes[..], &[0]].concat(), "belong to no tensor"),
        ("a picture", b"\x89PNG\r\n\x1a\n0123456789".to_vec(), "is not a safetensors file"),
        (
            "another version",
            changed(r#""version":"1""#, r#""version":"2""#),
            "version 2, and this program reads version 1",
        ),
        ("no version", changed(r#""version":"1""#, r#""era":"1""#), "version"),
        ("bad tokens", changed("[1, 2]", "1, NaN"), "metadata `tokens`"),
        ("NaN", made(r#"{"__metadata__":{"a":NaN}}"#, 0), "is not valid JSON"),
        ("a number", made(r#"{"__metadata__":{"a":1}}"#, 0), "is not a valid safetensors file"),
        ("twice", made(r#"{"embed":1,"embed":1}"#, 0), "twice"),
        ("no tensor", made("{}", 0), "it has no tensors at all"),
        ("weights", made(&embed("F32", "[2]", 8).replace("embed", "w"), 8), "is it a trace?"),
        ("offsets", made(&embed("F32", "[3]", 8), 8), "is not a valid safetensors file"),
        ("8-bit", made(&embed("F8_E4M3", "[8]", 8), 8), "stages are F32"),
        ("nothing in it", made(&embed("F32", "[0,4]", 0), 0), "is empty: [0, 4]"),
        ("no index", [made(&embed("I64", "[2,4]", 64), 0), vec![0x7f; 64]].concat(), "no 32-bit index"),
    ] {
        let bad = scratch.file(&format!("{name}.safetensors"));
        std::fs::write(&bad, content).unwrap();
        let output = diff(&[text(&bad), text(&good)]);
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{name}: {output:?}");
        assert!(err.contains(words) && err.contains(text(&bad)) && !err.contains("panicked"), "{name}: {err}");
        assert_eq!(err.lines().count(), 1, "{name}: {err}");
    }
    let absent = diff(&["/no/such/trace", text(&good)]);
    assert_eq!(absent.status.code(), Some(2));
    // A file of several runs is told apart by prefixes, which are named.
    let output = diff(&[text(&good), text(&golden())]);
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(err.contains("choose one by its prefix (p1., p33., p7., p70.)"), "{err}");
}

#[test]
fn other_dtypes_and_names_are_brought_to_ours() {
    let scratch = Scratch::new();
    let path = scratch.file("foreign.safetensors");
    let half: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect();
    let bf16: Vec<u8> = [0.5f32, 3.0].iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
    let double: Vec<u8> = [0.25f64, 8.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    let long: Vec<u8> = [7i64, 3].iter().flat_map(|v| v.to_le_bytes()).collect();
    let view = |dtype, bytes| safetensors::tensor::TensorView::new(dtype, vec![1, 1, 2], bytes).unwrap();
    use safetensors::Dtype::{BF16, F16, F64, I64};
    let tensors: HashMap<&str, _> = HashMap::from([
        ("model.layers.0.hidden", view(F16, &half)),
        ("layer0.moe_out", view(BF16, &bf16)),
        ("layers.0.router_logits", view(F64, &double)),
        ("layer0.topk_index", view(I64, &long)),
    ]);
    std::fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
    let trace = TraceFile::open(&path).unwrap();
    let names = ["mlp.router.logits", "mlp.router.experts", "mlp.out", "hidden"].map(|name| format!("layers.0.{name}"));
    assert_eq!(trace.stages(), names);
    let want = [
        Values::F32(vec![0.25, 8.0]),
        Values::I32(vec![7, 3]),
        Values::F32(vec![0.5, 3.0]),
        Values::F32(vec![1.5, -2.0]),
    ];
    for (name, values) in names.iter().zip(want) {
        let stage = trace.tensor(name).unwrap();
        assert_eq!((stage.rows, stage.width, stage.values), (1, 2, values));
    }
}

#[test]
fn statistics_agree_by_their_hashes() {
    let scratch = Scratch::new();
    let written = |name: &str, hash: i64, mean: f32| {
        let path = scratch.file(name);
        let mut writer = TraceWriter::new([]);
        for step in 0..2 {
            let stats = [100.0, 100.0 * mean, 100.0, -2.0, 2.0, 0.0, 0.0, 0.0];
            writer.push_stats("embed", &StepStats { stats, hash: step });
            writer.push_stats("layers.0.hidden", &StepStats { stats, hash: hash * step });
        }
        writer.write(&path, IfThere::Fail).unwrap();
        assert_eq!(TraceFile::open(&path).unwrap().metadata("kind"), Some("stats"));
        path
    };
    let (a, same, other) = (written("a", 5, 0.5), written("same", 5, 0.5), written("other", 6, 0.5001));
    assert_eq!(compared(&a, &same).verdict, "A equals B in 2 stages");
    let comparison = compared(&a, &other);
    let first = comparison.first_stage().unwrap();
    assert_eq!((first.name.as_str(), first.outcome), ("layers.0.hidden", Outcome::Differs));
    assert_eq!(first.note.as_deref(), Some("other bits in 1 of 2 steps, first in step 1"));
    assert_eq!(diff(&[text(&a), text(&other), "--tolerance", "1e-3"]).status.code(), Some(0));
    // Values and statistics have nothing to compare.
    let full = scratch.file("full");
    write(&full, &[], &[("embed", [2, 4], uneven(8))]);
    assert_eq!(diff(&[text(&a), text(&full)]).status.code(), Some(2));
}

#[test]
fn a_trace_is_written_whole_and_over_nothing() {
    let scratch = Scratch::new();
    let path = scratch.file("trace.safetensors");
    let mut writer = TraceWriter::new([("prompt".to_owned(), "ä \"x\"\n".to_owned())]);
    writer.push("embed", 1, 2, Element::F32, &[1, 2]);
    writer.push("embed", 2, 2, Element::F32, &[3, 4, 5, 6]);
    writer.write(&path, IfThere::Fail).unwrap();
    let refused = writer.write(&path, IfThere::Fail).unwrap_err().to_string();
    assert!(refused.contains("is there already"), "{refused}");
    writer.write(&path, IfThere::Replace).unwrap();
    assert_eq!(std::fs::read_dir(&scratch.0).unwrap().count(), 1, "nothing is left beside it");
    let trace = TraceFile::open(&path).unwrap();
    assert_eq!(trace.metadata("prompt"), Some("ä \"x\"\n"));
    assert_eq!(trace.shape("embed").unwrap(), [3, 2]);
    let absent = scratch.file("no/such/directory");
    assert!(writer.write(&absent, IfThere::Fail).is_err());
}

#[test]
fn the_page_needs_nothing_else_and_escapes_what_files_say() {
    let scratch = Scratch::new();
    let broken = flipped(&scratch, "model.layers.2.mlp.experts.gate_up_proj_blocks", 100_000, 0x04);
    let (a, b, page) = (scratch.file("a.safetensors"), ours(&scratch, "p33"), scratch.file("report.html"));
    let mut writer = record(&broken, "p33", 16);
    writer.set("model", "<script src=\"http://example.org\"></script>");
    writer.write(&a, IfThere::Fail).unwrap();
    let output = diff(&[text(&a), text(&b), "--html", text(&page), "--json"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let json: serde_json::Value = serde_json::from_str(out(&output)).unwrap();
    let html = std::fs::read_to_string(&page).unwrap();
    let (first, verdict) = (json["first"].as_u64().unwrap() as usize, json["verdict"].as_str().unwrap());
    let name = json["stages"][first]["name"].as_str().unwrap();
    assert!(name.starts_with("layers.2.mlp.up") && html.contains(name), "{name}");
    assert!(html.contains(verdict), "{verdict}");
    assert_eq!(html.matches("<script").count(), 1);
    let escaped = html.replace("&lt;script src=&quot;http:&#x2f;&#x2f;example.org&quot;", "");
    for outside in ["http:", "https:", "//example", "@import", "url(", " src=", "<link"] {
        assert!(!escaped.contains(outside), "the page has {outside}");
    }
    assert_eq!(html.matches("<details id=").count(), 51);
    let same = report::html(&compared(&b, &b)).unwrap();
    assert!(same.contains("A equals B in 51 stages") && !same.contains("First difference"));
}
