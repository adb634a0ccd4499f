// add: put a stage's output back into the residual stream.
//
//   sum[t,d] = x[t,d] + y[t,d]
//
// grid      ceil(D / 64) x T workgroups
// in        x    f32  [T, D]
//           y    f32  [T, D]
// out       sum  f32  [T, D]     may not alias x or y
// override  D
// twin      src/ops/add.rs
override D: u32;
@group(0) @binding(0) var<storage, read> y: array<f32>;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> sum: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let d = group.x * 64u + lane;
    if d < D {
        let at = group.y * D + d;
        sum[at] = x[at] + y[at];
    }
}
