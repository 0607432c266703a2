//! The block pool: which blocks are free, and how many holders each other block has.
//!
//! Two u32 arrays and a fill level, 8 bytes a block, allocated once: reference counts (0 = free),
//! and the free ids as a stack. A stack instead of a linked list, because a batch then reads
//! neighbouring words instead of waiting for one link after the other. Last freed, first reused:
//! the block whose memory is most likely still in a cache. Every call either does what it says or
//! leaves the pool as it was. Knows nothing of sequences, tokens or bytes.
//!
//! A prefix index is one more holder, and a marked one ([`BlockPool::cache`]): so the pool can tell
//! at any time how many blocks nobody but the index holds, which is what eviction could free.

use alloc::boxed::Box;
use alloc::vec::Vec;

use super::idle::Idle;
use crate::error::{Error, Result};
use crate::ids::BlockId;

/// The blocks of one layer group. Not synchronised: one owner, or a lock around it.
#[derive(Debug)]
pub struct BlockPool {
    /// Holders of each block, and [`CACHED`] where the index is one of them; 0 means free.
    refs: Box<[u32]>,
    /// The free ids are `free[..free_len]`; the last is the next to be given out.
    free: Box<[u32]>,
    free_len: usize,
    /// Of them `free[clean..]` were freed since the last [`BlockPool::mark_clean`].
    clean: usize,
    /// Blocks whose only holder is the index.
    cached: u32,
    /// Those, in order, if they are kept in order.
    idle: Idle,
}

/// The mark of a block that the prefix index holds.
const CACHED: u32 = 1 << 31;
/// The word of a block that only the index holds.
const ONLY_CACHED: u32 = CACHED | 1;
/// The most holders.
const MAX_REFS: u32 = CACHED - 1;

/// An empty array of `len` words that `fill` completes, or an error where memory is refused.
pub(super) fn words(len: usize, fill: impl FnOnce(&mut Vec<u32>)) -> Result<Box<[u32]>> {
    let mut v = Vec::new();
    v.try_reserve_exact(len).map_err(|_| Error::OutOfMemory { bytes: len as u64 * 4 })?;
    fill(&mut v);
    Ok(v.into_boxed_slice())
}

impl BlockPool {
    /// The most blocks a pool can have: block tables are int32 on every device.
    pub const MAX_BLOCKS: u32 = i32::MAX as u32;

    /// A pool of `blocks` free blocks, 1 to [`Self::MAX_BLOCKS`]. Nothing allocates after this.
    ///
    /// # Errors
    /// `InvalidArgument` for a count out of range, `OutOfMemory` where 8 bytes a block are refused.
    pub fn new(blocks: u32) -> Result<Self> {
        if blocks == 0 || blocks > Self::MAX_BLOCKS {
            return Err(Error::invalid("blocks", "must be 1 to 2^31 - 1"));
        }
        let n = blocks as usize;
        Ok(BlockPool {
            refs: words(n, |v| v.resize(n, 0))?,
            free: words(n, |v| v.extend((0..blocks).rev()))?,
            free_len: n,
            clean: n,
            cached: 0,
            idle: Idle::off(),
        })
    }

    /// Keeps the blocks that only the prefix index holds in the order in which their last other
    /// holder left, from now on.
    ///
    /// # Errors
    /// `InvalidState` where there are such blocks already, `OutOfMemory` where 8 bytes a block are
    /// refused.
    pub fn order_cached(&mut self) -> Result<()> {
        if self.cached > 0 {
            return Err(Error::InvalidState { why: "blocks are cached already" });
        }
        self.idle = Idle::new(self.refs.len())?;
        Ok(())
    }

    /// Of the blocks that only the prefix index holds, the one that has been so for longest; `None`
    /// without [`Self::order_cached`].
    pub fn oldest_cached(&self) -> Option<BlockId> {
        self.idle.first().map(BlockId)
    }

