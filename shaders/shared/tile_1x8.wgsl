// Fills slot `tile`: one token, and eight rows of weights at a time: FP4 codes take long to decode and little room.
const TOKENS = 1u;
const BATCH = 8u;
const VALUES = TOKENS * BATCH;
