//! Planted faults: each is a change of a recorded program or of the bytes that a launch reads, on one layer of an
//! otherwise right engine. `bisect` must name exactly the layer and stage, and no other.
//!
//! To add one: a line in `FAULTS` with the stage that it makes wrong, and an arm in `plant`.

use crate::harness::{cpu, gpu};
use crate::models::fixture;
use fourfold::device::{Buffer, Device};
use fourfold::ops::{Gate, Op, Routes};
use fourfold::program::{Launch, Program, Slice};
use fourfold::trace::bisect::{Reference, StageError, TOLERANCE, bisect};
use fourfold::trace::file::TraceFile;
use fourfold::trace::probe::probe;
use fourfold::{DeviceChoice, Edit, Engine, HostStages, Session};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// Name, layer, and the stage of that layer which is wrong by itself. Even layers of `tiny` slide.
const FAULTS: [(&str, usize, &str); 15] = [
    ("one code of one expert", 2, "mlp.down"),
    ("swapped nibbles", 1, "mlp.up"),
    ("E8M0 bias off by one", 2, "mlp.down"),
    ("block scales shifted by one block", 0, "mlp.up"),
    ("gate and up swapped", 3, "mlp.up"),
    ("SwiGLU clamp dropped", 1, "mlp.up"),
    ("one expert transposed", 2, "mlp.down"),
    ("router weights not renormalised", 1, "mlp.router.weights"),
    ("sink dropped", 3, "attention"),
    ("window off by one", 2, "attention"),
    ("YaRN off on one layer", 1, "attention"),
    ("K cached before rotation", 0, "attention"),
    ("stale scratch in one MoE layer", 2, "mlp.up"),
    ("down-projection bias outside the weighted sum", 1, "mlp.out"),
    ("norm gain not applied on one layer", 3, "mlp_norm"),
];

/// Changes programs of one engine; keeps the buffers that it made, by name, since every step is recorded anew.
struct Planter {
    device: Arc<dyn Device>,
    fault: &'static str,
    layer: usize,
    made: Mutex<HashMap<&'static str, Buffer>>,
}

impl Planter {
    /// The `n`th launch of a kind, counted from the layer's first.
    fn launch(&self, program: &Program, per_layer: usize, n: usize, kind: fn(&Op) -> bool) -> usize {
        let mut found = (0..program.launches.len()).filter(|i| kind(&program.launches[*i].op));
        found.nth(self.layer * per_layer + n).expect("the layer has such a launch")
    }

    fn words(&self, slice: Slice) -> Vec<u32> {
        let mut words = vec![0u32; (slice.bytes / 4) as usize];
        self.device.read(slice, bytemuck::cast_slice_mut(&mut words)).unwrap();
        words
    }

    fn buffer(&self, name: &'static str, bytes: impl FnOnce() -> Vec<u8>) -> Slice {
        let mut made = self.made.lock().unwrap();
        let buffer = made.entry(name).or_insert_with(|| Buffer::with_bytes(&self.device, name, &bytes()).unwrap());
        buffer.slice()
    }

    /// Bind a changed copy of what argument `name` of a launch reads.
    fn change(&self, program: &mut Program, at: usize, name: &'static str, change: impl FnOnce(&mut [u8])) {
        let arg = program.launches[at].args.iter_mut().find(|arg| arg.name == name).unwrap();
        let old = arg.slice;
        arg.slice = self.buffer(name, || {
            let mut words = self.words(old);
            change(bytemuck::cast_slice_mut(&mut words));
            bytemuck::cast_slice(&words).to_vec()
        });
    }

    fn constant(&self, program: &mut Program, at: usize, name: &str, value: f64) {
        program.launches[at].constants.iter_mut().find(|(n, _)| *n == name).unwrap().1 = value;
    }

