//! Every kernel with every slot filling: it composes, naga validates it, and it translates to SPIR-V, MSL and HLSL.
//! Needs no GPU.

use fourfold::ops::{KERNELS, Kept, Row, Step};
use fourfold::sampler::Rule;
use fourfold::shader::{self, Kernel, SHARED};
use naga::back::{PipelineConstants, hlsl, msl, spv};
use naga::valid::{Capabilities, ModuleInfo, ShaderStages, SubgroupOperationSet, ValidationFlags, Validator};
use std::collections::BTreeSet;

/// Kernels that naga cannot express in a language, by the file's stem: matrix units of 16 x 16 are not in HLSL, and MSL's
/// are 8 x 8.
const NOT_IN_HLSL: [&str; 3] = ["linear_matrix", "moe_up_matrix", "moe_down_matrix"];
const NOT_IN_MSL: [&str; 3] = NOT_IN_HLSL;

/// Every choice of fillings of a kernel's slots.
fn fillings(kernel: &Kernel) -> Vec<Vec<(&'static str, &'static str)>> {
    kernel.slots.iter().fold(vec![Vec::new()], |some, slot| {
        let with = |chosen: &Vec<_>| {
            let chosen = chosen.clone();
            slot.fillings.iter().map(move |file| [&chosen[..], &[(slot.name, *file)]].concat())
        };
        some.iter().flat_map(with).collect()
    })
}

/// Whether a launch can have these together: a tile or block has as many inputs as `group` puts in one, and sums over lanes are all
/// made one way.
fn possible(fillings: &[(&str, &str)]) -> bool {
    let file = |wanted| fillings.iter().find(|(slot, _)| *slot == wanted).map(|(_, file)| *file);
    let carried = match (file("routes"), file("tiles"), file("tile")) {
        (Some("routes_grouped"), tiles, tile) => {
            matches!((tiles, tile), (Some("tiles_2"), Some("tile_2x4")) | (Some("tiles_4"), Some("tile_4x4")))
        }
        (Some(_), _, Some(tile)) => tile.starts_with("tile_1"),
        (_, Some(tiles), _) if file("block").is_some() => {
            matches!((tiles, file("block")), ("tiles_16", Some("block_16")) | ("tiles_64", Some("block_64")))
        }
        _ => true,
    };
    let alike = match (file("fold"), file("reduce")) {
        (Some(fold), Some(reduce)) => fold.ends_with("shared") == reduce.ends_with("shared"),
        _ => true,
    };
    carried && alike
}

fn each(mut see: impl FnMut(String, naga::Module)) {
    for kernel in KERNELS {
        let mut seen = BTreeSet::new();
        for fillings in fillings(kernel).into_iter().filter(|fillings| possible(fillings)) {
            // A filling may leave other slots unused.
            if !seen.insert(shader::compose(kernel, &fillings)) {
                continue;
            }
            let name = shader::label(kernel, &fillings).into_owned();
            let module = shader::parse(&name, &shader::compose(kernel, &fillings)).unwrap_or_else(|e| panic!("{e}"));
            see(name, module);
        }
    }
}

fn validate(name: &str, module: &naga::Module) -> ModuleInfo {
    // Halves within a word of f32 are what any adapter of the last ten years has; matrix units are asked for.
    let mut capabilities = Capabilities::SUBGROUP | Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    if NOT_IN_HLSL.iter().any(|stem| name.starts_with(stem)) {
        capabilities |= Capabilities::COOPERATIVE_MATRIX | Capabilities::SHADER_FLOAT16;
    }
    Validator::new(ValidationFlags::all(), capabilities)
        .subgroup_stages(ShaderStages::COMPUTE)
        .subgroup_operations(SubgroupOperationSet::all())
        .validate(module)
        .unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string("")))
}

/// A value for every override: a power of two keeps workgroup sizes legal.
fn constants(module: &naga::Module) -> PipelineConstants {
    module.overrides.iter().filter_map(|(_, o)| Some((o.name.clone()?, 64.0))).collect()
}

