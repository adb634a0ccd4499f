//! The words of each producer → [`Quantization`].
//!
//! Sources: NVIDIA ModelOpt 0.47 `modelopt/torch/export/convert_hf_config.py`, compressed-tensors 0.20
//! `quantization/quant_{config,scheme,args}.py`, AMD Quark 0.13, transformers 5.23 `quantizers/`, vLLM 0.33
//! `layers/quantization/`; blocks that these tools wrote are in `tests/fixtures/quantization/`.

use serde_json::Value;

use super::keys::{Keys, shown};
use super::patterns::Reach;
use super::quantization::{ActivationScheme, KvCacheScheme, Producer, Quantization, Scheme};
use crate::checkpoint::json;
use crate::error::{Error, Result};

/// OpenAI's MXFP4: everything but the named modules.
pub(super) fn mxfp4(keys: &Keys) -> Result<Quantization> {
    let mut q = Quantization::new(Producer::OpenAi, keys.file, Reach::OwnAndParents);
    q.default = Some(q.index_of(Scheme::Mxfp4));
    q.exclude(keys, "modules_to_not_convert")?;
    Ok(q)
}

/// `quant_method: fp8`. With `moe_quant_algo` it is NVIDIA's DeepSeek-V4: `quantized_layers` are ModelOpt's, the rest is
/// FP8, and `ignore` only names what of that is not NVFP4.
pub(super) fn fp8(keys: &Keys) -> Result<Quantization> {
    if let Some(format) = keys.str("fmt")?.filter(|format| *format != "e4m3") {
        return Err(keys.wrong("fmt", &Value::from(format), "\"e4m3\""));
    }
    let scheme = match keys.present("weight_block_size") {
        None => Scheme::Fp8,
        Some(size) if *size == serde_json::json!([128, 128]) => Scheme::Fp8Blocks,
        Some(other) => return Err(keys.wrong("weight_block_size", other, "[128, 128]")),
    };
    let mut q = Quantization::new(Producer::Fp8, keys.file, Reach::OwnAndParents);
    q.default = Some(q.index_of(scheme));
    q.exclude(keys, "modules_to_not_convert")?;
    q.exclude(keys, "ignored_layers")?;
    if keys.present("moe_quant_algo").is_some() {
        q.producer = Producer::ModelOpt;
        q.producer_version = version(keys.object("producer")?)?;
        q.kv_cache = kv_cache_algo(keys)?;
        quantized_layers(&mut q, keys)?;
        if q.schemes.len() == 1 {
            // An older file names no layers: its experts are what `moe_quant_algo` says.
            let index = q.index_of(algo(keys, "moe_quant_algo")?);
            add(&mut q, keys, "moe_quant_algo", "*.experts.*", index)?;
        }
    }
    Ok(q)
}

/// ModelOpt: `quantization_config` of `config.json`, or `quantization` of `hf_quant_config.json`, whose lists are called
/// otherwise.
pub(super) fn modelopt(keys: &Keys, producer: Option<Keys>) -> Result<Quantization> {
    let mut q = Quantization::new(Producer::ModelOpt, keys.file, Reach::OwnAndParents);
    q.producer_version = version(producer)?;
    q.kv_cache = match keys.object("kv_cache_scheme")? {
        Some(scheme) => kv_cache_scheme(&scheme)?,
        None => kv_cache_algo(keys)?,
    };
    q.exclude(keys, "ignore")?;
    q.exclude(keys, "exclude_modules")?;
    let groups = keys.object("config_groups")?;
    let word = keys.str("quant_algo")?;
    if word.is_some_and(|word| word.eq_ignore_ascii_case("MIXED_PRECISION")) || word.is_none() {
        quantized_layers(&mut q, keys)?;
        return match (q.schemes.is_empty(), groups) {
            (false, _) => Ok(q),
            // Several groups that name their own modules.
            (true, Some(groups)) => config_groups(&mut q, &groups, None).map(|()| q),
            // Null where only the KV cache, or nothing, was calibrated.
            (true, None) if keys.is_null("quant_algo") => Ok(q),
            (true, None) if word.is_none() => Err(missing(keys, "quant_algo", "the name of a format")),
            (true, None) => Err(missing(keys, "quantized_layers", "an object, since quant_algo says MIXED_PRECISION")),
        };
    }
    let mut scheme = algo(keys, "quant_algo")?;
    check_group_size(keys, &scheme)?;
    if let (Scheme::Nvfp4 { activations }, Some(groups)) = (&mut scheme, groups) {
        // The groups say more than the algorithm's name: whether activations are quantised at all, and how.
        for (_, group) in groups.objects()? {
            if let Some(Scheme::Nvfp4 { activations: found }) = group_scheme(&group)? {
                *activations = found;
            }
        }
    }
    q.default = Some(q.index_of(scheme));
    Ok(q)
}

