//! The whole cache behind one type: pool, prefix index, storage and kernels.
//!
//! An engine runs in steps. For each it names the sequences and their new tokens
//! ([`KvCache::begin`]), then for each layer writes keys and values ([`KvCache::append`]) and reads
//! attention ([`KvCache::attend`]), then makes the tokens part of the sequences
//! ([`KvCache::commit`]), which also publishes full blocks to the prefix index. Nothing that a step
//! wrote can be found by another sequence before its commit.
//!
//! Every block of a layer group is exactly one of free, cached (in the prefix index, used by no
//! sequence) or referenced. Bad input is answered by an error and changes nothing; running out of
//! blocks is an answer too, and says how many were missing after everything evictable is counted.
//!
//! One `KvCache` is used from one thread at a time; kernels spread over its own threads. On a device
//! (`CacheOptions::device`) the books are kept here all the same, and the blocks lie there.

mod audit;
mod digests;
mod lifecycle;
mod media;
mod on_device;
mod outside;
mod retention;
mod scales;
mod sequence;
mod sinks;
mod spares;
mod staging;
mod stats;
mod step;
mod steps;
mod store;
mod tiers;
mod transfer;
mod whereabouts;
mod windows;

pub use media::Media;
pub use sequence::MAX_SEQS;
pub use stats::CacheStats;
pub use step::{Step, Work};
pub use tiers::{Demotion, LayerWait, LoadState, LowerTier, Prefetch, Progress, TierOptions};

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::cpu::{KvStore, Threads, TileStore};
use crate::device::{self, Backend, Device, DeviceStore, SideStream, StoreOptions, Stream};
use crate::error::{Error, Result};
use crate::ids::{BlockId, SeqId};
use crate::layout::{CacheSpec, GroupLayout, STAGING_BLOCKS};
use crate::metrics::Evicted;
use crate::pool::BlockPool;
use crate::prefix::{Eviction, Hit, PrefixIndex};

use media::MediaKeys;
use outside::Outside;
use sequence::Sequences;
use sinks::{Held, SinkSlots};
use store::Store;
use tiers::Tiers;

/// Sizes and policies of a cache.
#[derive(Debug, Clone)]
pub struct CacheOptions {
    /// Blocks of each layer group.
    pub blocks: u32,
    /// Blocks of each layer group where they differ, one number a group; empty where not. A group
    /// with a sliding window needs few: see [`plan`](crate::plan).
    pub group_blocks: Vec<u32>,
    /// Sequences that may live at once: 1 to 65,536.
    pub max_seqs: u32,
    /// Raw blocks of each layer group whose format has sealed tiles; 0 for two a sequence and its
    /// sinks (and no more than `blocks`), all that they can need unless tiles stay raw. Sinks of
    /// prefixes that no sequence uses stay as long as there is room.
    pub staging_blocks: u32,
    /// Threads for kernels; 0 for one a core.
    pub threads: u32,
    /// Publish committed blocks to the prefix index, and start sequences from it.
    pub prefix_reuse: bool,
    /// Where blocks live and kernels run.
    pub device: Device,
    /// The stream of the device that everything is enqueued on.
    pub stream: Stream,
    /// On a device, a sequence gets the same bits whatever else is in the batch, for some speed, and
    /// with sealed tiles also however it was cut into steps and whatever was found of it; on the CPU
    /// it always does.
    pub deterministic: bool,
    /// On a device, read a prefix that sequences of a step share once for all of them (cascade
    /// attention), where the device's rates say that this is faster: in steps of up to 8 new tokens a
    /// sequence, of sequences that are neighbours in the step's work. Not where `deterministic`, in
    /// layer groups with a window or sealed tiles, with ALiBi, of latents, nor while the stream is
    /// captured. Off by default, as it has not run on a GPU yet.
    pub cascade: bool,
    /// Which cached blocks go first.
    pub eviction: Eviction,
    /// Zero the K and V of every block that becomes free, before anybody else can have it.
    pub scrub: bool,
}

