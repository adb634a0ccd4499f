// Fills slot `input`: f32 rows [.., K].
#import input8
@group(0) @binding(4) var<storage, read> x: array<vec4<f32>>;

// Elements 8i..8i+8 of a row of K = 8 row_words elements.
fn input_at(row: u32, row_words: u32, i: u32) -> Input8 {
    let at = (row * row_words + i) * 2u;
    return Input8(x[at], x[at + 1u], 1.0);
}

fn input_scale(row: u32) -> f32 {
    return 1.0;
}
