// Fills slot `cache`: keys and values read as bf16, packed two a word. i is an element index; of keys, a multiple of 4.
#import bf16
@group(0) @binding(2) var<storage, read> keys: array<vec2<u32>>;
@group(0) @binding(3) var<storage, read> values: array<u32>;

fn key4(i: u32) -> vec4<f32> {
    let w = keys[i / 4u];
    return vec4<f32>(bf16_lo(w.x), bf16_hi(w.x), bf16_lo(w.y), bf16_hi(w.y));
}

fn value(i: u32) -> f32 {
    return bf16_pick(values[i / 2u], i);
}
