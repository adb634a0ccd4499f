// Fills slot `tile`: one token, and two rows of weights at a time.
const TOKENS = 1u;
const BATCH = 2u;
const VALUES = TOKENS * BATCH;
