// stream: read words and fold them, to measure how fast memory can be read.
//
//   y[i] = xor of x[i + j I] over j          I = 256 GROUPS
//
// grid      GROUPS workgroups
// in        x  4 u32  [N]
// out       y  u32    [I]
// override  N, GROUPS
// twin      src/ops/stream.rs
override N: u32;
override GROUPS: u32;
@group(0) @binding(0) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> y: array<u32>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let first = group.x * 256u + lane;
    let stride = GROUPS * 256u;
    var fold = vec4<u32>(0u);
    var i = first;
    // Four loads at once: a single one does not keep the memory busy.
    while i + 3u * stride < N {
        let a = x[i];
        let b = x[i + stride];
        let c = x[i + 2u * stride];
        let d = x[i + 3u * stride];
        fold ^= a ^ b ^ c ^ d;
        i += 4u * stride;
    }
    while i < N {
        fold ^= x[i];
        i += stride;
    }
    y[first] = fold.x ^ fold.y ^ fold.z ^ fold.w;
}
