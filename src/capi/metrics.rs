//! The metrics noun: what a cache counted and timed, as numbers and as text.

use core::ffi::c_char;
use core::fmt;

use super::cache::{kvc_cache, open};
use super::pointer::{self, Plain};
use super::status::{guard, kvc_status};
use crate::error::Error;
use crate::metrics::{BUCKETS_MS, Histogram};

/// How often times fell into which bucket. The upper bounds, in milliseconds: 1, 2, 5, 10, 20, 50,
/// 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 30000, 60000, 120000, 300000, 600000, 1200000,
/// 1800000; the last bucket has what is above them all. This struct never grows.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_histogram {
    /// Times in each bucket.
    pub counts: [u64; 22],
    /// All times together, in milliseconds.
    pub sum_ms: u64,
}

const _: () = assert!(BUCKETS_MS.len() + 1 == 22);

impl From<Histogram> for kvc_histogram {
    fn from(Histogram { counts, sum_ms }: Histogram) -> Self {
        Self { counts, sum_ms }
    }
}

/// Everything that a cache counts and times. Block counts are of the first layer group.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_metrics {
    /// Blocks of the pool.
    pub blocks: u32,
    /// Blocks that sequences use.
    pub referenced_blocks: u32,
    /// Blocks that only the prefix index holds.
    pub cached_blocks: u32,
    /// Live sequences.
    pub sequences: u32,
    /// Prompt tokens given to kvc_seq_start.
    pub queries_tokens: u64,
    /// Those of them that were found.
    pub hits_tokens: u64,
    /// Entries that left the prefix index because their room was needed.
    pub evicted_capacity_blocks: u64,
    /// Entries that left it by kvc_cache_clear_prefix.
    pub evicted_cleared_blocks: u64,
    /// Calls that found too few blocks.
    pub out_of_blocks: u64,
    /// How many they lacked, all together.
    pub missing_blocks: u64,
    /// Calls that found every sequence in use.
    pub out_of_sequences: u64,
    /// KV events that were dropped because nobody took them in time.
    pub dropped_events: u64,
    /// Times are kept for one block in this many: what kvc_metrics_watch set; 0 for none.
    pub watched_every: u32,
    /// 0.
    pub reserved: u32,
    /// From becoming cached to being evicted, of watched blocks.
    pub lifetime: kvc_histogram,
    /// From the last use to being evicted, of watched blocks.
    pub idle_before_evict: kvc_histogram,
    /// From a use to the next, of watched blocks.
    pub reuse_gap: kvc_histogram,
    /// Blocks of layer groups with a window that were given up alone; their entries stayed.
    pub evicted_window_blocks: u64,
}

// SAFETY: integers.
unsafe impl Plain for kvc_metrics {}

/// Size of [`kvc_metrics`] in ABI 0.1.
const METRICS_FIRST_BYTES: usize = 640;
const _: () = assert!(size_of::<kvc_metrics>() == METRICS_FIRST_BYTES + 8);

/// Writes the cache's metrics to `out`, `out_bytes` (its sizeof) at most.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out` is writable for `out_bytes` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_metrics_read(
    cache: *const kvc_cache,
    out: *mut kvc_metrics,
    out_bytes: u64,
) -> kvc_status {
    guard(|| {
        let metrics = open(cache)?.lock()?.metrics();
        let [evicted_capacity_blocks, evicted_cleared_blocks, evicted_window_blocks] =
            metrics.counters.evicted_blocks;
        let values = kvc_metrics {
            blocks: metrics.blocks,
            referenced_blocks: metrics.referenced_blocks,
            cached_blocks: metrics.cached_blocks,
            sequences: metrics.sequences,
            queries_tokens: metrics.queries_tokens,
            hits_tokens: metrics.hits_tokens,
            evicted_capacity_blocks,
            evicted_cleared_blocks,
            out_of_blocks: metrics.counters.out_of_blocks,
            missing_blocks: metrics.counters.missing_blocks,
            out_of_sequences: metrics.counters.out_of_sequences,
            dropped_events: metrics.dropped_events,
            watched_every: metrics.watched_every,
            reserved: 0,
            lifetime: metrics.lifetime.into(),
            idle_before_evict: metrics.idle_before_evict.into(),
            reuse_gap: metrics.reuse_gap.into(),
            evicted_window_blocks,
        };
        // SAFETY: the caller's promise.
        unsafe { pointer::write(out, out_bytes, values, "out", METRICS_FIRST_BYTES) }
    })
}

/// Writes the cache's metrics as Prometheus reads them (text format 0.0.4, vLLM's names with the
/// prefix "kvcache:") to `buf` as snprintf would, and the length of the whole text in bytes, the
/// NUL not counted, to `out_len`. `buf` may be NULL with a `len` of 0; 8 KiB are enough.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `buf` is writable for `len` bytes, `out_len` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_metrics_text(
    cache: *const kvc_cache,
    buf: *mut c_char,
    len: u64,
    out_len: *mut u64,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let out_len = unsafe { pointer::out(out_len, "out_len") }?;
        let metrics = open(cache)?.lock()?.metrics();
        let room = if buf.is_null() { 0 } else { len };
        // SAFETY: the caller's promise.
        let bytes = unsafe { pointer::slice_out(buf.cast::<u8>(), room, "buf") }?;
        let mut text = Text { bytes, len: 0 };
        // Writing there cannot fail: what does not fit is counted.
        metrics.write_prometheus(&mut text).map_err(|_| Error::Panic)?;
        if let Some(last) = text.bytes.len().checked_sub(1) {
            text.bytes[text.len.min(last)] = 0;
        }
        out_len.write(text.len as u64);
        Ok(())
    })
}

/// A caller's buffer that is written as far as it goes.
struct Text<'a> {
    bytes: &'a mut [u8],
    /// Of the whole text.
    len: usize,
}

impl fmt::Write for Text<'_> {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        if let Some(room) = self.bytes.get_mut(self.len..) {
            let fits = part.len().min(room.len());
            room[..fits].copy_from_slice(&part.as_bytes()[..fits]);
        }
        self.len += part.len();
        Ok(())
    }
}

/// Keeps the times of every `every`-th block from now on, for the histograms, which begin anew; 0
/// (how a cache begins) for none. The clock is read once in each kvc_step_begin and kvc_seq_start,
/// or never after kvc_metrics_set_time.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_metrics_watch(cache: *mut kvc_cache, every: u32) -> kvc_status {
    guard(|| open(cache)?.lock()?.watch_blocks(every))
}

/// Sets the time, in milliseconds since whenever the caller likes; the system's clock is not read
/// from now on. Earlier than before counts as no time passed.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_metrics_set_time(cache: *mut kvc_cache, now_ms: u64) -> kvc_status {
    guard(|| {
        open(cache)?.lock()?.set_time(now_ms);
        Ok(())
    })
}
