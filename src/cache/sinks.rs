//! Raw sinks: of a group whose spec has `sink_tokens`, the first tiles of every sequence stay raw.
//!
//! Such a tile keeps its slot of the staging pool as long as the sequence has the tile, and its record
//! says that it is not sealed. Unlike a tile that cannot be sealed it is shared: a block holds the
//! slot of its rows as long as the prefix index has it, and who finds the block gets both. Where
//! slots lack, unused entries of the index are evicted in their order.

use alloc::vec::Vec;

use super::sequence::{Sequence, Staged};
use super::{KvCache, reserve};
use crate::error::{Error, Result};
use crate::ids::{BlockId, SeqId};
use crate::metrics::Evicted;
use crate::pool::BlockPool;

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
        let Some(staging) = &self.staging[group] else { return Ok(()) };
        let unused = |&&(block, slot): &&(BlockId, BlockId)| {
            let blocks = &self.pools[group];
            blocks.refs(block) == 1 && staging.refs(slot) == 1
        };
        let unused = self.sinks[group].0.iter().filter(unused).count() as u32;
        let missing = needed.saturating_sub(free(self) + unused);
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

    /// Gives a new sequence the raw rows of the sink blocks that it found.
    pub(super) fn adopt_sinks(&mut self, sequence: &mut Sequence) -> Result<()> {
        for group in 0..self.sinks.len() {
            let tiles = self.sink_tiles(group);
            let Some(staging) = &mut self.staging[group] else { continue };
            let (found, raw) = (sequence.tables[group].blocks(), &mut sequence.raw[group]);
            reserve(raw, tiles.min(found.len()))?;
            for (tile, &block) in found.iter().enumerate().take(tiles) {
                let Ok(at) = self.sinks[group].find(block) else {
                    return Err(Error::InvalidState { why: "a sink block has no raw rows" });
                };
                let slot = self.sinks[group].0[at].1;
                staging.retain(slot)?;
                raw.push(Staged { tile, slot, kept: false });
            }
        }
        Ok(())
    }

    /// Lets the sink blocks of a sequence that the index has hold their raw rows; where it had the
    /// block from another sequence, the sequence takes over that one's rows, which are the same.
    pub(super) fn share_sinks(&mut self, seq: SeqId) -> Result<()> {
        for group in 0..self.sinks.len() {
            let tiles = self.sink_tiles(group);
            let sequence = self.sequences.get_mut(seq)?;
            let tiles = tiles.min(sequence.published.blocks());
            let (Some(staging), sinks) = (&mut self.staging[group], &mut self.sinks[group]) else {
                continue;
            };
            let blocks = sequence.tables[group].blocks();
            for staged in sequence.raw[group].iter_mut().take_while(|staged| staged.tile < tiles) {
                let block = blocks[staged.tile];
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

    /// Refuses what moves sealed records alone, where some blocks have raw rows instead.
    ///
    /// # Errors
    /// `Unsupported`.
    pub(super) fn check_no_sinks(&self, what: &'static str) -> Result<()> {
        if self.spec.groups.iter().any(|group| group.sink_tokens != 0) {
            return Err(Error::Unsupported { what });
        }
        Ok(())
    }
}
