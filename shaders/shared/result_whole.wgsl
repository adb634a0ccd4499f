// Fills slot `result`: one workgroup sees all keys of a row, and finishes it.
#import sink
@group(0) @binding(5) var<storage, read_write> a: array<vec4<f32>>; // [T, H DH]

fn share_of(place: u32, visible: u32) -> vec2<u32> {
    return vec2<u32>(0u, visible);
}

// Quad `quad` of head h of row t: what a segment's keys gave, their largest score and the sum of their weights.
fn result(t: u32, h: u32, place: u32, quad: u32, sum: vec4<f32>, m: f32, total: f32) {
    let open = opening(h);
    // One of the two weighs 1.
    let less = exp_f32(-abs(m - open.x));
    let weight = select(less, 1.0, m >= open.x);
    let all = fma(weight, total, open.y * select(1.0, less, m >= open.x));
    a[(t * H + h) * (DH / 4u) + quad] = fma(vec4<f32>(weight), sum, vec4<f32>(0.0)) * (1.0 / all);
}
