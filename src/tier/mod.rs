//! Tiers: where blocks live that the device has no room for, and whether to load or to compute.
//!
//! A committed block never changes, so a copy of it is clean for ever. What a tier has of a block is
//! absent, being written, clean, or clean and being read; a reader never sees one that is being
//! written. A block outside the device is an *object*: its bytes with its tokens, its namespace's
//! keys, its configuration and a checksum ([`object`]), found by a key that all of these but the
//! bytes go into ([`Configuration`]). A block with raw rows is several objects ([`spread`]).
//!
//! | tier | what it is |
//! |---|---|
//! | [`HostTier`] | memory: a copy of bytes in the caller's thread, or one that a device makes by itself |
//! | [`Tier`] over a [`Store`] | disk, remote or the engine's own: queues and threads around it |
//!
//! Nothing here knows a cache, a pool or an index: those are above, in `cache/tiers.rs`, which says
//! when blocks move.

mod arrivals;
pub mod buffer;
mod decide;
#[cfg(unix)]
pub mod disk;
mod guarded;
mod host;
mod key;
mod lru;
pub mod object;
pub mod parts;
mod queue;
mod rate;
mod recent;
#[cfg(feature = "remote")]
pub mod remote;
mod report;
mod slabs;
pub mod spread;
mod store;
pub mod stream;
mod ticket;
mod worker;

pub use arrivals::{Arrivals, Piece};
pub(crate) use decide::decide_by;
pub use decide::{Decision, Found, PrefillCost, Why, decide};
pub use host::{HostBlock, HostTier};
pub use key::{Configuration, MOST_MODEL_BYTES, ObjectKey};
pub use queue::{CopyState, Tier, TierSettings};
pub use rate::Rate;
pub use report::{TierReport, write_prometheus};
pub use store::{Get, GetPart, Outcome, Put, Store, Watcher};
pub use ticket::{Missed, Ticket, Want};

/// Where blocks are kept, from the device down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TierKind {
    /// Memory of the host.
    Host,
    /// Files on a local disk.
    Disk,
    /// Another machine, or the engine's own store.
    Remote,
}

impl TierKind {
    /// Its name, as metrics have it.
    pub const fn name(self) -> &'static str {
        match self {
            TierKind::Host => "host",
            TierKind::Disk => "disk",
            TierKind::Remote => "remote",
        }
    }
}

/// What a tier counted since it was made, in blocks where it says nothing else. A block that is spread over
/// several objects counts as that many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TierCounters {
    /// Blocks demoted to it.
    pub stored: u64,
    /// Their bytes.
    pub stored_bytes: u64,
    /// Demotions that were not needed: it had the block.
    pub present: u64,
    /// Demotions dropped: the queue or the buffers were full, or the store was being left alone.
    pub dropped: u64,
    /// Demotions that it had no room for.
    pub full: u64,
    /// Blocks loaded from it.
    pub loaded: u64,
    /// Their bytes.
    pub loaded_bytes: u64,
    /// Blocks asked for that it did not have, or could not give.
    pub missed: u64,
    /// Objects that were damaged or of another block; removed, and missed.
    pub bad: u64,
    /// Calls of the store that failed or panicked; of the host, copies that a device could not make.
    pub failures: u64,
    /// Loads that somebody stopped waiting for.
    pub timeouts: u64,
    /// Blocks evicted from it.
    pub evicted: u64,
    /// Blocks that wait to be stored or loaded, or are being stored.
    pub queued: u64,
    /// Blocks it holds, where it knows.
    pub objects: u64,
    /// Bytes it holds, where it knows.
    pub bytes: u64,
    /// Whether the store is being left alone since it failed.
    pub down: bool,
}
