// Fills slot `weights`: an NVFP4 matrix [rows, K] as it lies on disk. Blocks of 16 along K: 8 bytes of E2M1 codes,
// element 2j in the low nibble of byte j, one E4M3 scale byte apart, and the tensor's f32 for each row.
#import e2m1
#import e4m3
#import weight8
@group(0) @binding(1) var<storage, read> codes: array<u32>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(7) var<storage, read> row_scales: array<f32>;

// Elements 8i..8i+8 of a row of K = 8 row_words elements.
fn weight_at(row: u32, row_words: u32, i: u32) -> Weight8 {
    let c = codes[row * row_words + i];
    let block = row * (row_words / 2u) + i / 2u;
    return Weight8(e2m1x4(c, 0u), e2m1x4(c, 16u), e4m3((scales[block / 4u] >> ((block % 4u) * 8u)) & 255u));
}

// What the sum over a row is multiplied by.
fn row_scale(row: u32) -> f32 {
    return row_scales[row];
}
