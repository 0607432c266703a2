//! The C ABI, version 0.1: one file a noun, in the order of the header that is made from them.
//!
//! Every function is a literal `extern "C"` item whose body is one `guard`: it checks, calls the
//! Rust API below, and answers with a status. Rules that hold for all of them, and that their
//! `# Safety` sections refer to:
//!
//! - a pointer is NULL, misaligned (both answered with an error), or valid for what its
//!   documentation says, for the time of the call; no pointer is kept after it unless that is said;
//! - memory that a call writes is used by nobody else during the call;
//! - handles may hold any value whatever: they are numbers, and checked;
//! - outputs are written only where the call succeeds.
//!
//! This is the only module with exported symbols. It knows the Rust API of the layers below and
//! adds nothing to it.
#![allow(non_camel_case_types)]

pub mod append;
pub mod attend;
#[cfg(feature = "std")]
pub mod cache;
#[cfg(feature = "std")]
pub mod cache_scales;
#[cfg(feature = "std")]
pub mod device;
#[cfg(feature = "std")]
mod device_args;
#[cfg(feature = "std")]
pub mod device_cascade;
#[cfg(all(test, feature = "std"))]
mod device_contract;
#[cfg(feature = "std")]
pub mod device_copy;
#[cfg(feature = "std")]
pub mod device_kernels;
#[cfg(feature = "std")]
pub mod device_merge;
#[cfg(feature = "std")]
pub mod device_prefix;
#[cfg(feature = "std")]
pub mod device_rates;
#[cfg(feature = "std")]
pub mod events;
pub mod info;
#[cfg(feature = "std")]
pub mod metrics;
#[cfg(feature = "std")]
pub mod onboard;
pub mod plan;
pub mod pool;
#[cfg(feature = "std")]
pub mod prefetch;
pub mod prefix;
pub mod prefix_step;
pub mod prefix_windows;
pub mod retention;
pub mod scales;
#[cfg(feature = "std")]
pub mod seq;
pub mod status;
#[cfg(feature = "std")]
pub mod step;
#[cfg(feature = "std")]
pub mod step_device;
#[cfg(feature = "std")]
pub mod tier;
#[cfg(feature = "std")]
pub mod tier_store;
pub mod tile;
#[cfg(feature = "std")]
pub mod transfer;

mod handle;
mod pointer;
mod shard;
mod threads;

pub use append::*;
pub use attend::*;
#[cfg(feature = "std")]
pub use cache::*;
#[cfg(feature = "std")]
pub use cache_scales::*;
#[cfg(feature = "std")]
pub use device::*;
#[cfg(feature = "std")]
pub use device_cascade::*;
#[cfg(feature = "std")]
pub use device_copy::*;
#[cfg(feature = "std")]
pub use device_kernels::*;
#[cfg(feature = "std")]
pub use device_merge::*;
#[cfg(feature = "std")]
pub use device_prefix::*;
#[cfg(feature = "std")]
pub use device_rates::*;
#[cfg(feature = "std")]
pub use events::*;
pub use info::*;
#[cfg(feature = "std")]
pub use metrics::*;
#[cfg(feature = "std")]
pub use onboard::*;
pub use plan::*;
pub use pool::*;
#[cfg(feature = "std")]
pub use prefetch::*;
pub use prefix::*;
pub use prefix_step::*;
pub use prefix_windows::*;
pub use retention::*;
pub use scales::*;
#[cfg(feature = "std")]
pub use seq::*;
pub use status::*;
#[cfg(feature = "std")]
pub use step::*;
#[cfg(feature = "std")]
pub use step_device::*;
#[cfg(feature = "std")]
pub use tier::*;
#[cfg(feature = "std")]
pub use tier_store::*;
pub use tile::*;
#[cfg(feature = "std")]
pub use transfer::*;
