// Fills slot `tile`: eight tokens and two rows of weights a lane: a weight is read once for all eight.
const TOKENS = 8u;
const ROWS = 2u;
