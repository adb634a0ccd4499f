//! Many sessions in one step: requests are admitted when there is room for them, prompts are computed in bounded pieces beside
//! the tokens that others draw, and who leaves makes room at once.

mod deliver;
mod options;
mod request;

pub use options::SchedulerOptions;
pub use request::Request;

use crate::decode::DecodePrograms;
use crate::device::Later;
use crate::engine::{Engine, write_picks, write_rows};
use crate::error::{Error, Result};
use crate::kv::{Held, Kv, Pages};
use crate::model::State;
use crate::ops::{Drawn, Draws, Row};
use crate::program::{Program, Slice};
use crate::reply::{Output, ReplyOptions};
use crate::sampler::Rule;
use crate::speculate::{Rows, Speculation};
use crate::tokenizer::TokenId;
use crate::trace::probe::hash_bytes;
use options::planned;
use request::Outbox;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

/// Tokens that a session begins with.
#[derive(Clone, Copy, Debug)]
pub enum Part<'a> {
    /// That were given.
    Prompt(&'a [TokenId]),
    /// That the model drew, such as an answer earlier in a conversation. They are computed as drawn tokens are, and so have the
    /// bits that they had then.
    Drawn(&'a [TokenId]),
}

/// Steps any number of sessions together. [`Scheduler::add`] asks for one, [`Scheduler::step`] moves all of them forward, their
/// tokens are pulled from the [`Request`]s.
///
/// What a session says does not depend on the others, on when it came, on chunks, pages, or shared prefixes: its logits have the
/// bits that they have alone.
///
/// A request is admitted when the pages that it takes at most, by its prompt and `max_tokens`, can be promised to it: so a
/// session that runs always goes on to its end. Until then it waits, in order.
///
/// ```no_run
/// use fourfold::{ReplyOptions, SchedulerOptions};
///
/// let engine = fourfold::Engine::builder().build()?;
/// let mut scheduler = engine.scheduler(&SchedulerOptions::default())?;
/// let options = ReplyOptions { max_tokens: Some(20), ..Default::default() };
/// let requests = [scheduler.add(&[7, 21], &options)?, scheduler.add(&[90], &options)?];
/// loop {
///     let goes_on = scheduler.step()?;
///     for request in &requests {
///         while let Some(token) = request.pull()? {
///             print!("{}", token.text);
///         }
///     }
///     if !goes_on {
///         break;
///     }
/// }
/// # Ok::<(), fourfold::Error>(())
/// ```
#[derive(Debug)]
pub struct Scheduler {
    engine: Engine,
    state: State,
    kv: Kv,
    context: usize,
    chunk: usize,
    decode: DecodePrograms,
    /// How the device was told to draw each sequence's tokens.
    rules: Vec<Rule>,
    /// In the order in which they came.
    waiting: VecDeque<Task>,
    running: Vec<Running>,
    last_id: u64,
    /// Steps of drawn tokens on the device whose results nobody has looked at.
    under_way: VecDeque<Submitted>,
    /// Whether the device's rows are those that follow the last of `under_way`.
    in_place: bool,
    /// Most drafted tokens in one step.
    drafts: usize,
    /// Whose turn it is to be asked first for drafts.
    turn: usize,
    computed: u64,
    hashing: bool,
}

/// A request's session.
#[derive(Debug)]
struct Task {
    id: u64,
    /// What it was given, and what it drew.
    tokens: Vec<Held>,
    given: usize,
    /// Who drafts for it.
    speculation: Option<Speculation>,
    /// Rows of the next step whose last tokens are only proposed: those that it would not have drawn are taken back.
    rows: Option<Rows>,
    output: Output,
    /// How the device draws; what the host draws is the likeliest there.
    rule: Rule,
    outbox: Arc<Outbox>,
}

/// A session with a place in the cache.
#[derive(Debug)]
struct Running {
    slot: usize,
    task: Task,
}

/// Tokens of a session that a step computes.
#[derive(Clone, Debug)]
struct Feed {
    id: u64,
    slot: usize,
    first: usize,
    count: usize,
    /// Whether the session's next token is drawn from what follows the last of them.
    draws: bool,
    /// Whether the host wants the logits for that.
    logits: bool,
}

/// A step that runs.
#[derive(Debug)]
struct Submitted {
    feeds: Vec<Feed>,
    /// By feed: where its results stand.
    places: Vec<usize>,
    drawn: Option<Box<dyn Later>>,
    logits: Option<Box<dyn Later>>,
}

impl Task {
    /// Tokens to draw before drafts are asked for.
    fn resting(&self) -> usize {
        self.speculation.as_ref().map_or(usize::MAX, Speculation::rest)
    }

    /// Ask for up to `most` tokens to verify in the next step, after the one that was drawn last. Says how many there are.
    fn propose(&mut self, most: usize, vocab: usize) -> Result<usize> {
        let most = most.min(self.output.left() - 1);
        let (Some(speculation), Some(last)) = (&mut self.speculation, self.tokens.last()) else { return Ok(0) };
        let (last, n_prompt) = (last.token, self.output.stats.prompt_tokens);
        let proposal = speculation.propose(self.output.history(), n_prompt, most, vocab)?;
        if speculation.rest() > 0 {
            return Ok(0); // it was found to lose
        }
        self.tokens.extend(proposal.iter().map(|&token| Held { token, drawn: true }));
        Ok(self.rows.insert(Rows::new(last, proposal)).tokens().len() - 1)
    }

    /// The rows of the step whose logits count, where the tokens end with those that are certain.
    fn take_rows(&mut self) -> Rows {
        let proposed = self.proposed();
        self.tokens.truncate(self.tokens.len() - proposed);
        let last = self.tokens.last().expect("a prompt has a token").token;
        self.rows.take().unwrap_or_else(|| Rows::new(last, Vec::new()))
    }

    fn proposed(&self) -> usize {
        self.rows.as_ref().map_or(0, |rows| rows.tokens().len() - 1)
    }

    /// The row that the next token is drawn from, if there is one: with drafts, one that was computed over what was drawn.
    fn next_row(&mut self, rows: &mut Rows) -> Option<usize> {
        let last = self.tokens.last()?.token;
        let Some(speculation) = &mut self.speculation else { return rows.next(last) };
        let row = speculation.next_row(rows, last);
        self.output.stats.drafts = speculation.drafts();
        row
    }
}

impl Running {
    /// How many of the next tokens have the same role, up to `most`.
    fn next(&self, len: usize, most: usize) -> usize {
        let drawn = self.task.tokens[len].drawn;
        self.task.tokens[len..].iter().take(most).take_while(|held| held.drawn == drawn).count()
    }

    fn feed(&self, first: usize, count: usize, hashing: bool) -> Feed {
        let draws = first + count == self.task.tokens.len();
        let logits = draws && (hashing || !self.task.output.on_device());
        Feed { id: self.task.id, slot: self.slot, first, count, draws, logits }
    }
}

impl Scheduler {
    pub(crate) fn new(engine: &Engine, options: &SchedulerOptions) -> Result<Self> {
        let (model, device) = (engine.model(), engine.device());
        let (plan, sizes) = planned(engine, options)?;
        let state = model.state(device, &plan)?;
        if (state.max_picks as usize) < options.sessions {
            let (many, binds) = (options.sessions, state.max_picks);
            let reason = format!("{many} are too many: {} binds the logits of {binds} at most", device.describe());
            return Err(Error::option("sessions", reason));
        }
        for program in [
            &model.body(1, engine.prompt_role(1), false, &state),
            &model.body(plan.chunk, engine.prompt_role(plan.context as usize), false, &state),
            &model.head(1, &state),
            // Every kernel that drawing has, for as many rows at once as there may be.
            &model.draw(state.max_picks.min((options.sessions + options.drafts) as u32), Draws::Rounds(3), &state),
        ] {
            device.prepare(program)?;
        }
        let decode = |rows, reach| model.decode(rows, reach, false, Draws::Likeliest, &state);
        let most = state.max_picks.min((options.sessions + options.drafts) as u32);
        let mut all = DecodePrograms::of_all_reaches(plan.context, |reach| decode(options.sessions as u32, reach));
        // Tiles change behind powers of two, if they do.
        let counts = (0..u32::BITS).map(|i| 1 << i).flat_map(|rows: u32| [rows, rows.saturating_add(1)]);
        for rows in counts.take_while(|rows| *rows <= most).chain([most]) {
            all.launches.extend(decode(rows, 1).launches);
        }
        device.prepare(&all)?;
        Ok(Self {
            engine: engine.clone(),
            kv: Kv::new(sizes, options.share, state.tables()),
            state,
            context: plan.context as usize,
            chunk: plan.chunk as usize,
            decode: DecodePrograms::default(),
            rules: vec![Rule::default(); options.sessions],
            waiting: VecDeque::new(),
            running: Vec::new(),
            last_id: 0,
            under_way: VecDeque::new(),
            in_place: false,
            drafts: options.drafts,
            turn: 0,
            computed: 0,
            hashing: false,
        })
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Ask for an answer to a prompt. Nothing runs before the next step.
    ///
    /// # Errors
    /// What could never be answered here: options out of range, more positions than the context or than all pages hold.
    pub fn add(&mut self, prompt: &[TokenId], options: &ReplyOptions) -> Result<Request> {
        self.add_parts(&[Part::Prompt(prompt)], options)
    }

    /// As [`Self::add`], after tokens of which some were drawn.
    pub fn add_parts(&mut self, parts: &[Part<'_>], options: &ReplyOptions) -> Result<Request> {
        let held = |part: &Part<'_>| {
            let (Part::Prompt(tokens) | Part::Drawn(tokens)) = *part;
            let drawn = matches!(part, Part::Drawn(_));
            tokens.iter().map(move |&token| Held { token, drawn }).collect::<Vec<_>>()
        };
        let tokens: Vec<Held> = parts.iter().flat_map(held).collect();
        let ids: Vec<TokenId> = tokens.iter().map(|held| held.token).collect();
        self.engine.check_ids(&ids)?;
        self.engine.check_room(self.context, ids.len())?;
        // The last token that is drawn takes no room.
        let max = options.max_tokens.unwrap_or(self.context + 1 - ids.len());
        let options = ReplyOptions { max_tokens: Some(max), ..options.clone() };
        let mut output = Output::new(&self.engine, &ids, &options)?;
        let positions = ids.len().saturating_add(max).saturating_sub(1);
        self.engine.check_room(self.context, positions)?;
        let sizes = self.kv.sizes();
        let (want, have) = (sizes.most(positions)[0], sizes.pages[0]);
        if want > have {
            let (why, remedy) = match sizes.bound {
                true => (", as many as the device binds", "take a bf16 cache"),
                false => ("", "give the scheduler more pages"),
            };
            let reason = format!(
                "a prompt of {} tokens and max_tokens {max} take {want} pages of {} positions, and the cache has {have}{why}: \
                 lower max_tokens, or {remedy}",
                ids.len(),
                sizes.page
            );
            return Err(Error::option("pages", reason));
        }
        output.begin();
        self.last_id += 1;
        let outbox = Arc::new(Outbox::default());
        let given = tokens.len();
        let (id, speculation, rows) = (self.last_id, None, None);
        let rule = if output.on_device() { Rule::new(output.sampling()) } else { Rule::default() };
        let mut task = Task { id, tokens, given, speculation, rows, output, rule, outbox: outbox.clone() };
        if task.output.finish.is_some() {
            task.outbox.end(&mut task.output, None);
        } else {
            self.waiting.push_back(task);
        }
        Ok(Request(outbox))
    }

    /// One step: sessions that were cancelled leave, those that wait come in as far as there is room, everybody who draws gets
    /// a token or, with drafts, several, and as many tokens of prompts as one step takes are computed. Says whether anything is
    /// left to do.
    ///
    /// # Errors
    /// If the device fails. Then the sessions are as they were, and another step goes on with them. An error of one session,
    /// such as logits that are no numbers or a drafter's own, ends that one and is pulled from its request.
    pub fn step(&mut self) -> Result<bool> {
        self.dismiss_cancelled();
        self.admit();
        if let Err(e) = self.compute() {
            self.forget_ahead();
            return Err(e);
        }
        Ok(!self.running.is_empty() || !self.waiting.is_empty())
    }

    /// How many sessions run.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// How many requests wait for room.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// How the pages of the cache are used: those of layers that see everything, and of sliding layers.
    pub fn pages(&self) -> [Pages; 2] {
        self.kv.counts()
    }

    /// Tokens that were computed so far, of prompts, drawn and drafted; not those that a shared prefix spared.
    pub fn computed_tokens(&self) -> u64 {
        self.computed
    }

    /// Let somebody draft tokens for a session from its next step on, or nobody any longer. Its steps take another time and may
    /// give several tokens at once; what it says is the same to the bit. What became of drafts is in its
    /// [`Request::stats`]. No effect on a request that has ended.
    ///
    /// Sessions that draft share the [`SchedulerOptions::drafts`] of a step; they hold back the host, which else submits steps
    /// ahead of their tokens.
    pub fn set_speculation(&mut self, request: &Request, speculation: Option<Speculation>) {
        let running = self.running.iter_mut().map(|r| &mut r.task);
        let mut tasks = running.chain(&mut self.waiting);
        if let Some(task) = tasks.find(|task| Arc::ptr_eq(&task.outbox, &request.0)) {
            task.speculation = speculation;
            task.speculation.iter_mut().for_each(Speculation::begin);
        }
    }

    /// For tests: take a hash of the logits that every token is drawn from.
    #[doc(hidden)]
    pub fn hash_logits(&mut self) {
        self.hashing = true;
    }

    /// For tests: every page is in the one state that it should be in.
    #[doc(hidden)]
    pub fn check_pages(&self) -> Result<(), String> {
        self.kv.check()
    }

    /// For measuring: compute all prompts, and nothing else.
    pub(crate) fn compute_prompts(&mut self) -> Result<()> {
        self.admit();
        while let Some(step) = self.submit_prompts()? {
            self.deliver(step, Instant::now())?;
        }
        Ok(())
    }

    /// For measuring: put the rows of the next step of drawn tokens in their places, and give its program, which moves them on.
    /// It may run `more` times after the first.
    pub(crate) fn begin(&mut self, more: usize) -> Result<Program> {
        self.forget_ahead();
        let feeds = self.drawn_feeds();
        feeds.iter().for_each(|feed| self.kv.grow(feed.slot, feed.first + feed.count + more));
        let rows = self.place(&feeds)?;
        let reach = rows.iter().map(|row| row.position + 1).max().unwrap_or(1) + more as u32;
        let draws = self.draws(&feeds);
        Ok(self.decode_program(rows.len() as u32, reach, draws).clone())
    }

    /// For measuring: where the tokens of a step are drawn into.
    pub(crate) fn drawn(&self) -> Slice {
        self.state.drawn
    }

    fn dismiss_cancelled(&mut self) {
        self.waiting.retain_mut(|task| {
            let cancelled = task.outbox.cancelled();
            if cancelled {
                task.outbox.end(&mut task.output, None);
            }
            !cancelled
        });
        for at in (0..self.running.len()).rev() {
            if self.running[at].task.outbox.cancelled() {
                self.dismiss(at, None);
            }
        }
    }

    /// A session leaves. Steps that are under way may still write to its pages, but before any that the next holder submits.
    fn dismiss(&mut self, at: usize, error: Option<Error>) {
        let Running { slot, mut task } = self.running.remove(at);
        self.kv.release(slot);
        task.outbox.end(&mut task.output, error);
    }

    fn admit(&mut self) {
        while let Some(task) = self.waiting.front_mut() {
            let positions = task.tokens.len() + task.output.left() - 1;
            let Some(slot) = self.kv.admit(&task.tokens, positions) else { break };
            let Some(mut task) = self.waiting.pop_front() else { break };
            task.output.stats.cached_tokens = self.kv.len(slot);
            self.running.push(Running { slot, task });
        }
    }

    fn compute(&mut self) -> Result<()> {
        for Running { slot, task } in &mut self.running {
            if self.kv.len(*slot) + 1 < task.given {
                let before = self.kv.len(*slot);
                self.kv.adopt_known(*slot, &task.tokens);
                task.output.stats.cached_tokens += self.kv.len(*slot) - before;
            }
        }
        if let Some(step) = self.under_way.front()
            && step.feeds.iter().all(|feed| self.index(feed.id).is_none())
        {
            // Nobody is left of those that the device computes ahead for.
            self.forget_ahead();
        }
        if self.under_way.is_empty() {
            self.ask_drafters();
        }
        let started = Instant::now();
        if self.under_way.is_empty() {
            self.submit_drawn()?;
        }
        while self.may_go_ahead() {
            self.submit_ahead()?;
        }
        let drawn = self.under_way.pop_front();
        let prompts = self.submit_prompts()?;
        [drawn, prompts].into_iter().flatten().try_for_each(|step| self.deliver(step, started))
    }

    /// What the device computes ahead does not count any more.
    fn forget_ahead(&mut self) {
        self.under_way.clear();
        self.in_place = false;
        for r in &mut self.running {
            r.task.take_rows();
            self.kv.shrink(r.slot);
        }
    }

    /// Ask those who draft, and do not rest, for tokens to verify in the next step. They share the rows that are left beside
    /// one of each session, and take turns in being the first.
    fn ask_drafters(&mut self) {
        let kv = &self.kv;
        let drawing = |r: &&Running| r.task.tokens[kv.len(r.slot)].drawn;
        let sessions: Vec<&Running> = self.running.iter().filter(drawing).collect();
        let drafts = |r: &&&Running| r.task.resting() == 0 && r.task.tokens.len() == kv.len(r.slot) + 1;
        let mut ids: Vec<u64> = sessions.iter().filter(drafts).map(|r| r.task.id).collect();
        if ids.is_empty() {
            return;
        }
        let mut room = self.drafts.min(self.state.max_picks as usize - sessions.len());
        self.turn = (self.turn + 1) % ids.len();
        ids.rotate_left(self.turn);
        let vocab = self.engine.config().vocab_size;
        for (asked, id) in ids.iter().enumerate() {
            let share = room.div_ceil(ids.len() - asked);
            let at = self.index(*id).expect("it runs");
            match self.running[at].task.propose(share, vocab) {
                Ok(count) => room -= count,
                Err(e) => self.dismiss(at, Some(e)),
            }
        }
    }

    /// The drawn tokens that the next step computes: one of each session that has any, and more of those that were given many
    /// at once, as far as the device has room for logits.
    fn drawn_feeds(&mut self) -> Vec<Feed> {
        let kv = &self.kv;
        let drawing = |r: &&Running| r.task.tokens[kv.len(r.slot)].drawn;
        let sessions: Vec<&Running> = self.running.iter().filter(drawing).collect();
        let proposed: usize = sessions.iter().map(|r| r.task.proposed()).sum();
        let mut more = self.state.max_picks as usize - sessions.len() - proposed;
        let feed = |r: &Running| {
            let (first, proposed) = (kv.len(r.slot), r.task.proposed());
            let count = r.next(first, 1 + proposed.max(more));
            if proposed == 0 {
                more -= count - 1;
            }
            r.feed(first, count, self.hashing)
        };
        by_need(sessions.into_iter().map(feed).collect())
    }

    /// The tokens of prompts that the next step computes: of those who came first, as many as it takes.
    fn prompt_feeds(&self) -> Vec<Feed> {
        let mut feeds: Vec<(Feed, &Task)> = Vec::new();
        let mut room = self.chunk;
        for r in &self.running {
            let first = self.kv.len(r.slot);
            if room == 0 || r.task.tokens[first].drawn || self.comes_from_another(first, &r.task, &feeds) {
                continue;
            }
            let count = r.next(first, room);
            room -= count;
            feeds.push((r.feed(first, count, self.hashing), &r.task));
        }
        by_need(feeds.into_iter().map(|(feed, _)| feed).collect())
    }

    /// Whether this very step computes the page that a session needs next for another one: then that is waited for.
    fn comes_from_another(&self, first: usize, task: &Task, feeds: &[(Feed, &Task)]) -> bool {
        let page = self.kv.sizes().page;
        let end = (first / page + 1) * page;
        let same = |(feed, other): &(Feed, &Task)| {
            (feed.first..feed.first + feed.count).contains(&(end - 1)) && other.tokens[..end] == task.tokens[..end]
        };
        self.kv.shares() && end < task.tokens.len() && feeds.iter().any(same)
    }

    /// How tokens are drawn after these.
    fn draws(&self, feeds: &[Feed]) -> Draws {
        Draws::of(feeds.iter().map(|feed| &self.rules[feed.slot]))
    }

    /// Take the pages that a step writes, say how its tokens are drawn, and put its rows in their places.
    fn place(&mut self, feeds: &[Feed]) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for feed in feeds {
            let end = feed.first + feed.count;
            self.kv.grow(feed.slot, end);
            let at = self.index(feed.id).expect("a step is made of sessions that run");
            let tokens = &self.running[at].task.tokens[feed.first..end];
            let row = |(held, position): (&Held, usize)| Row {
                token: held.token,
                sequence: feed.slot as u32,
                position: position as u32,
                pad: 0,
            };
            rows.extend(tokens.iter().zip(feed.first..).map(row));
        }
        let mut rules = self.rules.clone();
        for feed in feeds {
            rules[feed.slot] = self.running[self.index(feed.id).expect("as above")].task.rule;
        }
        let device = self.engine.device();
        if rules != self.rules {
            device.write(self.state.rules(), bytemuck::cast_slice(&rules))?;
            self.rules = rules;
        }
        self.kv.flush(device)?;
        write_rows(device, &self.state, &rows)?;
        Ok(rows)
    }

    /// The program of a step of drawn tokens.
    fn decode_program(&mut self, rows: u32, reach: u32, draws: Draws) -> &Program {
        let (model, state) = (self.engine.model(), &self.state);
        self.decode.get(rows, reach, draws, |reach| model.decode(rows, reach, false, draws, state))
    }

    fn submit_drawn(&mut self) -> Result<()> {
        let feeds = self.drawn_feeds();
        if feeds.is_empty() {
            return Ok(());
        }
        let rows = self.place(&feeds)?;
        let device = self.engine.device().clone();
        let reach = rows.iter().map(|row| row.position + 1).max().unwrap_or(1);
        let draws = self.draws(&feeds);
        device.run(self.decode_program(rows.len() as u32, reach, draws))?;
        self.in_place = true;
        // A session's last row is the one whose logits count.
        let ends = feeds.iter().scan(0, |end, feed| {
            *end += feed.count;
            Some(*end - 1)
        });
        let places = ends.collect();
        let step = self.submitted(feeds, places)?;
        self.under_way.push_back(step);
        Ok(())
    }

    /// Whether the step after those under way can be submitted before their tokens are known: they are drawn on the device,
    /// everybody draws, and nobody is at the last token or drafts the next.
    fn may_go_ahead(&self) -> bool {
        let Some(last) = self.under_way.back().filter(|_| self.in_place) else { return false };
        let steps = self.under_way.len();
        let goes_on = |(r, id): (&Running, u64)| {
            let task = &r.task;
            task.id == id && task.output.on_device() && task.output.left() > steps && task.resting() > steps
        };
        let mut ids: Vec<u64> = last.feeds.iter().filter(|f| f.draws && f.count == 1).map(|f| f.id).collect();
        ids.sort_unstable();
        steps < 1 + self.engine.device().ahead()
            && ids.len() == self.running.len()
            && last.feeds.len() == ids.len()
            && self.running.iter().zip(ids).all(goes_on)
    }

    fn submit_ahead(&mut self) -> Result<()> {
        let last = self.under_way.back().expect("there is a step to follow");
        let (mut feeds, places) = (last.feeds.clone(), last.places.clone());
        for feed in &mut feeds {
            feed.first += 1;
            self.kv.grow(feed.slot, feed.first + 1);
        }
        let device = self.engine.device().clone();
        self.kv.flush(&device)?;
        let reach = feeds.iter().map(|feed| feed.first + 1).max().unwrap_or(1);
        let draws = self.draws(&feeds);
        device.run(self.decode_program(feeds.len() as u32, reach as u32, draws))?;
        let step = self.submitted(feeds, places)?;
        self.under_way.push_back(step);
        Ok(())
    }

    /// A step over tokens of prompts, if there are any.
    fn submit_prompts(&mut self) -> Result<Option<Submitted>> {
        let feeds = self.prompt_feeds();
        if feeds.is_empty() {
            return Ok(None);
        }
        self.in_place = false;
        let rows = self.place(&feeds)?;
        let (device, model, s) = (self.engine.device(), self.engine.model(), &self.state);
        let reach = feeds.iter().map(|feed| feed.first + feed.count).max().unwrap_or(1);
        device.run(&model.body(rows.len() as u32, self.engine.prompt_role(reach), false, s))?;
        let (mut picks, mut places, mut end) = (Vec::new(), Vec::new(), 0);
        for feed in &feeds {
            end += feed.count as u32;
            places.push(picks.len());
            picks.extend(feed.draws.then_some(end - 1));
        }
        if !picks.is_empty() {
            write_picks(device, s, &picks)?;
            device.run(&model.head(picks.len() as u32, s))?;
            // The rows that tokens are drawn from, one behind the other.
            let ends: Vec<Row> = picks.iter().map(|pick| rows[*pick as usize]).collect();
            write_rows(device, s, &ends)?;
            device.run(&model.draw(picks.len() as u32, self.draws(&feeds), s))?;
        }
        self.submitted(feeds, places).map(Some)
    }

    /// Ask for what a step that was just submitted draws.
    fn submitted(&mut self, feeds: Vec<Feed>, places: Vec<usize>) -> Result<Submitted> {
        self.computed += feeds.iter().map(|feed| feed.count as u64).sum::<u64>();
        let (device, s, vocab) = (self.engine.device(), &self.state, self.engine.config().vocab_size);
        let rows = |wanted: &dyn Fn(&Feed) -> bool| {
            let places = feeds.iter().zip(&places).filter(|(feed, _)| wanted(feed));
            places.map(|(_, place)| place + 1).max().unwrap_or(0)
        };
        let later = |slice, bytes: usize| match bytes {
            0 => Ok(None),
            _ => device.read_later(Slice::head(slice, bytes as u64)).map(Some),
        };
        let drawn = later(s.drawn, rows(&|feed| feed.draws) * size_of::<Drawn>())?;
        let logits = later(s.logits, rows(&|feed| feed.logits) * vocab * 4)?;
        Ok(Submitted { feeds, places, drawn, logits })
    }

    /// Where a session stands among those that run, which are in the order of their ids.
    fn index(&self, id: u64) -> Option<usize> {
        self.running.binary_search_by_key(&id, |r| r.task.id).ok()
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        let running = self.running.drain(..).map(|r| r.task);
        running.chain(self.waiting.drain(..)).for_each(|mut task| task.outbox.end(&mut task.output, None));
    }
}

/// Those whose logits the host wants come first, so that they are read as one.
fn by_need(mut feeds: Vec<Feed>) -> Vec<Feed> {
    feeds.sort_by_key(|feed| !feed.logits);
    feeds
}

/// A hash of the bits of logits, for tests.
#[doc(hidden)]
pub fn hash(logits: &[f32]) -> u64 {
    hash_bytes(bytemuck::cast_slice(logits))
}
