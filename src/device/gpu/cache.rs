//! Compiled pipelines on disk, so that the next start need not compile them: a file for each adapter and driver.
//!
//! What is in the file goes to the driver, which may trust it. So it is only read from a folder and a file that are ours
//! and that nobody else can write, and only whole: magic, version, and a hash of the data and of Fourfold's version.
//! Anything else is ignored and written anew. Nothing here is an error: without the file it takes longer.

use std::fs::{self, File, OpenOptions};
use std::hash::{DefaultHasher, Hasher};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// What a file begins with: a name, and the version of what follows.
const MAGIC: &[u8; 8] = b"4fold\x00\x00\x01";
/// Larger files are not ours.
const MOST: u64 = 256 << 20;

/// Where compiled pipelines are kept from one run to the next. Used where the adapter can (Vulkan). It changes no result.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum PipelineCache {
    /// For a device that Fourfold opens: the folder that the variable `FOURFOLD_CACHE` names, or `fourfold` in the
    /// user's folder for caches; nowhere if the variable is `off`. For a device of the application's own: nowhere.
    #[default]
    Auto,
    /// Nowhere.
    Off,
    /// In this folder, which is made if need be, and must be the user's and writable by nobody else.
    Folder(PathBuf),
}

impl PipelineCache {
    /// The folder, for a device that Fourfold opens.
    pub(super) fn of_ours(&self) -> Option<PathBuf> {
        if *self == Self::Auto { users_folder() } else { self.of_anothers() }
    }

    /// The folder, for a device of the application's own.
    pub(super) fn of_anothers(&self) -> Option<PathBuf> {
        match self {
            Self::Auto | Self::Off => None,
            Self::Folder(folder) => Some(folder.clone()),
        }
    }
}

fn users_folder() -> Option<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    match var("FOURFOLD_CACHE") {
        Some(value) if value.as_os_str().eq_ignore_ascii_case("off") => return None,
        Some(folder) => return Some(folder),
        None => {}
    }
    let caches = match std::env::consts::OS {
        "windows" => var("LOCALAPPDATA"),
        "macos" => var("HOME").map(|home| home.join("Library/Caches")),
        _ => var("XDG_CACHE_HOME").or_else(|| var("HOME").map(|home| home.join(".cache"))),
    };
    // A relative path is invalid by the rules of XDG.
    caches.filter(|folder| folder.is_absolute()).map(|folder| folder.join("fourfold"))
}

/// The driver's cache of pipelines, and the file that it came from and goes to.
#[derive(Debug)]
pub(super) struct Cache {
    cache: wgpu::PipelineCache,
    path: PathBuf,
    /// Bytes that were read.
    read: usize,
    /// The hash of what the file holds.
    on_disk: Mutex<Option<u64>>,
}

impl Cache {
    /// `None` where the device has no such cache, or the folder is not to be trusted.
    pub(super) fn open(device: &wgpu::Device, folder: &Path) -> Option<Self> {
        let info = device.adapter_info();
        let key = wgpu::util::pipeline_cache_key(&info)?;
        if !device.features().contains(wgpu::Features::PIPELINE_CACHE) {
            return None;
        }
        if let Err(why) = private_folder(folder) {
            tracing::debug!("compiled pipelines are not kept in {}: {why}", folder.display());
            return None;
        }
        let mut driver = DefaultHasher::new();
        for text in [&info.name, &info.driver, &info.driver_info] {
            driver.write(text.as_bytes());
            driver.write_u8(0xff);
        }
        let path = folder.join(format!("{key}_{:016x}.bin", driver.finish()));
        let data = match read(&path) {
            Ok(data) => Some(data),
            Err(why) => {
                tracing::debug!("{}: {why}", path.display());
                None
            }
        };
        let (cache, error) = super::noted(device, || create(device, data.as_deref()));
        if let Some(e) = error {
            tracing::debug!("no cache of pipelines: {e}");
            return None;
        }
        let read = data.as_ref().map_or(0, Vec::len);
        Some(Self { cache, path, read, on_disk: Mutex::new(data.as_deref().map(hash)) })
    }

    pub(super) fn wgpu(&self) -> &wgpu::PipelineCache {
        &self.cache
    }

    /// Bytes of pipelines that the file held.
    pub(super) fn read_bytes(&self) -> usize {
        self.read
    }

    /// Write what there is now, if that is more than the file holds.
    pub(super) fn save(&self) {
        let Some(data) = self.cache.get_data() else { return };
        let mut on_disk = self.on_disk.lock().unwrap_or_else(PoisonError::into_inner);
        let new = hash(&data);
        if *on_disk == Some(new) {
            return;
        }
        match write(&self.path, &data) {
            Ok(()) => *on_disk = Some(new),
            Err(e) => tracing::debug!("{}: {e}", self.path.display()),
        }
    }
}

#[allow(unsafe_code, reason = "wgpu cannot check what a driver makes of a cache's data")]
fn create(device: &wgpu::Device, data: Option<&[u8]>) -> wgpu::PipelineCache {
    let descriptor = wgpu::PipelineCacheDescriptor { label: Some("fourfold"), data, fallback: true };
    // SAFETY: the data must be what `get_data` gave. It was written by `write` below, as far as anybody can know who has
    // it from a disk: it lies in a file of this user's that no other can write, and its hash is right. wgpu compares
    // adapter and driver, and begins anew where they are others.
    unsafe { device.create_pipeline_cache(&descriptor) }
}

