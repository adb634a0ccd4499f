//! How weights come to a device: large writes, memory that does not suffice, compiled pipelines kept on disk.

use crate::harness::{Random, cpu, gpus};
use crate::models::fixture;
use fourfold::checkpoint::{Checkpoint, Mapping, ScaleOrder};
use fourfold::config::Config;
use fourfold::device::gpu::{Options, PipelineCache};
use fourfold::device::{Buffer, Device, Limits, cpu::Cpu};
use fourfold::model::{Model, Plan};
use fourfold::ops::Layout;
use fourfold::program::{BufferId, Program, Slice};
use fourfold::{Activations, CacheFormat, DeviceChoice, Engine, Error, Gpu, HostStages, Result, Want};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

fn read(device: &Arc<dyn Device>, slice: Slice) -> Vec<u8> {
    let mut bytes = vec![0xee; slice.bytes as usize];
    device.read(slice, &mut bytes).unwrap();
    bytes
}

/// Random bytes that are cheap to make.
fn bytes(seed: u64, n: usize) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes: Vec<u8> = (0..n.div_ceil(8)).flat_map(|_| random.next().to_le_bytes()).collect();
    bytes.truncate(n);
    bytes
}

#[test]
fn codes_and_scales_are_laid_out_on_their_way() {
    let Some((_, device)) = gpus().first() else { return };
    for (total, row) in [(4096usize, 5), ((5 << 20) + 4, 90), ((100 << 20) + 8, 11)] {
        let all = bytes(total as u64, total);
        let mut random = Random(9);
        let mut pieces: Vec<&[u8]> = Vec::new();
        let mut rest = &all[..];
        while !rest.is_empty() {
            // Whole words, shorter and longer than what is laid out at once.
            let count = [4, 12, 4092, 4100, total / 3 / 4 * 4][random.below(5)].min(rest.len());
            let (piece, others) = rest.split_at(count);
            pieces.push(piece);
            rest = others;
        }
        let rows = total / row;
        let scales = [&all[..rows * row]];
        for (pieces, layout) in [(&pieces[..], Layout::Codes), (&scales[..], Layout::Scales(row))] {
            let mut want = vec![0; layout.bytes(pieces.iter().map(|piece| piece.len()).sum())];
            layout.put(&pieces.concat(), &mut want);
            let buffer = Buffer::new(device, "target", want.len() as u64).unwrap();
            device.write_laid_out(buffer.slice(), pieces, layout).unwrap();
            assert!(read(device, buffer.slice())[..want.len()] == want, "{total} bytes, {layout:?}");
        }
    }
}

#[test]
fn pieces_of_any_length_come_in_order() {
    for device in [Some(cpu()), gpus().first().map(|(_, gpu)| gpu.clone())].into_iter().flatten() {
        // Small, past the smallest staging buffer, and round the whole ring more than once.
        for total in [0, 3, 4, 1021, (1 << 20) + 1, (5 << 20) + 2, (100 << 20) + 7] {
            let all = bytes(total as u64, total);
            let mut random = Random(7);
            let mut pieces: Vec<&[u8]> = Vec::new();
            let mut rest = &all[..];
            while !rest.is_empty() {
                // Nothing, single bytes, and large pieces, at all offsets in a word.
                let count = [0, 1, 2, 3, 5, 4093, total / 3, total / 7][random.below(8)].min(rest.len());
                let (piece, others) = rest.split_at(count);
                pieces.push(piece);
                rest = others;
            }
            let whole = (total as u64).next_multiple_of(4);
            let buffer = Buffer::new(&device, "target", whole + 32).unwrap();
            device.write(buffer.slice(), &vec![0x55; buffer.slice().bytes as usize]).unwrap();
            let to = Slice { offset: 16, bytes: whole, ..buffer.slice() };
            // Twice, at once: the second time the ring is in use.
            let reversed: Vec<&[u8]> = pieces.iter().rev().copied().collect();
            device.write_pieces(to, &reversed).unwrap();
            device.write_pieces(to, &pieces).unwrap();
            let found = read(&device, buffer.slice());
            let (before, found) = found.split_at(16);
            let (found, after) = found.split_at(whole as usize);
            assert!(before == [0x55; 16] && after == [0x55; 16], "{total}: it wrote past its slice");
            assert!(found[..total] == all, "{total} bytes in {} pieces", pieces.len());
            assert!(found[total..].iter().all(|b| *b == 0), "{total}: the last word is filled up with zeros");
        }
    }
}

