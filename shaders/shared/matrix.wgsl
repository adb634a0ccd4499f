// matrix: 128 rows of weights times 64 rows of input, by matrix units that multiply halves and add in f32. For subgroups of
// 32 lanes, numbered as in the workgroup.
//
// A weight is exact as a half, or as exact as its format (scale and code together; bf16 below 2^-14 loses bits, above 65504
// it becomes infinity). An input is two halves: the first bits of it times 1/16, and the rest times 2^11, added up apart: 21
// bits of a number below 2^20. So the products are those of f32 but for the last bits; the units add them in their own order,
// sixteen at a time, the same for every row and column.
//
// A kernel gives: `weight_row(r)`, the row of weights in place r of the tile; `source(j)`, the row of input in place j; and
// `put(j, r, v)`, which takes the products of rows r and r + 1 (r even) with j.
#import weights
const WG = 256u;
const TALL = 128u;
const WIDE = 64u;
const PITCH = 10u; // quads of a row of 32 halves, and two that keep rows in different banks
const DOWN = 0.0625;
const LEFT = 2048.0;
@group(0) @binding(4) var<storage, read> x: array<vec4<f32>>;

var<workgroup> tile_w: array<vec4<f16>, TALL * PITCH>;
var<workgroup> tile_hi: array<vec4<f16>, WIDE * PITCH>;
var<workgroup> tile_lo: array<vec4<f16>, WIDE * PITCH>;
var<workgroup> products: array<f32, 8u * 256u>; // sixteen by sixteen of each subgroup

fn quad_at(row: u32, i: u32) -> vec4<f32> {
    if i < K / 4u {
        return x[row * (K / 4u) + i] * DOWN;
    }
    return vec4<f32>(0.0);
}

fn put_quad(at: u32, v: vec4<f32>) {
    // Cut off, not converted there and back: drivers take that for nothing.
    let hi = bitcast<vec4<f32>>(bitcast<vec4<u32>>(v) & vec4<u32>(0xffffe000u));
    tile_hi[at] = vec4<f16>(hi);
    tile_lo[at] = vec4<f16>((v - hi) * LEFT);
}


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
    var next = stored_at(w_row, K / 16u, min(lane % 2u, K / 16u - 1u));
    var next_scale = scales_at(w_row, K / 16u, min(lane % 2u, K / 16u - 1u)) >> (w_row % 4u * 8u);
    var q0 = quad_at(x0, lane % 8u);
    var q1 = quad_at(x1, lane % 8u);
    for (var k = 0u; k < K; k += 32u) {
        let w = opened(next, next_scale);
        // Past the end zeros.
        let unit = select(0.0, w.scale * WEIGHT_UNIT, k / 16u + lane % 2u < K / 16u);
        tile_w[w_at] = vec4<f16>(w.a * unit);
        tile_w[w_at + 1u] = vec4<f16>(w.b * unit);
        tile_w[w_at + 2u] = vec4<f16>(w.c * unit);
        tile_w[w_at + 3u] = vec4<f16>(w.d * unit);
        put_quad(x_at, q0);
        put_quad(x_at + 32u * PITCH, q1);
        workgroupBarrier(); // the tiles are whole
        // The next ones are on their way while these are multiplied.
        let ahead = min(k / 16u + 2u + lane % 2u, K / 16u - 1u);
        next = stored_at(w_row, K / 16u, ahead);
        next_scale = scales_at(w_row, K / 16u, ahead) >> (w_row % 4u * 8u);
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

// Of sixteen rows of weights and sixteen of input, a lane has eight products of one row of input: they lie with the rows of
// weights side by side.
var<private> held: array<f32, 8>;

fn hold(lane: u32) {
    workgroupBarrier(); // all products are there
    for (var i = 0u; i < 8u; i++) {
        held[i] = products[lane * 8u + i];
    }
    workgroupBarrier(); // all are read before the next take the place
}

// Hand over the products of the rows of weights from `tall` with the rows of input from `wide`.
fn give(lane: u32, tall: u32, wide: u32) {
    workgroupBarrier(); // all products of what was left are there
    for (var i = 0u; i < 8u; i += 2u) {
        let left = vec2<f32>(products[lane * 8u + i], products[lane * 8u + i + 1u]);
        let v = fma(left, vec2<f32>(1.0 / LEFT), vec2<f32>(held[i], held[i + 1u])) / DOWN;
        put(wide + (lane % 32u) / 2u, tall + (lane % 2u) * 8u + i, v);
    }
    workgroupBarrier(); // all are read before the next take the place
}
