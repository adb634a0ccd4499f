//! `fourfold quantize` as a user meets it.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use super::{LLAMA, Raw, Scratch, floats, llama, open, save};

#[test]
fn the_command_makes_a_checkpoint_and_a_table() {
    let scratch = Scratch::new("command");
    let run = |args: &[&str]| -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fourfold"));
        command.env_remove("FOURFOLD_MODEL").env_remove("RUST_LOG").current_dir(&scratch.0);
        command.arg("quantize").args(args).output().unwrap()
    };
    save(&scratch.join("src"), LLAMA, &llama(Raw::BF16));
    let output = run(&["src", "dst", "--format", "nvfp4", "--scale-search", "mse"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for word in ["self_attn.q_proj", "mlp.down_proj", "nvfp4", "worst", "model.layers.", " %", " → "] {
        assert!(text.contains(word), "no {word:?} in {text}");
    }
    assert!(text.lines().count() <= 40, "{text}");
    let again = run(&["src", "dst", "--format", "nvfp4"]);
    assert_eq!(again.status.code(), Some(2), "{}", String::from_utf8_lossy(&again.stderr));
    let quiet = run(&["src", "quiet", "--format", "mxfp4", "-q", "--layers", "*.mlp.*"]);
    assert!(quiet.status.success() && quiet.stdout.is_empty() && quiet.stderr.is_empty());
    let all = run(&["src", "all", "--format", "mxfp4", "-v"]);
    assert!(String::from_utf8_lossy(&all.stdout).contains("model.layers.1.self_attn.k_proj"));
    for (args, code, word) in [
        (&["absent", "x", "--format", "nvfp4"][..], 3, "is not there"),
        (&["quiet", "x", "--format", "mxfp4"], 3, "MXFP4 already"),
        (&["src", "x", "--format", "mxfp4", "--calibrate", "t"], 2, "--calibrate"),
        (&["src", "x", "--format", "nvfp4", "--calibrate", "absent"], 3, "absent"),
        (&["src", "x", "--format", "nvfp4", "--calibrate-tokens", "4"], 2, "--calibrate"),
        (&["src", "x", "--format", "int4"], 2, "int4"),
        (&["src", "x", "--format", "nvfp4", "--layers", "nothing"], 2, "nothing"),
    ] {
        let output = run(args);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(code) && text.contains(word), "{args:?}: {text}");
    }
    assert!(!scratch.join("x").exists());
}

#[test]
fn the_default_model_is_calibrated_from_a_text() {
    let scratch = Scratch::new("text");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/fireside");
    fs::write(scratch.join("text.txt"), "Once upon a time there was a fox who liked to count the stars.").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_fourfold"));
    command.env_remove("FOURFOLD_MODEL").env_remove("RUST_LOG").current_dir(&scratch.0);
    command.arg("quantize").arg(source).args(["dst", "--format", "nvfp4", "--device", "cpu"]);
    let output = command.args(["--calibrate", "text.txt", "--calibrate-tokens", "8"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let made = open(&scratch.join("dst"));
    assert!(floats(&made, "model.layers.7.mlp.experts.down_proj_input_scale")[0] > 0.0);
    assert!(made.file("tokenizer.json").is_some() && made.file("chat_template.jinja").is_some());
}
