// Fills slot `weights`: a bf16 matrix [rows, K], eight elements a load.
#import bf16
#import weight8
@group(0) @binding(1) var<storage, read> codes: array<vec4<u32>>;

// Elements 8i..8i+8 of a row of K = 8 row_words elements.
fn weight_at(row: u32, row_words: u32, i: u32) -> Weight8 {
    let c = codes[row * row_words + i];
    return Weight8(
        vec4<f32>(bf16_lo(c.x), bf16_hi(c.x), bf16_lo(c.y), bf16_hi(c.y)),
        vec4<f32>(bf16_lo(c.z), bf16_hi(c.z), bf16_lo(c.w), bf16_hi(c.w)),
        1.0,
    );
}

fn row_scale(row: u32) -> f32 {
    return 1.0;
}
