//! The trace file, version 1: what a run computed, stage by stage, in a safetensors file that anyone can open.
//!
//! | tensor | dtype, shape | meaning |
//! | --- | --- | --- |
//! | `STAGE` | f32 or i32 `[rows, width]` | a stage's values; row i is the run's token i, unless positions say otherwise |
//! | `positions` | i32 `[rows]` | the token that each row belongs to, for traces of chosen positions |
//! | `STAGE#positions` | i32 `[rows]` | the same for one stage |
//! | `STAGE#stats` | f32 `[steps, 8]` | count, sum, sum of squares, min, max, NaN count, infinity count, 0 |
//! | `STAGE#hash` | i64 `[steps]` | a hash of the stage's words in each step |
//!
//! `__metadata__` says `format` ([`FORMAT`]), `version` ([`VERSION`]), `kind` (`full` or `stats`) and the run's facts. A
//! file without these but with stages of known names is a foreign trace: its names are brought to ours ([`our_name`]) and
//! its values to f32 or i32.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo, TensorView};

use crate::checkpoint::json;
use crate::error::{Error, Result};
use crate::format::bf16;

/// What `format` says in the metadata of our traces.
pub const FORMAT: &str = "fourfold-trace";
/// The version that is written, and the only one that is read.
pub const VERSION: &str = "1";

/// The stages of a layer, in execution order, as they are called after `layers.N.`.
pub const LAYER_STAGES: [&str; 18] = [
    "attn_norm",
    "attn_norm.staged",
    "qkv",
    "qkv_norm",
    "attention",
    "attention.staged",
    "attn_out",
    "mlp_norm",
    "mlp.router.logits",
    "mlp.router.experts",
    "mlp.router.weights",
    "mlp_norm.staged",
    "mlp.gate_up",
    "mlp.up",
    "mlp.up.staged",
    "mlp.down",
    "mlp.out",
    "hidden",
];

/// What other programs call our stages, after the layer.
const ALIASES: [(&str, &str); 7] = [
    ("attn_in", "attn_norm"),
    ("moe_in", "mlp_norm"),
    ("router_logits", "mlp.router.logits"),
    ("topk_index", "mlp.router.experts"),
    ("topk_weight", "mlp.router.weights"),
    ("moe_out", "mlp.out"),
    ("mlp_out", "mlp.out"),
];

/// A run's tokens where they are a tensor and not in the metadata.
const INPUT_IDS: &str = "input_ids";

/// The types of tensors that are read as stages.
const READ: [Dtype; 9] =
    [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F64, Dtype::I32, Dtype::U32, Dtype::I64, Dtype::I16, Dtype::U8];

const POSITIONS: &str = "positions";
const MAX_HEADER: u64 = 100_000_000;

/// `layers.3.mlp.up` is (3, `mlp.up`).
pub fn split_layer(name: &str) -> Option<(usize, &str)> {
    let (layer, stage) = name.strip_prefix("layers.")?.split_once('.')?;
    Some((layer.parse().ok()?, stage))
}

/// Sorts stages as they are computed: `embed`, the layers, `final_norm`, `logits`; what is unknown comes last, in its layer
/// or in all.
pub fn stage_order(name: &str) -> (u8, usize, usize) {
    if let Some((layer, stage)) = split_layer(name) {
        let idx = LAYER_STAGES.iter().position(|known| *known == stage).unwrap_or(LAYER_STAGES.len());
        return (1, layer, idx);
    }
    match name {
        "embed" => (0, 0, 0),
        "final_norm" => (2, 0, 0),
        "logits" => (2, 0, 1),
        _ => (3, 0, 0),
    }
}

fn is_known(name: &str) -> bool {
    let (group, _, idx) = stage_order(name);
    group != 3 && (group != 1 || idx < LAYER_STAGES.len())
}

