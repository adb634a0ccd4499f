// Fills slot `weights`: a bf16 matrix [rows, K], eight elements a load.
#import bf16
#import sixteen
@group(0) @binding(1) var<storage, read> codes: array<vec4<u32>>;

const WEIGHT_UNIT = 1.0;
const WEIGHT_SCALES_ROUND = false;

struct Stored {
    lower: vec4<u32>,
    upper: vec4<u32>,
}

// Elements 16i..16i+16 of a row of K = 16 chunks elements, as they are stored: kernels may fetch them early.
fn stored_at(row: u32, chunks: u32, i: u32) -> Stored {
    let at = (row * chunks + i) * 2u;
    return Stored(codes[at], codes[at + 1u]);
}

// None that four rows share a word of.
fn scales_at(row: u32, chunks: u32, i: u32) -> u32 {
    return 0u;
}

fn opened(s: Stored, scale: u32) -> Sixteen {
    let v = s.lower;
    let w = s.upper;
    return Sixteen(bf16x4(v.x, v.y), bf16x4(v.z, v.w), bf16x4(w.x, w.y), bf16x4(w.z, w.w), 1.0);
}

fn row_scale(row: u32) -> f32 {
    return 1.0;
}
