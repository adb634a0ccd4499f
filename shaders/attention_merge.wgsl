// attention_merge: bring the segments of a row's attention together.
//
//   a[t,h] = sum_s e^(m_s - m) sums_s / (e^(sink_h - m) + sum_s e^(m_s - m) total_s),    m = max(sink_h, max_s m_s)
//
// grid      H x ROWS workgroups
// in        rows   Row   [T]
//           parts  f32   [ROWS, H, SEGMENTS, DH + 4]     m and total, two zeros, then the sums: of the segments that a row has
//           sinks  slot  [H]
// out       a      f32   [T, H DH]
// override  H, DH, WINDOW, SEGMENTS, FIRST
// slots     sink
// requires  DH a multiple of 4 and at most 256
// twin      src/ops/attention.rs
//
// Teams of DH/4 lanes take segments by turns, and a lane a quad of their sums; the teams' sums meet in order. How many teams
// there are follows from DH alone, so the order of every sum follows from the number of segments. A row of one segment gets the
// bits that attention gives it alone.
#import row
#import exp
#import sink
#import segments
override H: u32;
override DH: u32;
override WINDOW: u32;
override SEGMENTS: u32;
override FIRST: u32;
const WG = 256u;
// Segments of a team whose parts are sent for at once, before it is known whether the row has them.
const BATCH = 4u;
@group(0) @binding(0) var<storage, read> rows: array<Row>;
@group(0) @binding(1) var<storage, read> parts: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> a: array<vec4<f32>>;

// By segment: its largest score, its weight, and the sum of its keys' weights.
var<workgroup> tops: array<f32, 64>;
var<workgroup> weights: array<f32, 64>;
var<workgroup> totals: array<f32, 64>;
// The teams' sums, [teams, DH / 4].
var<workgroup> meeting: array<vec4<f32>, WG>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let quads = DH / 4u;
    let teams = WG / quads;
    let team = lane / quads;
    let quad = lane % quads;
    let h = group.x;
    let t = FIRST + group.y;
    let stride = quads + 1u;
    let at = (group.y * H + h) * SEGMENTS * stride;
    let head = parts[at + min(lane, SEGMENTS - 1u) * stride]; // of segment `lane`
    var sums: array<vec4<f32>, BATCH>;
    for (var i = 0u; i < BATCH; i++) {
        sums[i] = parts[at + min(team + i * teams, SEGMENTS - 1u) * stride + 1u + quad];
    }
    let open = opening(h);
    let position = rows[t].position;
    let count = min(segments_of(position + 1u - first_key(position)), SEGMENTS);
    if lane < 64u {
        tops[lane] = head.x;
    }
    workgroupBarrier(); // the largest scores of all segments are there
    var top = open.x;
    for (var s = 0u; s < count; s++) {
        top = max(top, tops[s]);
    }
    if lane < 64u {
        weights[lane] = exp_f32(head.x - top);
        totals[lane] = head.y;
    }
    workgroupBarrier(); // the weights are there
    var sum = vec4<f32>(0.0);
    for (var s = team; s < count; s += BATCH * teams) {
        if s != team {
            for (var i = 0u; i < BATCH; i++) {
                sums[i] = parts[at + min(s + i * teams, count - 1u) * stride + 1u + quad];
            }
        }
        for (var i = 0u; i < BATCH && s + i * teams < count; i++) {
            sum = fma(vec4<f32>(weights[s + i * teams]), sums[i], sum);
        }
    }
    meeting[lane] = sum;
    workgroupBarrier(); // the sums of all teams are there
    if lane < quads {
        var all = open.y * exp_f32(open.x - top);
        for (var s = 0u; s < count; s++) {
            all = fma(weights[s], totals[s], all);
        }
        for (var other = 1u; other < min(teams, count); other++) {
            sum += meeting[other * quads + lane];
        }
        a[(t * H + h) * quads + lane] = sum * (1.0 / all);
    }
}
