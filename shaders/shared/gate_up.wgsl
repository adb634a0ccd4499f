// gate_up: the rows of an expert's first matrix that a workgroup has, for products: 2r and 2r + 1 are gate and up of one output.
// The kernel sets f0, the workgroup's first output, and row0, its first row of weights, and gives held_experts(), how many the
// matrix has.
override F: u32;
override STRIDE: u32;
override UP: u32;
var<private> f0: u32;
var<private> row0: u32;

fn weight_row(l: u32) -> u32 {
    if side_by_side() {
        return row0 + l;
    }
    return min(row0 + l / 2u * STRIDE + l % 2u * UP, held_experts() * F * 2u - 1u);
}

fn side_by_side() -> bool {
    return STRIDE == 2u && F * 2u % ROWS == 0u;
}
