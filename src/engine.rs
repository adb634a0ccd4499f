//! The engine: weights on a device, shared, never changed. Its sessions are in `engine/session.rs`.

mod session;

pub use session::{Cancel, Edit, See, Session, Want, Watch};
pub(crate) use session::{write_picks, write_rows};

use crate::checkpoint::{Mapping, ScaleOrder};
use crate::config::{Config, GenerationConfig};
use crate::device::{Device, cpu::Cpu, gpu};
use crate::error::{Error, Result};
use crate::model::{Found, Model, Needs, Plan, Progress};
use crate::ops::{Activations, CacheFormat};
use crate::oracle;
use crate::program::{HostStages, Role};
use crate::schedule::{Scheduler, SchedulerOptions};
use crate::synth;
use crate::tokenizer::{ChatFormat, Text, TokenId, Tokenizer};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Tokens that a session's context holds unless asked otherwise (or fewer, if the model allows fewer).
pub const DEFAULT_CONTEXT: usize = 4096;
/// Tokens of a prompt in one step unless asked otherwise.
pub const DEFAULT_CHUNK: usize = 128;
/// The same where matrix units want more at once.
pub const MATRIX_CHUNK: usize = 1024;

/// What computes.
#[derive(Clone, Debug, Default)]
pub enum DeviceChoice {
    /// The best GPU; the twins on the CPU if there is none but software ones.
    #[default]
    Auto,
    /// The same, with these options for a GPU. Of adapters, only hardware is looked at, whatever their names.
    Prefer(gpu::Options),
    /// A GPU, or an error.
    Gpu(gpu::Options),
    /// The twins.
    Cpu,
    /// A device that the application made, such as [`gpu::Gpu::from_wgpu`].
    Own(Arc<dyn Device>),
}

/// Where the weights come from.
#[derive(Clone, Debug)]
enum Source {
    Default,
    DefaultDraft,
    Dir(PathBuf),
}

/// How to build an [`Engine`].
pub struct EngineBuilder {
    source: Source,
    device: DeviceChoice,
    mapping: Mapping,
    context: Option<usize>,
    chunk: Option<usize>,
    cache: CacheFormat,
    host: HostStages,
    activations: Activations,
    scale_order: ScaleOrder,
    strict: bool,
    progress: Box<dyn FnMut(Progress)>,
}

impl EngineBuilder {
    /// A Hugging Face directory, or `synth:SHAPE` for random weights of a true shape. Without it, the model that is embedded in the binary.
    pub fn checkpoint(mut self, dir: impl Into<PathBuf>) -> Self {
        self.source = Source::Dir(dir.into());
        self
    }

    /// The default model's small draft, embedded too: for speculation, or where the default model is too slow.
    pub fn default_draft(mut self) -> Self {
        self.source = Source::DefaultDraft;
        self
    }

    /// What computes.
    pub fn device(mut self, choice: DeviceChoice) -> Self {
        self.device = choice;
        self
    }

    /// Read the files into memory instead of mapping them.
    pub fn mapping(mut self, mapping: Mapping) -> Self {
        self.mapping = mapping;
        self
    }

    /// Tokens that a session can hold. More costs memory for the KV cache.
    pub fn context(mut self, tokens: usize) -> Self {
        self.context = Some(tokens);
        self
    }

    /// Most prompt tokens in one step, 1 to 2048. More is faster and costs memory for activations. No effect on results.
    pub fn chunk(mut self, tokens: usize) -> Self {
        self.chunk = Some(tokens);
        self
    }

    /// How keys and values are stored.
    pub fn cache(mut self, format: CacheFormat) -> Self {
        self.cache = format;
        self
    }

    /// Stages that the host computes instead of the device.
    pub fn host(mut self, stages: HostStages) -> Self {
        self.host = stages;
        self
    }

    /// What enters the products with NVFP4 weights: f32 unless asked otherwise, which is right for every checkpoint.
    pub fn activations(mut self, activations: Activations) -> Self {
        self.activations = activations;
        self
    }

    /// The order of NVFP4 block scales in the file: row-major, unless a tool wrote them swizzled.
    pub fn scale_order(mut self, order: ScaleOrder) -> Self {
        self.scale_order = order;
        self
    }

    /// Compute prompts by the kernels of generated tokens, so that a position's bits do not follow which of the two its
    /// tokens were. Slower: no matrix units, and attention of a prompt in segments.
    pub fn strict(mut self, strict: bool) -> Self {
        self.strict = strict;
        self
    }

    /// Called while weights go to the device.
    pub fn progress(mut self, see: impl FnMut(Progress) + 'static) -> Self {
        self.progress = Box::new(see);
        self
    }

