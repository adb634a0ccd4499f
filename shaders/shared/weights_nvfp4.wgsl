// Fills slot `weights`: an NVFP4 matrix [rows, K], as `src/ops/layout.rs` lays it out. Blocks of 16 along K: 8 bytes of
// E2M1 codes, one E4M3 scale byte apart (a word has those of four rows), and the tensor's f32 for each row.
#import e2m1
#import e4m3
#import sixteen
@group(0) @binding(1) var<storage, read> codes: array<vec2<u32>>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(7) var<storage, read> row_scales: array<f32>;

const WEIGHT_UNIT = E2M1_UNIT;
const WEIGHT_SCALES_ROUND = true;

struct Stored {
    codes: vec2<u32>,
}

// Elements 16i..16i+16 of a row of K = 16 chunks elements, as they are stored: kernels may fetch them early.
fn stored_at(row: u32, chunks: u32, i: u32) -> Stored {
    return Stored(codes[row * chunks + i]);
}

// Their scale and those of the rows beside it: row r's in byte r % 4.
fn scales_at(row: u32, chunks: u32, i: u32) -> u32 {
    return scales[row / 4u * chunks + i];
}

fn opened(s: Stored, scale: u32) -> Sixteen {
    let v = e2m1x8_laid_out(s.codes.x);
    let w = e2m1x8_laid_out(s.codes.y);
    return Sixteen(v.a, v.b, w.a, w.b, e4m3(scale & 255u));
}

// What the sum over a row is multiplied by.
fn row_scale(row: u32) -> f32 {
    return row_scales[row];
}
