// amax: the largest magnitude of each row, as bits: those of NaN are the largest of all.
//
//   y[r] = max_k |x[r,k]|
//
// grid      R workgroups, one per row
// in        x  f32  [R, K]
// out       y  f32  [R]
// override  K
// twin      src/ops/amax.rs
override K: u32;
const WG = 64u;
@group(0) @binding(0) var<storage, read> x: array<u32>;
@group(0) @binding(1) var<storage, read_write> y: array<u32>;

var<workgroup> partial: array<u32, WG>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    var most = 0u;
    for (var k = lane; k < K; k += WG) {
        most = max(most, x[group.x * K + k] & 0x7fffffffu);
    }
    partial[lane] = most;
    workgroupBarrier(); // all lanes have written
    if lane == 0u {
        for (var i = 1u; i < WG; i++) {
            most = max(most, partial[i]);
        }
        y[group.x] = most;
    }
}
