// linear_add: multiply one row by a weight matrix and add it to the residual stream, and find what each sixteen of the sum gives to
// the scores of a router that comes next; when decoding.
//
//   y[n]   = bias[n] + scale_n sum_k w[n,k] x[k]
//   sum[n] = residual[n] + y[n]
//   shares[i / 4, e, i % 4] = sum_n router[e,n] sum[n] g[n], n in 16i..16i+16          0 past the end
//
// grid      N / 16, rounded up to a multiple of 32, workgroups
// in        x         f32   [K]
//           w         slot  [N, K]
//           bias      slot  [N]
//           residual  f32   [N]
//           g         bf16  [N]
//           router    bf16  [E, N]
// out       y         f32   [N]
//           sum       f32   [N]     may not alias residual
//           shares    f32   [grid / 4, E, 4]
// override  K, N, E, ROWS
// slots     weights, e2m1, input, bias, tile, lanes, fold
// requires  K and N multiples of 16; ROWS 16
// twin      src/ops/linear_add.rs
//
// y and sum have the bits of linear and add. A share is what a lane of norm_linear_few has of a score, to the bit; norm_moe_up
// brings them together in the same order.
#import products
#import bf16
override N: u32;
override E: u32;
@group(0) @binding(5) var<storage, read_write> y: array<f32>;
@group(0) @binding(6) var<storage, read_write> shares: array<f32>;
@group(0) @binding(8) var<storage, read> residual: array<f32>;
@group(0) @binding(9) var<storage, read_write> sum: array<f32>;
@group(0) @binding(10) var<storage, read> g: array<u32>;
@group(0) @binding(11) var<storage, read> router: array<vec4<u32>>;

var<workgroup> scaled: array<f32, 16>; // the workgroup's sixteen times their gains

var<private> n0: u32;

fn weight_row(l: u32) -> u32 {
    return n0 + l;
}

fn side_by_side() -> bool {
    return true;
}

fn bias_row(l: u32) -> u32 {
    return n0 + l;
}

fn input_row(j: u32) -> u32 {
    return 0u;
}

@compute @workgroup_size(LANES * WARPS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    n0 = group.x * 16u;
    let place = group.x / 4u * E * 4u + group.x % 4u;
    if n0 >= N { // the whole workgroup
        for (var e = lane; e < E; e += LANES * WARPS) {
            shares[place + e * 4u] = 0.0;
        }
        return;
    }
    fetch(0u, 0u, lane);
    // What is needed at the end, sent for here.
    let early = half_rows(min(lane, E - 1u));
    let own = ends_of(min(lane, 15u));
    multiply(lane);
    for (var l = lane; l < 16u; l += LANES * WARPS) {
        var end = own;
        if l > lane {
            end = ends_of(l);
        }
        let v = product(l, 0u, 1.0);
        let all = end.x + v;
        y[n0 + l] = v;
        sum[n0 + l] = all;
        scaled[l] = all * end.y;
    }
    workgroupBarrier(); // the sixteen are there
    var xs: array<vec4<f32>, 4>;
    for (var q = 0u; q < 4u; q++) {
        xs[q] = vec4<f32>(scaled[q * 4u], scaled[q * 4u + 1u], scaled[q * 4u + 2u], scaled[q * 4u + 3u]);
    }
    for (var e = lane; e < E; e += LANES * WARPS) {
        var row = early;
        if e > lane {
            row = half_rows(e);
        }
        let w = Sixteen(
            bf16x4(row[0].x, row[0].y),
            bf16x4(row[0].z, row[0].w),
            bf16x4(row[1].x, row[1].y),
            bf16x4(row[1].z, row[1].w),
            1.0,
        );
        shares[place + e * 4u] = dot16(w, Sixteen(xs[0], xs[1], xs[2], xs[3], 1.0));
    }
}

// The sixteen of a router's row, in two halves.
fn half_rows(e: u32) -> array<vec4<u32>, 2> {
    let at = (e * N + n0) / 8u;
    return array<vec4<u32>, 2>(router[at], router[at + 1u]);
}

// What row l of the workgroup is added to, and its gain.
fn ends_of(l: u32) -> vec2<f32> {
    return vec2<f32>(residual[n0 + l], bf16_pick(g[(n0 + l) / 2u], l));
}
