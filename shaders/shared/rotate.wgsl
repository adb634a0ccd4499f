// rotate: elements i, i+1 of a head and their partners half a head on, turned by the row's position. Queries have a place
// in their row, keys and values in the cache.
#import dims
#import row
#import pages
#import append
@group(0) @binding(14) var<storage, read> rows: array<Row>;
@group(0) @binding(15) var<storage, read> table: array<vec2<f32>>;

// a: elements i, i+1 of the head of row t, i below DH/2 and even; b: i + DH/2, i + DH/2 + 1. `put_query` takes those of queries.
fn rotate(t: u32, head: u32, i: u32, a: vec2<f32>, b: vec2<f32>) {
    let row = rows[t];
    let cs0 = table[row.position * (DH / 2u) + i];
    let cs1 = table[row.position * (DH / 2u) + i + 1u];
    let cos = vec2<f32>(cs0.x, cs1.x);
    let sin = vec2<f32>(cs0.y, cs1.y);
    let lo = fma(a, cos, -(b * sin));
    let hi = fma(b, cos, a * sin);
    let slot = cache_row(row.sequence, row.position) * PART;
    if head < H {
        put_query((t * (H + 2u * HK) + head) * DH + i, lo, hi);
    } else if head < H + HK {
        let to = (slot + head - H - PART_FIRST) * DH + i;
        append_key(to, lo);
        append_key(to + DH / 2u, hi);
    } else {
        let to = (slot + head - H - HK - PART_FIRST) * DH + i;
        append_value(to, a);
        append_value(to + DH / 2u, b);
    }
}
