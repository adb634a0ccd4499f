// Fills slot `block`: 64 rows of weights by 16 of input, 32 by 16 to a subgroup: for few rows. Small, so that many fit.
const WG = 64u;
const TALL = 64u;
const WIDE = 16u;

// What a lane brings in of 32 elements of K: a chunk of two rows of weights, a quad of two rows of input.
struct Coming {
    w0: Chunk,
    w1: Chunk,
    x0: vec4<f32>,
    x1: vec4<f32>,
}

var<private> w_row: vec2<u32>;
var<private> x_row: vec2<u32>;

fn coming(k: u32, lane: u32) -> Coming {
    let i = k / 16u + lane % 2u;
    let q = k / 4u + lane % 8u;
    return Coming(chunk_at(w_row.x, i), chunk_at(w_row.y, i), quad_at(x_row.x, q), quad_at(x_row.y, q));
}

fn bring(what: Coming, k: u32, lane: u32) {
    let w_at = lane / 2u * PITCH + lane % 2u * 4u;
    let x_at = lane / 8u * PITCH + lane % 8u;
    put_chunk(w_at, what.w0, k / 16u + lane % 2u);
    put_chunk(w_at + 32u * PITCH, what.w1, k / 16u + lane % 2u);
    put_quad(x_at, what.x0);
    put_quad(x_at + 8u * PITCH, what.x1);
}

// What comes is on its way for three rounds, in variables of its own: compilers keep an array of them in memory, and would wait
// for what is passed from one to the other.
fn multiply(lane: u32) {
    let tall = lane / 32u * 32u;
    w_row = vec2<u32>(weight_row(lane / 2u), weight_row(lane / 2u + 32u));
    x_row = vec2<u32>(source(lane / 8u), source(lane / 8u + 8u));
    var c0 = coop_mat16x16<f32, C>();
    var c1 = coop_mat16x16<f32, C>();
    var d0 = coop_mat16x16<f32, C>();
    var d1 = coop_mat16x16<f32, C>();
    var ahead0 = coming(0u, lane);
    var ahead1 = coming(32u, lane);
    var ahead2 = coming(64u, lane);
    for (var k = 0u; k < K; k += 96u) {
        bring(ahead0, k, lane);
        workgroupBarrier(); // the tiles are whole
        ahead0 = coming(k + 96u, lane);
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
        bring(ahead1, k + 32u, lane);
        workgroupBarrier(); // the tiles are whole
        ahead1 = coming(k + 128u, lane);
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
        bring(ahead2, k + 64u, lane);
        workgroupBarrier(); // the tiles are whole
        ahead2 = coming(k + 160u, lane);
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
