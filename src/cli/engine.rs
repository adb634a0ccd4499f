//! What every command that runs a model takes: which weights, which device, and how it computes.

use super::{Usage, terminal};
use clap::ValueEnum;
use fourfold::checkpoint::{Checkpoint, Mapping, ScaleOrder};
use fourfold::config::Config;
use fourfold::device::gpu;
use fourfold::{Activations, CacheFormat, DeviceChoice, Engine, EngineBuilder, HostStages};
use std::path::{Path, PathBuf};

/// What computes, and with which weights.
#[derive(Clone, clap::Args)]
#[command(next_help_heading = "Model and device")]
pub(super) struct EngineArgs {
    /// A Hugging Face directory: gpt_oss, qwen3_moe, qwen3 or llama [default: the built-in model]
    #[arg(long, value_name = "DIR", env = "FOURFOLD_MODEL")]
    model: Option<PathBuf>,
    /// What computes; auto: the best GPU, the CPU where there is none
    #[arg(long, value_name = "WHAT", default_value = "auto")]
    device: DeviceArg,
    /// The GPU whose name contains this; `fourfold devices` lists them
    #[arg(long, value_name = "NAME")]
    adapter: Option<String>,
    /// Tokens that a conversation can hold [default: 4096, or what the model allows]
    #[arg(long, value_name = "TOKENS")]
    context: Option<usize>,
    /// Most prompt tokens at once: more is faster and takes more memory [default: 128; 1024 with matrix units]
    #[arg(long, value_name = "TOKENS")]
    chunk: Option<usize>,
    /// How keys and values are kept; bf16 takes half the memory
    #[arg(long, value_name = "FORMAT", default_value = "f32")]
    kv: KvArg,
    /// What is multiplied with NVFP4 weights: f32 as it is, or quantised to NVFP4 (W4A4) under one scale for all rows of a step (-dynamic), one a token (-token), or the checkpoint's calibrated ones (-static)
    #[arg(long, value_name = "HOW", default_value = "f32")]
    activations: ActivationsArg,
    /// NVFP4 block scales lie in 128x4 order, as one kind of matrix unit takes them, not row by row
    #[arg(long)]
    swizzled_scales: bool,
    /// Stages that the CPU computes while the rest stays on the GPU: choosing experts, summing their outputs, attention; several with commas between
    #[arg(long, value_name = "STAGES", value_delimiter = ',')]
    host: Vec<HostArg>,
    /// Read the weights into memory instead of mapping the files
    #[arg(long)]
    no_mmap: bool,
    /// Keep wgpu's checks in the shaders: same results, slower. Takes a GPU
    #[arg(long)]
    checked_shaders: bool,
    /// Compute prompts without matrix units, as a GPU that has none
    #[arg(long)]
    no_matrix_units: bool,
    /// Compute prompts by the kernels of generated tokens, so that a token's bits do not follow which of the two it was. Slower
    #[arg(long)]
    strict: bool,
    /// Behave as a GPU without subgroups
    #[arg(long, hide = true)]
    no_subgroups: bool,
    /// Behave as a GPU that binds no more than this
    #[arg(long, value_name = "N", hide = true)]
    max_binding_bytes: Option<u64>,
    /// Behave as a GPU that has no more memory than this
    #[arg(long, value_name = "N", hide = true)]
    max_memory_bytes: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DeviceArg {
    Auto,
    Gpu,
    Cpu,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum HostArg {
    Routing,
    Scatter,
    Attention,
}

/// How keys and values are kept.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum KvArg {
    F32,
    Bf16,
}

impl KvArg {
    pub(super) fn format(self) -> CacheFormat {
        match self {
            Self::F32 => CacheFormat::F32,
            Self::Bf16 => CacheFormat::Bf16,
        }
    }
}

/// What is multiplied with NVFP4 weights.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum ActivationsArg {
    F32,
    Nvfp4Dynamic,
    Nvfp4Token,
    Nvfp4Static,
}

