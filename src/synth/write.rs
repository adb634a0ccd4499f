//! A synthetic checkpoint as files: shards that all cores fill, the index, and `config.json` last.

use super::bytes::{ARENAS, Bytes};
use super::{Recipe, Synth};
use crate::checkpoint::Part;
use crate::checkpoint::write::{Directory, Planned, index, pretty};
use crate::error::{Error, Result};
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

/// Bytes of tensors in one file, at most, unless one tensor takes more.
const SHARD_BYTES: u64 = 5_000_000_000;
/// Bytes that one core makes and writes at once.
const PIECE: u64 = 8 << 20;

/// How far the writing has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes written.
    pub done_bytes: u64,
    /// Bytes of all tensors.
    pub total_bytes: u64,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Bytes of all tensors.
    pub bytes: u64,
    /// The files with tensors.
    pub files: Vec<String>,
    /// How the linears (of a gpt-oss: the experts) are stored.
    pub format: crate::format::Format,
    /// How deep the model is.
    pub layers: usize,
}

impl Recipe {
    /// Whether the checkpoint can be written there, as far as it can be known before. Writes nothing.
    ///
    /// # Errors
    /// As [`Recipe::checkpoint`], and if the directory is there and not empty.
    pub fn check(&self, destination: &Path) -> Result<()> {
        Synth::new(self)?;
        Directory::check(destination).map(|_| ())
    }

    /// Writes the checkpoint, the same bytes as [`Recipe::checkpoint`], into the new directory `destination`, which may
    /// not be there or has to be empty. `see` may stop it: then nothing is left, and there is no [`Written`].
    ///
    /// # Errors
    /// What [`Recipe::check`] refuses; the file that cannot be written. All that was written until then is removed; a
    /// run that is killed leaves a directory without `config.json`, which nothing opens.
    pub fn write(
        &self,
        destination: &Path,
        see: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Option<Written>> {
        let synth = Synth::new(self)?;
        synth.write(self.seed, SHARD_BYTES, destination, see)
    }
}

/// A file to be filled.
struct Filling<'a> {
    path: PathBuf,
    /// Its tensors by their places in the file.
    tensors: Vec<(u64, &'a Part)>,
    /// Pieces that are not written yet.
    pieces: AtomicUsize,
}

/// What a core has to tell.
enum Told {
    /// So many bytes are written.
    Wrote(u64),
    /// All of a file is written and synced.
    Filled(usize),
    Failed(Error),
}

impl Synth {
    pub(super) fn write(
        &self,
        seed: u64,
        shard_bytes: u64,
        destination: &Path,
        see: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Option<Written>> {
        let groups = grouped(&self.parts, shard_bytes);
        let total_bytes = self.parts.iter().map(|part| part.range.len() as u64).sum();
        let mut directory = Directory::create(destination)?;
        let (mut shards, mut fillings, mut files) = (Vec::new(), Vec::new(), Vec::new());
        for (i, group) in groups.iter().enumerate() {
            let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, groups.len());
            let planned: Vec<Planned> = group.iter().map(|p| Planned::new(&p.name, p.dtype, &p.shape)).collect();
            let shard = directory.shard(&name, &planned)?;
            let mut tensors: Vec<(u64, &Part)> = shard.places().iter().copied().zip(group.iter()).collect();
            tensors.sort_by_key(|(place, part)| (*place, part.range.len()));
            let path = shard.partial().to_owned();
            fillings.push(Filling { path, tensors, pieces: AtomicUsize::new(0) });
            shards.push(Some(shard));
            files.push((name, planned));
        }
        let pieces = pieces(&fillings);
        let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let work = Work { bytes: &self.bytes(seed), fillings: &fillings, pieces: &pieces, next: &next, stop: &stop };
        let whole = std::thread::scope(|scope| {
            let (tell, told) = channel();
            for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
                let tell = tell.clone();
                scope.spawn(move || work.fill(&tell));
            }
            drop(tell);
            let whole = follow(&told, total_bytes, see, |idx| match shards[idx].take() {
                Some(shard) => directory.close(shard),
                None => Ok(()),
            });
            stop.store(true, Ordering::Relaxed);
            whole
        })?;
        if whole.is_break() {
            return Ok(None);
        }
        directory.file("model.safetensors.index.json", &index(&files))?;
        directory.finish(&pretty(&self.config))?;
        let layers = self.int("num_hidden_layers");
        let files = files.into_iter().map(|(name, _)| name).collect();
        Ok(Some(Written { bytes: total_bytes, files, format: self.format, layers }))
    }
}

