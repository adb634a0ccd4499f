//! Speculative decoding: whatever is drafted, tokens, bits of logits and the session afterwards are those of plain decoding.

use crate::drafts::{ALL, How, Knows, second};
use crate::harness::{Named, Random, cpu, gpus};
use crate::models::fixture;
use fourfold::sampler::sample;
use fourfold::speculate::{DraftModel, PromptLookup};
use fourfold::tokenizer::TokenId;
use fourfold::{Activations, DeviceChoice, Engine, Finish, ReplyOptions, Sampling, Session, Speculation, Stats, Want};
use std::sync::Arc;

/// The twins, and the GPU as it is.
fn devices() -> Vec<Named> {
    [("twins", cpu())].into_iter().chain(gpus().iter().take(1).cloned()).collect()
}

/// The window of `tiny` is 16, that of `odd` 13: with chunks of 16, sliding layers hold 48 positions.
fn engine(name: &str, device: &Arc<dyn fourfold::device::Device>, context: usize, chunk: usize) -> Engine {
    let builder = Engine::builder().checkpoint(fixture(name)).device(DeviceChoice::Own(device.clone()));
    builder.context(context).chunk(chunk).build().unwrap()
}

fn prompt(seed: usize, n: usize) -> Vec<TokenId> {
    (0..n).map(|i| ((i * 37 + seed * 101 + i * i) % 500) as TokenId).collect()
}

fn options(max_tokens: usize, sampling: Sampling) -> ReplyOptions {
    ReplyOptions { sampling, max_tokens: Some(max_tokens), stop_tokens: Some(Vec::new()), ..ReplyOptions::default() }
}

/// Everything that can be on.
pub fn warm() -> Sampling {
    Sampling {
        temperature: 0.8,
        top_k: 60,
        top_p: 0.95,
        min_p: 0.01,
        repetition_penalty: 1.2,
        seed: 5,
        ..Sampling::default()
    }
}

/// Everything that the device draws by.
pub fn cool() -> Sampling {
    Sampling { repetition_penalty: 1.0, ..warm() }
}

/// All that a reply shows and leaves.
#[derive(Debug, Default, PartialEq)]
struct Told {
    ids: Vec<TokenId>,
    logprobs: Vec<u32>,
    text: String,
    finish: Option<Finish>,
    error: Option<String>,
    /// Bits of all logits, token by token.
    logits: Vec<Vec<u32>>,
    /// What the session holds in the end.
    held: Vec<TokenId>,
    /// Bits of logits of tokens fed after it.
    after: Vec<u32>,
}

impl Told {
    /// Where another reply differs.
    fn difference(&self, other: &Self) -> Option<String> {
        let same = self.ids.iter().zip(&other.ids).take_while(|(a, b)| a == b).count();
        if self.ids != other.ids {
            return Some(format!("token {same}: {:?} and {:?}", self.ids.get(same), other.ids.get(same)));
        }
        if let Some(at) = (0..self.logits.len()).find(|i| self.logits.get(*i) != other.logits.get(*i)) {
            return Some(format!("the logits of token {at}"));
        }
        let parts = [
            ("log-probabilities", self.logprobs == other.logprobs),
            ("text", self.text == other.text),
            ("end", (&self.finish, &self.error) == (&other.finish, &other.error)),
            ("tokens held", self.held == other.held),
            ("logits after the reply", self.after == other.after),
        ];
        parts.iter().find(|(_, same)| !same).map(|(what, _)| format!("the {what}"))
    }
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|v| v.to_bits()).collect()
}

/// A reply to its end, or until `pulls` tokens were pulled.
fn told(session: &mut Session, prompt: &[TokenId], options: &ReplyOptions, pulls: usize) -> (Told, Stats) {
    let mut told = Told::default();
    let mut reply = session.reply(prompt, options).unwrap().keeping_logits();
    for _ in 0..pulls {
        match reply.next() {
            None => break,
            Some(Err(e)) => told.error = Some(e.to_string()),
            Some(Ok(token)) => {
                told.ids.push(token.choice.id);
                told.logprobs.push(token.choice.logprob.to_bits());
                told.text += &token.text;
                told.logits.push(bits(&reply.logits().unwrap()));
            }
        }
    }
    told.finish = reply.finish();
    let stats = reply.stats();
    drop(reply);
    told.held = session.tokens().to_vec();
    if session.engine().context() > told.held.len() + 5 {
        told.after = bits(&session.feed_drawn(&[3, 1, 4, 1, 5], Want::All).unwrap());
    }
    (told, stats)
}

