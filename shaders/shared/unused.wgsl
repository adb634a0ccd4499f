// unused: the tiles of `group` behind those that are used. The kernel gives `tiles`, and has WG lanes.
#import tiles
#import routing

// A step of so many routes has room for as many tiles as it might need: what an earlier step left there says nothing.
fn clear_unused(used: u32, routes: u32, lane: u32) {
    let most = (routes + (TILE_ROUTES - 1u) * min(routes, E)) / TILE_ROUTES;
    for (var tile = used + lane; tile < most; tile += WG) {
        tiles[tile].expert = 0u;
        tiles[tile].count = 0u;
        for (var j = 0u; j < TILE_ROUTES; j++) {
            tiles[tile].routes[j] = 0u;
        }
    }
}
