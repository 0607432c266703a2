//! The live sequences of a cache: slots with generations, so that an id outlives its sequence
//! harmlessly. Knows tokens and block tables, not what lies in the blocks.

use alloc::boxed::Box;
use alloc::vec::Vec;

use super::media::Placed;
use super::tiers::LayerLoad;
use crate::error::{Error, Result};
use crate::ids::{BlockId, Namespace, SeqId, TokenId};
use crate::pool::BlockTable;
use crate::prefix::Position;

/// Sequence slots a cache may have: 16 bits of an id are the slot, 16 its generation.
pub const MAX_SEQS: u32 = 1 << 16;

/// A raw tile that a sequence holds in the staging pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Staged {
    pub tile: usize,
    pub slot: BlockId,
    /// Full, and not sealed because its rows cannot be: held as long as its block.
    pub kept: bool,
}

#[derive(Debug, Default)]
pub(super) struct Sequence {
    pub namespace: Namespace,
    /// The tokens whose K and V are in the cache, as the engine gave them.
    pub tokens: Vec<TokenId>,
    /// The media of its prompt, ascending by position; some may lie past its tokens yet.
    pub media: Vec<Placed>,
    /// One table a layer group.
    pub tables: Vec<BlockTable>,
    /// Raw tiles of each layer group, ascending; empty where the format has no tiles.
    pub raw: Vec<Vec<Staged>>,
    /// The end of the leading blocks that are in the prefix index.
    pub published: Position,
    /// Its load from tiers, until all of it is there: nothing of the sequence is published meanwhile.
    pub load: Option<Box<LayerLoad>>,
    /// Reserved by an open step.
    pub in_step: bool,
}

#[derive(Debug)]
struct Slot {
    generation: u16,
    live: bool,
    sequence: Sequence,
}

#[derive(Debug)]
pub(super) struct Sequences {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

impl Sequences {
    pub fn new(limit: u32) -> Result<Self> {
        if limit == 0 || limit > MAX_SEQS {
            return Err(Error::invalid("max_seqs", "must be 1 to 65536"));
        }
        let (mut slots, mut free) = (Vec::new(), Vec::new());
        super::reserve(&mut slots, limit as usize)?;
        super::reserve(&mut free, limit as usize)?;
        let slot = || Slot { generation: 0, live: false, sequence: Sequence::default() };
        slots.resize_with(limit as usize, slot);
        free.extend((0..limit).rev());
        Ok(Self { slots, free })
    }

    pub fn live(&self) -> u32 {
        (self.slots.len() - self.free.len()) as u32
    }

    pub fn has_room(&self) -> Result<()> {
        let limit = self.slots.len() as u32;
        if self.free.is_empty() { Err(Error::OutOfSequences { limit }) } else { Ok(()) }
    }

    pub fn insert(&mut self, sequence: Sequence) -> Result<SeqId> {
        self.has_room()?;
        let index = self.free.pop().unwrap_or_default();
        let slot = &mut self.slots[index as usize];
        // Generation 0 is never live, so that a zeroed id is stale.
        slot.generation = slot.generation.checked_add(1).unwrap_or(1);
        slot.live = true;
        slot.sequence = sequence;
        Ok(SeqId(u32::from(slot.generation) << 16 | index))
    }

    pub fn get(&self, id: SeqId) -> Result<&Sequence> {
        self.slot(id).map(|index| &self.slots[index].sequence)
    }

    pub fn get_mut(&mut self, id: SeqId) -> Result<&mut Sequence> {
        self.slot(id).map(|index| &mut self.slots[index].sequence)
    }

    /// A live sequence that no step holds.
    pub fn get_idle(&mut self, id: SeqId) -> Result<&mut Sequence> {
        let sequence = self.get_mut(id)?;
        if sequence.in_step {
            return Err(Error::InvalidState { why: "the sequence is in an open step" });
        }
        Ok(sequence)
    }

    /// A live sequence that neither a step holds nor a load fills.
    pub fn get_whole(&mut self, id: SeqId) -> Result<&mut Sequence> {
        let sequence = self.get_idle(id)?;
        if sequence.load.is_some() {
            return Err(Error::InvalidState { why: "the sequence is being loaded" });
        }
        Ok(sequence)
    }

    pub fn remove(&mut self, id: SeqId) -> Result<Sequence> {
        let index = self.slot(id)?;
        let slot = &mut self.slots[index];
        slot.live = false;
        self.free.push(index as u32);
        Ok(core::mem::take(&mut slot.sequence))
    }

    pub fn iter(&self) -> impl Iterator<Item = &Sequence> {
        self.slots.iter().filter(|slot| slot.live).map(|slot| &slot.sequence)
    }

    #[cfg(test)]
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Sequence> {
        self.slots.iter_mut().filter(|slot| slot.live).map(|slot| &mut slot.sequence)
    }

    fn slot(&self, id: SeqId) -> Result<usize> {
        let (index, generation) = ((id.0 & 0xffff) as usize, id.0 >> 16);
        match self.slots.get(index) {
            Some(slot) if slot.live && u32::from(slot.generation) == generation => Ok(index),
            _ => Err(Error::StaleHandle { what: "sequence" }),
        }
    }
}
