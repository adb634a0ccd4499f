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
// A row of one segment gets the bits that attention gives it alone.
#import row
#import exp
#import sink
#import segments
override H: u32;
override DH: u32;
override WINDOW: u32;
override SEGMENTS: u32;
override FIRST: u32;
// Segments whose parts are sent for at once.
const BATCH = 8u;
@group(0) @binding(0) var<storage, read> rows: array<Row>;
@group(0) @binding(1) var<storage, read> parts: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> a: array<vec4<f32>>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) quad: u32) {
    let h = group.x;
    let t = FIRST + group.y;
    let position = rows[t].position;
    let count = min(segments_of(position + 1u - first_key(position)), SEGMENTS);
    let stride = DH / 4u + 1u;
    let at = (group.y * H + h) * SEGMENTS * stride;
    let open = opening(h);
    var top = open.x;
    for (var s = 0u; s < count; s += BATCH) {
        var tops: array<f32, BATCH>;
        for (var i = 0u; i < BATCH; i++) {
            tops[i] = parts[at + min(s + i, count - 1u) * stride].x;
        }
        for (var i = 0u; i < BATCH; i++) {
            top = max(top, tops[i]);
        }
    }
    if quad < DH / 4u {
        var all = open.y * exp_f32(open.x - top);
        var sum = vec4<f32>(0.0);
        for (var s = 0u; s < count; s += BATCH) {
            var ends: array<vec4<f32>, BATCH>;
            var sums: array<vec4<f32>, BATCH>;
            for (var i = 0u; i < BATCH; i++) {
                let part = at + min(s + i, count - 1u) * stride;
                ends[i] = parts[part];
                sums[i] = parts[part + 1u + quad];
            }
            for (var i = 0u; i < BATCH && s + i < count; i++) {
                let weight = exp_f32(ends[i].x - top);
                all = fma(weight, ends[i].y, all);
                sum = fma(vec4<f32>(weight), sums[i], sum);
            }
        }
        a[(t * H + h) * (DH / 4u) + quad] = sum / all;
    }
}
