//! The scheduler: whoever comes, goes or stands beside it, a session gets the tokens and the bits of logits that it gets alone;
//! prefixes are computed once; what does not fit is refused or waits; pages come back.

use crate::drafts::{How, Knows, second};
use crate::harness::{Named, Random, cpu, gpu, gpus, small_binding_gpu};
use crate::models;
use fourfold::device::{Device, Later, Limits};
use fourfold::program::{BufferId, Program, Slice};
use fourfold::speculate::{DraftModel, Drafts, PromptLookup};
use fourfold::{
    Activations, DeviceChoice, Engine, Error, Finish, Part, ReplyOptions, Request, Result, Sampling, Scheduler,
    SchedulerOptions, Speculation, Token, Want, hash,
};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// With sliding layers (16 positions), and without.
fn fixtures() -> [PathBuf; 2] {
    [models::fixture("tiny"), crate::families::fixture("qwen3_moe/modelopt")]
}

fn tiny() -> PathBuf {
    models::fixture("tiny")
}

/// The twins, and the GPU as it is.
fn devices() -> Vec<Named> {
    [("twins", cpu())].into_iter().chain(gpus().iter().take(1).cloned()).collect()
}

pub fn engine(dir: &PathBuf, device: &Arc<dyn Device>, context: usize) -> Engine {
    let builder = Engine::builder().checkpoint(dir).device(DeviceChoice::Own(device.clone()));
    builder.context(context).chunk(16).build().unwrap()
}

pub fn prompt(seed: usize, n: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * 37 + seed * 101 + i * i) % 500) as u32).collect()
}

pub fn greedy(max_tokens: usize) -> ReplyOptions {
    let sampling = Sampling::greedy();
    ReplyOptions { sampling, max_tokens: Some(max_tokens), stop_tokens: Some(Vec::new()), ..ReplyOptions::default() }
}

/// With everything on that reads logits and history.
pub fn warm(max_tokens: usize, seed: u64) -> ReplyOptions {
    let sampling = Sampling {
        temperature: 0.9,
        repetition_penalty: 1.1,
        top_p: 0.95,
        top_logprobs: 2,
        seed,
        ..Sampling::default()
    };
    ReplyOptions { sampling, ..greedy(max_tokens) }
}

/// With filters that the device applies.
pub fn cool(max_tokens: usize, seed: u64) -> ReplyOptions {
    let sampling = Sampling { temperature: 0.9, top_k: 50, top_p: 0.95, min_p: 0.01, seed, ..Sampling::default() };
    ReplyOptions { sampling, ..greedy(max_tokens) }
}

/// A request, and all that should come of it.
#[derive(Clone)]
pub struct Case {
    pub prompt: Vec<u32>,
    pub options: ReplyOptions,
    pub tokens: Vec<u32>,
    /// The second likeliest in place of each.
    pub second: Vec<u32>,
    pub logprobs: Vec<u32>,
    pub hashes: Vec<u64>,
}

/// What a session of its own gives: the tokens of a reply, and the logits of feeding them one by one.
pub fn alone(engine: &Engine, prompt: Vec<u32>, options: ReplyOptions) -> Case {
    let mut session = engine.session().unwrap();
    let reply: Vec<Token> = session.reply(&prompt, &options).unwrap().map(Result::unwrap).collect();
    let tokens: Vec<u32> = reply.iter().map(|t| t.choice.id).collect();
    let mut fresh = engine.session().unwrap();
    let mut logits = vec![fresh.feed(&prompt, Want::Last).unwrap()];
    let fed = &tokens[..tokens.len() - 1];
    logits.extend(fed.iter().map(|token| fresh.feed_drawn(&[*token], Want::Last).unwrap()));
    let (hashes, second) = logits.iter().map(|logits| (hash(logits), second(logits))).unzip();
    Case { prompt, options, tokens, second, logprobs: logprobs(&reply), hashes }
}

pub fn logprobs(tokens: &[Token]) -> Vec<u32> {
    tokens.iter().map(|t| t.choice.logprob.to_bits()).collect()
}

/// All that a request has to give now.
pub fn pulled(request: &Request) -> Vec<Token> {
    std::iter::from_fn(|| request.pull().unwrap()).collect()
}

/// A request told this case's tokens and bits, or the first of them if it was cancelled.
pub fn told(case: &Case, request: &Request) -> Result<(), String> {
    let tokens = pulled(request);
    let ids: Vec<u32> = tokens.iter().map(|t| t.choice.id).collect();
    let whole = request.finish() != Some(Finish::Cancelled);
    let n = if whole { case.tokens.len() } else { ids.len() };
    if whole && tokens.last().and_then(|t| t.finish) != Some(Finish::MaxTokens) {
        return Err(format!("it ended by {:?}", request.finish()));
    }
    // Without the options that read logits, log-probabilities come from the device, there as here.
    let same =
        [ids == case.tokens[..n], logprobs(&tokens) == case.logprobs[..n], request.logit_hashes() == case.hashes[..n]];
    match same {
        [true, true, true] => Ok(()),
        _ => Err(format!("tokens, log-probabilities, logits alike: {same:?}; {ids:?}, and alone {:?}", case.tokens)),
    }
}

pub fn scheduler(engine: &Engine, options: &SchedulerOptions) -> Scheduler {
    let mut scheduler = engine.scheduler(options).unwrap();
    scheduler.hash_logits();
    scheduler
}

fn run(scheduler: &mut Scheduler) {
    while scheduler.step().unwrap() {
        scheduler.check_pages().unwrap();
    }
    assert_eq!(scheduler.pages().map(|pages| pages.held), [0, 0]);
}

fn add(scheduler: &mut Scheduler, case: &Case) -> Request {
    scheduler.add(&case.prompt, &case.options).unwrap()
}

