//! The devices that a test runs on beside the CPU: the emulator where it is built in, and a GPU
//! where there is one. `KVCACHE_REQUIRE_GPU=1` makes a missing GPU a failure.
#![allow(dead_code)]

use std::sync::Arc;

use kvcache::device::{Backend, Device, open};

/// A GPU, or `None` with a line that says why not.
pub fn gpu() -> Option<Arc<dyn Backend>> {
    match open(Device::Cuda { ordinal: 0 }) {
        Ok(backend) => Some(backend),
        Err(error) => {
            let required = std::env::var("KVCACHE_REQUIRE_GPU").is_ok_and(|value| value == "1");
            assert!(!required, "KVCACHE_REQUIRE_GPU is set: {error}");
            println!("skipped: no GPU ({error})");
            None
        }
    }
}

/// Every device of this build and machine.
pub fn all() -> Vec<Arc<dyn Backend>> {
    let mut all = Vec::new();
    if cfg!(feature = "emulate") {
        all.push(open(Device::Emu).unwrap());
    }
    all.extend(gpu());
    all
}