#[test]
fn every_filling_translates_to_every_language() {
    let mut count = 0;
    each(|name, module| {
        let info = validate(&name, &module);
        let (module, info) = naga::back::pipeline_constants::process_overrides(
            &module,
            &info,
            Some((naga::ShaderStage::Compute, "main")),
            &constants(&module),
        )
        .unwrap_or_else(|e| panic!("{name}: overrides: {e}"));
        let entry = (naga::ShaderStage::Compute, "main".to_owned());
        let stem = name.split('(').next().unwrap();

        let words = spv::write_vec(&module, &info, &spv::Options { lang_version: (1, 3), ..Default::default() }, None)
            .unwrap_or_else(|e| panic!("{name}: SPIR-V: {e}"));
        assert_eq!(words[0], 0x0723_0203, "{name}: SPIR-V's magic number");

        if !NOT_IN_MSL.contains(&stem) {
            let options = msl::Options { lang_version: (2, 4), fake_missing_bindings: true, ..Default::default() };
            let pipeline = msl::PipelineOptions { entry_point: Some(entry.clone()), ..Default::default() };
            let (text, _) =
                msl::write_string(&module, &info, &options, &pipeline).unwrap_or_else(|e| panic!("{name}: MSL: {e}"));
            assert!(text.contains("kernel void"), "{name}: MSL has no kernel");
        }
        if !NOT_IN_HLSL.contains(&stem) {
            let options = hlsl::Options { shader_model: hlsl::ShaderModel::V6_0, ..Default::default() };
            let pipeline = hlsl::PipelineOptions { entry_point: Some(entry) };
            let mut text = String::new();
            hlsl::Writer::new(&mut text, &options, &pipeline)
                .write(&module, &info, None)
                .unwrap_or_else(|e| panic!("{name}: HLSL: {e}"));
            assert!(text.contains("[numthreads("), "{name}: HLSL has no kernel");
        }
        count += 1;
    });
    println!("{count} kernels with filled slots, each in three languages");
    assert!(count >= 30, "only {count} fillings: were slots lost?");
}

#[test]
fn bindings_fit_any_adapter() {
    each(|name, module| {
        let bindings = shader::bindings(&module);
        let names: BTreeSet<&str> = bindings.iter().map(|b| b.name.as_str()).collect();
        let numbers: BTreeSet<u32> = bindings.iter().map(|b| b.index).collect();
        assert_eq!((names.len(), numbers.len()), (bindings.len(), bindings.len()), "{name}: a name or number twice");
        let storage = bindings.iter().filter(|b| !b.uniform).count();
        // What is fused binds more, where an adapter allows it.
        let wide = ["norm_linear", "norm_moe_up", "linear_add", "moe_down_add"];
        let fused = wide.iter().any(|kernel| name.starts_with(kernel)) || name.contains("routes_chosen");
        let most = if fused { fourfold::ops::NormLinear::BINDINGS as usize } else { 8 };
        assert!(storage <= most, "{name} binds {storage} storage buffers; WebGPU's default is 8");
        for (_, v) in module.global_variables.iter() {
            assert!(v.binding.is_none_or(|b| b.group == 0), "{name} uses a group other than 0");
        }
    });
}

#[test]
fn workgroup_memory_fits_desktop_adapters() {
    each(|name, module| {
        let shared = module.global_variables.iter().filter(|(_, v)| v.space == naga::AddressSpace::WorkGroup);
        let bytes: u32 = shared.map(|(_, v)| module.types[v.ty].inner.size(module.to_ctx())).sum();
        // WebGPU's default is 16 KiB. Matrix units and 32 lanes without shuffles are taken only where there is more.
        let more = name.contains("_matrix") || (name.contains("lanes_32") && name.contains("fold_shared"));
        let most = if more { 32 << 10 } else { 16 << 10 };
        assert!(bytes <= most, "{name} has {bytes} bytes of workgroup memory");
    });
}

