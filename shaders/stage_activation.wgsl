// stage_activation: quantise rows to NVFP4 for a product with NVFP4 weights.
//
//   s      = act_scale, G = 1 / s          of the checkpoint, of the row, or of all rows
//   c_b    = e4m3(G (max_b |x| (1/6)))     for each block of 16; at most 448: what calibration did not see is clipped
//   q      = e2m1(x (G / c_b))             at most 6; 0 where c_b is 0
//
// grid      R workgroups, one per row
// in        x         f32   [R / SHARE, K]     SHARE rows of the result read one row
// out       y         u32   [R, ceil(K/64) + K/8]     E4M3 scales, four a word, padded with zeros; then E2M1 codes
//           y_scales  f32   [R]                s: what the product is to be multiplied by; NaN for a row with NaN or inf
//           report    f32   [R, 2]             max |x|, and the number of blocks whose scale was clipped
// override  K, SHARE
// slots     act_scale
// requires  K a multiple of 16
// twin      src/ops/stage_activation.rs
//
// Every value is exact: the quotients by `divide`, the products as IEEE rounds them, no sums.
#import act_scale
#import divide
#import e4m3
override K: u32;
override SHARE: u32;
const WG = 64u;
@group(0) @binding(1) var<storage, read> x: array<u32>;
@group(0) @binding(2) var<storage, read_write> y: array<u32>;
@group(0) @binding(3) var<storage, read_write> y_scales: array<f32>;
@group(0) @binding(6) var<storage, read_write> report: array<f32>;

var<workgroup> partial: array<u32, WG>;

// The nearest E4M3 code of v >= 0, ties to even, at most 448.
fn e4m3_encode(v: f32) -> u32 {
    let a = min(v, 448.0);
    if a < 0.015625 {
        return u32(round(a * 512.0));
    }
    let bits = bitcast<u32>(a);
    return ((bits + 0x7ffffu + ((bits >> 20u) & 1u)) >> 20u) - 960u;
}

// The nearest E2M1 code of a >= 0, ties to even, at most 6.
fn e2m1_encode(a: f32) -> u32 {
    let low = u32(a > 0.25) + u32(a >= 0.75) + u32(a > 1.25) + u32(a >= 1.75);
    return low + u32(a > 2.5) + u32(a >= 3.5) + u32(a > 5.0);
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let source = group.x / SHARE * K;
    var most = 0u; // magnitudes compare as their bits do
    for (var k = lane; k < K; k += WG) {
        most = max(most, x[source + k] & 0x7fffffffu);
    }
    partial[lane] = most;
    workgroupBarrier(); // all lanes have written
    most = 0u;
    for (var i = 0u; i < WG; i++) {
        most = max(most, partial[i]);
    }
    workgroupBarrier(); // all lanes have read before the counts take the place

    let scale = act_scale(group.x, most);
    // A scale so small that its inverse is no number gives zeros; so does a row that is no number, and its scale tells.
    let usable = most < 0x7f800000u && (bitcast<u32>(scale) & 0x7fffffffu) < 0x7f800000u;
    var inverse = 0.0;
    if usable && scale >= 1.17549435e-38 {
        inverse = divide(1.0, scale);
    }
    let scale_words = (K + 63u) / 64u;
    let to = group.x * (scale_words + K / 8u);
    var clipped = 0u;
    for (var word = lane; word < scale_words; word += WG) {
        var scales = 0u;
        for (var b = 0u; b < 4u && word * 64u + b * 16u < K; b++) {
            let at = source + word * 64u + b * 16u;
            var block_most = 0u;
            for (var i = 0u; i < 16u; i++) {
                block_most = max(block_most, x[at + i] & 0x7fffffffu);
            }
            let wanted = inverse * (bitcast<f32>(block_most) * (1.0 / 6.0));
            clipped += u32(usable && wanted > 464.0); // what is below rounds to 448 as to any number
            var code = 0u;
            if inverse > 0.0 {
                code = e4m3_encode(wanted);
            }
            var factor = 0.0;
            if code > 0u {
                factor = divide(inverse, e4m3(code));
            }
            scales |= code << (b * 8u);
            for (var part = 0u; part < 2u; part++) {
                var codes = 0u;
                for (var i = 0u; i < 8u; i++) {
                    let bits = x[at + part * 8u + i];
                    let sign = (bits >> 28u) & 8u;
                    codes |= (e2m1_encode(abs(bitcast<f32>(bits)) * factor) | sign) << (i * 4u);
                }
                y[to + scale_words + word * 8u + b * 2u + part] = codes;
            }
        }
        y[to + word] = scales;
    }
    partial[lane] = clipped;
    workgroupBarrier(); // all counts are there
    if lane == 0u {
        for (var i = 1u; i < WG; i++) {
            clipped += partial[i];
        }
        y_scales[group.x] = select(bitcast<f32>(nan_bits()), scale, usable);
        report[group.x * 2u] = bitcast<f32>(most);
        report[group.x * 2u + 1u] = f32(clipped);
    }
}

// NaN's bits. A function, so that the compiler does not refuse a constant that is no number.
fn nan_bits() -> u32 {
    return 0x7fc00000u;
}
