// Fills slot `output`: the row as it is.
fn matrix_row(l: u32) -> u32 {
    return n0 + l;
}

fn put(lane: u32) {
    for (var l = lane; l < ROWS && n0 + l < N; l += LANES * WARPS) {
        y[n0 + l] = y_of(l);
    }
}