    fn plant(&self, p: &mut Program) {
        let up = self.launch(p, 1, 0, |op| matches!(op, Op::MoeUp(_)));
        let down = self.launch(p, 1, 0, |op| matches!(op, Op::MoeDown(_)));
        let rope = self.launch(p, 1, 0, |op| matches!(op, Op::Rope(_)));
        let attention = self.launch(p, 1, 0, |op| matches!(op, Op::Attention(_)));
        match self.fault {
            "swapped nibbles" => self.change(p, up, "codes", |b| b.iter_mut().for_each(|b| *b = b.rotate_left(4))),
            // 1.0 becomes 1.5, or so: one product of one output row of one expert.
            "one code of one expert" => self.change(p, down, "codes", |b| b[2 * 128 * 64 + 40 * 64 + 19] ^= 1),
            "E8M0 bias off by one" => self.change(p, down, "scales", |b| b.iter_mut().for_each(|b| *b += 1)),
            "block scales shifted by one block" => self.change(p, up, "scales", |b| b.rotate_left(1)),
            "gate and up swapped" => {
                for (name, row_bytes) in [("codes", 64), ("scales", 4), ("bias", 2)] {
                    self.change(p, up, name, |b| {
                        for pair in b.chunks_exact_mut(2 * row_bytes) {
                            pair.rotate_left(row_bytes);
                        }
                    });
                }
            }
            "SwiGLU clamp dropped" => {
                self.constant(p, up, "LIMIT", 1e30);
                let Op::MoeUp(op) = &mut p.launches[up].op else { unreachable!() };
                op.gate = Gate::Clamped { limit: 1e30, alpha: 1.702 };
            }
            "one expert transposed" => self.change(p, down, "codes", |b| {
                let expert = &mut b[2 * 128 * 64..3 * 128 * 64];
                let old = expert.to_vec();
                let code = |row: usize, column: usize| old[row * 64 + column / 2] >> (column % 2 * 4) & 15;
                for (i, byte) in expert.iter_mut().enumerate() {
                    let (row, column) = (i / 64, i % 64 * 2);
                    *byte = code(column, row) | code(column + 1, row) << 4;
                }
            }),
            "router weights not renormalised" => {
                // Softmax over all eight experts; of each row, the first four are the weights of the chosen.
                let at = self.launch(p, 1, 0, |op| matches!(op, Op::Router(_)));
                let mut router = p.launches[at].clone();
                let [scores, weights] = ["scores", "weights"].map(|name| slice(&router, name));
                let rows = 16;
                let all = Routes {
                    experts: self.buffer("all experts", || vec![0; rows * 8 * 4]),
                    weights: self.buffer("all weights", || vec![0; rows * 8 * 4]),
                };
                let picks: Vec<u32> = (0..rows as u32).map(|row| 2 * row).collect();
                let picks = self.buffer("picks", || bytemuck::cast_slice(&picks).to_vec());
                let mut more = Program::new(p.tokens(), HostStages::default());
                more.router(fourfold::ops::Router { e: 8, a: 8, normalise: true }, scores, all);
                more.take(4, picks, all.weights, weights);
                let nowhere = self.buffer("nowhere", || vec![0; weights.bytes as usize]);
                bind(&mut router, "weights", nowhere);
                p.replace(at, [more.launches, vec![router]].concat());
            }
            "sink dropped" => self.change(p, attention, "sinks", |b| {
                b.chunks_exact_mut(2).for_each(|b| b.copy_from_slice(&half::bf16::from_f32(-1e30).to_le_bytes()));
            }),
            "window off by one" => {
                self.constant(p, attention, "WINDOW", 17.0);
                let Op::Attention(op) = &mut p.launches[attention].op else { unreachable!() };
                op.window = 17;
            }
            "YaRN off on one layer" => self.change(p, rope, "table", |b| {
                let table: &mut [f32] = bytemuck::cast_slice_mut(b);
                for (i, pair) in table.chunks_exact_mut(2).enumerate() {
                    let angle = (i / 16) as f64 * 150000f64.powf(-((i % 16) as f64) / 16.0);
                    pair.copy_from_slice(&[angle.cos() as f32, angle.sin() as f32]);
                }
            }),
            "K cached before rotation" => {
                // Once without rotation, for the cache; once with, for the queries, the keys going nowhere.
                let mut with = p.launches[rope].clone();
                self.change(p, rope, "table", |b| {
                    let table: &mut [f32] = bytemuck::cast_slice_mut(b);
                    table.chunks_exact_mut(2).for_each(|pair| pair.copy_from_slice(&[1.0, 0.0]));
                });
                let bytes = slice(&with, "keys").bytes as usize;
                bind(&mut with, "keys", self.buffer("nowhere", || vec![0; bytes]));
                p.replace(rope, vec![p.launches[rope].clone(), with]);
            }
            "stale scratch in one MoE layer" => p.replace(up, Vec::new()),
            "down-projection bias outside the weighted sum" => {
                // sum_a w_a y_a + sum_a b_a - sum_a w_a b_a: the biases alone are what moe_down makes of zeros.
                let at = self.launch(p, 1, 0, |op| matches!(op, Op::MoeScatter(_)));
                let scatter = p.launches[at].clone();
                let [x, y, delta] = [slice(&p.launches[down], "x"), slice(&scatter, "x"), slice(&scatter, "y")];
                let filled = |name, like: Slice, value: f32| {
                    self.buffer(name, || bytemuck::cast_slice(&vec![value; like.bytes as usize / 4]).to_vec())
                };
                let zeros = filled("zeros", x, 0.0);
                let routes = |weights| Routes { experts: slice(&p.launches[down], "experts"), weights };
                let ones = routes(filled("ones", slice(&scatter, "weights"), 1.0));
                let own = routes(slice(&scatter, "weights"));
                let mut more = Program::new(p.tokens(), HostStages::default());
                for (sign, to, sum, routes) in [("plus", "b", "sum b", ones), ("minus", "-b", "sum -b", own)] {
                    let mut biases = p.launches[down].clone();
                    bind(&mut biases, "x", zeros);
                    bind(&mut biases, "y", filled(to, y, 0.0));
                    let bias = slice(&biases, "bias");
                    let bias = self.buffer(sign, || {
                        let mut words = self.words(bias);
                        if sign == "minus" {
                            words.iter_mut().for_each(|w| *w ^= 0x8000_8000);
                        }
                        bytemuck::cast_slice(&words).to_vec()
                    });
                    bind(&mut biases, "bias", bias);
                    more.launches.push(biases);
                    let (b, sum) = (filled(to, y, 0.0), filled(sum, delta, 0.0));
                    more.moe_scatter(fourfold::ops::MoeScatter { a: 4, d: 128 }, routes, b, sum);
                    more.add(128, sum, delta);
                }
                p.replace(at, [vec![scatter], more.launches].concat());
            }
            "norm gain not applied on one layer" => {
                let norm = self.launch(p, 2, 1, |op| matches!(op, Op::RmsNorm(_)));
                self.change(p, norm, "g", |b| {
                    b.chunks_exact_mut(2).for_each(|b| b.copy_from_slice(&half::bf16::ONE.to_le_bytes()));
                });
            }
            other => unreachable!("{other} is in the list"),
        }
    }
}

