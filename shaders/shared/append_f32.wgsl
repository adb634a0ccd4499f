// Fills slot `append`: keys and values written as f32. i is an element index, even.
@group(0) @binding(16) var<storage, read_write> keys: array<f32>;
@group(0) @binding(17) var<storage, read_write> values: array<f32>;

fn append_key(i: u32, v: vec2<f32>) {
    keys[i] = v.x;
    keys[i + 1u] = v.y;
}

fn append_value(i: u32, v: vec2<f32>) {
    values[i] = v.x;
    values[i + 1u] = v.y;
}