/// Listens until all is written, or `see` has seen enough.
fn follow(
    told: &Receiver<Told>,
    total_bytes: u64,
    see: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    mut close: impl FnMut(usize) -> Result<()>,
) -> Result<ControlFlow<()>> {
    let mut done_bytes = 0;
    for told in told {
        match told {
            Told::Wrote(bytes) => done_bytes += bytes,
            Told::Filled(idx) => close(idx)?,
            Told::Failed(e) => return Err(e),
        }
        if see(Progress { done_bytes, total_bytes }).is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}

/// Tensors by file, in their order.
fn grouped(parts: &[Part], shard_bytes: u64) -> Vec<&[Part]> {
    let (mut groups, mut first, mut bytes) = (Vec::new(), 0, 0);
    for (i, part) in parts.iter().enumerate() {
        let more = part.range.len() as u64;
        if i > first && bytes + more > shard_bytes {
            groups.push(&parts[first..i]);
            (first, bytes) = (i, 0);
        }
        bytes += more;
    }
    groups.push(&parts[first..]);
    groups
}

/// Every run of every file, as (file, range), and counts them. As many files at a time as there are cores: a file takes
/// only one writer at once.
fn pieces(fillings: &[Filling]) -> Vec<(usize, Range<u64>)> {
    let mut pieces = Vec::new();
    let side_by_side = std::thread::available_parallelism().map_or(1, usize::from);
    for (idx, Filling { tensors, pieces: count, .. }) in fillings.iter().enumerate() {
        let (first, (last, part)) = (tensors[0].0, tensors[tensors.len() - 1]);
        let end = last + part.range.len() as u64;
        for from in (first..end).step_by(PIECE as usize) {
            pieces.push((idx, from..end.min(from + PIECE)));
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
    pieces.sort_by_key(|(idx, range)| (idx / side_by_side, range.start, *idx));
    pieces
}

/// What all cores share.
#[derive(Clone, Copy)]
struct Work<'a> {
    bytes: &'a Bytes,
    fillings: &'a [Filling<'a>],
    pieces: &'a [(usize, Range<u64>)],
    next: &'a AtomicUsize,
    stop: &'a AtomicBool,
}

impl Work<'_> {
    /// Takes pieces until there are none, or nobody listens.
    fn fill(&self, tell: &Sender<Told>) {
        let mut buffer = Vec::new();
        let mut open: Vec<(usize, File)> = Vec::new();
        while !self.stop.load(Ordering::Relaxed) {
            let Some((idx, range)) = self.pieces.get(self.next.fetch_add(1, Ordering::Relaxed)) else { return };
            let done = self.piece(*idx, range, &mut buffer, &mut open);
            let told = match done {
                Ok(true) => {
                    tell.send(Told::Wrote(range.end - range.start)).and_then(|()| tell.send(Told::Filled(*idx)))
                }
                Ok(false) => tell.send(Told::Wrote(range.end - range.start)),
                Err(e) => tell.send(Told::Failed(e)),
            };
            if told.is_err() {
                return;
            }
        }
    }

    /// Makes and writes one piece. Whether it was the last of its file, which is synced then.
    fn piece(
        &self,
        idx: usize,
        range: &Range<u64>,
        buffer: &mut Vec<u8>,
        open: &mut Vec<(usize, File)>,
    ) -> Result<bool> {
        let Filling { path, tensors, pieces } = &self.fillings[idx];
        let io = |source| Error::Io { path: path.clone(), source };
        buffer.resize((range.end - range.start) as usize, 0);
        // The tensor that begins at or before the piece, and all that begin inside.
        let first = tensors.partition_point(|(place, _)| *place <= range.start).saturating_sub(1);
        for (place, part) in tensors[first..].iter().take_while(|(place, _)| *place < range.end) {
            let from = range.start.max(*place);
            let until = range.end.min(place + part.range.len() as u64);
            if from < until {
                let out = &mut buffer[(from - range.start) as usize..(until - range.start) as usize];
                self.bytes.fill(ARENAS[part.source], part.range.start + (from - place) as usize, out);
            }
        }
        if !open.iter().any(|(of, _)| *of == idx) {
            // A handle of its own, for a place of its own; those of finished files are let go.
            open.retain(|(of, _)| self.fillings[*of].pieces.load(Ordering::Relaxed) > 0);
            open.push((idx, OpenOptions::new().write(true).open(path).map_err(io)?));
        }
        let (_, file) = open.iter_mut().find(|(of, _)| *of == idx).expect("it was opened above");
        file.seek(SeekFrom::Start(range.start)).map_err(io)?;
        file.write_all(buffer).map_err(io)?;
        let last = pieces.fetch_sub(1, Ordering::AcqRel) == 1;
        if last {
            file.sync_all().map_err(io)?;
        }
        Ok(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Checkpoint, Mapping};

    /// A new directory under the system's temporary one, removed on drop.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("fourfold-synth-{name}-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&dir);
            Self(dir)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    /// A model of the true form and small size.
    fn small(name: &str) -> Synth {
        let mut recipe = Recipe::parse(name).unwrap();
        recipe.layers = Some(2);
        let mut synth = Synth::new(&recipe).unwrap();
        for key in ["hidden_size", "intermediate_size", "moe_intermediate_size"] {
            synth.config[key] = 320.into();
        }
        for (key, n) in [("num_experts", 3), ("num_local_experts", 3), ("vocab_size", 999)] {
            synth.config[key] = n.into();
        }
        synth.parts.clear();
        synth.largest = [0; 6];
        synth.tensors(2);
        synth
    }

    fn go(_: Progress) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    #[test]
    fn files_hold_what_is_made_in_memory() {
        for name in ["gpt-oss-20b", "gpt-oss-20b:nvfp4", "qwen3-30b-a3b", "qwen3-30b-a3b:bf16"] {
            let dir = Scratch::new("same");
            let synth = small(name);
            // So small that tensors end in the middle of pieces, and there are several files.
            let mut last = 0;
            let mut see = |p: Progress| {
                assert!(p.done_bytes >= last && p.done_bytes <= p.total_bytes);
                last = p.done_bytes;
                ControlFlow::Continue(())
            };
            let written = synth.write(5, 3_000_000, &dir.0, &mut see).unwrap().unwrap();
            assert_eq!(last, written.bytes);
            assert!(written.files.len() > 1, "{name}");
            let on_disk = Checkpoint::open(&dir.0, Mapping::Mmap).unwrap();
            let in_memory = synth.checkpoint("small", 5).unwrap();
            assert_eq!(on_disk.tensors().count(), in_memory.tensors().count());
            for view in in_memory.tensors() {
                let other = on_disk.tensor(view.name).unwrap().expect(view.dtype, view.shape).unwrap();
                assert!(view.bytes == other, "{name}: {}", view.name);
            }
            let ends: Vec<bool> = std::fs::read_dir(&dir.0)
                .unwrap()
                .map(|entry| entry.unwrap().path().extension().is_some_and(|e| e == "partial"))
                .collect();
            assert!(!ends.contains(&true));
            assert!(written.files.iter().all(|file| dir.0.join(file).is_file()));
        }
    }

    #[test]
    fn what_is_stopped_leaves_nothing() {
        let dir = Scratch::new("stopped");
        let synth = small("qwen3-30b-a3b");
        assert_eq!(synth.write(0, u64::MAX, &dir.0, &mut |_| ControlFlow::Break(())).unwrap(), None);
        assert!(!dir.0.exists());
        // Another's files stay, and nothing is written beside them.
        std::fs::create_dir(&dir.0).unwrap();
        std::fs::write(dir.0.join("mine"), b"x").unwrap();
        let error = synth.write(0, u64::MAX, &dir.0, &mut go).unwrap_err();
        assert!(matches!(error, Error::Option { option: "DST", .. }), "{error}");
        assert_eq!(std::fs::read_dir(&dir.0).unwrap().count(), 1);
    }
}
