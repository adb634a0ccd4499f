// choose: the A experts of each of some rows with the largest scores, the lower index first among equals. The kernel gives
// CHOICES, score_at(t E + e), and one(), which is 1 in a way that compilers do not know: with it a loop stays one.
#import routing
#import exp
override ALL: u32;
var<workgroup> held: array<vec4<f32>, CHOICES>; // [count, E], four scores each
var<workgroup> chosen: array<u32, CHOICES>; // [count, A]

// Of `count` rows from row t on: count ceil(E / 4) and count A are at most CHOICES. Every lane of a workgroup of `lanes` must call
// it.
fn choose(t: u32, count: u32, lane: u32, lanes: u32) {
    const FOUR = vec4<u32>(0u, 1u, 2u, 3u);
    let quads = (E + 3u) / 4u;
    for (var i = lane; i < count * A; i += lanes) {
        chosen[i] = 0u; // NaN scores have no rank: they must still name an expert that exists
    }
    for (var i = lane; i < count * quads; i += lanes) { // those past the end do not count
        let e = min(vec4<u32>(i % quads * 4u) + FOUR, vec4<u32>(E - 1u)) + vec4<u32>((t + i / quads) * E);
        held[i] = vec4<f32>(score_at(e.x), score_at(e.y), score_at(e.z), score_at(e.w));
    }
    workgroupBarrier(); // `chosen` is clear, and all scores are here
    // An expert's rank is the number of experts before it; the ranks are distinct, so no two lanes write one place.
    for (var i = lane; i < count * E; i += lanes) {
        let row = i / E;
        let e = i % E;
        let s = vec4<f32>(held_score(row, e));
        var before = vec4<u32>(0u);
        for (var o = 0u; o < quads * one(); o++) {
            let others = held[row * quads + o];
            let index = vec4<u32>(o * 4u) + FOUR;
            let first = (others > s) | ((others == s) & (index < vec4<u32>(e)));
            before += select(vec4<u32>(0u), vec4<u32>(1u), first & (index < vec4<u32>(E)));
        }
        let rank = before.x + before.y + before.z + before.w;
        if rank < A {
            chosen[row * A + rank] = e;
        }
    }
    workgroupBarrier(); // `chosen` is whole
}

fn held_score(row: u32, e: u32) -> f32 {
    return held[row * ((E + 3u) / 4u) + e / 4u][e % 4u];
}

// The weight of the expert of rank a of a row, after `choose`: softmax over the chosen, or over all where ALL is 1.
fn weight_of(row: u32, a: u32) -> f32 {
    let top = held_score(row, chosen[row * A]);
    var total = 0.0;
    for (var i = 0u; i < A; i++) {
        total += exp_f32(held_score(row, chosen[row * A + i]) - top);
    }
    if ALL == 1u {
        total = 0.0;
        for (var e = 0u; e < E; e++) {
            total += exp_f32(held_score(row, e) - top);
        }
    }
    return exp_f32(held_score(row, chosen[row * A + a]) - top) / total;
}
