// Fills slot `tiles`: at most two routes that go to one expert, as many as a workgroup carries. Rust has the same struct in
// src/ops/group.rs.
const TILE_ROUTES = 2u;

struct Tile {
    expert: u32,
    count: u32, // 0 in a tile that is not used
    routes: array<u32, 2>, // `count` of them, then zeros
}
