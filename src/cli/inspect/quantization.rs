//! What a checkpoint declares about its formats, what it holds instead, and what calibration left in it.

use super::kinds;
use fourfold::checkpoint::{Checkpoint, Dtype, ScaleOrder, Stored};
use fourfold::config::{ActivationScheme, Config, KvCacheScheme, Producer, Quantization, Scheme};
use fourfold::format::{Format, nvfp4};
use fourfold::{Found, InputScale};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// Stages that linears read, in the order of execution.
const STAGES: [&str; 4] = ["attn_norm", "attention", "mlp_norm", "mlp.up"];
/// Modules that are named; the rest is counted.
const NAMED: usize = 3;

/// What the tensors of linears say, module by module. Those that the engine would refuse are left out.
#[derive(Default)]
pub(super) struct Linears {
    /// Module, what it is, what it was declared to be.
    mismatches: Vec<(String, Format, String)>,
    /// Layers in which q, k and v have different globals; gate and up.
    apart: [BTreeSet<usize>; 2],
    /// NVFP4 linears without a calibrated input: stage kind, and the layers.
    missing: BTreeMap<&'static str, BTreeSet<usize>>,
}

impl Linears {
    pub(super) fn read(checkpoint: &Checkpoint, config: &Config, order: ScaleOrder) -> Self {
        let mut linears = Self::default();
        let mut globals: BTreeMap<String, f32> = BTreeMap::new();
        for view in checkpoint.tensors() {
            let module = view.name.strip_suffix(".weight_packed").or_else(|| view.name.strip_suffix(".weight"));
            let (Some(module), [n, k]) = (module, view.shape) else { continue };
            if module.ends_with("embed_tokens") {
                continue;
            }
            let per_byte = if view.dtype == Dtype::U8 { 2 } else { 1 };
            let Some(k) = k.checked_mul(per_byte) else { continue };
            let Ok(stored) = checkpoint.stored(module, [*n, k], &config.quantization, order) else { continue };
            let declared = config.quantization.declared(module);
            if !fits(declared, stored.format) {
                linears.mismatches.push((module.to_owned(), stored.format, declared.map_or("plain", word).to_owned()));
            }
            linears.calibrated(&stored);
            if stored.format == Format::Nvfp4 {
                linears.compare(&mut globals, module, stored.row_scale(0));
            }
        }
        linears
    }

    fn calibrated(&mut self, stored: &Stored<'_>) {
        let (Some(layer), Some(stage)) = (kinds::layer(&stored.module), stage(&stored.module)) else { return };
        if stored.format == Format::Nvfp4 && stored.input.is_none() {
            self.missing.entry(stage).or_default().insert(layer);
        }
    }

    /// Note where a module's global is another than that of the one stacked with it.
    fn compare(&mut self, globals: &mut BTreeMap<String, f32>, module: &str, global: f32) {
        let (Some((parent, name)), Some(layer)) = (module.rsplit_once('.'), kinds::layer(module)) else { return };
        let apart = match name {
            "q_proj" | "k_proj" | "v_proj" => 0,
            "gate_proj" | "up_proj" => 1,
            _ => return,
        };
        if *globals.entry(parent.to_owned()).or_insert(global) != global {
            self.apart[apart].insert(layer);
        }
    }

    /// Name and words about what differs from the declaration, and where globals differ.
    pub(super) fn facts(&self, config: &Config) -> Vec<(&'static str, String)> {
        let layers = config.num_hidden_layers;
        let mut facts = Vec::new();
        let what = ["q, k and v", "gate and up"];
        let apart = self.apart.iter().zip(what).filter(|(set, _)| !set.is_empty());
        let apart: Vec<String> =
            apart.map(|(set, what)| format!("{what} in {} of {layers} layers", set.len())).collect();
        if !apart.is_empty() {
            facts.push(("globals", format!("differ between {}: kept apart, row by row", apart.join(", between "))));
        }
        if !self.mismatches.is_empty() {
            let named = self.mismatches.iter().take(NAMED);
            let named: Vec<String> = named
                .map(|(module, format, declared)| format!("{module} is {}, declared {declared}", upper(*format)))
                .collect();
            let n = self.mismatches.len();
            let more = if n > NAMED { format!("; and {} more", n - NAMED) } else { String::new() };
            let are = if n == 1 { "1 linear is".to_owned() } else { format!("{n} linears are") };
            let text = format!("{are} not as declared (the tensors decide): {}{more}", named.join("; "));
            facts.push(("otherwise", text));
        }
        facts
    }

