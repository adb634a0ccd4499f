// Fills slot `cache`: keys and values read as f32. i is an element index, a multiple of 4.
@group(0) @binding(2) var<storage, read> keys: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> values: array<f32>;

fn key4(i: u32) -> vec4<f32> {
    return keys[i / 4u];
}

fn value(i: u32) -> f32 {
    return values[i];
}
