// Fills slot `given`: the scores of few rows. Their experts are chosen on the way, as router does, and written down.
#import choose
@group(0) @binding(1) var<storage, read> scores: array<f32>;          // [T, E]
@group(0) @binding(3) var<storage, read_write> experts: array<u32>;   // [T, A]
@group(0) @binding(4) var<storage, read_write> weights: array<f32>;   // [T, A]

fn score(i: u32) -> f32 {
    return scores[i];
}

fn prepare(lane: u32) {
    choose(0u, step.tokens, lane, WG);
    for (var i = lane; i < step.tokens * A; i += WG) {
        experts[i] = chosen[i];
        weights[i] = weight_of(i / A, i % A);
    }
}

fn given(route: u32) -> u32 {
    return chosen[route];
}
