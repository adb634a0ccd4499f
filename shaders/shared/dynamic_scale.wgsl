// dynamic_scale: a largest magnitude, given by its bits, over 6 x 448. Below the normal numbers 0; NaN or infinity stay.
#import divide
fn dynamic_scale(amax: u32) -> f32 {
    if amax < 0x00800000u {
        return 0.0;
    }
    if amax >= 0x7f800000u {
        return bitcast<f32>(amax);
    }
    return divide(bitcast<f32>(amax), 2688.0);
}
