// Fills slot `result`: a workgroup sees a segment of a row's keys, and leaves its part to attention_merge.
override SEGMENTS: u32;
@group(0) @binding(5) var<storage, read_write> parts: array<vec4<f32>>; // [ROWS, H, SEGMENTS, DH/4 + 1]

fn share_of(place: u32, visible: u32) -> vec2<u32> {
    let each = tiles_per_segment(visible) * KEYS;
    return vec2<u32>(min(place * each, visible), min((place + 1u) * each, visible));
}

// Quad `quad` of head h of row t: what a segment's keys gave, their largest score and the sum of their weights.
fn result(t: u32, h: u32, place: u32, quad: u32, sum: vec4<f32>, m: f32, total: f32) {
    let at = (((t - FIRST) * H + h) * SEGMENTS + place) * (DH / 4u + 1u);
    parts[at + 1u + quad] = sum;
    if quad == 0u {
        parts[at] = vec4<f32>(m, total, 0.0, 0.0);
    }
}
