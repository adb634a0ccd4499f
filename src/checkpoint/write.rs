//! Writing a checkpoint's directory: shards with a header first and tensors at their places after it, side files, and
//! `config.json` last, so that an interrupted run leaves nothing that looks whole.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::checkpoint::Dtype;
use crate::error::{Error, Result};

/// A tensor to be written.
#[derive(Clone, Debug)]
pub(crate) struct Planned {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
}

impl Planned {
    pub(crate) fn new(name: impl Into<String>, dtype: Dtype, shape: &[usize]) -> Self {
        Self { name: name.into(), dtype, shape: shape.to_vec() }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64 * (self.dtype.bits() / 8) as u64
    }
}

/// A new directory. Dropped before [`Directory::finish`], it takes back all that it wrote.
pub(crate) struct Directory {
    path: PathBuf,
    made: bool,
    written: Vec<PathBuf>,
    finished: bool,
}

impl Directory {
    /// Makes the directory; it may be there if it is empty.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let made = !Self::check(path)?;
        if made {
            fs::create_dir_all(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
        }
        Ok(Self { path: path.to_owned(), made, written: Vec::new(), finished: false })
    }

    /// Whether the directory is there; an error if it could not take a checkpoint.
    pub(crate) fn check(path: &Path) -> Result<bool> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        let fault = |reason: &str| Err(Error::option("DST", format!("{} {reason}", path.display())));
        match path.symlink_metadata() {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(io(e)),
            Ok(_) => {}
        }
        if !path.is_dir() {
            return fault("is there already and is no directory: nothing is overwritten");
        }
        if path.read_dir().map_err(io)?.next().is_some() {
            return fault(
                "is not empty, and nothing is overwritten: name a new directory, or remove what an interrupted run left",
            );
        }
        Ok(true)
    }

    /// Begins a shard with all its tensors. Gives where each lies in the file, in the order given.
    pub(crate) fn shard(&mut self, name: &str, tensors: &[Planned]) -> Result<Shard> {
        let (header, places) = header(tensors);
        let partial = self.path.join(format!("{name}.partial"));
        let mut shard = Shard { file: self.open(&partial)?, partial, path: self.path.join(name), places };
        shard.put(0, &header)?;
        Ok(shard)
    }

    /// Everything of a shard is written: it gets its name.
    pub(crate) fn close(&mut self, shard: Shard) -> Result<()> {
        let io = |source| Error::Io { path: shard.partial.clone(), source };
        shard.file.sync_all().map_err(io)?;
        fs::rename(&shard.partial, &shard.path).map_err(io)?;
        self.written.retain(|path| *path != shard.partial);
        self.written.push(shard.path);
        Ok(())
    }

    /// A small file, whole.
    pub(crate) fn file(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path.join(name);
        let mut file = self.open(&path)?;
        let io = |source| Error::Io { path: path.clone(), source };
        file.write_all(bytes).map_err(io)?;
        file.sync_all().map_err(io)
    }

    /// The last file: with it the directory is a checkpoint.
    pub(crate) fn finish(mut self, config: &[u8]) -> Result<()> {
        let (partial, path) = (self.path.join("config.json.partial"), self.path.join("config.json"));
        self.file("config.json.partial", config)?;
        self.written.push(path.clone());
        fs::rename(&partial, &path).map_err(|source| Error::Io { path, source })?;
        // Not every system can sync a directory; the files themselves are synced.
        if let Ok(directory) = File::open(&self.path) {
            let _ = directory.sync_all();
        }
        self.finished = true;
        Ok(())
    }

    fn open(&mut self, path: &Path) -> Result<File> {
        let file = OpenOptions::new().write(true).create_new(true).open(path);
        let file = file.map_err(|source| Error::Io { path: path.to_owned(), source })?;
        self.written.push(path.to_owned());
        Ok(file)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        for path in &self.written {
            let _ = fs::remove_file(path);
        }
        if self.made {
            let _ = fs::remove_dir(&self.path);
        }
    }
}

/// A shard under way.
pub(crate) struct Shard {
    file: File,
    partial: PathBuf,
    path: PathBuf,
    places: Vec<u64>,
}

impl Shard {
    /// The file as it is called until it is closed.
    pub(crate) fn partial(&self) -> &Path {
        &self.partial
    }

    /// Where each tensor begins in the file, in the order given.
    pub(crate) fn places(&self) -> &[u64] {
        &self.places
    }

    /// Writes bytes of the tensor at `idx` of the shard's list, from byte `offset` of the tensor on.
    pub(crate) fn write(&mut self, idx: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        self.put(self.places[idx] + offset, bytes)
    }

    fn put(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        let io = |source| Error::Io { path: self.partial.clone(), source };
        self.file.seek(SeekFrom::Start(at)).map_err(io)?;
        self.file.write_all(bytes).map_err(io)
    }
}

/// The header of a safetensors file, length included, and where each tensor begins. Tensors of wide elements come first,
/// so that all are aligned; then names decide.
fn header(tensors: &[Planned]) -> (Vec<u8>, Vec<u64>) {
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(tensors[i].dtype.bits()), &tensors[i].name));
    let mut json = Map::new();
    json.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut places = vec![0; tensors.len()];
    let mut end = 0;
    for i in order {
        let Planned { name, dtype, shape } = &tensors[i];
        let from = end;
        end += tensors[i].bytes();
        places[i] = from;
        json.insert(name.clone(), json!({ "dtype": dtype.word(), "shape": shape, "data_offsets": [from, end] }));
    }
    let mut text = Value::Object(json).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text);
    places.iter_mut().for_each(|place| *place += bytes.len() as u64);
    (bytes, places)
}

/// The index of several shards.
pub(crate) fn index(shards: &[(String, Vec<Planned>)]) -> Vec<u8> {
    let files = |(file, tensors): &'_ (String, Vec<Planned>)| {
        tensors.iter().map(|t| (t.name.clone(), Value::from(file.as_str()))).collect::<Vec<_>>()
    };
    let map: BTreeMap<String, Value> = shards.iter().flat_map(files).collect();
    let total: u64 = shards.iter().flat_map(|(_, tensors)| tensors).map(Planned::bytes).sum();
    let map: Map<String, Value> = map.into_iter().collect();
    pretty(&json!({ "metadata": { "total_size": total }, "weight_map": map }))
}

/// JSON for people, with a newline at its end.
pub(crate) fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}
