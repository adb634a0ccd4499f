// segments: how the visible keys of a row are shared among workgroups: by how many there are, and nothing else. Tiles of
// KEYS, counted from the first visible key; a segment is so many tiles that there are at most 64 segments.
#import visible
const KEYS = 128u;

fn tiles_per_segment(visible: u32) -> u32 {
    return (((visible + KEYS - 1u) / KEYS) + 63u) / 64u;
}

fn segments_of(visible: u32) -> u32 {
    let each = tiles_per_segment(visible) * KEYS;
    return (visible + each - 1u) / each;
}
