//! Where a checkpoint's bytes come from: a mapped file, a file read into memory, or the binary itself.

use std::fs::File;
use std::io::Read;
use std::ops::Deref;
use std::path::Path;

use memmap2::Mmap;

use super::Mapping;
use crate::error::{Error, Result};

/// The bytes of one file.
pub(super) enum Bytes {
    Mapped(Mmap),
    Owned(Vec<u8>),
    Static(&'static [u8]),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Owned(vec) => vec,
            Self::Static(bytes) => bytes,
        }
    }
}

impl Bytes {
    /// Opens a regular file of at most `limit` bytes. A path that is not there gives `None`.
    pub(super) fn open(path: &Path, mapping: Mapping, limit: u64) -> Result<Option<Self>> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        let meta = match path.metadata() {
            Ok(meta) => meta,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io(e)),
        };
        let fault = |reason: String| Error::file(path.display().to_string(), reason);
        if !meta.is_file() {
            return Err(fault("should be a file, and is not".into()));
        }
        if meta.len() > limit {
            return Err(fault(format!("is {} bytes long; at most {limit} are allowed here", meta.len())));
        }
        let file = File::open(path).map_err(io)?;
        match mapping {
            Mapping::Mmap => map(&file).map(|m| Some(Self::Mapped(m))).map_err(io),
            Mapping::Read => {
                let too_big = || Error::OutOfMemory {
                    what: path.display().to_string(),
                    bytes: meta.len(),
                    hint: "let the file be mapped instead of read",
                };
                let len = usize::try_from(meta.len()).map_err(|_| too_big())?;
                let mut vec = Vec::new();
                vec.try_reserve_exact(len).map_err(|_| too_big())?;
                file.take(meta.len()).read_to_end(&mut vec).map_err(io)?;
                if vec.len() != len {
                    return Err(fault(format!("became shorter while it was read: {} of {len} bytes", vec.len())));
                }
                Ok(Some(Self::Owned(vec)))
            }
        }
    }
}

/// Maps a file read-only.
///
/// The promise: nobody truncates or rewrites the file while it is mapped. A checkpoint is downloaded once and then only
/// read; who cannot promise that opens it with [`Mapping::Read`]. The views are plain bytes, for which every bit
/// pattern is a value, and all that is parsed from them was checked once at open; nothing later relies on more.
#[allow(unsafe_code)] // a mapping is unsafe by nature; the promise is above
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the promise above.
    unsafe { Mmap::map(file) }
}
