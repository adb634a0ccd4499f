// norm_linear_few: norm_linear by few rows of bf16 weights, a router's, of any number of rows of input: when decoding.
//
//   sum[t,d] = x[t,d] + addend[t,d]
//   s[t]     = 1 / sqrt(mean_d(sum[t,d]^2) + EPS)
//   h[t,d]   = sum[t,d] s[t] g[d]
//   y[t,n]   = bias[n] + s[t] sum_k w[n,k] sum[t,k] g[k]
//
// grid      ceil(N / 2) x T workgroups: two rows of weights each, and an equal share of sum and h
// in        x        f32   [T, K]
//           addends  f32   [T, K]
//           g        bf16  [K]
//           w        bf16  [N, K]
//           bias     slot  [N]
// out       sum, h   f32   [T, K]     may alias neither x nor addends
//           y        f32   [T, N]
// override  K, N, EPS
// slots     bias, lanes, reduce
// requires  K a multiple of 16
// twin      src/ops/norm_linear.rs
//
// The sum of squares and the products are found in one pass, and the norm comes last: nobody waits for it. sum and h have the bits
// of add_norm.
#import weights_bf16
#import bias
#import dot16
#import norm
#import addend_rows
#import bf16
override K: u32;
override N: u32;
@group(0) @binding(4) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> y: array<f32>;
@group(0) @binding(11) var<storage, read> g: array<vec2<u32>>;
@group(0) @binding(12) var<storage, read_write> sum: array<vec4<f32>>;
@group(0) @binding(13) var<storage, read_write> h: array<vec4<f32>>;

const INPUT_UNIT = 1.0;
var<workgroup> products: array<vec2<f32>, 8>;

// Of quad q of a row: what it becomes, and its gains.
struct Quad {
    v: vec4<f32>,
    gain: vec4<f32>,
}

fn quad_at(t: u32, q: u32) -> Quad {
    let gain = g[q];
    return Quad(x[t * (K / 4u) + q] + addend(t, q, K / 4u), bf16x4(gain.x, gain.y));
}

@compute @workgroup_size(LANES * WARPS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let t = group.y;
    let n = group.x * 2u + vec2<u32>(0u, 1u);
    let row = min(n, vec2<u32>(N - 1u));
    // What the workgroup writes down of the row; mostly a lane has one quad of it, or none.
    let each = (K / 4u + (N + 1u) / 2u - 1u) / ((N + 1u) / 2u);
    let mine = group.x * each + lane;
    let end = min((group.x + 1u) * each, K / 4u);
    var own = quad_at(t, min(mine, K / 4u - 1u));
    let ends = vec2<f32>(bias_at(row.x), bias_at(row.y));
    var share = 0.0;
    var both = vec2<f32>(0.0);
    for (var i = lane; i < K / 16u; i += LANES * WARPS) {
        let w0 = stored_at(row.x, K / 16u, i);
        let w1 = stored_at(row.y, K / 16u, i);
        let a = quad_at(t, i * 4u);
        let b = quad_at(t, i * 4u + 1u);
        let c = quad_at(t, i * 4u + 2u);
        let d = quad_at(t, i * 4u + 3u);
        share = squares(d.v, squares(c.v, squares(b.v, squares(a.v, share))));
        let xs = Sixteen(a.v * a.gain, b.v * b.gain, c.v * c.gain, d.v * d.gain, 1.0);
        both += vec2<f32>(dot16(opened(w0, 0u), xs), dot16(opened(w1, 0u), xs));
    }
    let part = vec2<f32>(reduce(both.x, lane), reduce(both.y, lane));
    if lane % LANES == 0u {
        products[lane / LANES] = part;
    }
    let scale = inverse_rms(share, K, lane); // and all products are there
    for (var q = mine; q < end; q += LANES * WARPS) {
        if q > mine {
            own = quad_at(t, q);
        }
        sum[t * (K / 4u) + q] = own.v;
        h[t * (K / 4u) + q] = own.v * scale * own.gain;
    }
    if lane < 2u && n[lane] < N {
        var all = 0.0;
        for (var i = 0u; i < WARPS; i++) {
            all += products[i][lane];
        }
        y[t * N + n[lane]] = fma(all, scale, ends[lane]);
    }
}
