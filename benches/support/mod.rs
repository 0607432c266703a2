//! What the benches share: threads, memory that is not in a cache, a plain read of it, medians.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use kvcache::cpu::Executor;

/// A rayon pool as an executor.
pub struct Pool {
    pool: rayon::ThreadPool,
    workers: usize,
}

impl Pool {
    pub fn new(workers: usize) -> Self {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(workers).build().unwrap();
        Pool { pool, workers }
    }
}

// SAFETY: a counter hands out each index once, and each task has its own number.
unsafe impl Executor for Pool {
    fn workers(&self) -> usize {
        self.workers
    }

    fn run(&self, units: usize, unit: &(dyn Fn(usize, usize) + Sync)) {
        let next = AtomicUsize::new(0);
        let work = |worker| {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= units {
                    break;
                }
                unit(worker, index);
            }
        };
        self.pool.scope(|scope| {
            for worker in 1..self.workers {
                let work = &work;
                scope.spawn(move |_| work(worker));
            }
            work(0);
        });
    }
}

/// SplitMix64 over bytes that are small normal numbers in every 16- and 32-bit format.
pub fn random_kv(elements: usize, seed: u64, mut put: impl FnMut(usize, f32)) {
    let mut state = seed;
    for i in 0..elements {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = state;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x ^= x >> 27;
        put(i, (x >> 40) as f32 / (1 << 23) as f32 - 1.0);
    }
}

/// Reads every byte of `memory` once, with `pool`'s threads; returns a checksum.
pub fn read_all(pool: &Pool, memory: &[u64]) -> u64 {
    const CHUNK: usize = 1 << 17; // 1 MiB
    let sum = AtomicUsize::new(0);
    pool.run(memory.len().div_ceil(CHUNK), &|_, i| {
        let chunk = &memory[i * CHUNK..((i + 1) * CHUNK).min(memory.len())];
        sum.fetch_add(read_chunk(chunk) as usize, Ordering::Relaxed);
    });
    sum.into_inner() as u64
}

fn read_chunk(chunk: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: detected.
        return unsafe { read_avx512(chunk) };
    }
    read_plain(chunk)
}

#[inline(always)]
fn read_plain(chunk: &[u64]) -> u64 {
    let mut sums = [0u64; 64];
    let (rows, rest) = chunk.as_chunks::<64>();
    for row in rows {
        for (sum, x) in sums.iter_mut().zip(row) {
            *sum = sum.wrapping_add(*x);
        }
    }
    sums.iter().chain(rest).fold(0, |a, &b| a.wrapping_add(b))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn read_avx512(chunk: &[u64]) -> u64 {
    read_plain(chunk)
}

/// Seconds that `work` takes.
pub fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

/// The median, and the spread between the quartiles.
pub fn median(mut xs: Vec<f64>) -> (f64, f64, f64) {
    xs.sort_by(f64::total_cmp);
    (xs[xs.len() / 2], xs[xs.len() / 4], xs[xs.len() * 3 / 4])
}
