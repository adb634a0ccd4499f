//! The rule at length: whatever random neighbours come and go, one prompt has one hash and every prompt its own; whoever
//! drafts, replies are those of plain decoding.
//!
//! Small on every run. A certificate has its counts from the environment, and runs on the GPU as it is, by itself:
//! `FOURFOLD_TEST_GENERATIONS=10000`, `FOURFOLD_TEST_NEEDLES=1000`, `FOURFOLD_TEST_PROMPTS=500`, of 64 tokens each, with
//! `FOURFOLD_TEST_MODEL` (a directory, or `synth:gpt-oss-20b`) and `FOURFOLD_TEST_DRAFT` (a directory).

use crate::drafts::{ALL, How};
use crate::harness::{Named, Random, cpu, gpu, matrix_gpu};
use crate::schedule::{Case, Changed, alone, greedy, hostile, knows, prompt, pulled, scheduler, told, warm};
use crate::{models, speculate};
use fourfold::device::Device;
use fourfold::speculate::{DraftModel, Drafts, PromptLookup};
use fourfold::{
    DeviceChoice, Engine, Finish, Part, ReplyOptions, Request, Sampling, SchedulerOptions, Speculation, hash,
};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// What is run, and how much of it.
struct Size {
    model: PathBuf,
    draft: PathBuf,
    count: usize,
    /// Of a reply.
    tokens: usize,
    /// Most in a step.
    sessions: usize,
    /// Of four who come, so many are subjects.
    share: usize,
    threads: usize,
}

/// The longest prompt of a neighbour. Past 128 positions attention has a second segment.
const LONGEST: usize = 150;

fn little(count: usize) -> Size {
    let [model, draft] = ["tiny", "loud"].map(models::fixture);
    Size { model, draft, count, tokens: 10, sessions: 8, share: 2, threads: 2 }
}

/// Where to run, and what: as the environment says, on the GPU as it is, or a little on all devices.
fn runs(variable: &str, count: usize) -> Vec<(Named, Size)> {
    let gpu = || matrix_gpu().or_else(gpu).map(|gpu| ("gpu", gpu));
    let Ok(wanted) = std::env::var(variable) else {
        return [("twins", cpu())].into_iter().chain(gpu()).map(|device| (device, little(count))).collect();
    };
    let count = wanted.parse().expect("a count");
    let named = |variable: &str, or: PathBuf| std::env::var_os(variable).map_or(or, Into::into);
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() / 4).clamp(1, 4);
    let Size { model, draft, .. } = little(count);
    let (model, draft) = (named("FOURFOLD_TEST_MODEL", model), named("FOURFOLD_TEST_DRAFT", draft));
    let size = Size { model, draft, count, tokens: 64, sessions: 64, share: 3, threads };
    vec![(gpu().expect("a certificate needs a GPU"), size)]
}

fn engine(dir: &Path, device: &Arc<dyn Device>) -> Engine {
    let builder = Engine::builder().checkpoint(dir).device(DeviceChoice::Own(device.clone()));
    builder.context(LONGEST + 70).chunk(64).build().unwrap()
}

/// What came of a crowd.
#[derive(Default)]
struct Tally {
    schedulers: usize,
    /// By the hash over all logits of all tokens: subjects that had it.
    hashes: BTreeMap<u64, usize>,
    /// Subjects that could be cancelled: what they told was compared, to their end or as far as they got.
    cut: usize,
    neighbours: usize,
    cancelled: usize,
    tokens: u64,
    drafted: usize,
    accepted: usize,
    wrong: Vec<String>,
}

impl Tally {
    fn subjects(&self) -> usize {
        self.hashes.values().sum()
    }

    fn add(&mut self, other: Self) {
        other.hashes.into_iter().for_each(|(hash, count)| *self.hashes.entry(hash).or_default() += count);
        self.schedulers += other.schedulers;
        self.cut += other.cut;
        self.neighbours += other.neighbours;
        self.cancelled += other.cancelled;
        self.tokens += other.tokens;
        self.drafted += other.drafted;
        self.accepted += other.accepted;
        self.wrong.extend(other.wrong);
    }

