//! From a kernel, its fillings and constants to a compute pipeline; each made once.

use super::cache::Cache;
use super::noted;
use crate::error::{Error, Result};
use crate::program::Launch;
use crate::shader::{self, Binding};
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A compiled kernel and the names that it binds.
#[derive(Debug)]
pub(super) struct Pipeline {
    pub(super) pipeline: wgpu::ComputePipeline,
    pub(super) layout: wgpu::BindGroupLayout,
    pub(super) bindings: Vec<Binding>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    kernel: &'static str,
    fillings: Vec<(&'static str, &'static str)>,
    constants: Vec<(&'static str, u64)>,
}

/// Most groups of lanes in a workgroup of `moe_down_add`: `fold_shared` has room for so many.
const TEAMS: u32 = 8;

/// How shaders are compiled on this device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Compile {
    /// Sums over lanes by shuffles.
    pub(super) subgroups: bool,
    /// Lanes that share a row of weights: 32 where subgroups have as many, else 8. Of the adapter, also where its
    /// subgroups are not used, so that the bits stay.
    pub(super) wide: bool,
    /// FP4 codes by a table instead of by subnormal halves.
    pub(super) table_decode: bool,
    /// Keep wgpu's bounds and loop checks in the shaders.
    pub(super) checked: bool,
}

/// Every pipeline made so far.
#[derive(Debug)]
pub(super) struct Pipelines {
    compile: Compile,
    made: Mutex<HashMap<Key, Arc<Pipeline>>>,
    /// Where they go from one run to the next.
    cache: Option<Cache>,
    /// How many there were when the cache was saved.
    saved: AtomicUsize,
}

impl Drop for Pipelines {
    fn drop(&mut self) {
        self.save();
    }
}

impl Pipelines {
    pub(super) fn new(compile: Compile, cache: Option<Cache>) -> Self {
        Self { compile, made: Mutex::default(), cache, saved: AtomicUsize::new(0) }
    }

    /// Bytes of pipelines that came from the disk.
    pub(super) fn read_bytes(&self) -> usize {
        self.cache.as_ref().map_or(0, Cache::read_bytes)
    }

    /// Keep what was compiled since the last time.
    fn save(&self) {
        let Some(cache) = &self.cache else { return };
        let made = self.made.lock().unwrap_or_else(PoisonError::into_inner).len();
        if self.saved.swap(made, Ordering::Relaxed) < made {
            cache.save();
        }
    }

    /// The pipeline of a launch, compiled on first use.
    pub(super) fn get(&self, device: &wgpu::Device, launch: &Launch) -> Result<Arc<Pipeline>> {
        let key = Key {
            kernel: launch.kernel.name,
            fillings: launch.fillings.clone(),
            constants: launch.constants.iter().map(|(name, v)| (*name, v.to_bits())).collect(),
        };
        if let Some(pipeline) = self.made.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(pipeline.clone());
        }
        // Compiled outside the lock, so that several threads compile at once.
        let pipeline = Arc::new(compile(device, launch, self.compile, self.cache.as_ref())?);
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(made.entry(key).or_insert(pipeline).clone())
    }

    /// Compile what a program needs, on all cores.
    pub(super) fn prepare(&self, device: &wgpu::Device, launches: &[Launch]) -> Result<()> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let next = AtomicUsize::new(0);
        // One launch for each distinct pipeline, so that no two threads compile the same.
        let mut seen = std::collections::HashSet::new();
        let distinct: Vec<&Launch> = launches
            .iter()
            .filter(|l| seen.insert(format!("{}{:?}{:?}", l.kernel.name, l.fillings, l.constants)))
            .collect();
        std::thread::scope(|scope| {
            let work = || {
                while let Some(launch) = distinct.get(next.fetch_add(1, Ordering::Relaxed)) {
                    self.get(device, launch)?;
                }
                Ok(())
            };
            let threads: Vec<_> = (0..threads.min(distinct.len())).map(|_| scope.spawn(work)).collect();
            threads.into_iter().try_for_each(|t| t.join().expect("compiling does not panic"))
        })?;
        self.save();
        Ok(())
    }
}

