// linear_matrix: multiply many rows by a weight matrix and add a bias, by matrix units.
//
//   y[t, FIRST+n] = bias[FIRST+n] + scale_n sum_k w[n,k] x[t,k]
//
// grid      ceil(T / WIDE) x ceil(COUNT / TALL) workgroups: neighbours share weights
// in        x     f32   [T, K]
//           w     slot  [COUNT, K]      rows FIRST.. of the whole matrix, with a scale a row where the format has it
//           bias  slot  [N]
// out       y     f32   [T, N]          columns of other parts are left alone
// override  K, N, FIRST, COUNT
// slots     block, weights, e2m1, bias
// requires  K a multiple of 16; matrix units of 16 x 16 x 16 halves, subgroups of 32 lanes
// twin      src/ops/linear.rs
enable f16;
enable wgpu_cooperative_matrix;
#import step
#import matrix
#import bias
override K: u32;
override N: u32;
override FIRST: u32;
override COUNT: u32;
@group(0) @binding(5) var<storage, read_write> y: array<f32>;

// The first token and the first row of weights of the tile.
var<private> token: u32;
var<private> row: u32;

fn weight_row(r: u32) -> u32 {
    return min(row + r, COUNT - 1u);
}

fn source(j: u32) -> u32 {
    return min(token + j, step.tokens - 1u);
}

fn put(j: u32, r: u32, v: vec2<f32>) {
    let t = token + j;
    for (var i = 0u; i < 2u; i++) {
        let n = row + r + i;
        if t < step.tokens && n < COUNT {
            y[t * N + FIRST + n] = fma(v[i], row_scale(n), bias_at(FIRST + n));
        }
    }
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    token = group.x * WIDE;
    row = group.y * TALL;
    multiply(lane);
}
