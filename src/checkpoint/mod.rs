//! Checkpoints: bytes on disk (or in the binary) → named, typed, mapped [`TensorView`]s. Knows no GPU and no model.
//!
//! A checkpoint is a Hugging Face directory: `config.json`, and `model.safetensors` or the shards that
//! `model.safetensors.index.json` names. Everything is checked once, at open; what is wrong is one error that names the
//! file and the tensor. Nothing is copied and nothing is decoded here; `stored.rs` says what belongs to one weight.

mod bytes;
mod dtype;
mod header;
mod index;
pub(crate) mod json;
mod scales;
mod stored;
pub(crate) mod write;

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::path::Path;

use serde_json::Value;

pub use self::dtype::Dtype;
pub use self::scales::{check_e4m3_scales, check_e8m0, check_finite_bf16};
pub use self::stored::{KvScales, RowScales, ScaleOrder, Stored};

use self::bytes::Bytes;
use self::index::Index;
use crate::error::{Error, Result};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const TEMPLATE: &str = "chat_template.jinja";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// The files beside the weights that a checkpoint may have, and the most bytes that each may take.
const SIDE_FILES: [(&str, u64); 6] = [
    ("config.json", 16 * MIB),
    // Some list every projection of every expert.
    ("hf_quant_config.json", 16 * MIB),
    ("generation_config.json", MIB),
    ("tokenizer.json", 64 * MIB),
    (TOKENIZER_CONFIG, MIB),
    (TEMPLATE, MIB),
];
const INDEX_LIMIT: u64 = 64 * MIB;
const MIB: u64 = 1 << 20;

/// How a checkpoint's files come into memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mapping {
    /// Mapped: pages come as they are needed. The files must not change while the checkpoint is open.
    #[default]
    Mmap,
    /// Read whole into memory: for network file systems, and for files that may change.
    Read,
}

/// An open checkpoint: owns (or maps) its bytes; views borrow from it.
pub struct Checkpoint {
    name: String,
    side: BTreeMap<&'static str, Bytes>,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Tensor>,
}

struct Shard {
    /// The file as messages call it.
    path: String,
    bytes: Bytes,
}

struct Tensor {
    shard_idx: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// A tensor to be: a window into one of several byte sources.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Which source.
    pub(crate) source: usize,
    /// Where in it; windows may overlap.
    pub(crate) range: Range<usize>,
}

/// One tensor as it lies on disk. The bytes have no alignment to speak of.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// The tensor's name.
    pub name: &'a str,
    /// The file that holds it, for messages.
    pub file: &'a str,
    /// The type of an element.
    pub dtype: Dtype,
    /// Sizes, slowest first.
    pub shape: &'a [usize],
    /// Exactly the bytes that `dtype` and `shape` need, row-major, little-endian.
    pub bytes: &'a [u8],
}

impl<'a> TensorView<'a> {
    /// The bytes, if the tensor has this dtype and shape; else an error with both.
    pub fn expect(&self, dtype: Dtype, shape: &[usize]) -> Result<&'a [u8]> {
        if self.dtype == dtype && self.shape == shape {
            return Ok(self.bytes);
        }
        let reason = format!("is {} {:?}, but should be {dtype} {shape:?}", self.dtype, self.shape);
        Err(Error::tensor(self.file, json::name(self.name), reason))
    }
}

impl Checkpoint {
    /// Opens a Hugging Face directory. `model.safetensors` is taken where there is one, else the shards of the index.
    pub fn open(dir: &Path, mapping: Mapping) -> Result<Self> {
        check_directory(dir)?;
        let source = Source::Directory(dir, mapping);
        Self::load(dir.display().to_string(), &source)
    }

    /// Takes files embedded in the binary, as (file name, bytes), under the rules of a directory. Nothing is copied.
    pub fn embedded(name: &str, files: &[(&'static str, &'static [u8])]) -> Result<Self> {
        let mut seen = HashSet::new();
        if let Some((file, _)) = files.iter().find(|(file, _)| !seen.insert(file)) {
            return Err(Error::file(name, format!("{file} is embedded twice")));
        }
        Self::load(name.to_owned(), &Source::Embedded(name, files))
    }

