// Fills slot `weights`: an MXFP4 matrix [rows, K] as it lies on disk. Blocks of 32 along K: 16 bytes of E2M1 codes,
// element 2j in the low nibble of byte j, and one E8M0 scale byte apart (OCP Microscaling formats 1.0).
#import e2m1
#import weight8
@group(0) @binding(1) var<storage, read> codes: array<u32>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;

// 2^(code - 127). Code 0 is the subnormal 2^-127, which some GPUs flush to 0 (an H200 does): such a block then counts
// as zeros, an error below 1e-37. Code 255 (NaN) is refused at load.
fn e8m0(code: u32) -> f32 {
    return bitcast<f32>(max(code << 23u, 0x00400000u));
}

// Elements 8i..8i+8 of a row of K = 8 row_words elements.
fn weight_at(row: u32, row_words: u32, i: u32) -> Weight8 {
    let c = codes[row * row_words + i];
    let block = row * (row_words / 4u) + i / 4u;
    return Weight8(e2m1x4(c, 0u), e2m1x4(c, 16u), e8m0((scales[block / 4u] >> ((block % 4u) * 8u)) & 255u));
}

fn row_scale(row: u32) -> f32 {
    return 1.0;
}