    /// The free blocks that held something since the last [`Self::mark_clean`]: what is to be
    /// scrubbed before any block is allocated.
    pub fn dirty_blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.free[self.clean..self.free_len].iter().copied().map(BlockId)
    }

    /// Nothing that is free holds anything now.
    pub fn mark_clean(&mut self) {
        self.clean = self.free_len;
    }

    /// Counts a block that now has the holders `word` says.
    #[inline]
    fn note_idle(&mut self, word: u32, block: u32) {
        if word == ONLY_CACHED {
            self.cached += 1;
            self.idle.push(block);
        }
    }

    /// Counts a block that has the holders `word` says until now.
    #[inline]
    fn note_busy(&mut self, word: u32, block: u32) {
        if word == ONLY_CACHED {
            self.cached -= 1;
            self.idle.remove(block);
        }
    }

    /// How many blocks there are, free or not.
    #[inline]
    pub fn blocks(&self) -> u32 {
        self.refs.len() as u32
    }

    /// How many blocks are free.
    #[inline]
    pub fn free_blocks(&self) -> u32 {
        self.free_len as u32
    }

    /// How many blocks are held by the prefix index alone.
    #[inline]
    pub fn cached_blocks(&self) -> u32 {
        self.cached
    }

    /// How many hold `block`: 0 if it is free or not a block of this pool.
    #[inline]
    pub fn refs(&self, block: BlockId) -> u32 {
        self.refs.get(block.index()).copied().unwrap_or(0) & !CACHED
    }

    /// Whether the prefix index holds `block`.
    #[inline]
    pub fn is_cached(&self, block: BlockId) -> bool {
        self.refs.get(block.index()).is_some_and(|word| word & CACHED != 0)
    }

    /// Adds the prefix index to the holders of `block`.
    ///
    /// # Errors
    /// `BadBlock` if the block is not held by anyone or is cached already, `Overflow`.
    pub fn cache(&mut self, block: BlockId) -> Result<()> {
        if self.is_cached(block) {
            return Err(Error::BadBlock { block: block.0 });
        }
        self.retain(block)?;
        self.refs[block.index()] |= CACHED;
        Ok(())
    }

    /// Takes the prefix index from the holders of `block`; true if the block is free now.
    ///
    /// # Errors
    /// `BadBlock` if it is not cached.
    pub fn uncache(&mut self, block: BlockId) -> Result<bool> {
        if !self.is_cached(block) {
            return Err(Error::BadBlock { block: block.0 });
        }
        let word = self.refs[block.index()];
        self.note_busy(word, block.0);
        self.refs[block.index()] = word & !CACHED;
        self.release(block)
    }

    /// Takes a free block; the caller holds its only reference.
    ///
    /// # Errors
    /// `OutOfBlocks` where none is free.
    #[inline]
    pub fn allocate(&mut self) -> Result<BlockId> {
        let Some(top) = self.free_len.checked_sub(1) else {
            return Err(Error::OutOfBlocks { needed: 1, missing: 1 });
        };
        let id = self.free[top];
        self.free_len = top;
        self.clean = self.clean.min(top);
        self.refs[id as usize] = 1;
        Ok(BlockId(id))
    }

    /// Takes `out.len()` free blocks, all or none; the caller holds the only reference of each.
    ///
    /// # Errors
    /// `OutOfBlocks` with how many were missing; then `out` and the pool are as they were.
    pub fn allocate_n(&mut self, out: &mut [BlockId]) -> Result<()> {
        let Some(rest) = self.free_len.checked_sub(out.len()) else {
            let clamp = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            let missing = clamp(out.len() - self.free_len);
            return Err(Error::OutOfBlocks { needed: clamp(out.len()), missing });
        };
        for (slot, &id) in out.iter_mut().zip(self.free[rest..self.free_len].iter().rev()) {
            self.refs[id as usize] = 1;
            *slot = BlockId(id);
        }
        self.free_len = rest;
        self.clean = self.clean.min(rest);
        Ok(())
    }

    /// One holder more of an allocated block.
    ///
    /// # Errors
    /// `BadBlock` for a free or foreign id, `Overflow` past 2^32 - 1 holders.
    #[inline]
    pub fn retain(&mut self, block: BlockId) -> Result<()> {
        match self.refs.get_mut(block.index()) {
            None | Some(0) => Err(Error::BadBlock { block: block.0 }),
            Some(word) if *word & !CACHED == MAX_REFS => {
                Err(Error::Overflow { what: "reference count" })
            }
            Some(word) => {
                let before = *word;
                *word += 1;
                self.note_busy(before, block.0);
                Ok(())
            }
        }
    }

    /// One holder more of each block, all or none; a block may occur several times.
    ///
    /// # Errors
    /// As [`Self::retain`], of the first block that has one; then nothing changed.
    pub fn retain_n(&mut self, blocks: &[BlockId]) -> Result<()> {
        for (i, &block) in blocks.iter().enumerate() {
            if let Err(error) = self.retain(block) {
                for done in &blocks[..i] {
                    self.refs[done.index()] -= 1;
                    self.note_idle(self.refs[done.index()], done.0);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// One holder less. True if that was the last one, so that the block is free now.
    ///
    /// # Errors
    /// `BadBlock` for a free or foreign id.
    #[inline]
    pub fn release(&mut self, block: BlockId) -> Result<bool> {
        match self.refs.get_mut(block.index()) {
            // The index gives its reference up by `uncache`, nobody else for it.
            None | Some(0 | &mut ONLY_CACHED) => Err(Error::BadBlock { block: block.0 }),
            Some(refs) => {
                *refs -= 1;
                let word = *refs;
                self.note_idle(word, block.0);
                let freed = word == 0;
                if freed {
                    self.free[self.free_len] = block.0;
                    self.free_len += 1;
                }
                Ok(freed)
            }
        }
    }

    /// One holder less of each block, all or none; returns how many became free. A block may occur
    /// as often as it has holders. The blocks are freed from the last to the first, so that taking
    /// as many again gives them in the same order.
    ///
    /// # Errors
    /// `BadBlock` for the first id from the end that is free, foreign, or given more often than it
    /// is held; then nothing changed.
    pub fn free_n(&mut self, blocks: &[BlockId]) -> Result<u32> {
        let before = self.free_len;
        let mut len = before;
        for (i, block) in blocks.iter().enumerate().rev() {
            match self.refs.get_mut(block.index()) {
                None | Some(0 | &mut ONLY_CACHED) => {
                    // Below `before` the stack was not written: giving the counts back undoes all.
                    for done in &blocks[i + 1..] {
                        self.note_busy(self.refs[done.index()], done.0);
                        self.refs[done.index()] += 1;
                    }
                    return Err(Error::BadBlock { block: block.0 });
                }
                Some(refs) => {
                    *refs -= 1;
                    let word = *refs;
                    self.note_idle(word, block.0);
                    // A held block means that the stack is not full: the slot exists.
                    self.free[len] = block.0;
                    len += usize::from(word == 0);
                }
            }
        }
        self.free_len = len;
        Ok((len - before) as u32)
    }

    /// Proves that each block is exactly one of free and held. Takes time and memory in
    /// proportion to the pool: for tests and debugging.
    ///
    /// # Errors
    /// `InvalidState` says what does not hold, `OutOfMemory` where the check could not be made.
    pub fn audit(&self) -> Result<()> {
        let broken = |why| Err(Error::InvalidState { why });
        let n = self.refs.len();
        if self.free.len() != n || self.free_len > n || self.clean > self.free_len {
            return broken("pool: the free stack has the wrong size");
        }
        let mut seen = words(n, |v| v.resize(n, 0))?;
        for &id in &self.free[..self.free_len] {
            match seen.get_mut(id as usize) {
                None => return broken("pool: a foreign id is on the free stack"),
                Some(1) => return broken("pool: an id is on the free stack twice"),
                Some(mark) => *mark = 1,
            }
        }
        for (mark, refs) in seen.iter().zip(&self.refs) {
            if (*mark == 1) != (*refs == 0) || *refs == CACHED {
                return broken("pool: a block is both free and held, or neither");
            }
        }
        if self.refs.iter().filter(|&&word| word == ONLY_CACHED).count() != self.cached as usize {
            return broken("pool: the count of cached blocks is wrong");
        }
        if !self.idle.is_exactly(|block| self.refs[block] == ONLY_CACHED) {
            return broken("pool: the order of cached blocks has others");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
