// Fills slot `output`: the row as it is.
fn matrix_row(l: u32) -> u32 {
    return n0 + l;
}

fn side_by_side() -> bool {
    return N % ROWS == 0u;
}

fn put(lane: u32) {
    for (var l = lane; l < ROWS && n0 + l < N; l += LANES * WARPS) {
        y[n0 + l] = product(l, 0u, 1.0);
    }
}
