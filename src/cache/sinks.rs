//! Raw sinks: of a group whose spec has `sink_tokens`, the first tiles of every sequence stay raw.
//!
//! Such a tile keeps its slot of the staging pool as long as the sequence has the tile, and its record
//! says that it is not sealed. Unlike a tile that cannot be sealed it is shared: a block holds the
//! slot of its rows as long as the prefix index has it, and who finds the block gets both. Where
//! slots lack, unused entries of the index are evicted in their order.
//!
//! Outside the cache, in tiers and streams, a sink is its raw rows (`tier/spread.rs`), and gets a slot
//! when it comes back.

use alloc::vec::Vec;
use core::ops::Range;

use super::sequence::{Sequence, Staged};
use super::store::Store;
use super::{KvCache, reserve};
use crate::error::{Error, Result};
use crate::ids::BlockId;
use crate::metrics::Evicted;
use crate::pool::{BlockPool, BlockTable};

/// What holds the bytes of cached blocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Held<'a> {
    pub stores: &'a [Store],
    pub sinks: &'a [SinkSlots],
}

/// The slots that sink blocks of one group hold, ascending by block.
#[derive(Debug)]
pub(super) struct SinkSlots(Vec<(BlockId, BlockId)>);

impl SinkSlots {
    /// Room for as many as there are slots: blocks share none.
    pub fn new(slots: u32) -> Result<Self> {
        let mut list = Vec::new();
        reserve(&mut list, slots as usize)?;
        Ok(Self(list))
    }

    fn find(&self, block: BlockId) -> core::result::Result<usize, usize> {
        self.0.binary_search_by_key(&block, |entry| entry.0)
    }

    /// The slot of a block's raw rows, where it is a sink.
    pub fn slot(&self, block: BlockId) -> Option<BlockId> {
        self.find(block).ok().map(|at| self.0[at].1)
    }

    /// Blocks and slots, for the audit.
    pub fn entries(&self) -> &[(BlockId, BlockId)] {
        &self.0
    }
}

impl KvCache {
    /// Tiles at the beginning of a sequence that stay raw in a group.
    pub(super) fn sink_tiles(&self, group: usize) -> usize {
        self.stores[group].layout().sink_blocks() as usize
    }

    /// Gives up the slots of sink blocks that the index no longer has; sequences that use them hold
    /// the rows too.
    pub(super) fn sweep_sinks(&mut self) -> Result<()> {
        for (group, sinks) in self.sinks.iter_mut().enumerate() {
            let (Some(staging), blocks) = (&mut self.staging[group], &self.pools[group]) else {
                continue;
            };
            let mut released = Ok(());
            sinks.0.retain(|&(block, slot)| {
                let known = blocks.is_cached(block);
                if !known {
                    released = released.and_then(|()| staging.release(slot).map(|_| ()));
                }
                known
            });
            released?;
        }
        Ok(())
    }

    /// Makes `needed` slots of a group free, evicting unused entries of the prefix index for their
    /// sinks.
    ///
    /// # Errors
    /// `OutOfBlocks` with how many are missing; nothing is evicted then.
    pub(super) fn make_slots_free(&mut self, group: usize, needed: u32) -> Result<()> {
        let free = |cache: &Self| cache.staging[group].as_ref().map_or(0, BlockPool::free_blocks);
        if needed <= free(self) {
            return Ok(());
        }
        let missing = needed.saturating_sub(self.spare_slots(group));
        if missing > 0 {
            let error = Error::OutOfBlocks { needed, missing };
            self.outside.refused(&error);
            return Err(error);
        }
        while needed > free(self) {
            let before = self.pools[group].cached_blocks();
            self.evict(1, Evicted::Capacity)?;
            if self.pools[group].cached_blocks() >= before {
                return Err(Error::InvalidState { why: "unused sinks cannot be evicted" });
            }
        }
        Ok(())
    }

    /// Slots of a group that are free or held by unused entries of the prefix index.
    fn spare_slots(&self, group: usize) -> u32 {
        let Some(staging) = &self.staging[group] else { return 0 };
        let unused = |&&(block, slot): &&(BlockId, BlockId)| {
            self.pools[group].refs(block) == 1 && staging.refs(slot) == 1
        };
        staging.free_blocks() + self.sinks[group].0.iter().filter(unused).count() as u32
    }

