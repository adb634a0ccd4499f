// Fills slot `heads`: heads as they are.
#import head
fn scale_of_head(head: u32, at: u32, lane: u32) -> f32 {
    return 1.0;
}

fn scaled(head: u32, at: u32, i: u32, scale: f32) -> vec4<f32> {
    return four_at(at);
}
