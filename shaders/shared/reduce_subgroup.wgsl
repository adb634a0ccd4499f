// Fills slot `reduce`: the sum of LANES neighbouring lanes, by shuffles. Needs subgroups of LANES or a multiple, lanes
// numbered as in the workgroup, and lanes that come together again after a loop: what drivers do, though Vulkan does
// not promise it. The kernel tests hold it to reduce_shared, bit for bit.
// The tree is that of reduce_shared: pairs at distance 1, then 2, 4 and so on. No subgroupAdd: its order is the driver's.
#import lanes
fn reduce(v: f32, lane: u32) -> f32 {
    var sum = v;
    for (var d = 1u; d < LANES; d *= 2u) {
        sum += subgroupShuffleXor(sum, d);
    }
    return sum;
}
