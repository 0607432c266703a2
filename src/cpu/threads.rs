//! Threads for kernels: a rayon pool of its own a cache, so that an engine's
//! other work and other caches are not disturbed.

use core::sync::atomic::{AtomicUsize, Ordering};

use super::Executor;
use crate::error::{Error, Result};

/// Runs units of work on `workers` threads; with one, on the caller's.
#[derive(Debug)]
pub struct Threads {
    pool: Option<rayon::ThreadPool>,
    workers: usize,
}

impl Threads {
    /// `count` threads; 0 for as many as the machine has cores.
    ///
    /// # Errors
    /// `InvalidArgument` past 1024, `OutOfMemory` where the system gives no thread.
    pub fn new(count: u32) -> Result<Self> {
        let workers = match count {
            0 => std::thread::available_parallelism().map_or(1, usize::from).min(1024),
            1..=1024 => count as usize,
            _ => return Err(Error::invalid("threads", "must be at most 1024")),
        };
        if workers == 1 {
            return Ok(Self { pool: None, workers });
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(workers)
            .thread_name(|n| format!("kvcache-{n}"))
            .build()
            .map_err(|_| Error::OutOfMemory { bytes: 0 })?;
        Ok(Self { pool: Some(pool), workers })
    }
}

// SAFETY: the counter gives each index once, `broadcast` returns when every worker has, and a worker
// of the pool has one index.
unsafe impl Executor for Threads {
    fn workers(&self) -> usize {
        self.workers
    }

    fn run(&self, units: usize, work: &(dyn Fn(usize, usize) + Sync)) {
        let Some(pool) = self.pool.as_ref().filter(|_| units > 1) else {
            return (0..units).for_each(|unit| work(0, unit));
        };
        let next = AtomicUsize::new(0);
        pool.broadcast(|context| {
            // Relaxed: the counter only deals units out; broadcast itself orders the results.
            loop {
                let unit = next.fetch_add(1, Ordering::Relaxed);
                if unit >= units {
                    break;
                }
                work(context.index(), unit);
            }
        });
    }
}
