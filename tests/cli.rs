//! The binary as a user meets it: what it prints where, and how it ends. Nearly everything runs on the CPU, so that it
//! takes the same time everywhere.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

const STORY: &str = "Once upon a time";

/// The program without what the caller's environment says.
pub fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fourfold"));
    command.env_remove("FOURFOLD_MODEL").env_remove("RUST_LOG").env("FOURFOLD_CACHE", "off").stdin(Stdio::null());
    command
}

pub fn fourfold(args: &[&str]) -> Output {
    program().args(args).output().expect("the binary starts")
}

pub fn out(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).expect("stdout is UTF-8")
}

pub fn err(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).expect("stderr is UTF-8")
}

/// Eight tokens of bare continuation on the CPU, and more flags.
fn raw(flags: &[&str]) -> Output {
    let common = ["run", "--raw", STORY, "--device", "cpu", "-n", "8"];
    let output = fourfold(&[&common, flags].concat());
    assert!(output.status.success(), "{flags:?}: {}", err(&output));
    assert!(out(&output).starts_with(STORY) && out(&output).trim().len() > STORY.len() + 8, "{:?}", out(&output));
    output
}

#[track_caller]
pub fn fails(args: &[&str], code: i32, words: &[&str]) -> Output {
    let output = fourfold(args);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {}", err(&output));
    for word in words {
        assert!(err(&output).contains(word), "{args:?} does not say {word:?}: {}", err(&output));
    }
    output
}

pub fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

#[test]
fn greedy_repeats_and_the_place_of_stages_does_not_matter() {
    let first = raw(&["--greedy"]);
    assert_eq!(out(&first), out(&raw(&["--greedy", "-q", "--no-mmap", "--chunk", "1"])));
    assert_eq!(out(&first), out(&raw(&["--greedy", "--host", "routing,scatter,attention"])));
    if crate::harness::gpu().is_some() {
        let on_gpu = ["run", "--raw", STORY, "--device", "gpu", "-n", "8", "--greedy"];
        for host in [&[][..], &["--host", "routing"], &["--host", "routing,scatter,attention"]] {
            let output = fourfold(&[&on_gpu, host].concat());
            assert_eq!(out(&output), out(&first), "{host:?}: {}", err(&output));
        }
    }
    assert!(err(&first).contains(" · greedy"), "{}", err(&first));
}

#[test]
fn seeds_decide_the_text() {
    let texts: Vec<String> = ["7", "7", "8"].iter().map(|seed| out(&raw(&["--seed", seed])).to_owned()).collect();
    assert_eq!(texts[0], texts[1]);
    assert_ne!(texts[0], texts[2]);
    assert_ne!(texts[0], out(&raw(&["--seed", "7", "--stream", "1"])));
    // Without one, the closing line tells the seed that repeats the run.
    let chosen = raw(&[]);
    let line = err(&chosen).lines().last().expect("there is a closing line");
    let seed = line.rsplit("seed ").next().expect("it ends with the seed");
    assert_eq!(out(&chosen), out(&raw(&["--seed", seed])));
}

