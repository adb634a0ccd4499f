//! The engine (weights on a device, shared, never changed) and its sessions (tokens, cache, the decode loop).

use crate::checkpoint::{Checkpoint, Mapping};
use crate::config::{Config, GenerationConfig};
use crate::device::{self, Device, cpu::Cpu, gpu};
use crate::error::{Error, Result};
use crate::model::{GptOss, Plan, Progress, State};
use crate::ops::{CacheFormat, Row, Step};
use crate::program::{HostStages, Program};
use crate::reply::{Reply, ReplyOptions};
use crate::tokenizer::{ChatFormat, ChatTemplate, Harmony, TokenId, Tokenizer};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Tokens that a session's context holds unless asked otherwise (or fewer, if the model allows fewer).
pub const DEFAULT_CONTEXT: usize = 4096;
/// Tokens of a prompt in one step unless asked otherwise.
pub const DEFAULT_CHUNK: usize = 128;

/// What computes.
#[derive(Clone, Debug, Default)]
pub enum DeviceChoice {
    /// The best GPU; the twins on the CPU if there is none but software ones.
    #[default]
    Auto,
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
    progress: Box<dyn FnMut(Progress)>,
}

impl EngineBuilder {
    /// A Hugging Face directory. Without it, the model that is embedded in the binary.
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

    /// Most prompt tokens in one step. More is faster and costs memory for activations. No effect on results.
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
            Source::Dir(dir) => Checkpoint::open(dir, self.mapping)?,
        };
        let text = Text::load(&checkpoint)?;
        let config = Config::from_json(&checkpoint.path("config.json"), checkpoint.require("config.json")?)?;
        let generation = match checkpoint.file("generation_config.json") {
            Some(json) => GenerationConfig::from_json(&checkpoint.path("generation_config.json"), json, &config)?,
            None => GenerationConfig::from_config(&config),
        };
        if let Some(tokenizer) = text.as_ref().map(|t| &t.tokenizer)
            && tokenizer.vocab_size() > config.vocab_size
        {
            let (has, rows) = (tokenizer.vocab_size(), config.vocab_size);
            let reason = format!("has {has} tokens, but the model has only {rows} (vocab_size in config.json)");
            return Err(Error::file(checkpoint.path("tokenizer.json"), reason));
        }
        let limit = config.max_position_embeddings;
        let context = self.context.unwrap_or(DEFAULT_CONTEXT.min(limit));
        let chunk = self.chunk.unwrap_or(DEFAULT_CHUNK).min(context.max(1));
        let clamp = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let plan = Plan { context: clamp(context), chunk: clamp(chunk), cache: self.cache, host: self.host };
        plan.check(&config)?;
        let (device, fallback) = open_device(&self.device)?;
        let model = GptOss::load(&checkpoint, config, &device, plan.context, &mut self.progress)?;
        let name = checkpoint.name().to_owned();
        Ok(Engine { inner: Arc::new(Inner { name, device, fallback, model, plan, text, generation }) })
    }
}

fn open_device(choice: &DeviceChoice) -> Result<(Arc<dyn Device>, Option<String>)> {
    Ok(match choice {
        DeviceChoice::Own(device) => (device.clone(), None),
        DeviceChoice::Cpu => (Arc::new(Cpu::default()), None),
        DeviceChoice::Gpu(options) => (Arc::new(gpu::Gpu::open(options)?), None),
        DeviceChoice::Auto => {
            let why = match gpu::Gpu::open(&gpu::Options::default()) {
                Ok(gpu) if gpu::is_hardware(gpu.facts()) => return Ok((Arc::new(gpu), None)),
                Ok(gpu) => format!("only a software adapter was found ({})", gpu.facts().name),
                Err(e) => e.to_string(),
            };
            (Arc::new(Cpu::default()), Some(format!("no GPU: {why}; running on the CPU")))
        }
    })
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
    model: GptOss,
    plan: Plan,
    text: Option<Text>,
    generation: GenerationConfig,
}

/// What turns text into tokens and back.
#[derive(Debug)]
struct Text {
    tokenizer: Tokenizer,
    chat: Option<ChatFormat>,
}

impl Text {
    fn load(checkpoint: &Checkpoint) -> Result<Option<Self>> {
        let Some(json) = checkpoint.file("tokenizer.json") else { return Ok(None) };
        let tokenizer = Tokenizer::from_bytes(&checkpoint.path("tokenizer.json"), json)?;
        let chat = match checkpoint.file("chat_template.jinja") {
            Some(source) => {
                let path = checkpoint.path("chat_template.jinja");
                let source =
                    std::str::from_utf8(source).map_err(|e| Error::file(&path, format!("is not UTF-8: {e}")))?;
                let [bos, eos] = special_tokens(checkpoint);
                Some(ChatFormat::Template(ChatTemplate::new(&path, source)?.with_tokens(&bos, &eos)))
            }
            // gpt-oss without its template is still gpt-oss.
            None => Harmony::new(&tokenizer).ok().map(ChatFormat::Harmony),
        };
        Ok(Some(Self { tokenizer, chat }))
    }
}

