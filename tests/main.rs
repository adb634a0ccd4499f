//! The one integration binary. A line on what goes where:

mod harness; // device or visible failure, inputs, comparison (itself tested)

mod bench; // `fourfold bench`: JSON, charts, bad flags
mod certify; // the rule at length: one hash amid random neighbours, needles, drafts of all kinds; counts by environment
mod checkpoint; // malformed files: every one a clear error, in time, with no panic
mod cli; // the binary as a user meets it
mod drafts; // drafters that know the reply, for `schedule`, `speculate` and `certify`
mod draws; // tokens that the device draws: those that the host draws of the same logits, alone and among others
mod engine; // sessions: chunks, reuse, cutting back, cancelling, errors, several engines on one device
mod eval; // perplexity and divergence against plain sums; windows, references, the command
mod families; // Qwen3-MoE, Qwen3, Llama: every producer and mode against goldens of other people's code
mod faults; // planted faults, each of which `bisect` must name
mod format; // number formats against outside vectors, exhaustively
mod inspect; // `inspect` for every family and producer, bad scales; `trace` against calibration
mod isolation; // a model beside its twin and beside others: every layer's bits; a planted leak
mod kernels; // every kernel x shape x slot filling against its twin; bits independent of neighbours
mod loading; // large writes, memory that does not suffice, compiled pipelines on disk
mod models; // tiny checkpoints: GPU = twins = golden of other people's code
mod mutator; // breaks checkpoints for `checkpoint`
mod oracle; // known answers: every device right, every wrong device noticed; the trace that transformers recorded
mod producers; // one model as several producers write it, from end to end
mod quantize; // FP4 checkpoints that are made: names, bytes, exact casts, errors
mod schedule; // many sessions in one step: the tokens and bits of each alone, pages, prefixes, admission, cancels
mod shaders; // all slot fillings compose, validate, translate; Rust and WGSL agree on bindings (no GPU needed)
mod speculate; // drafts, good and hostile: tokens, bits and session of plain decoding
mod stored; // weights with their scales: every producer's tensors, every broken scale an error
mod text; // tokenizer, templates, Harmony against outside vectors
mod tidy; // the rules of the code base that a machine can check
mod trace_diff; // traces: their file, and what `diff` finds between two
mod verify;
mod w4a4; // quantised activations: the stage's twin, FP4 products and a MoE block against goldens // `fourfold verify`: it holds, it covers every kernel, each planted fault is caught; `--strict`
