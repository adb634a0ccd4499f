// Fills slot `e2m1`: codes 0..7 are 0 .5 1 1.5 2 3 4 6, 8..15 their negatives. A code `s ee m` put into bits 15 and 11..9
// of a half is its value times 2^-14, of which 0.5 is a subnormal: for adapters that keep subnormal halves.
const E2M1_UNIT = 16384.0;

struct E2m1x8 {
    a: vec4<f32>,
    b: vec4<f32>,
}

// The eight codes of a word, lowest nibble first, each times 1 / E2M1_UNIT. Nibbles j and j + 4 are one half each.
fn e2m1x8(w: u32) -> E2m1x8 {
    let v0 = unpack2x16float(((w << 9u) & 0x0e000e00u) | ((w << 12u) & 0x80008000u));
    let v1 = unpack2x16float(((w << 5u) & 0x0e000e00u) | ((w << 8u) & 0x80008000u));
    let v2 = unpack2x16float(((w << 1u) & 0x0e000e00u) | ((w << 4u) & 0x80008000u));
    let v3 = unpack2x16float(((w >> 3u) & 0x0e000e00u) | (w & 0x80008000u));
    return E2m1x8(vec4<f32>(v0.x, v1.x, v2.x, v3.x), vec4<f32>(v0.y, v1.y, v2.y, v3.y));
}

// The same of a word of weights, laid out (src/ops/layout.rs) so that few masks and shifts take it apart: nibbles j and j + 4
// stand in the halves of the word alike. 0: s in bit 15, ee m in 11..9. 1: 8 bits lower. 2: s in 8, ee m in 14..12. 3: s in 0,
// ee m in 6..4.
fn e2m1x8_laid_out(w: u32) -> E2m1x8 {
    let v0 = unpack2x16float(w & 0x8e008e00u);
    let v1 = unpack2x16float((w << 8u) & 0x8e008e00u);
    let v2 = unpack2x16float(((w >> 3u) & 0x0e000e00u) | ((w << 7u) & 0x80008000u));
    let v3 = unpack2x16float(((w << 5u) & 0x0e000e00u) | ((w << 15u) & 0x80008000u));
    return E2m1x8(vec4<f32>(v0.x, v1.x, v2.x, v3.x), vec4<f32>(v0.y, v1.y, v2.y, v3.y));
}
