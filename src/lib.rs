//! The KV cache of a language model as a library: block pool and tables, an exact prefix index,
//! paged attention on the CPU, a memory planner, and one C ABI over all of it.
//!
//! # Features
//! `std` (default): run-time CPU detection, threads, the cache facade, the panic guard. Without it
//! the crate is `no_std` + `alloc`: L0, L1, the kernels at the level the compiler was told of, and
//! the C ABI's nouns that need no more.
//!
//! `cuda`: embeds the GPU kernels, compiled by nvcc where the build finds it. `emulate`: compiles
//! the same kernels with the host's C++ compiler and runs them on the CPU, for tests.
#![cfg_attr(not(feature = "std"), no_std)]
#![deny(unsafe_op_in_unsafe_fn, missing_docs, clippy::undocumented_unsafe_blocks)]

extern crate alloc;

pub mod attention;
#[cfg(feature = "std")]
pub mod cache;
pub mod capi;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "std")]
pub mod device;
pub mod dtype;
#[cfg(feature = "emulate")]
pub mod emu;
pub mod error;
#[cfg(feature = "std")]
pub mod events;
pub mod ids;
pub mod kernels;
pub mod layout;
#[cfg(feature = "std")]
pub mod metrics;
pub mod plan;
pub mod pool;
pub mod prefix;
pub mod quant;
#[cfg(feature = "std")]
pub mod tier;

pub use error::{Error, Result, Status};

/// The Rust program of README.md, compiled and run as a doctest.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
