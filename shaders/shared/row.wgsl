// row: who a row of the step is. Rows of several sequences may stand in one step.
struct Row {
    token: u32,
    sequence: u32, // which of the cache's sequences
    position: u32, // in that sequence, from 0
    pad: u32, // always 0: where a bound that the compiler does not know is wanted
}
