// rope: rotate queries and keys by their position, append keys and values to the cache.
//
//   o[i]      = v[i] cos[p,i] - v[i+DH/2] sin[p,i]
//   o[i+DH/2] = v[i+DH/2] cos[p,i] + v[i] sin[p,i]        i < DH/2; queries in place, keys into the cache
//
// grid      ceil((H + 2 HK) DH/4 / 64) x T workgroups: a lane has elements i, i+1 and their partners
// in        rows     Row         [T]
//           table    vec2 f32    [C, DH/2]              cos and sin, YaRN's factor included
// in/out    qkv      f32         [T, (H + 2 HK) DH]     queries, keys, values
//           pages    u32         [S, PAGES]             where a sequence's pages stand
// out       keys     slot        [.., PAGE, HK DH]      the row that the position has in its sequence's pages
//           values   slot        [.., PAGE, HK DH]
// override  H, HK, DH, PAGE, PAGES
// slots     append
// requires  DH a multiple of 4
// twin      src/ops/rope.rs
#import rotate
@group(0) @binding(2) var<storage, read_write> qkv: array<f32>;

fn put_query(at: u32, lo: vec2<f32>, hi: vec2<f32>) {
    qkv[at] = lo.x;
    qkv[at + 1u] = lo.y;
    qkv[at + DH / 2u] = hi.x;
    qkv[at + DH / 2u + 1u] = hi.y;
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let index = group.x * 64u + lane;
    let head = index / (DH / 4u);
    let i = index % (DH / 4u) * 2u;
    if head < H + 2u * HK {
        let at = (group.y * (H + 2u * HK) + head) * DH + i;
        let a = vec2<f32>(qkv[at], qkv[at + 1u]);
        let b = vec2<f32>(qkv[at + DH / 2u], qkv[at + DH / 2u + 1u]);
        rotate(turn_of(group.y, i), group.y, head, i, a, b);
    }
}