#[test]
fn large_and_small_writes_keep_their_order() {
    for (name, device) in gpus().iter().take(1) {
        let n = 40 << 20;
        let buffer = Buffer::new(device, "target", n as u64).unwrap();
        let (large, larger) = (bytes(1, n), bytes(2, n));
        let at = |offset: u64| Slice { offset, bytes: 64, ..buffer.slice() };
        device.write(at(128), &[1; 64]).unwrap();
        device.write(buffer.slice(), &large).unwrap();
        device.write(at(256), &[2; 64]).unwrap();
        let mut want = large;
        want[256..320].fill(2);
        assert!(read(device, buffer.slice()) == want, "{name}");
        device.write(at(512), &[3; 64]).unwrap();
        device.write(buffer.slice(), &larger).unwrap();
        device.wait().unwrap();
        device.write(at(0), &[4; 64]).unwrap();
        let mut want = larger;
        want[..64].fill(4);
        assert!(read(device, buffer.slice()) == want, "{name}");
    }
}

#[test]
fn a_large_write_to_a_lost_device_is_an_error() {
    let Some((device, queue)) = crate::engine::own_wgpu() else { return };
    let gpu: Arc<dyn Device> = Arc::new(Gpu::from_wgpu(device.clone(), queue, &Options::default()));
    let data = bytes(3, 100 << 20);
    let buffer = Buffer::new(&gpu, "target", data.len() as u64).unwrap();
    // With copies under way, and all staging buffers in use.
    gpu.write(buffer.slice(), &data).unwrap();
    device.destroy();
    for _ in 0..2 {
        let error = gpu.write(buffer.slice(), &data).unwrap_err();
        assert!(matches!(error, Error::DeviceLost(_)), "{error}");
    }
}

/// The twins with little memory, and counts of what is asked of them.
#[derive(Debug)]
struct Small {
    twins: Cpu,
    bytes: u64,
    sizes: Mutex<std::collections::HashMap<BufferId, u64>>,
    taken: AtomicU64,
    writes: AtomicUsize,
}

impl Small {
    fn new(bytes: u64) -> Arc<Self> {
        let (sizes, taken, writes) = (Mutex::default(), AtomicU64::new(0), AtomicUsize::new(0));
        Arc::new(Self { twins: Cpu::default(), bytes, sizes, taken, writes })
    }
}

impl Device for Small {
    fn alloc(&self, label: &str, bytes: u64) -> Result<BufferId> {
        if self.taken.fetch_add(bytes, Ordering::Relaxed) + bytes > self.bytes {
            self.taken.fetch_sub(bytes, Ordering::Relaxed);
            return Err(Error::OutOfMemory { what: label.to_owned(), bytes, hint: "" });
        }
        let id = self.twins.alloc(label, bytes)?;
        self.sizes.lock().unwrap().insert(id, bytes);
        Ok(id)
    }
    fn free(&self, id: BufferId) {
        self.taken.fetch_sub(self.sizes.lock().unwrap().remove(&id).unwrap(), Ordering::Relaxed);
        self.twins.free(id);
    }
    fn write(&self, to: Slice, bytes: &[u8]) -> Result<()> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        self.twins.write(to, bytes)
    }
    fn read(&self, from: Slice, bytes: &mut [u8]) -> Result<()> {
        self.twins.read(from, bytes)
    }
    fn prepare(&self, program: &Program) -> Result<()> {
        self.twins.prepare(program)
    }
    fn run(&self, program: &Program) -> Result<()> {
        self.twins.run(program)
    }
    fn wait(&self) -> Result<()> {
        Ok(())
    }
    fn limits(&self) -> Limits {
        self.twins.limits()
    }
    fn describe(&self) -> String {
        "a small device".to_owned()
    }
}

fn plan(context: u32) -> Plan {
    Plan {
        context,
        chunk: 8,
        paged: None,
        cache: CacheFormat::F32,
        host: HostStages::default(),
        activations: Activations::F32,
        scale_order: ScaleOrder::Linear,
    }
}

#[test]
fn a_model_that_does_not_fit_is_refused_before_anything_is_uploaded() {
    let checkpoint = Checkpoint::open(&fixture("tiny"), Mapping::Mmap).unwrap();
    let config = Config::open(&checkpoint).unwrap();
    let load = |small: &Arc<Small>, context| {
        let device: Arc<dyn Device> = small.clone();
        let model = Model::load(&checkpoint, config.clone(), &device, &plan(context), &mut |_| ())?;
        Ok::<_, Error>((model.needs().clone(), model.state(&device, &plan(context))?))
    };
    let ample = Small::new(u64::MAX);
    let (needs, state) = load(&ample, 200).unwrap();
    let (model, session) = (needs.model_bytes(), needs.session_bytes());
    let on_disk = checkpoint.total_bytes();
    assert!(needs.weight_bytes() >= on_disk && needs.weight_bytes() < on_disk + on_disk / 50, "{needs} {on_disk}");
    assert_eq!(state.bytes(), session, "what a conversation takes is known");
    assert!(ample.writes.load(Ordering::Relaxed) > 0);
    drop(state);
    assert_eq!(ample.taken.load(Ordering::Relaxed), 0);

    // Just enough, and one byte less; too little for the weights.
    load(&Small::new(model + session), 200).unwrap();
    for (memory, words) in [(model + session - 1, "--context"), (model - 1, "smaller model"), (0, "smaller model")] {
        let small = Small::new(memory);
        let error = load(&small, 200).unwrap_err();
        let text = error.to_string();
        let Error::DoesNotFit { model_bytes, session_bytes, allocated_bytes, .. } = error else { panic!("{error}") };
        assert_eq!((model_bytes, session_bytes), (model, session));
        assert!(allocated_bytes <= memory && (memory == 0 || allocated_bytes > 0), "{allocated_bytes} of {memory}");
        assert!(text.contains(words) && text.contains("a small device"), "{text}");
        assert_eq!(small.writes.load(Ordering::Relaxed), 0, "nothing is uploaded");
        assert_eq!(small.taken.load(Ordering::Relaxed), 0, "all is given back");
        if memory >= model {
            // A smaller context fits the same device.
            load(&small, 20).unwrap();
        }
    }
}

