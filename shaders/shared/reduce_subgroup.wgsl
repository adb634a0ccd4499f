// Fills slot `reduce`: the sum of eight neighbouring lanes, by shuffles. Needs subgroups of 8 lanes or a multiple, lanes
// numbered as in the workgroup, and lanes that come together again after a loop: what drivers do, though Vulkan does
// not promise it. The kernel tests hold it to reduce_shared, bit for bit.
// The tree is that of reduce_shared: pairs at distance 1, then 2, then 4. No subgroupAdd: its order is the driver's.
fn reduce8(v: f32, lane: u32) -> f32 {
    let a = v + subgroupShuffleXor(v, 1u);
    let b = a + subgroupShuffleXor(a, 2u);
    return b + subgroupShuffleXor(b, 4u);
}
