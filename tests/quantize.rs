//! `quantize`: names, bytes and scales of what is written, exact casts, errors by name; `command.rs` has the command, `models.rs` runs what was made.

mod command;
mod models;

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use fourfold::checkpoint::{Checkpoint, Dtype, Mapping};
use fourfold::format::{Format, mxfp4, nvfp4};
use fourfold::quantize::{Calibration, Options, Progress, Report, ScaleSearch, calibrate, check, quantize};
use fourfold::{DeviceChoice, Engine, Want};
use safetensors::Dtype as Raw;
use safetensors::tensor::TensorView;
use serde_json::Value;

use crate::harness::Random;

/// A directory of one test, removed at its end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("fourfold-quantize-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }
}

impl std::ops::Deref for Scratch {
    type Target = PathBuf;

    fn deref(&self) -> &PathBuf {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

type Tensors = BTreeMap<String, (Raw, Vec<usize>, Vec<u8>)>;

fn put(tensors: &mut Tensors, name: &str, dtype: Raw, shape: &[usize], values: &[f32]) {
    let bytes = values.iter().flat_map(|v| match dtype {
        Raw::F32 => v.to_le_bytes().to_vec(),
        Raw::F16 => half::f16::from_f32(*v).to_le_bytes().to_vec(),
        _ => half::bf16::from_f32(*v).to_le_bytes().to_vec(),
    });
    tensors.insert(name.to_owned(), (dtype, shape.to_vec(), bytes.collect()));
}

fn save(dir: &Path, config: &str, tensors: &Tensors) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), config).unwrap();
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
}

const LLAMA: &str =
    r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "zeta": 1, "torch_dtype": "float16"}"#;
const D: usize = 64;
const F: usize = 96;

/// Two layers in the names of a llama, sizes unequal, in this dtype; norms are f32.
fn llama(dtype: Raw) -> Tensors {
    let (mut random, mut tensors) = (Random(5), Tensors::new());
    let mut weight = |tensors: &mut Tensors, name: &str, n: usize, k: usize| {
        let values: Vec<f32> = random.f32s(n * k).iter().map(|v| v * 0.03).collect();
        put(tensors, &format!("{name}.weight"), dtype, &[n, k], &values);
    };
    weight(&mut tensors, "model.embed_tokens", 40, D);
    weight(&mut tensors, "lm_head", 40, D);
    for layer in 0..2 {
        let at = |own: &str| format!("model.layers.{layer}.{own}");
        weight(&mut tensors, &at("self_attn.q_proj"), 48, D);
        weight(&mut tensors, &at("self_attn.k_proj"), 24, D);
        weight(&mut tensors, &at("self_attn.v_proj"), 24, D);
        weight(&mut tensors, &at("self_attn.o_proj"), D, 48 + 16);
        weight(&mut tensors, &at("mlp.gate_proj"), F, D);
        weight(&mut tensors, &at("mlp.up_proj"), F, D);
        weight(&mut tensors, &at("mlp.down_proj"), D, F);
        put(&mut tensors, &at("input_layernorm.weight"), Raw::F32, &[D], &vec![1.001; D]);
    }
    tensors
}

fn open(dir: &Path) -> Checkpoint {
    Checkpoint::open(dir, Mapping::Read).unwrap()
}

fn make(source: &Path, destination: &Path, options: &Options) -> Report {
    let mut last = (0, 0);
    let mut see = |p: &Progress| {
        last = (p.done, p.total);
        ControlFlow::Continue(())
    };
    let report = quantize(&open(source), destination, options, &mut see).unwrap().expect("nobody stopped it");
    assert_eq!(last, (report.before_bytes, report.before_bytes), "the bar arrives");
    report
}

fn says(source: &Path, destination: &Path, options: &Options, words: &[&str]) {
    let error =
        quantize(&open(source), destination, options, &mut |_| ControlFlow::Continue(())).unwrap_err().to_string();
    for word in words {
        assert!(error.contains(word), "{error:?} does not say {word:?}");
    }
}

/// A tensor of floats.
fn floats(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    let view = checkpoint.tensor(name).unwrap();
    match view.dtype {
        Dtype::F32 => view.bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F16 => view.bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::Bf16 => view.bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
        other => panic!("{name} is {other}"),
    }
}

