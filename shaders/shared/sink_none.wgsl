// Fills slot `sink`: none. The online softmax opens empty, below every score.
fn opening(h: u32) -> vec2<f32> {
    return vec2<f32>(-3.0e38, 0.0);
}
