// Fills slot `tile`: two tokens, and four rows of weights at a time.
const TOKENS = 2u;
const BATCH = 4u;
const VALUES = TOKENS * BATCH;