fn slice(launch: &Launch, name: &str) -> Slice {
    launch.args.iter().find(|arg| arg.name == name).unwrap().slice
}

fn bind(launch: &mut Launch, name: &str, slice: Slice) {
    launch.args.iter_mut().find(|arg| arg.name == name).unwrap().slice = slice;
}

fn engine(device: &Arc<dyn Device>) -> Engine {
    let builder = Engine::builder().checkpoint(fixture("tiny")).device(DeviceChoice::Own(device.clone()));
    builder.context(60).chunk(16).build().unwrap()
}

fn prompt() -> Vec<u32> {
    let facts: serde_json::Value =
        serde_json::from_slice(&std::fs::read(fixture("tiny").join("golden.json")).unwrap()).unwrap();
    let ids = facts["prompts"]["p33"]["tokens"].as_array().unwrap();
    ids.iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// The engine under test: on the GPU if there is one, else on the twins, too.
fn under_test() -> Arc<dyn Device> {
    gpu().unwrap_or_else(cpu)
}

fn wrong(found: &[StageError]) -> Vec<&str> {
    found.iter().filter(|s| s.local > TOLERANCE).map(|s| s.name.as_str()).collect()
}

fn planted(engine: &Engine, fault: &'static str, layer: usize) -> Session {
    let planter = Planter { device: engine.device().clone(), fault, layer, made: Mutex::default() };
    engine.session_edited(Edit::new(move |program| planter.plant(program))).unwrap()
}

#[test]
fn a_right_engine_has_no_wrong_stage() {
    let (engine, reference) = (engine(&under_test()), engine(&cpu()));
    let mut twins = reference.session().unwrap();
    let found = bisect(|| engine.session(), Reference::Session(&mut twins), &prompt()).unwrap();
    assert!(found.len() > 4 * 12, "{} stages", found.len());
    for stage in &found {
        assert!(stage.local < TOLERANCE / 10.0, "{stage:?}");
        assert!(stage.cumulative < TOLERANCE / 2.0, "{stage:?}");
    }
    let golden = TraceFile::open_part(&fixture("tiny").join("golden.safetensors"), "p33.").unwrap();
    let found = bisect(|| engine.session(), Reference::Trace(&golden), &prompt()).unwrap();
    assert!(found.len() >= 3 + 4 * 6 && wrong(&found).is_empty(), "{found:?}");
}

#[test]
fn bisect_names_every_planted_fault_against_the_twins() {
    let (engine, reference) = (engine(&under_test()), engine(&cpu()));
    let mut missed = Vec::new();
    for (fault, layer, stage) in FAULTS {
        let mut twins = reference.session().unwrap();
        let found = bisect(|| Ok(planted(&engine, fault, layer)), Reference::Session(&mut twins), &prompt()).unwrap();
        let want = format!("layers.{layer}.{stage}");
        let first_to_look_wrong = found.iter().find(|s| s.cumulative > TOLERANCE).map(|s| s.name.as_str());
        if wrong(&found) != [want.as_str()] || first_to_look_wrong != Some(&want) {
            missed.push(format!("{fault}: {want}, but found {:?}, first {first_to_look_wrong:?}", wrong(&found)));
        }
        // A single code moves the logits by less than what is called a difference, and is still found.
        let later = found.iter().rev().take(2).all(|s| s.cumulative > TOLERANCE);
        assert!(later || fault.starts_with("one code"), "{fault} does not reach the logits: {:?}", found.last());
    }
    assert!(missed.is_empty(), "{} of {} faults were not named:\n{}", missed.len(), FAULTS.len(), missed.join("\n"));
}

#[test]
fn bisect_names_every_planted_fault_against_a_trace_from_outside() {
    // transformers' golden has fewer stages: a fault shows in the first one at or after it that the golden has.
    let engine = engine(&under_test());
    let golden = TraceFile::open_part(&fixture("tiny").join("golden.safetensors"), "p33.").unwrap();
    for (fault, layer, stage) in FAULTS {
        let found = bisect(|| Ok(planted(&engine, fault, layer)), Reference::Trace(&golden), &prompt()).unwrap();
        let seen_in = match stage {
            "attention" => "attn_out",
            "mlp.up" | "mlp.down" => "mlp.out",
            "mlp_norm" => "mlp.router.logits",
            other => other,
        };
        let want = format!("layers.{layer}.{seen_in}");
        assert_eq!(wrong(&found).first(), Some(&want.as_str()), "{fault}");
    }
}

#[test]
fn a_right_engine_keeps_neighbours_and_old_data_out() {
    for device in [under_test(), cpu()] {
        let engine = engine(&device);
        // More tokens than the 48 positions of a sliding layer's ring.
        let tokens: Vec<u32> = prompt().into_iter().chain(prompt()).take(58).collect();
        let trials = probe(&engine, || engine.session(), &tokens, &prompt()[3..30]).unwrap();
        assert!(trials.len() >= 8 && trials.iter().all(|t| t.parting.is_none()), "{trials:?}");
    }
}

#[test]
fn probe_finds_stale_scratch() {
    // The first layer's experts read what the step before left behind: only running otherwise shows it.
    let engine = engine(&under_test());
    let stale = || Ok(planted(&engine, "stale scratch in one MoE layer", 0));
    let trials = probe(&engine, stale, &prompt()[..20], &prompt()[3..30]).unwrap();
    for name in ["after other tokens in the same session", "one token a step", "over scratch and cache full of NaN"] {
        let parting = trials.iter().find(|t| t.name == name).unwrap().parting.as_ref();
        assert_eq!(parting.map(|p| p.stage.as_str()), Some("layers.0.mlp.up"), "{name}: {trials:?}");
    }
}

#[test]
fn tracing_changes_no_bit_and_adds_nothing_when_off() {
    use fourfold::{Want, Watch};
    for device in [under_test(), cpu()] {
        let engine = engine(&device);
        let plain = engine.session().unwrap().feed(&prompt(), Want::All).unwrap();
        for stats in [false, true] {
            let mut seen = 0;
            let mut see = |_: &fourfold::program::Stage, _: Vec<u32>| {
                seen += 1;
                Ok(())
            };
            let mut watch = Watch { keep: &|_| true, stats, see: &mut see };
            let traced = engine.session().unwrap().feed_watching(&prompt(), Want::All, &mut watch).unwrap();
            let bits = |logits: &[f32]| logits.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert!(bits(&plain) == bits(&traced), "stats: {stats}");
            assert!(seen > 100, "{seen}");
        }
    }
    // What a program launches does not depend on whether its stages are looked at: naming them adds nothing.
    let launches = Arc::new(Mutex::new(Vec::new()));
    let note = launches.clone();
    let engine = engine(&cpu());
    let edit = Edit::new(move |program: &mut Program| {
        note.lock().unwrap().push((program.launches.len(), program.stages.len()));
        program.stages.clear();
    });
    let unnamed = engine.session_edited(edit).unwrap().feed(&prompt(), fourfold::Want::All).unwrap();
    assert_eq!(unnamed, engine.session().unwrap().feed(&prompt(), fourfold::Want::All).unwrap());
    let launches = launches.lock().unwrap();
    assert!(launches.iter().all(|l| *l == (1 + 4 * 13, 1 + 4 * 12)), "{launches:?}");
}