    /// Rows of the table of calibrated inputs: stage, layers, amax, scales in a layer. And the layers without.
    pub(super) fn inputs(&self, found: &Found) -> (Vec<Vec<String>>, Vec<String>) {
        let mut rows = Vec::new();
        for kind in STAGES {
            let mut layers: BTreeMap<usize, Vec<&InputScale>> = BTreeMap::new();
            for one in &found.input_scales {
                let place = one.stage.strip_prefix("layers.").and_then(|rest| rest.split_once('.'));
                if let Some((layer, _)) = place.filter(|(_, stage)| *stage == kind) {
                    layers.entry(layer.parse().unwrap_or_default()).or_default().push(one);
                }
            }
            if layers.is_empty() {
                continue;
            }
            let amaxes = || layers.values().flatten().map(|one| nvfp4::MAX * one.scale);
            let (least, most) = (amaxes().fold(f32::MAX, f32::min), amaxes().fold(0.0, f32::max));
            let range = if least == most { number(least) } else { format!("{} to {}", number(least), number(most)) };
            let apart = layers.values().filter(|all| all.iter().any(|one| one.scale != all[0].scale)).count();
            let experts = found.input_scales.iter().any(|one| kinds::expert(&one.module).is_some());
            let sharers = if experts && kind.starts_with("mlp") { "experts" } else { "linears" };
            let shared = match apart {
                _ if layers.values().all(|all| all.len() == 1) => "one".to_owned(),
                0 => format!("one for all {sharers}"),
                n if n == layers.len() => format!("{sharers} have their own"),
                n => format!("{sharers} have their own in {}", plural(n, "layer")),
            };
            rows.push(vec![kind.to_owned(), layers.len().to_string(), range, shared]);
        }
        let missing = STAGES.iter().filter_map(|kind| Some((kind, self.missing.get(kind)?)));
        let missing = missing.map(|(kind, layers)| format!("{kind} in layers {}", ranges(layers))).collect();
        (rows, missing)
    }
}

/// What the config says: writer and formats.
pub(super) fn declared(checkpoint: &Checkpoint, q: &Quantization) -> Vec<(&'static str, String)> {
    let producer = match q.producer {
        Producer::None => "nobody: no quantisation is declared",
        Producer::OpenAi => "OpenAI",
        Producer::ModelOpt => "ModelOpt",
        Producer::CompressedTensors => "compressed-tensors",
        Producer::Quark => "AMD Quark",
        Producer::Fp8 => "the fp8 format of DeepSeek and Qwen",
    };
    let version = q.producer_version.as_ref().map(|version| format!(" {version}")).unwrap_or_default();
    let by = match other_producer(checkpoint).filter(|_| q.producer == Producer::ModelOpt) {
        Some(name) => format!("{name}{version}, as ModelOpt does"),
        None => format!("{producer}{version}"),
    };
    let mut facts = vec![("written by", by)];
    let schemes: Vec<String> = q.schemes().iter().map(scheme).collect();
    if !schemes.is_empty() {
        facts.push(("declared", schemes.join("; ")));
    }
    facts
}

/// The name of a program that writes as ModelOpt does and is another, such as our own quantiser.
fn other_producer(checkpoint: &Checkpoint) -> Option<String> {
    let name = |file: &str, block: &str| {
        let json: Value = serde_json::from_slice(checkpoint.file(file)?).ok()?;
        Some(json.pointer(block)?.as_str()?.to_owned())
    };
    let name = name("config.json", "/quantization_config/producer/name")
        .or_else(|| name("hf_quant_config.json", "/producer/name"));
    name.filter(|name| name != "modelopt")
}

