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
// Of equal logits the lowest id. A part of minus infinities has its first id, minus infinity and the sum 0.
#import exp
#import order
override V: u32;
override PARTS: u32;
const WG = 256u;
@group(0) @binding(0) var<storage, read> logits: array<u32>;
@group(0) @binding(1) var<storage, read_write> parts: array<vec4<u32>>;

var<workgroup> best: array<u32, WG>; // by `order`
var<workgroup> sums: array<f32, WG>;
var<workgroup> ids: array<u32, WG>;
var<workgroup> bad: array<u32, WG>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let each = (V + PARTS - 1u) / PARTS;
    let first = min(group.x * each, V);
    let last = min(first + each, V);
    let row = group.y * V;
    var most = NEVER;
    var id = first;
    var seen = 0u;
    for (var v = first + lane; v < last; v += 4u * WG) {
        let four = v + vec4<u32>(0u, WG, 2u * WG, 3u * WG);
        let near = row + min(four, vec4<u32>(last - 1u));
        let bits = vec4<u32>(logits[near.x], logits[near.y], logits[near.z], logits[near.w]);
        for (var i = 0u; i < 4u; i++) {
            if four[i] >= last {
                break;
            }
            if bits[i] == 0x7f800000u || (bits[i] & 0x7fffffffu) > 0x7f800000u {
                seen = 1u;
            } else if order(bits[i]) > most {
                most = order(bits[i]);
                id = four[i];
            }
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
    let top = bitcast<f32>(bits_of(best[0]));
    let zero = max(top, -3.4028234e38); // a part of minus infinities adds nothing
    var sum = 0.0;
    for (var v = first + lane; v < last; v += 4u * WG) {
        let four = v + vec4<u32>(0u, WG, 2u * WG, 3u * WG);
        let near = row + min(four, vec4<u32>(last - 1u));
        let some = bitcast<vec4<f32>>(vec4<u32>(logits[near.x], logits[near.y], logits[near.z], logits[near.w]));
        for (var i = 0u; i < 4u; i++) {
            if four[i] < last {
                sum += exp_f32(some[i] - zero);
            }
        }
    }
    for (var stride = WG / 2u; stride > 0u; stride /= 2u) {
        sums[lane] = sum;
        workgroupBarrier(); // all lanes have written
        if lane < stride {
            sum += sums[lane + stride];
        }
        workgroupBarrier(); // all lanes have read before the next round overwrites
    }
    if lane == 0u {
        parts[group.y * PARTS + group.x] = vec4<u32>(ids[0], bitcast<u32>(top), bitcast<u32>(sum), bad[0]);
    }
}
