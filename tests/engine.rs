//! Sessions as an application uses them: reuse, cutting back, cancelling, errors, several engines on one device.

use crate::harness::{Named, cpu, gpu, gpus, small_binding_gpu};
use crate::models::{copy_to_write, fixture};
use fourfold::device::gpu::Options;
use fourfold::device::{Buffer, Device, Limits, cpu::Cpu};
use fourfold::ops::Op;
use fourfold::program::{HostStages, Program};
use fourfold::{
    Chat, DeviceChoice, Edit, Engine, Error, Finish, Gpu, ReplyOptions, Sampling, Session, Token, Want, wgpu,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The twins, and the GPU as it is.
fn devices() -> Vec<Named> {
    let mut devices = vec![("twins", cpu())];
    devices.extend(gpus().iter().take(1).cloned());
    devices
}

fn engine(name: &str, choice: DeviceChoice, context: usize, chunk: usize) -> Engine {
    let builder = Engine::builder().checkpoint(fixture(name)).device(choice).context(context).chunk(chunk);
    builder.build().unwrap()
}

fn own(device: &Arc<dyn fourfold::device::Device>) -> DeviceChoice {
    DeviceChoice::Own(device.clone())
}

/// A prompt of uneven tokens.
fn prompt(seed: usize, n: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * 37 + seed * 101 + i * i) % 500) as u32).collect()
}

fn options(max_tokens: usize, sampling: Sampling) -> ReplyOptions {
    ReplyOptions { sampling, max_tokens: Some(max_tokens), stop_tokens: Some(Vec::new()), ..ReplyOptions::default() }
}

fn warm(seed: u64) -> Sampling {
    Sampling { seed, ..Sampling::default() }
}

fn tokens(session: &mut Session, prompt: &[u32], options: &ReplyOptions) -> Vec<Token> {
    session.reply(prompt, options).unwrap().map(Result::unwrap).collect()
}

