//! What an engine knows and an eviction policy does not: priorities and hints.
//!
//! They come before any policy: of all leaves those of the lowest class go first, and the policy
//! orders those of one class. From the first to go to the last: what a hint says is not needed any
//! more; priorities 0 to 35; what is expected again, the latest first; priorities 36 to 100; what
//! the queue waits for. Only pins are absolute.
//!
//! Time is the caller's, in milliseconds since whenever it likes, and stands still until
//! [`PrefixIndex::advance`]. An index that is never given a priority or a hint pays for neither.

use super::tree::{Kind, Mark};
use super::uses::{READINGS, SWEEP, clear_hint};
use super::{NIL, Position, PrefixIndex};
use crate::error::{Error, Result};

/// The priority of every block that was given none.
pub const DEFAULT_PRIORITY: u8 = 35;
/// The highest priority.
pub const MAX_PRIORITY: u8 = 100;

/// A priority for a range of a prefix's tokens. Blocks of a higher priority outlive those of a
/// lower one, as far as they are not above them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// The first token of the range.
    pub start: usize,
    /// The token after the last; `None` for all to the end of the prefix.
    pub end: Option<usize>,
    /// 0 to [`MAX_PRIORITY`].
    pub priority: u8,
    /// For how many ms after the prefix was last released the priority holds, at least 1; then it
    /// is [`DEFAULT_PRIORITY`] again. `None`: until another one is given.
    pub duration_ms: Option<u32>,
}

/// What is known of the next use of a prefix. Any use ends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hint {
    /// Nothing: takes an earlier hint back.
    None,
    /// There will be none: the session ended, the branch was given up.
    SessionEnded,
    /// It is expected at this time. When that has passed the prefix is an ordinary one, as recent
    /// as if it was used then.
    ExpectedAt {
        /// On the clock of [`PrefixIndex::advance`], less than 2^31 ms ahead.
        ms: u64,
    },
    /// A request that waits in the queue will make it.
    Waited,
}

impl PrefixIndex {
    /// The latest time that [`Self::advance`] takes: 139 years.
    pub const MAX_MS: u64 = (1 << 42) - 1;

    /// Sets the time, and ends the priorities and expectations that end by then: their blocks are
    /// then the most recently used ones of the default priority. An earlier time than the last one
    /// changes nothing. Costs nothing where nothing ends: call it in every step.
    ///
    /// # Errors
    /// `InvalidArgument` past [`Self::MAX_MS`]. Nothing changed then.
    pub fn advance(&mut self, now_ms: u64) -> Result<()> {
        if now_ms > Self::MAX_MS {
            return Err(Error::invalid("now_ms", "must be below 2^42"));
        }
        let now_ms = self.now_ms.max(now_ms);
        if now_ms >> SWEEP != self.now_ms >> SWEEP {
            self.end_expectations(now_ms);
        }
        self.now_ms = now_ms;
        self.clock = self.clock.max(self.now_ms << READINGS);
        self.expire_all();
        Ok(())
    }

    /// Gives priorities to the blocks of the prefix that ends at `at`, and makes it the most
    /// recently used. A range covers each block that it overlaps; where several do, the first in
    /// the list counts; blocks that none covers keep what they have. A later call overrides.
    ///
    /// A duration runs from the last [`Self::release`] of the prefix or a continuation of it, or
    /// from the last use where none is released. A further use that gives no priorities of its own
    /// keeps the priority, if it has not ended yet, and ends the duration. So an engine gives
    /// priorities after it locked or inserted the prefix, and before it releases it.
    ///
    /// # Errors
    /// `StaleHandle` if the prefix is no longer cached, `InvalidArgument` for a priority above 100,
    /// an empty range or a duration of 0, `OutOfMemory`. Nothing changed then.
    pub fn prioritize(&mut self, at: Position, ranges: &[Retention]) -> Result<()> {
        for range in ranges {
            if range.priority > MAX_PRIORITY {
                return Err(Error::invalid("priority", "must be 0 to 100"));
            }
            if range.end.is_some_and(|end| end <= range.start) {
                return Err(Error::invalid("range", "must end after its start"));
            }
            if range.duration_ms == Some(0) {
                return Err(Error::invalid("duration_ms", "must be at least 1"));
            }
        }
        let cuts = ranges.len().saturating_mul(2).min(at.blocks());
        let Some(end) = self.steer(at, cuts)? else { return Ok(()) };
        let block_tokens = self.blocks.block_tokens;
        let blocks = |range: &Retention| {
            // A range past the prefix covers nothing; block counts are below 2^30.
            let first = (range.start / block_tokens).min(at.blocks()) as u32;
            let last = range.end.map_or(at.blocks(), |end| end.div_ceil(block_tokens));
            first..last.min(at.blocks()) as u32
        };
        for range in ranges {
            let covered = blocks(range);
            if covered.start < covered.end {
                self.cut_path(end, covered.start);
                self.cut_path(end, covered.end);
            }
        }
        let mut node = end;
        while self.tree[node].kind == Kind::Edge {
            let edge = &mut self.tree[node];
            clear_hint(edge);
            let first = edge.end - edge.len;
            if let Some(range) = ranges.iter().find(|range| blocks(range).contains(&first)) {
                edge.priority = range.priority;
                // The default has nothing to fall back to.
                let timed = range.priority != DEFAULT_PRIORITY;
                edge.duration_ms = range.duration_ms.filter(|_| timed).unwrap_or(0);
            }
            node = self.tree.owner(node);
        }
        self.queue_if_leaf(end);
        Ok(())
    }

