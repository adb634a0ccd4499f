//! Planted faults: each is a change of a recorded program or of the bytes that a launch reads, on one layer of an
//! otherwise right engine. `bisect` must name exactly the layer and stage, and no other.
//!
//! To add one: a line in `FAULTS` with its model and the stage that it makes wrong, and an arm in `plant`.

mod loading;

use crate::families::fixture;
use crate::harness::{cpu, gpu, matrix_gpu};
use fourfold::device::{Buffer, Device, Limits, cpu::Cpu};
use fourfold::format::{e4m3, nvfp4};
use fourfold::ops::{ActScale, Gate, Layout, Op, Routes, StageActivation, Staging, staged_words};
use fourfold::program::{Launch, Program, Slice};
use fourfold::trace::bisect::{Reference, StageError, TOLERANCE, bisect};
use fourfold::trace::file::TraceFile;
use fourfold::trace::probe::probe;
use fourfold::{Activations, DeviceChoice, Edit, Engine, HostStages, Session};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// A checkpoint, what enters its FP4 products, and what transformers recorded of one of its prompts.
#[derive(Clone, Copy, PartialEq)]
struct Model {
    fixture: &'static str,
    activations: Activations,
    golden: &'static str,
    prompt: &'static str,
}

/// MXFP4 experts, four layers; the even ones slide.
const GPT_OSS: Model =
    Model { fixture: "gpt_oss/tiny", activations: Activations::F32, golden: "golden.safetensors", prompt: "p33." };
/// NVFP4 with multipliers, three layers; in the last one gate and up have different ones.
const MODELOPT: Model = Model {
    fixture: "qwen3_moe/modelopt",
    activations: Activations::F32,
    golden: "golden_w4a16.safetensors",
    prompt: "p2.",
};
const MODELOPT_STATIC: Model =
    Model { activations: Activations::Nvfp4Static, golden: "golden_w4a4_static.safetensors", ..MODELOPT };
/// NVFP4 with divisors; every expert has an input scale of its own for its second matrix.
const COMPRESSED_STATIC: Model = Model { fixture: "qwen3_moe/compressed_tensors", ..MODELOPT_STATIC };
const COMPRESSED_TOKEN: Model =
    Model { activations: Activations::Nvfp4Token, golden: "golden_w4a4_dyn_token.safetensors", ..COMPRESSED_STATIC };
const MODELS: [Model; 5] = [GPT_OSS, MODELOPT, MODELOPT_STATIC, COMPRESSED_STATIC, COMPRESSED_TOKEN];

/// Name, model, layer, and the stage of that layer which is wrong by itself.
const FAULTS: [(&str, Model, usize, &str); 21] = [
    ("one code of one expert", GPT_OSS, 2, "mlp.down"),
    ("swapped nibbles", GPT_OSS, 1, "mlp.up"),
    ("E8M0 bias off by one", GPT_OSS, 2, "mlp.down"),
    ("block scales shifted by one block", GPT_OSS, 0, "mlp.up"),
    ("gate and up swapped", GPT_OSS, 3, "mlp.up"),
    ("SwiGLU clamp dropped", GPT_OSS, 1, "mlp.up"),
    ("one expert transposed", GPT_OSS, 2, "mlp.down"),
    ("router weights not renormalised", GPT_OSS, 1, "mlp.router.weights"),
    ("sink dropped", GPT_OSS, 3, "attention"),
    ("window off by one", GPT_OSS, 2, "attention"),
    ("YaRN off on one layer", GPT_OSS, 1, "attention"),
    ("K cached before rotation", GPT_OSS, 0, "attention"),
    ("stale scratch in one MoE layer", GPT_OSS, 2, "mlp.up"),
    ("down-projection bias outside the weighted sum", GPT_OSS, 1, "mlp.out"),
    ("norm gain not applied on one layer", GPT_OSS, 3, "mlp_norm"),
    ("NVFP4 global inverted", MODELOPT, 1, "mlp.down"),
    ("alpha of the measured amax", MODELOPT_STATIC, 1, "mlp.up"),
    ("swizzled scales read as linear", COMPRESSED_TOKEN, 0, "attn_out"),
    ("gate's global used for up", MODELOPT, 2, "mlp.up"),
    ("E4M3 scales read as E8M0", COMPRESSED_TOKEN, 1, "mlp.down"),
    ("missing input_scale read as 0", COMPRESSED_STATIC, 1, "mlp.down"),
];

