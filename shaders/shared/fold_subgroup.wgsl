// Fills slot `fold`: the sums of VALUES numbers over LANES neighbouring lanes, by shuffles. At each of the first steps a lane
// gives half of its numbers away and gets its neighbour's other half, so that all sums take little more than one. Needs
// what reduce_subgroup needs; the tree is that of fold_shared: pairs at distance 1, then 2, 4 and so on.
//
// Number j BATCH + b is of row b of weights and of the lane's input number j, which is that of token j ^ first_token(lane). Of
// many tokens each lane has that one first whose sum it gets: so it always keeps the first half, and has to choose only among
// rows of weights.
//
// Not where the numbers are products that were rounded: with no choice between, compilers make one fma of such a product and
// the first addition, in one tile and not in another.
#import lanes
#import tile
const IN_TURN = TOKENS >= 4u && !WEIGHT_SCALES_ROUND && !INPUT_SCALES_ROUND;

fn fold(values: ptr<function, array<f32, VALUES>>, lane: u32) -> f32 {
    // Step by step: compilers do not unroll these as a loop.
    if VALUES >= 16u {
        halve(values, 8u, lane);
    }
    if VALUES >= 8u {
        halve(values, 4u, lane);
    }
    if VALUES >= 4u {
        halve(values, 2u, lane);
    }
    if VALUES >= 2u {
        halve(values, 1u, lane);
    }
    var sum = (*values)[0];
    for (var d = VALUES; d < LANES; d *= 2u) {
        sum += subgroupShuffleXor(sum, d);
    }
    return sum;
}

// Keep `half` of twice as many numbers, each with the neighbour's.
fn halve(values: ptr<function, array<f32, VALUES>>, half: u32, lane: u32) {
    let d = VALUES / 2u / half;
    let upper = (lane & d) != 0u;
    for (var k = 0u; k < half; k++) {
        let a = (*values)[k];
        let b = (*values)[k + half];
        if IN_TURN && half >= BATCH {
            (*values)[k] = a + subgroupShuffleXor(b, d);
        } else {
            (*values)[k] = select(a, b, upper) + subgroupShuffleXor(select(b, a, upper), d);
        }
    }
}

fn first_token(lane: u32) -> u32 {
    return select(0u, kept(lane) / BATCH, IN_TURN);
}

// Which sum a lane gets, of row b of weights and token j: j BATCH + b.
fn kept(lane: u32) -> u32 {
    var k = 0u;
    for (var d = 1u; d < VALUES; d *= 2u) {
        k = k * 2u + select(0u, 1u, (lane & d) != 0u);
    }
    return k;
}
