// moe_down: each route through the second matrix of its expert. Not weighted yet: see moe_scatter.
//
//   y[t,a,d] = bias[e,d] + scale_d scale_x sum_k w[e,d,k] x[t,a,k]          e = experts[t,a]
//
// grid      ceil(D / ROWS) x tiles workgroups
// in        experts  slot  [T, A]          or the tiles that `group` made of them
//           x        slot  [T, A, K]
//           w        slot  [COUNT, D, K]     experts FIRST.. of the layer
//           bias     slot  [E, D]
// out       y        f32   [T, A, D]         routes to other parts' experts are left alone
// override  K, D, FIRST, COUNT, ROWS
// slots     weights, e2m1, input, bias, routes, tiles, tile, lanes, fold
// requires  K a multiple of 16
// twin      src/ops/moe_down.rs
#import products
#import routes
override D: u32;
override FIRST: u32;
override COUNT: u32;
@group(0) @binding(6) var<storage, read_write> y: array<f32>;

// The tile, its expert's place in this part, and the first output of the workgroup.
var<private> tile: u32;
var<private> part: u32;
var<private> d0: u32;
// Its first row of weights.
var<private> row0: u32;

fn weight_row(l: u32) -> u32 {
    return select(min(row0 + l, COUNT * D - 1u), row0 + l, side_by_side());
}

fn side_by_side() -> bool {
    return D % ROWS == 0u;
}

fn bias_row(l: u32) -> u32 {
    return FIRST * D + weight_row(l);
}

fn input_row(j: u32) -> u32 {
    return route_at(tile, j);
}

@compute @workgroup_size(LANES * WARPS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    tile = group.y;
    d0 = group.x * ROWS;
    let expert = expert_of(tile, lane, group.x == 0u);
    let count = routes_of(tile);
    part = expert - FIRST; // wraps to a large number for an expert before this part
    if count == 0u || part >= COUNT {
        return; // the whole workgroup
    }
    row0 = part * D + d0;
    fetch(0u, 0u, lane);
    multiply(lane);
    for (var i = lane; i < ROWS * count; i += LANES * WARPS) {
        let d = d0 + i % ROWS;
        if d < D {
            let route = route_at(tile, i / ROWS);
            y[route * D + d] = product(i % ROWS, i / ROWS, input_scale(route));
        }
    }
}