    /// Open the checkpoint, check all of it, open the device, load.
    pub fn build(mut self) -> Result<Engine> {
        let checkpoint = match &self.source {
            Source::Default => crate::default_model::main()?,
            Source::DefaultDraft => crate::default_model::draft()?,
            Source::Dir(dir) => synth::open(dir, self.mapping)?,
        };
        let config = Config::open(&checkpoint)?;
        let Text { tokenizer, lead, chat, generation } = Text::load(&checkpoint, &config)?;
        let limit = config.max_position_embeddings;
        let context = self.context.unwrap_or(DEFAULT_CONTEXT.min(limit));
        let chunk = self.chunk.unwrap_or(DEFAULT_CHUNK);
        let fits = |option, n: usize| {
            u32::try_from(n).map_err(|_| Error::option(option, format!("{n} is out of range: at most {limit} here")))
        };
        let mut plan = Plan {
            context: fits("context", context)?,
            chunk: fits("chunk", chunk)?,
            paged: None,
            cache: self.cache,
            host: self.host,
            activations: self.activations,
            scale_order: self.scale_order,
        };
        plan.check(&config)?;
        let (device, fallback) = open_device(&self.device)?;
        if self.chunk.is_none() && device.limits().matrix && !self.strict {
            plan.chunk = MATRIX_CHUNK as u32;
        }
        plan.chunk = plan.chunk.min(plan.context);
        let model = Model::load(&checkpoint, config, &device, &plan, &mut self.progress)?;
        let name = checkpoint.name().to_owned();
        let strict = self.strict;
        Ok(Engine {
            inner: Arc::new(Inner { name, device, fallback, model, plan, strict, tokenizer, lead, chat, generation }),
        })
    }
}

/// The device, and why it is the CPU if `auto` chose that. A GPU must first answer a few questions whose answers are known.
fn open_device(choice: &DeviceChoice) -> Result<(Arc<dyn Device>, Option<String>)> {
    Ok(match choice {
        DeviceChoice::Own(device) => (oracle::admit(device).map(|()| device.clone())?, None),
        DeviceChoice::Cpu => (Arc::new(Cpu::default()), None),
        DeviceChoice::Gpu(options) => (admitted(gpu::Gpu::open(options)?, options)?, None),
        DeviceChoice::Auto => return open_device(&DeviceChoice::Prefer(gpu::Options::default())),
        DeviceChoice::Prefer(options) => {
            let opened = gpu::Gpu::open_hardware(options);
            match opened.and_then(|gpu| admitted(gpu, options).map_err(|e| e.to_string())) {
                Ok(gpu) => (gpu, None),
                Err(why) => (Arc::new(Cpu::default()), Some(format!("no GPU: {why}; running on the CPU"))),
            }
        }
    })
}

/// The GPU, if it knows its answers: with FP4 codes by a table where it flushes the subnormal halves that are faster.
fn admitted(gpu: gpu::Gpu, options: &gpu::Options) -> Result<Arc<dyn Device>> {
    let gpu = Arc::new(gpu);
    let device: Arc<dyn Device> = gpu.clone();
    let Err(refused) = oracle::admit(&device) else { return Ok(device) };
    if options.table_decode {
        return Err(refused);
    }
    let Some(by_table) = gpu.reopen(&gpu::Options { table_decode: true, ..options.clone() }) else {
        return Err(refused);
    };
    let device: Arc<dyn Device> = Arc::new(by_table?);
    oracle::admit(&device).map(|()| device).map_err(|_| refused)
}

/// A model's weights on a device. Cheap to clone, safe to share between threads; nothing in it is global.
#[derive(Clone, Debug)]
pub struct Engine {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    name: String,
    device: Arc<dyn Device>,
    fallback: Option<String>,
    model: Model,
    plan: Plan,
    strict: bool,
    tokenizer: Option<Tokenizer>,
    lead: std::result::Result<Option<TokenId>, String>,
    chat: Option<ChatFormat>,
    generation: GenerationConfig,
}

impl Engine {
    /// Start building one.
    pub fn builder() -> EngineBuilder {
        EngineBuilder {
            source: Source::Default,
            device: DeviceChoice::Auto,
            mapping: Mapping::default(),
            context: None,
            chunk: None,
            cache: CacheFormat::default(),
            host: HostStages::default(),
            activations: Activations::default(),
            scale_order: ScaleOrder::default(),
            strict: false,
            progress: Box::new(|_| ()),
        }
    }

    /// The checkpoint's directory, or the embedded model's name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The model's configuration.
    pub fn config(&self) -> &Config {
        self.inner.model.config()
    }

    /// What the checkpoint recommends for sampling, and where it stops.
    pub fn generation(&self) -> &GenerationConfig {
        &self.inner.generation
    }

