// take: gather the rows whose logits are wanted.
//
//   y[p,d] = x[picks[p],d]
//
// grid      ceil(D / 64) x P workgroups
// in        picks  u32  [P]
//           x      f32  [T, D]
// out       y      f32  [P, D]
// override  D
// twin      src/ops/take.rs
override D: u32;
@group(0) @binding(0) var<storage, read> picks: array<u32>;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let d = group.x * 64u + lane;
    if d < D {
        y[group.y * D + d] = x[picks[group.y] * D + d];
    }
}
