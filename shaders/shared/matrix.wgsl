// matrix: TALL rows of weights times WIDE rows of input, by matrix units that multiply halves and add in f32. For subgroups of
// 32 lanes, numbered as in the workgroup.
//
// A weight is exact as a half, or as exact as its format (scale and code together; bf16 below 2^-14 loses bits, above 65504
// it becomes infinity). An input is two halves: the nearest half to a sixteenth of it, and the rest times 2^11, added up apart: 21
// bits of a number below 2^19, to 2^-31. So the products are those of f32 but for the last bits; the units add them in their own order,
// sixteen at a time, the same for every row and column of every block.
//
// A kernel gives: `weight_row(r)`, the row of weights in place r of the tile; `source(j)`, the row of input in place j; and
// `put(j, r, v)`, which takes the products of rows r and r + 1 (r even) with j.
//
// Slot `block` says how large a block is, and multiplies it: `multiply(lane)`, by lanes of which each brings in its chunks of
// weights (`put_chunk`) and quads of input (`put_quad`), and ends with `hold` and `give` for each sixteen by sixteen products.
#import weights
#import block
const PITCH = 10u; // quads of a row of 32 halves, and two that keep rows in different banks
const DOWN = 0.0625;
const LEFT = 2048.0;
@group(0) @binding(4) var<storage, read> x: array<vec4<f32>>;

var<workgroup> tile_w: array<vec4<f16>, TALL * PITCH>;
var<workgroup> tile_hi: array<vec4<f16>, WIDE * PITCH>;
var<workgroup> tile_lo: array<vec4<f16>, WIDE * PITCH>;
var<workgroup> products: array<f32, WG * 8u>; // sixteen by sixteen of each subgroup

fn quad_at(row: u32, i: u32) -> vec4<f32> {
    if i < K / 4u {
        return x[row * (K / 4u) + i] * DOWN;
    }
    return vec4<f32>(0.0);
}

fn put_quad(at: u32, v: vec4<f32>) {
    // A half there and back is nothing to some drivers, which need not keep to f16; so its bits pass by a number that is 0, but which
    // no compiler knows.
    let unknown = min(arrayLength(&x), 1u) - 1u;
    let low = unpack2x16float(pack2x16float(v.xy) ^ unknown);
    let high = unpack2x16float(pack2x16float(v.zw) ^ unknown);
    let hi = vec4<f32>(low, high);
    tile_hi[at] = vec4<f16>(hi);
    tile_lo[at] = vec4<f16>((v - hi) * LEFT);
}

// Chunk i of a row of weights, as it is stored.
struct Chunk {
    codes: Stored,
    scale: u32,
}

fn chunk_at(row: u32, i: u32) -> Chunk {
    let near = min(i, K / 16u - 1u);
    return Chunk(stored_at(row, K / 16u, near), scales_at(row, K / 16u, near) >> (row % 4u * 8u));
}

// Zeros past the end.
fn put_chunk(at: u32, chunk: Chunk, i: u32) {
    let w = opened(chunk.codes, chunk.scale);
    let unit = select(0.0, w.scale * WEIGHT_UNIT, i < K / 16u);
    tile_w[at] = vec4<f16>(w.a * unit);
    tile_w[at + 1u] = vec4<f16>(w.b * unit);
    tile_w[at + 2u] = vec4<f16>(w.c * unit);
    tile_w[at + 3u] = vec4<f16>(w.d * unit);
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
