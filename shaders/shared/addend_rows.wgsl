// Fills slot `addend`: rows as they are, [T, D].
@group(0) @binding(9) var<storage, read> addends: array<vec4<f32>>;

// Elements 4i..4i+4 of a row of 4 quads elements.
fn addend(t: u32, i: u32, quads: u32) -> vec4<f32> {
    return addends[t * quads + i];
}
