// Fills slot `input`: one row of the residual stream, brought to unit root mean square: what add_norm or rms_norm makes, to the
// bit. The first workgroup writes it down.
#import sixteen
#import norm
#import bf16
#import residual
@group(0) @binding(11) var<storage, read> g: array<vec2<u32>>;
@group(0) @binding(13) var<storage, read_write> h: array<vec4<f32>>;

const INPUT_UNIT = 1.0;
const INPUT_SCALES_ROUND = false;

var<private> scale_of_row: f32;
// The lane's first sixteen: mostly all that it has.
var<private> own: array<vec4<f32>, 4>;

// Quad q of the four from 4i on.
fn normed(i: u32, q: u32) -> vec4<f32> {
    let gain = g[i * 4u + q];
    var v = own[q];
    if i >= LANES * WARPS {
        v = residual_at(i * 4u + q);
    }
    return v * scale_of_row * bf16x4(gain.x, gain.y);
}

// Every lane must call it, before it asks for input.
fn normalise(lane: u32, first: bool) {
    var share = 0.0;
    for (var i = lane; i < K / 16u; i += LANES * WARPS) {
        for (var q = 0u; q < 4u; q++) {
            let v = residual_at(i * 4u + q);
            if i == lane {
                own[q] = v;
            }
            share = squares(v, share);
            if first {
                keep(i * 4u + q, v);
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
