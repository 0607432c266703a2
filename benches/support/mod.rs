//! What the benches share: memory that is not in a cache, a plain read of it, rows
//! of codes, medians.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use kvcache::attention::HeadShape;
use kvcache::cpu::{AppendArgs, Executor, KvView, RowsView, Threads, append};
use kvcache::dtype::DType;
use kvcache::layout::GroupLayout;

/// Numbers in -1..1, pseudo-random.
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

/// Zeros, in huge pages where the system has them, as a cache's memory is; in small ones with
/// SMALL_PAGES in the environment.
#[allow(dead_code, reason = "not every bench has so much memory")]
pub fn huge<T: Clone + From<u8>>(count: usize) -> Vec<T> {
    let mut memory: Vec<T> = Vec::with_capacity(count);
    #[cfg(target_os = "linux")]
    {
        unsafe extern "C" {
            fn madvise(at: *mut u8, bytes: usize, advice: i32) -> i32;
        }
        let spare: &mut [std::mem::MaybeUninit<T>] = memory.spare_capacity_mut();
        let bytes = count * size_of::<T>();
        let at = spare.as_mut_ptr().cast::<u8>();
        let skip = at.align_offset(4096);
        if std::env::var_os("SMALL_PAGES").is_none() && bytes > skip + 4096 {
            // SAFETY: advice about our own pages; MADV_HUGEPAGE changes no contents.
            unsafe { madvise(at.wrapping_add(skip), (bytes - skip) & !4095, 14) };
        }
    }
    memory.resize(count, T::from(0));
    memory
}

/// Reads every byte of `memory` once, with `pool`'s threads: with hints to the memory a little
/// ahead, or without. Returns a checksum.
pub fn read_all(pool: &Threads, memory: &[u64], hints: bool) -> u64 {
    const CHUNK: usize = 1 << 17; // 1 MiB
    read_parts(pool, memory.chunks(CHUNK).len(), hints, &|i| {
        &memory[i * CHUNK..((i + 1) * CHUNK).min(memory.len())]
    })
}

/// The same block by block, in the order of a table: consecutive parts of it to each thread.
#[allow(dead_code, reason = "not every bench has tables")]
pub fn read_blocks(
    pool: &Threads,
    memory: &[u64],
    block_words: usize,
    table: &[i32],
    hints: bool,
) -> u64 {
    read_parts(pool, table.len(), hints, &|i| {
        &memory[table[i] as usize * block_words..][..block_words]
    })
}

fn read_parts<'a>(
    pool: &Threads,
    count: usize,
    hints: bool,
    part: &(dyn Fn(usize) -> &'a [u64] + Sync),
) -> u64 {
    let sum = AtomicUsize::new(0);
    // Few and large jobs: handing one out takes time.
    let jobs = count.div_ceil(16);
    pool.run(jobs, &|_, job| {
        for i in job * 16..count.min((job + 1) * 16) {
            let chunk = part(i);
            let one = if hints { read_chunk::<true>(chunk) } else { read_chunk::<false>(chunk) };
            sum.fetch_add(one as usize, Ordering::Relaxed);
        }
    });
    sum.into_inner() as u64
}

fn read_chunk<const HINTS: bool>(chunk: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: detected.
        return unsafe { read_avx512::<HINTS>(chunk) };
    }
    let mut sums = [0u64; 64];
    let (rows, rest) = chunk.as_chunks::<64>();
    for row in rows {
        for (sum, x) in sums.iter_mut().zip(row) {
            *sum = sum.wrapping_add(*x);
        }
    }
    sums.iter().chain(rest).fold(0, |a, &b| a.wrapping_add(b))
}

/// Sums with eight vector accumulators, so that loads and nothing else are the limit.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn read_avx512<const HINTS: bool>(chunk: &[u64]) -> u64 {
    use std::arch::x86_64::*;
    let mut sums = [_mm512_setzero_si512(); 8];
    let (rows, rest) = chunk.as_chunks::<64>();
    for row in rows {
        for (i, sum) in sums.iter_mut().enumerate() {
            let line = row[8 * i..].as_ptr();
            if HINTS {
                // SAFETY: a prefetch of any address is harmless (newer compilers know, 1.89 does not).
                #[allow(unused_unsafe)]
                unsafe {
                    _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(256).cast())
                };
            }
            // SAFETY: eight words of the row are left.
            *sum = _mm512_add_epi64(*sum, unsafe { _mm512_loadu_si512(line.cast()) });
        }
    }
    let total = sums.iter().fold(0u64, |a, &b| a.wrapping_add(_mm512_reduce_add_epi64(b) as u64));
    rest.iter().fold(total, |a, &b| a.wrapping_add(b))
}

/// Fills blocks of one quantised layer with random rows, as append writes them.
#[allow(dead_code, reason = "not every bench has codes")]
pub fn encode(layout: &GroupLayout, memory: &mut [u64], blocks: u32) {
    let spec = layout.spec();
    let (heads, tokens) = (spec.kv_heads, layout.block_tokens());
    let pool = Threads::new(0).unwrap();
    let v_dim = if spec.v_in_k { 0 } else { spec.v_dim };
    let rows = tokens as usize * heads as usize;
    let (k_row, v_row) = (spec.k_dim as usize, v_dim as usize);
    // A few hundred blocks' rows, over and over.
    let count = blocks.min(256);
    let mut rows = vec![0.0f32; count as usize * rows * (k_row + v_row)];
    random_kv(rows.len(), 1, |i, x| rows[i] = x);
    let k = rows.as_mut_ptr();
    let v = k.wrapping_add(count as usize * tokens as usize * heads as usize * k_row);
    let view = |ptr: *mut f32, dim| RowsView::contiguous(ptr.cast(), DType::F32, heads, dim);
    for first in (0..blocks).step_by(count as usize) {
        let end = blocks.min(first + count);
        let slots: Vec<i64> = (first * tokens..end * tokens).map(i64::from).collect();
        let args = AppendArgs {
            shape: HeadShape {
                q_heads: heads,
                kv_heads: heads,
                k_dim: spec.k_dim,
                v_dim: spec.v_dim,
                v_in_k: spec.v_in_k,
            },
            kv: KvView::native(layout, memory.as_mut_ptr().cast(), blocks, 0).unwrap(),
            slots: slots.as_ptr(),
            rows: slots.len() as u32,
            k: view(k, spec.k_dim),
            v: view(v, spec.v_dim),
            rope: None,
        };
        // SAFETY: the buffers have these sizes, and slots are distinct.
        unsafe { append(&args, &pool) }.unwrap();
    }
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
