// moe_down_add: the end of a layer where routes go one by one: each through the second matrix of its expert, then a token's
// weighted sum, added to the residual stream.
//
//   y[t,d] = residual[t,d] + sum_a weights[t,a] (bias[e,d] + scale_d sum_k w[e,d,k] x[t,a,k])          e = experts[t,a]
//
// grid      ceil(D / ROWS) x T workgroups
// in        experts        u32   [T, A]
//           route_weights  f32   [T, A]
//           x              f32   [T, A, K]
//           w              slot  [E, D, K]
//           bias           slot  [E, D]
//           residual       f32   [T, D]
// out       y              f32   [T, D]     may not alias residual
// override  K, D, A, E
// slots     weights, e2m1, bias, tile, lanes, fold
// requires  K a multiple of 16; A at most 8
// twin      src/ops/moe_down.rs
//
// The same bits as moe_down, moe_scatter and add one after the other. A group of lanes takes one slot of spans (see warps) of one
// route at a time, so that a workgroup has all routes of few rows, and so many workgroups as keep a GPU busy.
#import teams
#import tile
#import weights
#import input_f32
#import bias
#import dot16
#import fold
#import first_route
override K: u32;
override D: u32;
override A: u32;
override E: u32;
@group(0) @binding(5) var<storage, read> experts: array<u32>;
@group(0) @binding(6) var<storage, read_write> y: array<f32>;
@group(0) @binding(9) var<storage, read> residual: array<f32>;
@group(0) @binding(10) var<storage, read> route_weights: array<f32>;

const ROWS = BATCH; // more would leave too few workgroups
var<workgroup> found: array<f32, ROWS * 64u>; // [A, ROWS, SLOTS]
// Of each route how it counts, and what it gives; of the first what it adds.
var<workgroup> routed: array<vec2<f32>, ROWS * 8u>; // [A, ROWS]

// Row l of the workgroup, of an expert; one that exists.
fn row_of(expert: u32, d0: u32, l: u32) -> u32 {
    return select(min(expert * D + d0 + l, E * D - 1u), expert * D + d0 + l, D % ROWS == 0u);
}

@compute @workgroup_size(LANES * TEAMS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let t = group.y;
    let d0 = group.x * ROWS;
    // What the sums meet in the end, sent for here.
    let a_of = min(lane / ROWS, A - 1u);
    let row = row_of(experts[t * A + a_of], d0, lane % ROWS);
    let end = vec2<f32>(row_scale(row), bias_at(row));
    let weight = route_weights[t * A + a_of];
    let d = min(d0 + lane % ROWS, D - 1u);
    let before = residual[t * D + d];
    // A bound that compilers do not know: they would write the turns out, 5 KB more code on NVIDIA, and slower.
    for (var turn = 0u; turn < A * SLOTS * min(arrayLength(&x), 1u); turn += TEAMS) {
        let item = turn + lane / LANES;
        let a = min(item / SLOTS, A - 1u);
        let slot = item % SLOTS;
        let expert = experts[t * A + a];
        var sum = 0.0;
        for (var first = 0u; first < K / 16u; first += SLOTS * LANES) {
            let own = first + slot * LANES + lane % LANES;
            let i = min(own, K / 16u - 1u);
            var stored: array<Stored, ROWS>;
            var scales: array<u32, ROWS>; // one word where rows stand side by side
            for (var l = 0u; l < ROWS; l++) {
                let row = row_of(expert, d0, l);
                stored[l] = stored_at(row, K / 16u, i);
                if l == 0u || D % ROWS > 0u {
                    scales[l] = scales_at(row, K / 16u, i) >> (row % 4u * 8u);
                }
            }
            let xs = in_units(input_at(t * A + a, K / 16u, i), own < K / 16u);
            var values: array<f32, VALUES>;
            for (var l = 0u; l < ROWS; l++) {
                values[l] = dot16(opened(stored[l], select(scales[l], scales[0] >> (l * 8u), D % ROWS == 0u)), xs);
            }
            let span = fold(&values, lane); // which every lane must call
            if first + slot * LANES < K / 16u {
                sum += span;
            }
        }
        if lane % LANES < ROWS && item < A * SLOTS {
            found[(a * ROWS + kept(lane)) * SLOTS + slot] = sum;
        }
    }
    workgroupBarrier(); // all sums are there
    if lane < A * ROWS {
        var sum = 0.0;
        for (var slot = 0u; slot < SLOTS; slot++) {
            sum += found[lane * SLOTS + slot];
        }
        let given = fma(sum, end.x, end.y);
        routed[lane] = vec2<f32>(weight, select(given, first_route(weight, given), lane < ROWS));
    }
    workgroupBarrier(); // all routes are there
    if lane < ROWS && d0 + lane < D {
        var sum = routed[lane].y;
        for (var a = 1u; a < A; a++) {
            let route = routed[a * ROWS + lane];
            sum = fma(route.x, route.y, sum);
        }
        y[t * D + d] = before + sum;
    }
}
