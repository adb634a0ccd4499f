// Fills slot `input`: f32 rows [.., K].
#import sixteen
@group(0) @binding(4) var<storage, read> x: array<vec4<f32>>;

const INPUT_UNIT = 1.0;
const INPUT_SCALES_ROUND = false;

// Elements 16i..16i+16 of a row of K = 16 chunks elements.
fn input_at(row: u32, chunks: u32, i: u32) -> Sixteen {
    let at = (row * chunks + i) * 4u;
    return Sixteen(x[at], x[at + 1u], x[at + 2u], x[at + 3u], 1.0);
}

fn input_scale(row: u32) -> f32 {
    return 1.0;
}