/// A reply to its end in a session of its own.
fn fresh(
    engine: &Engine,
    prompt: &[TokenId],
    options: &ReplyOptions,
    speculation: Option<Speculation>,
) -> (Told, Stats) {
    let mut session = engine.session().unwrap();
    session.set_speculation(speculation).unwrap();
    told(&mut session, prompt, options, usize::MAX)
}

fn knows(plain: &Told, how: How) -> Knows {
    let second = plain.logits.iter().map(|bits| second(bytemuck::cast_slice(bits))).collect();
    Knows { reply: plain.ids.clone(), second, how, random: Random(9) }
}

/// Counts are what they are called, and account for the tokens.
fn check(stats: &Stats, what: &str) {
    let d = &stats.drafts;
    assert!(d.steps + d.accepted() < stats.generated_tokens.max(1), "{what}: {stats:?}");
    assert!(d.drafted() >= d.accepted() && d.drafted() >= d.steps, "{what}: {d:?}");
    for place in 1..d.drafted.len() {
        assert!(
            d.drafted[place] <= d.drafted[place - 1] && d.accepted[place] <= d.accepted[place - 1],
            "{what}: {d:?}"
        );
        assert!(d.accepted[place] <= d.drafted[place], "{what}: {d:?}");
    }
    assert!(d.drafted[0] <= d.steps && d.rates().iter().all(|rate| (0.0..=1.0).contains(rate)), "{what}: {d:?}");
}

