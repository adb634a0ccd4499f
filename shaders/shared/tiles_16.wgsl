// Fills slot `tiles`: at most 16 routes that go to one expert, for matrix units.
const TILE_ROUTES = 16u;

struct Tile {
    expert: u32,
    count: u32, // 0 in a tile that is not used
    routes: array<u32, 16>, // `count` of them, then zeros
}
