//! What looking costs: a step of the default model untraced, with statistics of every stage, and with all values.
//!
//!     cargo bench --bench trace_cost [-- DIR [cpu]]
//!
//! Untraced and traced steps take turns in one process; the table has medians of 15 turns.

use fourfold::{DeviceChoice, Engine, Session, Want, Watch};
use std::time::{Duration, Instant};

const TURNS: usize = 15;

fn main() -> fourfold::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let choice =
        if args.iter().any(|a| a == "cpu") { DeviceChoice::Cpu } else { DeviceChoice::Gpu(Default::default()) };
    let mut builder = Engine::builder().device(choice).context(512).chunk(128);
    if let Some(dir) = args.first().filter(|a| *a != "cpu") {
        builder = builder.checkpoint(dir);
    }
    let engine = builder.build()?;
    println!("{} on {}", engine.name(), engine.device().describe());
    let prompt: Vec<u32> = (0..128).map(|i| 300 + i * 7 % 2000).collect();
    let mut sessions = [engine.session()?, engine.session()?, engine.session()?];
    for (name, tokens, after) in [("prompt of 128", &prompt[..], 0), ("decode after 128", &prompt[..1], 128)] {
        let mut times = [const { Vec::new() }; 3];
        for turn in 0..TURNS + 2 {
            for (how, session) in sessions.iter_mut().enumerate() {
                session.clear();
                if after > 0 {
                    session.feed(&prompt[..after], Want::Nothing)?;
                }
                let took = step(session, tokens, how)?;
                if turn >= 2 {
                    times[how].push(took); // the first turns compile and warm up
                }
            }
        }
        let [plain, stats, values] = times.map(|mut t| {
            t.sort();
            t[t.len() / 2].as_secs_f64() * 1e3
        });
        println!(
            "{name:>18}: untraced {plain:8.3} ms   statistics {stats:8.3} ms ({:.2} x)   values {values:8.3} ms ({:.2} x)",
            stats / plain,
            values / plain
        );
    }
    Ok(())
}

/// One step that gives the last row's logits: 0 untraced, 1 with statistics, 2 with values.
fn step(session: &mut Session, tokens: &[u32], how: usize) -> fourfold::Result<Duration> {
    let started = Instant::now();
    if how == 0 {
        session.feed(tokens, Want::Last)?;
    } else {
        let mut words_seen = 0;
        let mut see = |_: &fourfold::program::Stage, words: Vec<u32>| {
            words_seen += words.len();
            Ok(())
        };
        session.feed_watching(tokens, Want::Last, &mut Watch { keep: &|_| true, stats: how == 1, see: &mut see })?;
        assert!(words_seen > 0, "nothing was seen");
    }
    Ok(started.elapsed())
}
