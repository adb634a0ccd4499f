//! `verify`: a right engine holds, every kernel is covered, and each planted fault is caught by the check that is there
//! for it. The faults stand in a device that changes programs on their way, as a bug of a kernel's host side would.

use crate::families::fixture;
use crate::harness::{cpu, gpu};
use fourfold::device::{Buffer, Device, Limits, cpu::Cpu};
use fourfold::ops::{KERNELS, KvCache, Op};
use fourfold::program::{BufferId, Launch, Program, Role, Slice};
use fourfold::verify::{Line, Options, Part, covered, verify, verify_sessions};
use fourfold::{Activations, DeviceChoice, Edit, Engine, EngineBuilder, HostStages, Result, Want};
use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex};

/// What is wrong with a device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// One row of a step has its keys shared among segments, several rows have not.
    SplitByBatch,
    /// The tiles of steps of many rows add in another order: what they give is off by a bit.
    TileOff,
    /// All sequences of a step take the first one's pages.
    SharedPages,
    /// Norms take the constant of whoever ran before.
    LastModelsConstant,
}

/// A device with a fault.
#[derive(Debug)]
pub struct Faulty {
    inner: Arc<dyn Device>,
    fault: Fault,
    /// Page tables that were made for others.
    tables: Mutex<HashMap<BufferId, Buffer>>,
    last_eps: Mutex<Option<f64>>,
}

pub fn faulty(inner: Arc<dyn Device>, fault: Fault) -> Arc<dyn Device> {
    Arc::new(Faulty { inner, fault, tables: Mutex::default(), last_eps: Mutex::default() })
}

fn slice(launch: &Launch, name: &str) -> Option<Slice> {
    launch.args.iter().find(|arg| arg.name == name).map(|arg| arg.slice)
}

