// moe_up: each token through the first matrix of its experts, and the gated activation.
//
//   g = bias[e, gate] + scale_gate scale_x sum_k w[e, gate, k] x[i,k]          e = experts[t,a], i = (t A + a) / SHARE
//   u = bias[e, up]   + scale_up   scale_x sum_k w[e, up, k]   x[i,k]          gate = f STRIDE, up = f STRIDE + UP
//   y[t,a,f] = glu(g, u)
//
// grid      ceil(F / (4 ROWS)) x tiles workgroups: LANES lanes for ROWS / 2 outputs of the routes of a tile
// in        experts  slot  [T, A]               or the tiles that `group` made of them
//           x        slot  [T A / SHARE, K]     SHARE routes read one row
//           w        slot  [COUNT, 2F, K]       experts FIRST.. of the layer
//           bias     slot  [E, 2F]
// out       y        f32   [T, A, F]            routes to other parts' experts are left alone
// override  K, F, SHARE, FIRST, COUNT, STRIDE, UP          gate and up rows interleaved: 2, 1; in halves: 1, F
// slots     weights, e2m1, input, bias, glu, routes, tile, lanes, reduce
// requires  K a multiple of 16, ROWS of 2
// twin      src/ops/moe_up.rs
#import weights
#import input
#import bias
#import glu
#import routes
#import tile
#import dot16
#import rows
#import reduce
override K: u32;
override F: u32;
override SHARE: u32;
override FIRST: u32;
override COUNT: u32;
override STRIDE: u32;
override UP: u32;
@group(0) @binding(6) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(LANES * 8u)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let expert = expert_of(group.y);
    let count = routes_of(group.y);
    let part = expert - FIRST; // wraps to a large number for an expert before this part
    if count == 0u || part >= COUNT {
        return; // the whole workgroup
    }
    let f0 = (group.x * 8u + lane / LANES) * (ROWS / 2u);
    let base = part * F * 2u;
    var routes: array<u32, TOKENS>;
    for (var j = 0u; j < TOKENS; j++) {
        routes[j] = route_at(group.y, j);
    }
    // Rows 2r and 2r + 1 are gate and up of output r.
    var sums: array<f32, ROWS * TOKENS>;
    let c = lane % LANES;
    for (var start = 0u; start < K / 16u; start += LANES) {
        // Past the end the last chunk again, for nothing; so it is with outputs.
        let i = min(start + c, K / 16u - 1u);
        if TOKENS == 1u {
            // One row of weights after the other: fewer numbers to hold.
            if start + c < K / 16u {
                let x = in_units(input_at(routes[0] / SHARE, K / 16u, i));
                for (var r = 0u; r < ROWS; r++) {
                    let row = base + min(f0 + r / 2u, F - 1u) * STRIDE + r % 2u * UP;
                    sums[r] = dot16(weight_at(row, K / 16u, i), x, sums[r]);
                }
            }
            continue;
        }
        var w: array<Sixteen, ROWS>;
        for (var r = 0u; r < ROWS; r++) {
            w[r] = weight_at(base + min(f0 + r / 2u, F - 1u) * STRIDE + r % 2u * UP, K / 16u, i);
        }
        // Each group of LANES brings the rows of the routes that it counts off.
        for (var j = lane / LANES; j < count; j += 8u) {
            hold(j, c, in_units(input_at(route_at(group.y, j) / SHARE, K / 16u, i)));
        }
        workgroupBarrier(); // the routes' chunks are here
        if start + c < K / 16u {
            for (var j = 0u; j < TOKENS; j++) {
                if j < count {
                    let x = held(j, c);
                    for (var r = 0u; r < ROWS; r++) {
                        sums[j * ROWS + r] = dot16(w[r], x, sums[j * ROWS + r]);
                    }
                }
            }
        }
        workgroupBarrier(); // all have read them before the next ones come
    }
    for (var j = 0u; j < TOKENS; j++) {
        if j < count {
            for (var r = 0u; r < ROWS; r += 2u) {
                let gate = reduce(sums[j * ROWS + r], lane);
                let up = reduce(sums[j * ROWS + r + 1u], lane);
                let f = f0 + r / 2u;
                if lane % LANES == 0u && f < F {
                    let row = base + f * STRIDE;
                    let at = expert * F * 2u + f * STRIDE;
                    let scale = input_scale(routes[j] / SHARE);
                    let g = fma(gate, row_scale(row) * scale, bias_at(at));
                    let u = fma(up, row_scale(row + UP) * scale, bias_at(at + UP));
                    y[routes[j] * F + f] = glu(g, u);
                }
            }
        }
    }
}