    /// A checkpoint that was never on disk.
    pub(crate) fn from_parts(
        name: &str,
        side: Vec<(&'static str, Vec<u8>)>,
        sources: Vec<Vec<u8>>,
        parts: Vec<Part>,
    ) -> Result<Self> {
        let side = side.into_iter().map(|(file, bytes)| (file, Bytes::Owned(bytes))).collect();
        let shard = |bytes| Shard { path: name.to_owned(), bytes: Bytes::Owned(bytes) };
        let tensor = |part: Part| {
            (part.name, Tensor { shard_idx: part.source, dtype: part.dtype, shape: part.shape, range: part.range })
        };
        let shards = sources.into_iter().map(shard).collect();
        let checkpoint = Self { name: name.to_owned(), side, shards, tensors: parts.into_iter().map(tensor).collect() };
        checkpoint.require("config.json")?;
        Ok(checkpoint)
    }

    /// The directory as it was given, or the embedded checkpoint's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A side file's bytes: `config.json`, `hf_quant_config.json`, `generation_config.json`, `tokenizer.json`, `tokenizer_config.json` or
    /// `chat_template.jinja` (for which the `chat_template` inside `tokenizer_config.json` stands in).
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        self.side.get(name).map(|bytes| &**bytes)
    }

    /// Like [`Checkpoint::file`], where going on without the file is not possible.
    pub fn require(&self, name: &str) -> Result<&[u8]> {
        self.file(name).ok_or_else(|| Error::file(self.path(name), "is missing: download it with the weights"))
    }

    /// A side file as messages should call it.
    pub fn path(&self, name: &str) -> String {
        Path::new(&self.name).join(name).display().to_string()
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        if let Some((name, tensor)) = self.tensors.get_key_value(name) {
            return Ok(self.view(name, tensor));
        }
        let reason = match self.tensors.keys().find(|other| alike(name, other)) {
            Some(other) => format!("is missing; there is a {}", json::name(other)),
            None => "is missing".into(),
        };
        Err(Error::tensor(&self.name, json::name(name), reason))
    }