/// A tensor's name in our words: without `model.`, `layers.N.` for `layerN.`, `mlp.out` for `moe_out` and so on. The layer
/// may come last: `moe_out.N`; `hidden.N` is then what enters layer N.
pub fn our_name(name: &str) -> String {
    let name = name.strip_prefix("model.").unwrap_or(name);
    if let Some(name) = layer_last(name) {
        return name;
    }
    let numbered = name.strip_prefix("layers.").or_else(|| name.strip_prefix("layer"));
    let Some((layer, stage)) = numbered.and_then(|rest| rest.split_once('.')) else { return name.to_owned() };
    let Ok(layer) = layer.parse::<usize>() else { return name.to_owned() };
    let (stage, what) = stage.split_once('#').map_or((stage, None), |(stage, what)| (stage, Some(what)));
    format!("layers.{layer}.{}{}", our_stage(stage), what.map(|what| format!("#{what}")).unwrap_or_default())
}

fn our_stage(stage: &str) -> &str {
    ALIASES.iter().find(|(theirs, _)| *theirs == stage).map_or(stage, |(_, ours)| ours)
}

fn layer_last(name: &str) -> Option<String> {
    let (stage, layer) = name.rsplit_once('.')?;
    let (stage, layer) = (our_stage(stage), layer.parse::<usize>().ok()?);
    match (stage, layer) {
        ("hidden", 0) => Some("embed".to_owned()),
        ("hidden", layer) => Some(format!("layers.{}.hidden", layer - 1)),
        _ => LAYER_STAGES.contains(&stage).then(|| format!("layers.{layer}.{stage}")),
    }
}

/// The elements of a stage.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// Numbers.
    F32(Vec<f32>),
    /// Indices, such as experts.
    I32(Vec<i32>),
}

/// A stage's values, `[rows, width]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Stage {
    /// Rows.
    pub rows: usize,
    /// Elements in a row.
    pub width: usize,
    /// All elements, row after row.
    pub values: Values,
}

/// What a trace of kind `stats` keeps of a stage in one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepStats {
    /// Count, sum, sum of squares, min, max, NaN count, infinity count, 0. Sums and extremes are those of finite values.
    pub stats: [f32; 8],
    /// A hash of the words.
    pub hash: i64,
}

/// An open trace. Tensors are read when they are asked for.
#[derive(Debug)]
pub struct TraceFile {
    path: PathBuf,
    file: Mutex<File>,
    /// Where the tensors' bytes begin.
    base: u64,
    metadata: HashMap<String, String>,
    tokens: Option<Vec<u32>>,
    /// By our names.
    tensors: BTreeMap<String, Tensor>,
    stages: Vec<String>,
}

#[derive(Debug)]
struct Tensor {
    on_disk: String,
    info: TensorInfo,
}