/// compressed-tensors: groups with their own targets.
pub(super) fn compressed_tensors(keys: &Keys) -> Result<Quantization> {
    let mut q = Quantization::new(Producer::CompressedTensors, keys.file, Reach::Own);
    q.producer_version = keys.str("version")?.map(str::to_owned);
    if let Some(scheme) = keys.object("kv_cache_scheme")? {
        q.kv_cache = kv_cache_scheme(&scheme)?;
    }
    if let Some(sparsity) = keys.object("sparsity_config")?
        && let Some(format) = sparsity.str("format")?.filter(|format| *format != "dense")
    {
        return Err(sparsity.wrong("format", &Value::from(format), "\"dense\": sparse weights are not read"));
    }
    if let Some(transform) = keys.object("transform_config")?.filter(|t| !t.map.is_empty())
        && !transform.object("config_groups")?.is_some_and(|groups| groups.map.is_empty())
    {
        let reason = "weights that were rotated need the same rotation of activations, which is not supported";
        return Err(keys.fault("transform_config", reason));
    }
    q.exclude(keys, "ignore")?;
    let format = check_format(keys)?;
    let Some(groups) = keys.object("config_groups")? else {
        return Err(missing(keys, "config_groups", "an object of groups"));
    };
    config_groups(&mut q, &groups, format)?;
    Ok(q)
}

/// Quark: one global scheme, others by pattern.
pub(super) fn quark(keys: &Keys) -> Result<Quantization> {
    let mut q = Quantization::new(Producer::Quark, keys.file, Reach::OwnAndParents);
    q.producer_version = keys.str("version")?.map(str::to_owned);
    q.exclude(keys, "exclude")?;
    let export = keys.object("export")?;
    if let Some(groups) = export.map(|e| e.strings("kv_cache_group")).transpose()?.flatten()
        && !groups.is_empty()
    {
        q.kv_cache = KvCacheScheme::Fp8;
    }
    if let Some(layers) = keys.object("layer_quant_config")? {
        for (pattern, layer) in layers.objects()? {
            match quark_scheme(&layer)? {
                Some(scheme) => {
                    let index = q.index_of(scheme);
                    add(&mut q, &layers, pattern, pattern, index)?;
                }
                None => q.excluded.add(pattern, 0).map_err(|e| layers.fault(pattern, json::clip(&e, 300)))?,
            }
        }
    }
    if let Some(global) = keys.object("global_quant_config")? {
        q.default = quark_scheme(&global)?.map(|scheme| q.index_of(scheme));
    }
    if let Some(classes) = keys.object("layer_type_quant_config")? {
        for (_, class) in classes.objects()?.into_iter().filter(|(name, _)| name.contains("Linear")) {
            q.default = quark_scheme(&class)?.map(|scheme| q.index_of(scheme));
        }
    }
    Ok(q)
}

fn missing(keys: &Keys, key: &str, should: &str) -> Error {
    let found = if keys.is_null(key) { "is null" } else { "is missing" };
    keys.fault(key, format!("{found}, should be {should}"))
}

