// Fills slot `addend`: the weighted sum of a token's routes, as moe_scatter makes it.
#import first_route
override A: u32;
@group(0) @binding(9) var<storage, read> addends: array<vec4<f32>>;  // [T, A, D]
@group(0) @binding(10) var<storage, read> route_weights: array<f32>; // [T, A]

// Elements 4i..4i+4 of a row of 4 quads elements.
fn addend(t: u32, i: u32, quads: u32) -> vec4<f32> {
    let weight = route_weights[t * A];
    let y = addends[t * A * quads + i];
    var sum = vec4<f32>(first_route(weight, y.x), first_route(weight, y.y), first_route(weight, y.z), first_route(weight, y.w));
    for (var a = 1u; a < A; a++) {
        sum = fma(vec4<f32>(route_weights[t * A + a]), addends[(t * A + a) * quads + i], sum);
    }
    return sum;
}
