// wide: whole numbers of 64 bits as two words, the low one first.
fn plus(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let low = a.x + b.x;
    return vec2<u32>(low, a.y + b.y + select(0u, 1u, low < a.x));
}

fn minus(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    return vec2<u32>(a.x - b.x, a.y - b.y - select(0u, 1u, a.x < b.x));
}

fn less(a: vec2<u32>, b: vec2<u32>) -> bool {
    return a.y < b.y || (a.y == b.y && a.x < b.x);
}

fn times(a: u32, b: u32) -> vec2<u32> {
    let low = (a & 0xffffu) * (b & 0xffffu);
    let mixed = vec2<u32>((a & 0xffffu) * (b >> 16u), (a >> 16u) * (b & 0xffffu));
    let middle = (low >> 16u) + (mixed.x & 0xffffu) + (mixed.y & 0xffffu);
    let high = (a >> 16u) * (b >> 16u) + (mixed.x >> 16u) + (mixed.y >> 16u) + (middle >> 16u);
    return vec2<u32>((low & 0xffffu) | (middle << 16u), high);
}

// The high half of a product of 128 bits.
fn scaled(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let first = plus(times(a.y, b.x), vec2<u32>(times(a.x, b.x).y, 0u));
    let second = plus(times(a.x, b.y), vec2<u32>(first.x, 0u));
    return plus(plus(times(a.y, b.y), vec2<u32>(first.y, 0u)), vec2<u32>(second.y, 0u));
}
