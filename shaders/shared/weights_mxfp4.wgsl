// Fills slot `weights`: an MXFP4 matrix [rows, K], as `src/ops/layout.rs` lays it out. Blocks of 32 along K: 16 bytes of E2M1
// codes, and one E8M0 scale byte apart (OCP Microscaling formats 1.0); a word has the scales of four rows.
#import e2m1
#import sixteen
@group(0) @binding(1) var<storage, read> codes: array<vec2<u32>>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;

const WEIGHT_UNIT = E2M1_UNIT;
// Scales are powers of two: scaling rounds nothing but what falls below 2^-126.
const WEIGHT_SCALES_ROUND = false;

// 2^(code - 127). Code 0 is the subnormal 2^-127, which some GPUs flush to 0 (an H200 does): such a block then counts
// as zeros, an error below 1e-37. Code 255 (NaN) is refused at load.
fn e8m0(code: u32) -> f32 {
    return bitcast<f32>(max(code << 23u, 0x00400000u));
}

struct Stored {
    codes: vec2<u32>,
}

// Elements 16i..16i+16 of a row of K = 16 chunks elements, as they are stored: kernels may fetch them early.
fn stored_at(row: u32, chunks: u32, i: u32) -> Stored {
    return Stored(codes[row * chunks + i]);
}

// Their scale and those of the rows beside it: row r's in byte r % 4.
fn scales_at(row: u32, chunks: u32, i: u32) -> u32 {
    return scales[row / 4u * (chunks / 2u) + i / 2u];
}

fn opened(s: Stored, scale: u32) -> Sixteen {
    let v = e2m1x8_laid_out(s.codes.x);
    let w = e2m1x8_laid_out(s.codes.y);
    return Sixteen(v.a, v.b, w.a, w.b, e8m0(scale & 255u));
}

fn row_scale(row: u32) -> f32 {
    return 1.0;
}
