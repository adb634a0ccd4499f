// Fills slot `routes`: a workgroup carries one route, and chooses it itself, as router does; the first of a token's workgroups
// writes the choice down.
#import scores
@group(0) @binding(5) var<storage, read> scores: array<f32>;          // [T, E]
@group(0) @binding(9) var<storage, read_write> experts: array<u32>;   // [T, A]
@group(0) @binding(10) var<storage, read_write> weights: array<f32>;  // [T, A]

fn expert_of(tile: u32, lane: u32, first: bool) -> u32 {
    choose(tile / A, 1u, lane, LANES * WARPS);
    if first && tile % A == 0u {
        for (var a = lane; a < A; a += LANES * WARPS) {
            experts[tile + a] = chosen[a];
            weights[tile + a] = weight_of(0u, a);
        }
    }
    return chosen[tile % A];
}

fn routes_of(tile: u32) -> u32 {
    return 1u;
}

fn route_at(tile: u32, j: u32) -> u32 {
    return tile;
}
