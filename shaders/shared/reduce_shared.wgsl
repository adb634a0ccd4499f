// Fills slot `reduce`: the sum of eight neighbouring lanes, through workgroup memory. Every lane of a workgroup of
// at most 64 must call it. The tree is that of reduce_subgroup: pairs at distance 1, then 2, then 4.
var<workgroup> reduce_lanes: array<f32, 64>;

fn reduce8(v: f32, lane: u32) -> f32 {
    var sum = v;
    for (var d = 1u; d < 8u; d *= 2u) {
        reduce_lanes[lane] = sum;
        workgroupBarrier(); // all lanes have written
        sum += reduce_lanes[lane ^ d];
        workgroupBarrier(); // all lanes have read before the next round overwrites
    }
    return sum;
}