    /// All tensors, in the order of their names.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.tensors.iter().map(|(name, tensor)| self.view(name, tensor))
    }

    /// A hash of all tensors: names, dtypes, shapes and bytes. It tells checkpoints apart; it is no proof against forgery.
    pub fn digest(&self) -> u64 {
        let mut hash = 0u64;
        let mut add = |bytes: &[u8]| {
            let (words, rest) = bytes.as_chunks::<8>();
            let mut tail = [0; 8];
            tail[..rest.len()].copy_from_slice(rest);
            for word in words.iter().chain([&tail, &(bytes.len() as u64).to_le_bytes()]) {
                hash = (hash ^ u64::from_le_bytes(*word)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
            }
        };
        for view in self.tensors() {
            add(view.name.as_bytes());
            add(view.dtype.word().as_bytes());
            view.shape.iter().for_each(|n| add(&(*n as u64).to_le_bytes()));
            add(view.bytes);
        }
        hash
    }

    /// Bytes of all tensors together.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|t| t.range.len() as u64).sum()
    }

    /// Refuses tensors that the model did not ask for: a checkpoint with more than that is not what it says it is.
    pub fn check_all_used(&self, used: &HashSet<String>) -> Result<()> {
        const LISTED: usize = 5;
        let unexpected: Vec<_> = self.tensors.iter().filter(|(name, _)| !used.contains(*name)).collect();
        let Some((first, tensor)) = unexpected.first() else { return Ok(()) };
        let mut reason = "is no part of this model".to_owned();
        let others: Vec<_> = unexpected[1..].iter().take(LISTED - 1).map(|(name, _)| json::clip(name, 56)).collect();
        if !others.is_empty() {
            reason += &format!("; nor are {}", others.join(", "));
        }
        if unexpected.len() > LISTED {
            reason += &format!(" and {} more", unexpected.len() - LISTED);
        }
        Err(Error::tensor(&self.shards[tensor.shard_idx].path, json::name(first), reason))
    }

    fn view<'a>(&'a self, name: &'a str, tensor: &'a Tensor) -> TensorView<'a> {
        let Tensor { shard_idx, dtype, shape, range } = tensor;
        let Shard { path, bytes } = &self.shards[*shard_idx];
        TensorView { name, file: path, dtype: *dtype, shape, bytes: &bytes[range.clone()] }
    }

    fn load(name: String, source: &Source) -> Result<Self> {
        let mut checkpoint = Self { name, side: BTreeMap::new(), shards: Vec::new(), tensors: BTreeMap::new() };
        for (file, limit) in SIDE_FILES {
            if let Some(bytes) = source.open(file, limit)? {
                checkpoint.side.insert(file, bytes);
            }
        }
        checkpoint.require("config.json")?;
        checkpoint.adopt_template()?;

        if let Some(bytes) = source.open(SINGLE, u64::MAX)? {
            checkpoint.add_shard(source.path(SINGLE), bytes)?;
        } else if let Some(index) = source.open(INDEX, INDEX_LIMIT)? {
            checkpoint.add_shards(source, &index)?;
        } else {
            return Err(source.no_weights());
        }
        Ok(checkpoint)
    }

    /// Where there is no `chat_template.jinja`, the template inside `tokenizer_config.json` takes its place.
    fn adopt_template(&mut self) -> Result<()> {
        let (None, Some(bytes)) = (self.file(TEMPLATE), self.file(TOKENIZER_CONFIG)) else { return Ok(()) };
        let path = self.path(TOKENIZER_CONFIG);
        let mut config = json::object(&path, bytes)?;
        let template = match config.remove("chat_template") {
            None | Some(Value::Null) => return Ok(()),
            Some(Value::String(template)) => Some(template),
            // Several named templates: the one called "default".
            Some(Value::Array(list)) => list.into_iter().find_map(|named| {
                let is_default = named.get("name").and_then(Value::as_str) == Some("default");
                named.get("template").and_then(Value::as_str).filter(|_| is_default).map(str::to_owned)
            }),
            Some(_) => None,
        };
        let reason = "chat_template should be a string, or a list of named templates with one called \"default\"";
        let template = template.ok_or_else(|| Error::file(path, reason))?;
        self.side.insert(TEMPLATE, Bytes::Owned(template.into_bytes()));
        Ok(())
    }

    /// Opens every shard that the index names and holds index and shards against each other.
    fn add_shards(&mut self, source: &Source, index: &[u8]) -> Result<()> {
        let index = Index::from_json(&source.path(INDEX), index)?;
        for shard in index.shards() {
            let missing = || Error::file(source.path(shard), format!("is missing, but {INDEX} names it"));
            let bytes = source.open(shard, u64::MAX)?.ok_or_else(missing)?;
            self.add_shard(source.path(shard), bytes)?;
        }

        for (name, &shard_idx) in index.tensors() {
            let reason = match self.tensors.get(name) {
                Some(tensor) if tensor.shard_idx == shard_idx => continue,
                Some(tensor) => format!("{INDEX} puts it here, but {} holds it", self.shards[tensor.shard_idx].path),
                None => format!("{INDEX} puts it here, but the file does not hold it"),
            };
            return Err(Error::tensor(&self.shards[shard_idx].path, json::name(name), reason));
        }
        if let Some((name, tensor)) = self.tensors.iter().find(|(name, _)| !index.tensors().contains_key(*name)) {
            let path = &self.shards[tensor.shard_idx].path;
            return Err(Error::tensor(path, json::name(name), format!("is not listed in {INDEX}")));
        }
        Ok(())
    }

    fn add_shard(&mut self, path: String, bytes: Bytes) -> Result<()> {
        let shard_idx = self.shards.len();
        for header::Entry { name, dtype, shape, range } in header::read(&path, &bytes)? {
            if let Some(first) = self.tensors.get(&name) {
                let reason = format!("is also in {}", self.shards[first.shard_idx].path);
                return Err(Error::tensor(path, json::name(&name), reason));
            }
            self.tensors.insert(name, Tensor { shard_idx, dtype, shape, range });
        }
        self.shards.push(Shard { path, bytes });
        Ok(())
    }
}