fn version(producer: Option<Keys>) -> Result<Option<String>> {
    Ok(producer.map(|p| p.str("version")).transpose()?.flatten().map(str::to_owned))
}

fn add(q: &mut Quantization, keys: &Keys, key: &str, entry: &str, index: usize) -> Result<()> {
    q.targets.add(entry, index).map_err(|reason| keys.fault(key, json::clip(&reason, 300)))
}

/// The names that ModelOpt gives to formats.
fn algo(keys: &Keys, key: &str) -> Result<Scheme> {
    let Some(word) = keys.str(key)? else {
        return Err(missing(keys, key, "the name of a format"));
    };
    let upper = word.to_ascii_uppercase();
    Ok(match upper.as_str() {
        "NVFP4" => Scheme::Nvfp4 { activations: ActivationScheme::StaticGlobal },
        "W4A16_NVFP4" => Scheme::Nvfp4 { activations: ActivationScheme::Unquantised },
        "FP8" | "FP8_PER_CHANNEL_PER_TOKEN" => Scheme::Fp8,
        "FP8_PB_WO" | "FP8_PB_REAL" => Scheme::Fp8Blocks,
        "MXFP4" | "W4A16_MXFP4" => Scheme::Mxfp4,
        "NVFP4_AWQ"
        | "NVFP4_SVD"
        | "W4A8_NVFP4_FP8"
        | "W4A8_MXFP4_FP8"
        | "MXFP8"
        | "INT4_AWQ"
        | "W4A16_AWQ"
        | "W4A8_AWQ"
        | "W8A16"
        | "W8A8_SQ_PER_CHANNEL"
        | "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN" => Scheme::Other(upper),
        _ => {
            let known = "\"NVFP4\", \"W4A16_NVFP4\", \"FP8\" or another name that ModelOpt gives";
            return Err(keys.wrong(key, &Value::from(word), known));
        }
    })
}

fn check_group_size(keys: &Keys, scheme: &Scheme) -> Result<()> {
    let should = match scheme {
        Scheme::Nvfp4 { .. } => 16,
        Scheme::Mxfp4 => 32,
        _ => return Ok(()),
    };
    match keys.present("group_size") {
        Some(size) if *size != should => Err(keys.wrong("group_size", size, &should.to_string())),
        _ => Ok(()),
    }
}

/// ModelOpt's list of modules with the format of each; a name stands for all that is part of it.
fn quantized_layers(q: &mut Quantization, keys: &Keys) -> Result<()> {
    let Some(layers) = keys.object("quantized_layers")? else { return Ok(()) };
    for (name, layer) in layers.objects()? {
        let scheme = algo(&layer, "quant_algo")?;
        check_group_size(&layer, &scheme)?;
        let index = q.index_of(scheme);
        add(q, &layers, name, name, index)?;
    }
    Ok(())
}

fn kv_cache_algo(keys: &Keys) -> Result<KvCacheScheme> {
    Ok(match keys.str("kv_cache_quant_algo")? {
        None => KvCacheScheme::None,
        Some(word) if word.eq_ignore_ascii_case("none") => KvCacheScheme::None,
        Some(word) if word.eq_ignore_ascii_case("FP8") => KvCacheScheme::Fp8,
        Some(word) => KvCacheScheme::Other(json::name(word)),
    })
}

fn kv_cache_scheme(keys: &Keys) -> Result<KvCacheScheme> {
    let (bits, kind) = (keys.int("num_bits", 1..=16)?, keys.str("type")?.unwrap_or("int"));
    Ok(match (bits, kind) {
        (8, "float") => KvCacheScheme::Fp8,
        _ => KvCacheScheme::Other(format!("{bits}-bit {}", json::name(kind))),
    })
}

