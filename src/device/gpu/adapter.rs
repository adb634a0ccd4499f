//! Finding an adapter and opening a device on it. Features and limits are asked for, never assumed.

use crate::error::{Error, Result};
use wgpu::{Backends, DeviceType, Features, InstanceFlags, Limits};

/// What a user may want to know of an adapter.
#[derive(Clone, Debug)]
pub struct AdapterFacts {
    /// The adapter's name, as its driver gives it.
    pub name: String,
    /// `Vulkan`, `Metal` or `Dx12`.
    pub backend: String,
    /// `discrete GPU`, `integrated GPU`, `software`, ...
    pub kind: &'static str,
    /// Driver name and version.
    pub driver: String,
    /// Smallest and largest subgroup, in lanes; (0, 0) where there are none.
    pub subgroup: (u32, u32),
    /// Whether shaders may compute in f16.
    pub f16: bool,
    /// Whether prompts take its matrix units, unless they are told not to.
    pub matrix: bool,
    /// Largest storage binding, in bytes.
    pub max_binding_bytes: u64,
    /// Largest buffer, in bytes.
    pub max_buffer_bytes: u64,
    /// Largest number of workgroups in one dimension of a grid.
    pub max_grid: u32,
}

/// The wgpu instance that every device of ours comes from.
fn instance() -> wgpu::Instance {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = Backends::VULKAN | Backends::METAL | Backends::DX12;
    // Indirect-call validation costs a dispatch each, and debug layers belong to whoever sets WGPU_DEBUG.
    descriptor.flags = InstanceFlags::empty().with_env();
    wgpu::Instance::new(descriptor)
}

fn rank(kind: DeviceType) -> u32 {
    match kind {
        DeviceType::DiscreteGpu => 0,
        DeviceType::IntegratedGpu => 1,
        DeviceType::VirtualGpu => 2,
        DeviceType::Other => 3,
        DeviceType::Cpu => 4,
    }
}

/// Every adapter, the most able kind first.
pub(super) fn adapters() -> Vec<wgpu::Adapter> {
    let mut found = pollster::block_on(instance().enumerate_adapters(Backends::all()));
    found.sort_by_key(|a| rank(a.get_info().device_type));
    found
}

/// Facts about every adapter, in the order in which `auto` prefers them.
pub fn list() -> Vec<AdapterFacts> {
    adapters().iter().map(|a| facts(&a.get_info(), a.features(), &a.limits(), has_matrix_units(a))).collect()
}

pub(super) fn facts(info: &wgpu::AdapterInfo, features: Features, limits: &Limits, matrix: bool) -> AdapterFacts {
    let subgroups = features.contains(Features::SUBGROUP);
    AdapterFacts {
        name: info.name.clone(),
        backend: format!("{:?}", info.backend),
        kind: kind(info.device_type),
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
        subgroup: if subgroups { (info.subgroup_min_size, info.subgroup_max_size) } else { (0, 0) },
        f16: features.contains(Features::SHADER_F16),
        matrix,
        max_binding_bytes: limits.max_storage_buffer_binding_size,
        max_buffer_bytes: limits.max_buffer_size,
        max_grid: limits.max_compute_workgroups_per_dimension,
    }
}

/// Whether `auto` should take this adapter: a software one is slower than the twins.
pub fn is_hardware(facts: &AdapterFacts) -> bool {
    facts.kind != kind(DeviceType::Cpu)
}

fn kind(of: DeviceType) -> &'static str {
    match of {
        DeviceType::DiscreteGpu => "discrete GPU",
        DeviceType::IntegratedGpu => "integrated GPU",
        DeviceType::VirtualGpu => "virtual GPU",
        DeviceType::Cpu => "software",
        DeviceType::Other => "other",
    }
}

/// The first adapter whose name contains `name` (ignoring case), or the first of all.
pub(super) fn find(name: Option<&str>) -> Result<wgpu::Adapter> {
    let all = adapters();
    let wanted =
        |a: &&wgpu::Adapter| name.is_none_or(|name| a.get_info().name.to_lowercase().contains(&name.to_lowercase()));
    all.iter().find(wanted).cloned().ok_or_else(|| {
        let names: Vec<String> = all.iter().map(|a| a.get_info().name).collect();
        Error::Device(match (name, names.is_empty()) {
            (_, true) => {
                "no Vulkan, Metal or DirectX 12 adapter was found: install a GPU driver (on Debian or Ubuntu, \
                          `mesa-vulkan-drivers` has a software one), or use the CPU"
                    .to_owned()
            }
            (Some(name), false) => format!("no adapter is called {name:?}; there are: {}", names.join(", ")),
            (None, false) => unreachable!("without a name every adapter is wanted"),
        })
    })
}

/// Open an adapter; and whether with matrix units.
pub(super) fn open(adapter: &wgpu::Adapter, options: &super::Options) -> Result<(wgpu::Device, wgpu::Queue, bool)> {
    let mut features = (Features::SUBGROUP | Features::TIMESTAMP_QUERY | Features::PIPELINE_CACHE) & adapter.features();
    if options.without_subgroups {
        features.remove(Features::SUBGROUP);
    }
    let matrix = !options.without_subgroups && !options.without_matrix_units && has_matrix_units(adapter);
    let mut experimental_features = wgpu::ExperimentalFeatures::disabled();
    if matrix {
        features |= MATRIX;
        experimental_features = experimental();
    }
    let descriptor = wgpu::DeviceDescriptor {
        label: Some("fourfold"),
        required_features: features,
        required_limits: adapter.limits(),
        experimental_features,
        // Weights are a few large buffers that stay: no need for slack in the blocks.
        memory_hints: wgpu::MemoryHints::MemoryUsage,
        trace: wgpu::Trace::Off,
    };
    pollster::block_on(adapter.request_device(&descriptor))
        .map(|(device, queue)| (device, queue, matrix))
        .map_err(|e| Error::Device(format!("{} did not open: {e}", adapter.get_info().name)))
}

/// What kernels with matrix units need.
const MATRIX: Features = Features::EXPERIMENTAL_COOPERATIVE_MATRIX.union(Features::SHADER_F16);

/// Whether the adapter multiplies 16 x 16 halves and adds them in f32, a subgroup of 32 lanes at a time.
fn has_matrix_units(adapter: &wgpu::Adapter) -> bool {
    use wgpu::CooperativeScalarType::{F16, F32};
    let info = adapter.get_info();
    let fits = |p: &wgpu::CooperativeMatrixProperties| {
        [p.m_size, p.n_size, p.k_size] == [16; 3] && p.ab_type == F16 && p.cr_type == F32
    };
    adapter.features().contains(MATRIX | Features::SUBGROUP)
        && (info.subgroup_min_size, info.subgroup_max_size) == (32, 32)
        && adapter.limits().max_compute_workgroup_storage_size >= 32 << 10
        && adapter.cooperative_matrix_properties().iter().any(fits)
}

#[allow(unsafe_code, reason = "wgpu asks for a promise before it gives out what it still works on")]
fn experimental() -> wgpu::ExperimentalFeatures {
    // SAFETY: only cooperative matrices are asked for, in kernels of ours that the tests hold to their twins where an adapter
    // has them.
    unsafe { wgpu::ExperimentalFeatures::enabled() }
}
