// Fills slot `glu`: SiLU(g) u = g sigmoid(g) u, as Llama and Qwen have it.
#import exp
fn glu(g: f32, u: f32) -> f32 {
    return g / (1.0 + exp_f32(-g)) * u;
}
