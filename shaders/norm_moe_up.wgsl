// norm_moe_up: from a router's shares to the experts' first matrix, of one row, when decoding: the norm, the scores, the choice of
// experts, and moe_up.
//
//   s         = 1 / sqrt(mean_k(x[k]^2) + EPS)
//   h[k]      = x[k] s g[k]
//   scores[e] = score_bias[e] + s sum_i shares[i / 4, e, i % 4]
//   experts, weights = the A with the largest scores, as router has them
//   y[a,f]    = glu(gate, up) as in moe_up, of expert experts[a], with h
//
// grid      ceil(2F / ROWS) x A workgroups, each with a norm and a choice of its own
// in        x           f32   [K]
//           g           bf16  [K]
//           shares      f32   [ceil(K / 512) 8, E, 4]     by sixteens of x; linear_add's
//           score_bias  bf16  [E]
//           w           slot  [E, 2F, K]
//           bias        slot  [E, 2F]
// out       h           f32   [K]
//           scores      f32   [E]
//           experts, weights  [A]
//           y           f32   [A, F]
// override  K, EPS, E, A, ALL, F, STRIDE, UP, ROWS          as in moe_up and router
// slots     weights, e2m1, input, residual, bias, glu, tile, lanes, fold, reduce
// requires  K a multiple of 16; E at most 32; ROWS even, and of BATCH
// twin      src/ops/norm_moe_up.rs
//
// The bits of norm_linear_few, router and moe_up: shares are added in the order of its lanes.
#import products
#import glu
#import gate_up
#import choose
@group(0) @binding(5) var<storage, read> shares: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> y: array<f32>;
@group(0) @binding(8) var<storage, read> score_bias: array<u32>;
@group(0) @binding(9) var<storage, read_write> experts: array<u32>;
@group(0) @binding(10) var<storage, read_write> weights: array<f32>;
@group(0) @binding(14) var<storage, read_write> scores: array<f32>;

const CHOICES = 32u;

// What each group of lanes of norm_linear_few would have of each score, [WARPS, E], and the biases.
var<workgroup> parts: array<f32, 256>;
var<workgroup> score_ends: array<f32, 32>;

fn held_experts() -> u32 {
    return E;
}

fn bias_row(l: u32) -> u32 {
    return weight_row(l);
}

fn input_row(j: u32) -> u32 {
    return 0u;
}

// The sum over the spans of a group of lanes, lane by lane, then over the lanes: pairs at distance 1, then 2, 4 and so on.
fn part_of(warp: u32, e: u32) -> f32 {
    var by_four: array<vec4<f32>, LANES / 4u>;
    for (var span = warp; span * LANES < K / 16u; span += WARPS) {
        for (var j = 0u; j < LANES / 4u; j++) {
            by_four[j] += shares[(span * (LANES / 4u) + j) * E + e];
        }
    }
    var pairs: array<f32, 8>;
    for (var j = 0u; j < LANES / 4u; j++) {
        pairs[j] = (by_four[j].x + by_four[j].y) + (by_four[j].z + by_four[j].w);
    }
    let low = pairs[0] + pairs[1];
    if LANES == 8u {
        return low;
    }
    return (low + (pairs[2] + pairs[3])) + ((pairs[4] + pairs[5]) + (pairs[6] + pairs[7]));
}

// Once the norm and all parts are there.
fn score_at(e: u32) -> f32 {
    var all = 0.0;
    for (var warp = 0u; warp < WARPS; warp++) {
        all += parts[warp * E + e];
    }
    return fma(all, scale_of_row, score_ends[e]);
}

fn one() -> u32 {
    return min(arrayLength(&shares), 1u);
}

@compute @workgroup_size(LANES * WARPS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let route = group.y;
    let first = group.x == 0u && route == 0u;
    f0 = group.x * (ROWS / 2u);
    for (var i = lane; i < WARPS * E; i += LANES * WARPS) {
        parts[i] = part_of(i / E, i % E);
    }
    for (var e = lane; e < E; e += LANES * WARPS) {
        score_ends[e] = bf16_pick(score_bias[e / 2u], e);
    }
    normalise(lane, first); // and all parts are there
    choose(0u, 1u, lane, LANES * WARPS);
    row0 = chosen[route] * F * 2u + f0 * STRIDE;
    fetch(0u, 0u, lane);
    if first {
        for (var a = lane; a < A; a += LANES * WARPS) {
            experts[a] = chosen[a];
            weights[a] = weight_of(0u, a);
        }
        for (var e = lane; e < E; e += LANES * WARPS) {
            scores[e] = held_score(0u, e);
        }
    }
    multiply(lane);
    for (var l = lane; l < ROWS / 2u; l += LANES * WARPS) {
        let f = f0 + l;
        if f < F {
            y[route * F + f] = glu(product(l * 2u, 0u, 1.0), product(l * 2u + 1u, 0u, 1.0));
        }
    }
}
