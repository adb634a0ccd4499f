// Fills slot `bias`: one bf16 per output row, packed two a word.
#import bf16
@group(0) @binding(3) var<storage, read> bias: array<u32>;

fn bias_at(i: u32) -> f32 {
    return bf16_pick(bias[i / 2u], i);
}