fn compile(device: &wgpu::Device, launch: &Launch, options: Compile, cache: Option<&Cache>) -> Result<Pipeline> {
    let mut fillings = launch.fillings.clone();
    let choices = [
        ("reduce", if options.subgroups { "reduce_subgroup" } else { "reduce_shared" }),
        ("fold", if options.subgroups { "fold_subgroup" } else { "fold_shared" }),
        ("lanes", if options.wide { "lanes_32" } else { "lanes_8" }),
        ("e2m1", if options.table_decode { "e2m1_table" } else { "e2m1_half" }),
    ];
    let open = |slot: &str| launch.kernel.slots.iter().any(|s| s.name == slot);
    fillings.extend(choices.into_iter().filter(|(slot, _)| open(slot)));
    let mut constants = launch.constants.clone();
    let name = shader::label(launch.kernel, &fillings);
    let source = shader::compose(launch.kernel, &fillings);
    let parsed = shader::parse(&name, &source).map_err(Error::Device)?;
    let takes = |wanted| parsed.overrides.iter().any(|(_, o)| o.name.as_deref() == Some(wanted));
    if takes("SLOTS") {
        let constant = |wanted| launch.constants.iter().find(|(name, _)| *name == wanted).map(|(_, n)| *n as u32);
        let width = constant("K").or_else(|| constant("D")).expect("a kernel whose lanes share a row has its width");
        let lanes = if options.wide { 32 } else { 8 };
        let slots = width.div_ceil(16).div_ceil(lanes).clamp(1, 8);
        constants.push(("SLOTS", f64::from(slots)));
        // Groups of lanes that share the slots of all routes evenly.
        if takes("TEAMS") {
            let routes = constant("A").expect("a kernel whose lanes share routes has their number");
            let items = routes * slots;
            constants.push(("TEAMS", f64::from(items.div_ceil(items.div_ceil(TEAMS)))));
        }
    }
    let bindings = shader::bindings(&parsed);
    let make = || {
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(&name),
            layout: None,
            module: &module(device, &name, parsed, options.checked),
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &constants,
                // Every kernel writes its workgroup memory before it reads it.
                zero_initialize_workgroup_memory: false,
            },
            cache: cache.map(Cache::wgpu),
        });
        // Here, since only this says that a device is lost.
        let layout = pipeline.get_bind_group_layout(0);
        Pipeline { pipeline, layout, bindings }
    };
    match noted(device, make) {
        (pipeline, None) => Ok(pipeline),
        (_, Some(wgpu::Error::OutOfMemory { .. })) => Err(Error::Device(format!(
            "the device has no memory left to compile kernel {name}: choose a smaller context, chunk or model"
        ))),
        (_, Some(e)) => Err(Error::Device(format!("kernel {name} does not compile on this adapter: {e}"))),
    }
}

#[allow(unsafe_code, reason = "unchecked shaders are several times faster in the K loops")]
fn module(device: &wgpu::Device, name: &str, parsed: naga::Module, checked: bool) -> wgpu::ShaderModule {
    let source = wgpu::ShaderSource::Naga(Cow::Owned(parsed));
    let descriptor = wgpu::ShaderModuleDescriptor { label: Some(name), source };
    if checked {
        return device.create_shader_module(descriptor);
    }
    // SAFETY: the sources are ours alone. Every index is bounded by the grid, an override or the Step uniform, all of
    // which the models derive from shapes that they checked at load (tokens and positions are checked by the session, and
    // a row's `pad` is 0; `ops` and `program` are hidden from the documentation for this reason); every loop ends by such
    // a bound.
    // `--checked-shaders` runs the same sources with the checks on, and a test demands equal bits.
    unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
}
