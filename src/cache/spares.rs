//! Tiles that a device could not seal. The CPU says so after each layer; a device is asked once, before
//! the step is committed. Until then it keeps raw rows that lay in scratch in spare slots of the staging
//! pool, which the step was given when it began, and whose unused ones go back.

use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use super::staging::Rescued;
use super::{KvCache, Step, reserve};
use crate::cpu::RawRows;
use crate::device::{DeviceStore, Outcome};
use crate::error::{Error, Result};
use crate::ids::{BlockId, SeqId};
use crate::layout::MAX_GROUPS;

/// The most spare slots of a step and group.
const MAX_SPARES: usize = 8;

/// A slot that a device may fill with raw rows of an open step.
#[derive(Debug)]
pub(super) struct Spare {
    /// A sequence of the step.
    pub seq: SeqId,
    pub group: usize,
    pub slot: BlockId,
}

/// Makes room for a step's spare slots.
pub(super) fn reserve_spares(raw: &mut RawRows, spares: &mut Vec<Spare>) -> Result<()> {
    reserve(&mut raw.spares, MAX_SPARES)?;
    // Of all groups that come.
    reserve(spares, MAX_SPARES * MAX_GROUPS)
}

impl KvCache {
    /// Gives a planned step spare slots for rows in scratch that a device cannot seal: at most half
    /// of those that are free, since most steps need none.
    pub(super) fn plan_spares(&mut self, step: &mut Step) -> Result<()> {
        for (group, tables) in step.groups.iter_mut().enumerate() {
            let Some(pool) = &mut self.staging[group] else { continue };
            let free = pool.free_blocks().div_ceil(2) as usize;
            let scratch = tables.raw.scratch_blocks as usize;
            if self.backend.is_none() {
                continue;
            }
            for _ in 0..scratch.min(MAX_SPARES).min(free) {
                let slot = pool.allocate()?;
                tables.raw.spares.push(slot.0 as i32);
                self.spares.push(Spare { seq: step.seqs[0], group, slot });
            }
        }
        Ok(())
    }

    /// Asks a device, which it waits for, what it could not seal of the tiles that the step filled,
    /// and gives spare slots that it left alone back.
    ///
    /// # Errors
    /// `OutOfBlocks` where rows found no spare slot: the step can only be cancelled then.
    /// `DeviceFailed`.
    pub(super) fn settle(&mut self, step: &mut Step) -> Result<()> {
        if self.backend.is_none() {
            return Ok(());
        }
        let mut lost = 0;
        for (group, tables) in step.groups.iter_mut().enumerate() {
            if self.staging[group].is_none() || tables.filled.is_empty() {
                continue;
            }
            let (store, raw) = (self.stores[group].device()?, &mut tables.raw);
            store.read_refused(&step.device, group, &mut raw.refused)?;
            let is_lost = |outcome| match outcome {
                Outcome::Lost => true,
                Outcome::Spare(number) => number >= raw.spares.len(),
                Outcome::Sealed | Outcome::Raw => false,
            };
            lost += outcomes(store, raw).filter(|&(_, outcome)| is_lost(outcome)).count();
        }
        if lost > 0 {
            let lost = lost as u32;
            let error = Error::OutOfBlocks { needed: lost, missing: lost };
            self.outside.refused(&error);
            return Err(error);
        }
        for (group, tables) in step.groups.iter().enumerate() {
            let Some(pool) = &mut self.staging[group] else { continue };
            let store = self.stores[group].device()?;
            for (at, outcome) in outcomes(store, &tables.raw) {
                let Outcome::Spare(number) = outcome else { continue };
                let Some(&slot) = tables.raw.spares.get(number) else { continue };
                let slot = BlockId(slot as u32);
                let held = self.spares.iter().position(|s| (s.group, s.slot) == (group, slot));
                let Some(held) = held else { continue };
                self.spares.swap_remove(held);
                let (index, tile) = tables.filled[at];
                self.rescued.push(Rescued { seq: step.seqs[index], group, tile, slot });
            }
            for &slot in &tables.raw.spares {
                let slot = BlockId(slot as u32);
                let held = self.spares.iter().position(|s| (s.group, s.slot) == (group, slot));
                if let Some(held) = held {
                    pool.release(self.spares.swap_remove(held).slot)?;
                }
            }
        }
        Ok(())
    }
}

/// What became of the tiles that a step filled.
fn outcomes<'a>(
    store: &'a DeviceStore,
    raw: &'a RawRows,
) -> impl Iterator<Item = (usize, Outcome)> + 'a {
    raw.refused.iter().zip(&raw.seals).enumerate().map(|(at, (word, seal))| {
        let in_scratch = store.in_scratch(seal.slot).is_some();
        (at, Outcome::of(word.load(Ordering::Relaxed), in_scratch))
    })
}
