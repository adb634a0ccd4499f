// Fills slot `tile`: one token a workgroup, for decode.
const TOKENS = 1u;