/// Lengths on both sides of a window, of a chunk, and of the 128 keys that one segment of attention takes; two begin alike.
fn cases(engine: &Engine) -> Vec<Case> {
    let mut prompts: Vec<Vec<u32>> = [3, 126, 17, 260, 1].iter().enumerate().map(|(i, n)| prompt(i + 1, *n)).collect();
    prompts.push([&prompts[1][..100], &prompt(9, 7)].concat());
    let options = |i: usize| match i % 3 {
        0 => greedy(6 + i),
        1 => warm(7, i as u64),
        _ => cool(8, i as u64),
    };
    prompts.into_iter().enumerate().map(|(i, prompt)| alone(engine, prompt, options(i))).collect()
}

#[test]
fn a_session_gets_what_it_gets_alone() {
    for (where_, device) in devices() {
        for dir in fixtures() {
            let engine = engine(&dir, &device, 300);
            let cases = cases(&engine);
            let mut scheduler = scheduler(&engine, &SchedulerOptions::default());
            let requests: Vec<Request> = cases.iter().map(|case| add(&mut scheduler, case)).collect();
            run(&mut scheduler);
            for (i, (case, request)) in cases.iter().zip(&requests).enumerate() {
                assert!(request.is_over() || request.finish() == Some(Finish::MaxTokens));
                told(case, request).unwrap_or_else(|e| panic!("{i} of {} on {where_}: {e}", dir.display()));
                assert!(request.is_over());
            }
            // The comparison notices one wrong bit.
            let request = add(&mut scheduler, &cases[0]);
            run(&mut scheduler);
            let mut wrong = cases[0].clone();
            wrong.hashes[2] ^= 1;
            assert!(told(&wrong, &request).is_err());
        }
    }
}

#[test]
fn a_strict_engine_is_strict_here_too() {
    for (where_, device) in devices() {
        let build = |strict| {
            let builder = Engine::builder().checkpoint(tiny()).device(DeviceChoice::Own(device.clone()));
            builder.context(300).chunk(16).strict(strict).build().unwrap()
        };
        // Past 128 positions the roles differ on every device.
        let [loose, strict] = [false, true].map(|strict| alone(&build(strict), prompt(4, 200), greedy(5)));
        assert_ne!(loose.hashes, strict.hashes, "the roles do not differ on {where_}, so the test shows nothing");
        for (engine, case) in [(build(false), &loose), (build(true), &strict)] {
            let mut scheduler =
                scheduler(&engine, &SchedulerOptions { chunk: Some(24), ..SchedulerOptions::default() });
            let requests = [add(&mut scheduler, case), scheduler.add(&prompt(2, 31), &greedy(9)).unwrap()];
            run(&mut scheduler);
            told(case, &requests[0]).unwrap_or_else(|e| panic!("strict: {} on {where_}: {e}", engine.strict()));
        }
    }
}

/// A device that changes something of another one.
#[derive(Debug)]
pub struct Changed {
    pub device: Arc<dyn Device>,
    pub ahead: usize,
    /// Before it is used, the cache is filled with NaN.
    pub poisoned: bool,
    /// The page table of the layers that see everything, once it is there: what is written to it leads elsewhere.
    pub crooked: Option<Mutex<Option<BufferId>>>,
    /// Runs until one fails; 0: none does.
    pub fails_after: AtomicUsize,
}

impl Changed {
    pub fn new(device: &Arc<dyn Device>) -> Self {
        let fails_after = AtomicUsize::new(0);
        Self { device: device.clone(), ahead: 0, poisoned: false, crooked: None, fails_after }
    }
}

impl Device for Changed {
    fn alloc(&self, label: &str, bytes: u64) -> Result<BufferId> {
        let buffer = self.device.alloc(label, bytes)?;
        if self.poisoned && label.starts_with("KV cache") {
            self.device.write(Slice { buffer, offset: 0, bytes }, &vec![0xff; bytes as usize])?;
        }
        if let Some(table) = self.crooked.as_ref().filter(|_| label == "page table") {
            table.lock().unwrap().get_or_insert(buffer);
        }
        Ok(buffer)
    }
    fn free(&self, id: BufferId) {
        if let Some(table) = &self.crooked {
            table.lock().unwrap().take_if(|table| *table == id); // only asked whether there is room for it
        }
        self.device.free(id);
    }
    fn write(&self, to: Slice, bytes: &[u8]) -> Result<()> {
        if self.crooked.as_ref().is_some_and(|table| *table.lock().unwrap() == Some(to.buffer)) {
            // Pages 0 and 1 are the same.
            let entry = |entry: &[u8]| u32::from_le_bytes(entry.try_into().unwrap()).max(1).to_le_bytes();
            let bytes: Vec<u8> = bytes.chunks_exact(4).flat_map(entry).collect();
            return self.device.write(to, &bytes);
        }
        self.device.write(to, bytes)
    }
    fn read(&self, from: Slice, bytes: &mut [u8]) -> Result<()> {
        self.device.read(from, bytes)
    }
    fn read_later(&self, from: Slice) -> Result<Box<dyn Later>> {
        self.device.read_later(from)
    }
    fn ahead(&self) -> usize {
        self.ahead
    }
    fn prepare(&self, program: &Program) -> Result<()> {
        self.device.prepare(program)
    }
    fn run(&self, program: &Program) -> Result<()> {
        if self.fails_after.load(Ordering::Relaxed) > 0 && self.fails_after.fetch_sub(1, Ordering::Relaxed) == 1 {
            return Err(Error::Device("planted".to_owned()));
        }
        self.device.run(program)
    }
    fn wait(&self) -> Result<()> {
        self.device.wait()
    }
    fn limits(&self) -> Limits {
        self.device.limits()
    }
    fn describe(&self) -> String {
        self.device.describe()
    }
}

