// Fills slot `tile`: one token and two rows of weights a lane, which share what is read of the token's row.
const TOKENS = 1u;
const ROWS = 2u;
