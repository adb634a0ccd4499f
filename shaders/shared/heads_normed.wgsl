// Fills slot `heads`: query heads and key heads brought to unit root mean square, then multiplied by a gain; value heads as they
// are.
#import head
#import bf16
#import lanes
#import reduce
override EPS: f32;
@group(0) @binding(0) var<storage, read> q_gain: array<u32>;
@group(0) @binding(1) var<storage, read> k_gain: array<u32>;

// A word of the gain has elements i, i+1.
fn gain_word(head: u32, i: u32) -> u32 {
    if head < H {
        return q_gain[i / 2u];
    }
    return k_gain[i / 2u];
}

// What the head at `at` is multiplied by; found for value heads, too, since every lane of a workgroup of LANES must call it.
fn scale_of_head(head: u32, at: u32, lane: u32) -> f32 {
    var share = 0.0;
    for (var i = lane * 2u; i < DH / 2u; i += LANES * 2u) {
        let v = four_at(at + i);
        share = fma(v.w, v.w, fma(v.z, v.z, fma(v.y, v.y, fma(v.x, v.x, share))));
    }
    return 1.0 / sqrt(reduce(share, lane) / f32(DH) + EPS);
}

// Elements i, i+1 and their partners, of which the first stands at `at`.
fn scaled(head: u32, at: u32, i: u32, scale: f32) -> vec4<f32> {
    let v = four_at(at);
    if head >= H + HK {
        return v;
    }
    return v * scale * bf16x4(gain_word(head, i), gain_word(head, i + DH / 2u));
}
