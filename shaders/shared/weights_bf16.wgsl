// Fills slot `weights`: a bf16 matrix [rows, K], eight elements a load.
#import bf16
#import sixteen
@group(0) @binding(1) var<storage, read> codes: array<vec4<u32>>;

const WEIGHT_UNIT = 1.0;

// Elements 16i..16i+16 of a row of K = 16 chunks elements.
fn weight_at(row: u32, chunks: u32, i: u32) -> Sixteen {
    let at = (row * chunks + i) * 2u;
    let v = codes[at];
    let w = codes[at + 1u];
    return Sixteen(bf16x4(v.x, v.y), bf16x4(v.z, v.w), bf16x4(w.x, w.y), bf16x4(w.z, w.w), 1.0);
}

fn row_scale(row: u32) -> f32 {
    return 1.0;
}