/// Requests that come at random steps, some of them cancelled at random. Says how many were cancelled, or what was wrong.
fn at_random(
    engine: &Engine,
    cases: &[Case],
    options: &SchedulerOptions,
    drafting: bool,
    seed: u64,
) -> Result<usize, String> {
    let (mut random, mut cancels) = (Random(seed), 0);
    let mut scheduler = scheduler(engine, options);
    let mut requests: Vec<(&Case, Request)> = Vec::new();
    let mut left = 2 * cases.len();
    loop {
        while left > 0 && random.below(3) > 0 {
            let case = &cases[random.below(cases.len())];
            let request = add(&mut scheduler, case);
            if drafting && random.below(2) == 0 {
                scheduler.set_speculation(&request, Some(hostile(case, seed, random.below(16))));
            }
            requests.push((case, request));
            left -= 1;
        }
        if random.below(4) == 0 && cancels < cases.len() && !requests.is_empty() {
            requests[random.below(requests.len())].1.cancel();
            cancels += 1;
        }
        let goes_on = scheduler.step().map_err(|e| e.to_string())?;
        scheduler.check_pages()?;
        if !goes_on && left == 0 {
            break;
        }
    }
    requests.iter().try_for_each(|(case, request)| told(case, request))?;
    assert_eq!(scheduler.pages().map(|pages| pages.held), [0, 0]);
    Ok(requests.iter().filter(|(_, request)| request.finish() == Some(Finish::Cancelled)).count())
}

#[test]
fn neighbours_chunks_pages_and_running_ahead_change_nothing() {
    for (where_, device) in devices() {
        // What is read was written by the session itself: anything else is NaN.
        let eager = Changed { ahead: 2, poisoned: true, ..Changed::new(&device) };
        let eager: Arc<dyn Device> = Arc::new(eager);
        for dir in fixtures() {
            let plain = engine(&dir, &device, 300);
            let ahead = engine(&dir, &eager, 300);
            let cases = cases(&plain);
            let greedy_cases: Vec<Case> = cases.iter().step_by(2).cloned().collect();
            let mut cancelled = 0;
            // The host runs ahead only where all are greedy, and nobody drafts.
            let groups = [(&plain, &cases, true), (&ahead, &cases, true), (&ahead, &greedy_cases, false)];
            let (rounds, groups): (&[(usize, usize, usize, bool)], _) = match where_ {
                "twins" => (&[(1, 5, 2, true), (16, 64, 5, true), (7, 1, 3, true), (16, 100, 4, false)], &groups[..]),
                _ => (&[(5, 33, 4, true)], &groups[1..]),
            };
            for (round, &(page, chunk, sessions, share)) in rounds.iter().enumerate() {
                // Room for the longest and little more, so that prefixes have to make way.
                let pages = Some(400usize.div_ceil(page));
                let drafts = [6, 16, 1, 0][round];
                let options =
                    SchedulerOptions { page, chunk: Some(chunk), sessions, pages, share, drafts, context: None };
                let seed = 7 + round as u64;
                for (engine, cases, drafting) in groups {
                    cancelled += at_random(engine, cases, &options, *drafting, seed)
                        .unwrap_or_else(|e| panic!("{options:?} of {} on {where_}: {e}", dir.display()));
                }
            }
            assert!(cancelled > 2, "{cancelled} were cancelled");
        }
    }
}

#[test]
fn the_host_runs_ahead_while_nobody_comes_or_goes() {
    let eager: Arc<dyn Device> = Arc::new(Changed { ahead: 2, ..Changed::new(&cpu()) });
    let engine = engine(&tiny(), &eager, 100);
    let case = alone(&engine, prompt(1, 20), greedy(9));
    let mut scheduler = scheduler(&engine, &SchedulerOptions::default());
    let requests = [add(&mut scheduler, &case), add(&mut scheduler, &case)];
    // The prompts; the second takes a page of the first's one step later.
    let mut computed = Vec::new();
    while scheduler.step().unwrap() {
        computed.push(scheduler.computed_tokens());
    }
    // 16 and 4 + 4 tokens of prompts, then two a step, two steps ahead, and never past the last.
    assert_eq!(computed, [16, 24, 30, 32, 34, 36, 38, 40, 40]);
    requests.iter().for_each(|request| told(&case, request).unwrap());
    // Not where somebody drafts; but while it rests, as it does for four tokens until it knows what they cost.
    for (count, want) in [(3, [20, 21, 22]), (0, [20, 23, 24])] {
        let mut scheduler =
            self::scheduler(&engine, &SchedulerOptions { chunk: Some(32), ..SchedulerOptions::default() });
        let request = add(&mut scheduler, &case);
        let nothing = knows(&case, How::Empty, 0);
        let nothing = if count == 0 { nothing } else { nothing.with_count(count).unwrap() };
        scheduler.set_speculation(&request, Some(nothing));
        let computed = [(); 3].map(|()| {
            scheduler.step().unwrap();
            scheduler.computed_tokens()
        });
        assert_eq!(computed, want);
        run(&mut scheduler);
        told(&case, &request).unwrap();
    }
}

pub fn knows(case: &Case, how: How, seed: u64) -> Speculation {
    let (reply, second) = (case.tokens.clone(), case.second.clone());
    Speculation::new(Knows { reply, second, how, random: Random(seed) })
}

/// Drafts up to `count` tokens a step, or (0) as many as it takes to be good.
pub fn hostile(case: &Case, seed: u64, count: usize) -> Speculation {
    let speculation = knows(case, How::Any, seed);
    if count == 0 { speculation } else { speculation.with_count(count).unwrap() }
}

#[test]
fn what_is_drafted_is_taken_back_unless_it_would_have_been_drawn() {
    for (where_, device) in devices() {
        for dir in fixtures() {
            let engine = engine(&dir, &device, 100);
            let cases = [alone(&engine, prompt(1, 14), greedy(20)), alone(&engine, prompt(2, 30), cool(20, 3))];
            for page in [4, 16] {
                let mut scheduler = scheduler(&engine, &SchedulerOptions { page, ..SchedulerOptions::default() });
                let requests: Vec<Request> = cases.iter().map(|case| add(&mut scheduler, case)).collect();
                for (i, (case, request)) in cases.iter().zip(&requests).enumerate() {
                    scheduler.set_speculation(request, Some(hostile(case, (page + i) as u64, 15)));
                }
                run(&mut scheduler);
                for (case, request) in cases.iter().zip(&requests) {
                    told(case, request)
                        .unwrap_or_else(|e| panic!("pages of {page}, {} on {where_}: {e}", dir.display()));
                    let d = request.stats().drafts;
                    assert!(d.accepted() > 0 && d.drafted() > d.accepted() && d.steps + d.accepted() < 20, "{d:?}");
                }
            }
            // The comparison notices a wrong token that is kept.
            let mut scheduler = scheduler(&engine, &SchedulerOptions::default());
            let request = add(&mut scheduler, &cases[0]);
            scheduler.set_speculation(
                &request,
                Some(knows(&cases[1], How::Right, 0).keeping_wrong().with_count(3).unwrap()),
            );
            run(&mut scheduler);
            assert!(told(&cases[0], &request).is_err(), "{} on {where_}", dir.display());
        }
    }
}

