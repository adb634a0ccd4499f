// attention: query heads over the visible keys of their sequence, with or without a learned sink.
//
//   s_j      = q . k_j / sqrt(DH)          j <= position, and position - j < WINDOW
//   a[t,h]   = sum_j e^(s_j - m) v_j / (e^(sink_h - m) + sum_j e^(s_j - m)),    m = max(sink_h, max_j s_j)
//
// grid      H / HEADS x ROWS x segments workgroups: HEADS query heads that share keys, of one row, over one segment
// in        rows    Row   [T]
//           qkv     f32   [T, (H + 2 HK) DH]       rotated queries first
//           keys    slot  [.., PAGE, HK DH]        by the sequence's pages
//           values  slot  [.., PAGE, HK DH]
//           pages   u32   [S, PAGES]
//           sinks   slot  [H]
// out       a       slot  [T, H DH], or each segment's part of it
// override  H, HK, DH, PAGE, PAGES, WINDOW, HEADS, FIRST; WINDOW 0: every earlier key is visible; FIRST: the first row
// slots     cache, sink, result
// requires  DH a multiple of 4 and at most 256; H a multiple of HK, H / HK of HEADS, HEADS at most 4
// twin      src/ops/attention.rs
//
// Keys come in tiles of 128 counted from the first visible one, so the order of every sum follows from the position
// alone. Each lane scores one key of the tile for all heads. Then teams of DH/4 lanes take a share of the tile each, and a
// lane four of the DH outputs of every head; the teams' sums meet at the end, in order.
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
const MOST = 4u;
const SHARES = 32u; // lanes that look at one head's scores together
@group(0) @binding(0) var<storage, read> rows: array<Row>;
@group(0) @binding(1) var<storage, read> qkv: array<vec4<f32>>;

// Where the keys of the tile stand in the cache.
var<workgroup> places: array<u32, KEYS>;
var<workgroup> weights: array<f32, MOST * KEYS>;
var<workgroup> meeting: array<vec4<f32>, KEYS>;
// Of each head, over the tiles so far: the largest score, the sum of weights, and what the last tile shrank them by.
var<workgroup> largest: array<f32, MOST>;
var<workgroup> total: array<f32, MOST>;
var<workgroup> shrink: array<f32, MOST>;

fn dot4(a: vec4<f32>, b: vec4<f32>, sum: f32) -> f32 {
    return fma(a.w, b.w, fma(a.z, b.z, fma(a.y, b.y, fma(a.x, b.x, sum))));
}

@compute @workgroup_size(KEYS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let quads = DH / 4u;
    let t = FIRST + group.y;
    let row = rows[t];
    let head = group.x * HEADS;
    let query = (t * (H + 2u * HK) + head) * quads;
    let kv_head = head / (H / HK);
    let begin = first_key(row.position);
    let share = share_of(group.z, row.position + 1u - begin);
    let first = begin + share.x;
    let last = begin + share.y;
    if lane < HEADS {
        largest[lane] = -3.0e38;
        total[lane] = 0.0;
    }
    let team = lane / quads;
    let teams = KEYS / quads;
    let quad = lane % quads;
    let each = (KEYS + teams - 1u) / teams;
    let looked = lane / SHARES;
    let place = lane % SHARES;
    var sums: array<vec4<f32>, MOST>;
    for (var tile = first; tile < last; tile += KEYS) {
        let j = min(tile + lane, last - 1u);
        let mine = (cache_row(row.sequence, j) * HK + kv_head) * quads;
        var dots: array<f32, MOST>;
        for (var i = 0u; i < quads; i++) {
            let key = key4(mine + i);
            for (var h = 0u; h < HEADS; h++) {
                dots[h] = dot4(qkv[query + h * quads + i], key, dots[h]);
            }
        }
        workgroupBarrier(); // all lanes are done with the tile before
        places[lane] = mine;
        for (var h = 0u; h < HEADS; h++) {
            // Keys past the end weigh e^-inf = 0.
            weights[h * KEYS + lane] = select(-3.0e38, dots[h] / sqrt(f32(DH)), tile + lane < last);
        }
        workgroupBarrier(); // all scores of the tile are there
        var most = -3.0e38;
        if looked < HEADS {
            for (var i = place; i < KEYS; i += SHARES) {
                most = max(most, weights[looked * KEYS + i]);
            }
        }
        meeting[lane].x = most;
        workgroupBarrier(); // the largest of all shares are there
        if lane < HEADS {
            most = largest[lane];
            for (var i = 0u; i < SHARES; i++) {
                most = max(most, meeting[lane * SHARES + i].x);
            }
            shrink[lane] = exp_f32(largest[lane] - most);
            largest[lane] = most;
        }
        workgroupBarrier(); // the largest scores so far are there
        for (var h = 0u; h < HEADS; h++) {
            weights[h * KEYS + lane] = exp_f32(weights[h * KEYS + lane] - largest[h]);
        }
        workgroupBarrier(); // all weights are there
        var part = 0.0;
        if looked < HEADS {
            for (var i = place; i < KEYS; i += SHARES) {
                part += weights[looked * KEYS + i];
            }
        }
        meeting[lane].x = part;
        for (var h = 0u; h < HEADS; h++) {
            sums[h] *= shrink[h];
        }
        for (var n = 0u; n < each; n++) {
            // The last keys stand for those past the end, with weights of zero.
            let i = min(team * each + n, KEYS - 1u);
            let v = value4(places[i] + quad);
            let live = team < teams && team * each + n < KEYS;
            for (var h = 0u; h < HEADS; h++) {
                sums[h] = fma(vec4<f32>(select(0.0, weights[h * KEYS + i], live)), v, sums[h]);
            }
        }
        workgroupBarrier(); // the sums of all shares are there
        if lane < HEADS {
            part = total[lane] * shrink[lane];
            for (var i = 0u; i < SHARES; i++) {
                part += meeting[lane * SHARES + i].x;
            }
            total[lane] = part;
        }
    }
    for (var h = 0u; h < HEADS; h++) {
        workgroupBarrier(); // all lanes have read what stood in `meeting`
        meeting[lane] = sums[h];
        workgroupBarrier(); // all teams' sums are there
        if lane < quads && first < last {
            var sum = vec4<f32>(0.0);
            for (var i = 0u; i < teams; i++) {
                sum += meeting[i * quads + lane];
            }
            result(t, head + h, group.z, lane, sum, largest[h], total[h]);
        }
    }
}
