//! How work is spread: a call hands numbered units to an [`Executor`], which runs each once.
//!
//! Results never depend on which worker runs a unit or in what order, so an executor may do as it
//! likes. This file knows no threads; the pool that has them lives in a higher layer.

/// Runs numbered units of work, perhaps on several threads.
///
/// # Safety
/// Kernels write through raw pointers on the strength of two promises, which an implementation
/// must keep: `run` calls `unit` exactly once for each index below `units` before it returns (or
/// unwinds), and no two calls that overlap in time get the same worker number, which is always
/// below [`workers`](Executor::workers).
pub unsafe trait Executor {
    /// How many units may run at the same time: at least 1, the same at every call.
    fn workers(&self) -> usize;

    /// Calls `unit(worker, index)` for every index in `0..units` and returns when all are done.
    fn run(&self, units: usize, unit: &(dyn Fn(usize, usize) + Sync));
}

/// Runs every unit on the calling thread, in order.
#[derive(Debug, Clone, Copy, Default)]
pub struct Serial;

// SAFETY: one thread, one worker, each index once.
unsafe impl Executor for Serial {
    fn workers(&self) -> usize {
        1
    }

    fn run(&self, units: usize, unit: &(dyn Fn(usize, usize) + Sync)) {
        for index in 0..units {
            unit(0, index);
        }
    }
}