impl TraceFile {
    /// Opens and checks a trace.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_part(path, "")
    }

    /// Opens a file in which only tensors whose names begin with `prefix` count, and are called what follows it.
    pub fn open_part(path: &Path, prefix: &str) -> Result<Self> {
        let fault = |reason: String| Error::file(path.display().to_string(), reason);
        let (file, base, header) = open(path)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        if metadata.get("format").is_some_and(|format| format == FORMAT) {
            let version = metadata.get("version").map_or("none", String::as_str);
            if version != VERSION {
                return Err(fault(format!(
                    "is a trace of version {}, and this program reads version {VERSION}: record it again, or use the \
                     fourfold that wrote it ({})",
                    json::name(version),
                    json::name(metadata.get("engine").map_or("not named in it", String::as_str))
                )));
            }
        }
        let tokens = match metadata.get("tokens").map(|text| serde_json::from_str(text)) {
            None => None,
            Some(Ok(tokens)) => Some(tokens),
            Some(Err(e)) => return Err(fault(format!("metadata `tokens` should be a JSON list of ids: {e}"))),
        };
        let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
        let all = header.tensors();
        for (on_disk, info) in &all {
            let Some(name) = on_disk.strip_prefix(prefix) else { continue };
            if !READ.contains(&info.dtype) {
                // What is no stage may be of any type.
                if is_known(&our_name(name)) {
                    let reason =
                        format!("is {:?}; stages are F32, BF16, F16, F64, I32, U32, I64, I16 or U8", info.dtype);
                    return Err(Error::tensor(path.display().to_string(), json::name(on_disk), reason));
                }
                continue;
            }
            let (on_disk, info) = (on_disk.clone(), (*info).clone());
            if let Some(other) = tensors.insert(our_name(name), Tensor { on_disk: on_disk.clone(), info }) {
                let both = format!("and {} are the same stage, {}", json::name(&other.on_disk), our_name(name));
                return Err(Error::tensor(path.display().to_string(), json::name(&on_disk), both));
            }
        }
        let mut stages: Vec<String> = tensors.keys().filter(|name| !is_beside(name)).cloned().collect();
        stages.extend(tensors.keys().filter_map(|name| name.strip_suffix("#stats").map(str::to_owned)));
        stages.sort_by(|a, b| (stage_order(a), a).cmp(&(stage_order(b), b)));
        stages.dedup();
        if !stages.iter().any(|name| is_known(name)) {
            return Err(fault(no_stages(&all, prefix)));
        }
        let path = path.to_owned();
        let mut trace = Self { path, file: Mutex::new(file), base, metadata, tokens, tensors, stages };
        if trace.tokens.is_none()
            && trace.has_values(INPUT_IDS)
            && let Values::I32(ids) = trace.values(INPUT_IDS)?
        {
            trace.tokens = Some(ids.into_iter().map(|id| id as u32).collect());
        }
        Ok(trace)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the metadata say under this key.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// The run's tokens, where the file says.
    pub fn tokens(&self) -> Option<&[u32]> {
        self.tokens.as_deref()
    }

    /// The stages in execution order.
    pub fn stages(&self) -> &[String] {
        &self.stages
    }

    /// Whether there are values of this stage, not only statistics.
    pub fn has_values(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// `[rows, width]` of a stage's values.
    pub fn shape(&self, name: &str) -> Result<[usize; 2]> {
        let tensor = self.find(name)?;
        let mut shape = &tensor.info.shape[..];
        if self.metadata("format") == Some(FORMAT) && shape.len() != 2 {
            return Err(self.fault(tensor, format!("has shape {shape:?}; stages are [rows, width]")));
        }
        if shape.contains(&0) {
            return Err(self.fault(tensor, format!("is empty: {shape:?}")));
        }
        // A batch of one.
        while shape.len() > 2 && shape[0] == 1 {
            shape = &shape[1..];
        }
        let [rows, width] = match shape {
            [] => [1, 1],
            [width] => [1, *width],
            [rows, width @ ..] => [*rows, width.iter().product()],
        };
        Ok([rows, width])
    }

    /// A stage's values.
    pub fn tensor(&self, name: &str) -> Result<Stage> {
        let [rows, width] = self.shape(name)?;
        Ok(Stage { rows, width, values: self.values(name)? })
    }

    /// The token of each of a stage's `rows` rows, and whether the file says so itself. Where it does not, a head stage
    /// with fewer rows than the run has tokens holds the last ones.
    pub fn positions(&self, name: &str, rows: usize) -> Result<(Vec<usize>, bool)> {
        let own = format!("{name}#{POSITIONS}");
        let from = [own.as_str(), POSITIONS].into_iter().find(|name| self.tensors.contains_key(*name));
        let is_head = stage_order(name).0 == 2;
        let mut all: Vec<usize> = match from {
            Some(from) => {
                let fault = |reason: String| Error::tensor(self.path.display().to_string(), from, reason);
                let Values::I32(list) = self.values(from)? else {
                    return Err(fault("should hold whole numbers".into()));
                };
                let list: Result<Vec<usize>, _> = list.into_iter().map(usize::try_from).collect();
                list.map_err(|_| fault("holds a negative position".into()))?
            }
            None => {
                let run = self.tokens.as_ref().map(Vec::len);
                (0..run.filter(|run| is_head && *run > rows).unwrap_or(rows)).collect()
            }
        };
        let given = from.is_some() || all.len() > rows;
        if all.len() > rows && is_head && from != Some(&own) {
            all.drain(..all.len() - rows);
        }
        if all.len() != rows {
            let reason = format!("has {rows} rows, but {} positions are given", all.len());
            return Err(Error::tensor(self.path.display().to_string(), json::name(name), reason));
        }
        Ok((all, given))
    }

    /// Statistics and hash of each step.
    pub fn stats(&self, name: &str) -> Result<Vec<StepStats>> {
        let (stats, hash) = (format!("{name}#stats"), format!("{name}#hash"));
        let bytes = |name: &str, dtype: Dtype, inner: &[usize]| {
            let tensor = self.find(name)?;
            let shape = &tensor.info.shape;
            if tensor.info.dtype != dtype || shape.is_empty() || shape[1..] != *inner {
                let reason =
                    format!("is {:?} {shape:?}, but should be {dtype:?} [steps] of {inner:?}", tensor.info.dtype);
                return Err(self.fault(tensor, reason));
            }
            self.bytes(tensor)
        };
        let (stats, hashes) = (bytes(&stats, Dtype::F32, &[8])?, bytes(&hash, Dtype::I64, &[])?);
        if stats.len() != hashes.len() * 4 {
            let reason = format!("has {} steps, its hashes {}", stats.len() / 32, hashes.len() / 8);
            return Err(Error::tensor(self.path.display().to_string(), json::name(name), reason));
        }
        let steps = stats.as_chunks::<32>().0.iter().zip(hashes.as_chunks::<8>().0);
        let word = |step: &[u8; 32], i: usize| f32::from_le_bytes(std::array::from_fn(|byte| step[4 * i + byte]));
        let read = |(step, hash): (&[u8; 32], &[u8; 8])| StepStats {
            stats: std::array::from_fn(|i| word(step, i)),
            hash: i64::from_le_bytes(*hash),
        };
        Ok(steps.map(read).collect())
    }

    fn find(&self, name: &str) -> Result<&Tensor> {
        let missing = || Error::tensor(self.path.display().to_string(), json::name(name), "is not in this trace");
        self.tensors.get(name).ok_or_else(missing)
    }

    fn fault(&self, tensor: &Tensor, reason: String) -> Error {
        Error::tensor(self.path.display().to_string(), json::name(&tensor.on_disk), reason)
    }

    fn bytes(&self, tensor: &Tensor) -> Result<Vec<u8>> {
        let (from, to) = tensor.info.data_offsets;
        let io = |source| Error::Io { path: self.path.clone(), source };
        let mut bytes = vec![0; to - from];
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(self.base + from as u64)).map_err(io)?;
        file.read_exact(&mut bytes).map_err(io)?;
        Ok(bytes)
    }

    fn values(&self, name: &str) -> Result<Values> {
        let tensor = self.find(name)?;
        let bytes = self.bytes(tensor)?;
        let floats = |of: fn(&[u8]) -> f32, size: usize| Values::F32(bytes.chunks_exact(size).map(of).collect());
        let whole = |of: fn(&[u8]) -> i64, size: usize| {
            let list: Result<Vec<i32>, _> = bytes.chunks_exact(size).map(|b| i32::try_from(of(b))).collect();
            let beyond = |_| self.fault(tensor, "holds a number that is no 32-bit index".into());
            list.map(Values::I32).map_err(beyond)
        };
        Ok(match tensor.info.dtype {
            Dtype::F32 => floats(|b| f32::from_le_bytes(array(b)), 4),
            Dtype::BF16 => floats(|b| bf16::decode(u16::from_le_bytes(array(b))), 2),
            Dtype::F16 => floats(|b| half::f16::from_le_bytes(array(b)).to_f32(), 2),
            Dtype::F64 => floats(|b| f64::from_le_bytes(array(b)) as f32, 8),
            Dtype::I32 => whole(|b| i32::from_le_bytes(array(b)).into(), 4)?,
            Dtype::U32 => whole(|b| u32::from_le_bytes(array(b)).into(), 4)?,
            Dtype::I64 => whole(|b| i64::from_le_bytes(array(b)), 8)?,
            Dtype::I16 => whole(|b| i16::from_le_bytes(array(b)).into(), 2)?,
            Dtype::U8 => whole(|b| b[0].into(), 1)?,
            other => return Err(self.fault(tensor, format!("is {other:?}, which is not read"))),
        })
    }
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    std::array::from_fn(|i| bytes[i])
}

