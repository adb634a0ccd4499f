// argmax: the likeliest token of a part of the vocabulary, and what its logits add to the softmax's sum.
//
//   parts[t,p] = id, logit m, sum_v e^(logit_v - m), NaN or +inf seen          over the v of part p
//
// grid      PARTS x T workgroups
// in        logits  f32   [T, V]
// out       parts   4u32  [T, PARTS]     f32 bits in the second and third
// override  V, PARTS
// twin      src/ops/argmax.rs
//
// Of equal logits the lowest id. A part of minus infinities has the sum 0.
#import exp
override V: u32;
override PARTS: u32;
const WG = 256u;
@group(0) @binding(0) var<storage, read> logits: array<f32>;
@group(0) @binding(1) var<storage, read_write> parts: array<vec4<u32>>;

var<workgroup> best: array<f32, WG>;
var<workgroup> ids: array<u32, WG>;
var<workgroup> bad: array<u32, WG>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let each = (V + PARTS - 1u) / PARTS;
    let first = min(group.x * each, V);
    let last = min(first + each, V);
    let row = group.y * V;
    var most = -3.4028234e38;
    var id = first + lane;
    var seen = 0u;
    for (var v = first + lane; v < last; v += WG) {
        let bits = bitcast<u32>(logits[row + v]);
        if bits == 0x7f800000u || (bits & 0x7fffffffu) > 0x7f800000u {
            seen = 1u;
        } else if bitcast<f32>(bits) > most {
            most = bitcast<f32>(bits);
            id = v;
        }
    }
    best[lane] = most;
    ids[lane] = id;
    bad[lane] = seen;
    for (var stride = WG / 2u; stride > 0u; stride /= 2u) {
        workgroupBarrier(); // the round before is whole
        if lane < stride {
            let other = lane + stride;
            if best[other] > best[lane] || (best[other] == best[lane] && ids[other] < ids[lane]) {
                best[lane] = best[other];
                ids[lane] = ids[other];
            }
            bad[lane] |= bad[other];
        }
    }
    workgroupBarrier(); // the best is known
    let top = best[0];
    let winner = ids[0];
    var sum = 0.0;
    for (var v = first + lane; v < last; v += WG) {
        sum += exp_f32(logits[row + v] - top);
    }
    workgroupBarrier(); // all lanes have read the best before sums take the place
    for (var stride = WG / 2u; stride > 0u; stride /= 2u) {
        best[lane] = sum;
        workgroupBarrier(); // all lanes have written
        if lane < stride {
            sum += best[lane + stride];
        }
        workgroupBarrier(); // all lanes have read before the next round overwrites
    }
    if lane == 0u {
        parts[group.y * PARTS + group.x] = vec4<u32>(winner, bitcast<u32>(top), bitcast<u32>(sum), bad[0]);
    }
}
