//! A conversation: the tokens so far, the cache that holds them, and the steps that compute more.

use super::Engine;
use crate::decode::{Ahead, DecodePrograms};
use crate::device::{self, Buffer, Device};
use crate::error::{Error, Result};
use crate::model::State;
use crate::ops::{Activations, Draws, Row, STATS_WORDS, Step};
use crate::program::{HostStages, Program, Slice, Stage};
use crate::reply::{Reply, ReplyOptions};
use crate::sampler::Rule;
use crate::speculate::{MOST, Speculation};
use crate::tokenizer::TokenId;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

impl Engine {
    pub(super) fn session_with(&self, edit: Option<Edit>) -> Result<Session> {
        let inner = &self.inner;
        let state = inner.model.state(&inner.device, &inner.plan)?;
        let role = self.prompt_role(self.context());
        let body = |tokens| edited(inner.model.body(tokens, role, edit.is_some(), &state), edit.as_ref());
        let programs = Programs { body: body(1).seal(), head: inner.model.head(1, &state).seal() };
        let decode = |reach| inner.model.decode(1, reach, edit.is_some(), Draws::Likeliest, &state);
        let draw = inner.model.draw(1, Draws::Rounds(3), &state); // every kernel that drawing has
        for program in [&programs.body, &programs.head, &body(inner.plan.chunk), &draw] {
            inner.device.prepare(program)?;
        }
        // Attention has other kernels where it sees more; nobody waits for them half-way through a reply.
        inner.device.prepare(&DecodePrograms::of_all_reaches(inner.plan.context, decode))?;
        let cancel = Arc::new(AtomicBool::new(false));
        Ok(Session {
            engine: self.clone(),
            state,
            programs,
            decode: DecodePrograms::default(),
            rule: Rule::default(),
            ahead: None,
            tokens: Vec::new(),
            written: 0,
            cancel,
            mark: None,
            stats: None,
            edit,
            speculation: None,
        })
    }
}

/// The programs of a prompt's step over one row, recorded once.
#[derive(Debug)]
struct Programs {
    body: Program,
    head: Program,
}

/// Stops a session from another thread, at the next chunk or token; a request of a scheduler, at its next step.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Ask the session to end the reply that it is drawing. Forgotten when the next reply begins.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(crate) fn asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// One conversation: the tokens so far, and the KV cache that holds them.
#[derive(Debug)]
pub struct Session {
    pub(crate) engine: Engine,
    pub(crate) state: State,
    programs: Programs,
    decode: DecodePrograms,
    /// How the device was told to draw.
    pub(crate) rule: Rule,
    /// Tokens that are being drawn on the device.
    pub(crate) ahead: Option<Ahead>,
    pub(crate) tokens: Vec<TokenId>,
    /// Positions below this have been written since the cache was last empty.
    pub(crate) written: usize,
    cancel: Arc<AtomicBool>,
    mark: Option<Mark>,
    /// Where statistics go while they are asked for.
    stats: Option<Buffer>,
    edit: Option<Edit>,
    /// Who drafts for its replies.
    pub(crate) speculation: Option<Speculation>,
}

/// Changes a program after it is recorded.
#[doc(hidden)]
#[derive(Clone)]
pub struct Edit(Arc<dyn Fn(&mut Program) + Send + Sync>);

impl std::fmt::Debug for Edit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Edit")
    }
}

impl Edit {
    /// Wrap a function.
    pub fn new(edit: impl Fn(&mut Program) + Send + Sync + 'static) -> Self {
        Self(Arc::new(edit))
    }
}

fn edited(mut program: Program, edit: Option<&Edit>) -> Program {
    if let Some(Edit(edit)) = edit {
        edit(&mut program);
    }
    program
}

/// What the sliding layers held at some point of a conversation: enough to come back to it later.
#[derive(Debug)]
struct Mark {
    tokens: Vec<TokenId>,
    written: usize,
    rings: Vec<(Slice, Vec<u8>)>,
}

/// Which rows' logits a step should give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// None.
    Nothing,
    /// The last row's, left on the device.
    #[doc(hidden)]
    Logits,
    /// The last row's, `[V]`.
    Last,
    /// Every row's, `[T, V]`.
    All,
}