/// A tensor that says something about stages and is none.
fn is_beside(name: &str) -> bool {
    name == POSITIONS || name == INPUT_IDS || name.contains('#')
}

/// The file, where its data begin, and its checked header.
fn open(path: &Path) -> Result<(File, u64, Metadata)> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let fault = |reason: String| Error::file(path.display().to_string(), reason);
    // Before it is opened: a pipe that nobody writes to would never be.
    let facts = path.metadata().map_err(io)?;
    if !facts.is_file() {
        return Err(fault("is no file: give a trace, a *.safetensors file".into()));
    }
    let mut file = File::open(path).map_err(io)?;
    if facts.len() == 0 {
        return Err(fault("is empty: the run that should have written it did not finish".into()));
    }
    if facts.len() < 8 {
        return Err(fault(format!("is truncated or no safetensors file: it has {} bytes", facts.len())));
    }
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(io)?;
    let (length, rest) = (u64::from_le_bytes(length), facts.len() - 8);
    if length > MAX_HEADER {
        return Err(fault("is not a safetensors file: it begins with no length of a header".into()));
    }
    if length > rest {
        return Err(fault(format!("is truncated: its header takes {length} bytes, and {rest} follow")));
    }
    let mut text = vec![0; length as usize];
    file.read_exact(&mut text).map_err(io)?;
    if text.first() != Some(&b'{') {
        return Err(fault("is not a safetensors file: its header is no JSON object".into()));
    }
    // The strict parser refuses what is said twice; the crate checks dtypes, shapes and offsets.
    json::object(&path.display().to_string(), &text)?;
    let header: Metadata = serde_json::from_slice(&text)
        .map_err(|e| fault(format!("is not a valid safetensors file: {}", json::clip(&e.to_string(), 200))))?;
    let (needs, has) = (header.data_len() as u64, rest - length);
    if has < needs {
        return Err(fault(format!("is truncated: its tensors take {needs} bytes, and it has {has}")));
    }
    if has > needs {
        return Err(fault(format!("is no valid safetensors file: {} bytes belong to no tensor", has - needs)));
    }
    Ok((file, 8 + length, header))
}

