// exp: e^v from fma and integer shifts on [-87, 88], to about 1 ulp, or |v| ulp where a driver joins the two parts of
// ln 2 (llvmpipe does); below that 0, above it +inf; NaN stays NaN.
// The built-in's error is the driver's choice (Vulkan allows 3 + 2|v| ulp); this one is the same everywhere.
fn exp_f32(v: f32) -> f32 {
    let n = round(clamp(v, -104.0, 89.0) * 1.44269504);
    // r = v - n ln 2, with ln 2 in two parts so that the first product is exact.
    let r = fma(n, 2.12194440e-4, fma(n, -0.693359375, clamp(v, -104.0, 89.0)));
    var p = 1.9875691500e-4;
    p = fma(p, r, 1.3981999507e-3);
    p = fma(p, r, 8.3334519073e-3);
    p = fma(p, r, 4.1665795894e-2);
    p = fma(p, r, 1.6666665459e-1);
    p = fma(p, r, 5.0000001201e-1);
    let y = fma(p, r * r, r) + 1.0;
    // 2^n in two factors: n = -126..128 does not fit one exponent field with the rounding of y.
    let half_n = i32(n) / 2;
    let a = bitcast<f32>(u32(half_n + 127) << 23u);
    let b = bitcast<f32>(u32(i32(n) - half_n + 127) << 23u);
    let e = y * a * b;
    let bounded = select(select(e, bitcast<f32>(infinity()), v > 88.8), 0.0, v < -87.4);
    // clamp() may have lost a NaN, and compilers may assume that there is none: ask the bits.
    return select(bounded, v, is_nan(v));
}

fn is_nan(v: f32) -> bool {
    return (bitcast<u32>(v) & 0x7fffffffu) > 0x7f800000u;
}

// +inf's bits. A function, so that the compiler does not refuse a constant that overflows.
fn infinity() -> u32 {
    return 0x7f800000u;
}