fn ids(tokens: &[Token]) -> Vec<u32> {
    tokens.iter().map(|t| t.choice.id).collect()
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn what_the_cache_holds_is_not_computed_again_and_changes_nothing() {
    for (where_, device) in devices() {
        let engine = engine("tiny", own(&device), 200, 16);
        let mut session = engine.session().unwrap();
        let first = prompt(1, 40);
        let said = ids(&tokens(&mut session, &first, &options(10, warm(3))));
        // The next turn continues what was said, but its last token was drawn and not computed.
        let next = [first, said, prompt(2, 9)].concat();
        let mut reply = session.reply(&next, &options(6, warm(3))).unwrap();
        let again: Vec<Token> = reply.by_ref().map(Result::unwrap).collect();
        assert_eq!(reply.stats().cached_tokens, 49, "on {where_}");
        let mut fresh = engine.session().unwrap();
        assert_eq!(ids(&again), ids(&tokens(&mut fresh, &next, &options(6, warm(3)))), "on {where_}");
    }
}

#[test]
fn cutting_back_gives_the_bits_of_never_having_been_there() {
    // The window is 16 and the chunk 8: a ring holds 32 positions, so 16 tokens can be taken back, and not 40.
    for (where_, device) in devices() {
        let engine = engine("tiny", own(&device), 200, 8);
        let stem = prompt(1, 60);
        let tail = prompt(9, 7);
        let want = {
            let mut fresh = engine.session().unwrap();
            fresh.feed(&stem, Want::Nothing).unwrap();
            bits(&fresh.feed(&tail, Want::All).unwrap())
        };
        for (ahead, kept) in [(0, 60), (1, 60), (9, 60), (16, 60), (17, 60), (18, 0), (40, 0)] {
            let mut session = engine.session().unwrap();
            session.feed(&stem, Want::Nothing).unwrap();
            if ahead > 0 {
                session.feed(&prompt(5, ahead), Want::Nothing).unwrap();
            }
            session.cut(60);
            assert_eq!(session.tokens().len(), kept, "{ahead} tokens ahead on {where_}");
            session.feed(&stem[kept..], Want::Nothing).unwrap();
            assert!(bits(&session.feed(&tail, Want::All).unwrap()) == want, "{ahead} tokens ahead on {where_}");
            // And a second time from there: what the first cut overwrote must not come back.
            session.cut(58);
            let left = session.tokens().len();
            session.feed(&[&stem[left..], &tail[..]].concat(), Want::Last).unwrap();
            session.cut(60);
            let left = session.tokens().len();
            session.feed(&stem[left..], Want::Nothing).unwrap();
            assert!(bits(&session.feed(&tail, Want::All).unwrap()) == want, "second cut, {ahead} on {where_}");
        }
    }
}

#[test]
fn a_step_that_fails_leaves_no_wrong_keys() {
    // Forty tokens, then forty more of which the second, third or fourth chunk fails: by the fourth, the rings have lost
    // keys that position 40 looks back to, and the session must know.
    for (where_, device) in devices() {
        let engine = engine("tiny", own(&device), 200, 8);
        let (stem, more, tail) = (prompt(1, 40), prompt(3, 40), prompt(9, 7));
        let want = {
            let mut fresh = engine.session().unwrap();
            fresh.feed(&stem, Want::Nothing).unwrap();
            bits(&fresh.feed(&tail, Want::All).unwrap())
        };
        let mut lost = 0;
        for good_chunks in 0..5 {
            let mut session = engine.session().unwrap();
            session.feed(&stem, Want::Nothing).unwrap();
            let mut seen = 0;
            let mut fail = |name: &str, _: usize, _: Vec<u32>| {
                seen += usize::from(name == "embed");
                if seen > good_chunks { Err(Error::Device("told to fail".into())) } else { Ok(()) }
            };
            session.feed_seeing(&more, Want::Nothing, Some(&mut fail)).unwrap_err();
            let kept = session.tokens().len();
            assert!(kept == 40 || kept == 0, "{kept}");
            lost += usize::from(kept == 0);
            session.feed(&stem[kept..], Want::Nothing).unwrap();
            let got = bits(&session.feed(&tail, Want::All).unwrap());
            assert!(got == want, "after {good_chunks} good chunks on {where_}");
        }
        assert!(lost >= 2, "the rings were not overwritten, so nothing was tested");
    }
}

#[test]
fn nan_in_the_activations_is_an_error_and_never_text() {
    // A NaN row of the embedding table reaches the logits through every stage, on the twins and on the GPU.
    let dir = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("nan-embedding");
    copy_to_write("tiny", &dir);
    let shard = dir.join("model-00001-of-00001.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    let at = {
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let data = tensors.tensor("model.embed_tokens.weight").unwrap().data();
        data.as_ptr() as usize - bytes.as_ptr() as usize
    };
    bytes[at + 7 * 256..at + 7 * 256 + 2].copy_from_slice(&[0xc0, 0x7f]);
    std::fs::write(&shard, bytes).unwrap();
    for (where_, device) in devices() {
        let engine = Engine::builder().checkpoint(&dir).device(own(&device)).context(60).build().unwrap();
        let mut session = engine.session().unwrap();
        let error = session.reply(&[7], &options(1, Sampling::greedy())).unwrap().next().unwrap().unwrap_err();
        assert!(error.to_string().contains("NaN"), "{error} on {where_}");
    }
}

#[test]
fn a_full_context_is_an_error_and_never_wrong_text() {
    for (where_, device) in devices() {
        let engine = engine("tiny", own(&device), 30, 16);
        let mut session = engine.session().unwrap();
        let error = session.reply(&prompt(1, 31), &options(5, warm(1))).unwrap_err();
        assert!(matches!(error, Error::ContextFull { context: 30, tokens: 31, .. }), "{error} on {where_}");
        let drawn: Vec<_> = session.reply(&prompt(1, 28), &options(50, warm(1))).unwrap().collect();
        let (last, good) = drawn.split_last().unwrap();
        // Positions 28 and 29 hold two drawn tokens; a third is drawn from the last of them.
        assert_eq!(good.len(), 3, "on {where_}");
        assert!(matches!(last, Err(Error::ContextFull { context: 30, .. })), "on {where_}");
        // The session is still good.
        assert_eq!(tokens(&mut session, &prompt(2, 10), &options(3, warm(1))).len(), 3);
    }
}

#[test]
fn a_cancel_stops_at_the_next_chunk_and_leaves_a_good_session() {
    for (where_, device) in devices() {
        let engine = engine("tiny", own(&device), 200, 8);
        let mut session = engine.session().unwrap();
        let cancel = session.cancel_handle();
        cancel.cancel(); // too early: there is nothing to stop yet
        let mut reply = session.reply(&prompt(1, 100), &options(5, warm(1))).unwrap();
        cancel.cancel();
        assert!(reply.next().is_none(), "on {where_}");
        assert_eq!(reply.finish(), Some(Finish::Cancelled));
        drop(reply);
        let got = ids(&tokens(&mut session, &prompt(1, 100), &options(5, warm(1))));
        assert_eq!(got, ids(&tokens(&mut engine.session().unwrap(), &prompt(1, 100), &options(5, warm(1)))));
        // Dropping is cancelling, too.
        let mut reply = session.reply(&prompt(1, 100), &options(50, warm(1))).unwrap();
        let two: Vec<u32> = reply.by_ref().take(2).map(|t| t.unwrap().choice.id).collect();
        drop(reply);
        assert_eq!(two, got[..2]);
        assert_eq!(ids(&tokens(&mut session, &prompt(1, 100), &options(5, warm(1)))), got);
    }
}

#[test]
fn randomness_comes_from_seed_stream_and_position_alone() {
    let engine = engine("tiny", DeviceChoice::Cpu, 200, 32);
    let run = |sampling: Sampling| ids(&tokens(&mut engine.session().unwrap(), &prompt(1, 20), &options(24, sampling)));
    let want = run(warm(1));
    assert_eq!(run(warm(1)), want);
    assert_ne!(run(warm(2)), want);
    assert_ne!(run(Sampling { stream: 1, ..warm(1) }), want);
    // Stopping and going on draws what going on would have drawn.
    let mut session = engine.session().unwrap();
    let mut text = prompt(1, 20);
    for _ in 0..24 {
        let next = ids(&tokens(&mut session, &text, &options(1, warm(1))));
        text.extend(next);
    }
    assert_eq!(text[20..], want);
}

#[test]
fn log_probabilities_are_those_of_the_logits() {
    let engine = engine("tiny", DeviceChoice::Cpu, 200, 32);
    let mut session = engine.session().unwrap();
    let sampling = Sampling { top_logprobs: 3, temperature: 0.3, top_k: 5, ..warm(4) };
    let drawn = tokens(&mut session, &prompt(1, 20), &options(2, sampling));
    let logits = engine.session().unwrap().feed(&prompt(1, 20), Want::Last).unwrap();
    let total: f64 = logits.iter().map(|v| f64::from(*v).exp()).sum();
    let choice = &drawn[0].choice;
    let want = f64::from(logits[choice.id as usize]) - total.ln();
    assert!((f64::from(choice.logprob) - want).abs() < 1e-5);
    assert_eq!(choice.top.len(), 3);
    assert!(choice.top.windows(2).all(|w| w[0].1 >= w[1].1));
}

#[test]
fn engines_on_one_device_do_not_see_each_other() {
    // Seed 1's situation: two models whose tensors have the same names, in one process, on one device, at once.
    for (where_, device) in devices() {
        let alone: Vec<Vec<u32>> = ["tiny", "loud", "odd"]
            .iter()
            .map(|name| {
                let mut session = engine(name, own(&device), 110, 16).session().unwrap();
                bits(&session.feed(&prompt(1, 90), Want::All).unwrap())
            })
            .collect();
        let engines = ["tiny", "loud", "odd"].map(|name| engine(name, own(&device), 110, 16));
        std::thread::scope(|scope| {
            for round in 0..2 {
                for (engine, want) in engines.iter().zip(&alone) {
                    let chunk = if round == 0 { 90 } else { 7 };
                    scope.spawn(move || {
                        let mut session = engine.session().unwrap();
                        let mut got = Vec::new();
                        for piece in prompt(1, 90).chunks(chunk) {
                            got.extend(bits(&session.feed(piece, Want::All).unwrap()));
                        }
                        assert!(got == *want, "{} beside others has other bits on {where_}", engine.name());
                    });
                }
            }
        });
    }
}

#[test]
fn engines_and_sessions_are_send() {
    fn check<T: Send>() {}
    check::<Engine>();
    check::<Session>();
    check::<Chat>();
}

#[test]
fn bad_requests_are_errors_that_name_them() {
    let build = |b: fourfold::EngineBuilder| b.checkpoint(fixture("tiny")).device(DeviceChoice::Cpu).build();
    let error = build(Engine::builder().context(200_000)).unwrap_err().to_string();
    assert!(error.contains("context") && error.contains("131072"), "{error}");
    let error = build(Engine::builder().context(0)).unwrap_err().to_string();
    assert!(error.contains("context"), "{error}");
    let error = build(Engine::builder().chunk(0)).unwrap_err().to_string();
    assert!(error.contains("chunk"), "{error}");
    let engine = engine("tiny", DeviceChoice::Cpu, 50, 8);
    let mut session = engine.session().unwrap();
    let error = session.feed(&[1, 512], Want::Last).unwrap_err().to_string();
    assert!(error.contains("512"), "{error}");
    assert!(session.tokens().is_empty());
    let error = session.reply(&[], &ReplyOptions::default()).unwrap_err().to_string();
    assert!(error.contains("prompt"), "{error}");
    let hot = options(1, Sampling { temperature: f32::NAN, ..Sampling::default() });
    assert!(session.reply(&[1], &hot).is_err());
    let error = engine.tokenizer().unwrap_err().to_string();
    assert!(error.contains("tokenizer.json"), "{error}");
    let error = Gpu::open(&Options { adapter: Some("no such adapter".into()), ..Options::default() }).unwrap_err();
    assert!(error.to_string().contains("adapter"), "{error}");
}

/// A device of the test's own, as an application would make it.
pub fn own_wgpu() -> Option<(wgpu::Device, wgpu::Queue)> {
    gpu()?;
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let wanted = crate::harness::gpu()?.describe();
    let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    let adapter = adapters.into_iter().find(|a| wanted.starts_with(&a.get_info().name)).unwrap();
    let descriptor = wgpu::DeviceDescriptor { required_limits: adapter.limits(), ..Default::default() };
    Some(pollster::block_on(adapter.request_device(&descriptor)).unwrap())
}

#[test]
fn a_lost_device_is_an_error() {
    let Some((device, queue)) = own_wgpu() else { return };
    let gpu: Arc<dyn fourfold::device::Device> = Arc::new(Gpu::from_wgpu(device.clone(), queue, &Options::default()));
    let engine = engine("tiny", own(&gpu), 60, 8);
    let mut session = engine.session().unwrap();
    session.feed(&prompt(1, 20), Want::Last).unwrap();
    device.destroy();
    for _ in 0..2 {
        let error = session.feed(&[1], Want::Last).unwrap_err();
        assert!(matches!(error, Error::DeviceLost(_)), "{error}");
        assert_eq!(session.tokens().len(), 20);
    }
    let error = engine.session().unwrap_err();
    assert!(matches!(error, Error::DeviceLost(_)), "{error}");
    // A kernel that was not compiled before: the application's error handler, which panics, must not hear of it.
    let buffer = Buffer::new(&cpu(), "row", 16).unwrap().slice();
    let mut program = Program::new(1, HostStages::default());
    program.add(3, buffer, buffer, buffer);
    let error = gpu.run(&program).unwrap_err();
    assert!(matches!(error, Error::DeviceLost(_)), "{error}");
}

#[test]
fn an_application_may_bring_a_device_with_no_features() {
    let Some((device, queue)) = own_wgpu() else { return };
    let gpu: Arc<dyn fourfold::device::Device> = Arc::new(Gpu::from_wgpu(device, queue, &Options::default()));
    let run = |choice| {
        let mut session = engine("odd", choice, 60, 8).session().unwrap();
        bits(&session.feed(&prompt(1, 20), Want::All).unwrap())
    };
    assert!(run(own(&gpu)) == run(own(&crate::harness::gpu().unwrap())));
}

#[test]
fn too_large_a_buffer_is_an_error_before_it_is_made() {
    let Some(small) = small_binding_gpu(1 << 16) else { return };
    let builder = Engine::builder().checkpoint(fixture("tiny")).device(own(&small));
    let error = builder.context(600).chunk(8).build().unwrap_err().to_string();
    assert!(error.contains("rope table takes 76800") && error.contains("65536"), "{error}");
}

#[test]
fn a_context_that_no_binding_holds_changes_nothing() {
    // A full layer's keys take 600 x 256 bytes; q, k and v stay whole, so that a decode step is fused, but for the rotation.
    let binds = 100_000;
    let small: Arc<dyn Device> =
        Arc::new(Cpu::with_limits(Limits { max_binding_bytes: binds, max_storage_buffers: 8, ..cpu().limits() }));
    let on_gpu = gpu().zip(small_binding_gpu(binds)).map(|(gpu, small)| ("gpu", gpu, small));
    for (where_, device, small) in [("twins", cpu(), small)].into_iter().chain(on_gpu) {
        let run = |device| {
            let engine = engine("tiny", own(device), 600, 16);
            let mut session = engine.session().unwrap();
            let said = tokens(&mut session, &prompt(3, 430), &options(12, Sampling::greedy()));
            let logits = session.feed(&prompt(5, 20), Want::All).unwrap();
            (ids(&said), bits(&logits), engine.needs().cache)
        };
        assert!(run(&small) == run(&device), "other tokens, bits or needs on {where_}");
        let launches = |device| {
            let ropes = Arc::new(AtomicUsize::new(0));
            let counted = ropes.clone();
            let count = move |p: &mut Program| {
                let ropes = p.launches.iter().filter(|launch| matches!(launch.op, Op::Rope(_)));
                counted.fetch_max(ropes.count(), Ordering::Relaxed);
            };
            engine("tiny", own(device), 600, 16).session_edited(Edit::new(count)).unwrap();
            ropes.load(Ordering::Relaxed)
        };
        // Every other layer sees everything.
        assert_eq!(launches(&small) * 2, launches(&device) * 3, "on {where_}");
    }
}

#[test]
fn running_out_of_device_memory_is_an_error() {
    // Takes all memory of the GPU for a moment, so only where that was asked for, and never the host's (software).
    let Some(device) = gpu() else { return };
    if std::env::var_os("FOURFOLD_TEST_MEMORY").is_none() {
        return eprintln!("SKIPPED: set FOURFOLD_TEST_MEMORY=1 to fill the GPU's memory");
    }
    assert!(!device.describe().contains("llvmpipe"), "a software adapter would take the host's memory");
    let mut held = Vec::new();
    let error = loop {
        assert!(held.len() < 4096, "{} GiB and no end", held.len());
        match Buffer::new(&device, "ballast", 1 << 30) {
            Ok(buffer) => held.push(buffer),
            Err(e) => break e,
        }
    };
    println!("after {} GiB: {error}", held.len());
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    drop(held);
    // The device is still good, and so are its engines.
    let engine = engine("tiny", own(&device), 60, 8);
    engine.session().unwrap().feed(&prompt(1, 20), Want::Last).unwrap();
}

#[cfg(feature = "default-model")]
mod default_model {
    use super::*;
    use fourfold::tokenizer::{Channel, ChatOptions};

    fn story(builder: fourfold::EngineBuilder, choice: DeviceChoice, max_tokens: usize) -> (String, Vec<u32>) {
        let engine = builder.device(choice).context(256).build().unwrap();
        let prompt = engine.tokenizer().unwrap().encode("Once upon a time").unwrap();
        let drawn = tokens(&mut engine.session().unwrap(), &prompt, &options(max_tokens, Sampling::greedy()));
        (drawn.iter().map(|t| t.text.as_str()).collect(), ids(&drawn))
    }

    #[test]
    fn it_writes_the_same_words_on_the_gpu_and_on_the_twins() {
        for builder in [Engine::builder, || Engine::builder().default_draft()] {
            let (text, want) = story(builder(), DeviceChoice::Cpu, 40);
            assert!(text.starts_with(", ") && text.split_whitespace().count() > 20, "{text}");
            if let Some(gpu) = gpu() {
                assert_eq!(story(builder(), own(&gpu), 40).1, want);
            }
        }
    }

    #[test]
    fn stop_strings_and_stop_tokens_end_a_reply() {
        let engine = Engine::builder().device(DeviceChoice::Cpu).context(256).build().unwrap();
        let prompt = engine.tokenizer().unwrap().encode("Once upon a time").unwrap();
        let mut session = engine.session().unwrap();
        let whole: String =
            tokens(&mut session, &prompt, &options(30, Sampling::greedy())).iter().map(|t| t.text.as_str()).collect();
        let stop = whole.split_whitespace().nth(7).unwrap().to_owned();
        let with_stop = ReplyOptions { stop: vec![stop.clone()], ..options(30, Sampling::greedy()) };
        let drawn = tokens(&mut session, &prompt, &with_stop);
        let cut: String = drawn.iter().map(|t| t.text.as_str()).collect();
        assert_eq!(cut, whole[..whole.find(&stop).unwrap()]);
        assert_eq!(drawn.last().unwrap().finish, Some(Finish::StopString));
        let first = ids(&tokens(&mut session, &prompt, &options(3, Sampling::greedy())));
        let with_stop = ReplyOptions { stop_tokens: Some(vec![first[2]]), ..options(30, Sampling::greedy()) };
        let drawn = tokens(&mut session, &prompt, &with_stop);
        assert_eq!((drawn.len(), drawn[2].finish), (3, Some(Finish::StopToken)));
    }

    #[test]
    fn a_chat_answers_and_remembers() {
        let engine = Engine::builder().device(DeviceChoice::Cpu).build().unwrap();
        let mut chat = Chat::new(engine.session().unwrap(), ChatOptions::default()).unwrap();
        let options = ReplyOptions { sampling: Sampling::greedy(), max_tokens: Some(60), ..ReplyOptions::default() };
        let mut answer = chat.ask("Tell me a short story about a cat.", &options).unwrap();
        let pieces: Vec<_> = answer.by_ref().map(Result::unwrap).collect();
        assert!(pieces.iter().all(|p| p.channel == Channel::Final), "{pieces:?}");
        drop(answer);
        let said: String = pieces.into_iter().map(|p| p.text).collect();
        assert!(said.split_whitespace().count() > 10, "{said}");
        assert_eq!(chat.messages()[1].content, said);
        let answer = chat.ask("Thank you.", &options).unwrap();
        assert!(answer.stats().cached_tokens > 40, "{:?}", answer.stats());
        drop(answer); // before it said anything
        assert_eq!(chat.messages().len(), 2);
        let word = said.split_whitespace().nth(5).unwrap().to_owned();
        chat.clear();
        let stopped = ReplyOptions { stop: vec![word.clone()], ..options };
        let mut answer = chat.ask("Tell me a short story about a cat.", &stopped).unwrap();
        let pieces: String = answer.by_ref().map(|piece| piece.unwrap().text).collect();
        assert_eq!(answer.finish(), Some(Finish::StopString));
        drop(answer);
        assert_eq!(pieces, said[..said.find(&word).unwrap()]);
    }

    #[test]
    fn a_chat_comes_back_to_its_last_prompt_after_a_long_answer() {
        // The next prompt leaves the answer out, as Harmony leaves out reasoning: it shares the last prompt only, and
        // the rings (window 128, chunk 8) have long lost what that needs.
        come_back(&cpu());
        // A binding holds less than a ring, which is in two parts then.
        come_back(&(Arc::new(Cpu::with_limits(Limits { max_binding_bytes: 70_000, ..cpu().limits() })) as _));
    }

    fn come_back(device: &Arc<dyn Device>) {
        let engine = Engine::builder().device(own(device)).context(256).chunk(8).build().unwrap();
        let mut chat = Chat::new(engine.session().unwrap(), ChatOptions::default()).unwrap();
        let long = ReplyOptions { stop_tokens: Some(vec![]), ..options(160, Sampling::greedy()) };
        let question = "Tell me a story about a lighthouse keeper who lost his lamp.";
        chat.ask(question, &long).unwrap().for_each(drop);
        let mut session = chat.into_session();
        let said = session.tokens().to_vec();
        assert!(said.len() > 26 + 128 + 2 * 8 + 1, "the rings must have turned: {} tokens", said.len());
        let mut unmarked = engine.session().unwrap();
        unmarked.feed(&said, Want::Nothing).unwrap();
        unmarked.cut(26);
        assert!(unmarked.tokens().is_empty(), "without a mark there is no way back");
        let again = engine.tokenizer().unwrap().encode_with_specials(&format!(
            "<|start|>user<|message|>{question}<|end|><|start|>assistant<|channel|>analysis<|message|>"
        ));
        let again = again.unwrap();
        let long = options(20, Sampling::greedy());
        let mut reply = session.reply(&again, &long).unwrap();
        let got: Vec<Token> = reply.by_ref().map(Result::unwrap).collect();
        let stats = reply.stats();
        assert!(stats.cached_tokens > 20 && stats.cached_tokens + 6 >= stats.prompt_tokens, "{stats:?}");
        assert_eq!(ids(&got), ids(&tokens(&mut engine.session().unwrap(), &again, &long)));
    }
}
