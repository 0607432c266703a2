//! Who does the work of a call without a handle: the caller, or threads that all calls share.

use crate::cpu::{Executor, Serial};
use crate::error::{Error, Result};

/// The workers that a workspace must serve.
pub(super) fn workers(threads: u32) -> Result<usize> {
    with(threads, |executor| Ok(executor.workers()))
}

/// Calls `call` with the executor that `threads` means.
pub(super) fn with<R>(threads: u32, call: impl FnOnce(&dyn Executor) -> Result<R>) -> Result<R> {
    match threads {
        1 => call(&Serial),
        #[cfg(feature = "std")]
        0 => call(a_thread_a_core()?),
        #[cfg(not(feature = "std"))]
        0 => Err(Error::Unsupported { what: "threads other than the caller's" }),
        _ => Err(Error::invalid("threads", "must be 0 or 1")),
    }
}

/// Threads that all calls share, and nobody ends.
#[cfg(feature = "std")]
fn a_thread_a_core() -> Result<&'static crate::cpu::Threads> {
    static THREADS: std::sync::OnceLock<Result<crate::cpu::Threads>> = std::sync::OnceLock::new();
    THREADS.get_or_init(|| crate::cpu::Threads::new(0)).as_ref().map_err(|&error| error)
}
