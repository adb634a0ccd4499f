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
// alone. Each lane scores one key of the tile, for four heads at once: the components of a vec4 (those past HEADS are
// zeros, and nobody reads what comes of them). Then teams of DH/4 lanes take keys by turns, and a lane four of the DH outputs of
// every head; the teams' sums meet at the end, in order. Whatever is found by looking at all keys is found for one head by
// each lane, keys apart by 32.
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
// Quads of a key, or keys, that are sent for at once.
const BATCH = 8u;
@group(0) @binding(0) var<storage, read> rows: array<Row>;
@group(0) @binding(1) var<storage, read> qkv: array<f32>;

// Each a vec4 over the heads: element d of the queries in the first 256, then the scores of the tile's keys. In the end the
// teams' sums, of one head after the other.
var<workgroup> room: array<vec4<f32>, 4u * KEYS>;
const SCORES = 256u;
// What several lanes write for one key or share, head by head: the weights of the tile's keys; what 32 shares found.
var<workgroup> weights: array<f32, KEYS * 4u>;
var<workgroup> found: array<f32, 32u * 4u>;
// Where the keys of the tile stand in the cache.
var<workgroup> places: array<u32, KEYS>;

// By head: the largest score so far, the sum of weights so far, and by how much the last tile shrank it.
var<workgroup> top: array<f32, 4>;
var<workgroup> total: array<f32, 4>;
var<workgroup> shrink: array<f32, 4>;

@compute @workgroup_size(KEYS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let quads = DH / 4u;
    let t = FIRST + group.y;
    let row = rows[t];
    let head = PART_FIRST * (H / HK) + group.x * HEADS;
    let kv_head = head / (H / HK);
    let begin = first_key(row.position);
    let share = share_of(group.z, row.position + 1u - begin);
    let first = begin + share.x;
    let last = begin + share.y;
    // Bounds that the compiler does not know keep the code short: it runs once, and has to be fetched first.
    let few = 4u + row.pad;
    let elements = (quads + BATCH - 1u) / BATCH * BATCH * few; // zeros behind the last, to whole batches
    for (var d = lane; d < elements; d += KEYS) {
        var q = vec4<f32>(0.0);
        for (var h = 0u; h < 4u; h++) {
            let found = qkv[(t * (H + 2u * HK) + head + min(h, HEADS - 1u)) * DH + min(d, DH - 1u)];
            q[h] = select(0.0, found, h < HEADS && d < DH);
        }
        room[d] = q;
    }
    let team = lane / quads;
    let teams = KEYS / quads;
    let quad = lane % quads;
    let h = lane % 4u;
    let s = lane / 4u;
    if lane < 4u {
        top[lane] = -3.0e38;
        total[lane] = 0.0;
    }
    var sum0 = vec4<f32>(0.0);
    var sum1 = vec4<f32>(0.0);
    var sum2 = vec4<f32>(0.0);
    var sum3 = vec4<f32>(0.0);
    for (var tile = first; tile < last; tile += KEYS) {
        workgroupBarrier(); // the queries are there, or all lanes are done with the tile before
        let place = (cache_row(row.sequence, min(tile + lane, last - 1u)) * PART + kv_head - PART_FIRST) * quads;
        var dots = vec4<f32>(0.0);
        for (var i = 0u; i < quads * few / 4u; i += BATCH) {
            var ks: array<vec4<f32>, BATCH>;
            for (var m = 0u; m < BATCH; m++) {
                ks[m] = key4(place + min(i + m, quads - 1u));
            }
            for (var m = 0u; m < BATCH; m++) {
                let key = ks[m];
                let d = (i + m) * 4u;
                dots = fma(room[d], vec4<f32>(key.x), dots);
                dots = fma(room[d + 1u], vec4<f32>(key.y), dots);
                dots = fma(room[d + 2u], vec4<f32>(key.z), dots);
                dots = fma(room[d + 3u], vec4<f32>(key.w), dots);
            }
        }
        // Keys past the end weigh e^-inf = 0.
        places[lane] = place;
        room[SCORES + lane] = select(vec4<f32>(-3.0e38), dots / sqrt(f32(DH)), tile + lane < last);
        workgroupBarrier(); // all scores of the tile are there
        var most = -3.0e38;
        for (var i = s; i < KEYS; i += 8u * few) {
            most = max(most, room[SCORES + i][h]);
        }
        found[s * 4u + h] = most;
        workgroupBarrier(); // the largest of all shares are there
        if lane < 4u {
            let old = top[lane];
            most = old;
            for (var i = 0u; i < 8u * few; i += 8u) {
                for (var m = 0u; m < 8u; m++) {
                    most = max(most, found[(i + m) * 4u + lane]);
                }
            }
            top[lane] = most;
            shrink[lane] = exp_f32(old - most);
        }
        workgroupBarrier(); // the largest scores so far are there
        most = top[h];
        var part = 0.0;
        for (var i = s; i < KEYS; i += 8u * few) {
            let w = exp_f32(room[SCORES + i][h] - most);
            weights[i * 4u + h] = w;
            part += w;
        }
        found[s * 4u + h] = part;
        workgroupBarrier(); // all weights and the sums of all shares are there
        if lane < 4u {
            part = total[lane] * shrink[lane];
            for (var i = 0u; i < 8u * few; i += 8u) {
                for (var m = 0u; m < 8u; m++) {
                    part += found[(i + m) * 4u + lane];
                }
            }
            total[lane] = part;
        }
        sum0 *= shrink[0];
        sum1 *= shrink[1];
        sum2 *= shrink[2];
        sum3 *= shrink[3];
        // Those that weigh nothing are left out.
        for (var n = team; n < min(KEYS, last - tile) * few / 4u; n += BATCH * teams) {
            var vs: array<vec4<f32>, BATCH>;
            for (var m = 0u; m < BATCH; m++) {
                vs[m] = value4(places[min(n + m * teams, KEYS - 1u)] + quad);
            }
            for (var m = 0u; m < BATCH; m++) {
                let i = n + m * teams;
                let at = min(i, KEYS - 1u) * 4u;
                let heads = vec4<f32>(weights[at], weights[at + 1u], weights[at + 2u], weights[at + 3u]);
                let w = select(vec4<f32>(0.0), heads, team < teams && i < KEYS);
                sum0 = fma(vec4<f32>(w.x), vs[m], sum0);
                sum1 = fma(vec4<f32>(w.y), vs[m], sum1);
                sum2 = fma(vec4<f32>(w.z), vs[m], sum2);
                sum3 = fma(vec4<f32>(w.w), vs[m], sum3);
            }
        }
    }
    // Since the last barrier nobody reads queries or scores.
    room[lane] = sum0;
    room[KEYS + lane] = sum1;
    room[2u * KEYS + lane] = sum2;
    room[3u * KEYS + lane] = sum3;
    workgroupBarrier(); // all teams' sums are there
    for (var n = lane; n < HEADS * quads && first < last; n += KEYS) {
        let h = n / quads;
        var sum = vec4<f32>(0.0);
        for (var i = 0u; i < teams * few / 4u; i++) {
            sum += room[h * KEYS + i * quads + n % quads];
        }
        result(t, head + h, group.z, n % quads, sum, top[h], total[h]);
    }
}