/// What to say where no tensor has the name of a stage.
fn no_stages(tensors: &HashMap<String, &TensorInfo>, prefix: &str) -> String {
    let known = |name: &str| is_known(&our_name(name));
    let mut prefixes: Vec<&str> = tensors
        .keys()
        .filter(|name| !known(name))
        .filter_map(|name| name.match_indices('.').map(|(at, _)| name.split_at(at + 1)).find(|(_, rest)| known(rest)))
        .map(|(prefix, _)| prefix)
        .collect();
    prefixes.sort_unstable();
    prefixes.dedup();
    let mut text = match prefix {
        "" => "holds no stage".to_owned(),
        prefix => format!("holds no stage whose name begins with {}", json::name(prefix)),
    };
    if tensors.is_empty() {
        text += ": it has no tensors at all";
    } else if tensors.keys().any(|name| known(name)) {
        text += ": its stages have no prefix";
    } else if prefixes.is_empty() {
        text += " such as `embed`, `layers.0.attn_out`, `layers.0.mlp.out` or `logits`: is it a trace?";
    } else {
        let shown: Vec<String> = prefixes.iter().take(6).map(|prefix| json::name(prefix)).collect();
        text += &format!(": it holds several runs; choose one by its prefix ({})", shown.join(", "));
    }
    text
}

