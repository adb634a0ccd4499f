// Fills slot `fold`: the sums of VALUES numbers over LANES neighbouring lanes, through workgroup memory. Every lane of a
// workgroup of at most GROUPS LANES must call it. The tree is that of fold_subgroup: pairs at distance 1, then 2, 4 and so
// on. Number j BATCH + b is of row b of weights and token j.
#import lanes
#import tile
const GROUPS = min(8u, 64u / VALUES);
var<workgroup> fold_lanes: array<f32, VALUES * LANES * GROUPS>;

fn fold(values: ptr<function, array<f32, VALUES>>, lane: u32) -> f32 {
    for (var k = 0u; k < VALUES; k++) {
        fold_lanes[k * LANES * GROUPS + lane] = (*values)[k];
    }
    workgroupBarrier(); // all lanes have written
    let first = kept(lane) * LANES * GROUPS + lane / LANES * LANES;
    var sums: array<f32, LANES>;
    for (var i = 0u; i < LANES; i++) {
        sums[i] = fold_lanes[first + i];
    }
    for (var n = LANES / 2u; n > 0u; n /= 2u) {
        for (var i = 0u; i < n; i++) {
            sums[i] = sums[2u * i] + sums[2u * i + 1u];
        }
    }
    workgroupBarrier(); // all lanes have read before the next ones come
    return sums[0];
}

fn first_token(lane: u32) -> u32 {
    return 0u;
}

// Which sum a lane gets, of row b of weights and token j: j BATCH + b.
fn kept(lane: u32) -> u32 {
    return lane % VALUES;
}
