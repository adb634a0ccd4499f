//! What differs by family: the size of a head, which layers have experts, and what each layer's attention sees.

use serde_json::Value;

use super::keys::{Keys, whole};
use super::{Family, MAX_TOKENS};
use crate::error::Result;

/// What a layer's attention sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerType {
    /// The last `sliding_window` positions.
    Sliding,
    /// Every position so far.
    Full,
}

/// Dh. Where the file has none: 128 for Qwen3, the class default of transformers; D / H for Qwen3-MoE and Llama, whose
/// classes have no default of their own. Only Llama allows null.
pub(super) fn head_dim(keys: &Keys, family: Family, hidden_size: usize, heads: usize) -> Result<usize> {
    let derived = match family {
        Family::Qwen3 if !keys.is_null("head_dim") => Some(128),
        Family::Qwen3Moe if keys.is_null("head_dim") => None,
        Family::Qwen3Moe | Family::Llama => Some(hidden_size / heads),
        Family::GptOss | Family::Qwen3 => None,
    };
    let head_dim = match (keys.present("head_dim"), derived) {
        (None, Some(derived)) => {
            if family != Family::Qwen3 && !hidden_size.is_multiple_of(heads) {
                let reason = format!("is missing, and num_attention_heads, {heads}, does not divide hidden_size");
                return Err(keys.fault("head_dim", format!("{reason}, {hidden_size}")));
            }
            if !(4..=256).contains(&derived) || derived % 4 != 0 {
                let reason =
                    format!("is missing, and hidden_size / num_attention_heads, {derived}, is no multiple of 4");
                return Err(keys.fault("head_dim", format!("{reason} from 4 to 256")));
            }
            derived
        }
        _ => keys.multiple("head_dim", 4..=256, 4)?,
    };
    if !(heads * head_dim).is_multiple_of(16) {
        let reason = format!("{head_dim} times num_attention_heads, {heads}, is no multiple of 16");
        return Err(keys.fault("head_dim", reason));
    }
    Ok(head_dim)
}

/// E and A, each of which has two spellings.
pub(super) fn experts(keys: &Keys) -> Result<(usize, usize)> {
    let both = |name: &str, alias: &str, range: std::ops::RangeInclusive<usize>| {
        let other = keys.optional_int(alias, range.clone())?;
        let own = keys.optional_int(name, range.clone())?;
        if let (Some(own), Some(other)) = (own, other)
            && own != other
        {
            return Err(keys.fault(name, format!("{own}, but {alias} is {other}")));
        }
        keys.required(name, own.or(other), &whole(&range))
    };
    let num_local_experts = both("num_local_experts", "num_experts", 1..=1024)?;
    let per_tok = both("num_experts_per_tok", "experts_per_token", 1..=num_local_experts.min(16))?;
    Ok((num_local_experts, per_tok))
}

/// Which layers have experts. Qwen3-MoE: layer l, unless `mlp_only_layers` lists it, if `decoder_sparse_step` divides
/// l + 1.
pub(super) fn moe_layers(keys: &Keys, family: Family, num_hidden_layers: usize) -> Result<Vec<bool>> {
    let layers = 0..num_hidden_layers;
    match family {
        Family::GptOss => Ok(vec![true; num_hidden_layers]),
        Family::Qwen3 | Family::Llama => Ok(vec![false; num_hidden_layers]),
        Family::Qwen3Moe => {
            let step = keys.optional_int("decoder_sparse_step", 1..=1024)?.unwrap_or(1);
            let mut dense = Vec::new();
            if let Some(value) = keys.present("mlp_only_layers") {
                let should = format!("a list of layers below num_hidden_layers, {num_hidden_layers}");
                let layer = |v: &Value| v.as_u64().filter(|&l| l < num_hidden_layers as u64).map(|l| l as usize);
                let list = value.as_array().and_then(|list| list.iter().map(layer).collect::<Option<Vec<_>>>());
                dense = list.ok_or_else(|| keys.wrong("mlp_only_layers", value, &should))?;
            }
            Ok(layers.map(|l| !dense.contains(&l) && (l + 1) % step == 0).collect())
        }
    }
}

/// What each layer sees, and the window: 0 where no layer slides.
pub(super) fn attention(keys: &Keys, family: Family, n: usize) -> Result<(Vec<LayerType>, usize)> {
    use LayerType::{Full, Sliding};
    let given = layer_types(keys, n)?;
    if family == Family::GptOss {
        let window = keys.int("sliding_window", 1..=MAX_TOKENS)?;
        let alternate = [Sliding, Full].into_iter().cycle().take(n);
        return Ok((given.unwrap_or_else(|| alternate.collect()), window));
    }
    // transformers ignores the window, whatever it is, unless it is to be used; null turns it off, too.
    let used = family != Family::Llama && keys.bool("use_sliding_window")?.unwrap_or(false);
    let window = match used && !keys.is_null("sliding_window") {
        true => keys.optional_int("sliding_window", 1..=MAX_TOKENS)?.unwrap_or(4096),
        false => 0,
    };
    let derived: Vec<LayerType> = match family {
        _ if window == 0 => vec![Full; n],
        Family::Qwen3 => {
            let from = keys.optional_int("max_window_layers", 0..=MAX_TOKENS)?.unwrap_or(28);
            (0..n).map(|layer| if layer >= from { Sliding } else { Full }).collect()
        }
        _ => vec![Sliding; n],
    };
    let types = match given {
        // Only Qwen3 reads the key; where it says the same as the rest of the file, it does no harm elsewhere.
        Some(given) if family != Family::Qwen3 && given != derived => {
            let reason = "contradicts use_sliding_window and sliding_window, by which this family goes: remove it";
            return Err(keys.fault("layer_types", reason));
        }
        Some(given) if window == 0 && given.contains(&Sliding) => {
            let reason = "has sliding layers, but use_sliding_window is not true or sliding_window is null";
            return Err(keys.fault("layer_types", reason));
        }
        given => given.unwrap_or(derived),
    };
    let slides = types.contains(&Sliding);
    Ok((types, if slides { window } else { 0 }))
}

fn layer_types(keys: &Keys, num_hidden_layers: usize) -> Result<Option<Vec<LayerType>>> {
    let words = "\"sliding_attention\" or \"full_attention\"";
    let Some(value) = keys.present("layer_types") else { return Ok(None) };
    let Value::Array(list) = value else {
        return Err(keys.wrong("layer_types", value, &format!("a list of {words}")));
    };
    if list.len() != num_hidden_layers {
        let reason = format!("has {} entries, but num_hidden_layers is {num_hidden_layers}", list.len());
        return Err(keys.fault("layer_types", reason));
    }
    let layer = |value: &Value| match value.as_str() {
        Some("sliding_attention") => Ok(LayerType::Sliding),
        Some("full_attention") => Ok(LayerType::Full),
        _ => Err(keys.wrong("layer_types", value, words)),
    };
    list.iter().map(layer).collect::<Result<_>>().map(Some)
}
