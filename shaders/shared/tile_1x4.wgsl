// Fills slot `tile`: one token, and four rows of weights at a time.
const TOKENS = 1u;
const BATCH = 4u;
const VALUES = TOKENS * BATCH;
