// Fills slot `output`: queries, keys and values of one row, rotated and appended as rope does it. A workgroup has the two
// halves of what is turned together: ROWS / 2 elements and their partners.
#import rotate

// Pairs are counted through all heads.
fn matrix_row(l: u32) -> u32 {
    let pair = n0 / 2u + l % (ROWS / 2u);
    return pair / (DH / 2u) * DH + pair % (DH / 2u) + l / (ROWS / 2u) * (DH / 2u);
}

fn put_query(at: u32, lo: vec2<f32>, hi: vec2<f32>) {
    y[at] = lo.x;
    y[at + 1u] = lo.y;
    y[at + DH / 2u] = hi.x;
    y[at + DH / 2u + 1u] = hi.y;
}

fn side_by_side() -> bool {
    return N % ROWS == 0u && DH / 2u % (ROWS / 2u) == 0u && ROWS / 2u % BATCH == 0u;
}

fn put(lane: u32) {
    for (var l = lane * 2u; l < ROWS / 2u; l += LANES * WARPS * 2u) {
        let pair = n0 / 2u + l;
        if pair < N / 2u {
            let a = vec2<f32>(product(l, 0u, 1.0), product(l + 1u, 0u, 1.0));
            let b = vec2<f32>(product(l + ROWS / 2u, 0u, 1.0), product(l + 1u + ROWS / 2u, 0u, 1.0));
            rotate(0u, pair / (DH / 2u), pair % (DH / 2u), a, b);
        }
    }
}
