// Fills slot `cache`: keys and values read as bf16, packed two a word, four at a time.
#import bf16
@group(0) @binding(2) var<storage, read> keys: array<vec2<u32>>;
@group(0) @binding(3) var<storage, read> values: array<vec2<u32>>;

fn key4(i: u32) -> vec4<f32> {
    return bf16x4(keys[i].x, keys[i].y);
}

fn value4(i: u32) -> vec4<f32> {
    return bf16x4(values[i].x, values[i].y);
}
