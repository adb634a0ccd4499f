//! `eval`: perplexity and divergence against plain sums of logits, windows, references, errors, and the command.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::OnceLock;

use fourfold::eval::{Against, Options, Report, evaluate};
use fourfold::tokenizer::leading_token;
use fourfold::trace::file::{IfThere, TraceFile, TraceWriter};
use fourfold::trace::record::{Keep, record};
use fourfold::{DeviceChoice, Engine, EngineBuilder, Want};
use serde_json::Value;

const TEXT: &str = "Once upon a time there was a fox — naïve, but kind — who liked to count the stars. One night";

fn cpu() -> EngineBuilder {
    Engine::builder().default_draft().device(DeviceChoice::Cpu).context(256)
}

/// The small embedded model on the twins.
fn engine() -> &'static Engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    ENGINE.get_or_init(|| cpu().build().unwrap())
}

fn run(engine: &Engine, against: Against, options: &Options) -> Report {
    let mut last = (0, 0);
    let report = evaluate(engine, TEXT, against, options, &mut |p| last = (p.done, p.total)).unwrap();
    assert_eq!(last, (report.computed as u64, report.computed as u64));
    report
}

fn says(against: Against, text: &str, options: &Options, word: &str) {
    let error = evaluate(engine(), text, against, options, &mut |_| ()).unwrap_err().to_string();
    assert!(error.contains(word), "{error:?} does not say {word:?}");
}

/// -ln of the probability of each token after the first, plainly, and whether it was the likeliest.
fn plain(tokens: &[u32]) -> Vec<(f64, bool)> {
    let logits = engine().session().unwrap().feed(tokens, Want::All).unwrap();
    let vocab = engine().config().vocab_size;
    let one = |(row, next): (&[f32], &u32)| {
        let sum: f64 = row.iter().map(|v| f64::from(*v).exp()).sum();
        let own = row[*next as usize];
        (sum.ln() - f64::from(own), row.iter().all(|v| *v <= own))
    };
    logits.chunks_exact(vocab).zip(&tokens[1..]).map(one).collect()
}

fn near(a: f64, b: f64) {
    assert!((a - b).abs() <= 1e-9 * b.abs().max(1e-3), "{a} {b}");
}

#[test]
fn perplexity_is_that_of_the_plain_sum() {
    let tokenizer = engine().tokenizer().unwrap();
    let tokens = tokenizer.encode_with_specials(TEXT).unwrap();
    assert!(tokens.len() > 20, "{}", tokens.len());
    let report = run(engine(), Against::Nothing, &Options::default());
    let want = plain(&tokens);
    let nll = want.iter().map(|(nll, _)| nll).sum::<f64>() / want.len() as f64;
    near(report.model.nll, nll);
    near(report.model.perplexity(), nll.exp());
    assert_eq!((report.scored, report.windows, report.computed), (tokens.len() - 1, 1, tokens.len()));
    near(report.model.accuracy, want.iter().filter(|(_, right)| *right).count() as f64 / want.len() as f64);
    let bytes = TEXT.len() - tokenizer.token_bytes(tokens[0]).len();
    assert_eq!(report.bytes, bytes);
    near(report.bits_per_byte(&report.model), nll * want.len() as f64 / 2f64.ln() / bytes as f64);
    assert!(report.tokens_per_second(&report.model) > 0.0 && report.reference.is_none());
    // It is a model of stories: it does better than chance.
    assert!(report.model.perplexity() < engine().config().vocab_size as f64 / 4.0);

    // Windows, each from an empty cache.
    let options = Options { window: Some(7), max_tokens: Some(17), ..Options::default() };
    let report = run(engine(), Against::Nothing, &options);
    let windows: Vec<Vec<(f64, bool)>> = tokens[..17].chunks(7).map(plain).collect();
    let want: Vec<f64> = windows.concat().iter().map(|(nll, _)| *nll).collect();
    near(report.model.nll, want.iter().sum::<f64>() / want.len() as f64);
    assert_eq!((report.windows, report.scored, report.computed), (3, 14, 17));
    // With a first token, every token of the text is scored.
    let lead = tokenizer.token_id("<|startoftext|>").unwrap_or(1);
    let report = run(engine(), Against::Nothing, &Options { lead: Some(lead), ..options });
    let led = |piece: &[u32]| plain(&[&[lead], piece].concat());
    let want: Vec<(f64, bool)> = tokens[..17].chunks(6).flat_map(led).collect();
    near(report.model.nll, want.iter().map(|(nll, _)| nll).sum::<f64>() / want.len() as f64);
    assert_eq!((report.windows, report.scored, report.computed), (3, 17, 20));
    // With a stride, every token but the first is scored once, in a window that reaches back.
    let report = run(engine(), Against::Nothing, &Options { stride: Some(3), ..options });
    let mut want: Vec<f64> = plain(&tokens[..7]).iter().map(|(nll, _)| *nll).collect();
    for from in [3, 6, 9, 12] {
        let to = (from + 7).min(17);
        let new = to - (from + 4).min(17);
        let all = plain(&tokens[from..to]);
        want.extend(all[all.len() - new..].iter().map(|(nll, _)| *nll));
    }
    assert_eq!((report.scored, want.len(), report.windows), (16, 16, 5));
    near(report.model.nll, want.iter().sum::<f64>() / 16.0);
}

