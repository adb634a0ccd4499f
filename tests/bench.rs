//! `fourfold bench` as a user meets it: what its JSON holds, its charts, and what it refuses.

use crate::cli::{err, fails, fourfold, out, root};
use crate::harness::gpus;
use fourfold::ops::NormLinear;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// The devices that the program can be told to take here.
fn devices() -> Vec<&'static str> {
    if crate::harness::gpu().is_some() { vec!["cpu", "gpu"] } else { vec!["cpu"] }
}

fn tiny() -> String {
    root("tests/fixtures/gpt_oss/tiny").display().to_string()
}

fn report(args: &[&str]) -> Value {
    let output = fourfold(&[&["bench", "--json", "-q"], args].concat());
    assert!(output.status.success(), "{args:?}: {}", err(&output));
    serde_json::from_str(out(&output)).unwrap()
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("no number {key} in {value}"))
}

/// Median between least and most, a rate that goes with it, and a floor exactly where reading was timed.
fn check_figure(figure: &Value, tokens: f64, report: &Value) {
    let [least, median, most] = ["least_seconds", "median_seconds", "most_seconds"].map(|key| number(figure, key));
    assert!(0.0 < least && least <= median && median <= most, "{figure}");
    assert!((number(figure, "tokens_per_second") * median / tokens - 1.0).abs() < 1e-9, "{figure}");
    assert!(number(figure, "repetitions") >= 3.0, "{figure}");
    if let (Some(bytes), Some(ceiling)) = (figure["bytes"].as_f64(), report["read_bytes_per_second"].as_f64()) {
        assert!((number(figure, "floor_seconds") * ceiling / bytes - 1.0).abs() < 1e-9, "{figure}");
    } else {
        assert!(figure["floor_seconds"].is_null(), "{figure}");
    }
}

/// Every tag that opens is closed, in order; every attribute is quoted; nothing comes from elsewhere.
fn check_markup(text: &str) {
    let mut open: Vec<&str> = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find('<') {
        assert!(!rest[..at].contains('>'), "a bare > in {:?}", &rest[..at]);
        let end = at + rest[at..].find('>').expect("a tag ends");
        let tag = &rest[at + 1..end];
        rest = &rest[end + 1..];
        let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap();
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "</{name}>");
        } else if !tag.ends_with('/') && !tag.starts_with('!') {
            open.push(name);
        }
        assert!(tag.matches('"').count().is_multiple_of(2), "<{tag}>");
    }
    assert!(open.is_empty(), "never closed: {open:?}");
    for word in ["<script", "href=", "src=", "url(", "@import"] {
        assert!(!text.contains(word), "the chart has {word}");
    }
}

fn file(name: &str) -> PathBuf {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_file(&file);
    file
}

#[test]
fn figures_of_prompts_decoding_and_batches() {
    for device in devices() {
        for end in ["svg", "html"] {
            let chart = file(&format!("bench-{device}.{end}"));
            let common =
                ["--model", &tiny(), "--device", device, "--prefill", "5,20", "--depth", "0,20", "--tokens", "3"];
            let more = ["--batch", "1,3", "--profile", "--chart", chart.to_str().unwrap()];
            let report = report(&[&common[..], &more].concat());
            for key in ["model", "device", "driver"] {
                assert!(report[key].is_string(), "{key} in {report}");
            }
            let figures = report["figures"].as_array().unwrap();
            let [prompts, steps] =
                ["prefill", "decode"].map(|what| figures.iter().filter(|f| f["what"] == what).collect::<Vec<_>>());
            assert_eq!((prompts.len(), steps.len(), figures.len()), (2, 4, 6), "{report}");
            prompts.iter().for_each(|f| check_figure(f, number(f, "tokens"), &report));
            steps.iter().for_each(|f| check_figure(f, number(f, "batch"), &report));
            // Three sequences read all matrices once, and three caches.
            let bytes = |depth: u64, batch: u64| {
                let figure = steps.iter().find(|f| f["depth"] == depth && f["batch"] == batch);
                number(figure.unwrap(), "bytes")
            };
            assert!(bytes(20, 3) > bytes(20, 1) && bytes(20, 3) < 3.0 * bytes(20, 1), "{report}");
            assert!(bytes(20, 1) > bytes(0, 1), "{report}");
            // With a clock there are a floor and a profile, without one the reasons.
            let profiles = report["profiles"].as_array().unwrap();
            if report["no_profile"].is_null() {
                assert!(report["no_floor"].is_null() && number(&report, "read_bytes_per_second") > 0.0, "{report}");
                assert_eq!(profiles.iter().map(|p| number(p, "rows")).collect::<Vec<_>>(), [1.0, 3.0]);
                // One row takes the fused kernels, where so many buffers can be bound.
                let fuses = gpus().iter().all(|(_, gpu)| gpu.limits().max_storage_buffers >= NormLinear::BINDINGS);
                let one = if fuses { "norm_moe_up" } else { "moe_up" };
                for (profile, kernel) in profiles.iter().zip([one, "moe_up"]) {
                    let launches = profile["launches"].as_array().unwrap();
                    assert!(launches.iter().any(|l| l["kernel"] == kernel) && launches.len() > 15, "{launches:?}");
                }
            } else {
                assert!(profiles.is_empty() && report["read_bytes_per_second"].is_null(), "{report}");
                for key in ["no_profile", "no_floor"] {
                    assert!(report[key].as_str().unwrap().contains("time"), "{report}");
                }
            }
            let text = std::fs::read_to_string(&chart).unwrap();
            check_markup(&text);
            for words in ["decode at 20, 3 at once", "prefill 5", "prefers-color-scheme: dark"] {
                assert!(text.contains(words), "no {words:?} in {text}");
            }
        }
    }
}

