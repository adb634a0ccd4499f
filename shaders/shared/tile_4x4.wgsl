// Fills slot `tile`: four tokens, and four rows of weights at a time; two where few lanes share them: as many sums as lanes.
#import lanes
const TOKENS = 4u;
const BATCH = min(4u, LANES / 4u);
const VALUES = TOKENS * BATCH;
