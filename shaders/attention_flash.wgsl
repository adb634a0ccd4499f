// attention_flash: attention of a prompt's rows, of which a workgroup takes several, so that keys are read once for all of them.
//
//   s_j      = q . k_j / sqrt(DH)          j <= position, and position - j < WINDOW
//   a[t,h]   = sum_j e^(s_j - m) v_j / (e^(sink_h - m) + sum_j e^(s_j - m)),    m = max(sink_h, max_j s_j)
//
// grid      PART (H / HK) / HEADS x ceil(T / (64 / HEADS)) workgroups: HEADS query heads that share keys, of 64 / HEADS rows
// in        rows    Row   [T]
//           qkv     f32   [T, (H + 2 HK) DH]       rotated queries first
//           keys    slot  [.., PAGE, PART DH]      by the sequence's pages: the heads of this part
//           values  slot  [.., PAGE, PART DH]
//           pages   u32   [S, PAGES]
//           sinks   slot  [H]
// out       a       f32   [T, H DH]                of the queries of these heads
// override  H, HK, DH, PAGE, PAGES, PART, PART_FIRST, WINDOW, HEADS; WINDOW 0: every earlier key is visible
// slots     cache, sink
// requires  DH a multiple of 4 and at most 256; H a multiple of HK, HK of PART, H / HK of HEADS, HEADS at most 64
// twin      src/ops/attention.rs
//
// A line is a head of a row. Keys come in tiles of 32 counted from position 0, so what a line adds up, and in which order,
// follows from its position alone: a key that it does not see weighs nothing, and a tile of such keys changes nothing (a sum of -0
// would become 0: there is none but where all that a line saw is below e^-87 of a later key). A lane scores four lines with four keys of a tile, then adds up the values of four lines in every eighth quad. Rows of several
// sequences take turns (runs).
#import step
#import row
#import pages
#import cache
#import exp
#import visible
#import sink
override H: u32;
override HK: u32;
override DH: u32;
override WINDOW: u32;
override HEADS: u32;
const LINES = 64u;
const ROW = LINES / 4u;
const KEYS = 32u;
const WG = ROW * 8u;
// Elements of queries and keys, and quads of values, that are brought in at a time.
const ELEMENTS = 16u;
const QUADS = WG * 2u;
const STAGED_KEYS = ELEMENTS * ROW;
const BELOW = -3.0e38;
@group(0) @binding(1) var<storage, read> qkv: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> a: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read> rows: array<Row>;

// A vec4 of four lines or keys: element d of queries [ELEMENTS, ROW], then of keys [ELEMENTS, KEYS / 4]; or what eight lanes found
// of four lines each, [8, ROW]; or quads of values, [QUADS / (DH / 4), DH / 4].
var<workgroup> staged: array<vec4<f32>, ELEMENTS * (ROW + KEYS / 4u)>;
// The weights of the tile's keys, [KEYS, ROW].
var<workgroup> weights: array<vec4<f32>, KEYS * ROW>;
// Where the keys of the tile stand in the cache.
var<workgroup> places: array<u32, KEYS>;
// Whether a value of the tile is no number, or infinite: then a weight of 0 must not meet it.
var<workgroup> strange: atomic<u32>;

fn exp4(v: vec4<f32>) -> vec4<f32> {
    return vec4<f32>(exp_f32(v.x), exp_f32(v.y), exp_f32(v.z), exp_f32(v.w));
}

fn is_strange(v: vec4<f32>) -> bool {
    return any((bitcast<vec4<u32>>(v) & vec4<u32>(0x7f800000u)) == vec4<u32>(0x7f800000u));
}

// A sum to which a key that weighs nothing adds nothing, whatever its value.
fn careful_fma(w: f32, v: vec4<f32>, sum: vec4<f32>) -> vec4<f32> {
    return select(fma(vec4<f32>(w), v, sum), sum, w == 0.0);
}

// The same quad of four lines or keys.
struct Brought {
    a: vec4<f32>,
    b: vec4<f32>,
    c: vec4<f32>,
    d: vec4<f32>,
}

// Quad `quad` of the queries or keys that begin at these places; zeros past a head's end, and for lanes that bring none.
fn bring(idle: bool, keys_wanted: bool, at: vec4<u32>, quad: u32) -> Brought {
    if idle || quad >= DH / 4u {
        return Brought();
    }
    if keys_wanted {
        return Brought(key4(at.x + quad), key4(at.y + quad), key4(at.z + quad), key4(at.w + quad));
    }
    return Brought(qkv[at.x + quad], qkv[at.y + quad], qkv[at.z + quad], qkv[at.w + quad]);
}

