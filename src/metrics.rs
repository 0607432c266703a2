//! What a cache counts and times, and its text for Prometheus, under vLLM's names with the prefix
//! `kvcache:`.
//!
//! Counters cost an addition where the thing happens. Times are kept for every n-th block only, and
//! only where asked for ([`Watch`]); the clock is read by whoever calls, once a step. This file
//! knows no cache: it is told numbers.

use alloc::vec::Vec;
use core::fmt::{self, Write};

use crate::error::{Error, Result};
use crate::ids::BlockId;

/// Upper bounds of the histograms' buckets, in milliseconds: 1 ms to half an hour.
pub const BUCKETS_MS: [u64; 21] = [
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 30_000, 60_000,
    120_000, 300_000, 600_000, 1_200_000, 1_800_000,
];

/// How often times fell into which bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Histogram {
    /// Times in each bucket of [`BUCKETS_MS`], and in the last those above all bounds.
    pub counts: [u64; BUCKETS_MS.len() + 1],
    /// All times together, in milliseconds.
    pub sum_ms: u64,
}

impl Histogram {
    /// Counts a time.
    pub fn observe(&mut self, ms: u64) {
        self.counts[BUCKETS_MS.partition_point(|&bound| bound < ms)] += 1;
        self.sum_ms = self.sum_ms.saturating_add(ms);
    }

    /// How many times were counted.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// Why a block left the prefix index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Evicted {
    /// Its room was needed.
    Capacity,
    /// The index was cleared.
    Cleared,
    /// Its room was needed in a layer group with a window, which had left it behind: only that
    /// group's block went, not the entry.
    Window,
}

impl Evicted {
    /// Every reason, in the order of [`Counters::evicted_blocks`].
    pub const ALL: [Evicted; 3] = [Evicted::Capacity, Evicted::Cleared, Evicted::Window];

    /// The label of the metric.
    pub const fn name(self) -> &'static str {
        match self {
            Evicted::Capacity => "capacity",
            Evicted::Cleared => "cleared",
            Evicted::Window => "window",
        }
    }
}

/// What happened since a cache was created, beside its totals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Entries that left the prefix index, by reason, in the order of [`Evicted::ALL`].
    pub evicted_blocks: [u64; Evicted::ALL.len()],
    /// Calls that found too few blocks.
    pub out_of_blocks: u64,
    /// How many they lacked, all together.
    pub missing_blocks: u64,
    /// Calls that found every sequence in use.
    pub out_of_sequences: u64,
}

/// When the blocks of a pool became cached and were last used, for every n-th of them.
#[derive(Debug)]
pub struct Watch {
    every: u32,
    /// Of block `n * every`: cached and last used, in milliseconds on the caller's clock. They wrap
    /// after 49 days, and only differences are used.
    times: Vec<[u32; 2]>,
    /// From becoming cached to being evicted.
    pub lifetime: Histogram,
    /// From the last use to being evicted.
    pub idle_before_evict: Histogram,
    /// From a use to the next.
    pub reuse_gap: Histogram,
}

impl Watch {
    /// Watches each `every`-th of `blocks` blocks.
    ///
    /// # Errors
    /// `InvalidArgument` for an `every` of 0, `OutOfMemory` where 8 bytes a watched block are
    /// refused.
    pub fn new(every: u32, blocks: u32) -> Result<Self> {
        if every == 0 {
            return Err(Error::invalid("every", "must be at least 1"));
        }
        let mut times = Vec::new();
        let watched = blocks.div_ceil(every) as usize;
        let refused = Error::OutOfMemory { bytes: watched as u64 * 8 };
        times.try_reserve_exact(watched).map_err(|_| refused)?;
        times.resize(watched, [0; 2]);
        let none = Histogram::default();
        Ok(Watch { every, times, lifetime: none, idle_before_evict: none, reuse_gap: none })
    }

    /// Which blocks are watched: those whose id is a multiple of this.
    pub fn every(&self) -> u32 {
        self.every
    }

    fn times(&mut self, block: BlockId) -> Option<&mut [u32; 2]> {
        let watched = block.0.is_multiple_of(self.every);
        self.times.get_mut((block.0 / self.every) as usize).filter(|_| watched)
    }

    /// A block became cached.
    pub fn cached(&mut self, block: BlockId, now_ms: u64) {
        if let Some(times) = self.times(block) {
            *times = [now_ms as u32; 2];
        }
    }

    /// A cached block was used.
    pub fn used(&mut self, block: BlockId, now_ms: u64) {
        if let Some([_, last]) = self.times(block) {
            let gap = (now_ms as u32).wrapping_sub(*last);
            *last = now_ms as u32;
            self.reuse_gap.observe(gap.into());
        }
    }

    /// A cached block was evicted.
    pub fn evicted(&mut self, block: BlockId, now_ms: u64) {
        if let Some(&mut [cached, last]) = self.times(block) {
            self.lifetime.observe((now_ms as u32).wrapping_sub(cached).into());
            self.idle_before_evict.observe((now_ms as u32).wrapping_sub(last).into());
        }
    }
}

