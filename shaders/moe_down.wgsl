// moe_down: each route through the second matrix of its expert. Not weighted yet: see moe_scatter.
//
//   y[t,a,d] = bias[e,d] + scale_d scale_x sum_k w[e,d,k] x[t,a,k]          e = experts[t,a]
//
// grid      ceil(D / (8 ROWS)) x tiles workgroups: LANES lanes for ROWS outputs of the routes of a tile
// in        experts  slot  [T, A]          or the tiles that `group` made of them
//           x        slot  [T, A, K]
//           w        slot  [COUNT, D, K]     experts FIRST.. of the layer
//           bias     slot  [E, D]
// out       y        f32   [T, A, D]         routes to other parts' experts are left alone
// override  K, D, FIRST, COUNT
// slots     weights, e2m1, input, bias, routes, tile, lanes, reduce
// requires  K a multiple of 16
// twin      src/ops/moe_down.rs
#import weights
#import input
#import bias
#import routes
#import tile
#import dot16
#import rows
#import reduce
override K: u32;
override D: u32;
override FIRST: u32;
override COUNT: u32;
@group(0) @binding(6) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(LANES * 8u)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let expert = expert_of(group.y);
    let count = routes_of(group.y);
    let part = expert - FIRST; // wraps to a large number for an expert before this part
    if count == 0u || part >= COUNT {
        return; // the whole workgroup
    }
    let d0 = (group.x * 8u + lane / LANES) * ROWS;
    let base = part * D;
    var routes: array<u32, TOKENS>;
    for (var j = 0u; j < TOKENS; j++) {
        routes[j] = route_at(group.y, j);
    }
    var sums: array<f32, ROWS * TOKENS>;
    let c = lane % LANES;
    for (var start = 0u; start < K / 16u; start += LANES) {
        // Past the end the last chunk again, for nothing; so it is with rows of weights.
        let i = min(start + c, K / 16u - 1u);
        if TOKENS == 1u {
            if start + c < K / 16u {
                let x = in_units(input_at(routes[0], K / 16u, i));
                for (var r = 0u; r < ROWS; r++) {
                    sums[r] = dot16(weight_at(base + min(d0 + r, D - 1u), K / 16u, i), x, sums[r]);
                }
            }
            continue;
        }
        var w: array<Sixteen, ROWS>;
        for (var r = 0u; r < ROWS; r++) {
            w[r] = weight_at(base + min(d0 + r, D - 1u), K / 16u, i);
        }
        // Each group of LANES brings the rows of the routes that it counts off.
        for (var j = lane / LANES; j < count; j += 8u) {
            hold(j, c, in_units(input_at(route_at(group.y, j), K / 16u, i)));
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
            for (var r = 0u; r < ROWS; r++) {
                let sum = reduce(sums[j * ROWS + r], lane);
                let d = d0 + r;
                if lane % LANES == 0u && d < D {
                    let scale = row_scale(base + d) * input_scale(routes[j]);
                    y[routes[j] * D + d] = fma(sum, scale, bias_at(expert * D + d));
                }
            }
        }
    }
}
