// Fills slot `input`: one row of the residual stream with what has been computed and not yet added to it, brought to unit root
// mean square: what add_norm makes, to the bit. The first workgroup writes the sum and the row down.
#import sixteen
#import norm
#import bf16
#import addend
@group(0) @binding(4) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(11) var<storage, read> g: array<vec2<u32>>;
@group(0) @binding(12) var<storage, read_write> sum: array<vec4<f32>>;
@group(0) @binding(13) var<storage, read_write> h: array<vec4<f32>>;

const INPUT_UNIT = 1.0;
const INPUT_SCALES_ROUND = false;

var<private> scale_of_row: f32;
// The lane's first sixteen of the sum: mostly all that it has.
var<private> own: array<vec4<f32>, 4>;

fn sum_at(q: u32) -> vec4<f32> {
    return x[q] + addend(0u, q, K / 4u);
}

// Quad q of the four from 4i on.
fn normed(i: u32, q: u32) -> vec4<f32> {
    let gain = g[i * 4u + q];
    var v = own[q];
    if i >= LANES * WARPS {
        v = sum_at(i * 4u + q);
    }
    return v * scale_of_row * bf16x4(gain.x, gain.y);
}

// Every lane must call it, before it asks for input.
fn normalise(lane: u32, first: bool) {
    var share = 0.0;
    for (var i = lane; i < K / 16u; i += LANES * WARPS) {
        for (var q = 0u; q < 4u; q++) {
            let v = sum_at(i * 4u + q);
            if i == lane {
                own[q] = v;
            }
            share = squares(v, share);
            if first {
                sum[i * 4u + q] = v;
            }
        }
    }
    scale_of_row = inverse_rms(share, K, lane);
    if first {
        for (var i = lane; i < K / 16u; i += LANES * WARPS) {
            for (var q = 0u; q < 4u; q++) {
                h[i * 4u + q] = normed(i, q);
            }
        }
    }
}

// Elements 16i..16i+16, of those that the lane has.
fn input_at(row: u32, chunks: u32, i: u32) -> Sixteen {
    return Sixteen(normed(i, 0u), normed(i, 1u), normed(i, 2u), normed(i, 3u), 1.0);
}

fn input_scale(row: u32) -> f32 {
    return 1.0;
}