/// `bos_token` and `eos_token` of tokenizer_config.json: each a string, or an object with its text in `content`.
fn special_tokens(checkpoint: &Checkpoint) -> [String; 2] {
    let json = checkpoint.file("tokenizer_config.json").unwrap_or_default();
    let config: serde_json::Value = serde_json::from_slice(json).unwrap_or_default();
    ["bos_token", "eos_token"].map(|key| {
        let token = &config[key];
        token.as_str().or_else(|| token["content"].as_str()).unwrap_or_default().to_owned()
    })
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

    /// The device that computes.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.inner.device
    }

    /// Why [`DeviceChoice::Auto`] took the CPU, if it did.
    pub fn fallback(&self) -> Option<&str> {
        self.inner.fallback.as_deref()
    }

    /// Tokens that a session holds.
    pub fn context(&self) -> usize {
        self.inner.plan.context as usize
    }

    /// The tokenizer; an error where the checkpoint has none.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.text().map(|text| &text.tokenizer)
    }

    /// How a conversation becomes a prompt.
    pub fn chat_format(&self) -> Result<&ChatFormat> {
        let missing = || {
            let reason =
                "this checkpoint has no chat template, and its tokenizer is not Harmony's: use bare continuation";
            Error::Text { what: self.inner.name.clone(), reason: reason.to_owned() }
        };
        self.text()?.chat.as_ref().ok_or_else(missing)
    }

    fn text(&self) -> Result<&Text> {
        let missing = || {
            let reason = "is missing, so this checkpoint takes and gives token ids only; copy it from the model's page";
            Error::file(Path::new(&self.inner.name).join("tokenizer.json").display().to_string(), reason)
        };
        self.inner.text.as_ref().ok_or_else(missing)
    }

    /// A new conversation with a cache of its own.
    pub fn session(&self) -> Result<Session> {
        let inner = &self.inner;
        let state = inner.model.state(&inner.device, &inner.plan)?;
        let programs = Programs { body: inner.model.body(1, &state), head: inner.model.head(1, &state) };
        for program in [&programs.body, &programs.head, &inner.model.body(inner.plan.chunk, &state)] {
            inner.device.prepare(program)?;
        }
        let cancel = Arc::new(AtomicBool::new(false));
        Ok(Session { engine: self.clone(), state, programs, tokens: Vec::new(), written: 0, cancel })
    }
}

/// The programs of a decode step, recorded once.
#[derive(Debug)]
struct Programs {
    body: Program,
    head: Program,
}

/// Stops a session from another thread, at the next chunk or token.
#[derive(Clone, Debug)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Ask the session to end the reply that it is drawing. Forgotten when the next reply begins.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// One conversation: the tokens so far, and the KV cache that holds them.
#[derive(Debug)]
pub struct Session {
    engine: Engine,
    state: State,
    programs: Programs,
    tokens: Vec<TokenId>,
    /// Positions below this have been written since the cache was last empty.
    written: usize,
    cancel: Arc<AtomicBool>,
}

/// Which rows' logits a step should give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// None.
    Nothing,
    /// The last row's, `[V]`.
    Last,
    /// Every row's, `[T, V]`.
    All,
}

/// Sees every named stage of a step: name, row width, and the rows' words.
pub type See<'a> = &'a mut dyn FnMut(&str, usize, Vec<u32>) -> Result<()>;

impl Session {
    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The tokens that the cache holds.
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// A handle that stops this session from another thread.
    pub fn cancel_handle(&self) -> Cancel {
        Cancel(self.cancel.clone())
    }

    /// Whether a cancel was asked for; clears it.
    pub(crate) fn take_cancel(&self) -> bool {
        self.cancel.swap(false, Ordering::Relaxed)
    }

    /// Most tokens in one step.
    pub(crate) fn chunk(&self) -> usize {
        self.engine.inner.plan.chunk as usize
    }

