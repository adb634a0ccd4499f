// Fills slot `fold`: the sums of VALUES numbers over LANES neighbouring lanes, by shuffles. At each of the first steps a lane
// gives half of its numbers away and gets its neighbour's other half, so that all sums take little more than one. Needs
// what reduce_subgroup needs; the tree is that of fold_shared: pairs at distance 1, then 2, 4 and so on.
#import lanes
#import tile
fn fold(values: ptr<function, array<f32, VALUES>>, lane: u32) -> f32 {
    var d = 1u;
    for (var half = VALUES / 2u; half > 0u; half /= 2u) {
        let upper = (lane & d) != 0u;
        for (var k = 0u; k < half; k++) {
            let a = (*values)[k];
            let b = (*values)[k + half];
            (*values)[k] = select(a, b, upper) + subgroupShuffleXor(select(b, a, upper), d);
        }
        d *= 2u;
    }
    var sum = (*values)[0];
    for (; d < LANES; d *= 2u) {
        sum += subgroupShuffleXor(sum, d);
    }
    return sum;
}

// Which of the numbers a lane gets the sum of.
fn folded(lane: u32) -> u32 {
    var k = 0u;
    for (var d = 1u; d < VALUES; d *= 2u) {
        k = k * 2u + select(0u, 1u, (lane & d) != 0u);
    }
    return k;
}
