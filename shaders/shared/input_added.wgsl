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

var<private> scale_of_row: f32;

fn sum_at(q: u32) -> vec4<f32> {
    return x[q] + addend(0u, q, K / 4u);
}

fn normed_at(q: u32) -> vec4<f32> {
    return sum_at(q) * scale_of_row * bf16x4(g[q].x, g[q].y);
}

// Every lane must call it, before it asks for input.
fn normalise(lane: u32, first: bool) {
    var share = 0.0;
    for (var i = lane * 4u; i < K / 4u; i += LANES * WARPS * 4u) {
        for (var q = i; q < i + 4u; q++) {
            let v = sum_at(q);
            share = squares(v, share);
            if first {
                sum[q] = v;
            }
        }
    }
    scale_of_row = inverse_rms(share, K, lane);
    if first {
        for (var q = lane; q < K / 4u; q += LANES * WARPS) {
            h[q] = normed_at(q);
        }
    }
}

// Elements 16i..16i+16.
fn input_at(row: u32, chunks: u32, i: u32) -> Sixteen {
    let q = i * 4u;
    return Sixteen(normed_at(q), normed_at(q + 1u), normed_at(q + 2u), normed_at(q + 3u), 1.0);
}

fn input_scale(row: u32) -> f32 {
    return 1.0;
}
