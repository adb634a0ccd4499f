// glu: the gated activation of a dense MLP.
//
//   y[t,f] = glu(x[t,f], x[t,F+f])
//
// grid      ceil(F / 64) x T workgroups
// in        x  f32  [T, 2F]     gates, then ups
// out       y  f32  [T, F]
// override  F
// slots     glu
// twin      src/ops/glu.rs
#import glu
override F: u32;
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let f = group.x * 64u + lane;
    if f < F {
        let at = group.y * F * 2u + f;
        y[group.y * F + f] = glu(x[at], x[at + F]);
    }
}