/// Everything about a cache at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheMetrics {
    /// Blocks of the pool, and how many of them sequences use or the prefix index holds.
    pub blocks: u32,
    /// Blocks that sequences use.
    pub referenced_blocks: u32,
    /// Blocks that only the prefix index holds.
    pub cached_blocks: u32,
    /// Live sequences.
    pub sequences: u32,
    /// Prompt tokens that were looked up.
    pub queries_tokens: u64,
    /// Those of them that were found.
    pub hits_tokens: u64,
    /// What happened since creation.
    pub counters: Counters,
    /// Blocks whose times are kept: one in this many; 0 for none.
    pub watched_every: u32,
    /// From becoming cached to being evicted, of watched blocks.
    pub lifetime: Histogram,
    /// From the last use to being evicted, of watched blocks.
    pub idle_before_evict: Histogram,
    /// From a use to the next, of watched blocks.
    pub reuse_gap: Histogram,
    /// KV events that were dropped because nobody took them.
    pub dropped_events: u64,
}

impl CacheMetrics {
    /// Writes all metrics as Prometheus reads them (text format 0.0.4).
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_prometheus(&self, out: &mut dyn Write) -> fmt::Result {
        let used = f64::from(self.referenced_blocks) / f64::from(self.blocks);
        let held = f64::from(self.referenced_blocks + self.cached_blocks) / f64::from(self.blocks);
        head(out, "kv_cache_usage_perc", "gauge", "Share of blocks that sequences use, 0 to 1.")?;
        writeln!(out, "kvcache:kv_cache_usage_perc {used}")?;
        head(out, "kv_cache_filled_perc", "gauge", "Share of blocks used or cached, 0 to 1.")?;
        writeln!(out, "kvcache:kv_cache_filled_perc {held}")?;
        head(out, "num_sequences", "gauge", "Live sequences.")?;
        writeln!(out, "kvcache:num_sequences {}", self.sequences)?;
        let counters = [
            ("prefix_cache_queries", "Prompt tokens looked up.", self.queries_tokens),
            ("prefix_cache_hits", "Prompt tokens found.", self.hits_tokens),
            ("allocation_failures", "Calls that lacked blocks.", self.counters.out_of_blocks),
            ("allocation_missing_blocks", "Blocks lacking.", self.counters.missing_blocks),
            ("sequence_failures", "Calls without a slot.", self.counters.out_of_sequences),
            ("kv_events_dropped", "KV events that nobody took.", self.dropped_events),
        ];
        for (name, help, value) in counters {
            total(out, name, help)?;
            writeln!(out, "kvcache:{name}_total {value}")?;
        }
        total(out, "kv_block_evictions", "Blocks that left the prefix index.")?;
        for (reason, count) in Evicted::ALL.iter().zip(self.counters.evicted_blocks) {
            let reason = reason.name();
            writeln!(out, "kvcache:kv_block_evictions_total{{reason=\"{reason}\"}} {count}")?;
        }
        for (name, help, times) in [
            ("kv_block_lifetime_seconds", "From cached to evicted.", &self.lifetime),
            (
                "kv_block_idle_before_evict_seconds",
                "From last use to evicted.",
                &self.idle_before_evict,
            ),
            ("kv_block_reuse_gap_seconds", "From a use to the next.", &self.reuse_gap),
        ] {
            histogram(out, name, help, times)?;
        }
        Ok(())
    }
}

fn head(out: &mut dyn Write, name: &str, kind: &str, help: &str) -> fmt::Result {
    writeln!(out, "# HELP kvcache:{name} {help}\n# TYPE kvcache:{name} {kind}")
}

fn total(out: &mut dyn Write, name: &str, help: &str) -> fmt::Result {
    writeln!(out, "# HELP kvcache:{name}_total {help}\n# TYPE kvcache:{name}_total counter")
}

fn histogram(out: &mut dyn Write, name: &str, help: &str, times: &Histogram) -> fmt::Result {
    head(out, name, "histogram", help)?;
    let mut below = 0;
    for (bound, count) in BUCKETS_MS.iter().zip(&times.counts) {
        below += count;
        let seconds = *bound as f64 / 1000.0;
        writeln!(out, "kvcache:{name}_bucket{{le=\"{seconds}\"}} {below}")?;
    }
    writeln!(out, "kvcache:{name}_bucket{{le=\"+Inf\"}} {}", times.count())?;
    writeln!(out, "kvcache:{name}_sum {}", times.sum_ms as f64 / 1000.0)?;
    writeln!(out, "kvcache:{name}_count {}", times.count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_fall_into_the_bucket_that_ends_at_or_above_them() {
        let mut times = Histogram::default();
        for ms in [0, 1, 2, 3, 1_800_000, 1_800_001, u64::MAX] {
            times.observe(ms);
        }
        assert_eq!((times.counts[0], times.counts[1], times.counts[2]), (2, 1, 1));
        assert_eq!((times.counts[20], times.counts[21]), (1, 2));
        assert_eq!((times.count(), times.sum_ms), (7, u64::MAX));
    }

    #[test]
    fn watched_blocks_are_timed_and_others_are_not() {
        let mut watch = Watch::new(4, 10).unwrap();
        let start = u64::from(u32::MAX) - 50; // the clock wraps on the way
        for block in 0..10 {
            watch.cached(BlockId(block), start);
        }
        for block in [4, 5, 8, 11, u32::MAX] {
            watch.used(BlockId(block), start + 100);
            watch.used(BlockId(block), start + 107);
        }
        watch.evicted(BlockId(4), start + 1107);
        watch.evicted(BlockId(5), start + 1107);
        assert_eq!((watch.reuse_gap.count(), watch.reuse_gap.sum_ms), (4, 214));
        assert_eq!((watch.lifetime.count(), watch.lifetime.sum_ms), (1, 1107));
        assert_eq!((watch.idle_before_evict.count(), watch.idle_before_evict.sum_ms), (1, 1000));
        assert!(Watch::new(0, 10).is_err());
    }
}
