// Fills slot `residual`: the residual stream with what has been computed and not yet added to it; `keep` writes the sum down.
#import addend
@group(0) @binding(4) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(12) var<storage, read_write> sum: array<vec4<f32>>;

fn residual_at(q: u32) -> vec4<f32> {
    return x[q] + addend(0u, q, K / 4u);
}

fn keep(q: u32, v: vec4<f32>) {
    sum[q] = v;
}
