// moe_up_matrix: the routes of a tile through the first matrix of their expert, and the gated activation, by matrix units.
//
//   g = bias[e, gate] + scale_gate sum_k w[e, gate, k] x[i,k]          i = route / SHARE
//   u = bias[e, up]   + scale_up   sum_k w[e, up, k]   x[i,k]          gate = f STRIDE, up = f STRIDE + UP
//   y[route,f] = glu(g, u)
//
// grid      tiles x ceil(2F / TALL) workgroups: neighbours share weights
// in        tiles  Tile  WIDE routes each, as `group` leaves them
//           x      f32   [T A / SHARE, K]     SHARE routes read one row
//           w      slot  [COUNT, 2F, K]       experts FIRST.. of the layer
//           bias   slot  [E, 2F]
// out       y      f32   [T A, F]             routes to other parts' experts are left alone
// override  K, F, SHARE, FIRST, COUNT, STRIDE, UP          gate and up rows interleaved: 2, 1; in halves: 1, F
// slots     block, tiles, weights, e2m1, bias, glu
// requires  K a multiple of 16; matrix units of 16 x 16 x 16 halves, subgroups of 32 lanes
// twin      src/ops/moe_up.rs
enable f16;
enable wgpu_cooperative_matrix;
#import tiles
#import matrix
#import bias
#import glu
override K: u32;
override F: u32;
override SHARE: u32;
override FIRST: u32;
override COUNT: u32;
override STRIDE: u32;
override UP: u32;
@group(0) @binding(5) var<storage, read> tiles: array<Tile>;
@group(0) @binding(6) var<storage, read_write> y: array<f32>;

// The tile, its expert's place in this part, and the first output of the workgroup.
var<private> tile: u32;
var<private> part: u32;
var<private> first: u32;

// Rows r and r + 1 of the tile are gate and up of one output.
fn weight_row(r: u32) -> u32 {
    return part * F * 2u + min(first + r / 2u, F - 1u) * STRIDE + r % 2u * UP;
}

fn source(j: u32) -> u32 {
    return tiles[tile].routes[j] / SHARE;
}

fn put(j: u32, r: u32, v: vec2<f32>) {
    let f = first + r / 2u;
    if j < tiles[tile].count && f < F {
        let row = part * F * 2u + f * STRIDE;
        let at = tiles[tile].expert * F * 2u + f * STRIDE;
        let g = fma(v.x, row_scale(row), bias_at(at));
        let u = fma(v.y, row_scale(row + UP), bias_at(at + UP));
        y[tiles[tile].routes[j] * F + f] = glu(g, u);
    }
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    tile = group.x;
    part = tiles[tile].expert - FIRST; // wraps to a large number for an expert before this part
    first = group.y * (TALL / 2u);
    if tiles[tile].count > 0u && part < COUNT {
        multiply(lane);
    }
}