#[test]
fn drafts_change_the_closing_line_and_nothing_else() {
    for draw in [&["--greedy"][..], &["--seed", "7", "--repetition-penalty", "1.1"]] {
        let plain = raw(draw);
        for draft in ["off", "auto", "ngram"] {
            let output = raw(&[draw, &["--draft", draft]].concat());
            assert_eq!(out(&output), out(&plain), "--draft {draft}");
            assert_eq!(err(&output).contains("drafted"), draft != "off", "{}", err(&output));
        }
    }
    // The built-in model from its files, as its own draft: everything is right.
    let own = root("models/fireside").display().to_string();
    let output = raw(&["--greedy", "--draft", &own, "--draft-tokens", "3"]);
    assert_eq!(out(&output), out(&raw(&["--greedy"])));
    let told = "5 drafted, 5 accepted (100 100 100 % by place), 3.50 tokens a step in 2 steps";
    assert!(err(&output).contains(told), "{}", err(&output));
    // A draft whose files have no tokenizer.
    let small = root("models/fireside-draft").display().to_string();
    let output = raw(&["--greedy", "--model", &own, "--draft", &small, "--draft-tokens", "3"]);
    assert_eq!(out(&output), out(&raw(&["--greedy"])));
    assert!(err(&output).contains("drafted"), "{}", err(&output));
    // `auto` never fails: another model, rows of a step that change each other, a step that has one row.
    let modelopt = root("tests/fixtures/qwen3_moe/modelopt").display().to_string();
    let other = ["run", "--model", &modelopt, "--device", "cpu", "-n", "8", "x", "--draft"];
    let output = fourfold(&[&other[..], &["auto"]].concat());
    assert!(output.status.success() && err(&output).contains("drafted"), "{}", err(&output));
    let dynamic = ["--activations", "nvfp4-dynamic"];
    let output = fourfold(&[&other[..], &["auto"], &dynamic].concat());
    assert!(output.status.success() && !err(&output).contains("drafted"), "{}", err(&output));
    fails(&[&other[..], &["ngram"], &dynamic].concat(), 2, &["draft", "nvfp4-token"]);
    assert_eq!(out(&raw(&["--greedy", "--draft", "auto", "--chunk", "1"])), out(&raw(&["--greedy"])));
    // Drafts that cannot be.
    let common = ["run", "--raw", STORY, "--device", "cpu", "-n", "8"];
    let other = root("tests/fixtures/gpt_oss/tiny").display().to_string();
    fails(&[&common[..], &["--draft", &other]].concat(), 2, &["draft", "tokenizer.json", "ngram"]);
    fails(&[&common[..], &["--draft", "/no/such/model"]].concat(), 3, &["/no/such/model"]);
    fails(&[&common[..], &["--draft", "ngram", "--draft-tokens", "16"]].concat(), 2, &["draft-tokens", "1 to 15"]);
    fails(&[&common[..], &["--draft-tokens", "3"]].concat(), 2, &["--draft auto"]);
}

#[test]
fn the_closing_line_says_what_it_took() {
    let output = raw(&["--seed", "7"]);
    let line = err(&output).trim();
    for part in ["prompt tokens at ", "/s · 8 tokens at ", "/s · first after ", " s after start) · CPU", " · seed 7"]
    {
        assert!(line.contains(part), "no {part:?} in {line:?}");
    }
    assert_eq!(line.lines().count(), 1, "{line}");
    assert_eq!(err(&raw(&["-q"])), "");
}

#[test]
fn log_probabilities_are_listed_on_stderr() {
    let output = raw(&["--greedy", "-q", "--logprobs", "2"]);
    assert_eq!(out(&output), out(&raw(&["--greedy", "-q"])));
    let rows: Vec<&str> = err(&output).lines().skip(1).collect();
    assert_eq!(rows.len(), 8, "{}", err(&output));
    for row in rows {
        let logprob: f64 = row.split_whitespace().nth(1).expect("the second column").parse().expect("a number");
        assert!(logprob <= 0.0, "{row}");
    }
    fails(&["run", "--logprobs", "2", "hello"], 2, &["--raw"]);
}