#[test]
fn sessions_that_draft_and_those_that_do_not_share_steps() {
    for (where_, device) in devices() {
        for dir in fixtures() {
            let engine = engine(&dir, &device, 120);
            let words = [prompt(3, 12), prompt(3, 12), prompt(3, 9)].concat();
            let cases = [
                alone(&engine, words.clone(), greedy(30)),
                alone(&engine, words, warm(30, 2)),
                alone(&engine, prompt(1, 14), cool(30, 9)),
                alone(&engine, prompt(2, 30), cool(24, 3)),
                alone(&engine, prompt(5, 40), greedy(20)),
                alone(&engine, prompt(6, 9), warm(20, 4)),
            ];
            for count in [Some(4), None] {
                let mut scheduler = scheduler(&engine, &SchedulerOptions { page: 4, ..SchedulerOptions::default() });
                let requests: Vec<Request> = cases.iter().map(|case| add(&mut scheduler, case)).collect();
                let own = |by: &Sampling| {
                    Speculation::new(DraftModel::new(&engine, &engine).unwrap().with_sampling(by.clone()))
                };
                // One draws as the session does, one does not.
                let owns = [own(&cases[2].options.sampling), own(&Sampling::greedy())];
                let lookup = || Speculation::new(PromptLookup);
                for (request, who) in requests.iter().zip([lookup(), lookup()].into_iter().chain(owns)) {
                    let who = if let Some(count) = count { who.with_count(count).unwrap() } else { who };
                    scheduler.set_speculation(request, Some(who));
                }
                run(&mut scheduler);
                for (i, (case, request)) in cases.iter().zip(&requests).enumerate() {
                    told(case, request).unwrap_or_else(|e| panic!("{i} of {} on {where_}: {e}", dir.display()));
                    let (n, d) = (request.stats().generated_tokens, request.stats().drafts);
                    assert!(d.steps + d.accepted() < n && (i < 4 || d == Drafts::default()), "{i} on {where_}: {d:?}");
                }
                let [drafted, accepted] = [Drafts::drafted, Drafts::accepted].map(|of| of(&requests[2].stats().drafts));
                assert_eq!(drafted, accepted, "a model drafts for itself on {where_}");
                assert!(accepted >= 20 || count.is_none(), "only {accepted} on {where_}");
            }
        }
    }
}

#[test]
fn those_who_draft_take_turns_and_leave_room() {
    let engine = engine(&tiny(), &cpu(), 100);
    let cases = [alone(&engine, prompt(1, 10), greedy(30)), alone(&engine, prompt(2, 12), greedy(30))];
    for (drafts, accepted) in [(0, 0..=0), (1, 9..=11), (2, 14..=15), (9, 23..=25)] {
        let options = SchedulerOptions { drafts, sessions: 2, chunk: Some(32), ..SchedulerOptions::default() };
        let mut scheduler = scheduler(&engine, &options);
        let requests: Vec<Request> = cases.iter().map(|case| add(&mut scheduler, case)).collect();
        for (case, request) in cases.iter().zip(&requests) {
            scheduler.set_speculation(request, Some(knows(case, How::Right, 0).with_count(15).unwrap()));
        }
        let mut before = 0;
        while scheduler.step().unwrap() {
            let prompts = if before == 0 { 22 } else { 0 };
            assert!(scheduler.computed_tokens() - before <= (2 + drafts + prompts) as u64);
            before = scheduler.computed_tokens();
        }
        for (case, request) in cases.iter().zip(&requests) {
            told(case, request).unwrap();
            let d = request.stats().drafts;
            assert!(accepted.contains(&d.accepted()) && d.rate() == f64::from(u8::from(drafts > 0)), "{drafts}: {d:?}");
        }
    }
    // One whose drafter fails ends, and the other goes on.
    let mut scheduler = scheduler(&engine, &SchedulerOptions::default());
    let requests: Vec<Request> = cases.iter().map(|case| add(&mut scheduler, case)).collect();
    scheduler.set_speculation(&requests[0], Some(knows(&cases[0], How::Fails, 0).with_count(2).unwrap()));
    run(&mut scheduler);
    assert_eq!(requests[0].pull().unwrap().unwrap().choice.id, cases[0].tokens[0]);
    assert!(requests[0].pull().unwrap_err().to_string().contains("told to fail"));
    told(&cases[1], &requests[1]).unwrap();
}

#[test]
fn a_wrong_page_table_is_noticed() {
    let engine_of = |device: Changed| {
        let device: Arc<dyn Device> = Arc::new(device);
        engine(&tiny(), &device, 300)
    };
    let plain = engine_of(Changed::new(&cpu()));
    let cases = cases(&plain);
    let options = SchedulerOptions { page: 8, ..SchedulerOptions::default() };
    assert!(at_random(&plain, &cases, &options, false, 3).is_ok());
    let crooked = engine_of(Changed { crooked: Some(Mutex::default()), ..Changed::new(&cpu()) });
    let error = at_random(&crooked, &cases, &options, false, 3).expect_err("two pages were the same");
    assert!(error.contains("alone"), "{error}");
}