    fn print(&self, what: &str, engine: &Engine, started: Instant) {
        let (seconds, device) = (started.elapsed().as_secs_f64(), engine.device().describe());
        eprintln!(
            "{what} of {} on {device}: {} subjects, {} distinct hashes, {} wrong; {} schedulers, {} subjects cut short, \
             {} neighbours, {} cancels; {} of {} drafted tokens accepted; {} tokens in {seconds:.1} s",
            engine.name(),
            self.subjects(),
            self.hashes.len(),
            self.wrong.len(),
            self.schedulers,
            self.cut,
            self.neighbours,
            self.cancelled,
            self.accepted,
            self.drafted,
            self.tokens
        );
    }
}

/// The hash over all logits of all tokens.
fn digest(hashes: &[u64]) -> u64 {
    let words: Vec<f32> = hashes.iter().flat_map(|h| [*h as u32, (h >> 32) as u32]).map(f32::from_bits).collect();
    hash(&words)
}

/// Somebody in a crowd.
struct Guest<'c> {
    request: Request,
    /// What it should be told; of a neighbour nothing is known.
    case: Option<&'c Case>,
    /// It is left alone until its end, and counted.
    counts: bool,
}

/// `size.count` subjects, of `cases` in turn, in schedulers of random shape on several threads at once.
fn crowd(engine: &Engine, cases: &[Case], size: &Size) -> Tally {
    // Some twenty schedulers, unless a subject for each of their places makes more.
    let depth = (size.count / (20 * size.sessions.div_ceil(2))).clamp(1, 8);
    let (left, tally) = (Mutex::new((0, 0..size.count)), Mutex::new(Tally::default()));
    let work = || {
        loop {
            let (seed, options, mine) = {
                let (rounds, Range { start, end }) = &mut *left.lock().unwrap();
                if start == end {
                    break;
                }
                *rounds += 1;
                let options = shape(engine, &mut Random(*rounds), size.sessions);
                let mine = *start..(*end).min(*start + depth * options.sessions);
                *start = mine.end;
                (*rounds, options, mine)
            };
            let done = round(engine, cases, mine, &options, size, &mut Random(seed));
            tally.lock().unwrap().add(done);
        }
    };
    std::thread::scope(|scope| (0..size.threads).for_each(|_| drop(scope.spawn(work))));
    tally.into_inner().unwrap()
}

/// Tokens of all kinds.
fn ids(engine: &Engine, count: usize, random: &mut Random) -> Vec<u32> {
    let vocab = engine.config().vocab_size;
    (0..count).map(|_| random.below(vocab) as u32).collect()
}

/// What must not matter.
fn shape(engine: &Engine, random: &mut Random, most: usize) -> SchedulerOptions {
    let sessions = 1 + random.below(most);
    let page = [1, 5, 16, 33][random.below(4)];
    let whole = engine.context().div_ceil(page);
    SchedulerOptions {
        sessions,
        context: None,
        page,
        // All that sessions can take, or so little that they wait and prefixes make way.
        pages: (random.below(2) == 0).then(|| whole * (1 + sessions / 3)),
        chunk: Some(sessions * (1 + random.below(8)) + random.below(17)),
        share: random.below(3) > 0,
        drafts: random.below(2 * sessions + 1),
    }
}

