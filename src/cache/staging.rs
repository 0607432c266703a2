//! Raw rows of sealed-tile formats: which tiles of a sequence hold a slot of the staging pool, and
//! when they give it up.
//!
//! A tile is OPEN, its rows in a slot, until it is full; then append seals it and it is immutable.
//! The tile being filled has a slot, and so has the one before it as long as a step could take
//! tokens back (a speculation that is rejected); tiles that one step fills from end to end have
//! their rows in scratch, for one layer at a time. Slots are shared by forks, and copied before one
//! of them writes. A full tile that cannot be sealed keeps its slot, is read raw, and neither it
//! nor what follows it enters the prefix index. Sinks, which stay raw too, do (see `sinks.rs`).
//! How a device says what it could not seal is in `spares`.

use core::sync::atomic::Ordering;

use super::sequence::{Sequence, Staged};
use super::spares::reserve_spares;
use super::step::GroupTables;
use super::{KvCache, LayerId, Step, Work, reserve};
use crate::cpu::{RawBlock, SealTile};
use crate::error::{Error, Result};
use crate::ids::{BlockId, SeqId};
use crate::pool::BlockPool;

/// A slot for a tile that was filled in scratch and could not be sealed in some layer.
#[derive(Debug)]
pub(super) struct Rescued {
    pub seq: SeqId,
    pub group: usize,
    pub tile: usize,
    pub slot: BlockId,
}

impl Sequence {
    /// Gives up the slots of a group that `keep` does not want.
    pub(super) fn retain_raw(
        &mut self,
        group: usize,
        pool: &mut BlockPool,
        keep: impl Fn(&Staged) -> bool,
    ) -> Result<()> {
        let mut released = Ok(());
        self.raw[group].retain(|staged| {
            let keep = keep(staged);
            if !keep {
                released = released.and_then(|()| pool.release(staged.slot).map(|_| ()));
            }
            keep
        });
        released
    }

    /// The leading full blocks that are sealed, or of a format without tiles, in every group.
    pub(super) fn sealed_blocks(&self) -> usize {
        let kept = self.raw.iter().flatten().filter(|staged| staged.kept);
        kept.map(|staged| staged.tile).min().unwrap_or(usize::MAX)
    }

    /// The slot of an open tile.
    pub(super) fn raw_slot(&self, group: usize, tile: usize) -> Option<BlockId> {
        self.raw.get(group)?.iter().find(|staged| staged.tile == tile).map(|staged| staged.slot)
    }
}

impl KvCache {
    /// Whether a group's format has sealed tiles.
    pub(super) fn is_tiled(&self, group: usize) -> bool {
        self.staging[group].is_some()
    }

    /// Whether the format of some group has sealed tiles: prefixes are then found by whole blocks.
    pub(super) fn any_tiled(&self) -> bool {
        self.staging.iter().any(|pool| pool.is_some())
    }

    /// Refuses a step that needs more slots than are free.
    ///
    /// # Errors
    /// `OutOfBlocks` with how many slots are missing.
    pub(super) fn check_staging(&mut self, work: &[Work]) -> Result<()> {
        let block_tokens = self.spec.block_tokens as usize;
        for group in 0..self.staging.len() {
            let sinks = self.sink_tiles(group);
            let Some(pool) = &self.staging[group] else { continue };
            let mut needed = 0u32;
            for item in work {
                let sequence = self.sequences.get(item.seq)?;
                let from = sequence.tokens.len();
                let last = (from + item.tokens.len() - 1) / block_tokens;
                let tail = sequence.raw_slot(group, from / block_tokens);
                let open = !from.is_multiple_of(block_tokens);
                let new = from.div_ceil(block_tokens);
                needed += (sinks.min(last).saturating_sub(new) + usize::from(new <= last)) as u32;
                needed += u32::from(open && tail.is_some_and(|slot| pool.refs(slot) > 1));
            }
            self.make_slots_free(group, needed)?;
        }
        Ok(())
    }

    /// Makes room in the step's buffers for the raw tables, and in scratch.
    pub(super) fn reserve_staging(&mut self, step: &mut Step, work: &[Work]) -> Result<()> {
        let block_tokens = self.spec.block_tokens as usize;
        let rows = work.iter().map(|item| item.tokens.len()).sum::<usize>();
        for group in 0..self.staging.len() {
            let sinks = self.sink_tiles(group);
            if !self.is_tiled(group) {
                continue;
            }
            let (mut scratch, mut filled, mut raw) = (0, 0, 0);
            for item in work {
                let sequence = self.sequences.get_mut(item.seq)?;
                let from = sequence.tokens.len();
                let end = from + item.tokens.len();
                filled += end / block_tokens - from / block_tokens;
                // All new tiles but sinks and the last.
                let new = from.div_ceil(block_tokens).max(sinks);
                scratch += ((end - 1) / block_tokens).saturating_sub(new);
                raw += sequence.raw[group].len() + end.div_ceil(block_tokens) - from / block_tokens;
                reserve(&mut sequence.raw[group], 2 + sinks + filled)?;
            }
            let scratch = u32::try_from(scratch).map_err(|_| Error::Overflow { what: "tiles" })?;
            self.stores[group].reserve_scratch(scratch)?;
            let tables = &mut step.groups[group];
            if self.backend.is_some() {
                reserve_spares(&mut tables.raw, &mut self.spares)?;
            }
            reserve(&mut tables.raw.indptr, work.len() + 1)?;
            reserve(&mut tables.raw.blocks, raw)?;
            reserve(&mut tables.raw.staging, rows)?;
            reserve(&mut tables.raw.scratch, rows)?;
            reserve(&mut tables.raw.seals, filled)?;
            reserve(&mut tables.raw.own, filled)?;
            reserve(&mut tables.raw.refused, filled)?;
            reserve(&mut tables.filled, filled)?;
            reserve(&mut self.rescued, filled)?;
            tables.raw.indptr.push(0);
        }
        Ok(())
    }

