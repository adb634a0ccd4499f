// moe_up: each token through the first matrix of its experts, and the gated activation.
//
//   g = bias[e, gate] + scale_gate scale_x sum_k w[e, gate, k] x[i,k]          e = experts[t,a], i = (t A + a) / SHARE
//   u = bias[e, up]   + scale_up   scale_x sum_k w[e, up, k]   x[i,k]          gate = f STRIDE, up = f STRIDE + UP
//   y[t,a,f] = glu(g, u)
//
// grid      ceil(2F / ROWS) x tiles workgroups
// in        experts  slot  [T, A]               or the tiles that `group` made of them, or scores to choose by
//           x        slot  [T A / SHARE, K]     SHARE routes read one row
//           w        slot  [COUNT, 2F, K]       experts FIRST.. of the layer
//           bias     slot  [E, 2F]
// out       y        f32   [T, A, F]            routes to other parts' experts are left alone
//           experts, weights   [T, A]           where they are chosen here: what router writes
// override  E, A, ALL where they are chosen here; K, F, SHARE, FIRST, COUNT, STRIDE, UP, ROWS          gate and up rows interleaved: 2, 1; in halves: 1, F
// slots     weights, e2m1, input, bias, glu, routes, tiles, tile, lanes, fold
// requires  K a multiple of 16; ROWS even, and of BATCH
// twin      src/ops/moe_up.rs
#import products
#import glu
#import gate_up
#import routes
override SHARE: u32;
override FIRST: u32;
override COUNT: u32;
@group(0) @binding(6) var<storage, read_write> y: array<f32>;

// The tile, and its expert's place in this part.
var<private> tile: u32;
var<private> part: u32;

fn held_experts() -> u32 {
    return COUNT;
}

fn bias_row(l: u32) -> u32 {
    return FIRST * F * 2u + weight_row(l);
}

fn input_row(j: u32) -> u32 {
    return route_at(tile, j) / SHARE;
}

@compute @workgroup_size(LANES * WARPS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    tile = group.y;
    f0 = group.x * (ROWS / 2u);
    let expert = expert_of(tile, lane, group.x == 0u);
    let count = routes_of(tile);
    part = expert - FIRST; // wraps to a large number for an expert before this part
    if count == 0u || part >= COUNT {
        return; // the whole workgroup
    }
    row0 = part * F * 2u + f0 * STRIDE;
    fetch(0u, 0u, lane);
    multiply(lane);
    for (var i = lane; i < ROWS / 2u * count; i += LANES * WARPS) {
        let l = i % (ROWS / 2u) * 2u;
        let j = i / (ROWS / 2u);
        let f = f0 + l / 2u;
        if f < F {
            let route = route_at(tile, j);
            let scale = input_scale(route / SHARE);
            y[route * F + f] = glu(product(l, j, scale), product(l + 1u, j, scale));
        }
    }
}