#[test]
fn a_prompt_may_come_from_stdin() {
    let mut child = program()
        .args(["run", "--raw", "--device", "cpu", "-n", "8", "--greedy", "-q"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(format!("{STORY}\n").as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(out(&output), out(&raw(&["--greedy"])));
}

#[test]
fn with_nothing_to_go_by_it_tells_a_story() {
    let output = fourfold(&["run", "--device", "cpu", "-n", "8"]);
    assert!(output.status.success() && out(&output).starts_with(STORY), "{output:?}");
    let mut child = program().stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut begin = [0; STORY.len()];
    child.stdout.as_mut().unwrap().read_exact(&mut begin).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(begin, STORY.as_bytes());
    // Another model is not made to.
    fails(&["run", "--model", &root("tests/fixtures/gpt_oss/tiny").display().to_string()], 2, &["no prompt"]);
}

#[test]
fn a_chat_answers_without_control_tokens() {
    let args = ["run", "Tell me a story about a fox.", "--device", "cpu", "--greedy", "-n", "16"];
    let output = fourfold(&[&args[..], &["--system", "Be brief."]].concat());
    assert!(output.status.success(), "{}", err(&output));
    assert!(!out(&output).trim().is_empty() && !out(&output).contains("<|"), "{:?}", out(&output));
    assert_ne!(out(&output), out(&fourfold(&args)));
}

#[test]
fn bad_usage_is_code_2() {
    fails(&["run", "--no-such-flag"], 2, &["--no-such-flag"]);
    fails(&["no-such-command"], 2, &["no-such-command"]);
    fails(&["run", "--device", "tpu"], 2, &["tpu", "auto"]);
    fails(&["run", "--host", "routing,sums"], 2, &["sums", "scatter"]);
    fails(&["run", "--activations", "fp8"], 2, &["fp8", "nvfp4-static"]);
    fails(&["run", "--device", "cpu", "--activations", "nvfp4-token", "x"], 2, &["activations", "NVFP4 weights"]);
    fails(&["probe", "--activations", "nvfp4-dynamic", "--prompt", "x"], 2, &["neighbours", "nvfp4-token"]);
    fails(&["run", "--temperature=-1", "x"], 2, &["temperature", "0 (greedy) or more"]);
    fails(&["run", "--top-p", "1.5", "x"], 2, &["top_p"]);
    fails(&["run", "--greedy", "--seed", "1", "x"], 2, &["--greedy", "--seed"]);
    fails(&["run", "--raw", "--system", "x", "y"], 2, &["--raw", "--system"]);
    fails(&["run", "--device", "cpu", "--adapter", "x", "y"], 2, &["--adapter"]);
    fails(&["run", " "], 2, &["prompt is empty"]);
    fails(&["run", "--top-p", "-1", "x"], 2, &["top_p"]);
    fails(&["run", "-n", "-1", "x"], 2, &["'-1'", "--max-tokens"]);
    fails(&["run", "--date", "2026-02-30", "x"], 2, &["--date", "YYYY-MM-DD"]);
    fails(&["run", "--draft", "", "x"], 2, &["--draft", "no directory"]);
    let huge = u64::MAX.to_string();
    fails(&["run", "--device", "cpu", "--context", &huge, "x"], 2, &["context", &huge, "1024"]);
    for flag in ["--depth", "--tokens", "--prefill", "--batch"] {
        fails(&["bench", "--device", "cpu", flag, &huge], 2, &[flag, &huge]);
    }
    fails(&["verify", "--device", "cpu", "--only", "steps", "--prompt-tokens", &huge], 2, &["--prompt-tokens"]);
    fails(&["run", "--device", "cpu", "--context", "99999", "x"], 2, &["context", "1024"]);
}

#[test]
fn a_bad_checkpoint_is_code_3() {
    let absent = "/no/such/model";
    for args in [&["run", "--model", absent, "hello"][..], &["inspect", absent]] {
        let output = fails(args, 3, &[absent, "is not there"]);
        assert_eq!(err(&output).lines().count(), 1, "{}", err(&output));
    }
    let output = program().args(["run", "hello"]).env("FOURFOLD_MODEL", absent).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", err(&output));
    // A checkpoint without a tokenizer takes no text.
    let tiny = root("tests/fixtures/gpt_oss/tiny").display().to_string();
    fails(&["run", "--model", &tiny, "--device", "cpu", "hello"], 3, &["tokenizer.json"]);
}

/// Both decide what is drawn, so a run by them is the run by such flags.
#[test]
fn where_flags_are_silent_the_checkpoint_says_how_tokens_are_drawn() {
    let dir = std::env::temp_dir().join(format!("fourfold-cli-generation-{}", std::process::id()));
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    for entry in fs::read_dir(root("models/fireside")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), dir.join(entry.file_name())).unwrap();
    }
    let said = r#"{"do_sample": true, "temperature": 1.5, "min_p": 0.2, "repetition_penalty": 1.7}"#;
    fs::write(dir.join("generation_config.json"), said).unwrap();
    let model = dir.display().to_string();
    let run = |flags: &[&str]| {
        let all = ["run", "--raw", STORY, "--device", "cpu", "--seed", "5", "-n", "40", "--top-k", "0"];
        let output = fourfold(&[&all, flags].concat());
        assert!(output.status.success(), "{flags:?}: {}", err(&output));
        out(&output).to_owned()
    };
    let flags = ["--temperature", "1.5", "--min-p", "0.2", "--repetition-penalty", "1.7"];
    let by_file = run(&["--model", &model]);
    assert_eq!(by_file, run(&flags));
    for (flag, off) in [("--min-p", "0"), ("--repetition-penalty", "1")] {
        assert_ne!(by_file, run(&["--model", &model, flag, off]), "{flag} decides nothing here");
    }
    fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn what_is_there_is_not_lost() {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kept");
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    let at = |name: &str| dir.join(name).display().to_string();
    let tiny = root("tests/fixtures/gpt_oss/tiny").display().to_string();
    let trace = |to: &str, more: &[&str]| {
        let args = ["trace", "--model", &tiny, "--device", "cpu", "--tokens", "1,2,3", "-o", to];
        args.iter().chain(more).map(|arg| (*arg).to_owned()).collect::<Vec<String>>()
    };
    let refused = |to: &str, more: &[&str], code: i32, words: &[&str]| {
        let args = trace(to, more);
        fails(&args.iter().map(String::as_str).collect::<Vec<_>>(), code, words)
    };
    refused(&at("no/folder/a.st"), &[], 2, &["folder is not there"]);
    refused(&at(""), &["--force"], 2, &["no regular file"]);
    refused(&at("a.st"), &["-n", "100000"], 4, &["100003"]);
    let done = fourfold(&trace(&at("a.st"), &[]).iter().map(String::as_str).collect::<Vec<_>>());
    assert!(done.status.success(), "{}", err(&done));
    let before = fs::read(at("a.st")).unwrap();
    fails(&["diff", &at("a.st"), &at("a.st"), "--html", &at("a.st")], 2, &["--html", "one of the traces"]);
    fails(&["diff", &at("a.st"), &at("a.st"), "--tolerance", "no.such=1"], 2, &["--tolerance", "no.such"]);
    fails(&["diff", &at("a.st"), &at("a.st"), "--layers", "99"], 2, &["--layers"]);
    assert!(fs::read(at("a.st")).unwrap() == before);
    fs::write(at("nothing.txt"), "").unwrap();
    fails(&["eval", "--text", &at("nothing.txt")], 3, &["nothing.txt", "is empty"]);
    #[cfg(unix)]
    {
        use std::os::unix::fs::{FileTypeExt, PermissionsExt};
        // Who may read it is as before, through a link as well; what is no file stays what it is.
        fs::set_permissions(at("a.st"), fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink(at("a.st"), at("link.st")).unwrap();
        let done = fourfold(&trace(&at("link.st"), &["--force"]).iter().map(String::as_str).collect::<Vec<_>>());
        assert!(done.status.success(), "{}", err(&done));
        assert!(Path::new(&at("link.st")).is_symlink());
        assert_eq!(fs::metadata(at("a.st")).unwrap().permissions().mode() & 0o777, 0o640);
        assert!(Command::new("mkfifo").arg(at("pipe")).status().unwrap().success());
        refused(&at("pipe"), &["--force"], 2, &["no regular file"]);
        assert!(fs::metadata(at("pipe")).unwrap().file_type().is_fifo());
        fails(&["diff", &at("pipe"), &at("a.st")], 2, &["no file"]);
        fails(&["eval", "--text", "/dev/zero"], 3, &["/dev/zero", "16 MiB"]);
    }
}

#[test]
fn a_full_context_is_code_4() {
    let output = fails(&["run", "--device", "cpu", "--context", "2", "Why is the sky blue?"], 4, &["context holds 2"]);
    assert_eq!(out(&output), "");
    // What was said before it was full stays said.
    let output = fails(&["run", "--raw", STORY, "--device", "cpu", "--context", "12"], 4, &["context holds 12"]);
    assert!(out(&output).len() > STORY.len() && out(&output).ends_with('\n'), "{:?}", out(&output));
}

/// Parameters of a gpt-oss with this config, from the shapes of its tensors: all, and those that one token uses.
fn parameters(config: &Value) -> [u64; 2] {
    let n = |key: &str| config[key].as_u64().unwrap_or_else(|| panic!("config.json has a number {key}"));
    let [d, f, e] = [n("hidden_size"), n("intermediate_size"), n("num_local_experts")];
    let (h, hk, dh) = (n("num_attention_heads"), n("num_key_value_heads"), n("head_dim"));
    let attention = (h + 2 * hk) * dh * (d + 1) + h * dh * d + d + h;
    let expert = 2 * f * (d + 1) + d * (f + 1);
    let layer = |experts: u64| attention + 2 * d + e * (d + 1) + experts * expert;
    let [layers, embedding] = [n("num_hidden_layers"), n("vocab_size") * d];
    [2 * embedding + d + layers * layer(e), embedding + d + layers * layer(n("num_experts_per_tok"))]
}

fn millions(n: u64) -> String {
    if n >= 1_000_000 { format!("{:.1} M", n as f64 / 1e6) } else { format!("{:.1} k", n as f64 / 1e3) }
}

#[test]
fn inspect_shows_what_a_checkpoint_holds() {
    let tiny = root("tests/fixtures/gpt_oss/tiny");
    for (args, config) in [
        (vec!["inspect"], root("models/fireside/config.json")),
        (vec!["inspect", tiny.to_str().unwrap()], tiny.join("config.json")),
    ] {
        let output = fourfold(&args);
        assert!(output.status.success(), "{}", err(&output));
        let config: Value = serde_json::from_slice(&fs::read(config).unwrap()).unwrap();
        assert_eq!(config["tie_word_embeddings"], false);
        let [all, active] = parameters(&config).map(millions);
        let line = format!("{all} parameters, of which a token uses {active}");
        let [e, f, d] = ["num_local_experts", "intermediate_size", "hidden_size"].map(|k| config[k].as_u64().unwrap());
        let scales = format!("[{e}, {}, {}]", 2 * f, d / 32);
        let name = "model.layers.0.mlp.experts.gate_up_proj_scales";
        for words in [&line, &scales, name, "KV cache", "experts", "MXFP4", "BF16"] {
            assert!(out(&output).contains(words), "no {words:?} in:\n{}", out(&output));
        }
        let every = fourfold(&[&args[..], &["--all"]].concat());
        assert!(out(&every).contains("model.layers.1.mlp.experts.down_proj_bias"));
    }
}

/// Name, place, scale byte and reason of each suspicious scale that a report lists.
fn suspects(report: &str) -> Vec<[&str; 4]> {
    let Some((_, listed)) = report.split_once(" suspicious scale") else { return Vec::new() };
    let rows = listed.lines().skip(2).take_while(|line| !line.is_empty());
    rows.map(|row| {
        let columns: Vec<&str> = row.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect();
        [columns[0], columns[1], columns[2], columns[4]]
    })
    .collect()
}

#[test]
fn inspect_lists_suspicious_scales_and_says_what_is_refused() {
    let dir = std::env::temp_dir().join(format!("fourfold-cli-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    for file in fs::read_dir(root("tests/fixtures/gpt_oss/tiny")).unwrap().map(Result::unwrap) {
        fs::copy(file.path(), dir.join(file.file_name())).unwrap();
    }
    // The second scale of layer 1's down projection becomes NaN.
    let shard = fs::read_dir(&dir).unwrap().map(|f| f.unwrap().path()).find_map(|path| {
        let bytes = fs::read(&path).ok().filter(|_| path.extension().is_some_and(|e| e == "safetensors"))?;
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let json: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
        let at = json["model.layers.1.mlp.experts.down_proj_scales"]["data_offsets"][0].as_u64()?;
        Some((path, bytes, 8 + header + at as usize))
    });
    let (path, mut bytes, at) = shard.expect("a shard holds the scales");
    bytes[at + 1] = 255;
    fs::write(path, bytes).unwrap();
    let output = fails(&["inspect", dir.to_str().unwrap()], 3, &["down_proj_scales", "[0, 0, 1]", "NaN"]);
    fs::remove_dir_all(&dir).unwrap();
    assert!(out(&output).contains("would refuse this model"), "{}", out(&output));
    let found = suspects(out(&output));
    let (nan, others): (Vec<&[&str; 4]>, Vec<&[&str; 4]>) = found.iter().partition(|[.., why]| *why == "NaN");
    assert_eq!(nan, [&["model.layers.1.mlp.experts.down_proj_scales", "[0, 0, 1]", "255", "NaN"]]);
    // The fixture has one block of each expert tensor that is a hundred powers of two too small, and it has blocks of
    // zeros and of minus zeros with scale 0, which are all right.
    assert_eq!(others.len(), 8, "{others:?}");
    for [name, place, _, why] in others {
        let want = if name.ends_with("down_proj_scales") { "[7, 127, 3]" } else { "[7, 255, 3]" };
        assert!(*place == want && why.starts_with("2^-10"), "{name} {place} {why}");
    }
    let report = fourfold(&["inspect"]);
    assert!(out(&report).contains("no suspicious scale in any layer"), "{}", out(&report));
}

#[test]
fn synth_says_what_it_does_not_make() {
    let dir = std::env::temp_dir().join(format!("fourfold-cli-synth-{}", std::process::id()));
    let dst = dir.to_str().unwrap();
    fails(&["synth", "--shape", "gpt-5", dst], 2, &["gpt-oss-20b", "qwen3-30b-a3b"]);
    fails(&["synth", "--shape", "gpt-oss-20b", "--format", "bf16", dst], 2, &["format", "mxfp4 or nvfp4"]);
    fails(&["synth", "--shape", "qwen3-30b-a3b", "--layers", "49", dst], 2, &["layers", "1 to 48"]);
    assert!(!dir.exists());
    fails(&["synth", "--shape", "gpt-oss-20b", "--layers", "1", env!("CARGO_MANIFEST_DIR")], 2, &["is not empty"]);
}

#[test]
fn devices_are_listed_and_their_absence_is_no_error() {
    let output = fourfold(&["devices"]);
    assert!(output.status.success(), "{}", err(&output));
    assert!(out(&output).contains("CPU") && out(&output).contains("auto"), "{}", out(&output));
    // A Vulkan loader that is shown no driver finds none.
    let output = program().arg("devices").env("VK_DRIVER_FILES", "/none").env("VK_ICD_FILENAMES", "/none").output();
    let output = output.unwrap();
    assert!(output.status.success());
    if cfg!(target_os = "linux") {
        assert!(out(&output).contains("mesa-vulkan-drivers"), "{}", out(&output));
    }
}

#[test]
fn help_teaches_and_completions_are_scripts() {
    let output = fourfold(&["--help"]);
    for words in ["Examples:", "Exit codes:", "fourfold run --raw", "inspect", "devices", "completions"] {
        assert!(out(&output).contains(words), "no {words:?} in:\n{}", out(&output));
    }
    for words in
        ["Examples:", "[default: auto]", "FOURFOLD_MODEL", "--repetition-penalty", "/help", "qwen3_moe, qwen3 or llama"]
    {
        let output = fourfold(&["run", "--help"]);
        let help: Vec<&str> = out(&output).split_whitespace().collect();
        assert!(help.join(" ").contains(words), "no {words:?} in:\n{}", out(&output));
    }
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let output = fourfold(&["completions", shell]);
        assert!(output.status.success() && out(&output).contains("max-tokens"), "{shell}: {}", err(&output));
    }
    let script = fourfold(&["completions", "bash"]).stdout;
    let bash = Command::new("bash").arg("-n").stdin(Stdio::piped()).spawn();
    // Where there is no bash, there is nobody to complete for.
    if let Ok(mut bash) = bash {
        bash.stdin.take().unwrap().write_all(&script).unwrap();
        assert!(bash.wait().unwrap().success());
    }
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    for args in [&["run", "--raw", STORY, "--device", "cpu", "-n", "50"][..], &["inspect", "--all"], &["devices"]] {
        let mut child = program().args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{args:?}: {output:?}");
        assert!(
            !err(&output).contains("panicked") && !err(&output).contains("roken pipe"),
            "{args:?}: {}",
            err(&output)
        );
    }
    // Nor does it change the verdict, of a checkpoint with a NaN where only the logits would show it.
    let dir = std::env::temp_dir().join(format!("fourfold-cli-nan-{}", std::process::id()));
    let _ = fs::remove_dir_all(&dir);
    crate::models::copy_to_write("tiny", &dir);
    let name = "lm_head.weight";
    let hit = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).any(|path| {
        let Ok(mut bytes) = fs::read(&path) else { return false };
        let Ok((length, header)) = safetensors::SafeTensors::read_metadata(&bytes) else { return false };
        let Some(info) = header.info(name) else { return false };
        let at = 8 + length + info.data_offsets.0 + 20;
        bytes[at..at + 2].copy_from_slice(&[0xc0, 0x7f]);
        fs::write(&path, bytes).unwrap();
        true
    });
    assert!(hit);
    let mut child = program().arg("inspect").arg(&dir).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(err(&output).contains(name) && err(&output).contains("element 10 "), "{}", err(&output));
    fs::remove_dir_all(&dir).unwrap();
    // JSON is written by another's hand.
    let args = ["oracle", "--device", "cpu", "--quick", "--json"];
    let mut child = program().args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[cfg(unix)]
#[test]
fn an_interrupt_in_a_pipe_ends_with_130() {
    let args = ["run", "--raw", STORY, "--device", "cpu", "-n", "900"];
    let mut child = program().args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut begin = [0; STORY.len() + 1];
    child.stdout.as_mut().unwrap().read_exact(&mut begin).unwrap();
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", err(&output));
    assert!(err(&output).trim().ends_with("stopped"), "{}", err(&output));
}

#[test]
fn the_lab_from_the_command_line() {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("lab");
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    let file = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let (a, b, few, stats) =
        (file("a.safetensors"), file("b.safetensors"), file("few.safetensors"), file("s.safetensors"));
    let trace = |out: &str, more: &[&str]| {
        let output = fourfold(&[&["trace", "--prompt", STORY, "--device", "cpu", "-o", out], more].concat());
        assert!(output.status.success(), "{}", err(&output));
    };
    trace(&a, &["-n", "3"]);
    trace(&b, &["-n", "3", "--chunk", "2"]);
    trace(&few, &["--layers", "1-2", "--stage", "*mlp*", "--positions", "1,3"]);
    trace(&stats, &["--stats"]);
    fails(&["trace", "--prompt", STORY, "--device", "cpu", "-o", &a], 2, &["--force"]);
    fails(&["trace", "--prompt", STORY, "--layers", "4-2", "-o", "x"], 2, &["4-2"]);
    fails(
        &["trace", "--prompt", STORY, "--device", "cpu", "--stage", "typo", "-o", &file("no")],
        2,
        &["nothing to write"],
    );
    fails(&["bisect", "--prompt", STORY, "--device", "cpu"], 2, &["both sides are the CPU twins"]);
    fails(&["bisect", "--prompt", STORY, "--device", "cpu", "--against", &a, "--tolerance", "nan"], 2, &["tolerance"]);
    // A trace of a few positions and stages judges those, and no more.
    let partly = fourfold(&["bisect", "--prompt", STORY, "--device", "cpu", "--against", &few, "--all"]);
    assert!(partly.status.success() && out(&partly).contains("layers.2.mlp.out"), "{}{}", out(&partly), err(&partly));
    // Statistics are those of the values in the full trace.
    let again = file("again.safetensors");
    trace(&again, &["--stats"]);
    let equal = fourfold(&["diff", &stats, &again]);
    assert!(equal.status.success(), "{}{}", out(&equal), err(&equal));
    let full = fourfold::trace::file::TraceFile::open(Path::new(&a)).unwrap();
    let told = fourfold::trace::file::TraceFile::open(Path::new(&stats)).unwrap();
    let fourfold::trace::file::Values::F32(values) = full.tensor("layers.1.mlp.out").unwrap().values else { panic!() };
    let values = &values[..4 * 320]; // of the prompt: the full trace goes on
    let step = &told.stats("layers.1.mlp.out").unwrap()[0].stats;
    let sum: f32 = values.iter().sum();
    let squares: f32 = values.iter().map(|v| v * v).sum();
    let least = values.iter().copied().fold(f32::MAX, f32::min);
    let largest = values.iter().copied().fold(f32::MIN, f32::max);
    assert_eq!((step[0], step[3], step[4], step[5], step[6]), (1280.0, least, largest, 0.0, 0.0));
    assert!((step[1] - sum).abs() < 1e-2 && (step[2] / squares - 1.0).abs() < 1e-4, "{step:?} {sum} {squares}");
    let same = fourfold(&["diff", &a, &b]);
    assert!(same.status.success() && out(&same).contains("99 stages"), "{}{}", out(&same), err(&same));
    let part = fourfold(&["diff", &a, &few]);
    assert!(part.status.success() && out(&part).contains("14 stages"), "{}{}", out(&part), err(&part));
    let bisect = fourfold(&["bisect", "--prompt", STORY, "--device", "cpu", "--against", &a]);
    assert!(bisect.status.success() && out(&bisect).contains("No stage"), "{}{}", out(&bisect), err(&bisect));
    // Another prompt's trace is no reference.
    let other = fourfold(&["bisect", "--prompt", "In a dark wood", "--device", "cpu", "--against", &a]);
    assert!(!other.status.success(), "{}", out(&other));
    let probe = fourfold(&["probe", "--prompt", STORY, "--device", "cpu"]);
    assert!(probe.status.success() && out(&probe).matches("equal bits").count() >= 8, "{}", out(&probe));
}