    /// Forget everything.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.written = 0;
    }

    /// Keep the first `len` tokens at most; fewer (none) if a sliding layer no longer has the keys to go on from there.
    pub fn cut(&mut self, len: usize) {
        if len >= self.tokens.len() {
            return;
        }
        if len > 0 && self.engine.inner.model.can_cut(&self.engine.inner.plan, len, self.written) {
            self.tokens.truncate(len);
        } else {
            self.clear();
        }
    }

    /// Keep what the cache shares with `prompt`, but leave at least its last token to compute. Gives what is left.
    pub fn reuse<'p>(&mut self, prompt: &'p [TokenId]) -> &'p [TokenId] {
        let shared = self.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        self.cut(shared.min(prompt.len().saturating_sub(1)));
        &prompt[self.tokens.len()..]
    }

    /// Answer a prompt: what the cache already holds of it is not computed again. Nothing runs before the first pull.
    pub fn reply<'s>(&'s mut self, prompt: &[TokenId], options: &ReplyOptions) -> Result<Reply<'s>> {
        Reply::new(self, prompt, options)
    }

    /// Append tokens to the conversation and compute them. Gives the logits wanted, row after row. If it fails, the
    /// conversation is as it was before.
    pub fn feed(&mut self, tokens: &[TokenId], want: Want) -> Result<Vec<f32>> {
        self.feed_seeing(tokens, want, None)
    }

    /// As [`Self::feed`], and show every stage of every chunk.
    pub fn feed_seeing(&mut self, tokens: &[TokenId], want: Want, mut see: Option<See<'_>>) -> Result<Vec<f32>> {
        self.check(tokens)?;
        let before = self.tokens.len();
        let mut logits = Vec::new();
        let chunk = self.engine.inner.plan.chunk as usize;
        let count = tokens.len().div_ceil(chunk);
        for (i, piece) in tokens.chunks(chunk).enumerate() {
            let want = if want == Want::Last && i + 1 < count { Want::Nothing } else { want };
            if let Err(e) = self.step(piece, want, &mut logits, see.as_mut()) {
                // Positions past the end are written again before they are read, so forgetting them is enough.
                self.tokens.truncate(before);
                return Err(e);
            }
        }
        Ok(logits)
    }

    fn check(&self, tokens: &[TokenId]) -> Result<()> {
        let (context, vocab) = (self.engine.context(), self.engine.config().vocab_size);
        if let Some(id) = tokens.iter().find(|id| **id as usize >= vocab) {
            return Err(Error::option("tokens", format!("{id} is not a token: the model has {vocab}")));
        }
        let needed = self.tokens.len() + tokens.len();
        if needed > context {
            let limit = self.engine.config().max_position_embeddings;
            return Err(Error::ContextFull { context, tokens: needed, limit });
        }
        Ok(())
    }

    /// One step over at most a chunk of tokens.
    fn step(&mut self, tokens: &[TokenId], want: Want, logits: &mut Vec<f32>, see: Option<&mut See<'_>>) -> Result<()> {
        let inner = &self.engine.inner;
        let (device, s) = (&inner.device, &self.state);
        let first = self.tokens.len();
        let row = |(i, &token): (usize, &TokenId)| Row { token, sequence: 0, position: (first + i) as u32, pad: 0 };
        let rows: Vec<Row> = tokens.iter().enumerate().map(row).collect();
        let count = tokens.len() as u32;
        device.write(s.rows, bytemuck::cast_slice(&rows))?;
        device.write(s.step, bytemuck::bytes_of(&Step { tokens: count, pad: [0; 3] }))?;
        let run = |program: &Program, see: &mut Option<&mut See<'_>>| match see {
            None => device.run(program),
            Some(see) => device::run_seeing(&**device, program, |name, width, words| see(name, width, words)),
        };
        let mut see = see;
        // Written first: if the step fails half-way, its positions may hold anything.
        self.written = self.written.max(first + tokens.len());
        if count == 1 {
            run(&self.programs.body, &mut see)?;
        } else {
            run(&inner.model.body(count, s), &mut see)?;
        }
        let picks: Vec<u32> = match want {
            Want::Nothing => Vec::new(),
            Want::Last => vec![count - 1],
            Want::All => (0..count).collect(),
        };
        let vocab = self.engine.config().vocab_size;
        for picks in picks.chunks(s.max_picks as usize) {
            device.write(s.picks, bytemuck::cast_slice(picks))?;
            let head_step = Step { tokens: picks.len() as u32, pad: [0; 3] };
            device.write(s.head_step, bytemuck::bytes_of(&head_step))?;
            if picks.len() == 1 {
                run(&self.programs.head, &mut see)?;
            } else {
                run(&inner.model.head(picks.len() as u32, s), &mut see)?;
            }
            let at = logits.len();
            logits.resize(at + picks.len() * vocab, 0.0);
            let wanted = s.logits.head((picks.len() * vocab * 4) as u64);
            device.read(wanted, bytemuck::cast_slice_mut(&mut logits[at..]))?;
        }
        if want == Want::Nothing {
            // A step that nobody reads must still fail here, not in a later one.
            device.wait()?;
        }
        self.tokens.extend_from_slice(tokens);
        Ok(())
    }
}
