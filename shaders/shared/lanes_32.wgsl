// Fills slot `lanes`: 32 lanes share a row, on adapters whose subgroups have as many.
const LANES = 32u;
