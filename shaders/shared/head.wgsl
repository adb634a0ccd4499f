// head: elements i, i+1 of a head and their partners half a head on, as a lane has them; i is even and below DH/2.
#import dims
@group(0) @binding(2) var<storage, read_write> qkv: array<f32>;

// `at` is where element i stands.
fn four_at(at: u32) -> vec4<f32> {
    return vec4<f32>(qkv[at], qkv[at + 1u], qkv[at + DH / 2u], qkv[at + DH / 2u + 1u]);
}

fn put_four(at: u32, v: vec4<f32>) {
    qkv[at] = v.x;
    qkv[at + 1u] = v.y;
    qkv[at + DH / 2u] = v.z;
    qkv[at + DH / 2u + 1u] = v.w;
}
