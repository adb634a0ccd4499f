// input8: what slot `input` gives, eight elements of a row at a time.
struct Input8 {
    a: vec4<f32>,
    b: vec4<f32>,
    scale: f32, // of all eight
}
