// passes: the lane where a running sum passes a target; and the token, among those of a span that have certain digits.
#import line
var<workgroup> runs: array<vec2<u32>, WG>;
var<workgroup> place: u32; // the lane; WG: none
var<workgroup> left: vec2<u32>; // of the target, before that lane
var<workgroup> token: u32;

// The sum over the lanes up to this one.
fn running(lane: u32, own: vec2<u32>) -> vec2<u32> {
    var sum = own;
    workgroupBarrier(); // what was found before is read
    runs[lane] = sum;
    for (var stride = 1u; stride < WG; stride *= 2u) {
        workgroupBarrier(); // all lanes have written
        let before = runs[max(lane, stride) - stride];
        workgroupBarrier(); // all lanes have read
        if lane >= stride {
            sum = plus(sum, before);
        }
        runs[lane] = sum;
    }
    if lane == 0u {
        place = WG;
    }
    workgroupBarrier(); // the sums are whole
    return sum;
}

// The sum over the spans of a row, by bin.
fn over_spans(bin: u32, row: u32) -> vec2<u32> {
    var sum = vec2<u32>(0u);
    let at = row * SPANS * WG + bin;
    for (var span = 0u; span < SPANS; span += 4u) {
        let four = at + min(span + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(SPANS - 1u)) * WG;
        let some = array<vec2<u32>, 4>(sums[four.x], sums[four.y], sums[four.z], sums[four.w]);
        sum = plus(sum, some[0]);
        sum = plus(sum, select(vec2<u32>(0u), some[1], span + 1u < SPANS));
        sum = plus(sum, select(vec2<u32>(0u), some[2], span + 2u < SPANS));
        sum = plus(sum, select(vec2<u32>(0u), some[3], span + 3u < SPANS));
    }
    return sum;
}

// Afterwards `place` and `left` are known.
fn find(lane: u32, own: vec2<u32>, sum: vec2<u32>, wanted: vec2<u32>) {
    let before = minus(sum, own);
    if less(wanted, sum) && !less(wanted, before) {
        place = lane;
        left = minus(wanted, before);
    }
    workgroupBarrier(); // the place is known
}

// Where the sums of spans pass `left` at `digit`, and there the tokens: afterwards `token` is the one, if `place` is not WG.
fn find_token(lane: u32, row: u32, rule: Rule, kept: Kept, digits: u32, shift: u32, t: u32) {
    var own = vec2<u32>(0u);
    if lane < SPANS {
        own = sums[(row * SPANS + lane) * WG + digits % WG];
    }
    let wanted = left;
    let sum = running(lane, own);
    find(lane, own, sum, wanted);
    // A lane has neighbouring tokens, so that lanes are in the order of ids.
    let each = (V + SPANS - 1u) / SPANS;
    let some = (each + WG - 1u) / WG;
    let end = min(min(place * each, V) + each, V);
    let first = min(min(place * each, V) + lane * some, end);
    let last = select(min(first + some, end), first, place >= SPANS);
    own = vec2<u32>(0u);
    for (var v = first; v < last; v += 4u) {
        let four = vec4<u32>(v, v + 1u, v + 2u, v + 3u);
        let near = t * V + min(four, vec4<u32>(last - 1u));
        let bits = vec4<u32>(logits[near.x], logits[near.y], logits[near.z], logits[near.w]);
        for (var i = 0u; i < 4u; i++) {
            let count = counts(rule, kept, digits, shift, below(bits[i], kept.largest, rule.sharp), four[i]);
            own = plus(own, vec2<u32>(select(0u, count, four[i] < last), 0u));
        }
    }
    let rest = left;
    let tokens = running(lane, own);
    find(lane, own, tokens, rest);
    if place == lane {
        var ahead = left;
        token = first;
        for (var v = first; v < last; v++) {
            let count = vec2<u32>(counts(rule, kept, digits, shift, below(logits[t * V + v], kept.largest, rule.sharp), v), 0u);
            if less(ahead, count) {
                token = v;
                break;
            }
            ahead = minus(ahead, count);
        }
    }
    workgroupBarrier(); // the token is known
}
