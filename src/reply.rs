//! The decode loop, pulled one token at a time: stopping is not pulling again.

use crate::decode::{Chosen, Verified};
use crate::engine::{Engine, Session, Want};
use crate::error::{Error, Result};
use crate::sampler::{Choice, Sampling, StopStrings, sample};
use crate::speculate::{Drafts, Rows, Speculation};
use crate::tokenizer::{TokenId, Utf8Stream};
use std::time::{Duration, Instant};

/// What ends a reply, and how tokens are drawn.
#[derive(Clone, Debug, Default)]
pub struct ReplyOptions {
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Most tokens to generate; `None`: as many as the context holds.
    pub max_tokens: Option<usize>,
    /// Texts that end the reply. They are not part of it.
    pub stop: Vec<String>,
    /// Tokens that end the reply; `None`: the checkpoint's.
    pub stop_tokens: Option<Vec<TokenId>>,
}

/// Why a reply ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A stop token was drawn.
    StopToken,
    /// A stop string appeared.
    StopString,
    /// As many tokens as asked for.
    MaxTokens,
    /// [`crate::Cancel::cancel`] was called.
    Cancelled,
}

/// One drawn token.
#[derive(Clone, Debug)]
pub struct Token {
    /// Its id, log-probability, and the likeliest others.
    pub choice: Choice,
    /// The text that it completes: whole characters only, nothing for special tokens, empty without a tokenizer.
    pub text: String,
    /// Set on the last token.
    pub finish: Option<Finish>,
}

/// What a reply took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Tokens in the prompt.
    pub prompt_tokens: usize,
    /// Of these, tokens that the cache already held.
    pub cached_tokens: usize,
    /// Tokens drawn.
    pub generated_tokens: usize,
    /// From the first pull to the first token.
    pub first_token: Duration,
    /// From the first token to the last.
    pub generation: Duration,
    /// What drafts did, where there are any.
    pub drafts: Drafts,
}

impl Stats {
    /// Prompt tokens computed in a second.
    pub fn prompt_rate(&self) -> f64 {
        rate(self.prompt_tokens - self.cached_tokens, self.first_token)
    }

    /// Tokens drawn in a second, the first not counted.
    pub fn generation_rate(&self) -> f64 {
        rate(self.generated_tokens.saturating_sub(1), self.generation)
    }
}

fn rate(count: usize, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { count as f64 / time.as_secs_f64() }
}

/// Turns drawn tokens into a reply: their text, what ends it, what it took.
#[derive(Debug)]
pub(crate) struct Output {
    options: ReplyOptions,
    stop_tokens: Vec<TokenId>,
    /// Tokens that the repetition penalty looks at: prompt and reply.
    history: Vec<TokenId>,
    utf8: Utf8Stream,
    stops: StopStrings,
    started: Option<Instant>,
    first: Option<Instant>,
    pub stats: Stats,
    pub finish: Option<Finish>,
}

impl Output {
    /// Nothing is drawn yet.
    pub fn new(engine: &Engine, prompt: &[TokenId], options: &ReplyOptions) -> Result<Self> {
        options.sampling.validate()?;
        if prompt.is_empty() {
            return Err(Error::option("prompt", "is empty: give at least one token"));
        }
        engine.check_room(engine.context(), prompt.len())?;
        Ok(Self {
            stop_tokens: options.stop_tokens.clone().unwrap_or_else(|| engine.generation().eos_token_id.clone()),
            history: prompt.to_vec(),
            utf8: Utf8Stream::default(),
            stops: StopStrings::new(options.stop.clone()),
            started: None,
            first: None,
            stats: Stats { prompt_tokens: prompt.len(), ..Stats::default() },
            finish: (options.max_tokens == Some(0)).then_some(Finish::MaxTokens),
            options: options.clone(),
        })
    }

    /// The time to the first token is counted from the first call.
    pub fn begin(&mut self) {
        self.started.get_or_insert_with(Instant::now);
    }

    /// Whether tokens are drawn on the device.
    pub fn on_device(&self) -> bool {
        self.options.sampling.on_device()
    }

    /// Tokens that may still be drawn.
    pub fn left(&self) -> usize {
        self.options.max_tokens.map_or(usize::MAX, |max| max - self.stats.generated_tokens)
    }

    /// The prompt, and what was drawn since.
    pub fn history(&self) -> &[TokenId] {
        &self.history
    }

    /// How tokens are drawn.
    pub fn sampling(&self) -> &Sampling {
        &self.options.sampling
    }

