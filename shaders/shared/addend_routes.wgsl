// Fills slot `addend`: the weighted sum of a token's routes, as moe_scatter makes it; written to `y` as well.
override A: u32;
@group(0) @binding(3) var<storage, read> weights: array<f32>;        // [T, A]
@group(0) @binding(4) var<storage, read> routes: array<vec4<f32>>;   // [T, A, D]
@group(0) @binding(5) var<storage, read_write> y: array<vec4<f32>>;  // [T, D]

// Elements 4i..4i+4 of a row of 4 quads elements.
fn addend(t: u32, i: u32, quads: u32) -> vec4<f32> {
    var sum = vec4<f32>(0.0);
    for (var a = 0u; a < A; a++) {
        sum = fma(vec4<f32>(weights[t * A + a]), routes[(t * A + a) * quads + i], sum);
    }
    y[t * quads + i] = sum;
    return sum;
}