#[test]
fn chunks_change_nothing() {
    let options = Options { window: Some(19), ..Options::default() };
    let other = cpu().chunk(5).build().unwrap();
    let (a, b) = (run(engine(), Against::Nothing, &options), run(&other, Against::Nothing, &options));
    assert_eq!((a.model.nll, a.model.accuracy, a.scored), (b.model.nll, b.model.accuracy, b.scored));
    // And a reference with other chunks is stepped along.
    let both = run(&other, Against::Engine(engine()), &options).reference.unwrap();
    assert_eq!((both.kl_mean, both.kl_max, both.agreement), (0.0, 0.0, 1.0));
}

#[test]
fn a_model_is_no_distance_from_itself_and_some_from_another() {
    let options = Options { max_tokens: Some(16), ..Options::default() };
    let same = run(engine(), Against::Engine(engine()), &options);
    let own = same.reference.as_ref().unwrap();
    assert_eq!((own.kl_mean, own.kl_p99, own.kl_max, own.agreement), (0.0, 0.0, 0.0, 1.0));
    assert_eq!((own.score.nll, own.score.accuracy), (same.model.nll, same.model.accuracy));
    let large = Engine::builder().device(DeviceChoice::Cpu).context(256).build().unwrap();
    let report = run(engine(), Against::Engine(&large), &options);
    let other = report.reference.as_ref().unwrap();
    assert!(other.kl_mean > 1e-3 && other.kl_p99 <= other.kl_max && other.kl_mean < other.kl_max);
    assert!(other.agreement < 1.0 && other.score.nll != report.model.nll);
    assert_eq!(report.model.nll, same.model.nll);
}

