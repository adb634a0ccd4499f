//! The WGSL sources and how they are put together: a kernel's `#import name` lines are replaced by files of
//! `shaders/shared/`, a slot's name by the file chosen to fill it. No text is substituted, no `#ifdef`.

use std::borrow::Cow;

/// One file of `shaders/`: a kernel with the slots that are left open in it.
#[derive(Debug)]
pub struct Kernel {
    /// The file's stem.
    pub name: &'static str,
    /// The WGSL source, imports not yet resolved.
    pub source: &'static str,
    /// The open slots, each with every file that may fill it.
    pub slots: &'static [Slot],
}

/// A hole in a kernel that several shared files fit.
#[derive(Debug)]
pub struct Slot {
    /// The name in `#import`.
    pub name: &'static str,
    /// Stems of the files in `shaders/shared/` that fill it.
    pub fillings: &'static [&'static str],
}

/// A weight matrix by its format on disk.
pub(crate) const WEIGHTS: Slot = Slot { name: "weights", fillings: &WEIGHT_FILES };
const WEIGHT_FILES: [&str; 5] = ["weights_bf16", "weights_fp8", "weights_fp8_blocks", "weights_mxfp4", "weights_nvfp4"];
/// The rows that a matrix is multiplied with: as they are, or quantised.
pub(crate) const INPUT: Slot = Slot { name: "input", fillings: &["input_f32", "input_nvfp4"] };
/// The same where nothing is quantised.
pub(crate) const F32_INPUT: Slot = Slot { name: "input", fillings: &["input_f32"] };
/// The gated activation.
pub(crate) const GLU: Slot = Slot { name: "glu", fillings: &["glu_clamped", "glu_silu"] };
/// What is added to the residual stream: rows, or the weighted sum of routes.
pub(crate) const ADDEND: Slot = Slot { name: "addend", fillings: &["addend_rows", "addend_routes"] };
/// Routes of a tile of `group`.
pub(crate) const TILES: Slot = Slot { name: "tiles", fillings: &["tiles_2", "tiles_4", "tiles_16", "tiles_64"] };
/// The same without matrix units.
pub(crate) const ROUTE_TILES: Slot = Slot { name: "tiles", fillings: &["tiles_2", "tiles_4"] };
/// The same for matrix units.
pub(crate) const MATRIX_TILES: Slot = Slot { name: "tiles", fillings: &["tiles_16", "tiles_64"] };
/// What a workgroup with matrix units multiplies: many rows of input, or few.
pub(crate) const BLOCK: Slot = Slot { name: "block", fillings: &["block_16", "block_64"] };
/// What attention over some keys leaves: the result, or a segment's part of it.
pub(crate) const RESULT: Slot = Slot { name: "result", fillings: &["result_whole", "result_segment"] };
/// A learned score that takes attention from the keys, or none.
pub(crate) const SINK: Slot = Slot { name: "sink", fillings: &["sink_bf16", "sink_none"] };
/// The scale that activations are quantised with.
pub(crate) const ACT_SCALE: Slot = Slot { name: "act_scale", fillings: &ACT_SCALE_FILES };
const ACT_SCALE_FILES: [&str; 4] = ["act_scale_expert", "act_scale_static", "act_scale_tensor", "act_scale_token"];
/// A bias, or none.
pub(crate) const BIAS: Slot = Slot { name: "bias", fillings: &["bias_bf16", "bias_none"] };
/// How FP4 codes become numbers; the adapter decides.
pub(crate) const E2M1: Slot = Slot { name: "e2m1", fillings: &["e2m1_half", "e2m1_table"] };
/// Lanes that share a row of weights; the adapter decides.
pub(crate) const LANES: Slot = Slot { name: "lanes", fillings: &["lanes_8", "lanes_32"] };
/// The sum of those lanes; the adapter decides.
pub(crate) const REDUCE: Slot = Slot { name: "reduce", fillings: &["reduce_subgroup", "reduce_shared"] };
/// The sums of several numbers over those lanes; the adapter decides.
pub(crate) const FOLD: Slot = Slot { name: "fold", fillings: &["fold_subgroup", "fold_shared"] };
/// Rows of inputs of a workgroup, and rows of weights that pass at a time.
pub(crate) const TILE: Slot = Slot { name: "tile", fillings: &["tile_1x2", "tile_2x4", "tile_4x2", "tile_4x4"] };
/// The same of experts, whose codes take longer to decode than to read.
pub(crate) const EXPERT_TILE: Slot = Slot { name: "tile", fillings: &["tile_1x4", "tile_2x4", "tile_4x4"] };
/// The same of one route, or one row.
pub(crate) const ROUTE_TILE: Slot = Slot { name: "tile", fillings: &["tile_1x4"] };
/// The same, half as many rows of weights at a time.
pub(crate) const ROW_TILE: Slot = Slot { name: "tile", fillings: &["tile_1x2"] };
/// The routes that a workgroup carries.
pub(crate) const ROUTES: Slot = Slot { name: "routes", fillings: &["routes_each", "routes_grouped"] };
/// The same where they may not be chosen yet.
pub(crate) const UP_ROUTES: Slot =
    Slot { name: "routes", fillings: &["routes_each", "routes_grouped", "routes_chosen"] };
