// weight8: what slot `weights` gives, eight elements of a row at a time.
struct Weight8 {
    a: vec4<f32>,
    b: vec4<f32>,
    scale: f32, // of all eight
}
