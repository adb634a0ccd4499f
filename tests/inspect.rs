//! `inspect` for every family and producer, `trace` against calibrated scales, and `--activations`: on the tiny
//! checkpoints, as they are and with faults planted in copies.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::cli::{err, fails, fourfold, out, root};
use fourfold::format::nvfp4;
use fourfold::trace::calibration::{self, Measured, ScaleOf};
use fourfold::trace::file::{TraceFile, Values};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

const MODELOPT: &str = "qwen3_moe/modelopt";
const COMPRESSED: &str = "qwen3_moe/compressed_tensors";
const TOKENS: &str = "5,17,200,41,8,99,300,12,7,77,150,33";

fn fixture(name: &str) -> String {
    root("tests/fixtures").join(name).display().to_string()
}

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// A copy of a fixture with other tensors, removed at its end.
struct Edited(PathBuf);

impl Edited {
    /// `edit` sees the tensors of one file after the other, and the config.
    fn new(name: &str, fixture_name: &str, mut edit: impl FnMut(&mut Tensors, &mut Value)) -> Self {
        let dir = std::env::temp_dir().join(format!("fourfold-inspect-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        let from = root("tests/fixtures").join(fixture_name);
        let mut config: Value = serde_json::from_slice(&fs::read(from.join("config.json")).unwrap()).unwrap();
        for file in fs::read_dir(from).unwrap().map(|file| file.unwrap().path()) {
            let name = file.file_name().unwrap().to_str().unwrap();
            match name.starts_with("model") && name.ends_with(".safetensors") {
                true => rewrite(&file, &dir.join(name), |tensors| edit(tensors, &mut config)),
                false if name.starts_with("golden") => {}
                false => drop(fs::copy(&file, dir.join(name)).unwrap()),
            }
        }
        fs::write(dir.join("config.json"), config.to_string()).unwrap();
        Self(dir)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Edited {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn rewrite(from: &Path, to: &Path, edit: impl FnOnce(&mut Tensors)) {
    let bytes = fs::read(from).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let owned =
        |(name, view): (String, TensorView<'_>)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()));
    let mut tensors: Tensors = all.tensors().into_iter().map(owned).collect();
    edit(&mut tensors);
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).expect("as many bytes as the shape needs"))
    });
    safetensors::serialize_to_file(views, None, to).unwrap();
}

/// Change the bytes of a tensor, where this file has it.
fn change(tensors: &mut Tensors, name: &str, edit: impl FnOnce(&mut Vec<u8>)) {
    if let Some((_, _, bytes)) = tensors.get_mut(name) {
        edit(bytes);
    }
}

/// The report of a sound checkpoint, its spaces and breaks made one space each.
#[track_caller]
fn report(dir: &str, flags: &[&str]) -> String {
    let output = fourfold(&[&["inspect", dir], flags].concat());
    assert!(output.status.success(), "{}", err(&output));
    // What is no table of names keeps to the width of a terminal.
    let words = ["Architecture", "Text", "Quantisation", "Calibrated", "NVFP4", "What goes where"];
    for section in out(&output).split("\n\n").filter(|section| words.iter().any(|word| section.starts_with(word))) {
        let wide = section.lines().find(|line| line.chars().count() > 80 && !line.starts_with("  on "));
        assert!(wide.is_none(), "{wide:?}");
    }
    out(&output).split_whitespace().collect::<Vec<_>>().join(" ")
}

#[track_caller]
fn says(report: &str, words: &[&str]) {
    for word in words {
        assert!(report.contains(word), "no {word:?} in: {report}");
    }
}

#[test]
fn every_family_and_producer_is_described() {
    let moe = [
        "Architecture: qwen3-moe, with experts",
        "2 key/value heads; norms on heads layers all see all",
        "8 a layer, 2 used a token, none shared, inner size 48, weights made to sum to 1",
        "theta 1000000, not scaled",
        "declared NVFP4, inputs NVFP4 with calibrated scales (W4A4)",
        "stored 4 BF16 linears (51.5 k weights), 84 NVFP4 (442.4 k)",
        "differ between q, k and v in 1 of 3 layers, between gate and up in 1 of 3 layers: kept apart",
        "attn_norm 3 4.5",
        "one for all linears",
        "mlp_norm 3 2.3",
        "one for all experts",
        "27,816 in 252 tensors, all sound",
        "543.8 k parameters, of which a token uses 245.9 k",
        "routers 3 BF16",
        "experts 288 NVFP4",
    ];
    let modelopt = report(&fixture(MODELOPT), &[]);
    says(&modelopt, &moe);
    says(
        &modelopt,
        &[
            "24 model.layers.*.mlp.experts.*.down_proj.weight U8",
            "written by ModelOpt 0.47.0",
            "experts have their own in 1 layer",
            "amax = 2688 x input_scale",
        ],
    );
    assert!(!modelopt.contains("missing") && !modelopt.contains("not as declared"), "{modelopt}");
    let compressed = report(&fixture(COMPRESSED), &[]);
    says(&compressed, &moe);
    says(&compressed, &["written by compressed-tensors 0.20.0", "mlp.up 3 5.531 to 32.780 experts have their own"]);
    let llama = report(&fixture("dense/llama"), &[]);
    let words =
        ["llama, dense", "; biases layers", "dense MLP inner size 192", "Llama 3 factor 8 over 64", "is the embedding"];
    says(&llama, &words);
    says(&llama, &["no quantisation is declared", "stored 21 BF16 linears", "dense MLPs 9 BF16"]);
    assert!(!llama.contains("norms on heads") && !llama.contains("used a token, none"), "{llama}");
    says(&report(&fixture("dense/qwen3"), &[]), &["qwen3, dense", "; norms on heads", "a matrix of its own"]);
    let gpt_oss = report(&fixture("gpt_oss/tiny"), &[]);
    says(&gpt_oss, &["gpt-oss, with experts", "; biases, sinks", "clamp 7", "written by OpenAI declared MXFP4 stored"]);
    assert!(!gpt_oss.contains("not as declared"), "{gpt_oss}");
    // Quantised activations take memory, too.
    let rest = |flags: &[&str]| {
        let said = report(&fixture(MODELOPT), &[&["--chunk", "2048"], flags].concat());
        said.split("the rest ").nth(1).unwrap().split(" for").next().unwrap().to_owned()
    };
    assert_ne!(rest(&[]), rest(&["--activations", "nvfp4-static"]));
}

#[test]
fn what_our_own_quantiser_wrote_is_described() {
    for (from, format, words) in [
        ("dense/llama", "nvfp4", ["written by fourfold", ", as ModelOpt does", "stored 21 NVFP4 linears"]),
        ("gpt_oss/tiny", "nvfp4", ["written by fourfold", "inputs as they are (W4A16)", "64 NVFP4 (1.6 M)"]),
        (
            "dense/qwen3",
            "mxfp4",
            ["written by compressed-tensors", "declared MXFP4", "MXFP4 scales of the first layer"],
        ),
    ] {
        let to = std::env::temp_dir().join(format!(
            "fourfold-inspect-own-{}-{}",
            &from[from.len() - 4..],
            std::process::id()
        ));
        let _ = fs::remove_dir_all(&to);
        let made = Edited(to);
        let output = fourfold(&["quantize", &fixture(from), made.path(), "--format", format]);
        assert!(output.status.success(), "{}", err(&output));
        let said = report(made.path(), &[]);
        says(&said, &words);
        assert!(!said.contains("not as declared"), "{said}");
    }
}

#[test]
fn what_differs_from_the_declaration_is_said() {
    let edited = Edited::new("otherwise", MODELOPT, |tensors, config| {
        for key in ["k_proj.k_scale", "v_proj.v_scale"] {
            let scale = (Dtype::F32, vec![], 0.02f32.to_le_bytes().to_vec());
            (0..3).for_each(|l| drop(tensors.insert(format!("model.layers.{l}.self_attn.{key}"), scale.clone())));
        }
        // Not declared to be quantised, so that its calibrated scale may be missing.
        let o_proj = "model.layers.1.self_attn.o_proj";
        tensors.remove(&format!("{o_proj}.input_scale")).unwrap();
        let q = &mut config["quantization_config"];
        q["ignore"].as_array_mut().unwrap().push(o_proj.into());
        q["kv_cache_scheme"] = serde_json::json!({"num_bits": 8, "type": "float", "dynamic": false});
        q["ignore"].as_array_mut().unwrap().retain(|name| name != "lm_head" && name != "model.layers.1.mlp.gate");
    });
    let said = report(edited.path(), &["--kv", "bf16"]);
    says(&said, &["calibrated scales (W4A4)", "Calibrated inputs", "missing: attention in layers 1"]);
    says(&said, &["k_scale/v_scale: FP8 scales are there and sound, in 3 layers; the cache stays bf16"]);
    says(
        &said,
        &["3 linears are not as declared (the tensors decide): lm_head is BF16, declared NVFP4; model.layers.1"],
    );
    // Of inputs of another kind, scales that are there are sound, and no calibration for NVFP4.
    let weights_only = Edited::new("weights-only", MODELOPT, |_, config| {
        let group = &mut config["quantization_config"]["config_groups"]["group_0"];
        group.as_object_mut().unwrap().remove("input_activations");
    });
    let said = report(weights_only.path(), &[]);
    says(&said, &["inputs as they are (W4A16)", "all sound"]);
    assert!(!said.contains("Calibrated inputs"), "{said}");
}

#[test]
fn shapes_without_elements_end_soon() {
    let edited = Edited::new("empty", MODELOPT, |tensors, _| {
        let name = |part: &str| format!("model.layers.0.self_attn.{part}");
        tensors.insert(name("wide.weight"), (Dtype::U8, vec![0, 1 << 63], vec![]));
        tensors.insert(name("long.weight"), (Dtype::F8_E4M3, vec![1 << 60, 0], vec![]));
        tensors.insert(name("long.weight_scale_inv"), (Dtype::F32, vec![1 << 53, 0], vec![]));
    });
    let output = fourfold(&["inspect", edited.path()]);
    let text = format!("{}{}", out(&output), err(&output));
    assert!(output.status.code().is_some_and(|code| code < 100), "{text}");
    assert!(text.contains("self_attn.long.weight") && !text.contains("panicked"), "{text}");
}

#[test]
fn every_bad_scale_is_listed() {
    let bad = [
        ("model.layers.0.self_attn.k_proj.input_global_scale", "inf", f32::INFINITY),
        ("model.layers.1.mlp.experts.3.down_proj.weight_global_scale", "NaN", f32::NAN),
        ("model.layers.2.mlp.experts.7.up_proj.input_global_scale", "0", 0.0),
    ];
    let edited = Edited::new("bad", COMPRESSED, |tensors, _| {
        for (name, _, value) in bad {
            change(tensors, name, |bytes| bytes.copy_from_slice(&value.to_le_bytes()));
        }
    });
    let output = fails(&["inspect", edited.path()], 3, &["but a scale is a finite number above zero"]);
    says(out(&output), &["\n3 bad scales of 27,816 in 252 tensors\n", "would refuse this model"]);
    for (name, word, _) in bad {
        let line = out(&output).lines().find(|line| line.contains(name) && line.ends_with(word));
        assert!(line.is_some_and(|line| line.chars().count() <= 80), "{name}: {}", out(&output));
    }

    // Block scales: NaN, negative, and zero over codes; more than are listed.
    let name = "model.layers.1.self_attn.q_proj.weight_scale";
    let edited = Edited::new("many", MODELOPT, |tensors, _| {
        change(tensors, name, |bytes| {
            bytes[..23].fill(0x7f);
            bytes[23..25].copy_from_slice(&[0x81, 0]);
        });
    });
    let output = fails(&["inspect", edited.path()], 3, &[name]);
    let words = [
        "24 bad scales of ",
        "[0, 1]",
        "NaN (0x7f)",
        "  and 4 more\n",
        "which count as zeros: 1; the first is\n",
        "q_proj.weight_scale [4, 0]\n",
    ];
    says(out(&output), &words);
    assert_eq!(out(&output).matches("NaN (0x7f)").count(), 20);
}

/// What a trace prints on stdout and stderr.
fn trace(dir: &str, flags: &[&str]) -> (String, String, TraceFile) {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("calibration-{n}.safetensors"));
    let args =
        ["trace", "--model", dir, "--tokens", TOKENS, "--device", "cpu", "--force", "-o", file.to_str().unwrap()];
    let output = fourfold(&[&args, flags].concat());
    assert!(output.status.success(), "{}", err(&output));
    (out(&output).to_owned(), err(&output).to_owned(), TraceFile::open(&file).unwrap())
}

#[test]
fn a_trace_holds_its_inputs_against_calibration() {
    let dir = fixture(MODELOPT);
    let (table, notes, file) = trace(&dir, &[]);
    assert!(table.is_empty() && !notes.contains("warning") && notes.lines().count() == 2, "{table}{notes}");
    assert!(
        notes.contains("times what calibration saw, at layers.2.mlp_norm") && notes.contains("(--scales"),
        "{notes}"
    );
    assert_eq!(file.metadata("activations"), Some("f32"));

    let (table, notes, file) = trace(&dir, &["--scales", "--activations", "nvfp4-static", "--chunk", "5", "-n", "3"]);
    assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
    assert!(notes.contains(" of all blocks clipped\n"), "{notes}");
    let all = calibration::measure(&file).unwrap();
    assert_eq!((all.len(), table.lines().count()), (12, 13));
    let read = fs::read(Path::new(&dir).join("model.safetensors")).unwrap();
    let read = SafeTensors::deserialize(&read).unwrap();
    let scale = |module: &str| {
        let data = read.tensor(&format!("model.layers.2.{module}.input_scale")).unwrap().data().to_vec();
        f32::from_le_bytes(data.try_into().unwrap())
    };
    let values = |stage: &str| match file.tensor(&format!("layers.2.{stage}")).unwrap().values {
        Values::F32(values) => values,
        Values::I32(indices) => indices.into_iter().map(|i| i as f32).collect(),
    };
    let amax = |x: &[f32]| x.iter().fold(0f32, |m, v| m.max(v.abs()));
    let of = |stage: &str| all.iter().find(|m| m.stage == format!("layers.2.{stage}")).unwrap();
    for (stage, module) in
        [("attn_norm", "self_attn.v_proj"), ("attention", "self_attn.o_proj"), ("mlp_norm", "mlp.experts.4.up_proj")]
    {
        let (found, amax) = (of(stage), amax(&values(stage)));
        assert_eq!((found.amax, found.scale_of, found.input_scale), (amax, ScaleOf::Stage, scale(module)), "{stage}");
        assert_eq!(found.ratio, amax / nvfp4::MAX / scale(module));
        let clips: f32 = values(&format!("{stage}.staged")).chunks_exact(2).map(|pair| pair[1]).sum();
        let width = if stage == "attention" { 128 } else { 96 };
        assert_eq!(found.clipped, Some((clips as u64, 15 * width / 16)), "{stage}");
        // What is no larger than in calibration is not clipped.
        assert_eq!(clips > 0.0, found.ratio > 1.0, "{stage}");
    }
    // The experts' second matrices have scales of their own here: each row goes by its expert's.
    let (inner, experts, found) = (values("mlp.up"), values("mlp.router.experts"), of("mlp.up"));
    let ratio = |(row, expert): (&[f32], &f32)| {
        amax(row) / nvfp4::MAX / scale(&format!("mlp.experts.{}.down_proj", *expert as usize))
    };
    let want = inner.chunks_exact(48).zip(&experts).map(ratio).fold(0.0, f32::max);
    assert!(found.ratio == want && matches!(found.scale_of, ScaleOf::Expert(_)), "{found:?} {want}");
    assert_eq!(found.clipped.map(|(_, blocks)| blocks), Some(15 * 2 * 48 / 16));

    // Statistics have extremes, but no routes and no clipped blocks.
    let (table, _, file) = trace(&dir, &["--stats", "-v"]);
    assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
    let of_experts: Vec<&str> = table.lines().filter(|line| line.contains("largest of 8 experts")).collect();
    assert!(!of_experts.is_empty() && of_experts.iter().all(|line| line.contains(" ≥ ")), "{table}");
    assert_eq!(table.matches('≥').count(), of_experts.len(), "{table}");
    let told = calibration::measure(&file).unwrap();
    let (_, _, full) = trace(&dir, &[]);
    for (told, full) in told.iter().zip(calibration::measure(&full).unwrap()) {
        assert_eq!((told.amax, told.clipped), (full.amax, None));
        assert!(told.ratio <= full.ratio, "{told:?}");
        assert_eq!(told.is_lower_bound(), matches!(full.scale_of, ScaleOf::Expert(_)), "{told:?} {full:?}");
    }
    // Nor are there routes where they were not asked for.
    let (_, _, file) = trace(&dir, &["--stage", "layers.*.mlp.up"]);
    let unrouted = calibration::measure(&file).unwrap();
    for one in &unrouted {
        let told = told.iter().find(|told| told.stage == one.stage).unwrap();
        assert_eq!((one.ratio, one.scale_of), (told.ratio, told.scale_of));
    }
    assert_eq!(unrouted.len(), 3);
    assert!(unrouted.iter().any(Measured::is_lower_bound));
    let (_, notes, _) = trace(&fixture("dense/qwen3"), &["--scales"]);
    assert!(notes.contains("no calibrated scales"), "{notes}");
    let (_, notes, _) = trace(&dir, &["--scales", "--stage", "logits"]);
    assert!(notes.contains("what was recorded has no calibrated scales"), "{notes}");
}

/// A trace that somebody else wrote: scales for three experts, a stage of one number repeated, and the routes of its rows.
fn measured(stage: &str, shape: [usize; 2], value: f32, routes: Option<[usize; 2]>) -> Result<Vec<Measured>, String> {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("calibration-foreign-{n}.safetensors"));
    let values: Vec<u8> = (0..shape[0] * shape[1]).flat_map(|_| value.to_le_bytes()).collect();
    let mut views = vec![(stage.to_owned(), TensorView::new(Dtype::F32, shape.to_vec(), &values).unwrap())];
    let experts =
        routes.map_or(Vec::new(), |[rows, a]| (0..rows * a).flat_map(|i| (i as i32 % 3).to_le_bytes()).collect());
    if let Some(shape) = routes {
        let view = TensorView::new(Dtype::I32, shape.to_vec(), &experts).unwrap();
        views.push(("layers.0.mlp.router.experts".to_owned(), view));
    }
    let scales = format!(r#"{{"{stage}": [0.001, null, 1.0]}}"#);
    let metadata = [(calibration::KEY.to_owned(), scales)].into();
    fs::write(&file, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
    calibration::measure(&TraceFile::open(&file).unwrap()).map_err(|e| e.to_string())
}

#[test]
fn a_healthy_input_of_unknown_experts_is_no_warning() {
    let up = "layers.0.mlp.up";
    // As large as calibration saw before the third expert; the first saw a thousandth of it.
    for (stage, routes) in [(up, None), ("layers.0.mlp_norm", None), (up, Some([1, 2]))] {
        let all = measured(stage, [2, 8], nvfp4::MAX, routes).unwrap();
        assert_eq!((all.len(), all[0].ratio, all[0].scale_of), (1, 1.0, ScaleOf::LargestOf(3)), "{stage}");
        assert!(all[0].is_lower_bound() && !all[0].is_suspicious());
        assert!(measured(stage, [2, 8], nvfp4::MAX * 2.5, routes).unwrap()[0].is_suspicious());
    }
    let own = measured(up, [1, 9], nvfp4::MAX, Some([1, 3])).unwrap();
    assert_eq!((own[0].scale_of, own[0].is_suspicious()), (ScaleOf::Expert(0), true));
}

#[test]
fn a_foreign_trace_of_odd_shapes_is_an_error() {
    let up = "layers.0.mlp.up";
    for (shape, a, words) in [
        ([2, 8], 0, "layers.0.mlp.router.experts: is empty"),
        ([2, 0], 2, "layers.0.mlp.up: is empty"),
        ([2, 8], 3, "layers.0.mlp.up: has rows of 8 numbers, which are not whole parts for 3 experts"),
        ([2, 2], 3, "layers.0.mlp.up: has rows of 2 numbers"),
    ] {
        let error = measured(up, shape, 1.0, Some([2, a])).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
    measured("layers.0.mlp_norm", [2, 8], 1.0, Some([2, 3])).unwrap();
}

#[test]
fn an_input_that_calibration_never_saw_is_a_warning() {
    let gain = "model.layers.1.post_attention_layernorm.weight";
    // As if the gain that belongs there had not been applied.
    let edited = Edited::new("gain", MODELOPT, |tensors, _| {
        change(tensors, gain, |bytes| {
            for gain in bytes.chunks_exact_mut(2) {
                let larger = half::bf16::from_le_bytes([gain[0], gain[1]]).to_f32() * 13.0;
                gain.copy_from_slice(&half::bf16::from_f32(larger).to_le_bytes());
            }
        });
    });
    for flags in [&[][..], &["--stats"], &["--activations", "nvfp4-static"]] {
        let (_, notes, file) = trace(edited.path(), flags);
        let all = calibration::measure(&file).unwrap();
        let first = all.iter().find(|m| m.is_suspicious()).unwrap();
        assert_eq!(first.stage, "layers.1.mlp_norm");
        let warning = format!(
            "warning: layers.1.mlp_norm: the input of this layer is {:.1} times larger than calibration ever saw.\n\
             The wrong value is upstream: check that the norm's gain ({gain}) is loaded and applied.",
            first.ratio
        );
        assert!(first.ratio > 8.0 && notes.contains(&warning), "{notes}");
        let later = all.iter().filter(|m| m.is_suspicious()).count() - 1;
        assert_eq!(notes.contains(" later input"), later > 0, "{notes}");
    }
}

#[test]
fn linears_with_scales_of_their_own_are_reported_one_by_one() {
    let edited = Edited::new("apart", MODELOPT, |tensors, _| {
        change(tensors, "model.layers.0.self_attn.k_proj.input_scale", |bytes| {
            let scale = f32::from_le_bytes(bytes[..].try_into().unwrap());
            bytes.copy_from_slice(&(scale / 4.0).to_le_bytes());
        });
    });
    let (_, notes, file) = trace(edited.path(), &["--activations", "nvfp4-static", "--chunk", "5"]);
    // q, k, v: three pieces, each of which quantises the same rows.
    let clips = ["", ".2", ".3"].map(|again| {
        let stage = file.tensor(&format!("layers.0.attn_norm.staged{again}")).unwrap();
        assert_eq!((stage.rows, stage.width), (12, 2));
        let Values::F32(values) = stage.values else { panic!() };
        values.chunks_exact(2).map(|pair| pair[1]).sum::<f32>()
    });
    assert!(clips[0] == 0.0 && clips[1] > 0.0 && clips[2] == 0.0, "{clips:?}");
    let all = calibration::measure(&file).unwrap();
    assert_eq!(all[0].clipped, Some((clips[1] as u64, 3 * 12 * 96 / 16)));
    assert!(all[0].ratio > 3.0 && notes.contains("input_layernorm.weight"), "{notes}");
    says(&report(edited.path(), &[]), &["linears have their own in 1 layer"]);
}

#[test]
fn activations_are_chosen_and_named() {
    let dir = fixture(MODELOPT);
    let run = |flags: &[&str]| {
        let args = ["run", "--model", &dir, "--device", "cpu", "--greedy", "-n", "12", "hello there"];
        let output = fourfold(&[&args, flags].concat());
        assert!(output.status.success(), "{}", err(&output));
        (out(&output).to_owned(), err(&output).to_owned())
    };
    let (_, line) = run(&[]);
    assert!(!line.contains("activations"), "{line}");
    for mode in ["nvfp4-dynamic", "nvfp4-token", "nvfp4-static"] {
        let (_, line) = run(&["--activations", mode]);
        assert!(line.contains(&format!(" · activations {mode} · greedy")), "{line}");
    }
    // A chat's prompt must be one step where all its rows share a scale.
    let args = ["run", "--model", &dir, "--device", "cpu", "--activations", "nvfp4-dynamic", "--chunk", "2", "hello"];
    fails(&args, 2, &["a prompt must be one step", "raise the chunk, or use \"nvfp4-token\""]);

    // The same model with its block scales in 128x4 order.
    let swizzled = Edited::new("swizzled", MODELOPT, |tensors, _| {
        for (_, (dtype, shape, bytes)) in tensors.iter_mut().filter(|(name, _)| name.ends_with(".weight_scale")) {
            assert_eq!(*dtype, Dtype::F8_E4M3);
            *bytes = nvfp4::swizzle(bytes, shape[0], shape[1]);
            *shape = vec![shape[0].next_multiple_of(128), shape[1].next_multiple_of(4)];
        }
    });
    let args = ["run", "--model", swizzled.path(), "--device", "cpu", "--greedy", "-n", "12", "hello there"];
    let output = fourfold(&[&args[..], &["--swizzled-scales"]].concat());
    assert_eq!(out(&output), run(&[]).0, "{}", err(&output));
    fails(&args, 3, &["weight_scale", "swizzled"]);
    assert!(report(swizzled.path(), &["--swizzled-scales"]).contains("all sound"));
    fails(&["inspect", swizzled.path()], 3, &["weight_scale", "swizzled"]);
}
