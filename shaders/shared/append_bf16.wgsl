// Fills slot `append`: keys and values rounded to bf16, packed two a word. i is an element index, even.
#import bf16
@group(0) @binding(16) var<storage, read_write> keys: array<u32>;
@group(0) @binding(17) var<storage, read_write> values: array<u32>;

fn append_key(i: u32, v: vec2<f32>) {
    keys[i / 2u] = bf16_round(v.x) | (bf16_round(v.y) << 16u);
}

fn append_value(i: u32, v: vec2<f32>) {
    values[i / 2u] = bf16_round(v.x) | (bf16_round(v.y) << 16u);
}
