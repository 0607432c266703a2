//! The prefix index: which token sequences are cached, and in which blocks of the pools.
//!
//! A radix tree over token ids with compressed edges. Blocks are stored and evicted whole; matching
//! is by token, so that a hit also names the block that agrees with the query for a part of its
//! tokens. Every match is a comparison of tokens: hashes only find where to compare, and can never
//! make a false hit, neither of tokens nor of namespaces. Each entry carries one block id per layer
//! group, ids that mean nothing here: the index knows no pool, and whoever inserts a block holds a
//! reference for the index, and gives it up when the index reports the block as evicted.
//!
//! # Reading and writing
//! [`PrefixIndex::lookup`] takes `&self` and writes nothing, so any number of threads may look up
//! under a shared lock. Recency is apart from it: [`PrefixIndex::touch`] and [`PrefixIndex::lock`]
//! take the [`Position`] of a hit. A touch is one store of a clock reading to one node, because the
//! recency of everything above follows from it when it is needed, at eviction; so it can become an
//! atomic maximum under the shared lock. The one case that cannot is a position inside an edge,
//! which is first split there: recency and pins are exact to the block.
//!
//! # Positions
//! A position stays good through insertions, splits, locks and touches. Eviction and removal can
//! make it stale: always if its last block went, sometimes if blocks below it did. A stale position
//! is refused; look up again.
//!
//! # Windows
//! Layer groups with a sliding window may lack blocks that others have: see
//! [`PrefixIndex::set_windows`].
//!
//! # Mirrors
//! A copy of what a lookup reads can be kept elsewhere, on a device, and follow the index by what
//! changed: see [`PrefixIndex::start_mirror`].
//!
//! # Eviction
//! Leaf first: of all blocks that nothing hangs below, the [`Eviction`] that was chosen says which
//! goes; by default the one whose last touch (or insertion, or a touch of anything that hung below
//! it) is longest ago. What the engine knows comes before that: [`PrefixIndex::prioritize`] and
//! [`PrefixIndex::hint`], and pins before all.
//!
//! ```
//! use kvcache::ids::{BlockId, Namespace};
//! use kvcache::prefix::{Hit, PrefixIndex};
//!
//! let mut index = PrefixIndex::new(4, 1, 100)?; // blocks of 4 tokens, one group
//! let (space, mut hit, mut same) = (Namespace(0), Hit::default(), Vec::new());
//! index.insert(space, &[1, 2, 3, 4, 5, 6, 7, 8], &[BlockId(10), BlockId(11)], &mut same)?;
//!
//! index.lookup(space, &[1, 2, 3, 4, 5, 6, 9], usize::MAX, &mut hit);
//! assert_eq!((hit.tokens, hit.blocks.as_slice()), (4, &[BlockId(10)][..]));
//! assert_eq!((hit.tail_tokens, hit.tail_blocks.as_slice()), (2, &[BlockId(11)][..]));
//! let pin = index.lock(hit.at)?; // block 10 stays
//! assert_eq!(index.evict(2, &mut |_| true, &mut |ids| assert_eq!(ids, [BlockId(11)])), 1);
//! index.unlock(pin)?;
//! # Ok::<(), kvcache::Error>(())
//! ```

mod audit;
mod blocks;
mod chains;
mod compare;
mod digest;
mod dirty;
mod evict;
mod insert;
mod lookup;
mod mirror;
mod pins;
mod policy;
mod queue;
mod retention;
mod table;
mod tree;
mod uses;
mod windows;

use alloc::vec::Vec;

use crate::error::{Error, Result};
use crate::ids::BlockId;
use blocks::{Blocks, Run};
use pins::Pins;
use policy::Chosen;
use queue::Queue;
use tree::Tree;
use windows::Windows;

pub use chains::Chain;
pub use digest::{Digest, Keys};
pub use insert::Inserted;
pub use lookup::Hit;
pub use mirror::{Change, Part};
pub use pins::PinId;
pub use policy::Eviction;
pub use retention::{DEFAULT_PRIORITY, Hint, MAX_PRIORITY, Retention};
pub use windows::first_visible_block;

/// No node, no slot.
const NIL: u32 = u32::MAX;

/// The index; see the module. Not synchronised: shared access may look up, the rest needs `&mut`.
#[derive(Debug)]
pub struct PrefixIndex {
    blocks: Blocks,
    tree: Tree,
    pins: Pins,
    policy: Chosen,
    /// The leaves of each of the policy's lanes, in the order of their eviction.
    queues: [Queue; 2],
    /// Blocks of each lane.
    lane_blocks: [u64; 2],
    /// Leaves whose priority or hint ends, by when it does.
    timers: Queue,
    /// Whether a priority or a hint was ever given.
    steered: bool,
    /// Raised by every use, and never behind the time; see `uses`.
    clock: u64,
    /// The caller's time.
    now_ms: u64,
    windows: Windows,
    /// Reused by `insert`.
    runs: Vec<Run>,
}

/// A place in the index: the end of a matched or inserted prefix. See the module on how long it
/// stays good. The default is the empty prefix, which is always good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The edge that had the end when the position was made; `NIL` for the empty prefix.
    node: u32,
    generation: u32,
    /// Blocks from the root.
    blocks: u32,
}

impl Default for Position {
    fn default() -> Self {
        Position { node: NIL, generation: 0, blocks: 0 }
    }
}

impl Position {
    /// How many whole blocks the prefix has.
    pub fn blocks(&self) -> usize {
        self.blocks as usize
    }