#[test]
fn a_prefix_is_computed_once() {
    for (where_, device) in devices() {
        for dir in fixtures() {
            let engine = engine(&dir, &device, 300);
            let stem = prompt(1, 100);
            let prompts = [(2, 5), (3, 40), (4, 1)].map(|(seed, n)| [&stem[..], &prompt(seed, n)].concat());
            let cases = prompts.map(|prompt| alone(&engine, prompt, greedy(4)));
            let mut computed = Vec::new();
            for share in [false, true] {
                let mut scheduler = scheduler(&engine, &SchedulerOptions { share, ..SchedulerOptions::default() });
                // At once, and a last one when the others have gone.
                let requests: Vec<Request> = cases[..2].iter().map(|case| add(&mut scheduler, case)).collect();
                run(&mut scheduler);
                let last = add(&mut scheduler, &cases[2]);
                run(&mut scheduler);
                for (case, request) in cases.iter().zip(requests.iter().chain([&last])) {
                    told(case, request).unwrap_or_else(|e| panic!("share {share}, {} on {where_}: {e}", dir.display()));
                }
                computed.push(scheduler.computed_tokens());
                assert_eq!(last.stats().cached_tokens, if share { 96 } else { 0 });
            }
            // Six pages of the stem are whole; the second and the third have them of the first.
            assert_eq!(computed, [105 + 140 + 101 + 9, 105 + 140 + 101 + 9 - 2 * 96], "{} on {where_}", dir.display());
        }
    }
}

#[test]
fn a_drawn_token_is_not_a_given_one() {
    for (where_, device) in devices() {
        let engine = engine(&tiny(), &device, 300);
        let (before, after) = (prompt(1, 20), prompt(2, 30));
        let first = alone(&engine, before.clone(), greedy(45));
        // In a session, what was drawn stays drawn.
        let mut session = engine.session().unwrap();
        session.feed(&before, Want::Nothing).unwrap();
        session.feed_drawn(&first.tokens, Want::Nothing).unwrap();
        let want = hash(&session.feed(&after, Want::Last).unwrap());
        let parts = [Part::Prompt(&before), Part::Drawn(&first.tokens), Part::Prompt(&after)];
        let all = [&before[..], &first.tokens, &after].concat();
        for (share, chunk) in [(false, 16), (true, 16), (true, 3)] {
            let options = SchedulerOptions { share, chunk: Some(chunk), sessions: 2, ..SchedulerOptions::default() };
            let mut scheduler = scheduler(&engine, &options);
            let request = add(&mut scheduler, &first);
            run(&mut scheduler);
            told(&first, &request).unwrap();
            // Four pages are whole of 64 that were computed: the last token drawn was not.
            let given = scheduler.add(&all, &greedy(1)).unwrap();
            run(&mut scheduler);
            assert_eq!(given.stats().cached_tokens, if share { 16 } else { 0 });
            let drawn = scheduler.add_parts(&parts, &greedy(1)).unwrap();
            run(&mut scheduler);
            assert_eq!(drawn.stats().cached_tokens, if share { 64 } else { 0 });
            assert_eq!(drawn.logit_hashes(), [want], "share {share}, chunk {chunk} on {where_}");
        }
    }
}

#[test]
fn where_windows_have_passed_a_prefix_is_computed_from_the_last_point_that_has_them() {
    let device = cpu();
    let engine = engine(&tiny(), &device, 300);
    let long = prompt(1, 280);
    let first = alone(&engine, long.clone(), greedy(2));
    let early = alone(&engine, [&long[..100], &prompt(2, 9)].concat(), greedy(2));
    let late = alone(&engine, [&long[..270], &prompt(3, 9)].concat(), greedy(2));
    let options = SchedulerOptions { sessions: 1, pages: Some(60), drafts: 0, ..SchedulerOptions::default() };
    let mut scheduler = scheduler(&engine, &options);
    // One session takes four pages of the sliding pool, a step two more: eight and two are there.
    let total = |pages: fourfold::Pages| pages.free + pages.held + pages.kept;
    assert_eq!(scheduler.pages().map(total), [60, 10]);
    for (case, cached) in [(&first, 0), (&late, 256), (&early, 0), (&early, 96)] {
        let request = add(&mut scheduler, case);
        run(&mut scheduler);
        told(case, &request).unwrap();
        assert_eq!(request.stats().cached_tokens, cached);
    }
    // Of what is the same, everything stands there once.
    assert_eq!(scheduler.pages()[0].kept, 281 / 16 + 1);
}

#[test]
fn what_does_not_fit_now_waits_in_order_and_what_never_fits_is_refused() {
    let device = cpu();
    let engine = engine(&tiny(), &device, 200);
    let options = SchedulerOptions { sessions: 3, pages: Some(8), share: false, ..SchedulerOptions::default() };
    let mut scheduler = scheduler(&engine, &options);
    // 40 + 9 - 1 positions are three pages; four would be twelve.
    let cases: Vec<Case> = (0..4).map(|i| alone(&engine, prompt(i, 40), greedy(9))).collect();
    let requests: Vec<Request> = cases.iter().map(|case| add(&mut scheduler, case)).collect();
    let small = alone(&engine, prompt(8, 3), greedy(2));
    let last = add(&mut scheduler, &small);
    scheduler.step().unwrap();
    // A place and two pages are left, and the small one would fit: but it came later.
    assert_eq!((scheduler.running(), scheduler.waiting()), (2, 3));
    assert!(pulled(&requests[2]).is_empty() && pulled(&last).is_empty());
    while requests[0].finish().is_none() {
        scheduler.step().unwrap();
    }
    scheduler.step().unwrap();
    assert!(scheduler.running() > 0 && last.finish().is_none());
    run(&mut scheduler);
    for (case, request) in cases.iter().chain([&small]).zip(requests.iter().chain([&last])) {
        told(case, request).unwrap();
    }
    let says = |e: Error, words: &[&str]| {
        for word in words {
            assert!(e.to_string().contains(word), "{e} does not say {word}");
        }
    };
    // 130 + 10 - 1 positions.
    says(
        scheduler.add(&prompt(1, 130), &greedy(10)).unwrap_err(),
        &["pages:", "9 pages of 16", "has 8", "max_tokens 10"],
    );
    let long = scheduler.add(&prompt(1, 150), &greedy(52)).unwrap_err();
    assert!(matches!(long, Error::ContextFull { context: 200, tokens: 201, .. }), "{long}");
    // Without a limit, all that the context holds.
    let limitless = ReplyOptions { max_tokens: None, ..greedy(0) };
    says(scheduler.add(&prompt(1, 5), &limitless).unwrap_err(), &["pages:", "13 pages of 16", "max_tokens 196"]);
    says(scheduler.add(&[], &greedy(1)).unwrap_err(), &["prompt", "empty"]);
    says(scheduler.add(&[1, 512], &greedy(1)).unwrap_err(), &["512 is not a token"]);
    let hot = ReplyOptions { sampling: Sampling { temperature: -1.0, ..Sampling::default() }, ..greedy(1) };
    says(scheduler.add(&[1], &hot).unwrap_err(), &["temperature"]);
    assert_eq!(scheduler.waiting() + scheduler.running(), 0);
    // As many as fit to the very end of the context.
    let mut wide = self::scheduler(&engine, &SchedulerOptions { sessions: 1, ..SchedulerOptions::default() });
    let request = wide.add(&prompt(1, 150), &limitless).unwrap();
    run(&mut wide);
    assert_eq!((pulled(&request).len(), request.finish()), (51, Some(Finish::MaxTokens)));
    let none = wide.add(&prompt(1, 5), &greedy(0)).unwrap();
    assert!(none.is_over() && none.finish() == Some(Finish::MaxTokens));
}