#[test]
fn a_trace_is_a_reference() {
    let path = std::env::temp_dir().join(format!("fourfold-eval-{}.safetensors", std::process::id()));
    let tokens = engine().tokenizer().unwrap().encode_with_specials(TEXT).unwrap();
    let write = |tokens: &[u32], keep: &Keep| {
        let mut writer = TraceWriter::new(Vec::new());
        record(&mut engine().session().unwrap(), tokens, keep, &mut writer).unwrap();
        writer.set("tokens", serde_json::to_string(tokens).unwrap());
        writer.write(&path, IfThere::Replace).unwrap();
        TraceFile::open(&path).unwrap()
    };
    let logits = Keep { stages: vec!["logits".into()], ..Keep::default() };
    let trace = write(&tokens[..12], &logits);
    let report = run(engine(), Against::Trace(&trace), &Options::default());
    let own = report.reference.as_ref().unwrap();
    assert_eq!((own.kl_max, own.agreement, own.score.nll, report.scored), (0.0, 1.0, report.model.nll, 11));
    assert_eq!(report.tokens_per_second(&own.score), 0.0);
    let against = Against::Trace(&trace);
    says(against, "Twice upon a time", &Options::default(), "other tokens");
    says(against, TEXT, &Options { max_tokens: Some(8), ..Options::default() }, "the text the end");
    says(against, TEXT, &Options { window: Some(8), ..Options::default() }, "window");
    let part = write(&tokens[..12], &Keep { positions: vec![2..=5], ..logits });
    says(Against::Trace(&part), TEXT, &Options::default(), "every position");
    let none = write(&tokens[..3], &Keep { stages: vec!["final_norm".into()], ..Keep::default() });
    says(Against::Trace(&none), TEXT, &Options::default(), "no logits");
    let stats = write(&tokens[..3], &Keep { stats: true, ..Keep::default() });
    says(Against::Trace(&stats), TEXT, &Options::default(), "no logits");
    fs::remove_file(path).unwrap();
}

