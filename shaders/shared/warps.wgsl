// warps: groups of LANES lanes that share a row. The sums of its spans, of LANES sixteens each, stand in SLOTS slots, as many
// as there are spans but at most 8: the device sets it, which knows LANES. A group has SPANS slots: 1, or 2, so
// that it always comes back to the same ones; 2 where fold_shared has room for four groups only.
#import lanes
override SLOTS: u32;
override SPANS: u32 = 1u;
override WARPS: u32 = (SLOTS + SPANS - 1u) / SPANS;
