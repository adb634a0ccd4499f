// Fills slot `tile`: one token and one row of weights a lane, for decode.
const TOKENS = 1u;
const ROWS = 1u;
