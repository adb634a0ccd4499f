// attention: query heads over the visible keys of their sequence, with or without a learned sink.
//
//   s_j      = q . k_j / sqrt(DH)          j <= position, and position - j < WINDOW
//   a[t,h]   = sum_j e^(s_j - m) v_j / (e^(sink_h - m) + sum_j e^(s_j - m)),    m = max(sink_h, max_j s_j)
//
// grid      PART (H / HK) / HEADS x ROWS x segments workgroups: HEADS query heads that share keys, of one row, over one segment
// in        rows    Row   [T]
//           qkv     f32   [T, (H + 2 HK) DH]       rotated queries first
//           keys    slot  [.., PAGE, PART DH]      by the sequence's pages: the heads of this part
//           values  slot  [.., PAGE, PART DH]
//           pages   u32   [S, PAGES]
//           sinks   slot  [H]
// out       a       slot  [T, H DH], or each segment's part of it: of the queries of these heads
// override  H, HK, DH, PAGE, PAGES, PART, PART_FIRST, WINDOW, HEADS, FIRST; WINDOW 0: every earlier key is visible; FIRST: the
//           first row
// slots     cache, sink, result
// requires  DH a multiple of 4 and at most 256; H a multiple of HK, HK of PART, H / HK of HEADS, HEADS at most 4
// twin      src/ops/attention.rs
//
// Keys come in tiles of 128 counted from the first visible one, so the order of every sum follows from the position
// alone. Two lanes share a key of the tile, quads of it by turns, for four heads at once: the components of a vec4 (those past
// HEADS are zeros, and nobody reads what comes of them). Then a lane has the weights of two keys for one head. In the end each half
// of the lanes has two heads: teams of DH/4 lanes take keys by turns, and a lane four of the DH outputs of both; the teams' sums
// meet at the end, in order.
//
// It is short on purpose: between other kernels its instructions have to be fetched, which takes as long as running them.
#import row
#import pages
#import cache
#import exp
#import segments
#import result
override H: u32;
override HK: u32;
override DH: u32;
override WINDOW: u32;
override HEADS: u32;
override FIRST: u32;
const WG = 256u;
const HALF = WG / 2u;
// Lanes that share a key, and lanes that share a head when weights are made.
const PAIR = 2u;
const SHARES = WG / 4u;
// Quads of a key that are sent for at once, and values.
const BATCH = 4u;
const VALUES = 8u;
@group(0) @binding(0) var<storage, read> rows: array<Row>;
@group(0) @binding(1) var<storage, read> qkv: array<f32>;

