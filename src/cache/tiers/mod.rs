//! Where the cache meets its tiers: what goes down when a block is evicted or committed, and what
//! comes back when a prompt is started.
//!
//! Tiers are off until [`KvCache::attach_tiers`]. What they do inside a step cannot fail: a block
//! that cannot be demoted is only evicted, one that cannot be loaded is computed. A block that comes
//! back keeps its copies below, so the next time it is evicted nothing is copied.
//!
//! On the CPU the calling thread copies between the cache's and the tiers' memory; on a device it only
//! enqueues the copies (`lift.rs`). It never waits for those, a disk or a network unless it says for how
//! long ([`KvCache::wait_prefetch`], [`KvCache::flush_tiers`]).

mod demote;
mod layers;
mod lift;
mod load;
mod onboard;
mod runs;
#[cfg(all(test, unix))]
mod tests;

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::layout::slice::Slice;
use crate::tier::{Decision, PrefillCost, Store as Objects, Ticket, TierSettings};

pub(super) use demote::Tiers;
pub(super) use load::LayerLoad;
pub use load::{LayerWait, LoadState};

/// Which blocks are demoted: of those that every layer group has. Where groups have windows, the
/// device may lose the windows' blocks first, and what is left of the others then goes nowhere;
/// `on_commit` takes them while they are whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demotion {
    /// When they are committed, too: a lower tier then has them whatever happens to the process.
    pub on_commit: bool,
    /// Only those of at least this priority: 0 to 100, 35 where none was given.
    pub least_priority: u8,
    /// Only those that were found by at least so many prompts.
    pub least_uses: u32,
}

impl Default for Demotion {
    fn default() -> Self {
        Self { on_commit: false, least_priority: 30, least_uses: 0 }
    }
}

/// A lower tier of a cache.
#[derive(Debug, Clone)]
pub struct LowerTier {
    /// Where its objects are kept.
    pub store: Arc<dyn Objects>,
    /// Its kind, queue and threads.
    pub settings: TierSettings,
    /// What goes there.
    pub demotion: Demotion,
}

/// The tiers of a cache, and when blocks move.
#[derive(Debug, Clone)]
pub struct TierOptions {
    /// What the model is called: changes whenever its weights do.
    pub model: String,
    /// The part of the model that the cache holds; `None` for all of it.
    pub slice: Option<Slice>,
    /// Blocks of host memory that stay there after they were evicted from the device. A block with raw
    /// sinks takes several, as many as hold its rows ([`spread`](crate::tier::spread)); and so do counts.
    pub host_blocks: usize,
    /// What goes to the host when it is evicted from the device; `on_commit` is not looked at.
    pub host_demotion: Demotion,
    /// Blocks of host memory for what is on its way to or from lower tiers, and is not kept.
    pub transit_blocks: usize,
    /// Tiers below the host, the nearest first.
    pub lower: Vec<LowerTier>,
    /// What the engine's prefill costs.
    pub prefill_cost: PrefillCost,
    /// On a GPU, blocks of host memory are page-locked: copied without the driver's detour, and beside
    /// the kernels. All of it is taken when the tiers are attached; where the system refuses it, that
    /// fails, and the engine may ask again with this set: plain memory then, and copies that are slower
    /// and that the calling thread may wait for. Without a GPU all memory is plain.
    pub plain_memory: bool,
    /// On a device, so many blocks are left free when a step has begun, as far as others can be evicted:
    /// the next step finds room that was copied beside the kernels of this one, and does not wait for
    /// it. About as many as a step takes; what they held is in the tiers, not on the device. 0 by default:
    /// a step evicts what it needs when it begins, and its kernels wait until that was copied.
    pub ahead_blocks: u32,
}

impl TierOptions {
    /// A host tier alone.
    pub fn host(model: &str, host_blocks: usize) -> Self {
        Self {
            model: model.into(),
            slice: None,
            host_blocks,
            host_demotion: Demotion { least_priority: 0, ..Demotion::default() },
            transit_blocks: 64,
            lower: Vec::new(),
            prefill_cost: PrefillCost::Unknown,
            plain_memory: false,
            ahead_blocks: 0,
        }
    }
}

/// What is known of a prompt's blocks below the device, and what was done about it.
#[derive(Debug)]
pub struct Prefetch {
    /// Leading tokens that are on the device.
    pub device_tokens: usize,
    /// Tokens after those that are in host memory.
    pub host_tokens: usize,
    /// Up to where loading is worth it, and why.
    pub decision: Decision,
    loads: Vec<(usize, Ticket)>,
}

impl Prefetch {
    /// Waits until all of it has arrived, at most for `limit`; whether it has. Needs no cache:
    /// what has arrived is taken by [`KvCache::poll_prefetch`](super::KvCache::poll_prefetch).
    pub fn wait(&self, limit: core::time::Duration) -> bool {
        let begin = std::time::Instant::now();
        self.loads.iter().all(|(_, ticket)| ticket.wait(limit.saturating_sub(begin.elapsed())))
    }
}

impl Drop for Prefetch {
    /// What has not arrived is given up.
    fn drop(&mut self) {
        self.loads.iter().for_each(|(_, ticket)| ticket.cancel());
    }
}

/// How a prefetch stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Blocks are still on their way.
    Loading,
    /// Nothing more comes: the prompt can be started.
    Done,
}