    /// Gives the new tokens of a sequence their raw slots, and writes its part of the raw tables.
    /// The sequence's block table covers the tokens already.
    pub(super) fn plan_raw(
        &mut self,
        tables: &mut GroupTables,
        group: usize,
        index: usize,
        item: &Work,
    ) -> Result<()> {
        let sinks = self.sink_tiles(group);
        let Some(pool) = &mut self.staging[group] else { return Ok(()) };
        let store = &mut self.stores[group];
        let block_tokens = self.spec.block_tokens as usize;
        let sequence = self.sequences.get_mut(item.seq)?;
        let from = sequence.tokens.len();
        let end = from + item.tokens.len();
        let (first, last) = (from / block_tokens, (end - 1) / block_tokens);
        let open = from % block_tokens;
        // A tile before the first of the step can no longer be opened by taking the step back.
        sequence.retain_raw(group, pool, |staged| {
            staged.kept || staged.tile >= first || staged.tile < sinks
        })?;
        if open != 0 {
            let Some(tail) = sequence.raw[group].iter_mut().find(|staged| staged.tile == first)
            else {
                return Err(Error::InvalidState { why: "an open tile has no raw rows" });
            };
            tail.kept = false;
            if pool.refs(tail.slot) > 1 {
                let copy = pool.allocate()?;
                store.copy_raw(tail.slot, copy, open as u32)?;
                pool.release(core::mem::replace(&mut tail.slot, copy))?;
                self.totals.copied_blocks += 1;
            }
        }
        let new = from.div_ceil(block_tokens);
        for tile in (new..sinks.min(last)).chain((new <= last).then_some(last)) {
            let slot = pool.allocate()?;
            sequence.raw[group].push(Staged { tile, slot, kept: false });
        }
        for &block in sequence.tables[group].blocks().iter().take(sinks).skip(first) {
            store.unseal(block)?;
        }

        let staging_blocks = pool.blocks();
        let raw = &mut tables.raw;
        let in_slots = new.max(sinks);
        let scratch_tiles = in_slots..last.max(in_slots);
        let scratch_from = raw.scratch_blocks;
        let scratch = |tile: usize| scratch_from + (tile - scratch_tiles.start) as u32;
        let blocks_before = raw.blocks.len();
        for staged in &sequence.raw[group] {
            if staged.tile == last && new <= last {
                break;
            }
            raw.blocks.push(RawBlock { tile: staged.tile as i32, slot: staged.slot.0 as i32 });
        }
        for tile in scratch_tiles.clone() {
            let slot = (staging_blocks + scratch(tile)) as i32;
            raw.blocks.push(RawBlock { tile: tile as i32, slot });
        }
        if new <= last
            && let Some(staged) = sequence.raw[group].last()
        {
            raw.blocks.push(RawBlock { tile: last as i32, slot: staged.slot.0 as i32 });
        }
        raw.indptr.push(raw.blocks.len() as i32);
        let rows_before = raw.staging.len();
        for position in from..end {
            let (tile, offset) = (position / block_tokens, (position % block_tokens) as i64);
            let at = |block: u32| i64::from(block) * block_tokens as i64 + offset;
            if scratch_tiles.contains(&tile) {
                raw.staging.push(-1);
                raw.scratch.push(at(scratch(tile)));
            } else {
                let slot = sequence.raw_slot(group, tile).unwrap_or(BlockId::NONE);
                raw.staging.push(at(slot.0));
                raw.scratch.push(-1);
            }
        }
        let blocks = sequence.tables[group].blocks();
        for tile in first.max(sinks)..end / block_tokens {
            let own = raw.blocks[blocks_before..].iter().find(|raw| raw.tile == tile as i32);
            let Some(own) = own else { continue };
            raw.seals.push(SealTile { slot: own.slot, block: blocks[tile].0 as i32 });
            let row = |position: usize| (rows_before + position - from) as u32;
            let end = (tile + 1) * block_tokens;
            raw.own.push(row(from.max(end - block_tokens))..row(end));
            raw.refused.push(Default::default());
            tables.filled.push((index, tile));
        }
        raw.scratch_blocks += scratch_tiles.len() as u32;
        Ok(())
    }