// Each a vec4 over the heads: element d of the queries in the first 256, then what each lane of a pair has of the tile's
// scores, and in their place the largest scores of eight shares each. In the end the teams' sums, of one head after the other.
var<workgroup> room: array<vec4<f32>, 4u * HALF>;
const SCORES = 256u;
// What several lanes write for one key or share, head by head: the weights of the tile's keys, in the end the sums of eight shares
// each, and behind them the largest scores.
var<workgroup> weights: array<f32, KEYS * 4u>;
const TOPS = 32u;
// What the shares found, head by head; between, where the keys of the tile stand in the cache, and behind them by how much the
// tile shrank what was there. All in all 11 KiB, with which four workgroups fit where a GPU has 48 for them.
var<workgroup> found: array<u32, SHARES * 4u>;
const SHRINK = KEYS;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let quads = DH / 4u;
    let t = FIRST + group.y;
    let row = rows[t];
    let head = PART_FIRST * (H / HK) + group.x * HEADS;
    let kv_head = head / (H / HK);
    // Queries are sent for before it is known where the keys are.
    var q = vec4<f32>(0.0);
    for (var h = 0u; h < 4u; h++) {
        let found = qkv[(t * (H + 2u * HK) + head + min(h, HEADS - 1u)) * DH + min(lane, DH - 1u)];
        q[h] = select(0.0, found, h < HEADS && lane < DH);
    }
    let begin = first_key(row.position);
    let share = share_of(group.z, row.position + 1u - begin);
    let first = begin + share.x;
    let last = begin + share.y;
    if first >= last {
        return; // the whole workgroup: the row has fewer segments
    }
    // Bounds that the compiler does not know keep the code short; so does what it knows of full batches.
    let few = 4u + row.pad;
    let batches = (quads + BATCH * PAIR - 1u) / (BATCH * PAIR);
    let even_quads = quads % (BATCH * PAIR) == 0u;
    let even_teams = HALF % quads == 0u && KEYS % (VALUES * (HALF / quads)) == 0u;
    if lane < batches * BATCH * PAIR * 4u { // zeros behind the last, to whole batches
        room[lane] = q;
    }
    // Scores: which lane of which pair. Weights: one head of which share. Sums: of which half, its team, and the quad.
    let part = lane % PAIR;
    let pair = lane / PAIR;
    let h = lane % 4u;
    let s = lane / 4u;
    let half = lane / HALF;
    let team = lane % HALF / quads;
    let teams = HALF / quads;
    let quad = lane % HALF % quads;
    var most = -3.0e38; // the largest score so far, of head h
    var total = 0.0; // the share's weights so far
    var sum0 = vec4<f32>(0.0);
    var sum1 = vec4<f32>(0.0);
    for (var tile = first; tile < last; tile += KEYS) {
        let place = (cache_row(row.sequence, min(tile + pair, last - 1u)) * PART + kv_head - PART_FIRST) * quads;
        var dots = vec4<f32>(0.0);
        workgroupBarrier(); // the queries are there, or all lanes are done with the tile before
        for (var i = part; i < quads * few / 4u; i += BATCH * PAIR) {
            var ks: array<vec4<f32>, BATCH>;
            for (var m = 0u; m < BATCH; m++) {
                let quad = i + m * PAIR;
                ks[m] = key4(place + select(min(quad, quads - 1u), quad, even_quads));
            }
            for (var m = 0u; m < BATCH; m++) {
                let key = ks[m];
                let d = (i + m * PAIR) * 4u;
                dots = fma(room[d], vec4<f32>(key.x), dots);
                dots = fma(room[d + 1u], vec4<f32>(key.y), dots);
                dots = fma(room[d + 2u], vec4<f32>(key.z), dots);
                dots = fma(room[d + 3u], vec4<f32>(key.w), dots);
            }
        }
        room[SCORES + part * KEYS + pair] = dots;
        workgroupBarrier(); // all scores of the tile are there
        var scores: array<f32, KEYS / SHARES>;
        let before = most;
        for (var n = 0u; n < KEYS / SHARES; n++) {
            let i = s + n * SHARES;
            let score = (room[SCORES + i][h] + room[SCORES + KEYS + i][h]) * (1.0 / sqrt(f32(DH)));
            scores[n] = select(-3.0e38, score, tile + i < last); // keys past the end weigh e^-inf = 0
            most = max(most, scores[n]);
        }
        found[lane] = bitcast<u32>(most);
        workgroupBarrier(); // the largest of all shares are there
        if lane < 8u { // nobody reads scores any more
            var eight = vec4<f32>(-3.0e38);
            for (var m = 0u; m < 8u; m++) {
                let at = (lane * 8u + m) * 4u;
                eight = max(eight, bitcast<vec4<f32>>(vec4<u32>(found[at], found[at + 1u], found[at + 2u], found[at + 3u])));
            }
            room[SCORES + lane] = eight;
        }
        workgroupBarrier(); // the largest of eight shares each are there
        for (var m = 0u; m < 8u; m++) {
            most = max(most, room[SCORES + m][h]);
        }
        if part == 0u {
            found[pair] = place;
        }
        if tile > first {
            let less = exp_f32(before - most);
            total *= less;
            if lane < 4u {
                found[SHRINK + lane] = bitcast<u32>(less);
            }
        }
        for (var n = 0u; n < KEYS / SHARES; n++) {
            let w = exp_f32(scores[n] - most);
            weights[(s + n * SHARES) * 4u + h] = w;
            total += w;
        }
        workgroupBarrier(); // all weights are there
        if tile > first {
            sum0 *= bitcast<f32>(found[SHRINK + half * 2u]);
            sum1 *= bitcast<f32>(found[SHRINK + half * 2u + 1u]);
        }
        // Keys that weigh nothing are left out, and heads that are not there.
        let weighty = select(0u, min(KEYS, last - tile), half * 2u < HEADS);
        for (var n = team; n < weighty * few / 4u; n += VALUES * teams) {
            var vs: array<vec4<f32>, VALUES>;
            for (var m = 0u; m < VALUES; m++) {
                let i = n + m * teams;
                vs[m] = value4(found[select(min(i, KEYS - 1u), i, even_teams)] + quad);
            }
            for (var m = 0u; m < VALUES; m++) {
                let i = n + m * teams;
                let at = select(min(i, KEYS - 1u), i, even_teams) * 4u + half * 2u;
                let there = even_teams || (team < teams && i < KEYS);
                let w = select(vec2<f32>(0.0), vec2<f32>(weights[at], weights[at + 1u]), there);
                sum0 = fma(vec4<f32>(w.x), vs[m], sum0);
                sum1 = fma(vec4<f32>(w.y), vs[m], sum1);
            }
        }
    }
    workgroupBarrier(); // nobody reads places or weights any more
    room[half * WG + lane % HALF] = sum0;
    room[half * WG + HALF + lane % HALF] = sum1;
    found[lane] = bitcast<u32>(total);
    if lane < 4u {
        weights[TOPS + lane] = most;
    }
    workgroupBarrier(); // all teams' sums are there
    if s < 8u {
        var eight = 0.0;
        for (var m = 0u; m < 8u; m++) {
            eight += bitcast<f32>(found[(s * 8u + m) * 4u + h]);
        }
        weights[lane] = eight;
    }
    workgroupBarrier(); // the sums of eight shares each are there
    if lane < HEADS * quads {
        let h = lane / quads;
        var all = 0.0;
        for (var m = 0u; m < 8u; m++) {
            all += weights[m * 4u + h];
        }
        var sum = vec4<f32>(0.0);
        for (var i = 0u; i < teams * few / 4u; i++) {
            sum += room[h * HALF + i * quads + lane % quads];
        }
        result(t, head + h, group.z, lane % quads, sum, weights[TOPS + h], all);
    }
}
