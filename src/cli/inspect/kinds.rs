//! What tensors are, by their names: scales and the codes that they belong to, formats.

use fourfold::checkpoint::{Checkpoint, Dtype, TensorView};

/// How names of tensors that hold scales end.
const SCALES: [&str; 4] = ["_scale", "_scale_2", "_scale_inv", "_scales"];

/// Whether a tensor of this name holds scales.
pub(super) fn is_scale(name: &str) -> bool {
    SCALES.iter().any(|end| name.ends_with(end))
}

/// The FP4 codes that a tensor of block scales belongs to.
pub(super) fn codes<'a>(checkpoint: &'a Checkpoint, scales: &str) -> Option<TensorView<'a>> {
    let find = |name: String| checkpoint.tensor(&name).ok().filter(|view| view.dtype == Dtype::U8);
    if let Some(stem) = scales.strip_suffix("_scales") {
        return find(format!("{stem}_blocks"));
    }
    if let Some(module) = scales.strip_suffix(".weight_scale") {
        return find(format!("{module}.weight")).or_else(|| find(format!("{module}.weight_packed")));
    }
    // Fused experts.
    find(scales.strip_suffix("_weight_scale")?.to_owned())
}

/// Numbers of the model that a tensor holds: an FP4 byte has two, a scale belongs to others.
pub(super) fn parameters(view: &TensorView<'_>) -> u64 {
    let elements = view.shape.iter().map(|&n| n as u64).product();
    match view.dtype {
        _ if is_scale(view.name) => 0,
        Dtype::U8 => 2 * elements,
        _ => elements,
    }
}

/// The format of what a tensor holds; none for scales, which are part of another's.
pub(super) fn format_of(checkpoint: &Checkpoint, view: &TensorView<'_>) -> Option<&'static str> {
    if is_scale(view.name) {
        return None;
    }
    let name = view.name.strip_suffix("_packed").unwrap_or(view.name);
    let has_e4m3 = |scales: String| checkpoint.tensor(&scales).is_ok_and(|scales| scales.dtype == Dtype::F8E4M3);
    Some(match view.dtype {
        Dtype::U8 if has_e4m3(format!("{name}_scale")) || has_e4m3(format!("{name}_weight_scale")) => "NVFP4",
        Dtype::U8 => "MXFP4",
        Dtype::F8E4M3 => "FP8",
        other => other.word(),
    })
}

/// The layer in `model.layers.7.mlp...`.
pub(super) fn layer(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

/// The expert in `model.layers.7.mlp.experts.3.down_proj...`.
pub(super) fn expert(name: &str) -> Option<usize> {
    name.split_once(".mlp.experts.")?.1.split('.').next()?.parse().ok()
}

/// The name with the numbers of its layer and expert left open.
pub(super) fn pattern(name: &str) -> String {
    let open = |name: String, before: &str, number: Option<usize>| match number {
        Some(number) => name.replacen(&format!("{before}.{number}."), &format!("{before}.*."), 1),
        None => name,
    };
    let expert = expert(name);
    open(open(name.to_owned(), "layers", layer(name)), "experts", expert)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_show_their_layer() {
        let name = "model.layers.17.mlp.experts.down_proj_blocks";
        assert_eq!((layer(name), pattern(name)), (Some(17), "model.layers.*.mlp.experts.down_proj_blocks".to_owned()));
        assert_eq!((layer("lm_head.weight"), pattern("lm_head.weight")), (None, "lm_head.weight".to_owned()));
        let expert = "model.layers.17.mlp.experts.17.up_proj.weight";
        assert_eq!(pattern(expert), "model.layers.*.mlp.experts.*.up_proj.weight");
    }

    #[test]
    fn scales_are_known_by_their_names() {
        let scales = ["a.weight_scale", "a.weight_scale_2", "a.weight_scale_inv", "a.k_scale", "a.input_global_scale"];
        assert!(scales.into_iter().chain(["a_scales", "a_weight_scale"]).all(is_scale));
        assert!(!["a.weight", "a.weight_packed", "a_blocks", "a_bias"].into_iter().any(is_scale));
    }
}
