// Fills slot `input`: rows that stage_activation quantised: K/16 E4M3 scales (in whole words), then K/8 words of E2M1
// codes, and an f32 for each row apart. What it was quantised with is what the product is multiplied by.
#import e2m1
#import e4m3
#import input8
@group(0) @binding(4) var<storage, read> x: array<u32>;
@group(0) @binding(8) var<storage, read> x_scales: array<f32>;

// Elements 8i..8i+8 of a row of K = 8 row_words elements.
fn input_at(row: u32, row_words: u32, i: u32) -> Input8 {
    let scale_words = (row_words + 7u) / 8u;
    let at = row * (scale_words + row_words);
    let c = x[at + scale_words + i];
    return Input8(e2m1x4(c, 0u), e2m1x4(c, 16u), e4m3((x[at + i / 8u] >> (i / 2u % 4u * 8u)) & 255u));
}

fn input_scale(row: u32) -> f32 {
    return x_scales[row];
}