fn choice(options: Options) -> DeviceChoice {
    DeviceChoice::Gpu(Options { adapter: std::env::var("FOURFOLD_TEST_ADAPTER").ok(), ..options })
}

#[test]
fn a_gpu_without_enough_memory_says_so_and_stays_usable() {
    if gpus().is_empty() {
        return;
    }
    let build = |bytes| {
        let limited =
            Options { max_memory_bytes: Some(bytes), pipeline_cache: PipelineCache::Off, ..Options::default() };
        Engine::builder().checkpoint(fixture("tiny")).device(choice(limited)).context(60).chunk(8).build()
    };
    let needs = build(1 << 30).unwrap().needs().clone();
    // The oracle's few buffers are gone by then.
    let enough = needs.model_bytes() + needs.session_bytes() + (1 << 16);
    build(enough).unwrap().session().unwrap().feed(&[1, 2, 3], Want::Last).unwrap();
    let error = build(needs.model_bytes() / 2).unwrap_err();
    assert!(matches!(error, Error::DoesNotFit { .. }), "{error}");

    let options = Options {
        adapter: std::env::var("FOURFOLD_TEST_ADAPTER").ok(),
        max_memory_bytes: Some(1 << 20),
        pipeline_cache: PipelineCache::Off,
        ..Options::default()
    };
    let gpu: Arc<dyn Device> = Arc::new(Gpu::open(&options).unwrap());
    let half = Buffer::new(&gpu, "half", 1 << 19).unwrap();
    let error = Buffer::new(&gpu, "more than half", (1 << 19) + 16).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    drop(half);
    Buffer::new(&gpu, "more than half", (1 << 19) + 16).unwrap();
}

/// A new directory under the system's temporary one, removed on drop.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn compiled_pipelines_are_kept_and_damaged_ones_ignored() {
    let Some((_, plain)) = gpus().first() else { return };
    let dir = Scratch(std::env::temp_dir().join(format!("fourfold-pipelines-{}", std::process::id())));
    let _ = std::fs::remove_dir_all(&dir.0);
    let open = || {
        let pipeline_cache = PipelineCache::Folder(dir.0.clone());
        let DeviceChoice::Gpu(options) =
            choice(Options { pipeline_cache, without_matrix_units: true, ..Options::default() })
        else {
            panic!()
        };
        Arc::new(Gpu::open(&options).unwrap())
    };
    let run = |device: Arc<dyn Device>| -> Vec<u32> {
        let builder = Engine::builder().checkpoint(fixture("tiny")).device(DeviceChoice::Own(device));
        let mut session = builder.context(60).chunk(8).build().unwrap().session().unwrap();
        session.feed(&[1, 2, 3, 4], Want::All).unwrap().iter().map(|v| v.to_bits()).collect()
    };
    let want = run(plain.clone());
    let files = || -> Vec<PathBuf> { std::fs::read_dir(&dir.0).unwrap().map(|e| e.unwrap().path()).collect() };
    let first = open();
    assert_eq!(first.pipeline_bytes_from_disk(), 0);
    assert_eq!(run(first.clone()), want);
    drop(first);
    if !dir.0.exists() {
        return eprintln!("SKIPPED: {} keeps no pipelines", plain.describe());
    }
    let [file] = &files()[..] else { panic!("one file for one adapter: {:?}", files()) };
    let whole = std::fs::read(file).unwrap();
    let second = open();
    assert!(second.pipeline_bytes_from_disk() > 0);
    assert_eq!(run(second), want);

    let mut damaged = whole.clone();
    *damaged.last_mut().unwrap() ^= 1;
    for bytes in [&damaged[..], &whole[..whole.len() / 2], b"", b"something else"] {
        std::fs::write(file, bytes).unwrap();
        let gpu = open();
        assert_eq!(gpu.pipeline_bytes_from_disk(), 0, "what is damaged is ignored");
        assert_eq!(run(gpu), want);
        assert!(open().pipeline_bytes_from_disk() > 0, "and overwritten");
    }
    assert_eq!(files().len(), 1, "{:?}", files());
}