impl ActivationsArg {
    pub(super) fn activations(self) -> Activations {
        match self {
            Self::F32 => Activations::F32,
            Self::Nvfp4Dynamic => Activations::Nvfp4Dynamic,
            Self::Nvfp4Token => Activations::Nvfp4Token,
            Self::Nvfp4Static => Activations::Nvfp4Static,
        }
    }
}

/// The word that stands for a value on the command line.
fn word(value: impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// The word of the option.
pub(super) fn activations_name(activations: Activations) -> &'static str {
    match activations {
        Activations::F32 => "f32",
        Activations::Nvfp4Dynamic => "nvfp4-dynamic",
        Activations::Nvfp4Token => "nvfp4-token",
        Activations::Nvfp4Static => "nvfp4-static",
    }
}

pub(super) fn scale_order(swizzled: bool) -> ScaleOrder {
    if swizzled { ScaleOrder::Swizzled } else { ScaleOrder::Linear }
}

impl EngineArgs {
    pub(super) fn device(&self) -> anyhow::Result<DeviceChoice> {
        let asks_for_gpu = self.adapter.is_some()
            || self.checked_shaders
            || self.no_subgroups
            || self.max_binding_bytes.is_some()
            || self.max_memory_bytes.is_some();
        match self.device {
            DeviceArg::Cpu if asks_for_gpu => {
                Err(Usage("--device cpu does not go with options of a GPU (--adapter, --checked-shaders)".into())
                    .into())
            }
            DeviceArg::Cpu => Ok(DeviceChoice::Cpu),
            // The CPU has no matrix units to leave alone.
            DeviceArg::Auto if !asks_for_gpu => Ok(DeviceChoice::Prefer(self.gpu_options())),
            DeviceArg::Auto | DeviceArg::Gpu => Ok(self.gpu()),
        }
    }

    /// Whether the user named a model.
    pub(super) fn has_model(&self) -> bool {
        self.model.is_some()
    }

    /// Whether all rows of a step are quantised under one scale.
    pub(super) fn shares_scales(&self) -> bool {
        self.activations == ActivationsArg::Nvfp4Dynamic
    }

    /// Whether no stage is placed on the host.
    pub(super) fn host_is_empty(&self) -> bool {
        self.host.is_empty()
    }

    /// The GPU that the options ask for.
    pub(super) fn gpu(&self) -> DeviceChoice {
        DeviceChoice::Gpu(self.gpu_options())
    }

    fn gpu_options(&self) -> gpu::Options {
        gpu::Options {
            adapter: self.adapter.clone(),
            checked_shaders: self.checked_shaders,
            without_subgroups: self.no_subgroups,
            without_matrix_units: self.no_matrix_units,
            max_binding_bytes: self.max_binding_bytes,
            max_memory_bytes: self.max_memory_bytes,
            table_decode: false,
            pipeline_cache: gpu::PipelineCache::Auto,
        }
    }

    /// The checkpoint itself.
    pub(super) fn checkpoint(&self) -> anyhow::Result<Checkpoint> {
        Ok(match &self.model {
            Some(dir) => fourfold::synth::open(dir, self.mapping())?,
            None => fourfold::default_checkpoint()?,
        })
    }

    /// With a context for `tokens`, unless the user chose one or there is room for as many anyway.
    pub(super) fn with_room(&self, tokens: usize) -> Self {
        let wanted = (tokens > fourfold::DEFAULT_CONTEXT).then_some(tokens);
        Self { context: self.context.or(wanted), ..self.clone() }
    }

    /// With a context for `tokens`, unless the user chose one.
    pub(super) fn with_context(&self, tokens: usize) -> Self {
        Self { context: self.context.or(Some(tokens)), ..self.clone() }
    }

    /// With the context and the chunk that an engine has.
    pub(super) fn with_steps_of(&self, engine: &Engine) -> Self {
        Self { context: Some(engine.context()), chunk: Some(engine.chunk()), ..self.clone() }
    }