impl Faulty {
    /// Every launch of the program replaced by what the fault makes of it.
    fn change(&self, program: &mut Program) -> Result<()> {
        let by_model = is_a_models(program);
        for at in 0..program.launches.len() {
            let mut launch = program.launches[at].clone();
            match (self.fault, launch.op) {
                // Where the cache is one part: then the merge comes next.
                (Fault::SplitByBatch, Op::Attention(op))
                    if op.segments > 0 && op.held == [0, op.hk] && program.tokens() > 1 =>
                {
                    let of = |name| slice(&launch, name).expect("attention has it");
                    let merge = &program.launches[at + 1];
                    let cache = KvCache {
                        format: op.format,
                        page: op.page,
                        pages: op.pages,
                        table: of("pages"),
                        keys: of("keys"),
                        values: of("values"),
                    };
                    let one = Role::Generated { reach: 1 };
                    let mut whole = Program::new(program.tokens(), HostStages::default()).of(one);
                    let to = slice(merge, "a").expect("a merge gives it");
                    // One workgroup for all keys wants no step.
                    let slices = [of("rows"), of("qkv"), of("parts")];
                    whole.attention(op, of("rows"), slices, &[cache], slice(merge, "sinks"), to);
                    // The merge in its place does the same once more.
                    program.replace(at, whole.launches.clone());
                    program.replace(at + 1, whole.launches);
                }
                (Fault::SharedPages, Op::Rope(_) | Op::Attention(_)) if by_model => {
                    let pages = if let Op::Rope(op) = launch.op { op.pages } else { attention_pages(&launch) };
                    let arg = launch.args.iter_mut().find(|arg| arg.name == "pages").expect("it has a table");
                    arg.slice = self.first_pages(arg.slice, pages)?;
                    program.replace(at, vec![launch]);
                }
                (Fault::LastModelsConstant, Op::RmsNorm(_) | Op::AddNorm(_)) if by_model => {
                    if let Some(eps) = *self.last_eps.lock().unwrap() {
                        launch.constants.iter_mut().filter(|(name, _)| *name == "EPS").for_each(|c| c.1 = eps);
                        match &mut launch.op {
                            Op::RmsNorm(op) => op.eps = eps as _,
                            Op::AddNorm(op) => op.norm.eps = eps as _,
                            _ => unreachable!("matched above"),
                        }
                        program.replace(at, vec![launch]);
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// A table that gives every sequence the pages of the first.
    fn first_pages(&self, table: Slice, pages: u32) -> Result<Slice> {
        let mut words = vec![0u32; (table.bytes / 4) as usize];
        self.inner.read(table, bytemuck::cast_slice_mut(&mut words))?;
        let (first, rest) = words.split_at_mut(pages as usize);
        rest.chunks_mut(pages as usize).for_each(|row| row.copy_from_slice(&first[..row.len()]));
        let mut tables = self.tables.lock().unwrap();
        let made = match tables.entry(table.buffer) {
            Entry::Occupied(made) => made.into_mut(),
            Entry::Vacant(none) => none.insert(Buffer::new(&self.inner, "pages of the first", table.bytes)?),
        };
        // Pages are handed out as sequences grow: every launch sees them as they are.
        self.inner.write(made.slice(), bytemuck::cast_slice(&words))?;
        Ok(made.slice())
    }

    /// The last bit of each number that such a tile gave.
    fn flip(&self, program: &Program) -> Result<()> {
        for launch in &program.launches {
            let wide = launch.constants.contains(&("ROWS", 32.0));
            if let (Op::Linear(_), true, Some(y)) = (launch.op, wide, slice(launch, "y")) {
                let mut words = vec![0u32; (y.bytes / 4) as usize];
                self.inner.read(y, bytemuck::cast_slice_mut(&mut words))?;
                words.iter_mut().for_each(|word| *word ^= 1);
                self.inner.write(y, bytemuck::cast_slice(&words))?;
            }
        }
        Ok(())
    }
}

fn attention_pages(launch: &Launch) -> u32 {
    let Op::Attention(op) = launch.op else { unreachable!("the caller looked") };
    op.pages
}

/// A step of a model, not a case of `verify` or of the oracle.
fn is_a_models(program: &Program) -> bool {
    matches!(program.launches.first().map(|launch| launch.op), Some(Op::Embed(_))) && program.launches.len() > 2
}

/// The constant of a model's norms.
fn eps(program: &Program) -> Option<f64> {
    let norms = |op: &Op| matches!(op, Op::RmsNorm(_) | Op::AddNorm(_));
    let launch = program.launches.iter().find(|launch| norms(&launch.op))?;
    launch.constants.iter().find(|(name, _)| *name == "EPS").map(|(_, eps)| *eps)
}

impl Device for Faulty {
    fn alloc(&self, label: &str, bytes: u64) -> Result<BufferId> {
        self.inner.alloc(label, bytes)
    }
    fn free(&self, id: BufferId) {
        self.inner.free(id);
    }
    fn write(&self, to: Slice, bytes: &[u8]) -> Result<()> {
        self.inner.write(to, bytes)
    }
    fn read(&self, from: Slice, bytes: &mut [u8]) -> Result<()> {
        self.inner.read(from, bytes)
    }
    fn prepare(&self, _: &Program) -> Result<()> {
        Ok(()) // what runs is another program
    }
    fn run(&self, program: &Program) -> Result<()> {
        let mut changed = program.clone();
        self.change(&mut changed)?;
        if is_a_models(program) {
            *self.last_eps.lock().unwrap() = eps(program);
        }
        self.inner.run(&changed)?;
        if self.fault == Fault::TileOff { self.flip(program) } else { Ok(()) }
    }
    fn wait(&self) -> Result<()> {
        self.inner.wait()
    }
    fn limits(&self) -> Limits {
        self.inner.limits()
    }
    fn describe(&self) -> String {
        format!("{} with {:?}", self.inner.describe(), self.fault)
    }
}

/// The engine under test: on the GPU if there is one, else on the twins.
pub fn under_test() -> Arc<dyn Device> {
    gpu().unwrap_or_else(cpu)
}

fn builder(name: &str, device: &Arc<dyn Device>) -> EngineBuilder {
    Engine::builder().checkpoint(fixture(name)).device(DeviceChoice::Own(device.clone())).context(192).chunk(32)
}

fn engine(name: &str, device: &Arc<dyn Device>) -> Engine {
    builder(name, device).build().unwrap()
}

fn options(parts: &[Part]) -> Options {
    Options { parts: parts.to_vec(), ..Options::default() }
}

/// The names of the checks that a fault on a device fails.
fn caught(model: &str, fault: Fault, parts: &[Part]) -> BTreeSet<String> {
    let engine = engine(model, &faulty(under_test(), fault));
    wrong(&verify(&engine, &options(parts), &mut |_| ()).unwrap())
}

fn wrong(lines: &[Line]) -> BTreeSet<String> {
    lines.iter().filter(|line| !line.holds()).map(|line| line.name.clone()).collect()
}

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn a_right_engine_holds() {
    // Twins that say they have matrix units run the cases of those kernels: that the cases are right shows without any.
    let matrix: Arc<dyn Device> = Arc::new(Cpu::with_limits(Limits { matrix: true, ..cpu().limits() }));
    for (device, parts) in
        [(under_test(), &Part::ALL[..]), (cpu(), &[Part::Oracle, Part::Steps]), (matrix, &[Part::Kernels, Part::Rows])]
    {
        let mut seen = 0;
        let lines = verify(&engine("gpt_oss/tiny", &device), &options(parts), &mut |_| seen += 1).unwrap();
        for line in &lines {
            assert!(line.holds() && line.cases > 0 && line.detail.is_empty(), "{line:?}");
        }
        assert!(parts.iter().all(|part| lines.iter().any(|line| line.part == *part)), "{lines:?}");
        assert!(seen == lines.len() && seen > 8, "{seen}");
        let by_matrix = lines.iter().filter(|line| line.name.ends_with("_matrix")).count();
        assert_eq!(by_matrix, if device.limits().matrix { 6 } else { 0 });
    }
}

#[test]
fn other_families_and_quantised_rows_hold() {
    for (name, activations) in [
        ("qwen3_moe/modelopt", Activations::Nvfp4Static),
        ("qwen3_moe/compressed_tensors", Activations::Nvfp4Token),
        ("dense/llama", Activations::F32),
    ] {
        let engine = builder(name, &under_test()).activations(activations).build().unwrap();
        let lines = verify(&engine, &options(&[Part::Steps]), &mut |_| ()).unwrap();
        assert!(lines.len() == 8 && wrong(&lines).is_empty(), "{name}: {lines:?}");
    }
    let dynamic = builder("qwen3_moe/modelopt", &cpu()).activations(Activations::Nvfp4Dynamic).build().unwrap();
    let refused = verify(&dynamic, &options(&Part::ALL), &mut |_| ()).unwrap_err().to_string();
    assert!(refused.contains("nvfp4-token"), "{refused}");
}

#[test]
fn a_cache_in_parts_holds() {
    // Room for all but the keys of a layer that sees everything.
    let limits = Limits { max_binding_bytes: 140_000, ..cpu().limits() };
    let small: Arc<dyn Device> = Arc::new(Cpu::with_limits(limits));
    let engine = builder("gpt_oss/tiny", &small).context(600).build().unwrap();
    let lines = verify(&engine, &options(&[Part::Steps]), &mut |_| ()).unwrap();
    assert!(lines.len() == 8 && wrong(&lines).is_empty(), "{lines:?}");
}

#[test]
fn every_kernel_with_every_filling_is_covered() {
    let launches = covered().unwrap();
    let mut missing = Vec::new();
    for kernel in KERNELS {
        let of: Vec<&Launch> = launches.iter().filter(|launch| launch.kernel.name == kernel.name).collect();
        if of.is_empty() {
            missing.push(kernel.name.to_owned());
        }
        // The other slots are filled by the adapter.
        for slot in kernel.slots.iter().filter(|slot| !["e2m1", "fold", "lanes", "reduce"].contains(&slot.name)) {
            for file in slot.fillings {
                // Matrix units take formats whose codes fit halves only.
                let filled = of.iter().any(|launch| launch.fillings.contains(&(slot.name, file)));
                let halves = !kernel.name.ends_with("_matrix") || !file.starts_with("weights_");
                if !filled && halves {
                    missing.push(format!("{} with {file}", kernel.name));
                }
            }
        }
    }
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn a_split_that_follows_the_batch_is_caught() {
    let found = caught("gpt_oss/tiny", Fault::SplitByBatch, &[Part::Rows, Part::Steps]);
    // A session alone stands among the others, so that two runs of several rows are not only held to each other.
    let want = ["attention of generated rows", "several drawn tokens in a step", "among sessions of a scheduler"];
    assert_eq!(found, names(&want));
}

#[test]
fn a_tile_that_adds_otherwise_is_caught() {
    let found = caught("gpt_oss/tiny", Fault::TileOff, &[Part::Rows]);
    // In the second several rows take `linear`, and one does not.
    assert_eq!(found, names(&["linear", "linear_add, norm_moe_up"]));
}

#[test]
fn a_neighbour_that_leaks_is_caught() {
    let found = caught("gpt_oss/tiny", Fault::SharedPages, &[Part::Kernels, Part::Rows, Part::Steps]);
    assert_eq!(found, names(&["among sessions of a scheduler"]));
}

#[cfg(feature = "default-model")] // without it `verify`'s second engine is of the same model
#[test]
fn a_constant_of_another_model_is_caught() {
    let found = caught("qwen3_moe/modelopt", Fault::LastModelsConstant, &[Part::Steps]);
    assert_eq!(found, names(&["after a second engine came and went"]));
}

#[test]
fn scratch_that_is_read_before_it_is_written_is_caught() {
    let engine = engine("gpt_oss/tiny", &under_test());
    // The experts of the first layer are left out: what stands there is the step before's, or nobody's.
    let stale = || {
        engine.session_edited(Edit::new(|program| {
            let up = program.launches.iter().position(|launch| matches!(launch.op, Op::MoeUp(_)));
            up.into_iter().for_each(|up| program.replace(up, Vec::new()));
        }))
    };
    let lines = verify_sessions(&engine, &stale, &options(&[Part::Steps]), &mut |_| ()).unwrap();
    let found = wrong(&lines);
    for name in ["again", "in other chunks", "scratch full of NaN before each step"] {
        assert!(found.contains(name), "{name}: {found:?}");
    }
    let line = lines.iter().find(|line| line.name == "again").unwrap();
    assert!(line.detail.starts_with("in the same session: position 0 (prompt)"), "{}", line.detail);
    assert_eq!(line.tokens.len(), Options::default().prompt, "the prompt for `probe`");
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn strict_gives_a_token_the_same_bits_as_prompt_and_as_drawn() {
    let tokens: Vec<u32> = (0..170).map(|i| (i * 37 + i * i) % 500).collect();
    for device in [under_test(), cpu()] {
        let run = |strict: bool| {
            let engine = builder("gpt_oss/tiny", &device).strict(strict).build().unwrap();
            assert_eq!(engine.strict(), strict);
            let given = engine.session().unwrap().feed(&tokens, Want::All).unwrap();
            let drawn = engine.session().unwrap().feed_drawn(&tokens, Want::All).unwrap();
            (bits(&given), bits(&drawn))
        };
        let (given, drawn) = run(true);
        assert!(given == drawn, "strict: other bits as prompt than as drawn");
        let (given, also_drawn) = run(false);
        assert!(drawn == also_drawn, "strict changes prompts only");
        assert!(given != drawn, "the roles do not differ, so the test shows nothing");
    }
    let strict = builder("gpt_oss/tiny", &under_test()).strict(true).build().unwrap();
    let lines = verify(&strict, &options(&[Part::Steps]), &mut |_| ()).unwrap();
    assert!(lines.len() == 9 && wrong(&lines).is_empty(), "{lines:?}");
}

#[test]
fn the_command_prints_a_table_and_json() {
    use crate::cli::{fails, fourfold, out, root};
    let dir = root("tests/fixtures/gpt_oss/tiny");
    let dir = dir.to_str().unwrap();
    let common = ["verify", "--model", dir, "--device", "cpu", "--prompt-tokens", "20", "-n", "2"];
    let table = fourfold(&[&common, &["--only", "oracle,steps"][..]].concat());
    assert!(table.status.success(), "{}", crate::cli::err(&table));
    let text = out(&table);
    assert!(text.contains("known answers") && text.contains("in other chunks"), "{text}");
    assert!(text.contains("All 9 checks hold") && !text.contains("rms_norm"), "{text}");
    let json = fourfold(&[&common, &["--only", "steps", "--strict", "--json"][..]].concat());
    let facts: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!((facts["holds"].as_bool(), facts["strict"].as_bool()), (Some(true), Some(true)));
    assert_eq!(facts["checks"].as_array().unwrap().len(), 9);
    fails(&["verify", "--device", "cpu", "--cases", "0"], 2, &["--cases"]);
    fails(&["verify", "--device", "cpu", "--only", "all"], 2, &["oracle"]);
    let dir = root("tests/fixtures/qwen3_moe/modelopt");
    let dir = dir.to_str().unwrap();
    fails(&["verify", "--device", "cpu", "--model", dir, "--activations", "nvfp4-dynamic"], 2, &["nvfp4-token"]);
}