    /// Draw the next token.
    pub fn sample(&self, logits: &[f32]) -> Result<Choice> {
        sample(&self.options.sampling, logits, &self.history, self.history.len() as u64)
    }

    /// Say a token that was drawn.
    pub fn say(&mut self, engine: &Engine, choice: Choice) -> Token {
        let now = Instant::now();
        let (started, first) = (self.started.unwrap_or(now), *self.first.get_or_insert(now));
        self.stats.first_token = first - started;
        self.stats.generation = now - first;
        self.stats.generated_tokens += 1;
        self.history.push(choice.id);
        let stopped = self.stop_tokens.contains(&choice.id);
        let bytes = match engine.tokenizer() {
            Ok(t) if !t.is_special(choice.id) => t.token_bytes(choice.id),
            _ => Vec::new(),
        };
        let (mut text, hit) = self.stops.push(&self.utf8.push(&bytes));
        self.finish = if hit {
            Some(Finish::StopString)
        } else if stopped {
            Some(Finish::StopToken)
        } else if self.left() == 0 {
            Some(Finish::MaxTokens)
        } else {
            None
        };
        if self.finish.is_some() && !hit {
            text += &self.take_rest();
        }
        Token { choice, text, finish: self.finish }
    }

    /// Text that was held back.
    pub fn take_rest(&mut self) -> String {
        let (mut text, hit) = self.stops.push(&self.utf8.finish());
        if !hit {
            text += &self.stops.finish();
        }
        text
    }
}

/// A reply being drawn: an iterator of tokens that borrows its session. Drop it to stop.
#[derive(Debug)]
pub struct Reply<'s> {
    session: &'s mut Session,
    /// Tokens of the prompt that are still to be computed.
    pending: Vec<TokenId>,
    output: Output,
    /// The last step's rows, what it gave for them, and what was drawn: the next token may stand there already.
    step: Option<(Rows, Verified, Chosen)>,
    /// The row of the last step that the last token was drawn from.
    row: usize,
    /// Do not compute on the device what was not asked for, so that the last token's logits stay there.
    in_step: bool,
    mark: bool,
    over: bool,
}

impl<'s> Reply<'s> {
    pub(crate) fn new(session: &'s mut Session, prompt: &[TokenId], options: &ReplyOptions) -> Result<Self> {
        let mut output = Output::new(session.engine(), prompt, options)?;
        // A cancel that came too late for the last reply is not meant for this one.
        session.take_cancel();
        if let Some(speculation) = &mut session.speculation {
            speculation.begin();
        }
        let pending = session.reuse(prompt)?.to_vec();
        output.stats.cached_tokens = prompt.len() - pending.len();
        let over = output.finish.is_some();
        Ok(Self { pending, output, step: None, row: 0, in_step: false, mark: false, over, session })
    }

    /// Why it ended, once it has.
    pub fn finish(&self) -> Option<Finish> {
        self.output.finish
    }

    /// What it took so far.
    pub fn stats(&self) -> Stats {
        let drafts = self.session.speculation.as_ref().map(Speculation::drafts).unwrap_or_default();
        Stats { drafts, ..self.output.stats }
    }

    /// Text held back because it might have become a stop string or a whole character. The last token gives it out;
    /// where there is none, after a cancel or an error, it is to be had here.
    pub fn take_rest(&mut self) -> String {
        self.output.take_rest()
    }

    /// For tests: let [`Self::logits`] give those of every token.
    #[doc(hidden)]
    pub fn keeping_logits(mut self) -> Self {
        self.in_step = true;
        self
    }

    /// For tests: the logits that the last token was drawn from, `[V]`, after [`Self::keeping_logits`].
    #[doc(hidden)]
    pub fn logits(&self) -> Result<Vec<f32>> {
        if !self.in_step || self.output.stats.generated_tokens == 0 {
            return Err(Error::option(
                "logits",
                "there are none: ask for them with `keeping_logits`, and draw a token",
            ));
        }
        self.session.logits(self.row)
    }

    /// Remember the end of the prompt as a point to come back to.
    pub(crate) fn marking(mut self) -> Self {
        self.mark = true;
        self
    }

    fn draw(&mut self) -> Result<Option<Token>> {
        self.output.begin();
        let Some(choice) = self.choose()? else {
            self.output.finish = Some(Finish::Cancelled);
            return Ok(None);
        };
        Ok(Some(self.output.say(self.session.engine(), choice)))
    }

    /// The next token. `None`: cancelled.
    fn choose(&mut self) -> Result<Option<Choice>> {
        if self.output.stats.generated_tokens == 0 { self.choose_first() } else { self.choose_next() }
    }