/// What an NVFP4 linear means.
fn nvfp4_values(checkpoint: &Checkpoint, module: &str) -> Vec<f32> {
    let bytes = |what: &str, dtype| {
        let view = checkpoint.tensor(&format!("{module}.{what}")).unwrap();
        assert_eq!(view.dtype, dtype, "{module}.{what}");
        view.bytes
    };
    let (codes, scales) = (bytes("weight", Dtype::U8), bytes("weight_scale", Dtype::F8E4M3));
    let mut out = vec![0.0; codes.len() * 2];
    nvfp4::decode_row(codes, scales, floats(checkpoint, &format!("{module}.weight_scale_2"))[0], &mut out);
    out
}

fn config(dir: &Path, file: &str) -> Value {
    serde_json::from_slice(&fs::read(dir.join(file)).unwrap()).unwrap()
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gpt_oss").join(name)
}

#[test]
fn a_run_that_is_broken_off_leaves_nothing() {
    let scratch = Scratch::new("broken-off");
    let (source, destination) = (scratch.join("src"), scratch.join("dst"));
    save(&source, LLAMA, &llama(Raw::F16));
    let options = Options::new(Format::Mxfp4);
    let mut pieces = 0;
    let mut see = |_: &Progress| {
        pieces += 1;
        if pieces == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    assert!(quantize(&open(&source), &destination, &options, &mut see).unwrap().is_none());
    assert!(pieces == 3 && !destination.exists());
    make(&source, &destination, &options);
}

#[test]
fn nvfp4_has_the_names_and_numbers_of_modelopt() {
    let scratch = Scratch::new("nvfp4");
    save(&scratch.join("src"), LLAMA, &llama(Raw::F16));
    fs::write(scratch.join("src/tokenizer_config.json"), "{}").unwrap();
    let report = make(&scratch.join("src"), &scratch.join("dst"), &Options::new(Format::Nvfp4));
    let (source, made) = (open(&scratch.join("src")), open(&scratch.join("dst")));
    assert_eq!(fs::read(scratch.join("dst/tokenizer_config.json")).unwrap(), b"{}");
    assert_eq!((report.files.len(), report.after_bytes), (1, made.total_bytes()));

    // Alone in its group, a linear is what ModelOpt's own writer makes of it.
    for module in ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"] {
        let theirs = nvfp4::encode_modelopt(&floats(&source, &format!("{module}.weight"))).unwrap();
        let bytes = |what: &str| made.tensor(&format!("{module}.{what}")).unwrap().bytes;
        assert_eq!((bytes("weight"), bytes("weight_scale")), (&theirs.codes[..], &theirs.scales[..]));
        assert_eq!(floats(&made, &format!("{module}.weight_scale_2")), [theirs.global.multiplier()]);
    }
    let tensor = made.tensor("model.layers.0.mlp.gate_proj.weight_scale").unwrap();
    assert_eq!((tensor.dtype, tensor.shape), (Dtype::F8E4M3, &[F, D / 16][..]));
    assert_eq!(made.tensor("model.layers.0.mlp.gate_proj.weight_scale_2").unwrap().shape, [0usize; 0]);
    assert!(made.tensor("model.layers.0.mlp.gate_proj.input_scale").is_err());
    // Shared: the largest of the group decides.
    for (group, members) in [("self_attn", &["q_proj", "k_proj", "v_proj"][..]), ("mlp", &["gate_proj", "up_proj"])] {
        let name = |own: &str, what: &str| format!("model.layers.1.{group}.{own}.{what}");
        let amax = |own: &&str| floats(&source, &name(own, "weight")).iter().fold(0f32, |m, v| m.max(v.abs()));
        let want = members.iter().map(amax).fold(0f32, f32::max) / 2688.0;
        for own in members {
            assert_eq!(floats(&made, &name(own, "weight_scale_2")), [want], "{own}");
        }
    }
    // What stays is bf16.
    for name in ["model.embed_tokens.weight", "lm_head.weight", "model.layers.1.input_layernorm.weight"] {
        let want: Vec<f32> = floats(&source, name).iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect();
        assert_eq!(made.tensor(name).unwrap().dtype, Dtype::Bf16);
        assert_eq!(floats(&made, name), want);
    }
    // The report says what decoding says.
    assert_eq!(report.changed.len(), 14 + 2 + 2);
    for changed in &report.changed {
        let (was, is) = match changed.format {
            Format::Nvfp4 => (floats(&source, &format!("{}.weight", changed.name)), nvfp4_values(&made, &changed.name)),
            _ => (floats(&source, &changed.name), floats(&made, &changed.name)),
        };
        let (mut off, mut all, mut max) = (0f64, 0f64, 0f64);
        for (a, b) in was.iter().zip(&is) {
            let d = f64::from(*a) - f64::from(*b);
            (off, all, max) = (off + d * d, all + f64::from(*a).powi(2), max.max(d.abs()));
        }
        let (got, want) = (changed.deviation.relative_rms(), (off / all).sqrt());
        assert!((got - want).abs() <= 1e-12 * want, "{}: {got} {want}", changed.name);
        assert_eq!((changed.deviation.max_abs, changed.elements), (max, was.len() as u64), "{}", changed.name);
        assert!(changed.format != Format::Nvfp4 || (0.05..0.15).contains(&got), "{}: {got}", changed.name);
    }

    let json = config(&scratch.join("dst"), "config.json");
    let keys: Vec<&String> = json.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["architectures", "model_type", "zeta", "torch_dtype", "quantization_config"]);
    assert_eq!(json["torch_dtype"], "bfloat16");
    let about = &json["quantization_config"];
    assert_eq!((&about["quant_method"], &about["quant_algo"]), (&"modelopt".into(), &"W4A16_NVFP4".into()));
    assert_eq!(about["config_groups"]["group_0"]["weights"]["group_size"], 16);
    assert!(about["config_groups"]["group_0"].get("input_activations").is_none());
    assert_eq!(about["ignore"], serde_json::json!(["lm_head", "model.embed_tokens"]));
    let old = config(&scratch.join("dst"), "hf_quant_config.json");
    assert_eq!(old["quantization"]["quant_algo"], "W4A16_NVFP4");
    assert_eq!(old["producer"]["name"], "fourfold");
}