#[test]
fn what_cannot_be_scored_is_said() {
    let options = Options::default();
    says(Against::Nothing, "", &options, "nothing to predict");
    says(Against::Nothing, "a", &options, "nothing to predict");
    for window in [0, 1, 257] {
        says(Against::Nothing, TEXT, &Options { window: Some(window), ..options }, "from 2 to 256");
    }
    for stride in [0, 9] {
        says(Against::Nothing, TEXT, &Options { window: Some(8), stride: Some(stride), ..options }, "stride");
    }
    let checkpoint = fourfold::default_draft_checkpoint().unwrap();
    assert_eq!(leading_token(&checkpoint, engine().tokenizer().unwrap()).unwrap(), None);
    let tiny = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gpt_oss/tiny");
    let tiny = Engine::builder().checkpoint(tiny).device(DeviceChoice::Cpu).build().unwrap();
    says(Against::Engine(&tiny), TEXT, &options, "reference");
    let error = evaluate(&tiny, TEXT, Against::Nothing, &options, &mut |_| ()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json"), "{error}");
}

#[test]
fn the_first_token_is_the_tokenizer_s() {
    let files = fourfold::default_draft_checkpoint().unwrap();
    let tokenizer = engine().tokenizer().unwrap();
    let with = |tokenizer_json: &[u8], config: &str| {
        let leak = |bytes: &[u8]| -> &'static [u8] { bytes.to_vec().leak() };
        let weights = safetensors::serialize(Vec::<(&str, safetensors::tensor::TensorView)>::new(), None).unwrap();
        let all = [
            ("config.json", leak(b"{}")),
            ("tokenizer.json", leak(tokenizer_json)),
            ("tokenizer_config.json", leak(config.as_bytes())),
            ("model.safetensors", leak(&weights)),
        ];
        let checkpoint = fourfold::checkpoint::Checkpoint::embedded("toy", &all).unwrap();
        leading_token(&checkpoint, tokenizer).map_err(|e| e.to_string())
    };
    let json = files.require("tokenizer.json").unwrap();
    let (id, name) = (0..).find_map(|id| Some((id, String::from_utf8(tokenizer.token_bytes(id)).ok()?))).unwrap();
    assert_eq!(tokenizer.token_id(&name), Some(id));
    let says = |add: bool, bos: &str| format!(r#"{{"add_bos_token": {add}, "bos_token": {bos}}}"#);
    assert_eq!(with(json, &says(true, &format!("{name:?}"))), Ok(Some(id)));
    assert_eq!(with(json, &says(true, &format!(r#"{{"content": {name:?}}}"#))), Ok(Some(id)));
    assert_eq!(with(json, &says(false, &format!("{name:?}"))), Ok(None));
    assert!(with(json, &says(true, "\"no such token\"")).unwrap_err().contains("not in the vocabulary"));
    assert!(with(json, &says(true, "null")).unwrap_err().contains("no bos_token"));
    let processor = r#"{"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x"}}],
        "special_tokens": {"x": {"ids": [9]}}}}"#;
    assert_eq!(with(processor.as_bytes(), "{}"), Ok(Some(9)));
}

#[test]
fn the_command_prints_a_table_or_json() {
    let dir = std::env::temp_dir().join(format!("fourfold-eval-command-{}", std::process::id()));
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("text.txt"), TEXT).unwrap();
    fs::write(dir.join("bytes.bin"), b"abc\xff").unwrap();
    let fourfold = |args: &[&str]| -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fourfold"));
        command.env_remove("FOURFOLD_MODEL").env_remove("RUST_LOG").current_dir(&dir);
        command.args(args).output().unwrap()
    };
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let (model, common) = (root.join("models/fireside"), ["eval", "--device", "cpu", "--max-tokens", "10"]);
    let output = fourfold(&[&common[..], &["--text", "text.txt"]].concat());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for word in ["perplexity", "bits/byte", "fireside", "9 of 10 tokens", "CPU"] {
        assert!(text.contains(word), "no {word:?} in {text}");
    }
    let reference = ["--text", "text.txt", "--json", "--reference", model.to_str().unwrap()];
    let output = fourfold(&[&common[..], &reference].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((json["kl"]["max"].as_f64(), json["top1_agreement"].as_f64()), (Some(0.0), Some(1.0)));
    assert_eq!(json["model"]["nll"], json["reference"]["nll"]);
    assert_eq!((json["tokens_scored"].as_u64(), json["model"]["perplexity"].as_f64().unwrap() > 1.0), (Some(9), true));

    // What is said of files and caches is said of both: the same model is still no distance from itself.
    let output = fourfold(&[&common[..], &reference, &["--kv", "bf16", "--no-mmap"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let bf16: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((bf16["kl"]["max"].as_f64(), &bf16["reference"]["nll"]), (Some(0.0), &bf16["model"]["nll"]));
    assert_ne!(bf16["model"]["nll"], json["model"]["nll"]);
    // The default model has no scales that could lie in another order; this reference has, row by row.
    let rows = root.join("tests/fixtures/qwen3_moe/modelopt");
    let rows = [&common[..], &["--text", "text.txt", "--swizzled-scales", "--reference", rows.to_str().unwrap()]];
    let output = fourfold(&rows.concat());
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(3) && text.contains("do not say that they are swizzled"), "{text}");

    let prompt: String = TEXT.chars().take(30).collect();
    let trace = ["trace", "--prompt", &prompt, "--device", "cpu", "--stage", "logits", "-o", "t.safetensors"];
    assert!(fourfold(&trace).status.success());
    fs::write(dir.join("start.txt"), &prompt).unwrap();
    let args = ["eval", "--device", "cpu", "--text", "start.txt", "--reference-trace", "t.safetensors"];
    let output = fourfold(&args);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("t.safetensors (reference)") && text.contains("100.00 %"), "{text}");
    for (args, code, word) in [
        (&["--text", "bytes.bin"][..], 3, "UTF-8"),
        (&["--text", "absent.txt"], 3, "absent.txt"),
        (&["--text", "text.txt", "--window", "1"], 2, "window"),
        (&["--text", "text.txt", "--reference", "absent"], 3, "absent"),
        (&["--text", "text.txt", "--reference", "a", "--reference-trace", "b"], 2, "--reference"),
        (&[], 2, "--text"),
    ] {
        let output = fourfold(&[&common[..], args].concat());
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(code) && text.contains(word), "{args:?}: {text}");
    }
    fs::remove_dir_all(dir).unwrap();
}
