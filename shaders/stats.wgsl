// stats: what there is to say about each row of a stage in eight words.
//
//   s[t] = sum, sum of squares, least, largest (of finite values), NaN count, infinity count, hash, hash
//
// grid      T workgroups, one per row
// in        x  u32   [T, W]     f32 bits, or indices if INDICES
// out       s  u32   [T, 8]     f32 bits in the first four
// override  W, INDICES
// twin      src/ops/stats.rs
//
// The hash adds a mix of every word with its place, so that lanes may come in any order and still give the same bits.
override W: u32;
override INDICES: u32;
const WG = 64u;
@group(0) @binding(0) var<storage, read> x: array<u32>;
@group(0) @binding(1) var<storage, read_write> s: array<u32>;

// Sum, sum of squares, least, largest; and the four counters.
var<workgroup> numbers: array<vec4<f32>, WG>;
var<workgroup> counters: array<vec4<u32>, WG>;

// MurmurHash3's finaliser, https://github.com/aappleby/smhasher
fn mix(v: u32) -> u32 {
    var h = v;
    h = (h ^ (h >> 16u)) * 0x85ebca6bu;
    h = (h ^ (h >> 13u)) * 0xc2b2ae35u;
    return h ^ (h >> 16u);
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.x * W;
    var number = vec4<f32>(0.0, 0.0, 3.4028234e38, -3.4028234e38);
    var counter = vec4<u32>(0u);
    for (var i = lane; i < W; i += WG) {
        let word = x[row + i];
        let place = (row + i) * 0x9e3779b9u;
        counter.z += mix(word ^ place);
        counter.w += mix(word + place + 0x7f4a7c15u);
        var v = bitcast<f32>(word);
        var magnitude = word & 0x7fffffffu;
        if INDICES != 0u {
            v = f32(word);
            magnitude = 0u;
        }
        if magnitude > 0x7f800000u {
            counter.x += 1u;
        } else if magnitude == 0x7f800000u {
            counter.y += 1u;
        } else {
            number.x += v;
            number.y = fma(v, v, number.y);
            number.z = min(number.z, v);
            number.w = max(number.w, v);
        }
    }
    numbers[lane] = number;
    counters[lane] = counter;
    workgroupBarrier(); // all lanes have written
    if lane == 0u {
        for (var i = 1u; i < WG; i++) {
            let n = numbers[i];
            number = vec4<f32>(number.xy + n.xy, min(number.z, n.z), max(number.w, n.w));
            counter += counters[i];
        }
        let at = group.x * 8u;
        for (var i = 0u; i < 4u; i++) {
            s[at + i] = bitcast<u32>(number[i]);
            s[at + 4u + i] = counter[i];
        }
    }
}
