// rope: rotate queries and keys by their position, append keys and values to the cache; perhaps normalise heads before.
//
//   v         = the head as it is, or v[d] g[d] / sqrt(mean_d(v[d]^2) + EPS) of queries and keys
//   o[i]      = v[i] cos[p,i] - v[i+DH/2] sin[p,i]
//   o[i+DH/2] = v[i+DH/2] cos[p,i] + v[i] sin[p,i]        i < DH/2; queries in place, keys into the cache
//
// grid      PART (H / HK + 2) x T workgroups, one per row and head of this part of the cache: a lane has elements i, i+1
//           and their partners
// in        rows     Row         [T]
//           table    vec2 f32    [C, DH/2]              cos and sin, YaRN's factor included
//           pages    u32         [S, PAGES]             where a sequence's pages stand
//           q_gain, k_gain  bf16 [DH]                   where heads are normalised
// in/out    qkv      f32         [T, (H + 2 HK) DH]     queries, keys, values
// out       keys     slot        [.., PAGE, PART DH]    the row that the position has in its sequence's pages
//           values   slot        [.., PAGE, PART DH]
// override  H, HK, DH, PAGE, PAGES, PART, PART_FIRST; EPS where heads are normalised
// slots     append, heads, lanes, reduce
// requires  DH a multiple of 4; H of HK, HK of PART
// twin      src/ops/rope.rs
//
// The same bits as head_norm before it.
#import rotate
#import heads
#import lanes

fn put_query(at: u32, lo: vec2<f32>, hi: vec2<f32>) {
    put_four(at, vec4<f32>(lo, hi));
}

// The heads of this part of the cache: queries, keys, values.
fn head_of(n: u32) -> u32 {
    let queries = PART * (H / HK);
    if n < queries {
        return PART_FIRST * (H / HK) + n;
    }
    return H + PART_FIRST + (n - queries) % PART + select(0u, HK, n >= queries + PART);
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let head = head_of(group.x);
    let at = (group.y * (H + 2u * HK) + head) * DH;
    let scale = scale_of_head(head, at, lane);
    for (var i = lane * 2u; i < DH / 2u; i += LANES * 2u) {
        let v = scaled(head, at + i, i, scale);
        rotate(group.y, head, i, v.xy, v.zw);
    }
}
