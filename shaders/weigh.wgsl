// weigh: what the tokens of a span of the vocabulary count, by the next eight bits of how far they lie below the likeliest one.
//
//   sums[t,s,b] = sum of counts(v)          over the v of span s that are kept, have the digits sought, and b behind them
//
// A token counts 1 where top-k's end is sought, and its weight where top-p's is, or a token is drawn.
//
// grid      SPANS x rows workgroups
// in        logits  f32   [T, V]
//           powers  2u32  [512]
//           rules   Rule  [S]
//           parts   4u32  [T, PARTS]     of argmax
//           rows    Row   [T]
// in/out    kept    Kept  [T]            out where FIRST
// out       sums    2u32  [rows, SPANS, 256]     low and high word; none of rows that have theirs
// override  V, PARTS, SPANS, ROW, FIRST; ROW: the first of the rows; FIRST: nothing is known of them
// requires  PARTS at most 64, V / SPANS at most 65536
// twin      src/ops/weigh.rs
#import line
#import order
#import row
override V: u32;
override PARTS: u32;
override SPANS: u32;
override ROW: u32;
override FIRST: bool;
@group(0) @binding(3) var<storage, read> parts: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> rows: array<Row>;
@group(0) @binding(5) var<storage, read_write> kept: array<Kept>;
@group(0) @binding(6) var<storage, read_write> sums: array<vec2<u32>>;

var<workgroup> peaks: array<u32, 64>;
// Sums of low and of high halves: of integers, so that it does not matter who comes first.
var<workgroup> lows: array<atomic<u32>, 256>;
var<workgroup> highs: array<atomic<u32>, 256>;

fn first_stage(rule: Rule) -> u32 {
    if rule.sharp == 0.0 {
        return DONE;
    }
    return select(select(3u, WEIGHS, rule.top_p == ALL), 0u, rule.top_k > 0u);
}

fn add(bin: u32, count: u32) {
    if count > 0u {
        atomicAdd(&lows[bin], count & 0xffffu);
    }
    if count > 0xffffu {
        atomicAdd(&highs[bin], count >> 16u);
    }
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let t = ROW + group.y;
    let rule = rules[rows[t].sequence];
    atomicStore(&lows[lane], 0u);
    atomicStore(&highs[lane], 0u);
    var known: Kept;
    if FIRST {
        if lane < 64u {
            peaks[lane] = select(NEVER, order(parts[t * PARTS + min(lane, PARTS - 1u)].y), lane < PARTS);
        }
        for (var stride = 32u; stride > 0u; stride /= 2u) {
            workgroupBarrier(); // the round before is whole
            if lane < stride {
                peaks[lane] = max(peaks[lane], peaks[lane + stride]);
            }
        }
        workgroupBarrier(); // the largest is known
        let largest = bitcast<f32>(bits_of(peaks[0]));
        known = Kept(largest, first_stage(rule), FAR - 1u, ALL, 0u, 0u, vec2<u32>(max(rule.top_k, 1u) - 1u, 0u));
        if group.x == 0u && lane == 0u {
            kept[t] = known;
        }
    } else {
        known = kept[t];
    }
    workgroupBarrier(); // nothing is counted yet
    let each = (V + SPANS - 1u) / SPANS;
    let first = min(group.x * each, V);
    let last = select(min(first + each, V), first, known.stage == DONE);
    let level = known.stage % 3u;
    let shift = 24u - 8u * level;
    for (var v = first + lane; v < last; v += 4u * WG) {
        let four = v + vec4<u32>(0u, WG, 2u * WG, 3u * WG);
        let near = t * V + min(four, vec4<u32>(last - 1u));
        let bits = vec4<u32>(logits[near.x], logits[near.y], logits[near.z], logits[near.w]);
        for (var i = 0u; i < 4u; i++) {
            let steps = below(bits[i], known.largest, rule.sharp);
            let count = counts(rule, known, known.digits, shift, steps, four[i]);
            add((steps >> (shift - 8u)) & 255u, select(0u, count, four[i] < last));
        }
    }
    workgroupBarrier(); // all tokens are counted
    if known.stage != DONE {
        let low = atomicLoad(&lows[lane]);
        let high = atomicLoad(&highs[lane]);
        let sum = plus(vec2<u32>(low, 0u), vec2<u32>(high << 16u, high >> 16u));
        sums[(group.y * SPANS + group.x) * WG + lane] = sum;
    }
}
