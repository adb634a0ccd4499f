// Fills slot `weights`: an MXFP4 matrix [rows, K] as it lies on disk. Blocks of 32 along K: 16 bytes of E2M1 codes,
// element 2j in the low nibble of byte j, and one E8M0 scale byte apart (OCP Microscaling formats 1.0).
@group(0) @binding(1) var<storage, read> codes: array<u32>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;

struct Weight8 {
    a: vec4<f32>,
    b: vec4<f32>,
    scale: f32, // of all eight
}

// Codes 0..7 are 0 .5 1 1.5 2 3 4 6: twice the value is one nibble of the constant.
fn e2m1(code: u32) -> f32 {
    let twice = f32((0xc8643210u >> ((code & 7u) * 4u)) & 15u);
    return bitcast<f32>(bitcast<u32>(twice * 0.5) | ((code & 8u) << 28u));
}

// 2^(code - 127). Code 0 is the subnormal 2^-127, which some GPUs flush to 0 (an H200 does): such a block then counts
// as zeros, an error below 1e-37. Code 255 (NaN) is refused at load.
fn e8m0(code: u32) -> f32 {
    return bitcast<f32>(max(code << 23u, 0x00400000u));
}

// Elements 8i..8i+8 of a row of K = 8 row_words elements.
fn weight8(row: u32, row_words: u32, i: u32) -> Weight8 {
    let c = codes[row * row_words + i];
    let block = row * (row_words / 4u) + i / 4u;
    return Weight8(
        vec4<f32>(e2m1(c), e2m1(c >> 4u), e2m1(c >> 8u), e2m1(c >> 12u)),
        vec4<f32>(e2m1(c >> 16u), e2m1(c >> 20u), e2m1(c >> 24u), e2m1(c >> 28u)),
        e8m0((scales[block / 4u] >> ((block % 4u) * 8u)) & 255u),
    );
}