#[test]
fn mxfp4_has_the_names_of_compressed_tensors() {
    let scratch = Scratch::new("mxfp4");
    save(&scratch.join("src"), LLAMA, &llama(Raw::BF16));
    let mut options = Options::new(Format::Mxfp4);
    options.layers = vec!["model.layers.*.mlp.*".into(), "*.0.self_attn.v_proj".into()];
    let report = make(&scratch.join("src"), &scratch.join("dst"), &options);
    let (source, made) = (open(&scratch.join("src")), open(&scratch.join("dst")));
    let modules: Vec<&str> =
        report.changed.iter().filter(|c| c.format == Format::Mxfp4).map(|c| c.name.as_str()).collect();
    assert_eq!(modules.len(), 7);
    for module in modules {
        let w = floats(&source, &format!("{module}.weight"));
        let (codes, scales) = mxfp4::encode_row(&w).unwrap();
        let view = |what: &str| made.tensor(&format!("{module}.{what}")).unwrap();
        assert_eq!((view("weight_packed").bytes, view("weight_scale").bytes), (&codes[..], &scales[..]));
        assert_eq!((view("weight_scale").dtype, view("weight_packed").dtype), (Dtype::U8, Dtype::U8));
        assert_eq!(view("weight_scale").shape[1] * 16, view("weight_packed").shape[1]);
    }
    assert_eq!(made.tensor("model.layers.1.self_attn.v_proj.weight").unwrap().dtype, Dtype::Bf16);
    let about = &config(&scratch.join("dst"), "config.json")["quantization_config"];
    assert_eq!(about["format"], "mxfp4-pack-quantized");
    let ignored: Vec<&str> = about["ignore"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert!(ignored.contains(&"lm_head") && ignored.contains(&"model.layers.0.self_attn.q_proj"));
    assert!(!ignored.contains(&"model.layers.0.self_attn.v_proj") && ignored.len() == 8, "{ignored:?}");
    assert!(!scratch.join("dst/hf_quant_config.json").exists());

    // That MXFP4 becomes NVFP4 without a change of any value.
    let cast = make(&scratch.join("dst"), &scratch.join("cast"), &Options::new(Format::Nvfp4));
    let again = open(&scratch.join("cast"));
    assert_eq!(cast.changed.len(), 7);
    for changed in &cast.changed {
        let module = &changed.name;
        assert_eq!((changed.deviation.squares_off, changed.deviation.n_inexact), (0.0, 0));
        let bytes = |what: &str| made.tensor(&format!("{module}.{what}")).unwrap().bytes;
        assert_eq!(again.tensor(&format!("{module}.weight")).unwrap().bytes, bytes("weight_packed"));
        let mut want = vec![0.0; bytes("weight_packed").len() * 2];
        mxfp4::decode_row(bytes("weight_packed"), bytes("weight_scale"), &mut want);
        assert_eq!(nvfp4_values(&again, module), want);
    }
    assert_eq!(config(&scratch.join("cast"), "config.json")["quantization_config"]["quant_method"], "modelopt");
}

#[test]
fn a_search_is_never_worse() {
    let scratch = Scratch::new("mse");
    save(&scratch.join("src"), LLAMA, &llama(Raw::F32));
    for format in [Format::Nvfp4, Format::Mxfp4] {
        let mut options = Options::new(format);
        let plain = make(&scratch.join("src"), &scratch.join(format!("{format}-rtn")), &options);
        options.search = ScaleSearch::Mse;
        let searched = make(&scratch.join("src"), &scratch.join(format!("{format}-mse")), &options);
        let mut better = 0;
        for (a, b) in plain.changed.iter().zip(&searched.changed) {
            assert!(b.deviation.relative_rms() <= a.deviation.relative_rms(), "{}", a.name);
            better += usize::from(b.deviation.relative_rms() < 0.99 * a.deviation.relative_rms());
        }
        assert_eq!(better, 14, "{format}: every linear gains");
    }
}

#[test]
fn runs_give_the_same_bytes_in_one_file_or_many() {
    let scratch = Scratch::new("same");
    save(&scratch.join("src"), LLAMA, &llama(Raw::F32));
    let files = |dir: &str| -> BTreeMap<String, Vec<u8>> {
        let entries = fs::read_dir(scratch.join(dir)).unwrap().map(|e| e.unwrap().path());
        entries.map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), fs::read(p).unwrap())).collect()
    };
    let mut options = Options::new(Format::Nvfp4);
    fs::create_dir(scratch.join("a")).unwrap(); // an empty directory may be there
    make(&scratch.join("src"), &scratch.join("a"), &options);
    make(&scratch.join("src"), &scratch.join("b"), &options);
    assert_eq!(files("a"), files("b"));
    assert_eq!(files("a").keys().collect::<Vec<_>>(), ["config.json", "hf_quant_config.json", "model.safetensors"]);
    options.shard_bytes = 10_000;
    let report = make(&scratch.join("src"), &scratch.join("c"), &options);
    assert!(
        report.files.len() > 3 && report.files[0] == format!("model-00001-of-{:05}.safetensors", report.files.len())
    );
    let (one, many) = (open(&scratch.join("a")), open(&scratch.join("c")));
    assert!(one.tensors().map(|t| t.name).eq(many.tensors().map(|t| t.name)));
    for t in one.tensors() {
        assert_eq!(many.tensor(t.name).unwrap().expect(t.dtype, t.shape).unwrap(), t.bytes, "{}", t.name);
    }
    // Others read it too, and find every tensor where its type may lie.
    let bytes = &files("a")["model.safetensors"];
    let theirs = safetensors::SafeTensors::deserialize(bytes).unwrap();
    for (name, view) in theirs.tensors() {
        let at = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
        assert!(at.is_multiple_of(view.dtype().bitsize() / 8), "{name} lies at {at}");
    }
    let (_, header) = safetensors::SafeTensors::read_metadata(bytes).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
}