/// The names that compressed-tensors gives to ways of writing weights.
fn check_format<'a>(keys: &Keys<'a>) -> Result<Option<&'a str>> {
    const KNOWN: [&str; 14] = [
        "nvfp4-pack-quantized",
        "mxfp4-pack-quantized",
        "float-quantized",
        "naive-quantized",
        "int-quantized",
        "pack-quantized",
        "mixed-precision",
        "dense",
        "marlin-24",
        "sparse-bitmask",
        "sparse-24-bitmask",
        "mxfp8-quantized",
        "mxfp8-pack-quantized",
        "fp8-pack-quantized",
    ];
    match keys.str("format")? {
        Some(word) if !KNOWN.contains(&word) => {
            Err(keys.wrong("format", &Value::from(word), "a format of compressed-tensors, as \"nvfp4-pack-quantized\""))
        }
        word => Ok(word),
    }
}

/// Groups, each with the modules that it is for; `format` is the whole file's.
fn config_groups(q: &mut Quantization, groups: &Keys, format: Option<&str>) -> Result<()> {
    for (_, group) in groups.objects()? {
        let format = check_format(&group)?.or(format);
        let Some(scheme) = group_scheme(&group)? else { continue };
        let fits = match format {
            Some("nvfp4-pack-quantized") => matches!(scheme, Scheme::Nvfp4 { .. } | Scheme::Other(_)),
            Some("mxfp4-pack-quantized") => scheme == Scheme::Mxfp4,
            Some("float-quantized") => matches!(scheme, Scheme::Fp8 | Scheme::Fp8Blocks | Scheme::Other(_)),
            _ => true,
        };
        if !fits {
            let reason = format!("does not fit the format {:?}", format.unwrap_or_default());
            return Err(group.fault("weights", reason));
        }
        let index = q.index_of(scheme);
        let targets = group.strings("targets")?;
        for target in group.required("targets", targets, "a list of module names or classes")? {
            add(q, &group, "targets", target, index)?;
        }
    }
    Ok(())
}

/// A group of compressed-tensors or ModelOpt; `None` where it leaves weights alone.
fn group_scheme(group: &Keys) -> Result<Option<Scheme>> {
    let Some(weights) = group.object("weights")? else { return Ok(None) };
    let bits = weights.int("num_bits", 1..=16)?;
    let kind = weights.str("type")?.unwrap_or("int");
    let size = match weights.present("group_size") {
        Some(value) if *value == -1 => None, // one group for all, in old files
        _ => weights.optional_int("group_size", 1..=1 << 16)?,
    };
    let inputs = group.object("input_activations")?;
    Ok(Some(match (bits, kind, size) {
        (4, "float", Some(16)) => match activations(inputs.as_ref())? {
            Some(activations) => Scheme::Nvfp4 { activations },
            None => Scheme::Other("NVFP4 weights with other than FP4 inputs".into()),
        },
        (4, "float", Some(32)) => Scheme::Mxfp4,
        (4, "float", Some(other)) => {
            return Err(weights.fault("group_size", format!("found {other}, should be 16 (NVFP4) or 32 (MXFP4)")));
        }
        (4, "float", None) => return Err(missing(&weights, "group_size", "16 (NVFP4) or 32 (MXFP4)")),
        (8, "float", None) => match (weights.str("strategy")?, weights.present("block_structure")) {
            (Some("block"), Some(size)) if *size == serde_json::json!([128, 128]) || *size == "128x128" => {
                Scheme::Fp8Blocks
            }
            (Some("block"), Some(other)) => return Err(weights.wrong("block_structure", other, "[128, 128]")),
            (Some("block"), None) => Scheme::Fp8Blocks,
            _ => Scheme::Fp8,
        },
        (_, "float" | "int", _) => Scheme::Other(format!("{bits}-bit {kind}")),
        (_, other, _) => return Err(weights.wrong("type", &Value::from(other), "\"float\" or \"int\"")),
    }))
}

