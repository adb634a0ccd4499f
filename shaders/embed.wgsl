// embed: look up each row's token.
//
//   x[t,d] = e[token_t - FIRST, d]      where the token lies in this part of the table
//
// grid      ceil(D / 128) x T workgroups, two elements a lane
// in        rows  Row   [T]
//           e     bf16  [COUNT, D]      packed two per word
// out       x     f32   [T, D]          rows of other parts are left alone
// override  D, FIRST, COUNT
// requires  D even
// twin      src/ops/embed.rs
#import row
#import bf16
override D: u32;
override FIRST: u32;
override COUNT: u32;
@group(0) @binding(0) var<storage, read> rows: array<Row>;
@group(0) @binding(1) var<storage, read> e: array<u32>;
@group(0) @binding(2) var<storage, read_write> x: array<vec2<f32>>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let t = group.y;
    let pair = group.x * 64u + lane;
    let token = rows[t].token - FIRST; // wraps to a large number for a token before this part
    if pair < D / 2u && token < COUNT {
        let word = e[token * (D / 2u) + pair];
        x[t * (D / 2u) + pair] = vec2<f32>(bf16_lo(word), bf16_hi(word));
    }
}