    /// Says what is known of the next use of the prefix that ends at `at`, for its blocks from
    /// `from_block` on; hints for those before it are taken back, since others may use them too.
    /// Makes the prefix the most recently used, but does not count as a use.
    ///
    /// An expectation takes the place of a priority that has a duration.
    ///
    /// # Errors
    /// `StaleHandle` if the prefix is no longer cached, `InvalidArgument` for a time 2^31 ms ahead
    /// or more, `OutOfMemory`. Nothing changed then.
    pub fn hint(&mut self, at: Position, from_block: usize, hint: Hint) -> Result<()> {
        let (mark, due) = match hint {
            Hint::None => (Mark::None, 0),
            Hint::SessionEnded => (Mark::Ended, 0),
            Hint::Waited => (Mark::Waited, 0),
            Hint::ExpectedAt { ms } if ms.saturating_sub(self.now_ms) > i32::MAX as u64 => {
                return Err(Error::invalid("ms", "must be less than 2^31 ms ahead"));
            }
            Hint::ExpectedAt { ms } => (Mark::Expected, ms.max(self.now_ms) as u32),
        };
        let Some(end) = self.steer(at, 1)? else { return Ok(()) };
        let from = from_block.min(at.blocks()) as u32;
        self.cut_path(end, from);
        let mut node = end;
        while self.tree[node].kind == Kind::Edge {
            let edge = &mut self.tree[node];
            clear_hint(edge);
            if edge.end - edge.len >= from {
                edge.hint = mark;
                if mark == Mark::Expected {
                    if edge.duration_ms > 0 {
                        edge.priority = DEFAULT_PRIORITY;
                    }
                    edge.duration_ms = due;
                }
            }
            node = self.tree.owner(node);
        }
        self.queue_if_leaf(end);
        Ok(())
    }

    /// The edge at whose end `at` is, made the most recently used, with room for `cuts` further
    /// ones; `None` for the empty prefix. From here on uses are noted in every edge; the first call
    /// visits all that there are.
    fn steer(&mut self, at: Position, cuts: usize) -> Result<Option<u32>> {
        self.find(at)?;
        let places = self.tree.reserve(cuts + 1)?;
        self.timers.reserve(places)?;
        if !self.notes_every_edge() {
            self.pass_stamps_up();
        }
        self.steered = true;
        self.reserve_nodes(cuts + 1)?;
        let end = self.settle(at)?;
        if end == NIL {
            return Ok(None);
        }
        self.refresh(end, false);
        Ok(Some(end))
    }

    /// Makes an edge begin at depth `blocks` of the path that ends with `end`. Room was reserved.
    fn cut_path(&mut self, end: u32, blocks: u32) {
        let mut node = end;
        while self.tree[node].kind == Kind::Edge {
            let edge = &self.tree[node];
            let first = edge.end - edge.len;
            if first <= blocks {
                if first < blocks && blocks < edge.end {
                    self.tree.split(node, blocks - first);
                }
                return;
            }
            node = self.tree.owner(node);
        }
    }
}
