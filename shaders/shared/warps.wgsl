// warps: groups of LANES lanes that share a row: as many as its sixteens keep busy, at most 8. The device sets it, which
// knows LANES.
#import lanes
override WARPS: u32;
