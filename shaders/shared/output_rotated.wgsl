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

fn put(lane: u32) {
    for (var l = lane * 2u; l < ROWS / 2u; l += LANES * WARPS * 2u) {
        let pair = n0 / 2u + l;
        if pair < N / 2u {
            let a = vec2<f32>(y_of(l), y_of(l + 1u));
            let b = vec2<f32>(y_of(l + ROWS / 2u), y_of(l + 1u + ROWS / 2u));
            rotate(0u, pair / (DH / 2u), pair % (DH / 2u), a, b);
        }
    }
}