#[test]
fn steps_of_the_scheduler_beside_plain_ones() {
    for device in devices() {
        let common = ["--model", &tiny(), "--device", device, "--prefill", "5", "--depth", "20", "--tokens", "3"];
        let report = report(&[&common[..], &["--batch", "1,3", "--plain"]].concat());
        let figures = &report["figures"].as_array().unwrap()[1..];
        let what: Vec<&str> = figures.iter().map(|f| f["what"].as_str().unwrap()).collect();
        assert_eq!(what, ["decode", "scheduler", "plain", "decode", "plain"]);
        figures.iter().for_each(|f| check_figure(f, number(f, "batch"), &report));
        for at in [2, 4] {
            let [scheduled, plain] = [at - 1, at].map(|at| number(&figures[at], "median_seconds"));
            assert!((number(&figures[at], "scheduler_over_plain") * plain / scheduled - 1.0).abs() < 1e-9, "{report}");
            assert_eq!(figures[at - 1]["bytes"], figures[at]["bytes"], "they do not do the same");
        }
    }
}

#[test]
fn drawn_tokens_are_measured_too() {
    for device in devices() {
        let common = ["--model", &tiny(), "--device", device, "--prefill", "5", "--tokens", "3", "--batch", "1,2"];
        let chances = ["--temperature", "0.5", "--top-k", "40", "--top-p", "0.75", "--min-p", "0.25", "--plain"];
        let drawn = report(&[&common[..], &chances].concat());
        let figures = &drawn["figures"].as_array().unwrap()[1..];
        assert_eq!(figures.len(), 5, "{drawn}");
        for figure in figures {
            check_figure(figure, number(figure, "batch"), &drawn);
            let flags = ["temperature", "top_k", "top_p", "min_p"].map(|key| number(figure, key));
            assert_eq!(flags, [0.5, 40.0, 0.75, 0.25]);
        }
        let greedy = report(&common);
        assert_eq!(greedy["figures"][1]["temperature"], 0.0);
    }
}

#[test]
fn experts_alone() {
    for device in devices() {
        for role in ["decode", "prompt"] {
            let common = ["--model", &tiny(), "--device", device, "--kernel", "moe", "--tokens", "1,5", "--role", role];
            let report = report(&common);
            let figures = report["figures"].as_array().unwrap();
            assert_eq!(figures.len(), 2, "{report}");
            for (figure, tokens) in figures.iter().zip([1.0, 5.0]) {
                assert_eq!((&figure["what"], &figure["role"]), (&"moe".into(), &role.into()));
                check_figure(figure, tokens, &report);
            }
            // One row goes to 4 experts of the 8; five rows with inputs of their own to more.
            let [one, five] = [0, 1].map(|i| number(&figures[i], "experts"));
            assert!(one == 4.0 && five > 5.0 && five <= 8.0, "{report}");
            let [first, second] = [0, 1].map(|i| number(&figures[i], "bytes"));
            assert!((second / first - five / one).abs() < 1e-3, "{report}");
        }
    }
}

#[test]
fn the_built_in_model_in_a_table() {
    let output =
        fourfold(&["bench", "--device", "cpu", "--prefill", "4", "--tokens", "2", "--batch", "2", "--profile"]);
    assert!(output.status.success(), "{}", err(&output));
    for words in ["tokens/s", "least to most", "prefill 4", "decode at 0, 2 at once", "no floor", "no profile"] {
        assert!(out(&output).contains(words), "no {words:?} in {}", out(&output));
    }
}

#[test]
fn bad_flags_are_code_2() {
    let with = |more: &[&str], words: &[&str]| {
        fails(&[&["bench", "--device", "cpu", "--model", &tiny()], more].concat(), 2, words);
    };
    with(&["--batch", "0"], &["--batch", "above zero"]);
    with(&["--temperature=-1"], &["temperature", "0 (greedy) or more"]);
    with(&["--top-p", "1.5"], &["top_p", "0 to 1"]);
    with(&["--batch", "1,x"], &["--batch", "above zero"]);
    with(&["--kernel", "x"], &["--kernel", "moe"]);
    with(&["--tokens", "1,2"], &["--tokens", "--kernel"]);
    with(&["--tokens", "0", "--kernel", "moe"], &["--tokens", "above zero"]);
    with(&["--tokens", "2049", "--kernel", "moe"], &["tokens", "2049", "1 to 2048"]);
    with(&["--role", "prompt"], &["--kernel"]);
    with(&["--kernel", "moe", "--batch", "2"], &["--kernel", "--batch"]);
    with(&["--kernel", "moe", "--profile"], &["--kernel", "--profile"]);
    with(&["--batch", "1025", "--tokens", "1", "--prefill", "1"], &["sessions", "1025", "1 to 1024"]);
    with(&["--chart", "x.png"], &["--chart", ".svg"]);
    let dense = root("tests/fixtures/dense/llama").display().to_string();
    fails(&["bench", "--device", "cpu", "--model", &dense, "--kernel", "moe"], 2, &["kernel", "no experts"]);
}