    /// What the checkpoint holds besides weights: calibrated scales, counts by format.
    pub fn found(&self) -> &Found {
        self.inner.model.found()
    }

    /// What the model and a session take of the device's memory.
    pub fn needs(&self) -> &Needs {
        self.inner.model.needs()
    }

    /// What enters the products with NVFP4 weights.
    pub fn activations(&self) -> Activations {
        self.inner.plan.activations
    }

    /// Whether prompts are computed by the kernels of generated tokens ([`EngineBuilder::strict`]).
    pub fn strict(&self) -> bool {
        self.inner.strict
    }

    /// What the rows of a prompt's step are to the kernels, if none sees more positions than `reach`.
    pub(crate) fn prompt_role(&self, reach: usize) -> Role {
        if self.inner.strict { Role::Generated { reach: reach as u32 } } else { Role::Prompt }
    }

    /// The device that computes.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.inner.device
    }

    /// Why [`DeviceChoice::Auto`] took the CPU, if it did.
    pub fn fallback(&self) -> Option<&str> {
        self.inner.fallback.as_deref()
    }

    pub(crate) fn model(&self) -> &Model {
        &self.inner.model
    }

    /// Tokens that a session holds.
    pub fn context(&self) -> usize {
        self.inner.plan.context as usize
    }

    /// Tokens of a prompt that are computed in one step.
    pub fn chunk(&self) -> usize {
        self.inner.plan.chunk as usize
    }

    /// The tokenizer; an error where the checkpoint has none.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        let missing = || {
            let reason = "is missing, so this checkpoint takes and gives token ids only; copy it from the model's page";
            Error::file(Path::new(&self.inner.name).join("tokenizer.json").display().to_string(), reason)
        };
        self.inner.tokenizer.as_ref().ok_or_else(missing)
    }

    /// The token that begins every text of this checkpoint, if one does; an error where its files name one that is not there.
    pub fn leading_token(&self) -> Result<Option<TokenId>> {
        self.inner.lead.clone().map_err(|reason| Error::Text { what: self.inner.name.clone(), reason })
    }

    /// The tokens of a text that the model is to go on with: special ones spelled in it count as such, and the first is the
    /// checkpoint's leading token, if it has one.
    pub fn text_tokens(&self, text: &str) -> Result<Vec<TokenId>> {
        let mut tokens = self.tokenizer()?.encode_with_specials(text)?;
        if let Some(lead) = self.leading_token()?
            && tokens.first() != Some(&lead)
        {
            tokens.insert(0, lead);
        }
        Ok(tokens)
    }

    /// How a conversation becomes a prompt; an error where the checkpoint does not say.
    pub fn chat_format(&self) -> Result<&ChatFormat> {
        self.tokenizer()?;
        let missing = || {
            let reason =
                "this checkpoint has no chat template, and its tokenizer is not Harmony's: use bare continuation";
            Error::Text { what: self.inner.name.clone(), reason: reason.to_owned() }
        };
        self.inner.chat.as_ref().ok_or_else(missing)
    }

    /// How the model was loaded, and sizes of a conversation's buffers.
    pub(crate) fn plan(&self) -> &Plan {
        &self.inner.plan
    }

    /// All are tokens of the model.
    pub(crate) fn check_ids(&self, tokens: &[TokenId]) -> Result<()> {
        let vocab = self.config().vocab_size;
        match tokens.iter().find(|id| **id as usize >= vocab) {
            Some(id) => Err(Error::option("tokens", format!("{id} is not a token: the model has {vocab}"))),
            None => Ok(()),
        }
    }

    /// An error with the figures unless a session holds so many tokens.
    pub fn check_context(&self, tokens: usize) -> Result<()> {
        self.check_room(self.context(), tokens)
    }

    /// A context of so many positions holds so many tokens.
    pub(crate) fn check_room(&self, context: usize, tokens: usize) -> Result<()> {
        let limit = self.config().max_position_embeddings;
        if tokens > context { Err(Error::ContextFull { context, tokens, limit }) } else { Ok(()) }
    }

    /// Many sessions that are stepped together, with a cache whose pages they share.
    pub fn scheduler(&self, options: &SchedulerOptions) -> Result<Scheduler> {
        Scheduler::new(self, options)
    }

    /// A new conversation with a cache of its own.
    pub fn session(&self) -> Result<Session> {
        self.session_with(None)
    }

    /// A conversation whose programs are changed after they are recorded: how tests plant faults.
    #[doc(hidden)]
    pub fn session_edited(&self, edit: Edit) -> Result<Session> {
        self.session_with(Some(edit))
    }
}
