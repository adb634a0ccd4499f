// pages: where a position of a sequence stands in the cache. A sequence has PAGES places for pages of PAGE positions each
// and uses them in turn, so that a layer with a window keeps no more than it looks back to. A row has PART of the key/value
// heads, from PART_FIRST on: all of them, or as many as a binding holds.
override PAGE: u32;
override PAGES: u32;
override PART: u32;
override PART_FIRST: u32;
@group(0) @binding(6) var<storage, read> pages: array<u32>;

fn cache_row(sequence: u32, position: u32) -> u32 {
    return pages[sequence * PAGES + (position / PAGE) % PAGES] * PAGE + position % PAGE;
}