    /// After a layer was appended: rows in scratch that could not be sealed get a slot, since later
    /// steps will read them.
    ///
    /// # Errors
    /// `OutOfBlocks` where no slot is free: the step can only be cancelled then.
    pub(super) fn rescue(&mut self, step: &Step, group: usize, layer: LayerId) -> Result<()> {
        let (Some(pool), Some(store)) = (&mut self.staging[group], self.stores[group].tiles())
        else {
            return Ok(());
        };
        let tables = &step.groups[group];
        for (at, flag) in tables.raw.refused.iter().enumerate() {
            if flag.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let Some(scratch) = store.in_scratch(tables.raw.seals[at].slot) else { continue };
            let (index, tile) = tables.filled[at];
            let seq = step.seqs[index];
            let known = self
                .rescued
                .iter()
                .find(|r| (r.seq, r.group, r.tile) == (seq, group, tile))
                .map(|rescued| rescued.slot);
            let slot = match known {
                Some(slot) => slot,
                None => {
                    let slot = pool.allocate().inspect_err(|e| self.outside.refused(e))?;
                    self.rescued.push(Rescued { seq, group, tile, slot });
                    slot
                }
            };
            store.keep_raw(scratch, slot, layer.layer)?;
        }
        Ok(())
    }

    /// The step's tokens are part of the sequence: notes tiles that stay raw, gives up the slots of
    /// sealed ones but for the last.
    pub(super) fn commit_raw(&mut self, step: &Step, index: usize) -> Result<()> {
        let block_tokens = self.spec.block_tokens as usize;
        let seq = step.seqs[index];
        for group in 0..self.staging.len() {
            let sinks = self.sink_tiles(group);
            let Some(pool) = &mut self.staging[group] else { continue };
            let tables = &step.groups[group];
            let sequence = self.sequences.get_mut(seq)?;
            for (at, flag) in tables.raw.refused.iter().enumerate() {
                let (owner, tile) = tables.filled[at];
                if owner != index || flag.load(Ordering::Relaxed) == 0 {
                    continue;
                }
                self.totals.unsealed_blocks += 1;
                let raw = &mut sequence.raw[group];
                match raw.iter_mut().find(|staged| staged.tile == tile) {
                    Some(staged) => staged.kept = true,
                    None => {
                        let found = self
                            .rescued
                            .iter()
                            .position(|r| (r.seq, r.group, r.tile) == (seq, group, tile));
                        if let Some(found) = found {
                            let slot = self.rescued.swap_remove(found).slot;
                            let place = raw.partition_point(|staged| staged.tile < tile);
                            raw.insert(place, Staged { tile, slot, kept: true });
                        }
                    }
                }
            }
            let open = sequence.tokens.len() / block_tokens;
            sequence.retain_raw(group, pool, |staged| {
                staged.kept || staged.tile + 1 >= open || staged.tile < sinks
            })?;
        }
        Ok(())
    }

    /// Gives up the slots of tiles that begin at or after `tokens`, and what was rescued for a step
    /// that is taken back.
    pub(super) fn cut_raw(&mut self, seq: SeqId, tokens: usize) -> Result<()> {
        let block_tokens = self.spec.block_tokens as usize;
        for group in 0..self.staging.len() {
            let Some(pool) = &mut self.staging[group] else { continue };
            let sequence = self.sequences.get_mut(seq)?;
            sequence.retain_raw(group, pool, |staged| staged.tile * block_tokens < tokens)?;
            while let Some(at) = self.rescued.iter().position(|r| r.seq == seq && r.group == group)
            {
                pool.release(self.rescued.swap_remove(at).slot)?;
            }
            while let Some(at) = self.spares.iter().position(|s| s.seq == seq && s.group == group) {
                pool.release(self.spares.swap_remove(at).slot)?;
            }
        }
        Ok(())
    }

    /// Whether a sequence can go on from `tokens`: the tile that is cut must have its raw rows.
    ///
    /// # Errors
    /// `InvalidArgument` where they are gone.
    pub(super) fn check_cut(&mut self, seq: SeqId, tokens: usize) -> Result<()> {
        let block_tokens = self.spec.block_tokens as usize;
        if tokens.is_multiple_of(block_tokens) {
            return Ok(());
        }
        let sequence = self.sequences.get(seq)?;
        let cut = (0..self.staging.len()).all(|group| {
            !self.is_tiled(group) || sequence.raw_slot(group, tokens / block_tokens).is_some()
        });
        if cut {
            return Ok(());
        }
        let why = "cuts a sealed tile: must be a multiple of block_tokens so far back";
        Err(Error::invalid("tokens", why))
    }
}

/// Gives up every slot of a sequence that ends or was never born.
pub(super) fn release_raw(
    raw: &mut [alloc::vec::Vec<Staged>],
    pools: &mut [Option<BlockPool>],
) -> Result<()> {
    for (raw, pool) in raw.iter_mut().zip(pools) {
        for staged in raw.drain(..) {
            if let Some(pool) = pool {
                pool.release(staged.slot)?;
            }
        }
    }
    Ok(())
}
