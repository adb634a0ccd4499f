//! How fast weights reach a device: from host memory that was touched before (the ceiling), and from a mapped file that
//! the page cache holds; and a whole load of such a file.
//!
//!     cargo bench --bench loading [-- SHAPE[:LAYERS][:FORMAT] [DIR]]
//!
//! The checkpoint (default gpt-oss-20b:2) is written to a new folder in DIR (default: the system's for temporary files)
//! and removed again. Medians of 5 rounds, in which both take turns; every round maps the file anew.

use fourfold::bench::median;
use fourfold::checkpoint::{Checkpoint, Mapping, ScaleOrder};
use fourfold::config::Config;
use fourfold::device::{Buffer, Device};
use fourfold::model::Plan;
use fourfold::synth::Recipe;
use fourfold::{Activations, CacheFormat, DeviceChoice, Engine, Gpu, HostStages, Needs, Result};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

const ROUNDS: usize = 5;

/// Removed on drop.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let recipe = Recipe::parse(args.first().map_or("gpt-oss-20b:2", String::as_str))?;
    let parent = args.get(1).map_or_else(std::env::temp_dir, PathBuf::from);
    let folder = Folder(parent.join(format!("fourfold-loading-{}", std::process::id())));
    let started = Instant::now();
    let written = recipe.write(&folder.0, &mut |_| ControlFlow::Continue(()))?.expect("nobody stops it");
    println!("written: {:.2} GB at {:.2} GB/s", gb(written.bytes), gb(written.bytes) / started.elapsed().as_secs_f64());

    let gpu: Arc<dyn Device> = Arc::new(Gpu::open(&Default::default())?);
    println!("{}", gpu.describe());
    let (mut touched, mut mapped) = (Vec::new(), Vec::new());
    // As many bytes at once as one buffer may hold.
    let most = gpu.limits().max_binding_bytes.min(1 << 30) as usize / 4 * 4;
    let buffer = Buffer::new(&gpu, "target", most as u64)?;
    // As large as the file, so that neither comes from a cache of the processor.
    let host = vec![0x5a; written.bytes as usize];
    gpu.write_pieces(buffer.slice(), &[&host[..most.min(host.len())]])?;
    for round in 0..=ROUNDS {
        let checkpoint = Checkpoint::open(&folder.0, Mapping::Mmap)?;
        let mut groups: Vec<Vec<&[u8]>> = vec![Vec::new()];
        let mut room = most;
        for run in checkpoint.tensors().flat_map(|t| t.bytes.chunks(most)) {
            if run.len() > room {
                groups.push(Vec::new());
                room = most;
            }
            room -= run.len();
            groups.last_mut().expect("there is one").push(run);
        }
        let from_memory = seconds(|| {
            let mut rest = &host[..];
            for group in &groups {
                let mut pieces = Vec::new();
                for run in group {
                    let (piece, others) = rest.split_at(run.len());
                    pieces.push(piece);
                    rest = others;
                }
                gpu.write_pieces(buffer.slice(), &pieces)?;
            }
            gpu.wait()
        })?;
        let from_file = seconds(|| {
            groups.iter().try_for_each(|group| gpu.write_pieces(buffer.slice(), group))?;
            gpu.wait()
        })?;
        // The first round warms up, the page cache too.
        if round > 0 {
            touched.push(from_memory);
            mapped.push(from_file);
        }
    }
    let bytes = written.bytes;
    let (touched, mapped) = (median(touched), median(mapped));
    println!("from touched host memory: {:6.2} GB/s  (the ceiling)", gb(bytes) / touched);
    println!("from a mapped file:       {:6.2} GB/s  ({:.0} % of it)", gb(bytes) / mapped, 100.0 * touched / mapped);
    let (mut loads, mut checks) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        checks.push(seconds(|| check(&folder.0, &*gpu))?);
        let builder = Engine::builder().checkpoint(&folder.0).device(DeviceChoice::Own(gpu.clone()));
        loads.push(seconds(|| builder.build().map(drop))?);
    }
    let (load, checks) = (median(loads), median(checks));
    println!(
        "a whole load:             {:6.2} GB/s  ({:.0} % of it), {load:.2} s, of which {checks:.2} s to check all tensors",
        gb(bytes) / load,
        100.0 * touched / load
    );
    Ok(())
}

/// What a load does before it takes any memory.
fn check(folder: &Path, device: &dyn Device) -> Result<()> {
    let checkpoint = Checkpoint::open(folder, Mapping::Mmap)?;
    let plan = Plan {
        context: 4096,
        chunk: 128,
        paged: None,
        cache: CacheFormat::F32,
        host: HostStages::default(),
        activations: Activations::F32,
        scale_order: ScaleOrder::Linear,
    };
    Needs::of(&checkpoint, &Config::open(&checkpoint)?, &plan, device.limits()).map(|_| ())
}

fn gb(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

fn seconds(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let started = Instant::now();
    work()?;
    Ok(started.elapsed().as_secs_f64())
}
