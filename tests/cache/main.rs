//! The facade: what attention reads of random lives (`lives.rs`, `harness.rs`) against the plainest model
//! there is (`model.rs`), which blocks are shared, kept and left, formats stored token by token, misuse.

#[path = "../backends/mod.rs"]
mod backends;
mod blocks;
mod codes;
mod harness;
mod lives;
mod misuse;
mod model;