    /// For another model.
    pub(super) fn with_model(&self, dir: &Path) -> Self {
        Self { model: Some(dir.to_owned()), ..self.clone() }
    }

    /// The options that decide how a model computes, for a command that is to be repeated.
    pub(super) fn as_flags(&self) -> String {
        let mut flags = String::new();
        let mut flag = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                flags += &format!(" --{name} {value}");
            }
        };
        flag("model", self.model.as_ref().map(|dir| format!("'{}'", dir.display())));
        flag("device", Some(word(self.device)));
        flag("adapter", self.adapter.as_ref().map(|name| format!("'{name}'")));
        flag("kv", Some(word(self.kv)));
        flag("activations", Some(word(self.activations)));
        flag("chunk", self.chunk.map(|n| n.to_string()));
        let switches = [
            ("strict", self.strict),
            ("no-matrix-units", self.no_matrix_units),
            ("checked-shaders", self.checked_shaders),
            ("swizzled-scales", self.swizzled_scales),
        ];
        for (name, _) in switches.iter().filter(|(_, on)| *on) {
            flags += &format!(" --{name}");
        }
        flags
    }

    /// How files are read.
    pub(super) fn mapping(&self) -> Mapping {
        if self.no_mmap { Mapping::Read } else { Mapping::Mmap }
    }

    /// How files are read, how keys and values are kept, which kernels prompts take: what a model and its reference have
    /// in common.
    pub(super) fn files_and_cache(&self, builder: EngineBuilder) -> EngineBuilder {
        let order = scale_order(self.swizzled_scales);
        builder.mapping(self.mapping()).cache(self.kv.format()).scale_order(order).strict(self.strict)
    }

    pub(super) fn load(&self, device: DeviceChoice, quiet: bool) -> fourfold::Result<Engine> {
        self.load_with_host(device, &self.host, quiet)
    }

    /// As [`Self::load`], with other stages on the host.
    pub(super) fn load_with_host(
        &self,
        device: DeviceChoice,
        host: &[HostArg],
        quiet: bool,
    ) -> fourfold::Result<Engine> {
        let mut builder =
            self.files_and_cache(Engine::builder()).device(device).activations(self.activations.activations()).host(
                HostStages {
                    routing: host.contains(&HostArg::Routing),
                    scatter: host.contains(&HostArg::Scatter),
                    attention: host.contains(&HostArg::Attention),
                },
            );
        if let Some(dir) = &self.model {
            builder = builder.checkpoint(dir);
        }
        if let Some(tokens) = self.context {
            builder = builder.context(tokens);
        }
        self.build(builder, quiet)
    }

    /// A model that drafts for `engine`, on its device; without `dir`, the built-in one's. How it computes is its own
    /// matter: it changes no result.
    pub(super) fn load_draft(&self, engine: &Engine, dir: Option<&Path>, quiet: bool) -> fourfold::Result<Engine> {
        let builder = Engine::builder().mapping(self.mapping()).cache(self.kv.format()).strict(self.strict);
        let (builder, checkpoint) = match dir {
            Some(dir) => (builder.checkpoint(dir), fourfold::synth::open(dir, self.mapping())?),
            None => (builder.default_draft(), fourfold::default_draft_checkpoint()?),
        };
        let limit = Config::open(&checkpoint)?.max_position_embeddings;
        let builder = builder.device(DeviceChoice::Own(engine.device().clone()));
        self.build(builder.context(engine.context().min(limit)), quiet)
    }

    fn build(&self, mut builder: EngineBuilder, quiet: bool) -> fourfold::Result<Engine> {
        let bar = terminal::loading(quiet);
        let shown = bar.clone();
        if let Some(tokens) = self.chunk {
            builder = builder.chunk(tokens);
        }
        let builder = builder.progress(move |p| {
            shown.set_length(p.total_bytes);
            shown.set_position(p.done_bytes);
        });
        let engine = builder.build();
        bar.finish_and_clear();
        engine
    }
}