/// Hidden size of the Qwen3-MoE fixtures, what attention gives, and the experts' inner size.
const QWEN: [usize; 3] = [96, 128, 48];

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
        let layout = self.layout(&program.launches[at], name);
        let arg = program.launches[at].args.iter_mut().find(|arg| arg.name == name).unwrap();
        let old = arg.slice;
        arg.slice = self.buffer(name, || {
            let mut stored = self.stored(old, layout);
            change(&mut stored);
            let mut words = self.words(old);
            layout.put(&stored, bytemuck::cast_slice_mut(&mut words));
            bytemuck::cast_slice(&words).to_vec()
        });
    }

    /// How an argument's bytes are laid out.
    fn layout(&self, launch: &Launch, name: &str) -> Layout {
        let file = launch.fillings.iter().find(|(slot, _)| *slot == "weights").map(|(_, file)| *file);
        let k = launch.constants.iter().find(|(name, _)| *name == "K").map_or(0, |(_, k)| *k as usize);
        match (self.device.limits().laid_out, name, file) {
            (true, "codes", Some("weights_mxfp4" | "weights_nvfp4")) => Layout::Codes,
            (true, "scales", Some("weights_mxfp4")) => Layout::Scales(k / 32),
            (true, "scales", Some("weights_nvfp4")) => Layout::Scales(k / 16),
            _ => Layout::Stored,
        }
    }

    /// The bytes of a slice as they lie on disk.
    fn stored(&self, slice: Slice, layout: Layout) -> Vec<u8> {
        let words = self.words(slice);
        let laid_out: &[u8] = bytemuck::cast_slice(&words);
        let whole = match layout {
            Layout::Scales(row) => laid_out.len() / (4 * row) * 4 * row,
            _ => laid_out.len(),
        };
        let mut stored = vec![0; whole];
        layout.get(laid_out, &mut stored);
        stored
    }

    fn change_floats(&self, program: &mut Program, at: usize, name: &'static str, change: impl FnOnce(&mut [f32])) {
        self.change(program, at, name, |bytes| change(bytemuck::cast_slice_mut(bytes)));
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
                let router = self.launch(p, 1, 0, |op| matches!(op, Op::Router(_)));
                let routes = |weights| Routes { experts: slice(&p.launches[router], "experts"), weights };
                let ones = routes(filled("ones", slice(&scatter, "weights"), 1.0));
                let own = routes(slice(&scatter, "weights"));
                let mut more = Program::new(p.tokens(), HostStages::default());
                let between = filled("between", delta, 0.0);
                let steps =
                    [("plus", "b", "sum b", ones, [delta, between]), ("minus", "-b", "sum -b", own, [between, delta])];
                for (sign, to, sum, routes, [from, total]) in steps {
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
                    more.add(128, from, sum, total);
                }
                p.replace(at, [vec![scatter], more.launches].concat());
            }
            "norm gain not applied on one layer" => {
                let norm = self.launch(p, 2, 1, |op| matches!(op, Op::RmsNorm(_)));
                self.change(p, norm, "g", |b| {
                    b.chunks_exact_mut(2).for_each(|b| b.copy_from_slice(&half::bf16::ONE.to_le_bytes()));
                });
            }
            // What is to be divided by, multiplied.
            "NVFP4 global inverted" => self.change_floats(p, down, "row_scales", |s| {
                s.iter_mut().for_each(|s| *s = 1.0 / *s);
            }),
            "gate's global used for up" => self.change_floats(p, up, "row_scales", |s| {
                s.chunks_exact_mut(2 * QWEN[2]).for_each(|expert| expert.copy_within(..QWEN[2], QWEN[2]));
            }),
            "swizzled scales read as linear" => {
                let out = self.launch(p, 3, 1, |op| matches!(op, Op::Linear(_)));
                self.change(p, out, "scales", |b| {
                    // The padding of 96 rows to 128 is read as scales, too; what lies past the end is not.
                    let swizzled = nvfp4::swizzle(b, QWEN[0], QWEN[1] / nvfp4::BLOCK);
                    b.copy_from_slice(&swizzled[..b.len()]);
                });
            }
            "E4M3 scales read as E8M0" => {
                // A byte c then says 2^(c - 127), which E4M3 cannot. So a row's largest power goes into the row's f32,
                // and what remains, 2^(c - largest), is 2^8 and less in E4M3. What is 2^18 times fainter than the
                // row's largest block becomes nothing instead of next to nothing.
                let blocks = QWEN[2] / nvfp4::BLOCK;
                let scales = self.stored(slice(&p.launches[down], "scales"), self.layout(&p.launches[down], "scales"));
                let largest: Vec<i32> =
                    scales.chunks_exact(blocks).map(|row| i32::from(*row.iter().max().unwrap())).collect();
                self.change_floats(p, down, "row_scales", |s| {
                    s.iter_mut().zip(&largest).for_each(|(s, top)| *s *= 2f32.powi(top - 127 - 8));
                });
                self.change(p, down, "scales", |b| {
                    for (row, top) in b.chunks_exact_mut(blocks).zip(&largest) {
                        row.iter_mut().for_each(|c| *c = e4m3::encode(2f32.powi(i32::from(*c) - top + 8)));
                    }
                });
            }
            "alpha of the measured amax" => {
                // The codes are those of the file's scale; the rows are quantised once more for the scale alone.
                let rows = 16;
                let room = |name, words: usize| self.buffer(name, || vec![0; rows * words * 4]);
                let to = Staging {
                    rows: room("rows by amax", staged_words(QWEN[0])),
                    scales: room("scales by amax", 1),
                    report: room("report by amax", 2),
                    amaxes: room("amaxes", 1),
                };
                let staged = self.launch(p, 4, 2, |op| matches!(op, Op::StageActivation(_)));
                let x = slice(&p.launches[staged], "x");
                let op = StageActivation { k: QWEN[0] as u32, rows_per_token: 1, share: 1, scale: ActScale::Token };
                let mut more = Program::new(p.tokens(), HostStages::default());
                more.stage_activation(op, x, x, None, &to); // a row's own scale does not ask for the step
                let mut product = p.launches[up].clone();
                bind(&mut product, "x_scales", to.scales);
                p.replace(up, [more.launches, vec![product]].concat());
            }
            "missing input_scale read as 0" => {
                let staged = self.launch(p, 4, 3, |op| matches!(op, Op::StageActivation(_)));
                self.change_floats(p, staged, "input_scales", |s| s[5] = 0.0);
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

impl Model {
    fn engine(self, device: &Arc<dyn Device>) -> Engine {
        let builder = Engine::builder().checkpoint(fixture(self.fixture)).device(DeviceChoice::Own(device.clone()));
        builder.context(60).chunk(16).activations(self.activations).build().unwrap()
    }

    fn golden(self) -> TraceFile {
        TraceFile::open_part(&fixture(self.fixture).join(self.golden), self.prompt).unwrap()
    }

    /// The golden's tokens; gpt-oss's stand in a file of their own.
    fn tokens(self) -> Vec<u32> {
        self.golden().tokens().map_or_else(prompt, <[u32]>::to_vec)
    }

    fn faults(self) -> impl Iterator<Item = (&'static str, usize, &'static str)> {
        FAULTS.into_iter().filter(move |f| f.1 == self).map(|(fault, _, layer, stage)| (fault, layer, stage))
    }
}

impl std::fmt::Display for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.fixture, self.golden)
    }
}

