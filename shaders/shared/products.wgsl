// products: rows of weights times rows of inputs, the heart of every matmul without matrix units but a router's scores
// (norm_linear_few, linear_add) and moe_down_add's, whose inputs change with the rows. A workgroup has ROWS rows of weights and TOKENS
// rows of inputs. Its lanes share K, sixteen elements each: a lane keeps its part of the inputs and lets the weights pass, BATCH rows
// at a time. So a weight is read and decoded once for all TOKENS.
//
// The order of a sum is the same for any ROWS, TOKENS, BATCH and WARPS: a lane's sixteen products in index order; a tree over
// the LANES of a span (`fold`); the spans of a slot, SLOTS apart, in order; then the slots in order.
//
// The kernel gives weight_row(l), where row l of ROWS stands in the matrix, input_row(j), where row j of TOKENS stands in the
// input, and bias_row(l), where row l of ROWS stands in the bias; all always name a row that exists. And side_by_side():
// whether the rows of a batch stand side by side, the first at a multiple of BATCH. That is known when a kernel is compiled,
// and makes addresses cheap.
#import warps
#import tile
#import weights
#import input
#import bias
#import dot16
#import fold
override K: u32;
override ROWS: u32; // a multiple of BATCH, at most 64
var<workgroup> found: array<f32, 64u * TOKENS * 8u>; // [ROWS, TOKENS, SLOTS]
// What a row's sums are multiplied by, and what is added then.
var<workgroup> ends: array<vec2<f32>, 64>;

// The weights that come next, as they are stored.
var<private> next: array<Stored, BATCH>;
// Their scales: one word where they stand side by side.
var<private> next_scales: array<u32, BATCH>;

// Send for the rows of weights from row l on, of the sixteen at start + lane; past the end the last sixteen again, for nothing.
fn fetch(l: u32, start: u32, lane: u32) {
    let i = min(start + lane, K / 16u - 1u);
    let row = weight_row(l);
    next_scales[0] = scales_at(row, K / 16u, i) >> (row % 4u * 8u);
    for (var b = 0u; b < BATCH; b++) {
        if side_by_side() {
            next[b] = stored_at(row + b, K / 16u, i);
        } else {
            let other = weight_row(l + b);
            next[b] = stored_at(other, K / 16u, i);
            next_scales[b] = scales_at(other, K / 16u, i) >> (other % 4u * 8u);
        }
    }
}

// The scale of row b of a batch, in the low byte.
fn scale_of(scales: array<u32, BATCH>, b: u32) -> u32 {
    if side_by_side() {
        return scales[0] >> (b * 8u);
    }
    return scales[b];
}

// Find all sums of the workgroup: every lane must call it, once, after fetch(0u, 0u, lane).
fn multiply(lane: u32) {
    let mine = first_token(lane);
    var end = end_at(min(lane, ROWS - 1u)); // sent for here, so that nobody waits for it at the end
    for (var start = 0u; start < K / 16u; start += LANES * WARPS) {
        let there = start + lane < K / 16u;
        let i = min(start + lane, K / 16u - 1u);
        // Where it puts the sum that it keeps, if there is one.
        let span = (start + lane) / LANES;
        let again = K / 16u > SLOTS * LANES && span >= SLOTS; // never, mostly
        let keeps = lane % LANES < VALUES && span * LANES < K / 16u;
        let place = (kept(lane) % BATCH * TOKENS + kept(lane) / BATCH) * SLOTS + span % SLOTS;
        var xs: array<Sixteen, TOKENS>;
        for (var j = 0u; j < TOKENS; j++) {
            xs[j] = in_units(input_at(input_row(j ^ mine), K / 16u, i), there);
        }
        if start > 0u {
            fetch(0u, start, lane);
        }
        for (var batch = 0u; batch < ROWS / BATCH; batch++) {
            let l = batch * BATCH;
            let stored = next;
            let scales = next_scales;
            fetch(min(batch + 1u, ROWS / BATCH - 1u) * BATCH, start, lane); // on their way while these are multiplied
            var values: array<f32, VALUES>;
            for (var b = 0u; b < BATCH; b++) {
                let w = opened(stored[b], scale_of(scales, b));
                for (var j = 0u; j < TOKENS; j++) {
                    values[j * BATCH + b] = dot16(w, xs[j]);
                }
            }
            var sum = fold(&values, lane);
            if keeps {
                let at = l * TOKENS * SLOTS + place;
                if again {
                    sum += found[at]; // which this lane wrote
                }
                found[at] = sum;
            }
        }
    }
    for (var l = lane; l < ROWS; l += LANES * WARPS) {
        if l > lane {
            end = end_at(l);
        }
        ends[l] = end;
    }
    workgroupBarrier(); // all sums and ends are there
}

fn end_at(l: u32) -> vec2<f32> {
    return vec2<f32>(row_scale(weight_row(l)), bias_at(bias_row(l)));
}

// What comes of row l of weights and row j of inputs, after `multiply`; the input is in units of `scale`.
fn product(l: u32, j: u32, scale: f32) -> f32 {
    var sum = 0.0;
    for (var slot = 0u; slot < SLOTS; slot++) {
        sum += found[(l * TOKENS + j) * SLOTS + slot];
    }
    return fma(sum, ends[l].x * scale, ends[l].y);
}
