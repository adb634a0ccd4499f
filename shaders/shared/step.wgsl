// step: what changes from step to step. One uniform for every kernel that needs it.
struct Step {
    tokens: u32, // T, rows of the step
    pad0: u32,
    pad1: u32,
    pad2: u32,
}
@group(0) @binding(0) var<uniform> step: Step;
