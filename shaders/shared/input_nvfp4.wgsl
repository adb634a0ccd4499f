// Fills slot `input`: rows that stage_activation quantised: K/16 E4M3 scales (in whole words), then K/8 words of E2M1
// codes, and an f32 for each row apart. What it was quantised with is what the product is multiplied by.
#import e2m1
#import e4m3
#import sixteen
@group(0) @binding(4) var<storage, read> x: array<u32>;
@group(0) @binding(8) var<storage, read> x_scales: array<f32>;

const INPUT_UNIT = E2M1_UNIT;
const INPUT_SCALES_ROUND = true;

// Elements 16i..16i+16 of a row of K = 16 chunks elements.
fn input_at(row: u32, chunks: u32, i: u32) -> Sixteen {
    let scale_words = (chunks + 3u) / 4u;
    let at = row * (scale_words + chunks * 2u);
    let v = e2m1x8(x[at + scale_words + i * 2u]);
    let w = e2m1x8(x[at + scale_words + i * 2u + 1u]);
    return Sixteen(v.a, v.b, w.a, w.b, e4m3((x[at + i / 4u] >> (i % 4u * 8u)) & 255u));
}

fn input_scale(row: u32) -> f32 {
    return x_scales[row];
}