impl Default for CacheOptions {
    fn default() -> Self {
        Self {
            blocks: 1024,
            group_blocks: Vec::new(),
            max_seqs: 256,
            staging_blocks: 0,
            threads: 0,
            prefix_reuse: true,
            device: Device::Cpu,
            stream: Stream::DEFAULT,
            deterministic: false,
            cascade: false,
            eviction: Eviction::Lru,
            scrub: false,
        }
    }
}

/// A layer, by its group and its place in the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerId {
    /// Index of the group in [`CacheSpec::groups`].
    pub group: u32,
    /// Layer within the group.
    pub layer: u32,
}

impl LayerId {
    /// Layer `layer` of the first group: all there is in a uniform model.
    pub const fn uniform(layer: u32) -> Self {
        Self { group: 0, layer }
    }
}

/// A sequence that was started, and how much of its prompt needs no computing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Started {
    /// The new sequence.
    pub seq: SeqId,
    /// Leading prompt tokens whose K and V it already holds; less than the prompt's length.
    pub cached_tokens: u32,
}

/// A paged, prefix-shared KV cache with its storage.
#[derive(Debug)]
pub struct KvCache {
    id: u64,
    spec: CacheSpec,
    stores: Vec<Store>,
    /// `None` for the CPU.
    backend: Option<Arc<dyn Backend>>,
    stream: Stream,
    pools: Vec<BlockPool>,
    /// Raw blocks of the groups whose format has sealed tiles.
    staging: Vec<Option<BlockPool>>,
    /// The raw slots of shared sink blocks, one list a group.
    sinks: Vec<SinkSlots>,
    /// Raw tiles of open steps that could not be sealed and did not fit into scratch for longer.
    rescued: Vec<staging::Rescued>,
    /// Slots that a device may fill with raw rows of open steps.
    spares: Vec<spares::Spare>,
    /// Steps that were begun, which is the number of the last.
    steps_begun: u64,
    prefix: Option<PrefixIndex>,
    scrub: bool,
    sequences: Sequences,
    media: MediaKeys,
    threads: Threads,
    totals: stats::Totals,
    outside: Outside,
    tiers: Option<Box<Tiers>>,
    /// Sequences whose load is not complete.
    loading: u32,
    /// Where a device's copies for loads are enqueued, once there was one.
    side: Option<SideStream>,
    // Buffers that calls reuse.
    hit: Hit,
    ids: Vec<BlockId>,
    canonical: Vec<BlockId>,
    tails: Vec<BlockId>,
    workspace: Vec<u8>,
}

/// Room for `additional` more elements, or an error where memory is refused.
fn reserve<T>(list: &mut Vec<T>, additional: usize) -> Result<()> {
    let bytes = (additional as u64).saturating_mul(size_of::<T>() as u64);
    list.try_reserve(additional).map_err(|_| Error::OutOfMemory { bytes })
}

