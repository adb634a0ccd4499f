// sixteen: what slots `weights` and `input` give, sixteen elements of a row at a time.
struct Sixteen {
    a: vec4<f32>,
    b: vec4<f32>,
    c: vec4<f32>,
    d: vec4<f32>,
    scale: f32, // of all sixteen, besides the slot's unit
}
