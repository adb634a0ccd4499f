// Fills slot `tile`: eight tokens a workgroup, so that a weight is read once for all of them.
const TOKENS = 8u;
