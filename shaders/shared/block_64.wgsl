// Fills slot `block`: 128 rows of weights by 64 of input, 32 by 32 to a subgroup.
const WG = 256u;
const TALL = 128u;
const WIDE = 64u;

fn multiply(lane: u32) {
    let group = lane / 32u;
    let tall = (group % 4u) * 32u;
    let wide = (group / 4u) * 32u;
    // What this lane brings in: a chunk of a row of weights, a quad of two rows of input.
    let w_row = weight_row(lane / 2u);
    let w_at = (lane / 2u) * PITCH + (lane % 2u) * 4u;
    let x0 = source(lane / 8u);
    let x1 = source(lane / 8u + 32u);
    let x_at = (lane / 8u) * PITCH + lane % 8u;
    var c00 = coop_mat16x16<f32, C>();
    var c01 = coop_mat16x16<f32, C>();
    var c10 = coop_mat16x16<f32, C>();
    var c11 = coop_mat16x16<f32, C>();
    var d00 = coop_mat16x16<f32, C>();
    var d01 = coop_mat16x16<f32, C>();
    var d10 = coop_mat16x16<f32, C>();
    var d11 = coop_mat16x16<f32, C>();
    var next = chunk_at(w_row, lane % 2u);
    var q0 = quad_at(x0, lane % 8u);
    var q1 = quad_at(x1, lane % 8u);
    for (var k = 0u; k < K; k += 32u) {
        put_chunk(w_at, next, k / 16u + lane % 2u);
        put_quad(x_at, q0);
        put_quad(x_at + 32u * PITCH, q1);
        workgroupBarrier(); // the tiles are whole
        // The next ones are on their way while these are multiplied.
        next = chunk_at(w_row, k / 16u + 2u + lane % 2u);
        q0 = quad_at(x0, k / 4u + 8u + lane % 8u);
        q1 = quad_at(x1, k / 4u + 8u + lane % 8u);
        for (var half = 0u; half < 8u; half += 4u) {
            let a0 = coopLoadT<coop_mat16x16<f16, A>>(&tile_w[tall * PITCH + half], PITCH);
            let a1 = coopLoadT<coop_mat16x16<f16, A>>(&tile_w[(tall + 16u) * PITCH + half], PITCH);
            let h0 = coopLoad<coop_mat16x16<f16, B>>(&tile_hi[wide * PITCH + half], PITCH);
            let h1 = coopLoad<coop_mat16x16<f16, B>>(&tile_hi[(wide + 16u) * PITCH + half], PITCH);
            let l0 = coopLoad<coop_mat16x16<f16, B>>(&tile_lo[wide * PITCH + half], PITCH);
            let l1 = coopLoad<coop_mat16x16<f16, B>>(&tile_lo[(wide + 16u) * PITCH + half], PITCH);
            c00 = coopMultiplyAdd(a0, h0, c00);
            c01 = coopMultiplyAdd(a0, h1, c01);
            c10 = coopMultiplyAdd(a1, h0, c10);
            c11 = coopMultiplyAdd(a1, h1, c11);
            d00 = coopMultiplyAdd(a0, l0, d00);
            d01 = coopMultiplyAdd(a0, l1, d01);
            d10 = coopMultiplyAdd(a1, l0, d10);
            d11 = coopMultiplyAdd(a1, l1, d11);
        }
        workgroupBarrier(); // all have multiplied before the next tiles take the place
    }
    coopStore(c00, &products[group * 256u], 16u);
    hold(lane);
    coopStore(d00, &products[group * 256u], 16u);
    give(lane, tall, wide);
    coopStore(c01, &products[group * 256u], 16u);
    hold(lane);
    coopStore(d01, &products[group * 256u], 16u);
    give(lane, tall, wide + 16u);
    coopStore(c10, &products[group * 256u], 16u);
    hold(lane);
    coopStore(d10, &products[group * 256u], 16u);
    give(lane, tall + 16u, wide);
    coopStore(c11, &products[group * 256u], 16u);
    hold(lane);
    coopStore(d11, &products[group * 256u], 16u);
    give(lane, tall + 16u, wide + 16u);
}
