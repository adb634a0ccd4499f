// linear: multiply each row by a weight matrix and add a bias.
//
//   y[t, FIRST+n] = bias[FIRST+n] + scale_n scale_t sum_k w[n,k] x[t,k]
//
// grid      ceil(T / TOKENS) x ceil(COUNT / (8 ROWS)) workgroups: LANES lanes for ROWS weight rows and TOKENS tokens
// in        x     slot  [T, K]          with a scale a row where it is quantised
//           w     slot  [COUNT, K]      rows FIRST.. of the whole matrix, with a scale a row where the format has it
//           bias  slot  [N]
// out       y     f32   [T, N]          columns of other parts are left alone
// override  K, N, FIRST, COUNT
// slots     weights, e2m1, input, bias, tile, lanes, reduce
// requires  K a multiple of 16
// twin      src/ops/linear.rs
//
// The K loop is the same for any T: TOKENS and ROWS only say how many independent sums a lane carries, so a token's bits
// do not depend on its neighbours. Workgroups that follow each other read the same weights.
#import step
#import weights
#import input
#import bias
#import tile
#import dot16
#import rows
#import reduce
override K: u32;
override N: u32;
override FIRST: u32;
override COUNT: u32;
@group(0) @binding(5) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(LANES * 8u)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let t0 = group.x * TOKENS;
    let n0 = (group.y * 8u + lane / LANES) * ROWS;
    var sums: array<f32, ROWS * TOKENS>;
    let c = lane % LANES;
    for (var base = 0u; base < K / 16u; base += LANES) {
        // Past the end the last chunk again, for nothing; so it is with rows of weights and tokens.
        let i = min(base + c, K / 16u - 1u);
        if TOKENS == 1u {
            if base + c < K / 16u {
                let x = in_units(input_at(min(t0, step.tokens - 1u), K / 16u, i));
                for (var r = 0u; r < ROWS; r++) {
                    sums[r] = dot16(weight_at(min(n0 + r, COUNT - 1u), K / 16u, i), x, sums[r]);
                }
            }
            continue;
        }
        var w: array<Sixteen, ROWS>;
        for (var r = 0u; r < ROWS; r++) {
            w[r] = weight_at(min(n0 + r, COUNT - 1u), K / 16u, i);
        }
        // Each group of LANES brings the rows of the tokens that it counts off.
        for (var j = lane / LANES; j < TOKENS; j += 8u) {
            hold(j, c, in_units(input_at(min(t0 + j, step.tokens - 1u), K / 16u, i)));
        }
        workgroupBarrier(); // the tokens' chunks are here
        if base + c < K / 16u {
            for (var j = 0u; j < TOKENS; j++) {
                let x = held(j, c);
                for (var r = 0u; r < ROWS; r++) {
                    sums[j * ROWS + r] = dot16(w[r], x, sums[j * ROWS + r]);
                }
            }
        }
        workgroupBarrier(); // all have read them before the next ones come
    }
    for (var j = 0u; j < TOKENS; j++) {
        for (var r = 0u; r < ROWS; r++) {
            let sum = reduce(sums[j * ROWS + r], lane);
            let t = t0 + j;
            let n = n0 + r;
            if lane % LANES == 0u && n < COUNT && t < step.tokens {
                y[t * N + FIRST + n] = fma(sum, row_scale(n) * input_scale(t), bias_at(FIRST + n));
            }
        }
    }
}