/// One scheduler from first to last.
fn round(
    engine: &Engine,
    cases: &[Case],
    mut subjects: Range<usize>,
    options: &SchedulerOptions,
    size: &Size,
    random: &mut Random,
) -> Tally {
    let mut tally = Tally { schedulers: 1, ..Tally::default() };
    let mut scheduler = scheduler(engine, options);
    let (mut guests, mut most): (Vec<Guest<'_>>, usize) = (Vec::new(), options.sessions);
    loop {
        if random.below(16) == 0 {
            most = 1 + random.below(options.sessions * 3 / 2);
        }
        while !subjects.is_empty() && guests.len() < most {
            let case = &cases[subjects.start % cases.len()];
            let is_subject = random.below(4) < size.share;
            // Now and then one of the same prompt that does not get to its end.
            let counts = is_subject && random.below(8) > 0;
            let request = if is_subject {
                scheduler.add(&case.prompt, &case.options).unwrap()
            } else {
                let length = 1 + random.below(LONGEST);
                let others = ids(engine, 1 + random.below(length), random);
                let same = random.below(2) * random.below(case.prompt.len().min(others.len()));
                let text = [&case.prompt[..same], &others[same..]].concat();
                let count = 1 + random.below(size.tokens);
                let how = if random.below(8) == 0 { warm(count, random.next()) } else { greedy(count) };
                scheduler.add(&text, &how).unwrap()
            };
            let case = is_subject.then_some(case);
            scheduler.set_speculation(&request, drafter(case, random));
            subjects.start += usize::from(counts);
            tally.neighbours += usize::from(!is_subject);
            guests.push(Guest { request, case, counts });
        }
        if random.below(3) == 0
            && let Some(guest) = guests.get(random.below(most)).filter(|guest| !guest.counts)
        {
            guest.request.cancel();
            tally.cancelled += 1;
        }
        if random.below(8) == 0
            && let Some(guest) = guests.get(random.below(most))
        {
            scheduler.set_speculation(&guest.request, drafter(guest.case, random));
        }
        let goes_on = scheduler.step().unwrap();
        for guest in guests.extract_if(.., |guest| guest.request.finish().is_some()) {
            let drafts = guest.request.stats().drafts;
            tally.drafted += drafts.drafted();
            tally.accepted += drafts.accepted();
            let Some(case) = guest.case else { continue };
            tally.wrong.extend(told(case, &guest.request).err());
            if guest.counts {
                *tally.hashes.entry(digest(&guest.request.logit_hashes())).or_default() += 1;
            } else {
                tally.cut += 1;
            }
        }
        if random.below(256) == 0 || !goes_on {
            scheduler.check_pages().unwrap();
        }
        if !goes_on {
            // One that is left had an error, which comes behind its tokens.
            guests.iter().for_each(|guest| drop(pulled(&guest.request)));
            assert!(guests.is_empty(), "{} neither ended nor failed", guests.len());
            assert_eq!(scheduler.pages().map(|pages| pages.held), [0, 0]);
            if subjects.is_empty() {
                break;
            }
        }
    }
    tally.tokens = scheduler.computed_tokens();
    tally
}

/// Nobody, the text itself, or one who knows the reply and says anything.
fn drafter(case: Option<&Case>, random: &mut Random) -> Option<Speculation> {
    // 0: as many as pay.
    let count = random.below(16);
    match (random.below(4), case) {
        (0 | 1, _) => None,
        (2, Some(case)) => Some(hostile(case, random.next(), count)),
        _ => Some(Speculation::new(PromptLookup).with_count(1 + count / 2).unwrap()),
    }
}

/// What a prompt gives in a scheduler of its own.
fn digest_of(engine: &Engine, parts: &[Part<'_>], options: &ReplyOptions) -> u64 {
    let mut scheduler = scheduler(engine, &SchedulerOptions { sessions: 1, ..SchedulerOptions::default() });
    let request = scheduler.add_parts(parts, options).unwrap();
    while scheduler.step().unwrap() {}
    assert_eq!(request.finish(), Some(Finish::MaxTokens));
    digest(&request.logit_hashes())
}

#[test]
fn one_prompt_has_one_hash_amid_random_neighbours() {
    for ((where_, device), size) in runs("FOURFOLD_TEST_GENERATIONS", 24) {
        let engine = engine(&size.model, &device);
        let text = prompt(1, 122);
        let case = alone(&engine, text.clone(), greedy(size.tokens));
        let started = Instant::now();
        let tally = crowd(&engine, std::slice::from_ref(&case), &size);
        tally.print("generations", &engine, started);
        assert_eq!(tally.wrong, [""; 0], "on {where_}");
        assert_eq!(tally.hashes, BTreeMap::from([(digest(&case.hashes), size.count)]), "on {where_}");
        assert!(tally.neighbours > 0 && tally.cancelled > 0 && tally.accepted > 0 && tally.drafted > tally.accepted);
        // The same hash comes of the same, and another of one other token, or of one other role where those have other bits.
        let of = |parts: &[Part<'_>]| digest_of(&engine, parts, &case.options);
        assert_eq!(of(&[Part::Prompt(&text)]), digest(&case.hashes), "on {where_}");
        let mut other = text.clone();
        other[60] ^= 1;
        assert_ne!(of(&[Part::Prompt(&other)]), digest(&case.hashes), "the hash sees no other token on {where_}");
        if device.limits().matrix {
            let (given, drawn) = text.split_at(text.len() - 1);
            let role = of(&[Part::Prompt(given), Part::Drawn(drawn)]);
            assert_ne!(role, digest(&case.hashes), "the hash sees no other role on {where_}");
        }
    }
}

#[test]
fn needles_amid_random_neighbours_are_those_found_alone() {
    for ((where_, device), size) in runs("FOURFOLD_TEST_NEEDLES", 10) {
        let engine = engine(&size.model, &device);
        let started = Instant::now();
        let needle = |i: usize| {
            let text = ids(&engine, 1 + i * 13 % LONGEST, &mut Random(i as u64));
            alone(&engine, text, greedy(1 + i % size.tokens))
        };
        let cases = in_threads(size.threads, size.count, needle);
        let tally = crowd(&engine, &cases, &Size { share: 1, ..size });
        tally.print("needles", &engine, started);
        assert_eq!(tally.wrong, [""; 0], "on {where_}");
        let mut want = BTreeMap::new();
        cases.iter().for_each(|case| *want.entry(digest(&case.hashes)).or_insert(0) += 1);
        assert_eq!(tally.hashes, want, "on {where_}");
        assert_eq!(want.len(), size.count, "two needles are alike");
    }
}

#[test]
fn a_crowd_notices_pages_that_are_not_its_own() {
    let size = Size { threads: 1, ..little(12) };
    let case = alone(&engine(&size.model, &cpu()), prompt(1, 40), greedy(6));
    let crooked: Arc<dyn Device> = Arc::new(Changed { crooked: Some(Mutex::default()), ..Changed::new(&cpu()) });
    let tally = crowd(&engine(&size.model, &crooked), &[case], &size);
    assert!(!tally.wrong.is_empty() && tally.hashes.len() > 1, "{} hashes", tally.hashes.len());
}

/// `make` of each number below `count`, in order.
fn in_threads<T: Send>(threads: usize, count: usize, make: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let make = &make;
    let part = |thread: usize| move || (thread..count).step_by(threads).map(|i| (i, make(i))).collect::<Vec<_>>();
    let mut all: Vec<(usize, T)> = std::thread::scope(|scope| {
        let parts: Vec<_> = (0..threads).map(|thread| scope.spawn(part(thread))).collect();
        parts.into_iter().flat_map(|part| part.join().unwrap()).collect()
    });
    all.sort_by_key(|(i, _)| *i);
    all.into_iter().map(|(_, made)| made).collect()
}

/// Who drafts for all replies of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Who {
    Nobody,
    Knows(How),
    /// What is right, and what is wrong is kept.
    KeepsWrong,
    Lookup,
    /// Another model, by its likeliest tokens.
    Draft,
    /// Another model, which draws as the reply does.
    DraftDraws,
    /// The model itself, which draws as the reply does.
    Own,
}

/// Stories if the model reads, else numbers.
fn beginnings(engine: &Engine, count: usize) -> Vec<Vec<u32>> {
    let like = ["little", "brave", "clever", "lonely", "kind", "sleepy", "curious", "tiny"];
    let who = ["fox", "girl", "robot", "bear", "farmer", "dragon", "cat", "boy"];
    let what = ["lived by the sea", "found a key", "wanted to fly", "lost a shoe", "met a wizard", "had no friends"];
    let begin = |i: usize| match engine.tokenizer() {
        Ok(tokenizer) => {
            let (like, who, what) = (like[i % 8], who[i / 8 % 8], what[i / 64 % 6]);
            let again = ["Once upon a time", "Long ago"][i / 384 % 2];
            tokenizer.encode(&format!("{again} there was a {like} {who} who {what}.")).unwrap()
        }
        // With something that comes again.
        Err(_) => [prompt(i, 4 + i % 9), prompt(i + 1, 1 + i % 40), prompt(i, 4 + i % 9)].concat(),
    };
    (0..count).map(begin).collect()
}

/// What became of a run.
struct Run {
    who: Who,
    cases: Vec<Case>,
    drafts: Drafts,
    seconds: f64,
    wrong: Vec<String>,
}

/// Replies to all of `asked` by a scheduler of their own, compared with `plain` if there is one.
fn replies(engine: &Engine, draft: &Engine, asked: &[(Vec<u32>, ReplyOptions)], who: Who, plain: &[Case]) -> Run {
    let sessions = asked.len().min(32);
    let options = SchedulerOptions { sessions, drafts: 4 * sessions, ..SchedulerOptions::default() };
    let mut scheduler = scheduler(engine, &options);
    let started = Instant::now();
    let mut requests: Vec<Request> = Vec::new();
    loop {
        // No more than run at once: a model that drafts takes memory.
        while requests.len() < asked.len() && scheduler.running() + scheduler.waiting() < sessions {
            let i = requests.len();
            let (prompt, options) = &asked[i];
            let model = |by: &Engine| DraftModel::new(by, engine).unwrap();
            let speculation = match who {
                Who::Nobody => None,
                Who::Knows(how) => Some(knows(&plain[i], how, i as u64)),
                Who::KeepsWrong => Some(knows(&plain[i], How::Mixed, i as u64).keeping_wrong()),
                Who::Lookup => Some(Speculation::new(PromptLookup)),
                Who::Draft => Some(Speculation::new(model(draft))),
                Who::DraftDraws => Some(Speculation::new(model(draft).with_sampling(options.sampling.clone()))),
                Who::Own => Some(Speculation::new(model(engine).with_sampling(options.sampling.clone()))),
            };
            let request = scheduler.add(prompt, options).unwrap();
            scheduler.set_speculation(&request, speculation.map(|s| s.with_count(1 + i % 7).unwrap()));
            requests.push(request);
        }
        if !scheduler.step().unwrap() && requests.len() == asked.len() {
            break;
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    let mut drafts = Drafts::default();
    for d in requests.iter().map(|request| request.stats().drafts) {
        drafts.steps += d.steps;
        for (sum, n) in drafts.drafted.iter_mut().chain(&mut drafts.accepted).zip(d.drafted.iter().chain(&d.accepted)) {
            *sum += n;
        }
    }
    let wrong = plain.iter().zip(&requests).filter_map(|(case, request)| told(case, request).err()).collect();
    let case = |((prompt, options), request): (&(Vec<u32>, ReplyOptions), &Request)| {
        let tokens = pulled(request);
        Case {
            prompt: prompt.clone(),
            options: options.clone(),
            tokens: tokens.iter().map(|t| t.choice.id).collect(),
            second: tokens.iter().filter_map(|t| t.choice.top.get(1)).map(|top| top.0).collect(),
            logprobs: tokens.iter().map(|t| t.choice.logprob.to_bits()).collect(),
            hashes: request.logit_hashes(),
        }
    };
    Run { who, cases: asked.iter().zip(&requests).map(case).collect(), drafts, seconds, wrong }
}

#[test]
fn whoever_drafts_replies_are_those_of_plain_decoding() {
    for ((where_, device), size) in runs("FOURFOLD_TEST_PROMPTS", 6) {
        let [engine, draft] = [&size.model, &size.draft].map(|dir| engine(dir, &device));
        let texts = beginnings(&engine, size.count);
        let ask = |sampling: &Sampling| -> Vec<(Vec<u32>, ReplyOptions)> {
            let options = |stream| {
                let sampling = Sampling { stream, top_logprobs: 2, ..sampling.clone() };
                ReplyOptions { sampling, ..greedy(size.tokens) }
            };
            texts.iter().cloned().zip((0..).map(options)).collect()
        };
        for (what, sampling) in [
            ("greedy", Sampling::greedy()),
            ("at temperature 0.8", speculate::cool()),
            ("at temperature 0.8 with a penalty", speculate::warm()),
        ] {
            let mut asked = ask(&sampling);
            let mut plain = replies(&engine, &draft, &asked, Who::Nobody, &[]);
            if sampling.repetition_penalty == 1.0 {
                // The host read logits for the second likeliest; without them, tokens are drawn on the device.
                asked.iter_mut().for_each(|(_, options)| options.sampling.top_logprobs = 0);
                let on_device = replies(&engine, &draft, &asked, Who::Nobody, &[]);
                for (case, mut seen) in plain.cases.iter_mut().zip(on_device.cases) {
                    assert_eq!((&case.tokens, &case.hashes), (&seen.tokens, &seen.hashes), "on {where_}");
                    seen.second = std::mem::take(&mut case.second);
                    *case = seen;
                }
                plain.seconds = on_device.seconds;
            }
            assert!(
                plain.cases.iter().all(|case| case.second.len() == size.tokens && case.hashes.len() == size.tokens)
            );
            let draws = (what != "greedy").then_some(Who::DraftDraws);
            let who = [Who::Own, Who::Draft, Who::Lookup, Who::KeepsWrong].into_iter().chain(ALL.map(Who::Knows));
            let who: Vec<Who> = draws.into_iter().chain(who).collect();
            let run = |i: usize| replies(&engine, &draft, &asked, who[i], &plain.cases);
            let runs = in_threads(size.threads, who.len(), run);
            eprintln!(
                "{} prompts x {} tokens of {} on {}, {what}: {:.1} s without drafts (what follows shares the device, {} at once)",
                size.count,
                size.tokens,
                engine.name(),
                device.describe(),
                plain.seconds,
                size.threads
            );
            for run in &runs {
                let (d, what) = (&run.drafts, format!("{:?}, {what} on {where_}", run.who));
                eprintln!(
                    "  {:?}: {} replies differ; {} drafted, {} accepted ({:.1} %), {:.2} tokens a step, {:.1} s",
                    run.who,
                    run.wrong.len(),
                    d.drafted(),
                    d.accepted(),
                    100.0 * d.rate(),
                    d.tokens_per_step(),
                    run.seconds
                );
                if run.who == Who::KeepsWrong {
                    assert!(!run.wrong.is_empty(), "nothing was noticed, so the comparison is worth nothing: {what}");
                    continue;
                }
                assert_eq!(run.wrong, [""; 0], "{what}");
                match run.who {
                    Who::Own | Who::Knows(How::Right | How::OverLong) => {
                        assert!(d.drafted() > size.count * size.tokens / 3, "{what}: {d:?}");
                        assert_eq!(d.accepted(), d.drafted(), "{what}");
                    }
                    Who::Knows(How::Wrong) => assert!(d.accepted() == 0 && d.drafted() > 0, "{what}: {d:?}"),
                    Who::Knows(How::Empty) => assert_eq!(d.drafted(), 0, "{what}"),
                    Who::Knows(How::Illegal) => assert!(d.accepted() > 0 && d.drafted[1] == 0, "{what}: {d:?}"),
                    Who::Knows(How::Mixed) => assert!(d.accepted() > 0 && d.rate() < 1.0, "{what}: {d:?}"),
                    // What no model ever repeats, the text does not draft.
                    _ => assert!(d.drafted() > 0 || run.who == Who::Lookup, "{what}"),
                }
            }
        }
    }
}
