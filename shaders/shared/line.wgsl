// line: a row's tokens in line, by how far they lie below the likeliest one, of equals the lowest id first; and what each counts in
// sums of whole numbers, which follow no order (src/sampler/weight.rs).
#import wide
struct Rule { // how a sequence's tokens are drawn
    sharp: f32, // steps of 2^-19 octaves in a unit of a logit; 0: the likeliest token
    top_k: u32, // 0: off
    top_p: u32, // of 2^32 parts; ALL: off
    far: u32,   // most steps below the likeliest
    seed: vec2<u32>,
    stream: vec2<u32>,
}

struct Kept { // what is known of a row
    largest: f32,
    stage: u32, // top-k's digits: 0, 1, 2; top-p's: 3, 4, 5; then WEIGHS, DONE
    below: u32, // tokens are kept that lie fewer steps below, or as many
    id: u32,    // and have an id up to this
    digits: u32, // of the place that is sought
    pad: u32,
    wanted: vec2<u32>, // what the sum over tokens with these digits passes there
}

const ALL = 0xffffffffu;
const FAR = 0x1000000u;
const WEIGHS = 6u;
const DONE = 7u;
const WG = 256u;
@group(0) @binding(0) var<storage, read> logits: array<u32>;
@group(0) @binding(1) var<storage, read> powers: array<vec2<u32>>; // 2^(31 - i/512), and how far it is to the next
@group(0) @binding(2) var<storage, read> rules: array<Rule>;

fn below(bits: u32, largest: f32, sharp: f32) -> u32 {
    let steps = (largest - bitcast<f32>(bits)) * sharp;
    return select(FAR, u32(min(steps, 16777216.0)), (bits & 0x7fffffffu) < 0x7f800000u);
}

fn weight(below: u32) -> u32 {
    let power = powers[(below >> 10u) & 511u];
    let whole = power.x - ((power.y * (below & 1023u)) >> 10u);
    return select(whole >> ((below >> 19u) & 31u), 0u, below >= FAR);
}

// What a token counts in the sums of this stage, if its first digits are those sought.
fn counts(rule: Rule, kept: Kept, digits: u32, shift: u32, steps: u32, id: u32) -> u32 {
    let far = select(FAR - 1u, rule.far, kept.stage >= WEIGHS);
    let stays = steps < kept.below || (steps == kept.below && id <= kept.id);
    let what = select(1u, weight(steps), kept.stage > 2u);
    return select(0u, what, steps <= far && stays && (steps >> shift) == digits);
}
