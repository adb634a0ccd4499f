// Fills slot `sink`: a learned score for each head that takes weight from the keys and has no value.
#import bf16
@group(0) @binding(4) var<storage, read> sinks: array<u32>;

// The online softmax opens with the sink: its score, and its weight e^(sink - sink) = 1.
fn opening(h: u32) -> vec2<f32> {
    return vec2<f32>(bf16_pick(sinks[h / 2u], h), 1.0);
}
