// Fills slot `weights`: an E4M3 matrix [rows, K], four codes a word, and an f32 for each 128 elements of a row.
#import e4m3
#import sixteen
@group(0) @binding(1) var<storage, read> codes: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> scales: array<f32>;

const WEIGHT_UNIT = 1.0;
const WEIGHT_SCALES_ROUND = true;

struct Stored {
    codes: vec4<u32>,
    scale: f32,
}

// Elements 16i..16i+16 of a row of K = 16 chunks elements, as they are stored: kernels may fetch them early.
fn stored_at(row: u32, chunks: u32, i: u32) -> Stored {
    return Stored(codes[row * chunks + i], scales[row * (chunks / 8u) + i / 8u]);
}

// None that four rows share a word of.
fn scales_at(row: u32, chunks: u32, i: u32) -> u32 {
    return 0u;
}

fn opened(s: Stored, scale: u32) -> Sixteen {
    return Sixteen(e4m3x4(s.codes.x), e4m3x4(s.codes.y), e4m3x4(s.codes.z), e4m3x4(s.codes.w), s.scale);
}

fn row_scale(row: u32) -> f32 {
    return 1.0;
}