/// Where files are looked up by name.
enum Source<'a> {
    Directory(&'a Path, Mapping),
    Embedded(&'a str, &'a [(&'static str, &'static [u8])]),
}

impl Source<'_> {
    fn path(&self, file: &str) -> String {
        match self {
            Self::Directory(dir, _) => dir.join(file).display().to_string(),
            Self::Embedded(name, _) => Path::new(name).join(file).display().to_string(),
        }
    }

    fn open(&self, file: &str, limit: u64) -> Result<Option<Bytes>> {
        match self {
            Self::Directory(dir, mapping) => Bytes::open(&dir.join(file), *mapping, limit),
            Self::Embedded(_, files) => {
                let found = files.iter().find(|(name, _)| *name == file);
                if let Some((_, bytes)) = found.filter(|(_, bytes)| bytes.len() as u64 > limit) {
                    let reason = format!("is {} bytes long; at most {limit} are allowed here", bytes.len());
                    return Err(Error::file(self.path(file), reason));
                }
                Ok(found.map(|(_, bytes)| Bytes::Static(bytes)))
            }
        }
    }

    /// What to say where there are no weights: it depends on what there is instead.
    fn no_weights(&self) -> Error {
        match self {
            Self::Directory(dir, _) => Error::file(dir.display().to_string(), found_instead(dir)),
            Self::Embedded(name, _) => Error::file(*name, format!("embeds neither {SINGLE} nor {INDEX}")),
        }
    }
}

const GIVE: &str = "give the Hugging Face directory with *.safetensors";

/// Tells the usual mistakes apart before any file is opened, so that the message can say what to do.
fn check_directory(dir: &Path) -> Result<()> {
    let fault = |reason: String| Error::file(dir.display().to_string(), reason);
    let meta = match dir.metadata() {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(fault(format!("is not there: {GIVE}"))),
        Err(source) => return Err(Error::Io { path: dir.to_owned(), source }),
    };
    if !meta.is_dir() {
        return Err(fault(format!("is not a directory: {GIVE} (GGUF and single files are not read)")));
    }
    if dir.join("dtypes.json").is_file() {
        return Err(fault(format!("is OpenAI's own `original/` layout: {GIVE}, usually its parent")));
    }
    if !dir.join("config.json").exists() && !dir.join(SINGLE).exists() && !dir.join(INDEX).exists() {
        return Err(fault(found_instead(dir)));
    }
    Ok(())
}

fn found_instead(dir: &Path) -> String {
    let mut names: Vec<String> = dir.read_dir().into_iter().flatten().flatten().take(10_000).map(file_name).collect();
    names.sort();
    let ending = |end: &str| names.iter().find(|name| name.ends_with(end)).map(|name| json::name(name));
    if let Some(shard) = ending(".safetensors") {
        return format!("has {shard}, but neither {SINGLE} nor {INDEX}: download the index too");
    }
    if let Some(gguf) = ending(".gguf") {
        return format!("holds {gguf}, and GGUF is not read: {GIVE}");
    }
    if let Some(bin) = ending(".bin").or_else(|| ending(".pt")).or_else(|| ending(".pth")) {
        return format!("holds {bin}, and PyTorch's format is not read: {GIVE}");
    }
    if let Some(original) = names.iter().find(|name| *name == "original" || *name == "metal") {
        return format!("holds no weights but `{original}/`, a private layout that is not read: {GIVE}");
    }
    format!("holds neither {SINGLE} nor {INDEX}: {GIVE}")
}

fn file_name(entry: std::fs::DirEntry) -> String {
    entry.file_name().to_string_lossy().into_owned()
}

