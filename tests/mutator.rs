//! Broken checkpoints: a seeded mutator over the fixture `tiny`. Each case is a directory with one thing wrong, and the
//! words (a file, a tensor, a key) that its error must contain.
//!
//! Weights that a case leaves alone are hard links to the fixture's, so that hundreds of cases take little disk: files
//! here are replaced, never written through.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

/// One broken checkpoint.
pub(crate) struct Case {
    /// What is wrong, unique among the cases.
    pub(crate) name: String,
    /// What is to be opened; most often a directory.
    pub(crate) dir: PathBuf,
    /// Words that the error must contain.
    pub(crate) expect: &'static [&'static str],
}

pub(crate) const CONFIG: &str = "config.json";
pub(crate) const INDEX: &str = "model.safetensors.index.json";
pub(crate) const SHARDS: [&str; 2] = ["model-00000-of-00001.safetensors", "model-00001-of-00001.safetensors"];

/// The 22 kinds of tensor, one of each, spread over the layers.
const KINDS: [&str; 22] = [
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.norm.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.2.post_attention_layernorm.weight",
    "model.layers.3.self_attn.q_proj.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.1.self_attn.k_proj.weight",
    "model.layers.2.self_attn.k_proj.bias",
    "model.layers.3.self_attn.v_proj.weight",
    "model.layers.0.self_attn.v_proj.bias",
    "model.layers.1.self_attn.o_proj.weight",
    "model.layers.2.self_attn.o_proj.bias",
    "model.layers.3.self_attn.sinks",
    "model.layers.0.mlp.router.weight",
    "model.layers.1.mlp.router.bias",
    "model.layers.2.mlp.experts.gate_up_proj_blocks",
    "model.layers.3.mlp.experts.gate_up_proj_scales",
    "model.layers.0.mlp.experts.gate_up_proj_bias",
    "model.layers.1.mlp.experts.down_proj_blocks",
    "model.layers.2.mlp.experts.down_proj_scales",
    "model.layers.3.mlp.experts.down_proj_bias",
];

/// The checkpoint that all cases start from.
pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gpt_oss").join(name)
}

/// Writes all cases below `root`, which is emptied first.
pub(crate) fn cases(root: &Path) -> Vec<Case> {
    let _ = fs::remove_dir_all(root);
    let mut cases = Cases { root: root.to_owned(), list: Vec::new(), random: Random(2) };
    truncations(&mut cases);
    header_lengths(&mut cases);
    header_texts(&mut cases);
    header_entries(&mut cases);
    tensors(&mut cases);
    scales(&mut cases);
    indices(&mut cases);
    layouts(&mut cases);
    config_keys(&mut cases);
    config_texts(&mut cases);
    cases.list
}

/// A copy of the fixture in a new directory; the weights are hard links where the file system allows it.
pub(crate) fn copy_fixture(name: &str, dir: &Path) -> Folder {
    fs::create_dir_all(dir).unwrap();
    let from = fixture(name);
    for file in SHARDS {
        fs::hard_link(from.join(file), dir.join(file)).or_else(|_| copy(&from.join(file), &dir.join(file))).unwrap();
    }
    for file in [CONFIG, INDEX] {
        copy(&from.join(file), &dir.join(file)).unwrap();
    }
    Folder(dir.to_owned())
}

fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::read(from).and_then(|bytes| fs::write(to, bytes)) // not fs::copy: the fixture may be read-only
}

/// SplitMix64: the same cases on every machine.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}

