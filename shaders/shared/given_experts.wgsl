// Fills slot `given`: the expert of each route, as router leaves them.
@group(0) @binding(1) var<storage, read> experts: array<u32>; // [T, A]

fn prepare(lane: u32) {
}

fn given(route: u32) -> u32 {
    return experts[route];
}