/// The type of a stage's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// Numbers.
    F32,
    /// Indices.
    I32,
}

/// What to do where the file to be written is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IfThere {
    /// Leave it and fail.
    Fail,
    /// Replace it.
    Replace,
}

/// Collects a run's stages in memory, and writes them at once.
#[derive(Debug)]
pub struct TraceWriter {
    metadata: HashMap<String, String>,
    tensors: BTreeMap<String, Pending>,
}

#[derive(Debug)]
struct Pending {
    dtype: Dtype,
    /// Elements in a row; none: a list.
    width: Option<usize>,
    bytes: Vec<u8>,
}

impl Pending {
    fn view(&self) -> Result<TensorView<'_>, safetensors::SafeTensorError> {
        let elements = self.bytes.len() * 8 / self.dtype.bitsize();
        let shape = self.width.map_or(vec![elements], |width| vec![elements / width, width]);
        TensorView::new(self.dtype, shape, &self.bytes)
    }
}

impl TraceWriter {
    /// An empty trace. `format`, `version` and `kind` are added to the metadata.
    pub fn new(metadata: impl IntoIterator<Item = (String, String)>) -> Self {
        Self { metadata: metadata.into_iter().collect(), tensors: BTreeMap::new() }
    }

    /// Appends rows to a stage.
    ///
    /// # Panics
    /// If the words are not `rows` × `width`, or width or element differ from those pushed before: stages have one shape.
    pub fn push(&mut self, name: &str, rows: usize, width: usize, element: Element, words: &[u32]) {
        assert_eq!(rows * width, words.len(), "{name}: as many words as rows × width");
        let dtype = if element == Element::F32 { Dtype::F32 } else { Dtype::I32 };
        self.append(name, dtype, Some(width), words.iter().flat_map(|word| word.to_le_bytes()));
    }

    /// Appends a step's statistics.
    pub fn push_stats(&mut self, name: &str, step: &StepStats) {
        self.append(&format!("{name}#stats"), Dtype::F32, Some(8), step.stats.iter().flat_map(|v| v.to_le_bytes()));
        self.append(&format!("{name}#hash"), Dtype::I64, None, step.hash.to_le_bytes());
    }

    /// Whether no stage has been pushed.
    pub fn is_empty(&self) -> bool {
        self.tensors.keys().all(|name| is_beside(name) && !name.ends_with("#stats"))
    }

    /// Says which tokens the next rows of all stages belong to.
    pub fn push_positions(&mut self, positions: &[i32]) {
        self.append(POSITIONS, Dtype::I32, None, positions.iter().flat_map(|p| p.to_le_bytes()));
    }

    /// The same for one stage.
    pub fn push_stage_positions(&mut self, name: &str, positions: &[i32]) {
        let bytes = positions.iter().flat_map(|p| p.to_le_bytes());
        self.append(&format!("{name}#{POSITIONS}"), Dtype::I32, None, bytes);
    }

    /// Adds to the metadata, or changes it.
    pub fn set(&mut self, key: &str, value: impl Into<String>) {
        self.metadata.insert(key.to_owned(), value.into());
    }

    fn append(&mut self, name: &str, dtype: Dtype, width: Option<usize>, bytes: impl IntoIterator<Item = u8>) {
        let new = || Pending { dtype, width, bytes: Vec::new() };
        let pending = self.tensors.entry(name.to_owned()).or_insert_with(new);
        assert!(pending.dtype == dtype && pending.width == width, "{name}: every step has the same width and type");
        pending.bytes.extend(bytes);
    }