/// gpt-oss's.
fn engine(device: &Arc<dyn Device>) -> Engine {
    GPT_OSS.engine(device)
}

fn prompt() -> Vec<u32> {
    let facts: serde_json::Value =
        serde_json::from_slice(&std::fs::read(fixture(GPT_OSS.fixture).join("golden.json")).unwrap()).unwrap();
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
fn devices_that_keep_caches_in_other_parts_are_refused() {
    let small: Arc<dyn Device> = Arc::new(Cpu::with_limits(Limits { max_binding_bytes: 100_000, ..cpu().limits() }));
    let engine = |device: &Arc<dyn Device>| {
        let builder = Engine::builder().checkpoint(fixture(GPT_OSS.fixture)).device(DeviceChoice::Own(device.clone()));
        builder.context(400).chunk(16).build().unwrap() // 400 x 256 bytes of keys
    };
    let (engine, reference) = (engine(&small), engine(&cpu()));
    let mut twins = reference.session().unwrap();
    let refused = bisect(|| engine.session(), Reference::Session(&mut twins), &prompt()).unwrap_err().to_string();
    assert!(refused.contains("max-binding-bytes") && refused.contains("other parts"), "{refused}");
}

/// A prompt's kernels are others where there are matrix units; without a GPU that has any, their twins alone run.
#[test]
fn a_right_engine_by_matrix_units_has_no_wrong_stage() {
    let like: Arc<dyn Device> = Arc::new(Cpu::with_limits(Limits { matrix: true, ..cpu().limits() }));
    for model in MODELS {
        let reference = model.engine(&like);
        for device in [Some(like.clone()), matrix_gpu()].into_iter().flatten() {
            let engine = model.engine(&device);
            let mut twins = reference.session().unwrap();
            let found = bisect(|| engine.session(), Reference::Session(&mut twins), &model.tokens()).unwrap();
            assert!(found.len() > engine.config().num_hidden_layers * 12 && wrong(&found).is_empty(), "{found:?}");
        }
    }
    let mut plain = engine(&cpu()).session().unwrap();
    let refused = bisect(|| engine(&like).session(), Reference::Session(&mut plain), &prompt()).unwrap_err();
    assert!(refused.to_string().contains("matrix"), "{refused}");
}

#[test]
fn sessions_of_other_sizes_are_refused() {
    let other = |context, chunk| {
        let builder = Engine::builder().checkpoint(fixture(GPT_OSS.fixture)).device(DeviceChoice::Own(cpu()));
        builder.context(context).chunk(chunk).build().unwrap()
    };
    for (context, chunk, words) in [(60, 8, "chunk: "), (80, 16, "context: ")] {
        let mut twins = other(context, chunk).session().unwrap();
        let refused = bisect(|| engine(&cpu()).session(), Reference::Session(&mut twins), &prompt()).unwrap_err();
        assert!(refused.to_string().starts_with(words), "{refused}");
    }
}

#[test]
fn a_right_engine_has_no_wrong_stage() {
    for model in MODELS {
        let (engine, reference) = (model.engine(&under_test()), model.engine(&cpu()));
        let layers = engine.config().num_hidden_layers;
        let mut twins = reference.session().unwrap();
        let found = bisect(|| engine.session(), Reference::Session(&mut twins), &model.tokens()).unwrap();
        assert!(found.len() > layers * 12, "{model}: {} stages", found.len());
        let staged = found.iter().filter(|s| s.name.ends_with(".staged")).count();
        assert_eq!(staged, if model.activations == Activations::F32 { 0 } else { 4 * layers }, "{model}");
        for stage in &found {
            assert!(stage.local < TOLERANCE / 10.0, "{model}: {stage:?}");
            assert!(stage.cumulative < TOLERANCE / 2.0, "{model}: {stage:?}");
        }
        let found = bisect(|| engine.session(), Reference::Trace(&model.golden()), &model.tokens()).unwrap();
        assert!(found.len() >= 3 + layers * 6 && wrong(&found).is_empty(), "{model}: {found:?}");
    }
}

#[test]
fn bisect_names_every_planted_fault_against_the_twins() {
    let mut missed = Vec::new();
    let mut planted_here = 0;
    for model in MODELS {
        let (engine, reference) = (model.engine(&under_test()), model.engine(&cpu()));
        for (fault, layer, stage) in model.faults() {
            planted_here += 1;
            let mut twins = reference.session().unwrap();
            let wrong_session = || Ok(planted(&engine, fault, layer));
            let found = bisect(wrong_session, Reference::Session(&mut twins), &model.tokens()).unwrap();
            let want = format!("layers.{layer}.{stage}");
            let first_to_look_wrong = found.iter().find(|s| s.cumulative > TOLERANCE).map(|s| s.name.as_str());
            if wrong(&found) != [want.as_str()] || first_to_look_wrong != Some(&want) {
                missed.push(format!("{fault}: {want}, but found {:?}, first {first_to_look_wrong:?}", wrong(&found)));
            }
            // A single code moves the logits by less than what is called a difference, and is still found.
            let later = found.iter().rev().take(2).all(|s| s.cumulative > TOLERANCE);
            assert!(later || fault.starts_with("one code"), "{fault} does not reach the logits: {:?}", found.last());
        }
    }
    assert_eq!(planted_here, FAULTS.len(), "every fault's model is in the list");
    assert!(missed.is_empty(), "{} of {} faults were not named:\n{}", missed.len(), FAULTS.len(), missed.join("\n"));
}

#[test]
fn bisect_names_every_planted_fault_against_a_trace_from_outside() {
    // transformers' goldens have fewer stages: a fault shows in the first one at or after it that the golden has.
    for model in MODELS {
        let (engine, golden) = (model.engine(&under_test()), model.golden());
        for (fault, layer, stage) in model.faults() {
            let wrong_session = || Ok(planted(&engine, fault, layer));
            let found = bisect(wrong_session, Reference::Trace(&golden), &model.tokens()).unwrap();
            let seen_in = match stage {
                "attention" => "attn_out",
                "mlp.up" | "mlp.down" => "mlp.out",
                "mlp_norm" => "mlp.router.logits", // GPT_OSS's has no mlp_norm
                other => other,
            };
            let want = format!("layers.{layer}.{seen_in}");
            assert_eq!(wrong(&found).first(), Some(&want.as_str()), "{fault}");
        }
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
        note.lock().unwrap().push((program.tokens(), program.launches.len(), program.stages.len()));
        program.stages.clear();
    });
    let unnamed = engine.session_edited(edit).unwrap().feed(&prompt(), fourfold::Want::All).unwrap();
    assert_eq!(unnamed, engine.session().unwrap().feed(&prompt(), fourfold::Want::All).unwrap());
    let launches = launches.lock().unwrap();
    // More than eight routes, four a token, are grouped: a launch a layer.
    let want = |tokens: u32| if tokens > 2 { 1 + 4 * 14 } else { 1 + 4 * 13 };
    assert!(launches.iter().all(|(tokens, n, stages)| *n == want(*tokens) && *stages == 1 + 4 * 12), "{launches:?}");
}
