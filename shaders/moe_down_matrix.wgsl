// moe_down_matrix: the routes of a tile through the second matrix of their expert, by matrix units. Not weighted yet.
//
//   y[route,d] = bias[e,d] + scale_d sum_k w[e,d,k] x[route,k]
//
// grid      tiles x ceil(D / TALL) workgroups: neighbours share weights
// in        tiles  Tile  WIDE routes each, as `group` leaves them
//           x      f32   [T A, K]
//           w      slot  [COUNT, D, K]     experts FIRST.. of the layer
//           bias   slot  [E, D]
// out       y      f32   [T A, D]          routes to other parts' experts are left alone
// override  K, D, FIRST, COUNT
// slots     block, tiles, weights, e2m1, bias
// requires  K a multiple of 16; matrix units of 16 x 16 x 16 halves, subgroups of 32 lanes
// twin      src/ops/moe_down.rs
enable f16;
enable wgpu_cooperative_matrix;
#import tiles
#import matrix
#import bias
override K: u32;
override D: u32;
override FIRST: u32;
override COUNT: u32;
@group(0) @binding(5) var<storage, read> tiles: array<Tile>;
@group(0) @binding(6) var<storage, read_write> y: array<f32>;

// The tile, its expert's place in this part, and the first output of the workgroup.
var<private> tile: u32;
var<private> part: u32;
var<private> first: u32;

fn weight_row(r: u32) -> u32 {
    return part * D + min(first + r, D - 1u);
}

fn source(j: u32) -> u32 {
    return tiles[tile].routes[j];
}

fn put(j: u32, r: u32, v: vec2<f32>) {
    for (var i = 0u; i < 2u; i++) {
        let d = first + r + i;
        if j < tiles[tile].count && d < D {
            y[tiles[tile].routes[j] * D + d] = fma(v[i], row_scale(part * D + d), bias_at(tiles[tile].expert * D + d));
        }
    }
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    tile = group.x;
    part = tiles[tile].expert - FIRST; // wraps to a large number for an expert before this part
    first = group.y * TALL;
    if tiles[tile].count > 0u && part < COUNT {
        multiply(lane);
    }
}
