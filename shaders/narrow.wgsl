// narrow: the next eight bits of the place where a filter ends; at its LAST ones, which of the tokens there are kept.
//
//   kept[t] = the digit b where the sums over spans pass the target, and what is left of the target there
//
// Top-k's target is a count, top-p's a share of the sum of all weights, which is known with the first digit. A filter that never
// gets there keeps all.
//
// grid      rows workgroups
// in        logits  f32   [T, V]
//           powers  2u32  [512]
//           rules   Rule  [S]
//           rows    Row   [T]
//           sums    2u32  [rows, SPANS, 256]     of weigh
// in/out    kept    Kept  [T]
// override  V, SPANS, ROW, LAST; ROW: the first of the rows
// requires  SPANS at most 64
// twin      src/ops/narrow.rs
#import row
#import passes
override V: u32;
override SPANS: u32;
override ROW: u32;
override LAST: bool;
@group(0) @binding(3) var<storage, read> rows: array<Row>;
@group(0) @binding(4) var<storage, read> sums: array<vec2<u32>>;
@group(0) @binding(5) var<storage, read_write> kept: array<Kept>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let t = ROW + group.x;
    let rule = rules[rows[t].sequence];
    var known = kept[t];
    let narrows = known.stage < WEIGHS;
    var own = vec2<u32>(0u);
    if narrows {
        own = over_spans(lane, group.x);
    }
    let sum = running(lane, own);
    if known.stage == 3u {
        // Before the last token that top-p keeps there is less than its share.
        let mass = runs[WG - 1u];
        let reached = plus(times(mass.y, rule.top_p), vec2<u32>(times(mass.x, rule.top_p).y, 0u));
        known.wanted = minus(reached, vec2<u32>(select(1u, 0u, reached.x == 0u && reached.y == 0u), 0u));
    }
    find(lane, own, sum, known.wanted);
    let found = place < WG;
    let digits = known.digits * 256u + place;
    if LAST {
        find_token(lane, group.x, rule, known, select(FAR, digits, found), 0u, t);
        if found {
            known.below = digits;
            known.id = token;
        }
        known.digits = 0u;
        known.stage = select(WEIGHS, 3u, known.stage == 2u && rule.top_p != ALL);
    } else {
        known.stage += 1u;
        if found {
            known.digits = digits;
            known.wanted = left;
        }
    }
    if lane == 0u {
        if !narrows {
            kept[t].stage = DONE;
        } else {
            kept[t] = known;
        }
    }
}
