// Fills slot `tiles`: at most four routes that go to one expert, as many as a workgroup carries. Rust has the same struct in
// src/ops/group.rs.
const TILE_ROUTES = 4u;

struct Tile {
    expert: u32,
    count: u32, // 0 in a tile that is not used
    routes: array<u32, 4>, // `count` of them, then zeros
}
