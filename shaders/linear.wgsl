// linear: multiply each row by a weight matrix and add a bias.
//
//   y[t, FIRST+n] = bias[FIRST+n] + scale_n scale_t sum_k w[n,k] x[t,k]
//
// grid      ceil(T / TOKENS) x ceil(COUNT / ROWS) workgroups
// in        x     slot  [T, K]          with a scale a row where it is quantised
//           w     slot  [COUNT, K]      rows FIRST.. of the whole matrix, with a scale a row where the format has it
//           bias  slot  [N]
// out       y     f32   [T, N]          columns of other parts are left alone
// override  K, N, FIRST, COUNT, ROWS
// slots     weights, e2m1, input, bias, tile, lanes, fold
// requires  K a multiple of 16
// twin      src/ops/linear.rs
//
// A token's bits do not depend on its neighbours: see products.wgsl. Workgroups that follow each other read the same weights.
#import step
#import products
override N: u32;
override FIRST: u32;
override COUNT: u32;
@group(0) @binding(5) var<storage, read_write> y: array<f32>;

// The first row of weights and the first token of the workgroup.
var<private> n0: u32;
var<private> t0: u32;

fn weight_row(l: u32) -> u32 {
    return select(min(n0 + l, COUNT - 1u), n0 + l, side_by_side());
}

fn side_by_side() -> bool {
    return COUNT % ROWS == 0u;
}

fn bias_row(l: u32) -> u32 {
    return FIRST + weight_row(l);
}

fn input_row(j: u32) -> u32 {
    return min(t0 + j, step.tokens - 1u);
}

@compute @workgroup_size(LANES * WARPS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    t0 = group.x * TOKENS;
    n0 = group.y * ROWS;
    fetch(0u, 0u, lane);
    multiply(lane);
    for (var i = lane; i < ROWS * TOKENS; i += LANES * WARPS) {
        let n = n0 + i % ROWS;
        let t = t0 + i / ROWS;
        if n < COUNT && t < step.tokens {
            y[t * N + FIRST + n] = product(i % ROWS, i / ROWS, input_scale(t));
        }
    }
}
