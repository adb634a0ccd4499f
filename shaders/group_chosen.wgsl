// group_chosen: choose the experts of a few rows, and put their routes by expert: what router and group make, in one launch.
//
// grid      1 workgroup
// in        scores  f32   [T, E]
// out       experts, weights  [T, A]     what router writes
//           tiles   slot  [(T A + (N - 1) min(T A, E)) / N]     what group writes
// override  E, A, ALL
// slots     tiles
// requires  A <= E <= 1024; T ceil(E / 4) and T A at most 256
// twin      src/ops/group.rs
//
// A lane has a route. It counts the routes to its expert, and those before it; every N-th of them begins a tile. Then it counts the tiles
// of lower experts.
#import step
#import tiles
#import scores
#import unused
const WG = 256u;
const FOUR = vec4<u32>(0u, 1u, 2u, 3u);
const NONE = 0xffffffffu;
@group(0) @binding(1) var<storage, read> scores: array<f32>;
@group(0) @binding(2) var<storage, read_write> tiles: array<Tile>;
@group(0) @binding(3) var<storage, read_write> experts: array<u32>;
@group(0) @binding(4) var<storage, read_write> weights: array<f32>;

// The expert whose tile begins with this route; NONE where none does.
var<workgroup> begun: array<u32, WG>;

fn how_many(which: vec4<bool>) -> u32 {
    let ones = select(vec4<u32>(0u), vec4<u32>(1u), which);
    return ones.x + ones.y + ones.z + ones.w;
}

@compute @workgroup_size(WG)
fn main(@builtin(local_invocation_index) lane: u32) {
    let routes = step.tokens * A;
    choose(0u, step.tokens, lane, WG);
    let expert = chosen[min(lane, routes - 1u)];
    var count = 0u;
    var place = 0u;
    for (var r = 0u; r < routes; r += 4u) {
        let same = vec4<u32>(chosen[r], chosen[r + 1u], chosen[r + 2u], chosen[r + 3u]) == vec4<u32>(expert);
        count += how_many(same & (r + FOUR < vec4<u32>(routes)));
        place += how_many(same & (r + FOUR < vec4<u32>(lane)));
    }
    let begins = lane < routes && place % TILE_ROUTES == 0u;
    begun[lane] = select(NONE, expert, begins);
    workgroupBarrier(); // all tiles are known
    var tile = place / TILE_ROUTES;
    var used = 0u;
    for (var r = 0u; r < routes; r += 4u) {
        let some = vec4<u32>(begun[r], begun[r + 1u], begun[r + 2u], begun[r + 3u]);
        tile += how_many(some < vec4<u32>(expert));
        used += how_many(some != vec4<u32>(NONE));
    }
    if lane < routes {
        tiles[tile].routes[place % TILE_ROUTES] = lane;
        experts[lane] = expert;
        weights[lane] = weight_of(lane / A, lane % A);
    }
    if begins {
        tiles[tile].expert = expert;
        tiles[tile].count = min(count - place, TILE_ROUTES);
        for (var j = count - place; j < TILE_ROUTES; j++) {
            tiles[tile].routes[j] = 0u;
        }
    }
    clear_unused(used, routes, lane);
}