/// Sees every named stage of a step: name, row width, and the rows' words.
pub type See<'a> = &'a mut dyn FnMut(&str, usize, Vec<u32>) -> Result<()>;

/// What to look at while a step runs.
pub struct Watch<'a> {
    /// Which stages, by name.
    pub keep: &'a dyn Fn(&str) -> bool,
    /// Statistics of each row (`ops::Stats`, 8 words) instead of its values: computed on the device.
    pub stats: bool,
    /// Gets each stage with its words.
    pub see: device::See<'a>,
}

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

    /// Draft tokens for replies from now on, or no longer. Replies take another time, and are the same to the bit. No
    /// effect where the engine's chunk is 1: then a step has room for one row.
    ///
    /// # Errors
    /// With activations `nvfp4-dynamic`, where tokens that are computed together change each other.
    pub fn set_speculation(&mut self, speculation: Option<Speculation>) -> Result<()> {
        if speculation.is_some() && self.engine.activations() == Activations::Nvfp4Dynamic {
            let reason = "\"nvfp4-dynamic\" has one scale for all rows of a step, so drafts would change what is drawn: \
                          use \"nvfp4-token\", or no draft";
            return Err(Error::option("draft", reason));
        }
        self.speculation = speculation.filter(|_| self.max_picks() > 1);
        if self.speculation.is_some() {
            self.prepare_drafts()?;
        }
        Ok(())
    }

    /// Steps over drafts, or over tokens that were kept of one, have kernels of their own: ready now, no reply waits for them.
    pub(crate) fn prepare_drafts(&mut self) -> Result<()> {
        let mut all = Program::new(1, HostStages::default());
        for rows in 2..=self.max_picks().min(1 + MOST) as u32 {
            all.launches.extend(self.decode_program(rows, 1, Draws::Likeliest).launches.iter().cloned());
        }
        self.engine.device().prepare(&all)
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
        self.ahead = None;
        self.tokens.clear();
        self.written = 0;
        self.mark = None;
    }

    /// Remember this point, so that the conversation can come back to it however far it goes on. A chat's next prompt
    /// parts from this one's answer at its first token where reasoning is left out of it.
    pub(crate) fn set_mark(&mut self) -> Result<()> {
        let device = &self.engine.inner.device;
        let read = |slice: Slice| {
            let mut bytes = vec![0; slice.bytes as usize];
            device.read(slice, &mut bytes)?;
            Ok((slice, bytes))
        };
        let rings = self.state.rings().map(read).collect::<Result<_>>()?;
        self.mark = Some(Mark { tokens: self.tokens.clone(), written: self.written, rings });
        Ok(())
    }

    /// Go back to the mark, if it lies in the first `shared` tokens of the conversation and `cut` could not keep as many.
    fn return_to_mark(&mut self, shared: usize) -> Result<()> {
        let Some(mark) = &self.mark else { return Ok(()) };
        let len = mark.tokens.len();
        let (config, plan) = (self.engine.config(), &self.engine.inner.plan);
        if len > shared || self.tokens[..len] != mark.tokens || plan.can_cut(config, shared, self.written) {
            return Ok(());
        }
        // Should a write fail, the rings are a mixture: then nothing of the conversation is held any more.
        let (mark, tokens) = (self.mark.take().expect("looked at above"), std::mem::take(&mut self.tokens));
        for (slice, bytes) in &mark.rings {
            self.engine.inner.device.write(*slice, bytes)?;
        }
        self.written = mark.written;
        self.tokens = tokens[..len].to_vec();
        self.mark = Some(mark);
        Ok(())
    }

    /// Keep the first `len` tokens at most; fewer (none) if a sliding layer no longer has the keys to go on from there.
    pub fn cut(&mut self, len: usize) {
        self.ahead = None;
        if len >= self.tokens.len() && self.written <= self.tokens.len() {
            return;
        }
        let len = len.min(self.tokens.len());
        if len > 0 && self.engine.inner.plan.can_cut(self.engine.config(), len, self.written) {
            self.tokens.truncate(len);
        } else {
            self.clear();
        }
    }

    /// Keep what the cache shares with `prompt`, but leave at least its last token to compute. Gives what is left.
    pub fn reuse<'p>(&mut self, prompt: &'p [TokenId]) -> Result<&'p [TokenId]> {
        let shared = self.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        let mut shared = shared.min(prompt.len().saturating_sub(1));
        if self.engine.activations() == Activations::Nvfp4Dynamic {
            shared = 0; // a prompt is one step
        }
        self.return_to_mark(shared)?;
        self.cut(shared);
        Ok(&prompt[self.tokens.len()..])
    }

    /// Answer a prompt: what the cache already holds of it is not computed again. Nothing runs before the first pull.
    pub fn reply<'s>(&'s mut self, prompt: &[TokenId], options: &ReplyOptions) -> Result<Reply<'s>> {
        Reply::new(self, prompt, options)
    }

    /// Append tokens of a prompt to the conversation and compute them. Gives the logits wanted, row after row. If it
    /// fails, the conversation is as it was before, or empty where a sliding layer has already lost keys that it needs.
    pub fn feed(&mut self, tokens: &[TokenId], want: Want) -> Result<Vec<f32>> {
        self.feed_seeing(tokens, want, None)
    }

    /// As [`Self::feed`], for tokens that the model drew or a draft proposed: by the kernels of decoding. A position's bits
    /// follow what its token and those before it were, prompt or drawn, and never how many are computed at once.
    pub fn feed_drawn(&mut self, tokens: &[TokenId], want: Want) -> Result<Vec<f32>> {
        self.feed_chunks(tokens, true, want, None)
    }

    /// As [`Self::feed`], and show every stage of every chunk.
    pub fn feed_seeing(&mut self, tokens: &[TokenId], want: Want, see: Option<See<'_>>) -> Result<Vec<f32>> {
        let Some(see) = see else { return self.feed_chunks(tokens, false, want, None) };
        let mut show = |stage: &Stage, words| see(&stage.name, stage.width, words);
        self.feed_watching(tokens, want, &mut Watch { keep: &|_| true, stats: false, see: &mut show })
    }

    /// As [`Self::feed`], and look at stages of every chunk. Nothing else is computed differently.
    pub fn feed_watching(&mut self, tokens: &[TokenId], want: Want, watch: &mut Watch<'_>) -> Result<Vec<f32>> {
        self.feed_chunks(tokens, false, want, Some(watch))
    }

    /// As [`Self::feed_drawn`], and look at stages of every step.
    pub fn feed_drawn_watching(&mut self, tokens: &[TokenId], want: Want, watch: &mut Watch<'_>) -> Result<Vec<f32>> {
        self.feed_chunks(tokens, true, want, Some(watch))
    }

    fn feed_chunks(
        &mut self,
        tokens: &[TokenId],
        drawn: bool,
        want: Want,
        mut watch: Option<&mut Watch<'_>>,
    ) -> Result<Vec<f32>> {
        self.ahead = None;
        self.check(tokens)?;
        let before = self.tokens.len();
        let mut logits = Vec::new();
        let chunk = if drawn { self.chunk().min(self.max_picks()) } else { self.chunk() };
        let count = tokens.len().div_ceil(chunk);
        for (i, piece) in tokens.chunks(chunk).enumerate() {
            let want = if want != Want::All && i + 1 < count { Want::Nothing } else { want };
            let done = match drawn {
                true => self.decode_step(piece, want, &mut logits, watch.as_deref_mut()),
                false => self.step(piece, want, &mut logits, watch.as_deref_mut()),
            };
            if let Err(e) = done {
                self.cut(before);
                return Err(e);
            }
        }
        Ok(logits)
    }

    pub(crate) fn check(&self, tokens: &[TokenId]) -> Result<()> {
        if self.engine.activations() == Activations::Nvfp4Dynamic && tokens.len() > 1 {
            let chunk = self.chunk();
            if !self.tokens.is_empty() || tokens.len() > chunk {
                let reason = format!(
                    "\"nvfp4-dynamic\" has one scale for all rows of a step, so a prompt must be one step from an empty \
                     conversation ({} tokens here, {} held, chunk {chunk}): raise the chunk, or use \"nvfp4-token\"",
                    tokens.len(),
                    self.tokens.len(),
                );
                return Err(Error::option("activations", reason));
            }
        }
        self.engine.check_ids(tokens)?;
        self.engine.check_room(self.engine.context(), self.tokens.len() + tokens.len())
    }

    /// Tell the device which tokens the next step is over.
    fn write_rows(&self, tokens: &[TokenId]) -> Result<()> {
        let (device, s) = (&self.engine.inner.device, &self.state);
        let first = self.tokens.len();
        let row = |(i, &token): (usize, &TokenId)| Row { token, sequence: 0, position: (first + i) as u32, pad: 0 };
        let rows: Vec<Row> = tokens.iter().enumerate().map(row).collect();
        write_rows(device, s, &rows)
    }

    /// For the lab: set up a step over at most a chunk of tokens, and give its program to be run in pieces.
    pub(crate) fn begin(&mut self, tokens: &[TokenId]) -> Result<Program> {
        self.check(tokens)?;
        self.write_rows(tokens)?;
        self.written = self.written.max(self.tokens.len() + tokens.len());
        let role = self.engine.prompt_role(self.tokens.len() + tokens.len());
        let program = self.engine.inner.model.body(tokens.len() as u32, role, true, &self.state);
        Ok(edited(program, self.edit.as_ref()))
    }

    /// For the lab: the program of the logits of `picks` rows of the step.
    pub(crate) fn begin_head(&mut self, picks: &[u32]) -> Result<Program> {
        write_picks(&self.engine.inner.device, &self.state, picks)?;
        Ok(self.engine.inner.model.head(picks.len() as u32, &self.state))
    }

    /// For the lab: the step over `tokens` has been run.
    pub(crate) fn end(&mut self, tokens: &[TokenId]) {
        self.tokens.extend_from_slice(tokens);
    }

    /// Most rows of a step whose logits can be had at once.
    pub(crate) fn max_picks(&self) -> usize {
        self.state.max_picks as usize
    }

    /// Every buffer of the conversation.
    pub(crate) fn state_slices(&self) -> Vec<Slice> {
        self.state.slices()
    }

    /// Every buffer of which nothing is kept from one step to the next: all but the cache.
    pub(crate) fn scratch_slices(&self) -> Vec<Slice> {
        let cache: Vec<Slice> = self.state.cache().collect();
        self.state.slices().into_iter().filter(|slice| !cache.contains(slice)).collect()
    }

    pub(crate) fn device(&self) -> &dyn Device {
        &*self.engine.inner.device
    }

    /// One step over at most a chunk of tokens.
    fn step(
        &mut self,
        tokens: &[TokenId],
        want: Want,
        logits: &mut Vec<f32>,
        mut watch: Option<&mut Watch<'_>>,
    ) -> Result<()> {
        self.write_rows(tokens)?;
        let inner = &self.engine.inner;
        let (device, s) = (&inner.device, &self.state);
        let first = self.tokens.len();
        let count = tokens.len() as u32;
        // Whoever looks wants every stage; the parts of what is fused have its bits.
        let in_parts = self.edit.is_some() || watch.is_some();
        let stats = &mut self.stats;
        let mut run = |program: &Program| match &mut watch {
            None => device.run(program),
            Some(watch) => run_watched(device, program, watch, stats),
        };
        // Written first: if the step fails half-way, its positions may hold anything.
        self.written = self.written.max(first + tokens.len());
        if count == 1 && !in_parts {
            run(&self.programs.body)?;
        } else {
            let role = self.engine.prompt_role(first + tokens.len());
            let program = inner.model.body(count, role, in_parts, s);
            run(&edited(program, self.edit.as_ref()))?;
        }
        let picks: Vec<u32> = match want {
            Want::Nothing => Vec::new(),
            Want::Logits | Want::Last => vec![count - 1],
            Want::All => (0..count).collect(),
        };
        let vocab = self.engine.config().vocab_size;
        for picks in picks.chunks(s.max_picks as usize) {
            write_picks(device, s, picks)?;
            if picks.len() == 1 {
                run(&self.programs.head)?;
            } else {
                run(&inner.model.head(picks.len() as u32, s))?;
            }
            if want == Want::Logits {
                break;
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

    /// The program of a decode step over `rows` rows that see `reach` positions at most.
    pub(crate) fn decode_program(&mut self, rows: u32, reach: u32, draws: Draws) -> &Program {
        let (model, state, edit) = (&self.engine.inner.model, &self.state, self.edit.as_ref());
        let record = |reach| edited(model.decode(rows, reach, edit.is_some(), draws, state), edit);
        self.decode.get(rows, reach, draws, record)
    }

    /// Compute a decode step over at most `max_picks` tokens, which the conversation does not hold yet.
    pub(crate) fn run_decode(&mut self, tokens: &[TokenId], draws: Draws, watch: Option<&mut Watch<'_>>) -> Result<()> {
        self.write_rows(tokens)?;
        let (first, count) = (self.tokens.len(), tokens.len());
        self.written = self.written.max(first + count);
        let (rows, reach, device) = (count as u32, (first + count) as u32, self.engine.inner.device.clone());
        match watch {
            None => device.run(self.decode_program(rows, reach, draws)),
            Some(watch) => {
                let program = self.engine.inner.model.decode(rows, reach, true, draws, &self.state);
                run_watched(&device, &edited(program, self.edit.as_ref()), watch, &mut self.stats)
            }
        }
    }

    /// One decode step over at most `max_picks` tokens.
    fn decode_step(
        &mut self,
        tokens: &[TokenId],
        want: Want,
        logits: &mut Vec<f32>,
        watch: Option<&mut Watch<'_>>,
    ) -> Result<()> {
        self.run_decode(tokens, Draws::Likeliest, watch)?;
        let (device, count) = (&self.engine.inner.device, tokens.len());
        let vocab = self.engine.config().vocab_size;
        let wanted = match want {
            Want::Nothing | Want::Logits => 0..0,
            Want::Last => count - 1..count,
            Want::All => 0..count,
        };
        let bytes = (wanted.len() * vocab * 4) as u64;
        if bytes == 0 {
            device.wait()?;
        } else {
            let at = logits.len();
            logits.resize(at + wanted.len() * vocab, 0.0);
            let from = Slice { offset: (wanted.start * vocab * 4) as u64, bytes, ..self.state.logits };
            device.read(from, bytemuck::cast_slice_mut(&mut logits[at..]))?;
        }
        self.tokens.extend_from_slice(tokens);
        Ok(())
    }
}

/// Tell the device which rows the next step is over.
pub(crate) fn write_rows(device: &Arc<dyn Device>, s: &State, rows: &[Row]) -> Result<()> {
    device.write(s.rows, bytemuck::cast_slice(rows))?;
    device.write(s.step, bytemuck::bytes_of(&Step { tokens: rows.len() as u32, pad: [0; 3] }))
}

pub(crate) fn write_picks(device: &Arc<dyn Device>, s: &State, picks: &[u32]) -> Result<()> {
    device.write(s.picks, bytemuck::cast_slice(picks))?;
    device.write(s.head_step, bytemuck::bytes_of(&Step { tokens: picks.len() as u32, pad: [0; 3] }))
}

/// Run a program and show its stages, or their statistics.
fn run_watched(
    device: &Arc<dyn Device>,
    program: &Program,
    watch: &mut Watch<'_>,
    buffer: &mut Option<Buffer>,
) -> Result<()> {
    let mut program = program.clone();
    program.stages.retain(|stage| (watch.keep)(&stage.name));
    if !watch.stats {
        return device.run_seeing(&program, watch.see);
    }
    // One region of the buffer for each stage, at offsets that any adapter can bind; the whole is read at once.
    let rows = program.tokens() as usize;
    let region = (rows * STATS_WORDS * 4).next_multiple_of(256) as u64;
    let bytes = region * program.stages.len() as u64;
    if bytes == 0 {
        return device.run(&program);
    }
    if buffer.as_ref().is_none_or(|b| b.slice().bytes < bytes) {
        *buffer = Some(Buffer::new(device, "statistics", bytes)?);
    }
    let all = buffer.as_ref().expect("just made").slice();
    let stages = std::mem::take(&mut program.stages);
    for (i, stage) in stages.iter().enumerate().rev() {
        let to = Slice { offset: region * i as u64, bytes: (rows * STATS_WORDS * 4) as u64, ..all };
        let launch = program.stats_of(stage, to);
        program.insert(stage.after, vec![launch]);
    }
    device.run(&program)?;
    let mut words = vec![0u32; bytes as usize / 4];
    device.read(all.head(bytes), bytemuck::cast_slice_mut(&mut words))?;
    for (stage, words) in stages.iter().zip(words.chunks_exact(region as usize / 4)) {
        (watch.see)(stage, words[..rows * STATS_WORDS].to_vec())?;
    }
    Ok(())
}
