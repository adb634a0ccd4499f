// Fills slot `lanes`: eight lanes share a row, on adapters whose subgroups are small or unknown.
const LANES = 8u;