#[test]
fn hostile_drafts_change_nothing() {
    for (n, (where_, device)) in devices().into_iter().enumerate() {
        // The GPU, slow in software, gets the middle of it.
        let cases: &[(&str, usize, &[Option<usize>])] = match n {
            0 => &[("tiny", 16, &[Some(1), Some(15), None]), ("odd", 8, &[Some(7)])],
            _ => &[("tiny", 16, &[Some(4)])],
        };
        for &(name, chunk, counts) in cases {
            let engine = engine(name, &device, 200, chunk);
            let prompt = prompt(1, 37);
            for sampling in [Sampling::greedy(), warm(), cool()] {
                let options = options(28, sampling);
                let (plain, _) = fresh(&engine, &prompt, &options, None);
                assert_eq!(plain.logits.len(), 28);
                for how in ALL {
                    for &count in counts {
                        let what = format!("{how:?}, {count:?} at a time, {name} on {where_}");
                        let speculation = Speculation::new(knows(&plain, how));
                        let speculation = match count {
                            Some(count) => speculation.with_count(count).unwrap(),
                            None => speculation,
                        };
                        let (got, stats) = fresh(&engine, &prompt, &options, Some(speculation));
                        assert_eq!(plain.difference(&got), None, "{what}");
                        check(&stats, &what);
                        let Some(count) = count else { continue };
                        let (d, most) = (stats.drafts, count.min(chunk - 1));
                        let steps = d.steps + d.accepted();
                        match how {
                            How::Right | How::OverLong => {
                                assert_eq!((d.accepted(), d.rate()), (d.drafted(), 1.0), "{what}: {d:?}");
                                assert!(steps >= 26 && d.steps <= 27usize.div_ceil(most + 1), "{what}: {d:?}");
                            }
                            How::Wrong | How::Random if most == 1 || how == How::Wrong => {
                                assert!(d.accepted() <= 3 && d.drafted() > 20, "{what}: {d:?}");
                            }
                            How::Mixed => assert!(d.accepted() > 5 && d.rate() < 1.0, "{what}: {d:?}"),
                            How::Empty => assert_eq!((d.steps, d.drafted()), (0, 0), "{what}"),
                            How::Illegal => assert_eq!(d.drafted[1], 0, "{what}: {d:?}"),
                            _ => {}
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_wrong_token_that_is_kept_is_noticed() {
    for (where_, device) in devices() {
        let engine = engine("tiny", &device, 200, 16);
        let prompt = prompt(2, 37);
        for sampling in [Sampling::greedy(), warm(), cool()] {
            let options = options(12, sampling);
            let (plain, _) = fresh(&engine, &prompt, &options, None);
            let speculation = || Speculation::new(knows(&plain, How::Mixed)).with_count(4).unwrap();
            let (got, _) = fresh(&engine, &prompt, &options, Some(speculation()));
            assert_eq!(plain.difference(&got), None);
            let (got, _) = fresh(&engine, &prompt, &options, Some(speculation().keeping_wrong()));
            assert!(
                plain.difference(&got).is_some(),
                "on {where_}: nothing noticed, so the comparison is worth nothing"
            );
        }
    }
}

#[test]
fn a_model_that_drafts_for_itself_is_always_right() {
    for (where_, device) in devices() {
        let engine = engine("tiny", &device, 200, 16);
        for seed in 1..4 {
            let (prompt, greedy) = (prompt(seed, 30 + seed), options(50, Sampling::greedy()));
            let (plain, _) = fresh(&engine, &prompt, &greedy, None);
            for count in [1, 5, 15] {
                let draft = DraftModel::new(&engine, &engine).unwrap();
                let speculation = Speculation::new(draft).with_count(count).unwrap();
                let (got, stats) = fresh(&engine, &prompt, &greedy, Some(speculation));
                assert_eq!(plain.difference(&got), None, "{count} at a time on {where_}");
                let d = stats.drafts;
                assert!(d.drafted() >= 24 && d.drafted() == d.accepted(), "on {where_}: {d:?}");
                check(&stats, where_);
            }
            // Warm as well, if it draws as the reply does.
            for warm in [warm(), cool()] {
                let warm = options(50, warm);
                let (plain, _) = fresh(&engine, &prompt, &warm, None);
                let rate = |sampling| {
                    let draft = DraftModel::new(&engine, &engine).unwrap().with_sampling(sampling);
                    let speculation = Speculation::new(draft).with_count(5).unwrap();
                    let (got, stats) = fresh(&engine, &prompt, &warm, Some(speculation));
                    assert_eq!(plain.difference(&got), None, "on {where_}");
                    stats.drafts.rate()
                };
                assert_eq!(rate(warm.sampling.clone()), 1.0, "on {where_}");
                assert!(rate(Sampling::greedy()) < 1.0 && rate(Sampling { seed: 6, ..warm.sampling.clone() }) < 1.0);
            }
        }
    }
}

#[test]
fn other_models_and_the_prompt_draft_too() {
    for (where_, device) in devices() {
        let engine = engine("tiny", &device, 200, 16);
        // What a small context cannot hold is not drafted.
        let other = self::engine("loud", &device, 70, 8);
        let words = [prompt(3, 12), prompt(3, 12), prompt(3, 9)].concat();
        for sampling in [Sampling::greedy(), warm(), cool()] {
            let options = options(50, sampling);
            let (plain, _) = fresh(&engine, &words, &options, None);
            let own = Speculation::new(DraftModel::new(&engine, &engine).unwrap());
            let another = Speculation::new(DraftModel::new(&other, &engine).unwrap());
            let lookup = Speculation::new(PromptLookup);
            let all = [("its own", own), ("another", another), ("the prompt", lookup)];
            for (who, speculation) in all.map(|(who, s)| (who, s.with_count(3).unwrap())) {
                let (got, stats) = fresh(&engine, &words, &options, Some(speculation));
                assert_eq!(plain.difference(&got), None, "drafts by {who} on {where_}");
                check(&stats, who);
                assert!(stats.drafts.drafted() > 0 || who == "the prompt", "{who} never drafted on {where_}");
            }
        }
    }
}

#[test]
fn a_conversation_goes_on_as_if_there_had_been_no_drafts() {
    for (where_, device) in devices() {
        let engine = engine("tiny", &device, 260, 8);
        let (mut plain, mut drafted) = (engine.session().unwrap(), engine.session().unwrap());
        let mut text = prompt(1, 20);
        for turn in 0..4 {
            let options = options(23, [Sampling::greedy(), warm(), cool()][turn % 3].clone());
            let (want, want_stats) = told(&mut plain, &text, &options, usize::MAX);
            let speculation = Speculation::new(knows(&want, How::Mixed)).with_count(7).unwrap();
            drafted.set_speculation(Some(speculation)).unwrap();
            let (got, stats) = told(&mut drafted, &text, &options, usize::MAX);
            assert_eq!(want.difference(&got), None, "turn {turn} on {where_}");
            assert_eq!(stats.cached_tokens, want_stats.cached_tokens, "turn {turn} on {where_}");
            assert!(turn == 0 || stats.cached_tokens > 40, "the conversation was lost in turn {turn} on {where_}");
            text = [text, want.ids, prompt(turn + 5, 6)].concat();
        }
    }
}

#[test]
fn an_end_within_accepted_tokens_leaves_the_plain_session() {
    for (where_, device) in devices() {
        let engine = engine("tiny", &device, 60, 16);
        let prompt = prompt(1, 30);
        let all_right = |plain: &Told| Some(Speculation::new(knows(plain, How::Right)).with_count(8).unwrap());
        for sampling in [Sampling::greedy(), warm(), cool()] {
            let (whole, _) = fresh(&engine, &prompt, &options(20, sampling.clone()), None);
            let same = |what: &str, options: ReplyOptions| {
                let (plain, _) = fresh(&engine, &prompt, &options, None);
                let (got, stats) = fresh(&engine, &prompt, &options, all_right(&whole));
                assert_eq!(plain.difference(&got), None, "{what} on {where_}");
                assert_eq!(stats.drafts.rate(), 1.0, "{what} on {where_}: what came too late is not judged");
                plain
            };
            // A stop token that is the fourth of the first run.
            let stop = ReplyOptions { stop_tokens: Some(vec![whole.ids[4]]), ..options(20, sampling.clone()) };
            let plain = same("a stop token", stop);
            assert!(plain.finish == Some(Finish::StopToken) && plain.ids.len() <= 5);
            same("as many as asked for", options(6, sampling.clone()));
            // The context is full at 60: thirty tokens of the reply, and one that is drawn from the last of them.
            let plain = same("a full context", options(99, sampling.clone()));
            assert!(plain.ids.len() == 31 && plain.error.is_some_and(|e| e.contains("context")), "on {where_}");
            // Dropped and cancelled between any two tokens.
            for pulls in 1..9 {
                let options = options(20, sampling.clone());
                let (mut plain, mut got) = (engine.session().unwrap(), engine.session().unwrap());
                got.set_speculation(all_right(&whole)).unwrap();
                let want = told(&mut plain, &prompt, &options, pulls).0;
                assert_eq!(want.difference(&told(&mut got, &prompt, &options, pulls).0), None, "dropped on {where_}");
                let cancel = got.cancel_handle();
                let mut reply = got.reply(&prompt, &options).unwrap();
                assert_eq!(reply.by_ref().take(pulls).count(), pulls);
                cancel.cancel();
                assert!(reply.next().is_none() && reply.finish() == Some(Finish::Cancelled), "on {where_}");
                drop(reply);
                assert_eq!(got.tokens(), want.held, "cancelled after {pulls} on {where_}");
                // And it is still good.
                assert_eq!(told(&mut got, &prompt, &options, usize::MAX).0.ids, whole.ids, "on {where_}");
            }
        }
    }
}

#[test]
fn every_token_is_drawn_by_seed_stream_and_position_alone() {
    // What was drawn, drawn again from its logits by nothing but the place.
    let engine = engine("tiny", &cpu(), 200, 16);
    let prompt = prompt(4, 20);
    for sampling in [warm(), Sampling { stream: 3, ..warm() }] {
        let options = options(30, sampling.clone());
        let (plain, _) = fresh(&engine, &prompt, &options, None);
        let speculation = Speculation::new(knows(&plain, How::Mixed)).with_count(5).unwrap();
        for speculation in [None, Some(speculation)] {
            let (got, _) = fresh(&engine, &prompt, &options, speculation);
            let mut history = prompt.clone();
            let mut elsewhere = 0;
            for (id, logits) in got.ids.iter().zip(&got.logits) {
                let logits: Vec<f32> = logits.iter().map(|bits| f32::from_bits(*bits)).collect();
                let draw = |position| sample(&sampling, &logits, &history, position).unwrap().id;
                let position = history.len() as u64;
                assert_eq!(draw(position), *id);
                elsewhere += usize::from(draw(position + 1) != *id);
                history.push(*id);
            }
            assert!(elsewhere > 5, "the position makes no difference, so nothing was tested");
        }
    }
}

#[test]
fn what_cannot_draft_is_one_clear_error() {
    let device = cpu();
    let tiny = engine("tiny", &device, 60, 16);
    let odd = engine("odd", &device, 60, 16);
    let error = DraftModel::new(&odd, &tiny).unwrap_err().to_string();
    assert!(error.contains("draft") && error.contains("503") && error.contains("512"), "{error}");
    // A drafter's own error ends the reply, and not the session.
    let mut session = tiny.session().unwrap();
    session
        .set_speculation(Some(Speculation::new(knows(&Told::default(), How::Fails)).with_count(2).unwrap()))
        .unwrap();
    let (got, _) = told(&mut session, &prompt(1, 9), &options(5, warm()), usize::MAX);
    assert!(got.ids.len() == 1 && got.error.is_some_and(|e| e.contains("told to fail")));
    session.set_speculation(None).unwrap();
    let (got, _) = told(&mut session, &prompt(1, 9), &options(5, warm()), usize::MAX);
    assert_eq!(fresh(&tiny, &prompt(1, 9), &options(5, warm()), None).0.difference(&got), None);
    // Rows that change each other cannot be verified together.
    let modelopt = Engine::builder().checkpoint(crate::families::fixture("qwen3_moe/modelopt")).context(60);
    let dynamic = modelopt.device(DeviceChoice::Cpu).activations(Activations::Nvfp4Dynamic).build().unwrap();
    let mut session = dynamic.session().unwrap();
    let error = session.set_speculation(Some(Speculation::new(PromptLookup))).unwrap_err().to_string();
    assert!(error.contains("nvfp4-token"), "{error}");
    let error = DraftModel::new(&dynamic, &dynamic).unwrap_err().to_string();
    assert!(error.contains("nvfp4-token"), "{error}");
    // A chunk of one row has no room for drafts; it is no error.
    let narrow = engine("tiny", &device, 60, 1);
    let (plain, _) = fresh(&narrow, &prompt(1, 9), &options(9, warm()), None);
    let speculation = Speculation::new(knows(&plain, How::Right)).with_count(3).unwrap();
    let (got, stats) = fresh(&narrow, &prompt(1, 9), &options(9, warm()), Some(speculation));
    assert_eq!((plain.difference(&got), stats.drafts.steps), (None, 0));
}

#[cfg(feature = "default-model")]
mod default_model {
    use super::*;
    use fourfold::tokenizer::{ChatOptions, Tokenizer};
    use fourfold::{Chat, EngineBuilder};

    fn built(builder: EngineBuilder) -> Engine {
        builder.device(DeviceChoice::Cpu).context(256).build().unwrap()
    }

    #[test]
    fn its_draft_drafts_and_changes_nothing() {
        let (engine, draft) = (built(Engine::builder()), built(Engine::builder().default_draft()));
        let prompt = engine.tokenizer().unwrap().encode("Once upon a time").unwrap();
        for sampling in [Sampling::greedy(), warm(), cool()] {
            let options = options(24, sampling);
            let (plain, _) = fresh(&engine, &prompt, &options, None);
            let speculation = Speculation::new(DraftModel::new(&draft, &engine).unwrap()).with_count(3).unwrap();
            let (got, stats) = fresh(&engine, &prompt, &options, Some(speculation));
            assert_eq!(plain.difference(&got), None);
            check(&stats, "the default draft");
            assert!(stats.drafts.accepted() > 0, "{:?}", stats.drafts);
            println!("{:?}: {:.0} % of the default draft", options.sampling, 100.0 * stats.drafts.rate());
        }
    }

    #[test]
    fn a_draft_without_a_tokenizer_means_its_target_s_tokens() {
        let engine = built(Engine::builder());
        let draft = built(Engine::builder().checkpoint(crate::cli::root("models/fireside-draft")));
        assert!(draft.tokenizer().is_err());
        let prompt = engine.tokenizer().unwrap().encode("Once upon a time").unwrap();
        let options = options(12, Sampling::greedy());
        let (plain, _) = fresh(&engine, &prompt, &options, None);
        let speculation = Speculation::new(DraftModel::new(&draft, &engine).unwrap()).with_count(3).unwrap();
        let (got, stats) = fresh(&engine, &prompt, &options, Some(speculation));
        assert_eq!(plain.difference(&got), None);
        assert!(stats.drafts.accepted() > 0, "{:?}", stats.drafts);
    }

    #[test]
    fn a_stop_string_within_accepted_tokens_leaves_the_plain_session() {
        let engine = built(Engine::builder());
        let prompt = engine.tokenizer().unwrap().encode("Once upon a time").unwrap();
        let whole = fresh(&engine, &prompt, &options(24, Sampling::greedy()), None).0;
        let stop = whole.text.split_whitespace().nth(7).unwrap().to_owned();
        let options = ReplyOptions { stop: vec![stop], ..options(24, Sampling::greedy()) };
        let (plain, _) = fresh(&engine, &prompt, &options, None);
        assert!(plain.finish == Some(Finish::StopString) && plain.ids.len() < 20);
        let speculation = Speculation::new(knows(&whole, How::Right)).with_count(15).unwrap();
        let (got, stats) = fresh(&engine, &prompt, &options, Some(speculation));
        assert_eq!(plain.difference(&got), None);
        assert_eq!(stats.drafts.rate(), 1.0);
    }

    #[test]
    fn a_chat_says_the_same_with_drafts() {
        let (engine, draft) = (built(Engine::builder()), built(Engine::builder().default_draft()));
        let options = ReplyOptions { sampling: warm(), max_tokens: Some(20), ..ReplyOptions::default() };
        let say = |speculation: Option<Speculation>| {
            let mut session = engine.session().unwrap();
            session.set_speculation(speculation).unwrap();
            let mut chat = Chat::new(session, ChatOptions::default()).unwrap();
            for question in ["Tell me a short story about a cat.", "And about a dog?"] {
                let mut answer = chat.ask(question, &options).unwrap();
                answer.by_ref().for_each(|piece| drop(piece.unwrap()));
            }
            (chat.messages().to_vec(), chat.into_session().tokens().to_vec())
        };
        let draft = Speculation::new(DraftModel::new(&draft, &engine).unwrap()).with_count(4).unwrap();
        assert_eq!(say(Some(draft)), say(None));
    }

    #[test]
    fn a_draft_with_other_tokens_is_refused_by_name() {
        let file = crate::cli::root("models/fireside/tokenizer.json");
        let json = std::fs::read_to_string(file).unwrap();
        let open = |json: &str| Tokenizer::from_bytes("tokenizer.json", json.as_bytes()).unwrap();
        assert_eq!(open(&json).difference(&open(&json)), None);
        // Two tokens swapped, and a special token that is none.
        let mut parsed: serde_json::Value = serde_json::from_str(&json).unwrap();
        let vocab = parsed["model"]["vocab"].as_object_mut().unwrap();
        let (a, b) = (vocab["the"].clone(), vocab["and"].clone());
        vocab.insert("the".into(), b);
        vocab.insert("and".into(), a.clone());
        let difference = open(&parsed.to_string()).difference(&open(&json)).unwrap();
        assert!(difference.contains("\"the\"") && difference.contains("\"and\""), "{difference}");
        let mut parsed: serde_json::Value = serde_json::from_str(&json).unwrap();
        parsed["added_tokens"][0]["special"] = false.into();
        assert!(open(&parsed.to_string()).difference(&open(&json)).unwrap().contains("special"));
        let tiny = crate::speculate::engine("tiny", &cpu(), 60, 16);
        let error = DraftModel::new(&tiny, &built(Engine::builder())).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json") && error.contains("ngram"), "{error}");
    }
}