#[test]
fn what_cannot_work_is_an_error_that_names_it() {
    let device = cpu();
    let tiny = engine(&tiny(), &device, 20);
    let fails = |options: SchedulerOptions, words: &[&str]| {
        let e = tiny.scheduler(&options).unwrap_err();
        for word in words {
            assert!(e.to_string().contains(word), "{e} does not say {word}");
        }
    };
    let with = SchedulerOptions::default;
    fails(SchedulerOptions { sessions: 0, ..with() }, &["sessions", "1 to 1024"]);
    fails(SchedulerOptions { sessions: 1025, ..with() }, &["sessions", "1025"]);
    fails(SchedulerOptions { page: 0, ..with() }, &["page", "1 to 1024"]);
    fails(SchedulerOptions { pages: Some(0), ..with() }, &["pages", "0"]);
    fails(SchedulerOptions { context: Some(21), ..with() }, &["context", "21", "1 to 20"]);
    fails(SchedulerOptions { chunk: Some(0), ..with() }, &["chunk", "1 to 2048"]);
    fails(SchedulerOptions { chunk: Some(usize::MAX), ..with() }, &["chunk", "1 to 2048"]);
    fails(SchedulerOptions { drafts: 1025, ..with() }, &["drafts", "0 to 1024"]);
    let quantised = Engine::builder().checkpoint(&fixtures()[1]).device(DeviceChoice::Cpu).context(20);
    let quantised = quantised.activations(Activations::Nvfp4Dynamic).build().unwrap();
    let e = quantised.scheduler(&with()).unwrap_err();
    assert!(e.to_string().contains("nvfp4-token"), "{e}");
}

#[test]
fn a_cache_is_no_larger_than_what_is_bound() {
    let limits = Limits { max_binding_bytes: 1 << 17, ..cpu().limits() };
    let device: Arc<dyn Device> = Arc::new(fourfold::device::cpu::Cpu::with_limits(limits));
    let builder = || Engine::builder().checkpoint(tiny()).device(DeviceChoice::Own(device.clone())).chunk(16);
    let engine = builder().context(200).build().unwrap();
    let config = engine.config();
    // A binding for each key/value head.
    let page_bytes = config.head_dim * 4 * 16;
    let fit = (1 << 17) / page_bytes;
    let options = SchedulerOptions { pages: Some(1 << 40), sessions: 4, ..SchedulerOptions::default() };
    let scheduler = engine.scheduler(&options).unwrap();
    assert_eq!(scheduler.pages()[0].free, fit);
    let large = SchedulerOptions { page: 1024, ..options };
    let e = engine.scheduler(&large).unwrap_err().to_string();
    for word in ["page:", "binds 1 pages of a layer", "smaller page"] {
        assert!(e.contains(word), "{e} does not say {word}");
    }
    // 21 pages of 48 positions are bound, and 1023 positions take one more.
    let engine = builder().context(1024).build().unwrap();
    let mut scheduler = engine.scheduler(&SchedulerOptions { page: 48, sessions: 1, ..options }).unwrap();
    let e = scheduler.add(&prompt(1, 1000), &greedy(24)).unwrap_err().to_string();
    for word in ["pages:", "22 pages of 48", "has 21, as many as the device binds", "bf16"] {
        assert!(e.contains(word), "{e} does not say {word}");
    }
}

#[test]
fn a_pool_that_no_binding_holds_changes_nothing() {
    // q, k and v stay whole, so that a step of one row is fused, but for the rotation.
    let binds = 100_000;
    let limits = Limits { max_binding_bytes: binds, max_storage_buffers: 8, ..cpu().limits() };
    let small: Arc<dyn Device> = Arc::new(fourfold::device::cpu::Cpu::with_limits(limits));
    let on_gpu = gpu().zip(small_binding_gpu(binds)).map(|(gpu, small)| ("gpu", gpu, small));
    for (where_, device, small) in [("twins", cpu(), small)].into_iter().chain(on_gpu) {
        for dir in fixtures() {
            let unlimited = engine(&dir, &device, 300);
            let cases: Vec<Case> = (0..5)
                .map(|i| alone(&unlimited, prompt(i, 110 + 3 * i), if i == 2 { warm(24, 7) } else { greedy(24) }))
                .collect();
            let small: Arc<dyn Device> = Arc::new(Changed { poisoned: true, ahead: 1, ..Changed::new(&small) });
            let engine = engine(&dir, &small, 300);
            let mut scheduler =
                scheduler(&engine, &SchedulerOptions { chunk: Some(32), ..SchedulerOptions::default() });
            let requests: Vec<Request> = cases.iter().map(|case| add(&mut scheduler, case)).collect();
            let mut held = 0;
            while scheduler.step().unwrap() {
                scheduler.check_pages().unwrap();
                held = held.max(scheduler.pages()[0].held);
            }
            let config = engine.config();
            let fit = binds as usize / (config.num_key_value_heads * config.head_dim * 4 * 16);
            assert!(held > fit, "{held} pages were held, and a binding holds {fit}: the test shows nothing");
            for (i, (case, request)) in cases.iter().zip(&requests).enumerate() {
                told(case, request).unwrap_or_else(|e| panic!("{i} of {} on {where_}: {e}", dir.display()));
            }
        }
    }
}

