// linear: multiply each row by a weight matrix and add a bias.
//
//   y[t, FIRST+n] = bias[FIRST+n] + scale_n scale_t sum_k w[n,k] x[t,k]
//
// grid      ceil(COUNT / 8) x ceil(T / TOKENS) workgroups: LANES lanes a weight row, TOKENS tokens at once
// in        x     slot  [T, K]          with a scale a row where it is quantised
//           w     slot  [COUNT, K]      rows FIRST.. of the whole matrix, with a scale a row where the format has it
//           bias  slot  [N]
// out       y     f32   [T, N]          columns of other parts are left alone
// override  K, N, FIRST, COUNT
// slots     weights, e2m1, input, bias, tile, lanes, reduce
// requires  K a multiple of 16
// twin      src/ops/linear.rs
//
// The K loop is the same for any T: TOKENS only says how many independent sums a lane carries, so a token's bits do
// not depend on its neighbours.
#import step
#import weights
#import input
#import bias
#import tile
#import dot16
#import reduce
override K: u32;
override N: u32;
override FIRST: u32;
override COUNT: u32;
@group(0) @binding(5) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(LANES * 8u)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let n = group.x * 8u + lane / LANES;
    let row = min(n, COUNT - 1u); // lanes past the end compute the last row again and write nothing
    let t0 = group.y * TOKENS;
    var sums: array<f32, TOKENS>;
    for (var i = lane % LANES; i < K / 16u; i += LANES) {
        let w = weight_at(row, K / 16u, i);
        for (var j = 0u; j < TOKENS; j++) {
            let x = in_units(input_at(min(t0 + j, step.tokens - 1u), K / 16u, i));
            sums[j] = dot16(w, x, sums[j]);
        }
    }
    for (var j = 0u; j < TOKENS; j++) {
        let sum = reduce(sums[j], lane);
        let t = t0 + j;
        if lane % LANES == 0u && n < COUNT && t < step.tokens {
            y[t * N + FIRST + n] = fma(sum, row_scale(row) * input_scale(t), bias_at(FIRST + n));
        }
    }
}
