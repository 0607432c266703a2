//! Tiers of a cache on an emulated device that is as late as it may be: what is evicted goes down and
//! comes back to the bit, in whatever order streams and their events allow; an order that is not kept is
//! found out; and what a device or a system refuses costs what it says, and nothing else.
#![cfg(all(unix, feature = "emulate"))]

mod batches;
#[path = "../late_device/mod.rs"]
mod late_device;
mod orders;
mod refusals;
mod served;
#[path = "../tier_case/mod.rs"]
mod tier_case;
