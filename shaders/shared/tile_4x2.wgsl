// Fills slot `tile`: four tokens, and two rows of weights at a time.
const TOKENS = 4u;
const BATCH = 2u;
const VALUES = TOKENS * BATCH;