/// `None` where inputs are quantised to something other than FP4.
fn activations(inputs: Option<&Keys>) -> Result<Option<ActivationScheme>> {
    let Some(inputs) = inputs else { return Ok(Some(ActivationScheme::Unquantised)) };
    if inputs.int("num_bits", 1..=16)? != 4 {
        return Ok(None);
    }
    match inputs.present("dynamic") {
        None | Some(Value::Bool(false)) => Ok(Some(ActivationScheme::StaticGlobal)),
        Some(Value::Bool(true)) => Ok(Some(ActivationScheme::Dynamic)),
        Some(word) if word == "local" => Ok(Some(ActivationScheme::StaticGlobal)),
        Some(other) => Err(inputs.wrong("dynamic", other, "true, false or \"local\"")),
    }
}

/// One level of Quark: the elements, or the elements and the scale of their scales. `None` where weights stay as they are.
fn quark_scheme(keys: &Keys) -> Result<Option<Scheme>> {
    let weight = quark_levels(keys, "weight")?;
    let Some(elements) = weight.first() else { return Ok(None) };
    let other = || Scheme::Other(format!("Quark {}", shown(elements.map.get("dtype").unwrap_or(&Value::Null))));
    let dtype = elements.str("dtype")?;
    let dtype = elements.required("dtype", dtype, "the name of a format")?;
    let size = elements.optional_int("group_size", 1..=1 << 16)?;
    let scheme = match (dtype, weight.get(1)) {
        ("fp4", Some(scales)) => {
            if scales.str("dtype")? != Some("fp8_e4m3") || scales.bool("is_scale_quant")? != Some(true) {
                let reason = "the second entry should have dtype \"fp8_e4m3\" and is_scale_quant true";
                return Err(keys.fault("weight", reason));
            }
            if size != Some(16) {
                return Err(elements.fault("group_size", "should be 16 where scales are fp8_e4m3 (NVFP4)"));
            }
            match quark_levels(keys, "input_tensors")?.as_slice() {
                [] => Scheme::Nvfp4 { activations: ActivationScheme::Unquantised },
                [inputs, global] if inputs.str("dtype")? == Some("fp4") => {
                    let activations = match global.bool("is_dynamic")? {
                        Some(true) => ActivationScheme::Dynamic,
                        _ => ActivationScheme::StaticGlobal,
                    };
                    Scheme::Nvfp4 { activations }
                }
                _ => Scheme::Other("NVFP4 weights with other than FP4 inputs".into()),
            }
        }
        ("fp4" | "mx", None) if size.is_none_or(|size| size == 32) => Scheme::Mxfp4,
        ("fp4", None) => {
            return Err(elements.fault("group_size", "should be 32 where scales are powers of two (MXFP4)"));
        }
        ("fp8_e4m3", None) if size.is_none() => Scheme::Fp8,
        (
            "fp8_e4m3" | "mx" | "fp8_e5m2" | "fp6_e2m3" | "fp6_e3m2" | "int2" | "uint2" | "int3" | "uint3" | "int4"
            | "uint4" | "int8" | "uint8" | "int16" | "int32" | "float16" | "bfloat16" | "bfp16" | "mx6" | "mx9",
            _,
        ) => other(),
        (unknown, _) => return Err(elements.wrong("dtype", &Value::from(unknown), "a dtype of Quark, as \"fp4\"")),
    };
    Ok(Some(scheme))
}

/// An object, a list of one or two, or null.
fn quark_levels<'a>(keys: &Keys<'a>, key: &str) -> Result<Vec<Keys<'a>>> {
    let wrong = |found: &Value| -> Error { keys.wrong(key, found, "an object, or a list of one or two") };
    match keys.present(key) {
        None => Ok(Vec::new()),
        Some(Value::Object(map)) => Ok(vec![keys.below(key, map)]),
        Some(found @ Value::Array(list)) if (1..=2).contains(&list.len()) => {
            list.iter().map(|v| v.as_object().map(|map| keys.below(key, map)).ok_or_else(|| wrong(found))).collect()
        }
        Some(other) => Err(wrong(other)),
    }
}