#[test]
fn cancels_at_random_leave_no_page_behind() {
    // FOURFOLD_TEST_CANCELS=20000 makes a soak of it: 64 sessions on the GPU. Nothing else should run in the process then.
    let Ok(count) = std::env::var("FOURFOLD_TEST_CANCELS") else {
        return devices().iter().for_each(|(_, device)| _ = cancels_at_random(device, 8, 300));
    };
    let [before, after] = cancels_at_random(&gpu().expect("a soak wants a GPU"), 64, count.parse().unwrap());
    eprintln!("{count} cancels; MiB resident after a quarter of them: {before:?}, at the end: {after:?}");
    assert!(after.zip(before).is_none_or(|(after, before)| after < before + 16));
}

/// MiB of the process in memory after a quarter of the cancels, when everything has been compiled and used, and at the end.
fn cancels_at_random(device: &Arc<dyn Device>, sessions: usize, wanted: usize) -> [Option<usize>; 2] {
    let device: Arc<dyn Device> = Arc::new(Changed { ahead: 2, ..Changed::new(device) });
    let engine = engine(&tiny(), &device, 100);
    let pages = Some(15 * sessions);
    let options = SchedulerOptions { sessions, page: 4, pages, chunk: Some(24), ..Default::default() };
    let mut scheduler = engine.scheduler(&options).unwrap();
    let total = |pages: fourfold::Pages| pages.free + pages.held + pages.kept;
    let all = scheduler.pages().map(total);
    let (mut random, mut requests, mut cancels, mut settled) = (Random(5), Vec::new(), 0, None);
    while cancels < wanted {
        while requests.len() < sessions * 3 / 2 {
            let prompt = [&prompt(1, random.below(40))[..], &prompt(random.below(3), 1 + random.below(20))].concat();
            let options = match random.below(4) {
                0 => warm(30, 1),
                1 => cool(30, 2),
                _ => greedy(1 + random.below(30)),
            };
            requests.push(scheduler.add(&prompt, &options).unwrap());
            let lookup = Speculation::new(PromptLookup).with_count(1 + random.below(9)).unwrap();
            scheduler.set_speculation(&requests[requests.len() - 1], Some(lookup).filter(|_| random.below(3) > 0));
        }
        scheduler.step().unwrap();
        for _ in 0..random.below(sessions / 2) {
            let request = requests.swap_remove(random.below(requests.len()));
            cancels += usize::from(request.finish().is_none());
            match random.below(2) {
                0 => drop(request),
                _ => {
                    let handle = request.cancel_handle();
                    std::thread::spawn(move || handle.cancel()).join().unwrap();
                }
            }
        }
        requests.retain(|request| request.finish().is_none());
        scheduler.check_pages().unwrap();
        assert_eq!(scheduler.pages().map(total), all);
        settled = settled.or_else(|| (cancels > wanted / 4).then(resident).flatten());
    }
    drop(requests);
    assert!(!scheduler.step().unwrap());
    assert_eq!(scheduler.pages().map(|pages| pages.held), [0, 0]);
    assert_eq!(scheduler.pages().map(total), all);
    [settled, resident()]
}

/// MiB of this process in memory, where Linux tells.
fn resident() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse::<usize>().ok().map(|kib| kib / 1024)
}

#[test]
fn a_device_that_fails_leaves_sessions_as_they_were() {
    for (where_, device) in devices() {
        let failing = Arc::new(Changed { ahead: 2, ..Changed::new(&device) });
        let shared: Arc<dyn Device> = failing.clone();
        let engine = engine(&tiny(), &shared, 300);
        let cases = cases(&engine);
        let mut random = Random(11);
        let mut scheduler = scheduler(&engine, &SchedulerOptions { sessions: 4, ..SchedulerOptions::default() });
        let requests: Vec<Request> = cases.iter().map(|case| add(&mut scheduler, case)).collect();
        for (i, (case, request)) in cases.iter().zip(&requests).enumerate().skip(2) {
            scheduler.set_speculation(request, Some(hostile(case, i as u64, 4)));
        }
        let mut failed = 0;
        loop {
            failing.fails_after.store(1 + random.below(6), Ordering::Relaxed);
            match scheduler.step() {
                Ok(true) => {}
                Ok(false) => break,
                Err(e) => {
                    assert!(e.to_string().contains("planted"), "{e}");
                    failed += 1;
                }
            }
            scheduler.check_pages().unwrap();
        }
        assert!(failed > 3, "it failed {failed} times");
        for (case, request) in cases.iter().zip(&requests) {
            told(case, request).unwrap_or_else(|e| panic!("on {where_}: {e}"));
        }
        assert_eq!(scheduler.pages().map(|pages| pages.held), [0, 0]);
        // Whoever waits for a scheduler that is gone is told.
        let request = scheduler.add(&[1], &greedy(3)).unwrap();
        drop(scheduler);
        assert_eq!((request.is_over(), request.finish()), (true, Some(Finish::Cancelled)));
    }
}