    /// The first token, after the prompt.
    fn choose_first(&mut self) -> Result<Option<Choice>> {
        let on_device = self.output.on_device();
        let want = if on_device { Want::Logits } else { Want::Last };
        let Some(logits) = self.compute(want)? else { return Ok(None) };
        if !on_device {
            return self.output.sample(&logits).map(Some);
        }
        self.session.begin_drawing(self.output.sampling())?;
        self.session.draw(self.ahead(self.resting())).map(Some)
    }

    /// A token after one that was drawn.
    fn choose_next(&mut self) -> Result<Option<Choice>> {
        if self.session.take_cancel() {
            return Ok(None);
        }
        let last = *self.output.history.last().expect("a token was drawn");
        if let Some(choice) = self.take_row(last) {
            return choice.map(Some);
        }
        let proposal = self.propose()?;
        let resting = self.resting();
        let started = Instant::now();
        if self.output.on_device() && resting > 0 {
            if self.session.ahead.is_none() {
                self.session.draw_after(last, self.output.sampling())?;
            }
            self.row = 0;
            let choice = self.session.draw(self.ahead(resting - 1))?;
            self.rested(started);
            return Ok(Some(choice));
        }
        let rows = Rows::new(last, proposal);
        let verified = self.session.verify(rows.tokens(), self.output.sampling())?;
        if resting > 0 {
            self.rested(started);
        } else if let Some(speculation) = &mut self.session.speculation {
            speculation.stepped(&rows, started.elapsed());
        }
        let chosen = verified.sample_rows(&self.output.options.sampling, &self.output.history, &rows.tokens()[1..]);
        self.step = Some((rows, verified, chosen));
        self.take_row(last).expect("the first row is the last token's").map(Some)
    }

    /// The token after a row of the last step that was computed over `last`, if there is one.
    fn take_row(&mut self, last: TokenId) -> Option<Result<Choice>> {
        let (rows, verified, chosen) = self.step.as_mut()?;
        let row = match &mut self.session.speculation {
            Some(speculation) => speculation.next_row(rows, last),
            None => rows.next(last),
        };
        let Some(row) = row else {
            self.step = None;
            return None;
        };
        self.row = row;
        self.session.hold(last);
        if let Some(choice) = chosen.remove(&row) {
            return Some(choice);
        }
        let vocab = self.session.engine().config().vocab_size;
        Some(verified.choose(row, vocab, &self.output.options.sampling, &self.output.history))
    }

    /// Tokens to verify in the next step: as many as it has rows for, the context has room for, and the reply may have.
    fn propose(&mut self) -> Result<Vec<TokenId>> {
        let engine = self.session.engine();
        let room = engine.context().saturating_sub(self.session.tokens().len() + 1);
        let most = room.min(self.session.max_picks() - 1).min(self.output.left() - 1);
        let vocab = engine.config().vocab_size;
        match &mut self.session.speculation {
            Some(speculation) => {
                speculation.propose(&self.output.history, self.output.stats.prompt_tokens, most, vocab)
            }
            None => Ok(Vec::new()),
        }
    }

    /// Tokens to draw before proposals are asked for.
    fn resting(&self) -> usize {
        self.session.speculation.as_ref().map_or(usize::MAX, Speculation::rest)
    }

    fn rested(&mut self, started: Instant) {
        if let Some(speculation) = &mut self.session.speculation {
            speculation.rested(started.elapsed());
        }
    }

    /// Tokens that the device may compute ahead, of `most`.
    fn ahead(&self, most: usize) -> usize {
        if self.in_step { 0 } else { most.min(self.output.left() - 1) }
    }

    /// Compute the prompt chunk by chunk. `None`: cancelled; what was computed stays in the cache.
    fn compute(&mut self, want: Want) -> Result<Option<Vec<f32>>> {
        let chunk = self.session.chunk();
        while self.pending.len() > chunk {
            if self.session.take_cancel() {
                return Ok(None);
            }
            self.session.feed(&self.pending[..chunk], Want::Nothing)?;
            self.pending.drain(..chunk);
        }
        if self.session.take_cancel() {
            return Ok(None);
        }
        let logits = self.session.feed(&self.pending, want)?;
        self.pending.clear();
        if std::mem::take(&mut self.mark) {
            self.session.set_mark()?;
        }
        Ok(Some(logits))
    }
}

impl Iterator for Reply<'_> {
    type Item = Result<Token>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.over {
            return None;
        }
        let drawn = self.draw();
        self.over = drawn.is_err() || self.output.finish.is_some();
        drawn.transpose()
    }
}
