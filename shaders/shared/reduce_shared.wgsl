// Fills slot `reduce`: the sum of LANES neighbouring lanes, through workgroup memory. Every lane of a workgroup of
// 8 LANES must call it. The tree is that of reduce_subgroup: pairs at distance 1, then 2, 4 and so on.
#import lanes
var<workgroup> reduce_lanes: array<f32, LANES * 8u>;

fn reduce(v: f32, lane: u32) -> f32 {
    var sum = v;
    for (var d = 1u; d < LANES; d *= 2u) {
        reduce_lanes[lane] = sum;
        workgroupBarrier(); // all lanes have written
        sum += reduce_lanes[lane ^ d];
        workgroupBarrier(); // all lanes have read before the next round overwrites
    }
    return sum;
}
