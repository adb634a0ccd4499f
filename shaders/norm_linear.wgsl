// norm_linear: perhaps put a stage's output back into the residual stream, normalise, multiply by a matrix; of one row, when
// decoding.
//
//   sum[d] = x[d] + addend[d], or x[d]
//   h[d]   = sum[d] * g[d] / sqrt(mean_d(sum[d]^2) + EPS)
//   y[n]   = bias[n] + scale_n sum_k w[n,k] h[k]          rotated and appended, if that follows
//
// grid      ceil(N / ROWS) workgroups, each with h of its own
// in        x       f32   [K]
//           addend  slot  a row as it is, or the weighted sum of the routes; if anything
//           g       bf16  [K]
//           w       slot  [N, K]
//           bias    slot  [N]
// out       sum     f32   [K]     may not alias x; if anything was added
//           h       f32   [K]
//           y       slot  [N]; or queries, and keys and values in the cache
// override  K, N, EPS, ROWS; A where the addend is summed; H, HK, DH, PAGE, PAGES, PART, PART_FIRST where y is rotated
// slots     weights, e2m1, residual, addend, bias, output, append, tile, lanes, fold, reduce
// requires  K a multiple of 16; rotated: ROWS a multiple of 4, DH of 4, N = (H + 2 HK) DH
// twin      src/ops/norm_linear.rs
//
// The same bits as add_norm or rms_norm, linear and rope one after the other.
#import products
#import output
override N: u32;
@group(0) @binding(5) var<storage, read_write> y: array<f32>;

// The first row of weights of the workgroup.
var<private> n0: u32;

fn weight_row(l: u32) -> u32 {
    return select(min(matrix_row(l), N - 1u), matrix_row(l), N % ROWS == 0u);
}

fn input_row(j: u32) -> u32 {
    return 0u;
}

fn bias_row(l: u32) -> u32 {
    return weight_row(l);
}

@compute @workgroup_size(LANES * WARPS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    n0 = group.x * ROWS;
    fetch(0u, 0u, lane); // on their way while the row is normalised
    normalise(lane, group.x == 0u);
    multiply(lane);
    put(lane);
}