#[test]
fn nothing_is_overwritten_and_nothing_is_left_half_done() {
    let scratch = Scratch::new("over");
    let mut tensors = llama(Raw::F32);
    save(&scratch.join("src"), LLAMA, &tensors);
    let options = Options::new(Format::Mxfp4);
    let full = scratch.join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("mine"), "x").unwrap();
    says(&scratch.join("src"), &full, &options, &["DST", "is not empty", "nothing is overwritten"]);
    assert!(check(&open(&scratch.join("src")), &full, &options).is_err());
    says(&scratch.join("src"), &full.join("mine"), &options, &["is no directory"]);
    assert_eq!(fs::read_dir(&full).unwrap().count(), 1);
    assert_eq!(fs::read(full.join("mine")).unwrap(), b"x");
    says(&scratch.join("src"), &full.join("mine/below"), &options, &["below"]);

    // The last tensor is broken: what was written before it goes.
    for (at, bad) in [(7, f32::NAN), (D + 2, f32::INFINITY)] {
        let mut values = vec![0.5; 24 * D];
        values[at] = bad;
        put(&mut tensors, "model.layers.1.self_attn.v_proj.weight", Raw::F32, &[24, D], &values);
        let source = scratch.join(format!("bad-{at}"));
        save(&source, LLAMA, &tensors);
        let index = format!("[{}, {}]", at / D, at % D);
        for format in [Format::Mxfp4, Format::Nvfp4, Format::Bf16] {
            let gone = scratch.join("gone");
            says(&source, &gone, &Options::new(format), &["model.layers.1.self_attn.v_proj.weight", &index]);
            assert!(!gone.exists());
            let empty = scratch.join("empty");
            fs::create_dir_all(&empty).unwrap();
            says(&source, &empty, &Options::new(format), &[&index]);
            assert_eq!(fs::read_dir(&empty).unwrap().count(), 0, "an empty directory stays empty");
        }
    }
    let source = scratch.join("bad-norm");
    put(&mut tensors, "model.layers.1.self_attn.v_proj.weight", Raw::F32, &[24, D], &vec![0.5; 24 * D]);
    put(&mut tensors, "model.norm.weight", Raw::F32, &[2], &[1.0, f32::MAX]);
    save(&source, LLAMA, &tensors);
    says(&source, &scratch.join("gone"), &options, &["model.norm.weight", "[1]", "too large for bf16"]);
}

