// Fills slot `routes`: a workgroup carries a tile of `group`, so that an expert's weights are read once for all its routes.
// Slot `tile` has the TOKENS of a tile then.
#import tiles
@group(0) @binding(5) var<storage, read> tiles: array<Tile>;

fn expert_of(tile: u32, lane: u32, first: bool) -> u32 {
    return tiles[tile].expert;
}

fn routes_of(tile: u32) -> u32 {
    return tiles[tile].count;
}

// Route j of the tile; 0 past the last.
fn route_at(tile: u32, j: u32) -> u32 {
    return tiles[tile].routes[j];
}