/// A directory under mutation.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn read(&self, file: &str) -> Vec<u8> {
        fs::read(self.0.join(file)).unwrap()
    }

    /// Replaces a file; a hard link to the fixture is cut first.
    pub(crate) fn write(&self, file: &str, bytes: &[u8]) {
        let _ = fs::remove_file(self.0.join(file));
        fs::write(self.0.join(file), bytes).unwrap();
    }

    pub(crate) fn remove(&self, file: &str) {
        fs::remove_file(self.0.join(file)).unwrap();
    }

    fn edit_bytes(&self, file: &str, edit: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = self.read(file);
        edit(&mut bytes);
        self.write(file, &bytes);
    }

    /// Edits a file that is one JSON object.
    pub(crate) fn edit_json(&self, file: &str, edit: impl FnOnce(&mut Map<String, Value>)) {
        self.edit_bytes(file, |bytes| {
            let mut map = serde_json::from_slice(bytes).unwrap();
            edit(&mut map);
            *bytes = serde_json::to_vec(&map).unwrap();
        });
    }

    /// Edits a shard's header; its data stays.
    fn edit_header(&self, shard: &str, edit: impl FnOnce(&mut Map<String, Value>)) {
        self.edit_bytes(shard, |bytes| {
            let range = header(bytes);
            let mut map = serde_json::from_slice(&bytes[range.clone()]).unwrap();
            edit(&mut map);
            set_header(bytes, &serde_json::to_vec(&map).unwrap());
        });
    }

    /// Edits what the header says about one tensor.
    fn edit_entry(&self, tensor: &str, edit: impl FnOnce(&mut Value)) {
        self.edit_header(&self.shard_of(tensor), |map| edit(&mut map[tensor]));
    }

    fn shard_of(&self, tensor: &str) -> String {
        let index: Value = serde_json::from_slice(&self.read(INDEX)).unwrap();
        index["weight_map"][tensor].as_str().unwrap().to_owned()
    }

    /// Takes a tensor and its bytes out of its shard, which stays valid.
    fn cut_tensor(&self, tensor: &str) {
        self.edit_bytes(&self.shard_of(tensor), |bytes| {
            let range = header(bytes);
            let mut map: Map<String, Value> = serde_json::from_slice(&bytes[range.clone()]).unwrap();
            let cut = offsets(&map.shift_remove(tensor).unwrap());
            for entry in map.values_mut() {
                let Range { start, end } = offsets(entry);
                if start >= cut.end {
                    entry["data_offsets"] = json!([start - cut.len(), end - cut.len()]);
                }
            }
            bytes.drain(range.end + cut.start..range.end + cut.end);
            set_header(bytes, &serde_json::to_vec(&map).unwrap());
        });
    }

    /// Adds a small tensor at the end of a shard, which stays valid.
    fn add_tensor(&self, shard: &str, tensor: &str) {
        self.edit_header(shard, |map| {
            let end = map.values().map(|entry| offsets(entry).end).max().unwrap();
            map.insert(tensor.into(), json!({"dtype": "BF16", "shape": [4], "data_offsets": [end, end + 8]}));
        });
        self.edit_bytes(shard, |bytes| bytes.extend_from_slice(&[0x3f; 8]));
    }

    fn list(&self, tensor: &str, shard: &str) {
        self.edit_json(INDEX, |index| index["weight_map"][tensor] = shard.into());
    }

    fn unlist(&self, tensor: &str) {
        self.edit_json(INDEX, |index| drop(index["weight_map"].as_object_mut().unwrap().shift_remove(tensor)));
    }
}

/// Where the header's JSON lies in a shard.
pub(crate) fn header(shard: &[u8]) -> Range<usize> {
    8..8 + u64::from_le_bytes(shard[..8].try_into().unwrap()) as usize
}

fn set_header(shard: &mut Vec<u8>, json: &[u8]) {
    let range = header(shard);
    shard.splice(range, json.iter().copied());
    shard[..8].copy_from_slice(&(json.len() as u64).to_le_bytes());
}

fn offsets(entry: &Value) -> Range<usize> {
    let at = |i: usize| entry["data_offsets"][i].as_u64().unwrap() as usize;
    at(0)..at(1)
}

struct Cases {
    root: PathBuf,
    list: Vec<Case>,
    random: Random,
}

impl Cases {
    /// A copy of `tiny`, changed by `edit`.
    fn add(&mut self, name: impl Into<String>, expect: &[&str], edit: impl FnOnce(&Folder)) {
        let name = name.into();
        let folder = copy_fixture("tiny", &self.root.join(format!("{:03}", self.list.len())));
        edit(&folder);
        let expect: Vec<&'static str> = expect.iter().map(|word| &*(*word).to_owned().leak()).collect();
        self.list.push(Case { name, dir: folder.0, expect: expect.leak() });
    }

    fn bytes(&mut self, name: &str, file: &str, edit: impl FnOnce(&mut Vec<u8>)) {
        self.add(format!("{file}: {name}"), &[file], |f| f.edit_bytes(file, edit));
    }

    fn config(&mut self, name: &str, key: &str, edit: impl FnOnce(&mut Map<String, Value>)) {
        self.add(format!("config.json: {name}"), &[CONFIG, key], |f| f.edit_json(CONFIG, edit));
    }
}

