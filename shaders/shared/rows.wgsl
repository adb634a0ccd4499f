// rows: chunks of a tile's rows of input in workgroup memory, brought once for all of the workgroup's rows of weights. From a
// buffer, neighbouring lanes read chunks that lie 64 bytes apart, which takes four times as long as it should.
#import lanes
#import tile
#import sixteen
var<workgroup> quads: array<vec4<f32>, TOKENS * 4u * LANES>;
var<workgroup> scales_of: array<f32, TOKENS * LANES>;

// Chunk c of LANES of row j, in the units of `in_units`.
fn hold(j: u32, c: u32, x: Sixteen) {
    let at = j * 4u * LANES + c;
    quads[at] = x.a;
    quads[at + LANES] = x.b;
    quads[at + 2u * LANES] = x.c;
    quads[at + 3u * LANES] = x.d;
    scales_of[j * LANES + c] = x.scale;
}

fn held(j: u32, c: u32) -> Sixteen {
    let at = j * 4u * LANES + c;
    return Sixteen(quads[at], quads[at + LANES], quads[at + 2u * LANES], quads[at + 3u * LANES], scales_of[j * LANES + c]);
}
