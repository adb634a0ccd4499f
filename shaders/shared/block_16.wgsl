// Fills slot `block`: 64 rows of weights by 16 of input, 32 by 16 to a subgroup: for few rows. Small, so that many fit.
const WG = 64u;
const TALL = 64u;
const WIDE = 16u;

fn multiply(lane: u32) {
    let tall = lane / 32u * 32u;
    // What this lane brings in: a chunk of two rows of weights, a quad of two rows of input.
    let w_row0 = weight_row(lane / 2u);
    let w_row1 = weight_row(lane / 2u + 32u);
    let w_at = (lane / 2u) * PITCH + (lane % 2u) * 4u;
    let x0 = source(lane / 8u);
    let x1 = source(lane / 8u + 8u);
    let x_at = (lane / 8u) * PITCH + lane % 8u;
    var c0 = coop_mat16x16<f32, C>();
    var c1 = coop_mat16x16<f32, C>();
    var d0 = coop_mat16x16<f32, C>();
    var d1 = coop_mat16x16<f32, C>();
    var next0 = chunk_at(w_row0, lane % 2u);
    var next1 = chunk_at(w_row1, lane % 2u);
    var q0 = quad_at(x0, lane % 8u);
    var q1 = quad_at(x1, lane % 8u);
    for (var k = 0u; k < K; k += 32u) {
        put_chunk(w_at, next0, k / 16u + lane % 2u);
        put_chunk(w_at + 32u * PITCH, next1, k / 16u + lane % 2u);
        put_quad(x_at, q0);
        put_quad(x_at + 8u * PITCH, q1);
        workgroupBarrier(); // the tiles are whole
        // The next ones are on their way while these are multiplied.
        next0 = chunk_at(w_row0, k / 16u + 2u + lane % 2u);
        next1 = chunk_at(w_row1, k / 16u + 2u + lane % 2u);
        q0 = quad_at(x0, k / 4u + 8u + lane % 8u);
        q1 = quad_at(x1, k / 4u + 8u + lane % 8u);
        for (var half = 0u; half < 8u; half += 4u) {
            let a0 = coopLoadT<coop_mat16x16<f16, A>>(&tile_w[tall * PITCH + half], PITCH);
            let a1 = coopLoadT<coop_mat16x16<f16, A>>(&tile_w[(tall + 16u) * PITCH + half], PITCH);
            let h = coopLoad<coop_mat16x16<f16, B>>(&tile_hi[half], PITCH);
            let l = coopLoad<coop_mat16x16<f16, B>>(&tile_lo[half], PITCH);
            c0 = coopMultiplyAdd(a0, h, c0);
            c1 = coopMultiplyAdd(a1, h, c1);
            d0 = coopMultiplyAdd(a0, l, d0);
            d1 = coopMultiplyAdd(a1, l, d1);
        }
        workgroupBarrier(); // all have multiplied before the next tiles take the place
    }
    let place = lane / 32u * 256u;
    coopStore(c0, &products[place], 16u);
    hold(lane);
    coopStore(d0, &products[place], 16u);
    give(lane, tall, 0u);
    coopStore(c1, &products[place], 16u);
    hold(lane);
    coopStore(d1, &products[place], 16u);
    give(lane, tall + 16u, 0u);
}
