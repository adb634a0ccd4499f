//! The rules of the code base that a machine can check.

use fourfold::ops::KERNELS;
use fourfold::shader::SHARED;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Files under `dir` with this extension, by path from the root, with their text.
fn files(dir: &str, extension: &str) -> Vec<(String, String)> {
    fn walk(dir: &Path, extension: &str, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, extension, found);
            } else if path.extension().is_some_and(|e| e == extension) {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root().join(dir), extension, &mut found);
    found.sort();
    assert!(!found.is_empty(), "no .{extension} files in {dir}");
    let name = |path: &Path| path.strip_prefix(root()).unwrap().to_string_lossy().replace('\\', "/");
    found.iter().map(|path| (name(path), fs::read_to_string(path).unwrap())).collect()
}

#[test]
fn every_shader_file_is_in_the_tables() {
    let on_disk: BTreeSet<String> = files("shaders", "wgsl").into_iter().map(|(path, _)| path).collect();
    let kernels = KERNELS.iter().map(|k| format!("shaders/{}.wgsl", k.name));
    let in_tables = kernels.chain(SHARED.iter().map(|(name, _)| format!("shaders/shared/{name}.wgsl"))).collect();
    assert_eq!(on_disk, in_tables);
}

#[test]
fn every_kernel_has_its_header_and_its_twin() {
    for (path, text) in files("shaders", "wgsl").iter().filter(|(path, _)| !path.contains("/shared/")) {
        let stem = path.trim_start_matches("shaders/").trim_end_matches(".wgsl");
        assert!(text.starts_with(&format!("// {stem}: ")), "{path}: the first line says what it does");
        for field in ["// grid ", "// out  ", "// override ", "// twin "] {
            let also = field == "// out  " && text.contains("// in/out ");
            assert!(text.contains(field) || also, "{path}: the header has no {field:?}");
        }
        let twin = text.lines().find_map(|l| l.strip_prefix("// twin ")).unwrap().trim();
        let source = fs::read_to_string(root().join(twin)).unwrap_or_else(|_| panic!("{path}: no twin at {twin}"));
        assert!(source.contains("pub fn reference("), "{twin} has no `reference`");
        let op = Path::new(twin).file_stem().unwrap().to_str().unwrap();
        assert!(stem.starts_with(op), "{path} is not named after its op, {op}");
        assert!(text.contains("fn main("), "{path}: the entry point is `main`");
        // Overrides are documented, and the Rust side sets them all (the driver would refuse otherwise).
        for name in text.lines().filter_map(|l| l.strip_prefix("override ")).map(|l| l.split(':').next().unwrap()) {
            let line = text.lines().find(|l| l.starts_with("// override")).unwrap();
            assert!(line.contains(name), "{path}: override {name} is not in the header");
            assert!(source.contains(&format!("\"{name}\"")), "{twin} does not set {name}");
        }
    }
}

#[test]
fn kernels_keep_the_reproducibility_rules() {
    for (path, text) in files("shaders", "wgsl") {
        // Sums of integers follow no order; what an atomic gives back does.
        let given_back = |l: &&str| l.contains("atomic") && l.contains("(&") && !l.trim_start().starts_with("atomic");
        let kept = text.lines().filter(given_back).all(|l| l.contains("= atomicLoad("));
        assert!(kept && !text.contains("atomic<f"), "{path}: an atomic that follows an order");
        for word in ["subgroupAdd(", "subgroupMul(", "#ifdef", "enable f16"]
            .into_iter()
            .filter(|w| !(path.ends_with("_matrix.wgsl") && *w == "enable f16"))
        {
            let code = text.lines().filter(|l| !l.trim_start().starts_with("//"));
            assert!(!code.into_iter().any(|l| l.contains(word)), "{path}: {word} has no place here");
        }
    }
}

#[test]
fn wgpu_stays_behind_the_seam() {
    for (path, text) in files("src", "rs") {
        if path.starts_with("src/device/gpu/") {
            continue;
        }
        for (i, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap();
            let reexport = path == "src/lib.rs" && code.trim() == "pub use wgpu;";
            assert!(!code.contains("wgpu::") || reexport, "{path}:{}: wgpu belongs to src/device/gpu", i + 1);
            assert!(!code.contains("println!(") || path.starts_with("src/cli/"), "{path}:{}: printing", i + 1);
        }
    }
}

#[test]
fn nothing_is_global_but_counters() {
    let mut counters = 0;
    for (path, text) in files("src", "rs") {
        assert!(!text.contains("thread_local!"), "{path}: state of a thread");
        let statics = text.lines().map(|l| l.trim().trim_start_matches("pub ").trim_start_matches("pub(crate) "));
        for line in statics.filter(|l| l.starts_with("static ")) {
            assert!(line.contains("AtomicU64"), "{path}: engines share no state: {line}");
            counters += 1;
        }
    }
    assert!(counters > 0, "nothing was looked at");
}

#[test]
fn every_source_file_says_what_it_owns() {
    for dir in ["src", "tests", "examples"] {
        for (path, text) in files(dir, "rs") {
            assert!(text.starts_with("//!"), "{path} does not open with //!");
            let todo = ["TO", "DO"].concat();
            assert!(!text.contains(&todo), "{path}: a {todo} belongs into an issue");
        }
    }
}

#[test]
fn unsafe_is_where_it_is_allowed() {
    let allowed = [
        "src/device/gpu/adapter.rs",
        "src/checkpoint/bytes.rs",
        "src/device/gpu/pipeline.rs",
        "src/device/gpu/cache.rs",
    ];
    for (path, text) in files("src", "rs") {
        let uses = text.lines().filter(|l| l.split("//").next().unwrap().contains("unsafe {")).count();
        assert!(uses == 0 || (allowed.contains(&path.as_str()) && uses == 1), "{path}: {uses} unsafe blocks");
        assert!(uses == 0 || text.contains("// SAFETY:"), "{path}: unsafe without its promise");
    }
}

#[test]
fn the_repository_names_no_machine() {
    for (dir, extension) in [("src", "rs"), ("tests", "rs"), ("tools", "py"), ("models", "md"), ("shaders", "wgsl")] {
        for (path, text) in files(dir, extension) {
            for place in [["/ro", "ot/"].concat(), ["/wo", "rk/"].concat(), ["/ho", "me/"].concat()] {
                assert!(!text.contains(&place), "{path} mentions {place}");
            }
        }
    }
}

#[test]
fn dependencies_bring_no_c_no_runtime_and_no_network() {
    // What is built here; the lock file also lists what optional features of others could bring.
    let mut tree = std::process::Command::new(env!("CARGO"));
    tree.args(["tree", "--offline", "--locked", "--edges", "normal,build"]);
    tree.args(["--prefix", "none", "--format", "{p}"]).current_dir(root());
    let output = tree.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let names: BTreeSet<&str> = text.lines().filter_map(|l| l.split(' ').next()).collect();
    assert!(names.contains("wgpu"), "the tree was not read: {text}");
    for name in ["cc", "cmake", "bindgen", "onig_sys", "tokio", "async-std", "hyper", "reqwest", "ureq", "openssl-sys"]
    {
        assert!(!names.contains(name), "{name} came in: see `cargo tree -i {name}`");
    }
}
