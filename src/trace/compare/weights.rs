//! Which weights differ between two checkpoints, among those that a stage is made of: tensor, expert, row, block, and the
//! values that the bytes stand for.

use serde::Serialize;

use crate::checkpoint::{Checkpoint, Dtype, TensorView};
use crate::format::{bf16, e2m1, e8m0, mxfp4};
use crate::trace::file::{LAYER_STAGES, split_layer, stage_order};

/// Most differing bytes that are listed of a tensor.
const LISTED: usize = 12;

/// A tensor whose bytes are not the same in both checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TensorDifference {
    /// The tensor.
    pub tensor: String,
    /// Why it cannot be compared byte by byte, where that is so.
    pub reason: Option<String>,
    /// Bytes that differ.
    pub bytes: usize,
    /// Bytes in all.
    pub of: usize,
    /// The first of them.
    pub places: Vec<BytePlace>,
}

/// A byte that differs, and what it is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BytePlace {
    /// Offset in the tensor.
    pub offset: usize,
    /// The expert, in tensors of experts.
    pub expert: Option<usize>,
    /// The row of the matrix.
    pub row: usize,
    /// The block in the row, in tensors of blocks or scales.
    pub block: Option<usize>,
    /// A's byte.
    pub a: u8,
    /// B's byte.
    pub b: u8,
    /// The above in words, with the values that the bytes stand for.
    pub what: String,
}

/// Tensors that `stage` is made of, and those of the stages between it and `after`, the last one that agrees: what was not
/// compared may be at fault.
pub fn tensors_of(stage: &str, after: Option<&str>, layers: usize) -> Vec<String> {
    let mut stages = vec!["embed".to_owned()];
    stages.extend((0..layers).flat_map(|n| LAYER_STAGES.iter().map(move |stage| format!("layers.{n}.{stage}"))));
    stages.extend(["final_norm", "logits"].map(str::to_owned));
    let (from, to) = (after.map(stage_order), stage_order(stage));
    let between = |name: &&String| stage_order(name) <= to && from.is_none_or(|from| stage_order(name) > from);
    stages.iter().filter(between).flat_map(|name| own_tensors(name)).collect()
}

/// The tensors that come in between the stage before this one and this one.
fn own_tensors(stage: &str) -> Vec<String> {
    let Some((layer, stage)) = split_layer(stage) else {
        let names: &[&str] = match stage {
            "embed" => &["model.embed_tokens.weight"],
            "final_norm" => &["model.norm.weight"],
            "logits" => &["lm_head.weight", "model.embed_tokens.weight"],
            _ => &[],
        };
        return names.iter().map(|name| (*name).to_owned()).collect();
    };
    let names: &[&str] = match stage {
        "attn_norm" => &["input_layernorm.weight"],
        "qkv" => &[
            "self_attn.q_proj.weight",
            "self_attn.q_proj.bias",
            "self_attn.k_proj.weight",
            "self_attn.k_proj.bias",
            "self_attn.v_proj.weight",
            "self_attn.v_proj.bias",
        ],
        "attention" => &["self_attn.sinks"],
        "attn_out" => &["self_attn.o_proj.weight", "self_attn.o_proj.bias"],
        "mlp_norm" => &["post_attention_layernorm.weight"],
        "mlp.router.logits" => &["mlp.router.weight", "mlp.router.bias"],
        "mlp.up" => {
            &["mlp.experts.gate_up_proj_blocks", "mlp.experts.gate_up_proj_scales", "mlp.experts.gate_up_proj_bias"]
        }
        "mlp.down" => &["mlp.experts.down_proj_blocks", "mlp.experts.down_proj_scales", "mlp.experts.down_proj_bias"],
        _ => &[],
    };
    names.iter().map(|name| format!("model.layers.{layer}.{name}")).collect()
}

/// What differs in the tensors of these names. A tensor that neither checkpoint has is none of theirs.
pub fn differences(a: &Checkpoint, b: &Checkpoint, names: &[String]) -> Vec<TensorDifference> {
    let compare = |name: &String| {
        let because = |reason: String| {
            Some(TensorDifference { tensor: name.clone(), reason: Some(reason), bytes: 0, of: 0, places: Vec::new() })
        };
        match (a.tensor(name).ok(), b.tensor(name).ok()) {
            (None, None) => None,
            (Some(_), None) => because("is in A only".to_owned()),
            (None, Some(_)) => because("is in B only".to_owned()),
            (Some(x), Some(y)) if x.dtype != y.dtype || x.shape != y.shape => {
                because(format!("is {} {:?} in A, {} {:?} in B", x.dtype, x.shape, y.dtype, y.shape))
            }
            (Some(x), Some(y)) => bytes(a, b, &x, &y),
        }
    };
    names.iter().filter_map(compare).collect()
}

