//! Which leaf goes first: one trait, one file a policy.
//!
//! A policy sees nothing of the tree. Each edge carries a number of its own, `order`, which the
//! policy makes when the edge is stored and remakes when it is used; from that and the time of its
//! last use it says where the edge stands. Leaves alone are ever asked for. Priorities, hints, pins
//! and vetoes come before any policy and are not its business.
//!
//! A policy may keep its edges in two lanes (a probation and a protected one), each in its own
//! order; it then says from which to take, and may send what it is shown to the other lane instead.

mod fifo;
mod lfu;
mod lru;
mod s3fifo;
mod slru;

use super::queue::Key;
use crate::error::Result;
use crate::ids::TokenId;

/// The order in which an index evicts, among leaves of equal priority.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Eviction {
    /// The least recently used first.
    #[default]
    Lru,
    /// The least often used first, the least recently used of those.
    Lfu,
    /// The first stored first, used since or not.
    Fifo,
    /// Segmented LRU: what was used again after it was stored outlives what was not, as long as it
    /// takes no more than four fifths of the index.
    Slru,
    /// S3-FIFO: what is new waits in a small queue, a tenth of the index, and enters the main one
    /// only if it was used twice there, or comes back soon after it was evicted.
    S3Fifo,
}

/// How often something was used, when it was stored, in which lane it is: what the policy likes.
pub(super) trait Policy {
    /// Whether a use of a prefix is noted in each edge of it. If not, it is noted at its end alone,
    /// and edges above have it from there once that is evicted: enough where only the last use
    /// counts, and cheaper.
    fn notes_every_edge(&self) -> bool {
        true
    }
    /// The number of an edge that is stored at `now`; its first block has `tokens`.
    fn stored(&mut self, now: u64, tokens: &[TokenId]) -> u64;
    /// The number of an edge that had `order` and is used at `now`.
    fn used(&mut self, order: u64, now: u64) -> u64;
    /// The number of an edge that had `order` and became the most recently used at `now`, without
    /// a use to be counted.
    fn refreshed(&self, order: u64, _now: u64) -> u64 {
        order
    }
    /// Where an edge stands that was last used at `stamp`. The rank is below 2^24.
    fn key(&self, stamp: u64, order: u64) -> Key;
    /// The lane of an edge: 0 or 1.
    fn lane(&self, _order: u64) -> usize {
        0
    }
    /// The lane to take from, of an index for `capacity` blocks that has `blocks` in each lane.
    fn next_lane(&self, _blocks: [u64; 2], _capacity: u64) -> usize {
        0
    }
    /// Whether the first leaf of its lane goes (`None`), or stays under another number.
    fn judge(&mut self, _order: u64, _now: u64) -> Option<u64> {
        None
    }
    /// A block went that had `tokens`, of an edge with `order`.
    fn evicted(&mut self, _order: u64, _tokens: &[TokenId]) {}
    /// Memory in use, in bytes.
    fn bytes(&self) -> usize {
        0
    }
}

/// The policy of an index, without a box.
#[derive(Debug)]
pub(super) enum Chosen {
    Lru(lru::Lru),
    Lfu(lfu::Lfu),
    Fifo(fifo::Fifo),
    Slru(slru::Slru),
    S3Fifo(s3fifo::S3Fifo),
}

impl Chosen {
    pub(super) fn new(eviction: Eviction, capacity_blocks: u32) -> Result<Self> {
        Ok(match eviction {
            Eviction::Lru => Chosen::Lru(lru::Lru),
            Eviction::Lfu => Chosen::Lfu(lfu::Lfu),
            Eviction::Fifo => Chosen::Fifo(fifo::Fifo),
            Eviction::Slru => Chosen::Slru(slru::Slru),
            Eviction::S3Fifo => Chosen::S3Fifo(s3fifo::S3Fifo::new(capacity_blocks)?),
        })
    }

    pub(super) fn eviction(&self) -> Eviction {
        match self {
            Chosen::Lru(_) => Eviction::Lru,
            Chosen::Lfu(_) => Eviction::Lfu,
            Chosen::Fifo(_) => Eviction::Fifo,
            Chosen::Slru(_) => Eviction::Slru,
            Chosen::S3Fifo(_) => Eviction::S3Fifo,
        }
    }

    /// Whether the second lane is used at all.
    pub(super) fn two_lanes(&self) -> bool {
        matches!(self, Chosen::Slru(_) | Chosen::S3Fifo(_))
    }

    /// Whether the policy wants to be told what went.
    pub(super) fn remembers(&self) -> bool {
        matches!(self, Chosen::S3Fifo(_))
    }

    /// [`Policy::lane`], at no cost where there is one.
    #[inline]
    pub(super) fn lane(&self, order: u64) -> usize {
        if self.two_lanes() { self.get().lane(order) } else { 0 }
    }

    /// [`Policy::key`], inlined for LRU.
    #[inline]
    pub(super) fn key(&self, stamp: u64, order: u64) -> Key {
        match self {
            Chosen::Lru(policy) => policy.key(stamp, order),
            other => other.get().key(stamp, order),
        }
    }

    /// [`Policy::stored`], inlined for LRU.
    #[inline]
    pub(super) fn stored(&mut self, now: u64, tokens: &[TokenId]) -> u64 {
        match self {
            Chosen::Lru(policy) => policy.stored(now, tokens),
            other => other.get_mut().stored(now, tokens),
        }
    }

    /// [`Policy::notes_every_edge`], inlined for LRU.
    #[inline]
    pub(super) fn notes_every_edge(&self) -> bool {
        match self {
            Chosen::Lru(policy) => policy.notes_every_edge(),
            other => other.get().notes_every_edge(),
        }
    }

    #[inline]
    pub(super) fn get(&self) -> &dyn Policy {
        match self {
            Chosen::Lru(policy) => policy,
            Chosen::Lfu(policy) => policy,
            Chosen::Fifo(policy) => policy,
            Chosen::Slru(policy) => policy,
            Chosen::S3Fifo(policy) => policy,
        }
    }

    #[inline]
    pub(super) fn get_mut(&mut self) -> &mut dyn Policy {
        match self {
            Chosen::Lru(policy) => policy,
            Chosen::Lfu(policy) => policy,
            Chosen::Fifo(policy) => policy,
            Chosen::Slru(policy) => policy,
            Chosen::S3Fifo(policy) => policy,
        }
    }
}