/// Of the data, and of what wrote it.
fn hash(data: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(env!("CARGO_PKG_VERSION").as_bytes());
    hasher.write(data);
    hasher.finish()
}

/// The data of a file, if it is whole and ours.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let ignored = |why: &str| io::Error::other(format!("ignored: {why}"));
    // Not through a link, which could lead to another's file.
    if !path.symlink_metadata()?.is_file() {
        return Err(ignored("it is no plain file"));
    }
    let mut file = File::open(path)?;
    let about = file.metadata()?;
    if !is_private(&about, &path.with_extension("mine"))? {
        return Err(ignored("others can write it, or it is another's"));
    }
    if about.len() > MOST {
        return Err(ignored("it is too large"));
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let (head, data) = bytes.split_at_checked(16).ok_or_else(|| ignored("it is cut off"))?;
    if &head[..8] != MAGIC || head[8..] != hash(data).to_le_bytes() {
        return Err(ignored("it is damaged, or of another version"));
    }
    Ok(bytes.split_off(16))
}

/// Under another name first, which is this call's alone, so that nobody reads half of it.
fn write(path: &Path, data: &[u8]) -> io::Result<()> {
    let next = || path.with_extension(format!("{}.{}.partial", std::process::id(), call()));
    let mut partial = next();
    let mut file = loop {
        match new_file(&partial) {
            // A process of this number was killed here.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => partial = next(),
            other => break other?,
        }
    };
    let mut fill = || {
        file.write_all(MAGIC)?;
        file.write_all(&hash(data).to_le_bytes())?;
        file.write_all(data)
    };
    let renamed = fill().and_then(|()| fs::rename(&partial, path));
    renamed.inspect_err(|_| _ = fs::remove_file(&partial))
}

/// A number that no other call in this process gets: several threads may make files at once.
fn call() -> u64 {
    static CALLS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    CALLS.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

/// Makes the folder, for its user alone, or holds the one that is there to the same.
fn private_folder(folder: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)?;
    let about = folder.symlink_metadata()?;
    if about.is_dir() && is_private(&about, &folder.join("mine"))? {
        return Ok(());
    }
    Err(io::Error::other("it is no folder of this user's alone: others can write it, or own it"))
}

/// Whether a file or folder is this process's user's, and nobody else can write it. Who the user is, a new file beside it
/// tells, which is removed again.
#[cfg(unix)]
fn is_private(about: &fs::Metadata, beside: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let mine = beside.with_extension(format!("{}.{}.mine", std::process::id(), call()));
    let user = new_file(&mine).and_then(|file| file.metadata()).map(|about| about.uid());
    let _ = fs::remove_file(&mine);
    Ok(about.uid() == user? && about.mode() & 0o022 == 0)
}

/// The user's folder for caches is the user's own here.
#[cfg(not(unix))]
fn is_private(_: &fs::Metadata, _: &Path) -> io::Result<bool> {
    Ok(true)
}

/// A file that was not there, for its user alone.
fn new_file(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A new directory under the system's temporary one, removed on drop.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("fourfold-cache-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&dir);
            private_folder(&dir).unwrap();
            Self(dir)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn what_is_not_whole_is_not_read() {
        let dir = Scratch::new("damaged");
        let path = dir.0.join("a.bin");
        let data: Vec<u8> = (0..1000u32).map(|i| (i * 7) as u8).collect();
        write(&path, &data).unwrap();
        assert_eq!(read(&path).unwrap(), data);
        let whole = fs::read(&path).unwrap();
        let fails = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            assert!(read(&path).is_err());
        };
        for at in [0, 7, 8, 15, 16, 500, whole.len() - 1] {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            fails(&bytes);
        }
        for len in [0, 5, 8, 16, 17, whole.len() - 1] {
            fails(&whole[..len]);
        }
        fails(&[&whole[..], &[0]].concat());
        fs::write(&path, &whole).unwrap();
        assert_eq!(read(&path).unwrap(), data);
        // It is overwritten whatever it was, and nothing else is left behind.
        fails(b"foreign");
        write(&path, &data).unwrap();
        assert_eq!(read(&path).unwrap(), data);
        assert_eq!(fs::read_dir(&dir.0).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn what_others_can_write_is_not_read() {
        use std::os::unix::fs::PermissionsExt;
        let dir = Scratch::new("writable");
        let path = dir.0.join("a.bin");
        write(&path, b"data").unwrap();
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        let set = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        assert_eq!([mode(&dir.0), mode(&path)], [0o700, 0o600]);
        for bad in [0o660, 0o606] {
            set(&path, bad);
            assert!(read(&path).is_err(), "{bad:o}");
        }
        set(&path, 0o644);
        assert_eq!(read(&path).unwrap(), b"data");
        let link = dir.0.join("b.bin");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(read(&link).is_err());
        set(&dir.0, 0o770);
        assert!(private_folder(&dir.0).is_err());
        set(&dir.0, 0o700);
        private_folder(&dir.0).unwrap();
        let elsewhere = dir.0.join("link");
        std::os::unix::fs::symlink(&dir.0, &elsewhere).unwrap();
        assert!(private_folder(&elsewhere).is_err());
    }

    #[test]
    fn an_applications_device_is_left_alone_unless_it_asks() {
        let folder = PathBuf::from("here");
        assert_eq!(PipelineCache::Auto.of_anothers(), None);
        assert_eq!(PipelineCache::Off.of_ours(), None);
        assert_eq!(PipelineCache::Folder(folder.clone()).of_anothers(), Some(folder));
    }
}