#[test]
fn errors_name_the_tensor() {
    let scratch = Scratch::new("errors");
    let with = |name: &str, change: &dyn Fn(&mut Tensors)| {
        let mut tensors = llama(Raw::BF16);
        change(&mut tensors);
        save(&scratch.join(name), LLAMA, &tensors);
        scratch.join(name)
    };
    let gone = scratch.join("gone");
    let (nv, mx) = (Options::new(Format::Nvfp4), Options::new(Format::Mxfp4));
    let uneven = with("uneven", &|t| {
        put(t, "model.layers.0.self_attn.o_proj.weight", Raw::BF16, &[4, 48], &[1.0; 192]);
    });
    says(&uneven, &gone, &mx, &["model.layers.0.self_attn.o_proj.weight", "48", "32"]);
    make(&uneven, &scratch.join("fits"), &nv);
    let doubles = with("doubles", &|t| {
        t.insert("model.norm.weight".into(), (Raw::F64, vec![1], vec![0; 8]));
    });
    says(&doubles, &gone, &mx, &["model.norm.weight", "F64"]);
    let fused = with("fused", &|t| {
        put(t, "model.layers.0.mlp.experts.down_proj", Raw::BF16, &[2, 32, 32], &[1.0; 2048]);
    });
    says(&fused, &gone, &nv, &["model.layers.0.mlp.experts.down_proj", "each expert"]);
    // No bytes for any number of rows: refused before anything is counted up to it.
    for (dtype, shape) in [(Raw::BF16, [1 << 60, 0]), (Raw::F32, [0, 1 << 58]), (Raw::F16, [0, 0])] {
        let empty = with("empty", &|t| {
            t.insert("model.layers.0.self_attn.q_proj.weight".into(), (dtype, shape.to_vec(), Vec::new()));
        });
        for options in [&nv, &mx] {
            let words = ["model.layers.0.self_attn.q_proj.weight", "without elements", &format!("{shape:?}")];
            says(&empty, &gone, options, &words);
        }
    }
    for (shape, scales, word) in [
        (vec![1 << 60, 0, 1, 16], vec![1 << 60, 0, 1], "without elements"),
        (vec![1, 0, 1 << 59, 16], vec![1, 0, 1 << 59], "too large"),
    ] {
        let mut tensors = Tensors::new();
        let module = "model.layers.0.mlp.experts.gate_up_proj";
        tensors.insert(format!("{module}_blocks"), (Raw::U8, shape, Vec::new()));
        tensors.insert(format!("{module}_scales"), (Raw::U8, scales, Vec::new()));
        save(&scratch.join("empty"), r#"{"model_type": "gpt_oss"}"#, &tensors);
        says(&scratch.join("empty"), &gone, &nv, &["gate_up_proj_blocks", word]);
    }
    for (k, word) in [(1 << 63, "too large"), (1 << 60, "without elements")] {
        let empty = with("empty", &|t| {
            let module = "model.layers.0.self_attn.q_proj";
            t.remove(&format!("{module}.weight"));
            t.insert(format!("{module}.weight_packed"), (Raw::U8, vec![0, k], Vec::new()));
            t.insert(format!("{module}.weight_scale"), (Raw::U8, vec![0, k / 16], Vec::new()));
        });
        says(&empty, &gone, &nv, &["model.layers.0.self_attn.q_proj.weight_packed", word]);
    }
    let none = with("none", &|t| t.retain(|name, _| !name.contains("_proj")));
    says(&none, &gone, &nv, &["no linears"]);
    let plain = with("plain", &|_| ());
    let mut options = mx.clone();
    options.layers = vec!["model.layers.*.mpl.*".into()];
    says(&plain, &gone, &options, &["mpl", "matches no linear"]);
    options.format = Format::Bf16;
    says(&plain, &gone, &options, &["layers", "bf16"]);
    says(&plain, &gone, &Options::new(Format::Fp8), &["format", "fp8"]);
    let mut options = nv.clone();
    options.calibration = Some(Calibration::default());
    says(&plain, &gone, &options, &["calibrate", "layers.0.mlp.up", "not seen"]);

    make(&plain, &scratch.join("nv"), &nv);
    make(&plain, &scratch.join("mx"), &mx);
    for format in [Format::Nvfp4, Format::Mxfp4, Format::Bf16] {
        says(&scratch.join("nv"), &gone, &Options::new(format), &["model.layers.0.mlp.down_proj.weight", "quantised"]);
    }
    says(&scratch.join("mx"), &gone, &mx, &["model.layers.0.mlp.down_proj.weight_packed", "MXFP4 already"]);
    let mut options = nv.clone();
    options.layers = vec!["*".into()];
    says(&scratch.join("mx"), &gone, &options, &["layers", "MXFP4"]);
    assert!(!gone.exists());
}

#[test]
fn bf16_only_converts() {
    let scratch = Scratch::new("bf16");
    save(&scratch.join("src"), LLAMA, &llama(Raw::F16));
    let report = make(&scratch.join("src"), &scratch.join("dst"), &Options::new(Format::Bf16));
    let (source, made) = (open(&scratch.join("src")), open(&scratch.join("dst")));
    assert!(source.tensors().map(|t| (t.name, t.shape)).eq(made.tensors().map(|t| (t.name, t.shape))));
    assert!(made.tensors().all(|t| t.dtype == Dtype::Bf16));
    assert_eq!((report.changed.len(), report.n_copied), (source.tensors().count(), 0));
    assert!(report.changed.iter().all(|c| c.deviation.relative_rms() < 0.003));
    assert!(config(&scratch.join("dst"), "config.json").get("quantization_config").is_none());
    let again = make(&scratch.join("dst"), &scratch.join("again"), &Options::new(Format::Bf16));
    assert_eq!((again.changed.len(), again.n_copied), (0, source.tensors().count()));
    assert_eq!(
        fs::read(scratch.join("dst/model.safetensors")).unwrap(),
        fs::read(scratch.join("again/model.safetensors")).unwrap()
    );
}

/// The last row's logits of a checkpoint on the twins.
fn logits(dir: &Path) -> Vec<f32> {
    let engine = Engine::builder().checkpoint(dir).device(DeviceChoice::Cpu).build().unwrap();
    engine.session().unwrap().feed(&[3, 1, 4, 1, 5, 9, 2, 6], Want::All).unwrap()
}

#[test]
fn gpt_oss_experts_go_to_mxfp4_and_to_nvfp4_without_loss() {
    const EXPERTS: [&str; 2] = ["gate_up_proj", "down_proj"];
    let scratch = Scratch::new("gpt-oss");
    for name in ["tiny", "odd", "loud"] {
        let source = open(&fixture(name));
        // NVFP4: the codes stay, the scales mean the same.
        let cast = scratch.join(format!("{name}-nv"));
        let report = make(&fixture(name), &cast, &Options::new(Format::Nvfp4));
        let made = open(&cast);
        // Each tensor has one block with a scale far below 1e-20, which no multiplier of the others reaches.
        assert!(report.changed.iter().all(|c| c.deviation.n_inexact == 1 && c.deviation.max_abs < 1e-29));
        // And a bf16 copy as transformers saves one, of which MXFP4 is made again.
        let mut tensors = Tensors::new();
        for view in source.tensors().filter(|t| t.dtype == Dtype::Bf16) {
            tensors.insert(view.name.into(), (Raw::BF16, view.shape.to_vec(), view.bytes.to_vec()));
        }
        let mut experts = 0;
        for view in source.tensors().filter(|t| t.name.ends_with("_blocks")) {
            experts += 1;
            let module = view.name.trim_end_matches("_blocks");
            assert!(EXPERTS.iter().any(|own| module.ends_with(own)));
            let (e, n, k) = (view.shape[0], view.shape[1], view.shape[2] * 32);
            let scales = source.tensor(&format!("{module}_scales")).unwrap();
            let mut want = vec![0.0; e * n * k];
            mxfp4::decode_row(view.bytes, scales.bytes, &mut want);
            let codes = made.tensor(module).unwrap().expect(Dtype::U8, &[e, n, k / 2]).unwrap();
            let blocks = codes.chunks(16).zip(view.bytes.chunks(16)).zip(scales.bytes);
            assert!(blocks.into_iter().all(|((ours, theirs), scale)| ours == theirs || *scale < 40));
            let multipliers = made.tensor(&format!("{module}_weight_scale_2")).unwrap();
            assert_eq!((multipliers.dtype, multipliers.shape), (Dtype::F32, &[e][..]));
            let multipliers = floats(&made, multipliers.name);
            let made_scales = made.tensor(&format!("{module}_weight_scale")).unwrap();
            let made_scales = made_scales.expect(Dtype::F8E4M3, &[e, n, k / 16]).unwrap();
            for i in 0..e {
                let (mut got, per) = (vec![0.0; n * k], n * k);
                let (c, s) = (&codes[i * per / 2..][..per / 2], &made_scales[i * per / 16..][..per / 16]);
                nvfp4::decode_row(c, s, multipliers[i], &mut got);
                let same = |(a, b): (&f32, &f32)| a == b || b.abs() < 1e-29 && (a - b).abs() < 1e-29;
                assert!(got.iter().zip(&want[i * per..]).all(same), "{module} {i}");
            }
            let mut across = vec![0.0; want.len()];
            for (at, v) in want.iter().enumerate() {
                let (expert, row, column) = (at / (n * k), at / k % n, at % k);
                across[(expert * k + column) * n + row] = *v;
            }
            put(&mut tensors, module, Raw::BF16, &[e, k, n], &across);
        }
        assert!(experts > 0);
        let text = fs::read_to_string(fixture(name).join("config.json")).unwrap();
        let mut plain: Value = serde_json::from_str(&text).unwrap();
        plain.as_object_mut().unwrap().remove("quantization_config");
        let (bf16, mx) = (scratch.join(format!("{name}-bf16")), scratch.join(format!("{name}-mx")));
        save(&bf16, &plain.to_string(), &tensors);
        let report = make(&bf16, &mx, &Options::new(Format::Mxfp4));
        assert_eq!(report.changed.len(), experts);
        assert!(report.changed.iter().all(|c| c.deviation.squares_off == 0.0));
        let about = &config(&mx, "config.json")["quantization_config"];
        assert_eq!(
            (&about["quant_method"], about["modules_to_not_convert"].as_array().unwrap().len()),
            (&"mxfp4".into(), 4)
        );
        assert!(
            source
                .tensors()
                .map(|t| (t.name, t.shape))
                .eq(open(&mx).tensors().map(|t| (t.name, t.shape)).collect::<Vec<_>>())
        );
        assert_eq!(logits(&mx), logits(&fixture(name)), "{name}");
        // Attention only where it is named, and never in MXFP4.
        let mut options = Options::new(Format::Nvfp4);
        options.layers = vec!["*.o_proj".into(), "*.experts.down_proj".into()];
        let o_proj = open(&bf16).tensor("model.layers.0.self_attn.o_proj.weight").unwrap().shape[1];
        if o_proj.is_multiple_of(16) {
            let some = scratch.join(format!("{name}-some"));
            make(&bf16, &some, &options);
            let some = open(&some);
            assert_eq!(some.tensor("model.layers.0.self_attn.o_proj.weight").unwrap().dtype, Dtype::U8);
            assert_eq!(some.tensor("model.layers.0.mlp.experts.gate_up_proj").unwrap().dtype, Dtype::Bf16);
            options.format = Format::Mxfp4;
            says(&bf16, &scratch.join("gone"), &options, &["o_proj", "matches no linear", "mlp.experts.down_proj"]);
        }
    }
}

#[test]
fn blocks_that_nvfp4_cannot_say_are_counted() {
    let scratch = Scratch::new("inexact");
    let mut tensors = Tensors::new();
    // Two rows of two blocks: scales 2^0, 2^-17 (still exact); 2^-18 of zeros (fine); 2^-18 (not exact).
    let codes: Vec<u8> = [[0x12u8; 16], [0x21; 16], [0x80; 16], [0x77; 16]].concat();
    let module = "model.layers.0.mlp.down_proj";
    tensors.insert(format!("{module}.weight_packed"), (Raw::U8, vec![2, 32], codes.clone()));
    tensors.insert(format!("{module}.weight_scale"), (Raw::U8, vec![2, 2], vec![127, 110, 109, 109]));
    save(&scratch.join("src"), LLAMA, &tensors);
    let report = make(&scratch.join("src"), &scratch.join("dst"), &Options::new(Format::Nvfp4));
    let made = open(&scratch.join("dst"));
    assert_eq!(report.changed[0].deviation.n_inexact, 1);
    assert_eq!(floats(&made, &format!("{module}.weight_scale_2")), [2f32.powi(-8)]);
    assert_eq!(made.tensor(&format!("{module}.weight")).unwrap().bytes[..48], codes[..48]);
    let got = nvfp4_values(&made, module);
    assert_eq!(got[32..34], [0.5 * 2f32.powi(-17), 2f32.powi(-17)]);
    // 6 x 2^-18 is 3 units of 2^-17: said exactly by another code.
    assert_eq!((got[96].abs(), report.changed[0].deviation.max_abs), (6.0 * 2f32.powi(-18), 0.0));
    tensors.insert(format!("{module}.weight_scale"), (Raw::U8, vec![2, 2], vec![127, 110, 255, 109]));
    save(&scratch.join("nan"), LLAMA, &tensors);
    says(&scratch.join("nan"), &scratch.join("gone"), &Options::new(Format::Nvfp4), &["[1, 0]", "NaN"]);
}

#[test]
fn calibration_sees_the_largest_activations() {
    let scratch = Scratch::new("calibrate");
    let source = fixture("tiny");
    let engine = Engine::builder().checkpoint(&source).device(DeviceChoice::Cpu).build().unwrap();
    let tokens: Vec<u32> = (0..50).map(|i| i * 7 % 90).collect();
    let mut steps = Vec::new();
    let seen = calibrate(&engine, &tokens, Some(2), 17, &mut |p| steps.push((p.done, p.total))).unwrap();
    assert_eq!(steps, [(16, 50), (32, 50), (48, 50), (50, 50)]);
    // The same from the values of every stage.
    let mut want: BTreeMap<String, f32> = BTreeMap::new();
    let mut session = engine.session().unwrap();
    for piece in tokens.chunks(16) {
        session.clear();
        let all: Vec<u32> = [2].iter().chain(piece).copied().collect();
        let mut see = |name: &str, _: usize, words: Vec<u32>| {
            if [".attn_norm", ".attention", ".mlp_norm", ".mlp.up"].iter().any(|own| name.ends_with(own)) {
                let amax = want.entry(name.to_owned()).or_default();
                words.iter().for_each(|w| *amax = amax.max(f32::from_bits(*w).abs()));
            }
            Ok(())
        };
        session.feed_seeing(&all, Want::Nothing, Some(&mut see)).unwrap();
    }
    assert_eq!(seen.amax, want);
    assert_eq!(want.len(), 4 * engine.config().num_hidden_layers);
    let mut options = Options::new(Format::Nvfp4);
    options.calibration = Some(seen);
    make(&source, &scratch.join("dst"), &options);
    let made = open(&scratch.join("dst"));
    for (own, stage) in [("gate_up_proj", "mlp_norm"), ("down_proj", "mlp.up")] {
        let name = format!("model.layers.0.mlp.experts.{own}_input_scale");
        assert_eq!(floats(&made, &name), [want[&format!("layers.0.{stage}")] / 2688.0]);
        assert_eq!(made.tensor(&name).unwrap().shape, [0usize; 0]);
    }
    let about = &config(&scratch.join("dst"), "config.json")["quantization_config"];
    assert_eq!(about["quant_algo"], "NVFP4");
    assert_eq!(about["config_groups"]["group_0"]["input_activations"], about["config_groups"]["group_0"]["weights"]);
    assert!(calibrate(&engine, &[], None, 8, &mut |_| ()).is_err());
    assert!(calibrate(&engine, &[1], Some(1), 1, &mut |_| ()).is_err());
}
