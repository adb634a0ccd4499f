//! `fourfold devices`: the adapters, and which one `--device auto` takes.

use super::{Ending, terminal};
use fourfold::device::gpu::{AdapterFacts, is_hardware, list};
use std::io::{self, Write};

const NONE: &str = "\
No Vulkan, Metal or DirectX 12 adapter was found: models run on the CPU.
A GPU needs its maker's driver. On Debian and Ubuntu, `apt install mesa-vulkan-drivers` brings those of AMD and Intel
GPUs and a software adapter; NVIDIA's driver has Vulkan in `libnvidia-gl-*`.";

pub(super) fn devices() -> anyhow::Result<Ending> {
    let adapters = list();
    let auto = auto(&adapters);
    let mark = |taken: bool| if taken { "auto" } else { "" }.to_owned();
    let mut rows: Vec<Vec<String>> = adapters
        .iter()
        .enumerate()
        .map(|(i, a)| {
            let subgroup = match a.subgroup {
                (0, _) => "none".to_owned(),
                (min, max) if min == max => min.to_string(),
                (min, max) => format!("{min} to {max}"),
            };
            let f16 = if a.f16 { "yes" } else { "no" }.to_owned();
            let (name, backend, kind) = (a.name.clone(), a.backend.clone(), a.kind.to_owned());
            let binding = terminal::bytes(a.max_binding_bytes.min(a.max_buffer_bytes));
            vec![mark(auto == Some(i)), name, backend, kind, subgroup, f16, binding, a.driver.clone()]
        })
        .collect();
    let cpu = ["CPU", "", "twins of the kernels", "", "", "no limit", ""];
    rows.push([mark(auto.is_none())].into_iter().chain(cpu.map(str::to_owned)).collect());
    let mut out = io::stdout().lock();
    let head = ["", "name", "backend", "kind", "subgroup", "f16", ">largest binding", "driver"];
    terminal::table(&mut out, terminal::Paint(terminal::styled(&io::stdout())), &head, &rows)?;
    if adapters.is_empty() {
        writeln!(out, "\n{NONE}")?;
    } else {
        writeln!(out, "\nChoose with --adapter NAME (a part of the name will do) or --device cpu.")?;
        if auto.is_none() {
            writeln!(out, "A software adapter computes on the CPU as well: auto takes the twins instead.")?;
        }
    }
    Ok(Ending::Done)
}

/// Which one `--device auto` takes: the engine opens the first, and takes the CPU if that is software.
fn auto(adapters: &[AdapterFacts]) -> Option<usize> {
    adapters.first().filter(|a| is_hardware(a)).map(|_| 0)
}
