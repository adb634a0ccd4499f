// Fills slot `block`: 128 rows of weights by 64 of input, 64 by 32 to a subgroup: few subgroups that each have much to multiply.
const WG = 128u;
const TALL = 128u;
const WIDE = 64u;

fn multiply(lane: u32) {
    let group = lane / 32u;
    let tall = (group % 2u) * 64u;
    let wide = (group / 2u) * 32u;
    // What this lane brings in: a chunk of two rows of weights, a quad of four rows of input.
    let w_row0 = weight_row(lane / 2u);
    let w_row1 = weight_row(lane / 2u + 64u);
    let w_at = (lane / 2u) * PITCH + (lane % 2u) * 4u;
    let x0 = source(lane / 8u);
    let x1 = source(lane / 8u + 16u);
    let x2 = source(lane / 8u + 32u);
    let x3 = source(lane / 8u + 48u);
    let x_at = (lane / 8u) * PITCH + lane % 8u;
    // Sixteen rows of weights by sixteen of input each: c of the first halves, d of the rest.
    var c00 = coop_mat16x16<f32, C>();
    var c01 = coop_mat16x16<f32, C>();
    var c10 = coop_mat16x16<f32, C>();
    var c11 = coop_mat16x16<f32, C>();
    var c20 = coop_mat16x16<f32, C>();
    var c21 = coop_mat16x16<f32, C>();
    var c30 = coop_mat16x16<f32, C>();
    var c31 = coop_mat16x16<f32, C>();
    var d00 = coop_mat16x16<f32, C>();
    var d01 = coop_mat16x16<f32, C>();
    var d10 = coop_mat16x16<f32, C>();
    var d11 = coop_mat16x16<f32, C>();
    var d20 = coop_mat16x16<f32, C>();
    var d21 = coop_mat16x16<f32, C>();
    var d30 = coop_mat16x16<f32, C>();
    var d31 = coop_mat16x16<f32, C>();
    var next0 = chunk_at(w_row0, lane % 2u);
    var next1 = chunk_at(w_row1, lane % 2u);
    var q0 = quad_at(x0, lane % 8u);
    var q1 = quad_at(x1, lane % 8u);
    var q2 = quad_at(x2, lane % 8u);
    var q3 = quad_at(x3, lane % 8u);
    for (var k = 0u; k < K; k += 32u) {
        put_chunk(w_at, next0, k / 16u + lane % 2u);
        put_chunk(w_at + 64u * PITCH, next1, k / 16u + lane % 2u);
        put_quad(x_at, q0);
        put_quad(x_at + 16u * PITCH, q1);
        put_quad(x_at + 32u * PITCH, q2);
        put_quad(x_at + 48u * PITCH, q3);
        workgroupBarrier(); // the tiles are whole
        // The next ones are on their way while these are multiplied.
        next0 = chunk_at(w_row0, k / 16u + 2u + lane % 2u);
        next1 = chunk_at(w_row1, k / 16u + 2u + lane % 2u);
        q0 = quad_at(x0, k / 4u + 8u + lane % 8u);
        q1 = quad_at(x1, k / 4u + 8u + lane % 8u);
        q2 = quad_at(x2, k / 4u + 8u + lane % 8u);
        q3 = quad_at(x3, k / 4u + 8u + lane % 8u);
        for (var half = 0u; half < 8u; half += 4u) {
            let a0 = coopLoadT<coop_mat16x16<f16, A>>(&tile_w[tall * PITCH + half], PITCH);
            let a1 = coopLoadT<coop_mat16x16<f16, A>>(&tile_w[(tall + 16u) * PITCH + half], PITCH);
            let a2 = coopLoadT<coop_mat16x16<f16, A>>(&tile_w[(tall + 32u) * PITCH + half], PITCH);
            let a3 = coopLoadT<coop_mat16x16<f16, A>>(&tile_w[(tall + 48u) * PITCH + half], PITCH);
            let hi0 = coopLoad<coop_mat16x16<f16, B>>(&tile_hi[wide * PITCH + half], PITCH);
            c00 = coopMultiplyAdd(a0, hi0, c00);
            c10 = coopMultiplyAdd(a1, hi0, c10);
            c20 = coopMultiplyAdd(a2, hi0, c20);
            c30 = coopMultiplyAdd(a3, hi0, c30);
            let lo0 = coopLoad<coop_mat16x16<f16, B>>(&tile_lo[wide * PITCH + half], PITCH);
            d00 = coopMultiplyAdd(a0, lo0, d00);
            d10 = coopMultiplyAdd(a1, lo0, d10);
            d20 = coopMultiplyAdd(a2, lo0, d20);
            d30 = coopMultiplyAdd(a3, lo0, d30);
            let hi1 = coopLoad<coop_mat16x16<f16, B>>(&tile_hi[(wide + 16u) * PITCH + half], PITCH);
            c01 = coopMultiplyAdd(a0, hi1, c01);
            c11 = coopMultiplyAdd(a1, hi1, c11);
            c21 = coopMultiplyAdd(a2, hi1, c21);
            c31 = coopMultiplyAdd(a3, hi1, c31);
            let lo1 = coopLoad<coop_mat16x16<f16, B>>(&tile_lo[(wide + 16u) * PITCH + half], PITCH);
            d01 = coopMultiplyAdd(a0, lo1, d01);
            d11 = coopMultiplyAdd(a1, lo1, d11);
            d21 = coopMultiplyAdd(a2, lo1, d21);
            d31 = coopMultiplyAdd(a3, lo1, d31);
        }
        workgroupBarrier(); // all have multiplied before the next tiles take the place
    }
    let place = group * 256u;
    coopStore(c00, &products[place], 16u);
    hold(lane);
    coopStore(d00, &products[place], 16u);
    give(lane, tall, wide);
    coopStore(c01, &products[place], 16u);
    hold(lane);
    coopStore(d01, &products[place], 16u);
    give(lane, tall, wide + 16u);
    coopStore(c10, &products[place], 16u);
    hold(lane);
    coopStore(d10, &products[place], 16u);
    give(lane, tall + 16u, wide);
    coopStore(c11, &products[place], 16u);
    hold(lane);
    coopStore(d11, &products[place], 16u);
    give(lane, tall + 16u, wide + 16u);
    coopStore(c20, &products[place], 16u);
    hold(lane);
    coopStore(d20, &products[place], 16u);
    give(lane, tall + 32u, wide);
    coopStore(c21, &products[place], 16u);
    hold(lane);
    coopStore(d21, &products[place], 16u);
    give(lane, tall + 32u, wide + 16u);
    coopStore(c30, &products[place], 16u);
    hold(lane);
    coopStore(d30, &products[place], 16u);
    give(lane, tall + 48u, wide);
    coopStore(c31, &products[place], 16u);
    hold(lane);
    coopStore(d31, &products[place], 16u);
    give(lane, tall + 48u, wide + 16u);
}