fn bytes(a: &Checkpoint, b: &Checkpoint, x: &TensorView<'_>, y: &TensorView<'_>) -> Option<TensorDifference> {
    if x.bytes == y.bytes {
        return None;
    }
    let differ = || x.bytes.iter().zip(y.bytes).enumerate().filter(|(_, (x, y))| x != y).map(|(at, _)| at);
    let places = differ().take(LISTED).map(|at| place(a, b, [x, y], at)).collect();
    Some(TensorDifference {
        tensor: x.name.to_owned(),
        reason: None,
        bytes: differ().count(),
        of: x.bytes.len(),
        places,
    })
}

/// What the byte at `at` is.
fn place(a: &Checkpoint, b: &Checkpoint, [x, y]: [&TensorView<'_>; 2], at: usize) -> BytePlace {
    let (from, to) = (x.bytes[at], y.bytes[at]);
    let mut place = BytePlace { offset: at, expert: None, row: 0, block: None, a: from, b: to, what: String::new() };
    match (x.dtype, x.shape) {
        (Dtype::U8, &[_, rows, blocks, mxfp4::BLOCK_BYTES]) if x.name.ends_with("_blocks") => {
            let block = at / mxfp4::BLOCK_BYTES;
            let (row, byte) = (block / blocks, at % mxfp4::BLOCK_BYTES);
            (place.expert, place.row, place.block) = (Some(row / rows), row % rows, Some(block % blocks));
            let codes = |c: u8| format!("{}, {}", e2m1::decode(c & 15), e2m1::decode(c >> 4));
            let k = block % blocks * mxfp4::BLOCK + 2 * byte;
            let scales = x.name.replace("_blocks", "_scales");
            let scale = |c: &Checkpoint| {
                let code = c.tensor(&scales).ok().and_then(|scales| scales.bytes.get(block).copied());
                code.map_or("unknown".to_owned(), scale_text)
            };
            let (of_a, of_b) = (scale(a), scale(b));
            let scale = if of_a == of_b { of_a } else { format!("{of_a} in A, {of_b} in B") };
            place.what = format!(
                "{}byte {byte} (columns {k}, {}): {from:#04x} in A (codes {}), {to:#04x} in B (codes {}); block scale {scale}",
                experts_row(&place, x.name),
                k + 1,
                codes(from),
                codes(to)
            );
        }
        (Dtype::U8, &[_, rows, blocks]) if x.name.ends_with("_scales") => {
            let row = at / blocks;
            (place.expert, place.row, place.block) = (Some(row / rows), row % rows, Some(at % blocks));
            let whose = experts_row(&place, x.name);
            place.what = format!("{whose}scale {} in A, {} in B", scale_text(from), scale_text(to));
        }
        (Dtype::Bf16, shape @ ([_, _] | [_])) => {
            let value = |t: &TensorView<'_>| bf16::decode(u16::from_le_bytes([t.bytes[at & !1], t.bytes[at | 1]]));
            let (columns, element) = (if let [_, columns] = shape { *columns } else { 1 }, at / 2);
            place.row = element / columns;
            let values = format!("{} in A, {} in B", value(x), value(y));
            let is_experts = x.name.contains(".experts.");
            place.what = match shape {
                [_, _] if is_experts => {
                    (place.expert, place.row) = (Some(element / columns), element % columns);
                    format!("{}{values}", experts_row(&place, x.name))
                }
                [_, _] => format!("row {}, column {}: {values}", place.row, element % columns),
                _ => format!("element {element}: {values}"),
            };
        }
        _ => place.what = format!("byte {at}: {from:#04x} in A, {to:#04x} in B"),
    }
    place
}

/// `expert 3, row 34 (gate of output 17), block 2, `.
fn experts_row(place: &BytePlace, tensor: &str) -> String {
    let row = place.row;
    let which = match tensor.contains("gate_up_proj") {
        true => format!(" ({} of output {})", if row.is_multiple_of(2) { "gate" } else { "up" }, row / 2),
        false => String::new(),
    };
    let expert = place.expert.map(|expert| format!("expert {expert}, ")).unwrap_or_default();
    let block = place.block.map(|block| format!("block {block}, ")).unwrap_or_default();
    format!("{expert}row {row}{which}, {block}")
}

/// A block scale's byte, its value, and whether it is one that no writer means.
fn scale_text(code: u8) -> String {
    match code {
        255 => "255 (NaN)".to_owned(),
        0 | 253.. => format!("{code} ({:e}, saturated)", e8m0::decode(code)),
        _ => format!("{code} (2^{})", i32::from(code) - 127),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_compared_may_be_at_fault() {
        let names = tensors_of("layers.1.mlp.up", Some("layers.1.mlp.router.weights"), 4);
        assert_eq!(names.len(), 3);
        assert!(names.iter().all(|name| name.starts_with("model.layers.1.mlp.experts.gate_up_proj_")), "{names:?}");
        let names = tensors_of("layers.1.attn_out", Some("layers.0.hidden"), 4);
        assert_eq!(names.len(), 1 + 6 + 1 + 2);
        assert!(names.iter().all(|name| name.starts_with("model.layers.1.")), "{names:?}");
        assert_eq!(tensors_of("embed", None, 4), ["model.embed_tokens.weight"]);
    }
}
