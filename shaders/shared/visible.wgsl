// visible: what a row sees.

// The first key that a row sees.
fn first_key(position: u32) -> u32 {
    if WINDOW > 0u && position + 1u > WINDOW {
        return position + 1u - WINDOW;
    }
    return 0u;
}
