// Fills slot `glu`: gpt-oss's clamped SwiGLU, gate sigmoid(ALPHA gate) (up + 1) with gate = min(g, LIMIT) and
// up = clamp(u, -LIMIT, LIMIT).
#import exp
override LIMIT: f32;
override ALPHA: f32;

fn glu(g: f32, u: f32) -> f32 {
    let gate = min(g, LIMIT);
    let up = clamp(u, -LIMIT, LIMIT);
    let y = gate / (1.0 + exp_f32(-(ALPHA * gate))) * (up + 1.0);
    // min and clamp turn a NaN into the limit on some GPUs (an H100 does, written as select too): ask the bits.
    return select(y, g + u, is_nan(g) || is_nan(u));
}