/// Tells the caches of a process apart, so that a step cannot be used with another.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl KvCache {
    /// Allocates a cache: `options.blocks` blocks for each group of the spec.
    ///
    /// # Errors
    /// `InvalidArgument` for an impossible spec or option, `Overflow` and `OutOfMemory` for one
    /// that does not fit; `NoDevice`, `NoKernels`, and `Unsupported` for a group that the device
    /// has no kernels for.
    pub fn new(spec: &CacheSpec, options: &CacheOptions) -> Result<Self> {
        let backend = match options.device {
            Device::Cpu => None,
            device => Some(device::open(device)?),
        };
        Self::with_backend(spec, options, backend)
    }

    /// The same on a device that is open already: `options.device` is not looked at.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn on(
        backend: &Arc<dyn Backend>,
        spec: &CacheSpec,
        options: &CacheOptions,
    ) -> Result<Self> {
        Self::with_backend(spec, options, Some(backend.clone()))
    }

    fn with_backend(
        spec: &CacheSpec,
        options: &CacheOptions,
        backend: Option<Arc<dyn Backend>>,
    ) -> Result<Self> {
        let layouts = spec.layouts()?;
        let own = &options.group_blocks;
        if !own.is_empty() && own.len() != layouts.len() {
            return Err(Error::invalid("group_blocks", "must be one number a layer group"));
        }
        let blocks_of = |group: usize| own.get(group).copied().unwrap_or(options.blocks);
        if (0..layouts.len()).any(|group| blocks_of(group) == 0) {
            return Err(Error::invalid("blocks", "must be at least 1"));
        }
        let sequences = Sequences::new(options.max_seqs)?;
        // Storage first: it is by far the largest, so what cannot be had fails before the rest.
        for (group, layout) in layouts.iter().enumerate() {
            layout.pool_bytes(blocks_of(group).into())?;
        }
        let sealed = |layout: &GroupLayout| layout.staging_block_bytes() != 0;
        if options.scrub && layouts.iter().any(sealed) {
            return Err(Error::Unsupported { what: "scrubbing of sealed tiles" });
        }
        // Tiles are kept whole, and so are the tables of their sequences.
        let windows: Vec<_> =
            layouts.iter().map(|layout| layout.spec().window.filter(|_| !sealed(layout))).collect();
        let windowed = options.prefix_reuse && windows.iter().any(|window| window.is_some());
        let pool = |group: usize| {
            let mut pool = BlockPool::new(blocks_of(group))?;
            if options.prefix_reuse && windows[group].is_some() {
                pool.order_cached()?;
            }
            Ok(pool)
        };
        let pools = (0..layouts.len()).map(pool).collect::<Result<Vec<_>>>()?;
        let prefix = if options.prefix_reuse {
            let groups = layouts.len();
            let block_tokens = spec.block_tokens as usize;
            let blocks = (0..groups).map(blocks_of).max().unwrap_or(1);
            let mut prefix =
                PrefixIndex::with_eviction(block_tokens, groups, blocks, options.eviction)?;
            if windowed {
                prefix.set_windows(&windows)?;
            }
            Some(prefix)
        } else {
            None
        };
        let threads = Threads::new(options.threads)?;
        let raw = |layout: &GroupLayout| match options.staging_blocks {
            // Every raw tile has a block, too.
            0 => (STAGING_BLOCKS as u32)
                .saturating_add(layout.sink_blocks())
                .saturating_mul(options.max_seqs)
                .min(options.blocks),
            given => given,
        };
        let staging = layouts
            .iter()
            .map(|layout| {
                let tiled = layout.staging_block_bytes() != 0;
                tiled.then(|| BlockPool::new(raw(layout))).transpose()
            })
            .collect::<Result<Vec<_>>>()?;
        let sinks = layouts
            .iter()
            .map(|layout| SinkSlots::new(if layout.sink_blocks() == 0 { 0 } else { raw(layout) }))
            .collect::<Result<Vec<_>>>()?;
        let outside = Outside::new(pools.len());
        let stores = layouts
            .into_iter()
            .enumerate()
            .map(|(group, layout)| match &backend {
                None if layout.staging_block_bytes() != 0 => {
                    let raw = raw(&layout);
                    let store = TileStore::new(layout, blocks_of(group), raw)?;
                    Ok(Store::Tiles(Box::new(store)))
                }
                None => KvStore::new(layout, blocks_of(group)).map(Store::Cpu),
                Some(backend) => {
                    let how = StoreOptions {
                        stream: options.stream,
                        deterministic: options.deterministic,
                        cascade: options.cascade,
                        staging_blocks: raw(&layout),
                    };
                    let mut store = DeviceStore::new(backend, layout, blocks_of(group), how)?;
                    if options.scrub {
                        store.zero_all()?;
                    }
                    Ok(Store::Device(Box::new(store)))
                }
            })
            .collect::<Result<Vec<_>>>()?;
        let mut cache = Self {
            // Relaxed: only uniqueness matters.
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            spec: spec.clone(),
            stores,
            backend,
            stream: options.stream,
            pools,
            staging,
            sinks,
            rescued: Vec::new(),
            spares: Vec::new(),
            steps_begun: 0,
            prefix,
            scrub: options.scrub,
            sequences,
            media: MediaKeys::new(),
            threads,
            totals: stats::Totals::default(),
            outside,
            tiers: None,
            loading: 0,
            side: None,
            hit: Hit::default(),
            ids: Vec::new(),
            canonical: Vec::new(),
            tails: Vec::new(),
            workspace: Vec::new(),
        };
        cache.name_storage();
        Ok(cache)
    }

    /// The spec it was made from.
    pub fn spec(&self) -> &CacheSpec {
        &self.spec
    }

    /// Makes `needed[group]` blocks allocatable by evicting from the prefix index, or says how
    /// many are missing and evicts nothing.
    fn reserve(&mut self, needed: impl Fn(usize) -> u32) -> Result<()> {
        let mut evict = 0;
        for (group, pool) in self.pools.iter().enumerate() {
            let lacking = needed(group).saturating_sub(pool.free_blocks());
            if lacking > pool.cached_blocks() {
                let missing = lacking - pool.cached_blocks();
                let error = Error::OutOfBlocks { needed: needed(group), missing };
                self.outside.refused(&error);
                return Err(error);
            }
            if self.window(group).is_none() {
                evict = evict.max(lacking);
            }
        }
        if evict > 0 {
            self.evict(evict, Evicted::Capacity)?;
        }
        for group in 0..self.pools.len() {
            if self.window(group).is_some() {
                self.reserve_windowed(group, needed(group))?;
            }
        }
        self.join_down()?;
        self.scrub()
    }

    /// Zeroes what became free, if that is asked for: before anything is allocated, and at the end
    /// of each call that frees.
    fn scrub(&mut self) -> Result<()> {
        if self.scrub {
            self.join_down()?;
            for (store, pool) in self.stores.iter_mut().zip(&mut self.pools) {
                pool.dirty_blocks().try_for_each(|block| store.zero(block))?;
                pool.mark_clean();
            }
        }
        Ok(())
    }

    /// Takes `blocks` blocks of each group out of the prefix index, in its order of eviction.
    fn evict(&mut self, blocks: u32, why: Evicted) -> Result<()> {
        self.take_out(blocks, why)?;
        self.join_down()
    }

    /// The same, where the blocks are not given out before [`join_down`](Self::join_down).
    fn take_out(&mut self, blocks: u32, why: Evicted) -> Result<()> {
        let Some(prefix) = self.prefix.as_mut() else { return Ok(()) };
        // A sequence that uses a block uses all before it, so every unreferenced block has only
        // unreferenced blocks after it and will be a leaf in its turn.
        let unused = |pools: &[BlockPool], ids: &[BlockId]| {
            ids.iter().zip(pools).all(|(&id, pool)| id == BlockId::NONE || pool.refs(id) == 1)
        };
        self.ids.clear();
        reserve(&mut self.ids, blocks as usize * self.pools.len())?;
        let (pools, evicted) = (&self.pools, &mut self.ids);
        prefix.evict(blocks as usize, &mut |ids| unused(pools, ids), &mut |ids| {
            evicted.extend_from_slice(ids)
        });
        for ids in self.ids.chunks_exact(self.pools.len()) {
            self.totals.evicted_blocks += 1;
            for (&id, pool) in ids.iter().zip(&mut self.pools) {
                if id != BlockId::NONE {
                    pool.uncache(id)?;
                }
            }
        }
        if let Some(tiers) = &mut self.tiers {
            let held = Held { stores: &self.stores, sinks: &self.sinks };
            tiers.evicted(&self.ids, held, why == Evicted::Capacity);
        }
        self.outside.evicted(&self.ids, why);
        // Their rows were copied, or will be before what writes there next.
        self.sweep_sinks()
    }
}