fn truncations(cases: &mut Cases) {
    for shard in SHARDS {
        let bytes = fs::read(fixture("tiny").join(shard)).unwrap();
        let data = header(&bytes).end;
        let mut lengths = vec![0, 1, 7, 8, 9, data / 2, data - 1, data, data + 1, bytes.len() / 2, bytes.len() - 1];
        lengths.extend((0..5).map(|_| cases.random.below(bytes.len())));
        lengths.sort();
        lengths.dedup();
        for length in lengths {
            cases.bytes(&format!("cut to {length} bytes"), shard, |b| b.truncate(length));
        }
        cases.bytes("one byte appended", shard, |b| b.push(0));
        cases.bytes("a second copy of the data appended", shard, |b| b.extend_from_within(data..));
    }
    for file in [CONFIG, INDEX] {
        let length = fs::read(fixture("tiny").join(file)).unwrap().len();
        for length in [0, 1, length / 4, length / 2, length - 3, cases.random.below(length - 3)] {
            cases.bytes(&format!("cut to {length} bytes"), file, |b| b.truncate(length));
        }
    }
}

fn header_lengths(cases: &mut Cases) {
    let bytes = fs::read(fixture("tiny").join(SHARDS[0])).unwrap();
    let true_length = header(&bytes).len() as u64;
    let file = bytes.len() as u64;
    for length in [
        0,
        1,
        true_length - 8,
        true_length - 1,
        true_length + 1,
        true_length + 8,
        file - 8,
        file - 7,
        file,
        100_000_000,
        100_000_001,
        u32::MAX.into(),
        i64::MAX as u64,
        u64::MAX - 7,
        u64::MAX,
    ] {
        let name = format!("header length {length}");
        cases.bytes(&name, SHARDS[0], |b| b[..8].copy_from_slice(&length.to_le_bytes()));
    }
    cases.bytes("header length big-endian", SHARDS[1], |b| b[..8].reverse());
}

