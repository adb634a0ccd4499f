//! Tokens that the device draws: a reply says what the host's sampler says of the same logits, alone, among others, and ahead of
//! anybody who looks.

use crate::harness::{Named, cpu, gpus};
use crate::schedule::{engine, prompt};
use crate::{families, models};
use fourfold::sampler::sample;
use fourfold::{ReplyOptions, Request, Result, Sampling, SchedulerOptions, Token};

fn devices() -> Vec<Named> {
    [("twins", cpu())].into_iter().chain(gpus().iter().take(1).cloned()).collect()
}

/// With and without each filter; greedy; what only the host can draw.
pub fn kinds() -> Vec<Sampling> {
    let warm = Sampling { temperature: 0.9, seed: 11, ..Sampling::default() };
    vec![
        warm.clone(),
        Sampling { top_k: 40, stream: 1, ..warm.clone() },
        Sampling { top_p: 0.8, stream: 2, ..warm.clone() },
        Sampling { min_p: 0.1, temperature: 1.5, stream: 3, ..warm.clone() },
        Sampling::greedy(),
        Sampling { top_k: 60, top_p: 0.9, min_p: 0.01, seed: u64::MAX, stream: u64::MAX - 4, ..warm.clone() },
        Sampling { repetition_penalty: 1.2, top_p: 0.9, ..warm.clone() },
        Sampling { top_logprobs: 3, top_k: 9, ..warm },
    ]
}

fn options(max_tokens: usize, sampling: Sampling) -> ReplyOptions {
    ReplyOptions { sampling, max_tokens: Some(max_tokens), stop_tokens: Some(Vec::new()), ..ReplyOptions::default() }
}

#[test]
fn a_reply_says_what_the_host_would_of_its_logits() {
    for (where_, device) in devices() {
        for dir in [models::fixture("tiny"), families::fixture("qwen3_moe/modelopt")] {
            let engine = engine(&dir, &device, 120);
            let mut session = engine.session().unwrap();
            let mut said = Vec::new();
            // In one session, so that each follows another rule.
            for (i, sampling) in kinds().into_iter().enumerate() {
                let (prompt, options) = (prompt(i, 5 + i), options(25, sampling.clone()));
                let mut history = prompt.clone();
                let mut reply = session.reply(&prompt, &options).unwrap().keeping_logits();
                while let Some(token) = reply.next() {
                    let choice = token.unwrap().choice;
                    let want = sample(&sampling, &reply.logits().unwrap(), &history, history.len() as u64).unwrap();
                    let what = format!("token {} of {sampling:?} on {where_}", history.len());
                    assert_eq!((choice.id, &choice.top), (want.id, &want.top), "{what}");
                    assert!((choice.logprob - want.logprob).abs() < 1e-4, "{what}: {choice:?}, not {want:?}");
                    history.push(choice.id);
                }
                drop(reply);
                // The same ahead of whoever looks.
                let tokens: Vec<Token> = session.reply(&prompt, &options).unwrap().map(Result::unwrap).collect();
                let ids: Vec<u32> = tokens.iter().map(|t| t.choice.id).collect();
                assert_eq!(ids, history[prompt.len()..], "{sampling:?}, ahead, on {where_}");
                said.push(ids);
            }
            said.sort();
            said.dedup();
            assert_eq!(said.len(), kinds().len(), "some rules say the same, so the test shows little");
        }
    }
}

#[test]
fn sessions_with_rules_of_their_own_say_what_they_say_alone() {
    for (where_, device) in devices() {
        let engine = engine(&models::fixture("tiny"), &device, 120);
        let asked: Vec<_> =
            kinds().into_iter().enumerate().map(|(i, by)| (prompt(i, 3 + 4 * i), options(20, by))).collect();
        let mut session = engine.session().unwrap();
        let mut alone = |(prompt, options): &(Vec<u32>, ReplyOptions)| -> Vec<(u32, u32)> {
            let reply = session.reply(prompt, options).unwrap().map(Result::unwrap);
            reply.map(|t| (t.choice.id, t.choice.logprob.to_bits())).collect()
        };
        let want: Vec<_> = asked.iter().map(&mut alone).collect();
        // With room for all, for few so that places are taken again by other rules, and without those that the host draws: then
        // steps run ahead.
        for (sessions, which) in [(16, 0..8), (2, 0..8), (3, 0..6), (1, 0..6)] {
            let mut scheduler = engine.scheduler(&SchedulerOptions { sessions, ..Default::default() }).unwrap();
            let requests: Vec<Request> =
                which.clone().map(|i| scheduler.add(&asked[i].0, &asked[i].1).unwrap()).collect();
            while scheduler.step().unwrap() {}
            for (i, request) in which.zip(&requests) {
                let got = std::iter::from_fn(|| request.pull().unwrap());
                let got: Vec<_> = got.map(|t| (t.choice.id, t.choice.logprob.to_bits())).collect();
                assert!(got == want[i], "{:?}, {sessions} at once on {where_}", asked[i].1.sampling);
            }
        }
    }
}
