// Fills slot `weights`: an E4M3 matrix [rows, K], four codes a word, and an f32 for each row.
#import e4m3
#import weight8
@group(0) @binding(1) var<storage, read> codes: array<vec2<u32>>;
@group(0) @binding(7) var<storage, read> row_scales: array<f32>;

// Elements 8i..8i+8 of a row of K = 8 row_words elements.
fn weight_at(row: u32, row_words: u32, i: u32) -> Weight8 {
    let c = codes[row * row_words + i];
    return Weight8(
        vec4<f32>(e4m3(c.x), e4m3(c.x >> 8u), e4m3(c.x >> 16u), e4m3(c.x >> 24u)),
        vec4<f32>(e4m3(c.y), e4m3(c.y >> 8u), e4m3(c.y >> 16u), e4m3(c.y >> 24u)),
        1.0,
    );
}

// What the sum over a row is multiplied by.
fn row_scale(row: u32) -> f32 {
    return row_scales[row];
}
