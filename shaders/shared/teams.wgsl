// teams: TEAMS groups of LANES lanes, at most eight, that share the slots of all routes of a token: SLOTS for each, as in warps.
// The device sets both, which knows LANES.
#import lanes
override SLOTS: u32;
override TEAMS: u32;