    /// Gives a new sequence the raw rows of the sink blocks that it found.
    pub(super) fn adopt_sinks(&mut self, sequence: &mut Sequence) -> Result<()> {
        for group in 0..self.sinks.len() {
            let tiles = self.sink_tiles(group);
            let Some(staging) = &mut self.staging[group] else { continue };
            let (found, raw) = (sequence.tables[group].blocks(), &mut sequence.raw[group]);
            reserve(raw, tiles.min(found.len()))?;
            for (tile, &block) in found.iter().enumerate().take(tiles) {
                let Some(slot) = self.sinks[group].slot(block) else {
                    return Err(Error::InvalidState { why: "a sink block has no raw rows" });
                };
                staging.retain(slot)?;
                raw.push(Staged { tile, slot, kept: false });
            }
        }
        Ok(())
    }

    /// Whether there are free slots, or such as unused entries of the index hold, for the sinks among
    /// `blocks` blocks of a sequence from block `first` on.
    pub(super) fn has_slots(&self, first: usize, blocks: usize) -> bool {
        (0..self.staging.len()).all(|group| {
            self.sinks_among(group, first, blocks).len() as u32 <= self.spare_slots(group)
        })
    }

    /// Tiles among `blocks` from `first` on that are sinks in a group.
    fn sinks_among(&self, group: usize, first: usize, blocks: usize) -> Range<usize> {
        let end = self.sink_tiles(group).min(first + blocks);
        first.min(end)..end
    }

    /// Makes slots free for the sinks among `blocks` blocks of a sequence from block `first` on.
    ///
    /// # Errors
    /// `OutOfBlocks` with how many are missing.
    pub(super) fn make_sinks_free(&mut self, first: usize, blocks: usize) -> Result<()> {
        for group in 0..self.staging.len() {
            let needed = self.sinks_among(group, first, blocks).len();
            self.make_slots_free(group, needed as u32)?;
        }
        Ok(())
    }

    /// Gives a sequence slots for the raw rows of the sinks among its last `blocks` blocks, from block
    /// `first` on, which are to be filled from outside.
    ///
    /// # Errors
    /// `OutOfBlocks` where [`make_sinks_free`](Self::make_sinks_free) was not asked first; `OutOfMemory`,
    /// `DeviceFailed`. What the sequence got then is to be taken back.
    pub(super) fn take_sinks(
        &mut self,
        sequence: &mut Sequence,
        first: usize,
        blocks: usize,
    ) -> Result<()> {
        for group in 0..self.staging.len() {
            let tiles = self.sinks_among(group, first, blocks);
            let Some(staging) = &mut self.staging[group] else { continue };
            reserve(&mut sequence.raw[group], tiles.len())?;
            for tile in tiles {
                self.stores[group].unseal(sequence.tables[group].blocks()[tile])?;
                let slot = staging.allocate()?;
                sequence.raw[group].push(Staged { tile, slot, kept: false });
            }
        }
        Ok(())
    }

    /// Cuts a sequence that no id names yet to its first `blocks` blocks.
    pub(super) fn cut_unborn(&mut self, sequence: &mut Sequence, blocks: usize) -> Result<()> {
        let block_tokens = self.spec.block_tokens as usize;
        for (group, table) in sequence.tables.iter_mut().enumerate() {
            table.truncate(&mut self.pools[group], blocks * block_tokens, block_tokens)?;
        }
        for (group, pool) in self.staging.iter_mut().enumerate() {
            if let Some(pool) = pool {
                sequence.retain_raw(group, pool, |staged| staged.tile < blocks)?;
            }
        }
        Ok(())
    }
}

/// Lets the sink blocks among the first `blocks` of a sequence, which the index has, hold their raw rows;
/// where it had the block from another sequence, the sequence takes over that one's rows, which are the
/// same.
pub(super) fn share_sinks(
    (staging, sinks, stores): (&mut [Option<BlockPool>], &mut [SinkSlots], &[Store]),
    tables: &[BlockTable],
    raw: &mut [Vec<Staged>],
    blocks: usize,
) -> Result<()> {
    for (group, (staging, sinks)) in staging.iter_mut().zip(sinks).enumerate() {
        let tiles = (stores[group].layout().sink_blocks() as usize).min(blocks);
        let Some(staging) = staging else { continue };
        for staged in raw[group].iter_mut().take_while(|staged| staged.tile < tiles) {
            let block = tables[group].blocks()[staged.tile];
            match sinks.find(block) {
                Ok(at) if sinks.0[at].1 == staged.slot => {}
                Ok(at) => {
                    staging.retain(sinks.0[at].1)?;
                    staging.release(core::mem::replace(&mut staged.slot, sinks.0[at].1))?;
                }
                // Within the room that was reserved: every entry has a slot of its own.
                Err(at) => {
                    staging.retain(staged.slot)?;
                    sinks.0.insert(at, (block, staged.slot));
                }
            }
        }
    }
    Ok(())
}