/// Whether `other` looks like a misspelling of `name`: another case or separator, a prefix or suffix lost or added, or
/// a letter too many. Names that differ in a digit, or in one letter for another (`q_proj`, `k_proj`), are different.
fn alike(name: &str, other: &str) -> bool {
    if name.len().abs_diff(other.len()) > 16 || other.len() < 4 {
        return false;
    }
    let digits = |s: &str| s.bytes().filter(u8::is_ascii_digit).collect::<Vec<_>>();
    let letters = |s: &str| s.bytes().filter(u8::is_ascii_alphanumeric).map(|b| b.to_ascii_lowercase()).collect();
    let (a, b): (Vec<u8>, Vec<u8>) = (letters(name), letters(other));
    let (long, short) = if a.len() >= b.len() { (&a, &b) } else { (&b, &a) };
    let one_inserted = || {
        let start = long.iter().zip(short).take_while(|(x, y)| x == y).count();
        long.len() == short.len() + 1 && long[start + 1..] == short[start..]
    };
    digits(name) == digits(other) && (long.starts_with(short) || long.ends_with(short) || one_inserted())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::*;

    const NAMES: [&str; 3] = ["tiny", "odd", "loud"];

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gpt_oss").join(name)
    }

    /// A new directory under the system's temporary one, removed on drop.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("fourfold-checkpoint-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&dir);
            fs::create_dir_all(&dir).unwrap();
            Self(dir)
        }

        fn with(self, files: &[(&str, &[u8])]) -> Self {
            for (name, bytes) in files {
                fs::write(self.0.join(name), bytes).unwrap();
            }
            self
        }

        fn open(&self) -> Result<Checkpoint> {
            Checkpoint::open(&self.0, Mapping::Mmap)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// A safetensors file of U8 tensors.
    fn weights(tensors: &[(&str, &[u8])]) -> Vec<u8> {
        let view = |bytes: &'_ [u8]| (vec![bytes.len()], bytes.to_vec());
        let owned: Vec<_> = tensors.iter().map(|(name, bytes)| (*name, view(bytes))).collect();
        let views = owned.iter().map(|(name, (shape, bytes))| {
            (*name, safetensors::tensor::TensorView::new(safetensors::Dtype::U8, shape.clone(), bytes).unwrap())
        });
        safetensors::serialize(views, None).unwrap()
    }

    fn index(pairs: &[(&str, &str)]) -> Vec<u8> {
        let map: serde_json::Map<_, _> = pairs.iter().map(|(t, s)| ((*t).to_owned(), Value::from(*s))).collect();
        serde_json::to_vec(&serde_json::json!({ "weight_map": map })).unwrap()
    }

    fn fails(checkpoint: Result<Checkpoint>, words: &str) {
        let text = checkpoint.err().expect(words).to_string();
        assert!(text.contains(words), "{text:?} does not say {words:?}");
    }

    #[test]
    fn fixtures_open_alike_mapped_read_and_embedded() {
        for name in NAMES {
            let dir = fixture(name);
            let mapped = Checkpoint::open(&dir, Mapping::Mmap).unwrap();
            let read = Checkpoint::open(&dir, Mapping::Read).unwrap();
            let leaked = |file: &str| -> (&'static str, &'static [u8]) {
                (file.to_owned().leak(), fs::read(dir.join(file)).unwrap().leak())
            };
            let embedded = Checkpoint::embedded(
                name,
                &[
                    leaked("config.json"),
                    leaked(INDEX),
                    leaked("model-00000-of-00001.safetensors"),
                    leaked("model-00001-of-00001.safetensors"),
                ],
            )
            .unwrap();
            assert_eq!(mapped.name(), dir.display().to_string());
            assert_eq!(embedded.name(), name);
            let index = fs::read(dir.join(INDEX)).unwrap();
            let total = json::object(INDEX, &index).unwrap()["metadata"]["total_size"].as_u64();
            assert_eq!(Some(mapped.total_bytes()), total);
            assert!(mapped.tensors().count() > 50);
            for other in [&read, &embedded] {
                assert_eq!(other.total_bytes(), mapped.total_bytes());
                assert!(mapped.tensors().map(|t| t.name).eq(other.tensors().map(|t| t.name)));
                for t in mapped.tensors() {
                    assert_eq!(other.tensor(t.name).unwrap().expect(t.dtype, t.shape).unwrap(), t.bytes);
                }
            }
        }
    }

    #[test]
    fn views_are_what_the_safetensors_crate_reads() {
        for name in NAMES {
            let checkpoint = Checkpoint::open(&fixture(name), Mapping::Mmap).unwrap();
            let mut n_tensors = 0;
            for shard in 0..2 {
                let bytes = fs::read(fixture(name).join(format!("model-0000{shard}-of-00001.safetensors"))).unwrap();
                for (name, theirs) in safetensors::SafeTensors::deserialize(&bytes).unwrap().tensors() {
                    let ours = checkpoint.tensor(&name).unwrap();
                    assert_eq!(ours.dtype.on_disk(), theirs.dtype());
                    assert_eq!((ours.shape, ours.bytes), (theirs.shape(), theirs.data()));
                    n_tensors += 1;
                }
            }
            assert_eq!(n_tensors, checkpoint.tensors().count());
        }
    }

    #[test]
    fn single_files_and_shards_counted_from_one() {
        let single = Scratch::new("single").with(&[("config.json", b"{}"), (SINGLE, &weights(&[("a", &[1, 2])]))]);
        assert_eq!(single.open().unwrap().tensor("a").unwrap().bytes, [1, 2]);

        let (one, two) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
        let sharded = Scratch::new("sharded").with(&[
            ("config.json", b"{}"),
            (INDEX, &index(&[("a", one), ("b", two)])),
            (one, &weights(&[("a", &[1])])),
            (two, &weights(&[("b", &[2, 3])])),
        ]);
        let checkpoint = sharded.open().unwrap();
        assert_eq!(checkpoint.tensor("b").unwrap().bytes, [2, 3]);
        assert!(checkpoint.tensor("b").unwrap().file.ends_with(two));
        assert_eq!(checkpoint.total_bytes(), 3);
    }

    #[test]
    fn the_template_may_lie_in_the_tokenizer_config() {
        let weights = weights(&[("a", &[1])]);
        let open = |name, config: &str, jinja: Option<&str>| {
            let scratch = Scratch::new(name).with(&[
                ("config.json", b"{}"),
                (SINGLE, &weights),
                (TOKENIZER_CONFIG, config.as_bytes()),
            ]);
            let scratch = match jinja {
                Some(text) => scratch.with(&[(TEMPLATE, text.as_bytes())]),
                None => scratch,
            };
            scratch.open().map(|c| c.file(TEMPLATE).map(<[u8]>::to_vec))
        };
        let string = r#"{"chat_template": "inside"}"#;
        let list = r#"{"chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]}"#;
        assert_eq!(open("template-1", string, None).unwrap().unwrap(), b"inside");
        assert_eq!(open("template-2", string, Some("file")).unwrap().unwrap(), b"file");
        assert_eq!(open("template-3", list, None).unwrap().unwrap(), b"d");
        assert_eq!(open("template-4", "{}", None).unwrap(), None);
        let error = open("template-5", r#"{"chat_template": 1}"#, None).unwrap_err().to_string();
        assert!(error.contains(TOKENIZER_CONFIG) && error.contains("chat_template"), "{error}");
    }

    #[test]
    fn embedded_files_follow_the_rules_of_a_directory() {
        let weights: &'static [u8] = weights(&[("a", &[1])]).leak();
        let config: (&str, &'static [u8]) = ("config.json", b"{}");
        Checkpoint::embedded("toy", &[config, (SINGLE, weights)]).unwrap();
        fails(Checkpoint::embedded("toy", &[config]), "toy: embeds neither");
        fails(Checkpoint::embedded("toy", &[(SINGLE, weights)]), "toy/config.json: is missing");
        fails(Checkpoint::embedded("toy", &[config, config, (SINGLE, weights)]), "twice");
        fails(Checkpoint::embedded("toy", &[config, (SINGLE, &weights[..20])]), "toy/model.safetensors");
        let big: &'static [u8] = vec![b' '; 16 * MIB as usize + 1].leak();
        fails(Checkpoint::embedded("toy", &[("config.json", big), (SINGLE, weights)]), "at most 16777216");
    }

    #[test]
    fn missing_tensors_are_named_with_what_they_may_have_meant() {
        let names =
            ["model.embed_token.weight", "layers.0.q_proj.bias", "layers.11.k_proj.bias", "layers.0.experts.up"];
        let tensors: Vec<(&str, &[u8])> = names.iter().map(|n| (*n, &[1u8][..])).collect();
        let scratch = Scratch::new("near").with(&[("config.json", b"{}"), (SINGLE, &weights(&tensors))]);
        let checkpoint = scratch.open().unwrap();
        let says = |name: &str| checkpoint.tensor(name).unwrap_err().to_string();
        for (name, near) in [
            ("model.embed_tokens.weight", Some(names[0])),
            ("Model.EmbedToken.weight", Some(names[0])),
            ("model.layers.0.q_proj.bias", Some(names[1])),
            ("layers.0.experts.up_blocks", Some(names[3])),
            ("layers.0.k_proj.bias", None),
            ("layers.1.k_proj.bias", None),
            ("", None),
        ] {
            match near {
                Some(near) => assert!(says(name).ends_with(&format!("there is a {near}")), "{}", says(name)),
                None => assert!(says(name).ends_with("is missing"), "{}", says(name)),
            }
            assert!(says(name).contains(checkpoint.name()) && says(name).contains(name));
        }
        let error = checkpoint.tensor(names[1]).unwrap().expect(Dtype::Bf16, &[2, 2]).unwrap_err().to_string();
        assert!(error.contains("is U8 [1], but should be BF16 [2, 2]") && error.contains(SINGLE), "{error}");
    }

    #[test]
    fn unused_tensors_are_listed_up_to_five() {
        let names: Vec<String> = (0..9).map(|i| format!("t{i}")).collect();
        let tensors: Vec<(&str, &[u8])> = names.iter().map(|n| (n.as_str(), &[1u8][..])).collect();
        let scratch = Scratch::new("unused").with(&[("config.json", b"{}"), (SINGLE, &weights(&tensors))]);
        let checkpoint = scratch.open().unwrap();
        checkpoint.check_all_used(&names.iter().cloned().collect()).unwrap();
        let says = |n: usize| checkpoint.check_all_used(&names[..n].iter().cloned().collect()).unwrap_err().to_string();
        assert!(says(8).ends_with("tensor t8: is no part of this model"), "{}", says(8));
        assert!(says(4).ends_with("tensor t4: is no part of this model; nor are t5, t6, t7, t8"), "{}", says(4));
        assert!(says(1).ends_with("nor are t2, t3, t4, t5 and 3 more"), "{}", says(1));
    }

    #[test]
    fn what_is_not_a_checkpoint_gets_told_so() {
        let dir = Scratch::new("layouts");
        fails(dir.open(), "holds neither");
        fails(Checkpoint::open(&dir.0.join("absent"), Mapping::Mmap), "is not there");
        for (file, words) in [
            ("pytorch_model.bin", "PyTorch"),
            ("gpt-oss-20b-mxfp4.gguf", "GGUF is not read"),
            ("model-00001-of-00002.safetensors", "download the index too"),
        ] {
            let dir = Scratch::new(file).with(&[(file, b"x")]);
            fails(dir.open(), words);
            fails(Checkpoint::open(&dir.0.join(file), Mapping::Mmap), "is not a directory");
            fails(dir.with(&[("config.json", b"{}")]).open(), words);
        }
        fails(dir.with(&[("dtypes.json", b"{}")]).open(), "original/");
        let lfs =
            Scratch::new("lfs").with(&[("config.json", b"{}"), (SINGLE, b"version https://git-lfs.github.com/1")]);
        fails(lfs.open(), "git lfs pull");
    }
}
