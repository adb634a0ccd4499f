// choose: the A experts of a token with the largest scores, the lower index first among equals. The kernel gives score(i),
// number i of [T, E].
#import exp
override E: u32;
override A: u32;
override ALL: u32;
var<workgroup> held: array<vec4<f32>, 256>; // four scores each
var<workgroup> chosen: array<u32, 16>;

// Every lane of a workgroup of `lanes` must call it.
fn choose(t: u32, lane: u32, lanes: u32) {
    if lane < 16u {
        chosen[lane] = 0u; // NaN scores have no rank: they must still name an expert that exists
    }
    for (var q = lane; q < (E + 3u) / 4u; q += lanes) { // those past the end do not count
        let e = min(vec4<u32>(q * 4u) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(E - 1u));
        held[q] = vec4<f32>(score(t * E + e.x), score(t * E + e.y), score(t * E + e.z), score(t * E + e.w));
    }
    workgroupBarrier(); // `chosen` is clear, and all scores are here
    // An expert's rank is the number of experts before it; the ranks are distinct, so no two lanes write one place.
    for (var e = lane; e < E; e += lanes) {
        let s = vec4<f32>(held_score(e));
        var before = vec4<u32>(0u);
        for (var o = 0u; o < (E + 3u) / 4u; o++) {
            let others = held[o];
            let index = vec4<u32>(o * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
            let first = (others > s) | ((others == s) & (index < vec4<u32>(e)));
            before += select(vec4<u32>(0u), vec4<u32>(1u), first & (index < vec4<u32>(E)));
        }
        let rank = before.x + before.y + before.z + before.w;
        if rank < A {
            chosen[rank] = e;
        }
    }
    workgroupBarrier(); // `chosen` is whole
}

fn held_score(e: u32) -> f32 {
    return held[e / 4u][e % 4u];
}

// The weight of the expert of rank a, after `choose`: softmax over the chosen, or over all where ALL is 1.
fn weight_of(a: u32) -> f32 {
    let top = held_score(chosen[0]);
    var total = 0.0;
    for (var i = 0u; i < A; i++) {
        total += exp_f32(held_score(chosen[i]) - top);
    }
    if ALL == 1u {
        total = 0.0;
        for (var e = 0u; e < E; e++) {
            total += exp_f32(held_score(e) - top);
        }
    }
    return exp_f32(held_score(chosen[a]) - top) / total;
}
