// warps: groups of LANES lanes that share a row. The sums of its spans, of LANES sixteens each, stand in SLOTS slots, as many
// as there are spans but at most 8: the device sets it, which knows LANES. A group has SPANS slots of every SLOTS.
#import lanes
override SLOTS: u32;
override SPANS: u32 = 1u;
override WARPS: u32 = (SLOTS + SPANS - 1u) / SPANS;
