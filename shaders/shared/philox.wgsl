// philox: Philox4x32-10, 64 random bits for each seed, stream and position (src/sampler/philox.rs).
#import wide
fn philox(seed: vec2<u32>, stream: vec2<u32>, position: u32) -> vec2<u32> {
    var counter = vec4<u32>(position, 0u, stream);
    var key = seed;
    for (var round = 0u; round < 10u; round++) {
        let a = times(0xd2511f53u, counter.x);
        let b = times(0xcd9e8d57u, counter.z);
        counter = vec4<u32>(b.y ^ counter.y ^ key.x, b.x, a.y ^ counter.w ^ key.y, a.x);
        key += vec2<u32>(0x9e3779b9u, 0xbb67ae85u);
    }
    return counter.xy;
}