#[test]
fn a_step_that_fails_takes_back_what_was_proposed() {
    for (where_, device) in devices() {
        let failing = Arc::new(Changed::new(&device));
        let shared: Arc<dyn Device> = failing.clone();
        let engine = engine(&tiny(), &shared, 100);
        let options = |i: usize| if i == 2 { cool(20, 5) } else { greedy(20) };
        let [first, second, third] = [1, 2, 3].map(|i| alone(&engine, prompt(i, 9 + i), options(i)));
        // Over the drawn tokens and the proposals, or behind that, over a prompt.
        for run_that_fails in [1, 2] {
            let options = SchedulerOptions { sessions: 3, drafts: 3, page: 1, chunk: Some(32), ..Default::default() };
            let mut scheduler = scheduler(&engine, &options);
            let mut requests = vec![add(&mut scheduler, &first), add(&mut scheduler, &second)];
            let right = |case: &Case| Some(knows(case, How::Right, 0).with_count(3).unwrap());
            scheduler.set_speculation(&requests[0], right(&first));
            (0..2).for_each(|_| assert!(scheduler.step().unwrap()));
            let held = scheduler.pages().map(|pages| pages.held);
            requests.extend((run_that_fails == 2).then(|| add(&mut scheduler, &third)));
            failing.fails_after.store(run_that_fails, Ordering::Relaxed);
            assert!(scheduler.step().unwrap_err().to_string().contains("planted"));
            assert_eq!(scheduler.pages().map(|pages| pages.held), held, "pages were kept on {where_}");
            // Another takes its share of the three; with those of the step that failed there would be more.
            scheduler.set_speculation(&requests[1], right(&second));
            let before = scheduler.computed_tokens();
            assert!(scheduler.step().unwrap());
            let prompts = if run_that_fails == 2 { third.prompt.len() } else { 0 };
            assert_eq!(scheduler.computed_tokens() - before, (2 + 3 + prompts) as u64, "on {where_}");
            run(&mut scheduler);
            for (case, request) in [&first, &second, &third].into_iter().zip(&requests) {
                told(case, request).unwrap_or_else(|e| panic!("run {run_that_fails} failed on {where_}: {e}"));
            }
        }
    }
}

#[test]
fn text_and_ends_are_those_of_a_reply() {
    let engine = Engine::builder().default_draft().device(DeviceChoice::Cpu).context(64).build().unwrap();
    let prompt = engine.tokenizer().unwrap().encode("Once upon a time").unwrap();
    let text = |tokens: &[Token]| tokens.iter().map(|t| t.text.clone()).collect::<String>();
    let mut session = engine.session().unwrap();
    let plain: Vec<Token> = session.reply(&prompt, &greedy(12)).unwrap().map(Result::unwrap).collect();
    let whole = text(&plain);
    let middle: String = whole.chars().skip(8).take(3).collect();
    let enders = [
        greedy(12),
        ReplyOptions { stop: vec![middle], ..greedy(12) },
        ReplyOptions { stop_tokens: Some(vec![plain[6].choice.id]), ..greedy(12) },
    ];
    let mut scheduler = engine.scheduler(&SchedulerOptions { sessions: 2, ..SchedulerOptions::default() }).unwrap();
    let mut ends = Vec::new();
    let requests: Vec<Request> = enders.iter().map(|options| scheduler.add(&prompt, options).unwrap()).collect();
    run(&mut scheduler);
    for (options, request) in enders.iter().zip(&requests) {
        let reply: Vec<Token> = session.reply(&prompt, options).unwrap().map(Result::unwrap).collect();
        let got = pulled(request);
        assert_eq!(text(&got), text(&reply));
        assert_eq!(got.last().unwrap().finish, reply.last().unwrap().finish);
        assert_eq!(request.stats().generated_tokens, reply.len());
        ends.extend(request.finish());
    }
    assert_eq!(ends, [Finish::MaxTokens, Finish::StopString, Finish::StopToken]);
}

#[test]
fn a_session_whose_logits_are_no_numbers_ends_and_the_others_go_on() {
    /// The twins, and NaN in the first row of all logits that are drawn from while it is on.
    #[derive(Debug)]
    struct Broken(Changed, AtomicBool);
    impl Device for Broken {
        fn alloc(&self, label: &str, bytes: u64) -> Result<BufferId> {
            self.0.alloc(label, bytes)
        }
        fn free(&self, id: BufferId) {
            self.0.free(id);
        }
        fn write(&self, to: Slice, bytes: &[u8]) -> Result<()> {
            self.0.write(to, bytes)
        }
        fn read(&self, from: Slice, bytes: &mut [u8]) -> Result<()> {
            self.0.read(from, bytes)
        }
        fn prepare(&self, program: &Program) -> Result<()> {
            self.0.prepare(program)
        }
        fn run(&self, program: &Program) -> Result<()> {
            self.0.run(program)?;
            let drawn = program.launches.iter().flat_map(|launch| &launch.args).find(|arg| arg.name == "drawn");
            match drawn.filter(|_| self.1.load(Ordering::Relaxed)) {
                Some(drawn) => self.0.write(drawn.slice.head(16), &[0xff; 16]),
                None => Ok(()),
            }
        }
        fn wait(&self) -> Result<()> {
            self.0.wait()
        }
        fn limits(&self) -> Limits {
            self.0.limits()
        }
        fn describe(&self) -> String {
            self.0.describe()
        }
    }
    let broken = Arc::new(Broken(Changed::new(&cpu()), AtomicBool::new(false)));
    let shared: Arc<dyn Device> = broken.clone();
    let engine = engine(&tiny(), &shared, 100);
    let cases: Vec<Case> = (0..2).map(|i| alone(&engine, prompt(i, 10), greedy(6))).collect();
    let mut scheduler = engine.scheduler(&SchedulerOptions::default()).unwrap();
    let requests: Vec<Request> = cases.iter().map(|case| add(&mut scheduler, case)).collect();
    (0..3).for_each(|_| assert!(scheduler.step().unwrap()));
    broken.1.store(true, Ordering::Relaxed);
    assert!(scheduler.step().unwrap());
    broken.1.store(false, Ordering::Relaxed);
    run(&mut scheduler);
    let mut ids = Vec::new();
    let error = loop {
        match requests[0].pull() {
            Ok(Some(token)) => ids.push(token.choice.id),
            Ok(None) => panic!("it said nothing of its error"),
            Err(e) => break e,
        }
    };
    assert!(error.to_string().contains("NaN"), "{error}");
    assert_eq!(ids, cases[0].tokens[..3]);
    assert!(requests[0].is_over() && requests[0].finish().is_none());
    let ids: Vec<u32> = pulled(&requests[1]).iter().map(|t| t.choice.id).collect();
    assert_eq!(ids, cases[1].tokens);
}
