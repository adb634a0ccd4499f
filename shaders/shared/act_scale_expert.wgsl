// Fills slot `act_scale`: the calibrated scale of the expert that the row goes to.
@group(0) @binding(4) var<storage, read> input_scales: array<f32>;
@group(0) @binding(5) var<storage, read> experts: array<u32>;

fn act_scale(row: u32, row_amax: u32) -> f32 {
    return input_scales[experts[row]];
}
