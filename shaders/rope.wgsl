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
#import row
#import pages
#import append
override H: u32;
override HK: u32;
override DH: u32;
@group(0) @binding(0) var<storage, read> rows: array<Row>;
@group(0) @binding(1) var<storage, read> table: array<vec2<f32>>;
@group(0) @binding(2) var<storage, read_write> qkv: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let index = group.x * 64u + lane;
    let head = index / (DH / 4u);
    let i = index % (DH / 4u) * 2u;
    if head < H + 2u * HK {
        let row = rows[group.y];
        let at = (group.y * (H + 2u * HK) + head) * DH + i;
        let a = vec2<f32>(qkv[at], qkv[at + 1u]);
        let b = vec2<f32>(qkv[at + DH / 2u], qkv[at + DH / 2u + 1u]);
        let cs0 = table[row.position * (DH / 2u) + i];
        let cs1 = table[row.position * (DH / 2u) + i + 1u];
        let cos = vec2<f32>(cs0.x, cs1.x);
        let sin = vec2<f32>(cs0.y, cs1.y);
        let lo = fma(a, cos, -(b * sin));
        let hi = fma(b, cos, a * sin);
        let slot = cache_row(row.sequence, row.position) * HK;
        if head < H {
            qkv[at] = lo.x;
            qkv[at + 1u] = lo.y;
            qkv[at + DH / 2u] = hi.x;
            qkv[at + DH / 2u + 1u] = hi.y;
        } else if head < H + HK {
            let to = (slot + head - H) * DH + i;
            append_key(to, lo);
            append_key(to + DH / 2u, hi);
        } else {
            let to = (slot + head - H - HK) * DH + i;
            append_value(to, a);
            append_value(to + DH / 2u, b);
        }
    }
}