#[test]
fn rust_and_wgsl_lay_out_structs_alike() {
    let offsets = |module: &naga::Module, name: &str| {
        let ty = module.types.iter().find(|(_, ty)| ty.name.as_deref() == Some(name));
        let naga::TypeInner::Struct { members, span } = &ty.unwrap().1.inner else { panic!("{name} is no struct") };
        let members: Vec<_> = members.iter().map(|m| (m.name.clone().unwrap(), m.offset as usize)).collect();
        (members, *span as usize)
    };
    let kernel = |name: &str| {
        let kernel = KERNELS.into_iter().find(|k| k.name == name).unwrap();
        shader::parse(name, &shader::compose(kernel, &fillings(kernel)[0])).unwrap()
    };
    let (members, size) = offsets(&kernel("embed"), "Row");
    let want = [
        ("token", std::mem::offset_of!(Row, token)),
        ("sequence", std::mem::offset_of!(Row, sequence)),
        ("position", std::mem::offset_of!(Row, position)),
        ("pad", std::mem::offset_of!(Row, pad)),
    ];
    assert_eq!(members, want.map(|(name, at)| (name.to_owned(), at)));
    assert_eq!(size, size_of::<Row>());
    let (members, size) = offsets(&kernel("group"), "Tile");
    // Rust has tiles as words: `Group::words`.
    assert_eq!(members, [("expert", 0), ("count", 4), ("routes", 8)].map(|(name, at)| (name.to_owned(), at)));
    let op = fourfold::ops::Group { e: 1, a: 1, routes: 2 };
    assert_eq!(size, op.words() * 4);
    let (members, size) = offsets(&kernel("draw"), "Rule");
    let want = [
        ("sharp", std::mem::offset_of!(Rule, sharp)),
        ("top_k", std::mem::offset_of!(Rule, top_k)),
        ("top_p", std::mem::offset_of!(Rule, top_p)),
        ("far", std::mem::offset_of!(Rule, far)),
        ("seed", std::mem::offset_of!(Rule, seed)),
        ("stream", std::mem::offset_of!(Rule, stream)),
    ];
    assert_eq!(members, want.map(|(name, at)| (name.to_owned(), at)));
    assert_eq!(size, size_of::<Rule>());
    let (members, size) = offsets(&kernel("narrow"), "Kept");
    let want = [
        ("largest", std::mem::offset_of!(Kept, largest)),
        ("stage", std::mem::offset_of!(Kept, stage)),
        ("below", std::mem::offset_of!(Kept, below)),
        ("id", std::mem::offset_of!(Kept, id)),
        ("digits", std::mem::offset_of!(Kept, digits)),
        ("pad", std::mem::offset_of!(Kept, pad)),
        ("wanted", std::mem::offset_of!(Kept, wanted)),
    ];
    assert_eq!(members, want.map(|(name, at)| (name.to_owned(), at)));
    assert_eq!(size, size_of::<Kept>());
    let (members, size) = offsets(&kernel("linear"), "Step");
    assert_eq!(members[0], ("tokens".to_owned(), std::mem::offset_of!(Step, tokens)));
    assert_eq!(size, size_of::<Step>());
}

#[test]
fn every_shared_file_is_used() {
    let imports = |source: &'static str| source.lines().filter_map(|l| l.strip_prefix("#import ")).map(str::trim);
    let sources = KERNELS.iter().map(|k| k.source).chain(SHARED.iter().map(|(_, text)| *text));
    let mut used: BTreeSet<&str> = sources.flat_map(imports).collect();
    used.extend(KERNELS.iter().flat_map(|k| k.slots).flat_map(|slot| slot.fillings));
    let unused: Vec<&str> = SHARED.iter().map(|(name, _)| *name).filter(|name| !used.contains(name)).collect();
    assert!(unused.is_empty(), "no kernel uses {unused:?}");
}