    /// Whether a trace can be written there, before a long run: gives the file's path, links followed.
    pub fn check(path: &Path, if_there: IfThere) -> Result<PathBuf> {
        let fault = |reason: String| Err(Error::file(path.display().to_string(), reason));
        if path.file_name().is_none() {
            return fault("is no name of a file".into());
        }
        match path.metadata() {
            Ok(_) if if_there == IfThere::Fail => {
                return fault("is there already: give another name, or say that it may be replaced".into());
            }
            Ok(about) if !about.is_file() => return fault("is no regular file: give the name of one".into()),
            Ok(_) => {}
            Err(_) if path.is_symlink() => return fault("is a link to nothing: give the name of a file".into()),
            Err(_) => {
                let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
                if !folder.is_none_or(Path::is_dir) {
                    return fault("cannot be written: its folder is not there".into());
                }
                return Ok(path.to_owned());
            }
        }
        path.canonicalize().map_err(|source| Error::Io { path: path.to_owned(), source })
    }

    /// Writes the file: whole, or not at all.
    pub fn write(&self, path: &Path, if_there: IfThere) -> Result<()> {
        let path = &Self::check(path, if_there)?;
        let fault = |reason: String| Error::file(path.display().to_string(), reason);
        let name = path.file_name().unwrap_or_default();
        let mut metadata = self.metadata.clone();
        let is_full = self.tensors.keys().any(|name| !is_beside(name));
        let kind = if is_full { "full" } else { "stats" };
        for (key, value) in [("format", FORMAT), ("version", VERSION), ("kind", kind)] {
            metadata.insert(key.to_owned(), value.to_owned());
        }
        let whole = |e: safetensors::SafeTensorError| fault(format!("cannot be written: {e}"));
        let views = self.tensors.iter().map(|(name, pending)| Ok((name, pending.view()?)));
        let views = views.collect::<Result<Vec<(&String, TensorView)>, _>>().map_err(whole)?;
        // Beside the file, so that renaming stays within one file system.
        let mut partial = name.to_owned();
        partial.push(format!(".{}.partial", std::process::id()));
        let partial = path.with_file_name(partial);
        let io = |source| Error::Io { path: path.to_owned(), source };
        // Who may read it: whoever could read the old file, or may read a new one. What comes next would let nobody else.
        let about =
            if path.exists() { path.metadata() } else { File::create(&partial).and_then(|file| file.metadata()) };
        let permissions = about.map_err(io)?.permissions();
        let written = safetensors::serialize_to_file(views, Some(metadata), &partial);
        let done = written.map_err(|e| match e {
            safetensors::SafeTensorError::IoError(source) => io(source),
            other => whole(other),
        });
        let named = || std::fs::set_permissions(&partial, permissions).and_then(|()| std::fs::rename(&partial, path));
        let done = done.and_then(|()| named().map_err(io));
        if done.is_err() {
            // What is left of a failed write is of no use; that it cannot be removed changes nothing.
            let _ = std::fs::remove_file(&partial);
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_others_become_ours() {
        for (theirs, ours) in [
            ("layer3.router_logits", "layers.3.mlp.router.logits"),
            ("model.layers.12.topk_index", "layers.12.mlp.router.experts"),
            ("layers.0.moe_out", "layers.0.mlp.out"),
            ("moe_out.2", "layers.2.mlp.out"),
            ("moe_in.11", "layers.11.mlp_norm"),
            ("hidden.0", "embed"),
            ("hidden.3", "layers.2.hidden"),
            ("final_norm", "final_norm"),
            ("weights.3", "weights.3"),
            ("layer0.mlp.up#stats", "layers.0.mlp.up#stats"),
            ("model.embed", "embed"),
            ("layerx.hidden", "layerx.hidden"),
            ("layernorm", "layernorm"),
        ] {
            assert_eq!(our_name(theirs), ours);
        }
    }

    #[test]
    fn stages_come_in_the_order_of_execution() {
        let mut names = [
            "logits",
            "z",
            "layers.10.attn_norm",
            "layers.2.hidden",
            "final_norm",
            "layers.2.x",
            "embed",
            "layers.2.qkv",
        ];
        names.sort_by_key(|name| stage_order(name));
        let want = [
            "embed",
            "layers.2.qkv",
            "layers.2.hidden",
            "layers.2.x",
            "layers.10.attn_norm",
            "final_norm",
            "logits",
            "z",
        ];
        assert_eq!(names, want);
    }
}