    /// The end of the first `blocks` of these blocks, at most all; good as long as this one is.
    pub fn first(self, blocks: usize) -> Self {
        match self.blocks().min(blocks) {
            0 => Self::default(),
            blocks => Position { blocks: blocks as u32, ..self },
        }
    }

    /// The position as numbers, for a caller that cannot hold a Rust value.
    pub(crate) fn to_parts(self) -> [u32; 3] {
        [self.node, self.generation, self.blocks]
    }

    /// The position that [`Self::to_parts`] took apart. Invented numbers do no harm: a position is
    /// checked where it is used.
    pub(crate) fn from_parts([node, generation, blocks]: [u32; 3]) -> Self {
        Position { node, generation, blocks }
    }
}

/// Sizes of an index at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    /// Block entries cached.
    pub blocks: usize,
    /// Block entries that fit.
    pub capacity_blocks: usize,
    /// Namespaces that have an entry.
    pub namespaces: usize,
    /// Nodes of the tree: namespaces, edges and forks.
    pub nodes: usize,
    /// Pins not yet unlocked.
    pub pins: usize,
    /// Memory in use, in bytes: storage ever used, nodes, tables and queue.
    pub bytes: usize,
}

impl PrefixIndex {
    /// The most blocks an index can have.
    pub const MAX_BLOCKS: u32 = 1 << 30;

    /// An empty index of blocks of `block_tokens` tokens with one id for each of `groups` layer
    /// groups, and room for `capacity_blocks` of them, which is reserved now and used as needed.
    /// Nodes are allocated as the tree grows; an index that has been full allocates no more.
    ///
    /// # Errors
    /// `InvalidArgument` if a number is 0, or `capacity_blocks` past [`Self::MAX_BLOCKS`], or the
    /// others past 2^16; `OutOfMemory` where the system refuses the storage.
    pub fn new(block_tokens: usize, groups: usize, capacity_blocks: u32) -> Result<Self> {
        Self::with_eviction(block_tokens, groups, capacity_blocks, Eviction::default())
    }

    /// The same with an order of eviction. LRU, the default, has the cheapest uses: the others note
    /// them in every edge of the prefix that is used, and store what is appended to a sequence as
    /// edges of its own.
    ///
    /// # Errors
    /// As for [`Self::new`].
    pub fn with_eviction(
        block_tokens: usize,
        groups: usize,
        capacity_blocks: u32,
        eviction: Eviction,
    ) -> Result<Self> {
        if block_tokens == 0 || block_tokens > 1 << 16 {
            return Err(Error::invalid("block_tokens", "must be 1 to 65536"));
        }
        if groups == 0 || groups > 1 << 16 {
            return Err(Error::invalid("groups", "must be 1 to 65536"));
        }
        if capacity_blocks == 0 || capacity_blocks > Self::MAX_BLOCKS {
            return Err(Error::invalid("capacity_blocks", "must be 1 to 2^30"));
        }
        let blocks = Blocks::new(block_tokens, groups, capacity_blocks)?;
        let tree = Tree::new(blocks.address());
        Ok(PrefixIndex {
            blocks,
            tree,
            pins: Pins::new(),
            policy: Chosen::new(eviction, capacity_blocks)?,
            queues: [Queue::new(), Queue::new()],
            lane_blocks: [0; 2],
            timers: Queue::new(),
            steered: false,
            clock: 0,
            now_ms: 0,
            windows: Windows::none(),
            runs: Vec::new(),
        })
    }

    /// The order of eviction.
    pub fn eviction(&self) -> Eviction {
        self.policy.eviction()
    }

    /// Tokens of a block.
    pub fn block_tokens(&self) -> usize {
        self.blocks.block_tokens
    }

    /// Ids of a block entry.
    pub fn groups(&self) -> usize {
        self.blocks.groups
    }

    /// How many block entries are cached.
    pub fn len_blocks(&self) -> usize {
        self.blocks.used() as usize
    }

    /// How many block entries can be inserted before something must be evicted.
    pub fn free_blocks(&self) -> usize {
        self.blocks.free() as usize
    }

    /// Shows the ids of every cached block entry, one per group, in no particular order.
    pub fn for_each_block(&self, see: &mut dyn FnMut(&[BlockId])) {
        for edge in self.tree.edges() {
            let ids = self.blocks.ids(Run { start: edge.start, len: edge.len });
            ids.chunks_exact(self.blocks.groups).for_each(&mut *see);
        }
    }

    /// Sizes now.
    pub fn stats(&self) -> Stats {
        Stats {
            blocks: self.len_blocks(),
            capacity_blocks: self.blocks.capacity() as usize,
            namespaces: self.tree.spaces.len(),
            nodes: self.tree.live(),
            pins: self.pins.live(),
            bytes: self.blocks.bytes()
                + self.tree.bytes()
                + self.queues[0].bytes()
                + self.queues[1].bytes()
                + self.timers.bytes()
                + self.policy.get().bytes()
                + self.pins.bytes()
                + self.windows.bytes()
                + self.runs.capacity() * size_of::<Run>(),
        }
    }

    /// Makes room for `nodes` further nodes in the tree and in the queues.
    fn reserve_nodes(&mut self, nodes: usize) -> Result<()> {
        let places = self.tree.reserve(nodes)?;
        self.queues[0].reserve(places)?;
        if self.policy.two_lanes() {
            self.queues[1].reserve(places)?;
        }
        if self.steered { self.timers.reserve(places) } else { Ok(()) }
    }
}