/// Input that is made on the way.
pub(crate) const NORMED_INPUT: Slot = Slot { name: "input", fillings: &["input_normed"] };
/// What it is made of: a row as it is, or with what is added to it.
pub(crate) const RESIDUAL: Slot = Slot { name: "residual", fillings: &["residual_added", "residual_whole"] };
/// The same where nothing is added.
pub(crate) const WHOLE_RESIDUAL: Slot = Slot { name: "residual", fillings: &["residual_whole"] };
/// Where a row of a linear layer goes.
pub(crate) const OUTPUT: Slot = Slot { name: "output", fillings: &["output_rows", "output_rotated"] };
/// Whether heads are normalised before they are rotated.
pub(crate) const HEADS: Slot = Slot { name: "heads", fillings: &["heads_plain", "heads_normed"] };
/// The cache's format, read.
pub(crate) const CACHE: Slot = Slot { name: "cache", fillings: &["cache_f32", "cache_bf16"] };
/// The cache's format, written.
pub(crate) const APPEND: Slot = Slot { name: "append", fillings: &["append_f32", "append_bf16"] };

macro_rules! shared {
    ($($name:literal),* $(,)?) => {
        /// The files of `shaders/shared/`: stem and source.
        pub const SHARED: &[(&str, &str)] =
            &[$(($name, include_str!(concat!("../shaders/shared/", $name, ".wgsl")))),*];
    };
}

shared!(
    "act_scale_expert",
    "act_scale_static",
    "act_scale_tensor",
    "act_scale_token",
    "addend_routes",
    "addend_rows",
    "append_bf16",
    "append_f32",
    "bf16",
    "bias_bf16",
    "bias_none",
    "block_16",
    "block_64",
    "cache_bf16",
    "cache_f32",
    "choose",
    "dims",
    "divide",
    "dot16",
    "dynamic_scale",
    "e2m1_half",
    "e2m1_table",
    "e4m3",
    "exp",
    "first_route",
    "fold_shared",
    "fold_subgroup",
    "gate_up",
    "glu_clamped",
    "glu_silu",
    "head",
    "heads_normed",
    "heads_plain",
    "input_f32",
    "input_normed",
    "input_nvfp4",
    "lanes_32",
    "lanes_8",
    "line",
    "matrix",
    "norm",
    "order",
    "output_rotated",
    "output_rows",
    "pages",
    "passes",
    "philox",
    "reduce_shared",
    "reduce_subgroup",
    "residual_added",
    "residual_whole",
    "result_segment",
    "result_whole",
    "rotate",
    "routes_chosen",
    "routes_each",
    "routes_grouped",
    "routing",
    "products",
    "row",
    "scores",
    "segments",
    "sink_bf16",
    "sink_none",
    "sixteen",
    "step",
    "teams",
    "tile_1x2",
    "tile_1x4",
    "tile_2x4",
    "tile_4x2",
    "tile_4x4",
    "tiles_2",
    "tiles_4",
    "tiles_16",
    "tiles_64",
    "unused",
    "visible",
    "warps",
    "weights_bf16",
    "weights_fp8",
    "weights_fp8_blocks",
    "weights_mxfp4",
    "weights_nvfp4",
    "wide",
);

/// A kernel's whole source with every slot filled. Each shared file appears once, before its first use.
///
/// # Panics
/// If a slot has no filling or an import no file: both are bugs here, found by the test that composes everything.
pub fn compose(kernel: &Kernel, fillings: &[(&str, &str)]) -> String {
    let mut out = String::new();
    let mut seen = Vec::new();
    include(kernel.name, kernel.source, fillings, &mut seen, &mut out);
    out
}

fn include(name: &str, source: &str, fillings: &[(&str, &str)], seen: &mut Vec<String>, out: &mut String) {
    for line in source.lines() {
        let Some(import) = line.strip_prefix("#import ") else {
            out.push_str(line);
            out.push('\n');
            continue;
        };
        let import = import.split_whitespace().next().expect("an import names a file");
        let file = fillings.iter().find(|(slot, _)| *slot == import).map_or(import, |(_, file)| file);
        if seen.iter().any(|s| s == file) {
            continue;
        }
        seen.push(file.to_owned());
        let (_, text) = SHARED
            .iter()
            .find(|(stem, _)| *stem == file)
            .unwrap_or_else(|| panic!("{name}.wgsl imports {import}, which no file of shaders/shared fills"));
        include(file, text, fillings, seen, out);
    }
}

/// A variable that a composed kernel binds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// Its name.
    pub name: String,
    /// Its `@binding` number, in group 0.
    pub index: u32,
    /// Whether the kernel may write it.
    pub writable: bool,
    /// Whether it is a uniform.
    pub uniform: bool,
}

/// The variables that a module binds, in order of their numbers.
pub fn bindings(module: &naga::Module) -> Vec<Binding> {
    let mut found: Vec<Binding> = module
        .global_variables
        .iter()
        .filter_map(|(_, v)| {
            let writable = match v.space {
                naga::AddressSpace::Storage { access } => access.contains(naga::StorageAccess::STORE),
                _ => false,
            };
            let uniform = v.space == naga::AddressSpace::Uniform;
            v.binding.map(|b| Binding { name: v.name.clone().unwrap_or_default(), index: b.binding, writable, uniform })
        })
        .collect();
    found.sort_by_key(|b| b.index);
    found
}

/// Parse a composed kernel. The error shows the line at fault.
pub fn parse(name: &str, source: &str) -> Result<naga::Module, String> {
    naga::front::wgsl::parse_str(source).map_err(|e| format!("{name}: {}", e.emit_to_string(source)))
}

/// A short name for a kernel and its fillings: `linear(bf16, tile_8)`.
pub fn label(kernel: &Kernel, fillings: &[(&'static str, &'static str)]) -> Cow<'static, str> {
    if fillings.is_empty() {
        return Cow::Borrowed(kernel.name);
    }
    let files: Vec<&str> = fillings.iter().map(|(_, file)| *file).collect();
    Cow::Owned(format!("{}({})", kernel.name, files.join(", ")))
}