fn header_texts(cases: &mut Cases) {
    let nested = format!("{{\"a\":{}", "[".repeat(100_000));
    let many_dims = format!(r#"{{"a":{{"dtype":"U8","shape":[{}1],"data_offsets":[0,1]}}}}"#, "1,".repeat(1_000_000));
    for (name, json) in [
        ("empty", &b""[..]),
        ("null", b"null"),
        ("a list", b"[]"),
        ("a number", b"17"),
        ("an empty object", b"{}"),
        ("an open brace", b"{"),
        ("garbage", b"\x00\x01\x02\xff\xfe{{{{"),
        ("deeply nested", nested.as_bytes()),
        ("a million dimensions", many_dims.as_bytes()),
        ("a list of tensors", br#"{"a":[]}"#),
        ("metadata only", br#"{"__metadata__":{"format":"pt"}}"#),
        ("metadata not strings", br#"{"__metadata__":{"format":1}}"#),
    ] {
        cases.bytes(&format!("header is {name}"), SHARDS[1], |b| set_header(b, json));
    }
    cases.bytes("header is not UTF-8", SHARDS[0], |b| b[8 + 20] = 0xff);
    cases.bytes("header has a space first", SHARDS[0], |b| {
        let json = [b" ", &b[header(b)]].concat();
        set_header(b, &json);
    });
    let twice = KINDS[14];
    cases.add("a tensor twice in a header", &[SHARDS[0], twice], |f| {
        f.edit_bytes(SHARDS[0], |b| {
            let json = String::from_utf8(b[header(b)].to_vec()).unwrap();
            let entry = serde_json::from_str::<Value>(&json).unwrap()[twice].to_string();
            set_header(b, format!("{},\"{twice}\":{entry}}}", json.trim_end().strip_suffix('}').unwrap()).as_bytes());
        });
    });
}

fn header_entries(cases: &mut Cases) {
    let tensor = "model.layers.0.self_attn.k_proj.weight";
    let [from, to] = [8848u64, 25232]; // its offsets; checked below
    let mut entry = |name: &str, field: &'static str, value: Value| {
        cases.add(format!("{tensor}: {field} {name}"), &[SHARDS[0]], |f| {
            f.edit_entry(tensor, |e| {
                assert_eq!(e["data_offsets"], json!([from, to]));
                e[field] = value;
            });
        });
    };
    for (name, value) in [
        ("overlap the one before", json!([from - 2, to - 2])),
        ("overlap the one after", json!([from, to + 2])),
        ("leave a hole", json!([from + 2, to])),
        ("end early", json!([from, to - 2])),
        ("swapped", json!([to, from])),
        ("beyond the end", json!([from + 1_000_000, to + 1_000_000])),
        ("huge", json!([from, u64::MAX])),
        ("both huge", json!([u64::MAX - (to - from), u64::MAX])),
        ("at zero", json!([0, to - from])),
        ("empty", json!([from, from])),
        ("negative", json!([-1, to])),
        ("fractional", json!([from as f64 + 0.5, to])),
        ("strings", json!([from.to_string(), to.to_string()])),
        ("one number", json!([from])),
        ("three numbers", json!([from, to, to])),
        ("null", Value::Null),
        ("an object", json!({"begin": from})),
    ] {
        entry(name, "data_offsets", value);
    }
    for (name, value) in [
        ("zero", json!([0, 128])),
        ("all zero", json!([0, 0])),
        ("huge", json!([1u64 << 40, 128])),
        ("overflowing", json!([1u64 << 40, 1u64 << 40])),
        ("overflowing to the right size", json!([64, 128, 1u64 << 32, 1u64 << 32])),
        ("beyond 64 bits", json!([18446744073709551616.0, 128])),
        ("negative", json!([-64, -128])),
        ("fractional", json!([64.5, 128])),
        ("a string", json!("64,128")),
        ("null", Value::Null),
        ("of nine ones more", json!([64, 128, 1, 1, 1, 1, 1, 1, 1, 1, 1])),
        ("with a one more", json!([64, 128, 1])),
        ("flat", json!([64 * 128])),
        ("a scalar's", json!([])),
        ("off by one", json!([65, 128])),
    ] {
        entry(name, "shape", value);
    }
    for (name, value) in [
        ("F32 (too wide)", json!("F32")),
        ("U8 (too narrow)", json!("U8")),
        ("unknown", json!("Q4_0")),
        ("lower case", json!("bf16")),
        ("empty", json!("")),
        ("a number", json!(16)),
        ("null", Value::Null),
        ("very long", json!("F".repeat(100_000))),
    ] {
        entry(name, "dtype", value);
    }
    for field in ["dtype", "shape", "data_offsets"] {
        cases.add(format!("{tensor}: without {field}"), &[SHARDS[0]], |f| {
            f.edit_entry(tensor, |e| drop(e.as_object_mut().unwrap().shift_remove(field)));
        });
    }
}

fn tensors(cases: &mut Cases) {
    for tensor in KINDS {
        cases.add(format!("{tensor}: another dtype of the same size"), &[tensor, "but should be"], |f| {
            f.edit_entry(tensor, |e| {
                let impostor = if e["dtype"] == "U8" { "I8" } else { "F16" };
                e["dtype"] = impostor.into();
            });
        });
        cases.add(format!("{tensor}: missing"), &[tensor, "is missing"], |f| {
            f.cut_tensor(tensor);
            f.unlist(tensor);
        });
        cases.add(format!("{tensor}: another shape of the same size"), &[tensor, "but should be"], |f| {
            f.edit_entry(tensor, |e| {
                let shape = e["shape"].as_array_mut().unwrap();
                let n = shape.len();
                let square = n >= 2 && shape[n - 1] == shape[n - 2];
                if n >= 2 && !square { shape.swap(n - 1, n - 2) } else { shape.push(json!(1)) }
            });
        });
    }
    let blocks = KINDS[16];
    cases.add("blocks and scales exchanged", &["gate_up_proj_blocks"], |f| {
        f.edit_header(SHARDS[1], |map| {
            let scales = blocks.replace("blocks", "scales");
            let entry = map[blocks].clone();
            map[blocks] = map[&scales].clone();
            map[&scales] = entry;
        });
    });
    for (name, tensor) in [
        ("an extra tensor", "model.extra.weight"),
        ("an extra layer", "model.layers.4.self_attn.sinks"),
        ("an unquantised expert beside the quantised", "model.layers.0.mlp.experts.gate_up_proj"),
        ("a name with a line break", "model.layers.0\nself_attn.sinks"),
        ("an empty name", ""),
    ] {
        let expect = if tensor.contains('\n') || tensor.is_empty() { SHARDS[1] } else { tensor };
        cases.add(name, &[expect], |f| {
            f.add_tensor(SHARDS[1], tensor);
            f.list(tensor, SHARDS[1]);
        });
    }
    cases.add("an extra tensor with a name of a megabyte", &[SHARDS[1]], |f| {
        let name = "x".repeat(1 << 20);
        f.add_tensor(SHARDS[1], &name);
        f.list(&name, SHARDS[1]);
    });
    cases.add("a thousand extra tensors", &[SHARDS[1], "extra.0000", "more"], |f| {
        let names: Vec<String> = (0..1000).map(|i| format!("extra.{i:04}")).collect();
        f.edit_header(SHARDS[1], |map| {
            let end = map.values().map(|entry| offsets(entry).end).max().unwrap();
            for name in &names {
                map.insert(name.clone(), json!({"dtype": "U8", "shape": [0], "data_offsets": [end, end]}));
            }
        });
        f.edit_json(INDEX, |index| {
            for name in &names {
                index["weight_map"][name] = SHARDS[1].into();
            }
        });
    });
}

fn scales(cases: &mut Cases) {
    let places = [("model.layers.0.mlp.experts.gate_up_proj_scales", [8, 256, 4]), (KINDS[20], [8, 128, 4])];
    for (tensor, [experts, rows, blocks]) in places {
        let last = experts * rows * blocks - 1;
        for place in [0, last, cases.random.below(last)] {
            let index = format!("[{}, {}, {}]", place / (rows * blocks), place / blocks % rows, place % blocks);
            cases.add(format!("{tensor}: NaN at {index}"), &[tensor, &index, "NaN"], |f| {
                f.edit_bytes(&f.shard_of(tensor), |b| {
                    let range = header(b);
                    let map: Value = serde_json::from_slice(&b[range.clone()]).unwrap();
                    b[range.end + offsets(&map[tensor]).start + place] = 255;
                });
            });
        }
    }
}

fn indices(cases: &mut Cases) {
    let tensor = KINDS[3]; // in the first shard
    for (name, shard) in [
        ("a parent directory", "../model-00000-of-00001.safetensors"),
        ("an absolute path", "/etc/model.safetensors"),
        ("an absolute path to a password file", "/etc/passwd"),
        ("a subdirectory", "a/model.safetensors"),
        ("a parent directory inside", "a/../../model.safetensors"),
        ("backslashes", "..\\model.safetensors"),
        ("a drive letter", "C:model.safetensors"),
        ("a NUL", "model\0.safetensors"),
        ("a line break", "model\n.safetensors"),
        ("two dots", ".."),
        ("nothing", ""),
        ("only the ending", ".safetensors"),
        ("another ending", "model.bin"),
    ] {
        cases.add(format!("index: shard name is {name}"), &[INDEX, "shard name"], |f| f.list(tensor, shard));
    }
    cases.add("index: a very long shard name", &[INDEX, "shard name"], |f| {
        f.list(tensor, &format!("{}.safetensors", "m".repeat(100_000)));
    });
    let absent = "model-00007-of-00009.safetensors";
    cases.add("index: a shard that is not there", &[absent, "is missing"], |f| f.list(tensor, absent));
    cases.add("index: a tensor in the wrong shard", &[tensor, SHARDS[1]], |f| f.list(tensor, SHARDS[1]));
    cases.add("index: a tensor that no shard has", &[SHARDS[0], "model.ghost"], |f| f.list("model.ghost", SHARDS[0]));
    cases.add("index: a tensor not listed", &[SHARDS[0], tensor, INDEX], |f| f.unlist(tensor));
    cases.add("index: both shards exchanged", &[INDEX], |f| {
        let (one, two) = (f.read(SHARDS[0]), f.read(SHARDS[1]));
        f.write(SHARDS[0], &two);
        f.write(SHARDS[1], &one);
    });
    cases.add("index: one shard given twice", &["is also in"], |f| f.write(SHARDS[1], &f.read(SHARDS[0])));
    cases.add("index: a tensor in both shards", &[tensor, SHARDS[1], "is also in"], |f| {
        f.add_tensor(SHARDS[1], tensor);
    });
    for shard in SHARDS {
        cases.add(format!("{shard}: missing"), &[shard, "is missing"], |f| f.remove(shard));
        cases.add(format!("{shard}: a directory"), &[shard], |f| {
            f.remove(shard);
            fs::create_dir(f.0.join(shard)).unwrap();
        });
    }
    for (name, value) in [
        ("null", Value::Null),
        ("empty", json!({})),
        ("a list", json!([SHARDS[0]])),
        ("of numbers", json!({tensor: 1})),
        ("of lists", json!({tensor: [SHARDS[0]]})),
        ("a string", json!(SHARDS[0])),
    ] {
        cases.add(format!("index: weight_map is {name}"), &[INDEX, "weight_map"], |f| {
            f.edit_json(INDEX, |index| index["weight_map"] = value);
        });
    }
    cases.add("index: no weight_map", &[INDEX, "weight_map"], |f| {
        f.edit_json(INDEX, |index| drop(index.shift_remove("weight_map")));
    });
    for (name, text) in [
        ("a list", "[]".to_owned()),
        ("garbage", "\u{0}\u{1}garbage".to_owned()),
        ("deeply nested", "[".repeat(100_000)),
        ("a tensor listed twice", format!(r#"{{"weight_map":{{"a":"{0}","a":"{0}"}}}}"#, SHARDS[0])),
    ] {
        cases.add(format!("index: {name}"), &[INDEX], |f| f.write(INDEX, text.as_bytes()));
    }
}

fn layouts(cases: &mut Cases) {
    let empty = |f: &Folder| {
        for file in [SHARDS[0], SHARDS[1], CONFIG, INDEX] {
            f.remove(file);
        }
    };
    cases.add("an empty directory", &["*.safetensors"], empty);
    cases.add("no directory", &["is not there"], |f| fs::remove_dir_all(&f.0).unwrap());
    cases.add("a file in place of the directory", &["is not a directory"], |f| {
        fs::remove_dir_all(&f.0).unwrap();
        fs::write(&f.0, b"x").unwrap();
    });
    for file in ["gpt-oss-20b-mxfp4.gguf", "pytorch_model.bin", "consolidated.00.pth", "model-00001.safetensors"] {
        cases.add(format!("only {file}"), &[file], |f| {
            empty(f);
            f.write(file, b"GGUF\x03\0\0\0");
        });
        cases.add(format!("only {file} and config.json"), &[file], |f| {
            let config = f.read(CONFIG);
            empty(f);
            f.write(file, b"GGUF\x03\0\0\0");
            f.write(CONFIG, &config);
        });
    }
    cases.add("only original/", &["original"], |f| {
        empty(f);
        fs::create_dir(f.0.join("original")).unwrap();
    });
    cases.add("original/ itself", &["original/", "parent"], |f| f.write("dtypes.json", b"{}"));
    cases.add("no index", &["index"], |f| f.remove(INDEX));
    cases.add("no config.json", &[CONFIG, "is missing"], |f| f.remove(CONFIG));
    cases.add("config.json is a directory", &[CONFIG], |f| {
        f.remove(CONFIG);
        fs::create_dir(f.0.join(CONFIG)).unwrap();
    });
    cases.add("a single file that lacks most tensors", &["tensor model.layers.0.", "is missing"], |f| {
        let shard = f.read(SHARDS[1]);
        empty(f);
        f.write("model.safetensors", &shard);
        f.write(CONFIG, &fs::read(fixture("tiny").join(CONFIG)).unwrap());
    });
    for (name, bytes, word) in [
        ("GGUF", &b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0"[..], "GGUF"),
        ("a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs"),
        ("a zip archive", b"PK\x03\x04aaaaaaaaaaaaaaaaaaaaaaaaaa", "model.safetensors"),
        ("an HTML page", b"<!DOCTYPE html><html><body>404</body></html>", "model.safetensors"),
    ] {
        cases.add(format!("model.safetensors is {name}"), &["model.safetensors", word], |f| {
            f.write("model.safetensors", bytes);
        });
    }
    for (file, text) in [
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", r#"{"chat_template": 7}"#),
        ("tokenizer_config.json", r#"{"chat_template": [{"name": "tool_use", "template": "x"}]}"#),
        ("generation_config.json", "{"),
        ("generation_config.json", r#"{"eos_token_id": "end"}"#),
        ("generation_config.json", r#"{"eos_token_id": [512]}"#),
        ("generation_config.json", r#"{"temperature": "hot"}"#),
        ("generation_config.json", r#"{"top_p": 1.5}"#),
    ] {
        cases.add(format!("{file}: {text}"), &[file], |f| f.write(file, text.as_bytes()));
    }
    for (file, mib) in [(CONFIG, 16), ("tokenizer_config.json", 1), ("chat_template.jinja", 1), ("tokenizer.json", 64)]
    {
        cases.add(format!("{file}: too large"), &[file, "at most"], |f| {
            f.write(file, b"");
            // Sparse: takes no disk.
            fs::OpenOptions::new().write(true).open(f.0.join(file)).unwrap().set_len((mib << 20) + 1).unwrap();
        });
    }
}

fn config_keys(cases: &mut Cases) {
    for key in [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "num_local_experts",
        "num_experts_per_tok",
        "sliding_window",
        "max_position_embeddings",
    ] {
        let set = |map: &mut Map<String, Value>, value: Value| {
            map.shift_remove("experts_per_token");
            map[key] = value;
        };
        for value in [
            json!(0),
            json!(-1),
            json!(1u64 << 40),
            json!(u64::MAX),
            json!(1e300),
            json!(4.5),
            json!("4"),
            json!(true),
            json!([4]),
            json!({}),
            json!(null),
        ] {
            cases.config(&format!("{key} = {value}"), key, |map| set(map, value));
        }
        cases.config(&format!("{key} missing"), key, |map| {
            map.shift_remove("experts_per_token");
            map.shift_remove(key);
        });
    }
    for (key, value) in [
        ("hidden_size", json!(100)),
        ("intermediate_size", json!(130)),
        ("head_dim", json!(6)),
        ("head_dim", json!(260)),
        ("num_key_value_heads", json!(3)),
        ("num_key_value_heads", json!(16)),
        ("experts_per_token", json!(3)),
        ("experts_per_token", json!(9)),
        ("experts_per_token", json!("4")),
        ("num_local_experts", json!(1025)),
        ("rms_norm_eps", json!(0)),
        ("rms_norm_eps", json!(-1e-5)),
        ("rms_norm_eps", json!(1e300)),
        ("rms_norm_eps", json!("1e-5")),
        ("rms_norm_eps", json!(null)),
        ("rms_norm_eps", json!(true)),
        ("swiglu_limit", json!(0)),
        ("swiglu_limit", json!(-7)),
        ("swiglu_limit", json!(1e40)),
        ("swiglu_limit", json!("7")),
        ("swiglu_alpha", json!(0)),
        ("swiglu_alpha", json!(-1.702)),
        ("swiglu_alpha", json!([])),
        ("rope_theta", json!(0)),
        ("rope_theta", json!(1)),
        ("rope_theta", json!(-150000)),
        ("rope_theta", json!(1e300)),
        ("rope_theta", json!("150000")),
        ("rope_theta", json!(null)),
        ("rope_scaling", json!("yarn")),
        ("rope_scaling", json!([])),
        ("rope_parameters", json!(7)),
        ("rope_parameters", json!({"rope_type": "default"})),
        ("rope_theta", json!({"rope_theta": 150000})),
        ("layer_types", json!([])),
        ("layer_types", json!("sliding_attention")),
        ("layer_types", json!(["sliding_attention", "full_attention", "sliding_attention"])),
        ("layer_types", json!(["sliding_attention", "full_attention", "linear_attention", "full_attention"])),
        ("layer_types", json!([0, 1, 0, 1])),
        ("layer_types", json!([null, null, null, null])),
        ("num_hidden_layers", json!(5)),
        ("attention_bias", json!(false)),
        ("attention_bias", json!("true")),
        ("hidden_act", json!("gelu")),
        ("hidden_act", json!(1)),
        ("tie_word_embeddings", json!("no")),
        ("eos_token_id", json!(512)),
        ("eos_token_id", json!(-1)),
        ("eos_token_id", json!("<|return|>")),
        ("eos_token_id", json!([510, "x"])),
        ("bos_token_id", json!(1.5)),
        ("model_type", json!("llama")),
        ("model_type", json!("qwen3_moe")),
        ("model_type", json!(["gpt_oss"])),
        ("model_type", json!("x".repeat(100_000))),
        ("model_type", json!(null)),
        ("architectures", json!(["LlamaForCausalLM"])),
        ("architectures", json!([])),
        ("architectures", json!(7)),
        ("quantization_config", json!(null)),
        ("quantization_config", json!("mxfp4")),
        ("quant_method", json!({"quant_method": "bitsandbytes"})),
        ("quant_method", json!({"quant_method": null})),
        ("quant_method", json!({"bits": 4})),
    ] {
        let target = if key == "quant_method" { "quantization_config" } else { key };
        let shown = value.to_string().chars().take(80).collect::<String>();
        cases.config(&format!("{target} = {shown}"), key, |map| drop(map.insert(target.into(), value)));
    }
    for (key, value) in [
        ("rope_type", json!("linear")),
        ("rope_type", json!(1)),
        ("factor", json!(0)),
        ("factor", json!(-32)),
        ("factor", json!(1e30)),
        ("factor", json!("32")),
        ("beta_fast", json!(0)),
        ("beta_fast", json!(0.5)),
        ("beta_slow", json!(-1)),
        ("beta_slow", json!([])),
        ("original_max_position_embeddings", json!(0)),
        ("original_max_position_embeddings", json!(1u64 << 40)),
        ("original_max_position_embeddings", json!(0.5)),
        ("truncate", json!("false")),
        ("truncate", json!(0)),
        ("attention_factor", json!(0)),
        ("attention_factor", json!("1")),
        ("mscale", json!(-1)),
        ("rope_theta", json!(10000)),
    ] {
        cases.config(&format!("rope_scaling.{key} = {value}"), key, |map| map["rope_scaling"][key] = value);
    }
    for key in ["model_type", "quantization_config", "rms_norm_eps", "rope_theta"] {
        cases.config(&format!("{key} missing"), key, |map| drop(map.shift_remove(key)));
    }

    // Right in themselves, but not for these weights: the error names the first tensor that disagrees.
    let four = |map: &mut Map<String, Value>, n: usize| {
        map["num_hidden_layers"] = json!(n);
        map.shift_remove("layer_types");
    };
    cases.add("config.json: one layer more than the weights", &["model.layers.4.", "is missing"], |f| {
        f.edit_json(CONFIG, |map| four(map, 5));
    });
    cases.add("config.json: one layer less than the weights", &["model.layers.3.", "no part of this model"], |f| {
        f.edit_json(CONFIG, |map| four(map, 3));
    });
    for (key, value, tensor) in [
        ("vocab_size", 513, "[512, 128], but should be BF16 [513, 128]"),
        ("vocab_size", 1 << 24, "[512, 128], but should be BF16 [16777216, 128]"),
        ("hidden_size", 160, "[512, 128], but should be BF16 [512, 160]"),
        ("hidden_size", 1 << 17, "[512, 128], but should be BF16 [512, 131072]"),
        ("intermediate_size", 96, "but should be"),
        ("intermediate_size", 1 << 17, "but should be"),
        ("num_attention_heads", 1024, "but should be"),
        ("num_key_value_heads", 4, "k_proj"),
        ("head_dim", 64, "but should be"),
        ("num_local_experts", 7, "but should be"),
        ("num_local_experts", 1024, "but should be"),
    ] {
        cases.add(format!("config.json: {key} = {value}, not the weights'"), &["tensor", tensor], |f| {
            f.edit_json(CONFIG, |map| map[key] = json!(value));
        });
    }
    cases.add("config.json: 512 layers", &["model.layers.4.", "is missing"], |f| {
        f.edit_json(CONFIG, |map| four(map, 512));
    });
}

fn config_texts(cases: &mut Cases) {
    let mut garbage = vec![0; 900_000];
    garbage.iter_mut().for_each(|byte| *byte = cases.random.below(256) as u8);
    let text = String::from_utf8(fs::read(fixture("tiny").join(CONFIG)).unwrap()).unwrap();
    for (name, bytes) in [
        ("a list", b"[]".to_vec()),
        ("null", b"null".to_vec()),
        ("an empty object", b"{}".to_vec()),
        ("garbage", garbage.clone()),
        ("two megabytes of garbage", [&garbage[..], &garbage, &garbage].concat()),
        ("deeply nested lists", "[".repeat(100_000).into_bytes()),
        ("deeply nested objects", "{\"a\":".repeat(100_000).into_bytes()),
        ("a million commas", [b"[", ",".repeat(1_000_000).as_bytes()].concat()),
        ("UTF-16", text.encode_utf16().flat_map(u16::to_le_bytes).collect()),
        ("not UTF-8", text.replace("GptOss", "Gpt\u{1}").into_bytes().into_iter().map(|b| b | (b & 1) << 7).collect()),
        ("with a byte order mark", [b"\xef\xbb\xbf", text.as_bytes()].concat()),
        ("with a comment", format!("// hello\n{text}").into_bytes()),
        ("with something after it", format!("{text}{text}").into_bytes()),
        ("with a comma too many", text.trim_end().replace("\n}", ",\n}").into_bytes()),
        ("with NaN for eps", text.replace("1e-05", "NaN").into_bytes()),
        ("with Infinity for eps", text.replace("1e-05", "Infinity").into_bytes()),
        ("with an eps beyond f64", text.replace("1e-05", "1e999").into_bytes()),
        ("with a key twice", text.replace("{\n  \"arch", "{\n  \"vocab_size\": 512,\n  \"arch").into_bytes()),
        ("with an integer of a thousand digits", text.replace("150000", &"9".repeat(1000)).into_bytes()),
    ] {
        assert_ne!(bytes, text.as_bytes(), "{name}: nothing changed");
        cases.add(format!("config.json: {name}"), &[CONFIG], |f| f.write(CONFIG, &bytes));
    }
}