// Quad i of the tile's values from key k on.
fn value_at(k: u32, i: u32, quads: u32) -> vec4<f32> {
    return value4(places[min(k + i / quads, KEYS - 1u)] + i % quads);
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let quads = DH / 4u;
    let each = LINES / HEADS;
    // Those that see most begin first.
    let first = ((step.tokens + each - 1u) / each - 1u - group.y) * each;
    let end = min(first + each, step.tokens);
    let head = PART_FIRST * (H / HK) + group.x * HEADS;
    let kv_head = head / (H / HK) - PART_FIRST;
    let scale = 1.0 / sqrt(f32(DH));
    // Four lines and, of each tile, four keys and every eighth quad of values.
    let four = lane / 8u;
    let eighth = lane % 8u;
    // What this lane brings in of queries, or of keys: quad `dq` of four lines or keys.
    let brings_keys = lane >= LINES;
    let fours = select(ROW, KEYS / 4u, brings_keys);
    let place = lane % LINES % fours;
    let dq = lane % LINES / fours;
    let idle = dq >= ELEMENTS / 4u;
    let stage_at = select(0u, STAGED_KEYS, brings_keys) + dq * 4u * fours + place;
    var at: vec4<u32>; // of queries; of keys it follows the tile
    for (var i = 0u; i < 4u; i++) {
        let n = min(place * 4u + i, each * HEADS - 1u);
        at[i] = (min(first + n / HEADS, end - 1u) * (H + 2u * HK) + head + n % HEADS) * quads;
    }

    var top = vec4<f32>(BELOW);
    var total = vec4<f32>(0.0);
    var sums: array<vec4<f32>, 32>; // of quad eighth + 8i, line j: 4i + j
    for (var i = 0u; i < (quads + 7u) / 8u * 4u; i++) {
        sums[i] = vec4<f32>(0.0);
    }
    for (var run = first; run < end;) {
        // The rows of one sequence, and the keys that any of them sees.
        let sequence = rows[run].sequence;
        var low = first_key(rows[run].position);
        var high = rows[run].position + 1u;
        var next = run + 1u;
        while next < end && rows[next].sequence == sequence {
            low = min(low, first_key(rows[next].position));
            high = max(high, rows[next].position + 1u);
            next++;
        }
        // What this lane's lines see: nothing, if they are not of this run.
        var sees_from = vec4<u32>(1u);
        var sees_to = vec4<u32>(0u);
        for (var i = 0u; i < 4u; i++) {
            let n = four * 4u + i;
            let t = first + n / HEADS;
            if n < each * HEADS && t >= run && t < next {
                sees_from[i] = first_key(rows[t].position);
                sees_to[i] = rows[t].position + 1u;
            }
        }
        run = next;
        for (var tile = low / KEYS * KEYS; tile < high; tile += KEYS) {
            workgroupBarrier(); // all are done with the tile before
            if lane < KEYS {
                let position = clamp(tile + lane, low, high - 1u);
                places[lane] = (cache_row(sequence, position) * PART + kv_head) * quads;
            }
            if lane == 0u {
                atomicStore(&strange, 0u);
            }
            workgroupBarrier(); // the places are there
            if brings_keys {
                let four_keys = place * 4u;
                at = vec4<u32>(places[four_keys], places[four_keys + 1u], places[four_keys + 2u], places[four_keys + 3u]);
            }
            // Of four keys, each with four lines.
            var s0 = vec4<f32>(0.0);
            var s1 = vec4<f32>(0.0);
            var s2 = vec4<f32>(0.0);
            var s3 = vec4<f32>(0.0);
            var brought = bring(idle, brings_keys, at, dq);
            for (var d = 0u; d < DH; d += ELEMENTS) {
                if !idle {
                    staged[stage_at] = vec4<f32>(brought.a.x, brought.b.x, brought.c.x, brought.d.x);
                    staged[stage_at + fours] = vec4<f32>(brought.a.y, brought.b.y, brought.c.y, brought.d.y);
                    staged[stage_at + 2u * fours] = vec4<f32>(brought.a.z, brought.b.z, brought.c.z, brought.d.z);
                    staged[stage_at + 3u * fours] = vec4<f32>(brought.a.w, brought.b.w, brought.c.w, brought.d.w);
                }
                workgroupBarrier(); // these elements are there
                brought = bring(idle, brings_keys, at, (d + ELEMENTS) / 4u + dq);
                for (var i = 0u; i < ELEMENTS; i++) {
                    let q = staged[i * ROW + four];
                    let k = staged[STAGED_KEYS + i * (KEYS / 4u) + eighth];
                    s0 = fma(q, vec4<f32>(k.x), s0);
                    s1 = fma(q, vec4<f32>(k.y), s1);
                    s2 = fma(q, vec4<f32>(k.z), s2);
                    s3 = fma(q, vec4<f32>(k.w), s3);
                }
                workgroupBarrier(); // all are done with them
            }
            // Values are on their way while scores become weights.
            var v0 = value_at(0u, lane, quads);
            var v1 = value_at(0u, lane + WG, quads);
            let key = tile + eighth * 4u;
            let see0 = (vec4<u32>(key) >= sees_from) & (vec4<u32>(key) < sees_to);
            let see1 = (vec4<u32>(key + 1u) >= sees_from) & (vec4<u32>(key + 1u) < sees_to);
            let see2 = (vec4<u32>(key + 2u) >= sees_from) & (vec4<u32>(key + 2u) < sees_to);
            let see3 = (vec4<u32>(key + 3u) >= sees_from) & (vec4<u32>(key + 3u) < sees_to);
            s0 = select(vec4<f32>(BELOW), s0 * scale, see0);
            s1 = select(vec4<f32>(BELOW), s1 * scale, see1);
            s2 = select(vec4<f32>(BELOW), s2 * scale, see2);
            s3 = select(vec4<f32>(BELOW), s3 * scale, see3);
            staged[eighth * ROW + four] = max(max(s0, s1), max(s2, s3));
            workgroupBarrier(); // the largest scores of all lanes are there
            let old = top;
            for (var i = 0u; i < 8u; i++) {
                top = max(top, staged[i * ROW + four]);
            }
            let shrink = exp4(old - top);
            s0 = select(vec4<f32>(0.0), exp4(s0 - top), see0);
            s1 = select(vec4<f32>(0.0), exp4(s1 - top), see1);
            s2 = select(vec4<f32>(0.0), exp4(s2 - top), see2);
            s3 = select(vec4<f32>(0.0), exp4(s3 - top), see3);
            total = total * shrink + (s0 + s1 + (s2 + s3));
            weights[eighth * 4u * ROW + four] = s0;
            weights[(eighth * 4u + 1u) * ROW + four] = s1;
            weights[(eighth * 4u + 2u) * ROW + four] = s2;
            weights[(eighth * 4u + 3u) * ROW + four] = s3;
            for (var i = 0u; i < (quads + 7u) / 8u; i++) {
                sums[i * 4u] *= shrink.x;
                sums[i * 4u + 1u] *= shrink.y;
                sums[i * 4u + 2u] *= shrink.z;
                sums[i * 4u + 3u] *= shrink.w;
            }
            let at_once = QUADS / quads; // keys
            for (var k = 0u; k < KEYS; k += at_once) {
                let many = min(at_once, KEYS - k);
                workgroupBarrier(); // the weights are there, and all are done with what was staged
                staged[lane] = v0;
                staged[lane + WG] = v1;
                if is_strange(v0) || is_strange(v1) {
                    atomicStore(&strange, 1u);
                }
                workgroupBarrier(); // these values are there
                v0 = value_at(k + at_once, lane, quads);
                v1 = value_at(k + at_once, lane + WG, quads);
                let any_strange = atomicLoad(&strange);
                if any_strange == 0u {
                    for (var j = 0u; j < many; j++) {
                        let w = weights[(k + j) * ROW + four];
                        for (var i = 0u; i < (quads + 7u) / 8u; i++) {
                            let v = staged[j * quads + min(eighth + i * 8u, quads - 1u)];
                            sums[i * 4u] = fma(vec4<f32>(w.x), v, sums[i * 4u]);
                            sums[i * 4u + 1u] = fma(vec4<f32>(w.y), v, sums[i * 4u + 1u]);
                            sums[i * 4u + 2u] = fma(vec4<f32>(w.z), v, sums[i * 4u + 2u]);
                            sums[i * 4u + 3u] = fma(vec4<f32>(w.w), v, sums[i * 4u + 3u]);
                        }
                    }
                } else {
                    for (var j = 0u; j < many; j++) {
                        let w = weights[(k + j) * ROW + four];
                        for (var i = 0u; i < (quads + 7u) / 8u; i++) {
                            let v = staged[j * quads + min(eighth + i * 8u, quads - 1u)];
                            sums[i * 4u] = careful_fma(w.x, v, sums[i * 4u]);
                            sums[i * 4u + 1u] = careful_fma(w.y, v, sums[i * 4u + 1u]);
                            sums[i * 4u + 2u] = careful_fma(w.z, v, sums[i * 4u + 2u]);
                            sums[i * 4u + 3u] = careful_fma(w.w, v, sums[i * 4u + 3u]);
                        }
                    }
                }
            }
        }
    }
    workgroupBarrier(); // all are done with what was staged
    staged[eighth * ROW + four] = total;
    workgroupBarrier(); // the sums of all lanes are there
    var all = vec4<f32>(0.0);
    for (var i = 0u; i < 8u; i++) {
        all += staged[i * ROW + four];
    }
    for (var j = 0u; j < 4u; j++) {
        let n = four * 4u + j;
        let t = first + n / HEADS;
        let h = head + n % HEADS;
        if n < each * HEADS && t < end {
            let open = opening(h);
            let most = max(open.x, top[j]);
            let weight = exp_f32(top[j] - most);
            let whole = fma(weight, all[j], open.y * exp_f32(open.x - most));
            for (var i = 0u; i < (quads + 7u) / 8u; i++) {
                if eighth + i * 8u < quads {
                    a[(t * H + h) * quads + eighth + i * 8u] = weight * sums[i * 4u + j] / whole;
                }
            }
        }
    }
}
