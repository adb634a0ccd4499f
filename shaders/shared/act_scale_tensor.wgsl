// Fills slot `act_scale`: the largest magnitude of all rows of the step over 6 x 448. A row's bits then depend on its
// neighbours, by definition.
#import step
#import dynamic_scale
override ROWS_PER_TOKEN: u32;
@group(0) @binding(4) var<storage, read> amaxes: array<u32>;

fn act_scale(row: u32, row_amax: u32) -> f32 {
    var amax = 0u;
    for (var i = 0u; i < step.tokens * ROWS_PER_TOKEN; i++) {
        amax = max(amax, amaxes[i]);
    }
    return dynamic_scale(amax);
}
