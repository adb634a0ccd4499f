// attention: each query head over the visible keys of its sequence, with or without a learned sink.
//
//   s_j      = q . k_j / sqrt(DH)          j <= position, and position - j < WINDOW
//   a[t,h]   = sum_j e^(s_j - m) v_j / (e^(sink_h - m) + sum_j e^(s_j - m)),    m = max(sink_h, max_j s_j)
//
// grid      H x T workgroups, one per query head and row
// in        rows    Row   [T]
//           qkv     f32   [T, (H + 2 HK) DH]       rotated queries first
//           keys    slot  [S, CAPACITY, HK DH]     row `position mod CAPACITY`
//           values  slot  [S, CAPACITY, HK DH]
//           sinks   slot  [H]
// out       a       f32   [T, H DH]
// override  H, HK, DH, CAPACITY, WINDOW            WINDOW 0: every earlier key is visible
// slots     cache, sink
// requires  DH a multiple of 4 and at most 256; H a multiple of HK
// twin      src/ops/attention.rs
//
// Keys come in tiles of 256 counted from the first visible one, so the order of every sum follows from the position
// alone. Each lane scores one key of the tile. Then four teams of 64 lanes take a quarter of the tile each, and a lane up
// to four of the DH outputs; the teams' sums meet at the end, in order.
#import row
#import cache
#import sink
#import exp
override H: u32;
override HK: u32;
override DH: u32;
override CAPACITY: u32;
override WINDOW: u32;
const WG = 256u;
const TEAM = 64u;
const TEAMS = 4u;
const OWN = 4u;
@group(0) @binding(0) var<storage, read> rows: array<Row>;
@group(0) @binding(1) var<storage, read> qkv: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> a: array<f32>;

var<workgroup> scores: array<f32, WG>;
var<workgroup> meeting: array<f32, WG>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let h = group.x;
    let t = group.y;
    let row = rows[t];
    let kv_head = h / (H / HK);
    let q = (t * (H + 2u * HK) + h) * (DH / 4u);
    let base = row.sequence * CAPACITY;
    let end = row.position + 1u;
    var start = 0u;
    if WINDOW > 0u && end > WINDOW {
        start = end - WINDOW;
    }
    var m = opening(h).x;
    var total = opening(h).y; // besides the team's keys
    var team_total = 0.0;
    var sums: array<f32, OWN>;
    let team = lane / TEAM;
    let place = lane % TEAM;
    for (var tile = start; tile < end; tile += WG) {
        let j = tile + lane;
        var score = -3.0e38; // keys past the end weigh e^-inf = 0
        if j < end {
            let k = ((base + j % CAPACITY) * HK + kv_head) * DH;
            var dot = 0.0;
            for (var i = 0u; i < DH / 4u; i++) {
                let qi = qkv[q + i];
                let ki = key4(k + i * 4u);
                dot = fma(qi.x, ki.x, dot);
                dot = fma(qi.y, ki.y, dot);
                dot = fma(qi.z, ki.z, dot);
                dot = fma(qi.w, ki.w, dot);
            }
            score = dot / sqrt(f32(DH));
        }
        scores[lane] = score;
        workgroupBarrier(); // all scores of the tile are there
        var tile_m = score;
        for (var i = 0u; i < TEAM; i++) {
            tile_m = max(tile_m, scores[team * TEAM + i]);
        }
        meeting[lane] = tile_m;
        workgroupBarrier(); // all teams' largest scores are there, and all lanes have read the scores
        tile_m = m;
        for (var i = 0u; i < TEAMS; i++) {
            tile_m = max(tile_m, meeting[i * TEAM]);
        }
        scores[lane] = exp_f32(score - tile_m);
        workgroupBarrier(); // all weights are there
        let shrink = exp_f32(m - tile_m);
        m = tile_m;
        total *= shrink;
        team_total *= shrink;
        for (var own = 0u; own < OWN; own++) {
            sums[own] *= shrink;
        }
        let first = min(tile + team * TEAM, end);
        let count = min(TEAM, end - first);
        for (var i = 0u; i < count; i++) {
            let weight = scores[team * TEAM + i];
            team_total += weight;
            let v = ((base + (first + i) % CAPACITY) * HK + kv_head) * DH;
            for (var own = 0u; own < OWN; own++) {
                let d = own * TEAM + place;
                if d < DH {
                    sums[own] = fma(weight, value(v + d), sums[own]);
                }
            }
        }
        workgroupBarrier(); // all lanes are done with the weights before the next tile's scores
    }
    meeting[lane] = team_total;
    workgroupBarrier(); // all teams' totals are there
    for (var i = 0u; i < TEAMS; i++) {
        total += meeting[i * TEAM];
    }
    for (var own = 0u; own < OWN; own++) {
        workgroupBarrier(); // all lanes have read what stood in `meeting`
        meeting[lane] = sums[own];
        workgroupBarrier(); // all teams' sums are there
        let d = own * TEAM + place;
        if team == 0u && d < DH {
            var sum = 0.0;
            for (var i = 0u; i < TEAMS; i++) {
                sum += meeting[i * TEAM + place];
            }
            a[(t * H + h) * DH + d] = sum / total;
        }
    }
}