/// Linears and weights by format, and the scales of the KV cache.
pub(super) fn stored(found: &Found, q: &Quantization, kv: &str) -> Vec<(&'static str, String)> {
    let format = |(i, (format, linears, weights)): (usize, &(Format, usize, u64))| {
        let [linears_word, weights_word] = if i == 0 { [" linears", " weights"] } else { [""; 2] };
        let weights = super::terminal::count(*weights);
        format!("{linears} {}{linears_word} ({weights}{weights_word})", upper(*format))
    };
    let formats: Vec<String> = found.linears.iter().enumerate().map(format).collect();
    let mut facts = vec![("stored", formats.join(", "))];
    let stays = format!("the cache stays {kv}");
    let text = match (&q.kv_cache, found.kv_scales.len()) {
        (KvCacheScheme::None, 0) => return facts,
        (KvCacheScheme::Other(word), 0) => format!("declared {word}; {stays}"),
        (KvCacheScheme::Fp8, 0) => format!("declared FP8, without scales; {stays}"),
        (_, n) => format!("k_scale/v_scale: FP8 scales are there and sound, in {}; {stays}", plural(n, "layer")),
    };
    facts.push(("KV cache", text));
    facts
}

fn plural(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

fn scheme(scheme: &Scheme) -> String {
    let more = match scheme {
        Scheme::Nvfp4 { activations: ActivationScheme::Unquantised } => ", inputs as they are (W4A16)",
        Scheme::Nvfp4 { activations: ActivationScheme::StaticGlobal } => ", inputs NVFP4 with calibrated scales (W4A4)",
        Scheme::Nvfp4 { activations: ActivationScheme::Dynamic } => {
            ", inputs NVFP4 with scales made at run time (W4A4)"
        }
        Scheme::Other(_) => ", which is not read",
        _ => "",
    };
    format!("{}{more}", word(scheme))
}

fn word(scheme: &Scheme) -> &str {
    match scheme {
        Scheme::Mxfp4 => "MXFP4",
        Scheme::Nvfp4 { .. } => "NVFP4",
        Scheme::Fp8 => "FP8",
        Scheme::Fp8Blocks => "FP8 in blocks",
        Scheme::Other(word) => word,
    }
}

fn upper(format: Format) -> &'static str {
    match format {
        Format::F32 => "F32",
        Format::Bf16 => "BF16",
        Format::Mxfp4 => "MXFP4",
        Format::Nvfp4 => "NVFP4",
        Format::Fp8 => "FP8",
        Format::Fp8Blocks => "FP8 in blocks",
    }
}

fn fits(declared: Option<&Scheme>, stored: Format) -> bool {
    match declared {
        None => stored == Format::Bf16,
        Some(declared) => word(declared) == upper(stored),
    }
}

/// The stage that a linear reads.
fn stage(module: &str) -> Option<&'static str> {
    Some(match module.rsplit('.').next()? {
        "q_proj" | "k_proj" | "v_proj" => STAGES[0],
        "o_proj" => STAGES[1],
        "gate_proj" | "up_proj" => STAGES[2],
        "down_proj" => STAGES[3],
        _ => return None,
    })
}

fn number(x: f32) -> String {
    if (0.01..1e5).contains(&x) { format!("{x:.3}") } else { format!("{x:.2e}") }
}

/// `0-3, 7`.
pub(super) fn ranges(numbers: &BTreeSet<usize>) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &n in numbers {
        match runs.last_mut() {
            Some((_, to)) if *to + 1 == n => *to = n,
            _ => runs.push((n, n)),
        }
    }
    let run = |(from, to): &(usize, usize)| if from == to { from.to_string() } else { format!("{from}-{to}") };
    runs.iter().map(run).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_layers_are_short() {
        assert_eq!(ranges(&BTreeSet::from([0, 1, 2, 5, 7, 8])), "0-2, 5, 7-8");
    }
}
