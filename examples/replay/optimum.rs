//! What a cache that knew the future would have hit: Belady's optimum, bypassing allowed, and the
//! ideal of a cache without bounds.
//!
//! A block is used whenever a longer prefix is, so at any time the blocks of a request that are
//! needed again next are those of its beginning, and all blocks that are next used by the same
//! request can be counted together: identities do not matter. What goes is what is needed last, and
//! what is not needed again is never kept.

use std::collections::BTreeMap;

use crate::trace::{Ids, Trace};

/// When the blocks of each request are used next.
pub struct Future {
    /// For each request: the next requests that use blocks of it, and how many blocks each.
    next: Vec<Vec<(u32, u64)>>,
    /// Blocks of all requests that an earlier one had.
    pub ideal_hit_blocks: u64,
    /// Different blocks.
    pub distinct_blocks: u64,
}

impl Future {
    pub fn of(trace: &Trace) -> Future {
        // For each space the ids seen so far, from the end of the trace: runs to their next use.
        let mut seen: BTreeMap<(u32, u32), (u32, u32)> = BTreeMap::new();
        let mut next = vec![Vec::new(); trace.requests.len()];
        let (mut ideal_hit_blocks, mut references) = (0, 0);
        for (n, request) in trace.requests.iter().enumerate().rev() {
            for &run in trace.ids_of(request) {
                references += u64::from(run.count);
                let found = take(&mut seen, request.space, run, n as u32);
                for (user, count) in found {
                    ideal_hit_blocks += u64::from(count);
                    next[n].push((user, u64::from(count)));
                }
            }
        }
        Future { next, ideal_hit_blocks, distinct_blocks: references - ideal_hit_blocks }
    }

    /// Hits of the optimum with room for `capacity` blocks.
    pub fn optimum(&self, capacity: u64) -> u64 {
        let (mut kept, mut total, mut hits) = (BTreeMap::<u32, u64>::new(), 0, 0);
        for (n, next) in self.next.iter().enumerate() {
            let hit = kept.remove(&(n as u32)).unwrap_or(0);
            hits += hit;
            total -= hit;
            for &(user, count) in next {
                *kept.entry(user).or_default() += count;
                total += count;
            }
            while total > capacity {
                let Some(mut last) = kept.last_entry() else { break };
                let gone = (total - capacity).min(*last.get());
                *last.get_mut() -= gone;
                total -= gone;
                if *last.get() == 0 {
                    last.remove();
                }
            }
        }
        hits
    }
}

/// Marks the ids of `run` as used by request `user`; returns who used parts of it before, and how
/// many ids each.
fn take(
    seen: &mut BTreeMap<(u32, u32), (u32, u32)>,
    space: u32,
    run: Ids,
    user: u32,
) -> Vec<(u32, u32)> {
    let (start, end) = (run.start, run.start + run.count);
    let mut found = Vec::new();
    // Runs that begin before the end of this one, from the last back to the one over its start.
    loop {
        let before = seen.range((space, 0)..(space, end)).next_back();
        let Some((&(_, first), &(last, by))) = before.filter(|(_, (last, _))| *last > start) else {
            break;
        };
        seen.remove(&(space, first));
        found.push((by, last.min(end) - first.max(start)));
        if last > end {
            seen.insert((space, end), (last, by));
        }
        if first < start {
            seen.insert((space, first), (start, by));
            break;
        }
    }
    seen.insert((space, start), (end, user));
    found
}
