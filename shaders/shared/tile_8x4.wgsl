// Fills slot `tile`: eight tokens and four rows of weights a lane, where there are many tokens: what is read of a token's
// row serves four.
const TOKENS = 8u;
const ROWS = 4u;
