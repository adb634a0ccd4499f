// group: the routes of a step by expert, in tiles of as many as a workgroup carries.
//
//   tiles = of each expert in order, its routes in order, N to a tile (slot); then tiles of no routes
//
// grid      1 workgroup
// in        experts  u32   [T, A]
// out       tiles    slot  [(T A + (N - 1) min(T A, E)) / N]     as many as there can be
// override  E, A
// slots     tiles
// requires  E <= 1024, every expert below E, T A below 65536
// twin      src/ops/group.rs
//
// A lane looks for four experts in a span of the routes: for all experts there are as many spans as lanes allow, and no more
// than there are fours of routes. It counts its routes, and when every lane has, it looks at them again and places them.
#import step
#import tiles
#import routing
#import unused
const WG = 256u;
const EXPERTS = 4u;
@group(0) @binding(1) var<storage, read> experts: array<u32>;
@group(0) @binding(2) var<storage, read_write> tiles: array<Tile>;

var<workgroup> places: array<u32, 1024>; // [E, spans]: how many routes there are, then where the next one goes
var<workgroup> heads: array<u32, 1024>; // [E]: how many routes an expert has, and above them its first tile

fn spans() -> u32 {
    return min(WG / ((E + EXPERTS - 1u) / EXPERTS), (step.tokens * A + 3u) / 4u);
}

fn total_of(expert: u32) -> u32 {
    return heads[expert] & 0xffffu;
}

fn first_of(expert: u32) -> u32 {
    return heads[expert] >> 16u;
}

fn tiles_for(routes: u32) -> u32 {
    return (routes + TILE_ROUTES - 1u) / TILE_ROUTES;
}

// The experts of four routes; none past the last.
fn four_at(route: u32, last: u32) -> vec4<u32> {
    let at = vec4<u32>(route) + vec4<u32>(0u, 1u, 2u, 3u);
    let near = min(at, vec4<u32>(last));
    let found = vec4<u32>(experts[near.x], experts[near.y], experts[near.z], experts[near.w]);
    return select(found, vec4<u32>(0xffffffffu), at > vec4<u32>(last));
}

fn count(expert: u32, lane: u32) {
    if expert - lane / spans() * EXPERTS < EXPERTS {
        places[expert * spans() + lane % spans()] += 1u;
    }
}

fn put(expert: u32, route: u32, lane: u32) {
    if expert - lane / spans() * EXPERTS < EXPERTS {
        let place = places[expert * spans() + lane % spans()];
        places[expert * spans() + lane % spans()] = place + 1u;
        tiles[first_of(expert) + place / TILE_ROUTES].routes[place % TILE_ROUTES] = route;
    }
}

@compute @workgroup_size(WG)
fn main(@builtin(local_invocation_index) lane: u32) {
    let routes = step.tokens * A;
    let span = lane % spans();
    let length = (routes + spans() - 1u) / spans();
    let start = span * length;
    let end = min(start + length, routes);
    let mine = lane / spans() * EXPERTS;
    for (var e = mine; e < min(mine + EXPERTS, E); e++) {
        places[e * spans() + span] = 0u;
    }
    for (var route = start; route < end; route += 4u) {
        let four = four_at(route, end - 1u);
        count(four.x, lane);
        count(four.y, lane);
        count(four.z, lane);
        count(four.w, lane);
    }
    workgroupBarrier(); // all spans are counted
    for (var e = lane; e < E; e += WG) {
        var total = 0u;
        for (var s = 0u; s < spans(); s++) {
            let routes_here = places[e * spans() + s];
            places[e * spans() + s] = total;
            total += routes_here;
        }
        heads[e] = total;
    }
    workgroupBarrier(); // all experts' routes are counted
    var firsts: array<u32, 4>; // 1024 / WG
    for (var e = lane; e < E; e += WG) {
        var first = 0u;
        for (var other = 0u; other < e; other++) {
            first += tiles_for(total_of(other));
        }
        firsts[e / WG] = first;
    }
    workgroupBarrier(); // nobody counts tiles any more
    for (var e = lane; e < E; e += WG) {
        heads[e] |= firsts[e / WG] << 16u;
    }
    workgroupBarrier(); // every expert knows its tiles
    for (var e = mine; e < min(mine + EXPERTS, E); e++) {
        // The heads of the expert's tiles, by turns with the other spans, and zeros behind its last route.
        for (var i = span; i < tiles_for(total_of(e)); i += spans()) {
            let tile = first_of(e) + i;
            tiles[tile].expert = e;
            tiles[tile].count = min(total_of(e) - i * TILE_ROUTES, TILE_ROUTES);
            for (var j = total_of(e) - i * TILE_ROUTES; j < TILE_ROUTES; j++) {
                tiles[tile].routes[j] = 0u;
            }
        }
    }
    for (var route = start; route < end; route += 4u) {
        let four = four_at(route, end - 1u);
        put(four.x, route, lane);
        put(four.y, route + 1u, lane);
        put(four.z, route + 2u, lane);
        put(four.w, route + 3u, lane);
    }
    clear_unused(first_of(E - 1u) + tiles_for(total_of(E - 1u)), routes, lane);
}
