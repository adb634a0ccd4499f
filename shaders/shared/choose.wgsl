// choose: the A experts of a token with the largest scores, the lower index first among equals. The kernel gives score(i),
// number i of [T, E].
#import exp
override E: u32;
override A: u32;
override ALL: u32;
var<workgroup> held: array<f32, 1024>;
var<workgroup> chosen: array<u32, 16>;

// Every lane of a workgroup of `lanes` must call it.
fn choose(t: u32, lane: u32, lanes: u32) {
    if lane < 16u {
        chosen[lane] = 0u; // NaN scores have no rank: they must still name an expert that exists
    }
    for (var e = lane; e < E; e += lanes) {
        held[e] = score(t * E + e);
    }
    workgroupBarrier(); // `chosen` is clear, and all scores are here
    // An expert's rank is the number of experts before it; the ranks are distinct, so no two lanes write one place.
    for (var e = lane; e < E; e += lanes) {
        let s = held[e];
        var rank = 0u;
        for (var o = 0u; o < E; o++) {
            let other = held[o];
            if other > s || (other == s && o < e) {
                rank++;
            }
        }
        if rank < A {
            chosen[rank] = e;
        }
    }
    workgroupBarrier(); // `chosen` is whole
}

// The weight of the expert of rank a, after `choose`: softmax over the chosen, or over all where ALL is 1.
fn weight_of(a: u32) -> f32 {
    let top = held[chosen[0]];
    var total = 0.0;
    for (var i = 0u; i < A; i++) {
        total += exp_f32(held[chosen[i]] - top);
    }
    if ALL == 1u {
        total = 0.0;
        for (var e = 0u; e < E; e++) {
            total += exp_f32(held[e] - top);
        }
    }
    return exp_f32(held[chosen[a]] - top) / total;
}
