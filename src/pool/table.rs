//! The block table of one sequence in one layer group.
//!
//! Invariant: a table of `tokens` tokens has exactly `ceil(tokens / block_tokens)` blocks and holds
//! one reference of each. `block_tokens` is the same in every call on a table; a call that breaks
//! the invariant's arithmetic is refused. Tables do not know their pool: the caller passes the same
//! one each time, and calls [`BlockTable::release_all`] before it drops a table (a table that is
//! only dropped leaks its references, as it has no pool to give them to).
//!
//! Writing: blocks before the last are full and never written again. The last one, if it is partly
//! full, may be written only while this table is its only holder: call
//! [`BlockTable::make_tail_writable`] first, then [`BlockTable::extend`], then write.

use alloc::vec::Vec;

use crate::error::{Error, Result};
use crate::ids::BlockId;
use crate::pool::BlockPool;

/// The blocks of one sequence in one layer group, in order.
#[derive(Debug, Default)]
pub struct BlockTable {
    blocks: Vec<BlockId>,
    tokens: usize,
    /// Leading blocks that were given up: [`BlockId::NONE`] stands for them.
    left: usize,
}

/// A copy that the caller owes: the first `tokens` tokens of block `src` to block `dst`.
///
/// It carries the reference to `src` that the table had, so `src` stays allocated, and no writer
/// can own it, until [`BlockCopy::finish`] (the copy is done) or [`BlockTable::undo_copy`] (it
/// cannot be done) gives the reference up. Dropping it instead leaks one reference.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "the block must be copied, then `finish` called"]
pub struct BlockCopy {
    /// The shared block.
    pub src: BlockId,
    /// The new block, already in the table, which is its only holder.
    pub dst: BlockId,
    /// How many tokens of it are in use, at least 1 and fewer than a block holds.
    pub tokens: usize,
}

impl BlockCopy {
    /// Gives up `src` after the copy. True if its other holders had gone, so that it is free now.
    ///
    /// # Errors
    /// `BadBlock` if this is not the pool that the copy came from.
    pub fn finish(self, pool: &mut BlockPool) -> Result<bool> {
        pool.release(self.src)
    }
}

impl BlockTable {
    /// A table without tokens.
    pub const fn new() -> Self {
        BlockTable { blocks: Vec::new(), tokens: 0, left: 0 }
    }

    /// The blocks, in token order; [`BlockId::NONE`] for those that were left behind.
    #[inline]
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// How many leading blocks were left behind.
    #[inline]
    pub fn left_blocks(&self) -> usize {
        self.left
    }

    /// How many tokens the table covers.
    #[inline]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Checks `block_tokens` against what the table was built with, as far as that shows.
    fn check(&self, block_tokens: usize) -> Result<()> {
        if block_tokens == 0 {
            return Err(Error::invalid("block_tokens", "must be at least 1"));
        }
        if self.tokens.div_ceil(block_tokens) != self.blocks.len() {
            return Err(Error::invalid("block_tokens", "must be that of the table's other calls"));
        }
        Ok(())
    }

    /// How many blocks [`Self::extend`] by `extra_tokens` would take. A shared tail needs one more
    /// for its copy: see [`Self::tail_shared`].
    ///
    /// # Errors
    /// `InvalidArgument` for a wrong `block_tokens`, `Overflow` for a length past 64 bits.
    pub fn blocks_needed(&self, extra_tokens: usize, block_tokens: usize) -> Result<usize> {
        self.check(block_tokens)?;
        let tokens = self.tokens.checked_add(extra_tokens);
        let tokens = tokens.ok_or(Error::Overflow { what: "sequence length" })?;
        Ok(tokens.div_ceil(block_tokens) - self.blocks.len())
    }

    /// Whether the last block is partly full and has other holders, so that
    /// [`Self::make_tail_writable`] would take a block.
    pub fn tail_shared(&self, pool: &BlockPool, block_tokens: usize) -> bool {
        let full = block_tokens == 0 || self.tokens.is_multiple_of(block_tokens);
        !full && self.blocks.last().is_some_and(|&b| pool.refs(b) > 1)
    }

    /// Makes room for `extra_tokens` more tokens, all or nothing. Room in a shared tail counts as
    /// room: make the tail writable before writing.
    ///
    /// # Errors
    /// As [`Self::blocks_needed`]; `OutOfBlocks` with how many were missing; `OutOfMemory` where
    /// the table itself cannot grow. Nothing changed then.
    pub fn extend(
        &mut self,
        pool: &mut BlockPool,
        extra_tokens: usize,
        block_tokens: usize,
    ) -> Result<()> {
        let needed = self.blocks_needed(extra_tokens, block_tokens)?;
        if needed > pool.free_blocks() as usize {
            // Before the table grows: a hostile length must not allocate.
            let clamp = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            let missing = clamp(needed - pool.free_blocks() as usize);
            return Err(Error::OutOfBlocks { needed: clamp(needed), missing });
        }
        let old = self.blocks.len();
        self.reserve(needed)?;
        self.blocks.resize(old + needed, BlockId::NONE);
        pool.allocate_n(&mut self.blocks[old..])?;
        self.tokens += extra_tokens;
        Ok(())
    }

    fn reserve(&mut self, blocks: usize) -> Result<()> {
        let bytes = (blocks as u64).saturating_mul(4);
        self.blocks.try_reserve(blocks).map_err(|_| Error::OutOfMemory { bytes })
    }

    /// Gives up the first `blocks` blocks, as far as that has not been done: those that a window
    /// has left behind. Their places stay, so that positions are as they were. Returns how many
    /// became free.
    ///
    /// # Errors
    /// `InvalidArgument` for more blocks than there are, `BadBlock` if the pool is not this table's.
    /// Nothing changed then.
    pub fn leave(&mut self, pool: &mut BlockPool, blocks: usize) -> Result<u32> {
        if blocks > self.blocks.len() {
            return Err(Error::invalid("blocks", "must not exceed the table's blocks"));
        }
        if blocks <= self.left {
            return Ok(0);
        }
        let mut freed = 0;
        // From the first on: what was left behind first is the first to be taken by others.
        for place in self.left..blocks {
            freed += u32::from(pool.release(self.blocks[place])?);
            self.blocks[place] = BlockId::NONE;
            self.left = place + 1;
        }
        Ok(freed)
    }

    /// A second table of the same tokens: every block gets one holder more, none is copied.
    ///
    /// # Errors
    /// `BadBlock` if the pool is not this table's, `Overflow` of a reference count, `OutOfMemory`.
    /// Nothing changed then.
    pub fn fork(&self, pool: &mut BlockPool) -> Result<BlockTable> {
        let mut copy = BlockTable::new();
        copy.reserve(self.blocks.len())?;
        pool.retain_n(&self.blocks[self.left..])?;
        copy.blocks.extend_from_slice(&self.blocks);
        (copy.tokens, copy.left) = (self.tokens, self.left);
        Ok(copy)
    }

    /// Gives the table a tail of its own before it is written: if the last block is partly full
    /// and shared, a new block takes its place, and the caller owes the copy that is returned.
    /// `None` if there is nothing to do.
    ///
    /// # Errors
    /// `InvalidArgument` for a wrong `block_tokens`, `OutOfBlocks` where none is free. Nothing
    /// changed then.
    pub fn make_tail_writable(
        &mut self,
        pool: &mut BlockPool,
        block_tokens: usize,
    ) -> Result<Option<BlockCopy>> {
        self.check(block_tokens)?;
        if !self.tail_shared(pool, block_tokens) {
            return Ok(None);
        }
        let dst = pool.allocate()?;
        let last = self.blocks.len() - 1;
        let src = core::mem::replace(&mut self.blocks[last], dst);
        Ok(Some(BlockCopy { src, dst, tokens: self.tokens % block_tokens }))
    }

    /// Takes [`Self::make_tail_writable`] back: the shared block is the tail again and the new one
    /// is free. Only before the table changes in any other way.
    ///
    /// # Errors
    /// `InvalidArgument` if the copy is not the one that this table's tail awaits. Nothing changed
    /// then, but the copy is consumed: its reference to `src` is leaked.
    pub fn undo_copy(&mut self, pool: &mut BlockPool, copy: BlockCopy) -> Result<()> {
        match self.blocks.last_mut() {
            Some(tail) if *tail == copy.dst && pool.refs(copy.src) > 0 => {
                pool.release(copy.dst)?;
                *tail = copy.src;
                Ok(())
            }
            _ => Err(Error::invalid("copy", "must be that of this table's last block")),
        }
    }

    /// Shortens the table to `tokens` tokens and gives up the blocks past them; returns how many
    /// became free. If that cuts a shared block, the new tail is shared.
    ///
    /// # Errors
    /// `InvalidArgument` for a wrong `block_tokens` or more tokens than there are, `InvalidState`
    /// where a block that it would cut was left behind, `BadBlock` if the pool is not this table's.
    /// Nothing changed then.
    pub fn truncate(
        &mut self,
        pool: &mut BlockPool,
        tokens: usize,
        block_tokens: usize,
    ) -> Result<u32> {
        self.check(block_tokens)?;
        if tokens > self.tokens {
            return Err(Error::invalid("tokens", "must not exceed the table's length"));
        }
        let keep = tokens.div_ceil(block_tokens);
        if tokens / block_tokens < self.left {
            return Err(Error::InvalidState { why: "the blocks of that length were left behind" });
        }
        let freed = pool.free_n(&self.blocks[keep..])?;
        self.blocks.truncate(keep);
        self.tokens = tokens;
        Ok(freed)
    }

    /// Appends full blocks that others hold already (those of a prefix hit) and becomes one more
    /// holder of each. The table must end at a block boundary. At the start of a table
    /// [`BlockId::NONE`] stands for a block that a window has left behind.
    ///
    /// # Errors
    /// `InvalidArgument` for a wrong `block_tokens` or a partly full tail, `BadBlock` for a block
    /// that nobody holds, `Overflow`, `OutOfMemory`. Nothing changed then.
    pub fn adopt(
        &mut self,
        pool: &mut BlockPool,
        blocks: impl IntoIterator<Item = BlockId>,
        block_tokens: usize,
    ) -> Result<()> {
        self.check(block_tokens)?;
        if !self.tokens.is_multiple_of(block_tokens) {
            return Err(Error::invalid("table", "must end at a block boundary to adopt blocks"));
        }
        let (old, left) = (self.blocks.len(), self.left);
        for block in blocks {
            let step = self.reserve(1).and_then(|()| {
                if block == BlockId::NONE && self.left == self.blocks.len() {
                    self.left += 1;
                    return Ok(());
                }
                pool.retain(block)
            });
            if let Err(error) = step {
                self.unadopt(pool, old, left)?;
                return Err(error);
            }
            self.blocks.push(block);
        }
        // Each block is a 4-byte id in memory, but a block may hold up to usize::MAX tokens.
        let Some(tokens) = self.blocks.len().checked_mul(block_tokens) else {
            self.unadopt(pool, old, left)?;
            return Err(Error::Overflow { what: "sequence length" });
        };
        self.tokens = tokens;
        Ok(())
    }

    fn unadopt(&mut self, pool: &mut BlockPool, old: usize, left: usize) -> Result<()> {
        pool.free_n(&self.blocks[old.max(self.left)..])?;
        self.blocks.truncate(old);
        self.left = left;
        Ok(())
    }

    /// Replaces block `i` by a block of the same contents that others hold already (a duplicate
    /// is merged): holds the new one, gives up the old one. True if the old one is free now.
    ///
    /// # Errors
    /// `InvalidArgument` for an index past the table, `BadBlock` for a block that nobody holds,
    /// `Overflow`. Nothing changed then.
    pub fn replace(&mut self, pool: &mut BlockPool, i: usize, block: BlockId) -> Result<bool> {
        let Some(slot) = self.blocks.get_mut(i) else {
            return Err(Error::invalid("index", "must be below the table's blocks"));
        };
        pool.retain(block)?;
        match pool.release(*slot) {
            Ok(freed) => {
                *slot = block;
                Ok(freed)
            }
            Err(error) => {
                pool.release(block)?;
                Err(error)
            }
        }
    }

    /// Gives every block up and becomes an empty table; returns how many became free. The memory
    /// of the table is kept for its next use.
    ///
    /// # Errors
    /// `BadBlock` if the pool is not this table's. Nothing changed then.
    pub fn release_all(&mut self, pool: &mut BlockPool) -> Result<u32> {
        let freed = pool.free_n(&self.blocks[self.left..])?;
        self.blocks.clear();
        (self.tokens, self.left) = (0, 0);
        Ok(freed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BT: usize = 4;

    fn table(pool: &mut BlockPool, tokens: usize) -> BlockTable {
        let mut t = BlockTable::new();
        t.extend(pool, tokens, BT).unwrap();
        t
    }

    #[test]
    fn extends_by_whole_blocks_and_all_or_nothing() {
        let mut pool = BlockPool::new(4).unwrap();
        let mut t = table(&mut pool, 5);
        assert_eq!((t.blocks().len(), t.tokens()), (2, 5));
        assert_eq!(t.blocks_needed(3, BT), Ok(0));
        assert_eq!(t.blocks_needed(4, BT), Ok(1));
        let error = t.extend(&mut pool, 12, BT).unwrap_err();
        assert_eq!(error, Error::OutOfBlocks { needed: 3, missing: 1 });
        assert_eq!((t.blocks().len(), t.tokens(), pool.free_blocks()), (2, 5, 2));
        t.extend(&mut pool, 11, BT).unwrap();
        assert_eq!((t.blocks().len(), pool.free_blocks()), (4, 0));
    }

    #[test]
    fn hostile_lengths_are_errors() {
        let mut pool = BlockPool::new(4).unwrap();
        let mut t = table(&mut pool, 5);
        assert_eq!(
            t.blocks_needed(usize::MAX, BT),
            Err(Error::Overflow { what: "sequence length" })
        );
        let huge = t.extend(&mut pool, usize::MAX - 5, BT).unwrap_err();
        assert!(matches!(huge, Error::OutOfBlocks { .. }), "{huge:?}");
        for wrong in [0, 1, 8] {
            assert!(matches!(t.extend(&mut pool, 1, wrong), Err(Error::InvalidArgument { .. })));
            assert!(matches!(t.truncate(&mut pool, 1, wrong), Err(Error::InvalidArgument { .. })));
        }
        assert!(matches!(t.truncate(&mut pool, 6, BT), Err(Error::InvalidArgument { .. })));
        let adopted = BlockTable::new().adopt(&mut pool, t.blocks().to_vec(), usize::MAX);
        assert_eq!(adopted, Err(Error::Overflow { what: "sequence length" }));
        assert_eq!((t.blocks().len(), t.tokens(), pool.free_blocks()), (2, 5, 2));
    }

    #[test]
    fn the_tail_is_copied_only_where_shared_and_partly_full() {
        let mut pool = BlockPool::new(8).unwrap();
        let mut a = table(&mut pool, 6);
        assert_eq!(a.make_tail_writable(&mut pool, BT), Ok(None));
        let mut b = a.fork(&mut pool).unwrap();
        let src = a.blocks()[1];
        let copy = b.make_tail_writable(&mut pool, BT).unwrap().unwrap();
        assert_eq!((copy.src, copy.dst, copy.tokens), (src, b.blocks()[1], 2));
        // The source outlives its table until the copy is finished.
        a.release_all(&mut pool).unwrap();
        assert_eq!(pool.refs(src), 1);
        assert_eq!(copy.finish(&mut pool), Ok(true));
        b.extend(&mut pool, 2, BT).unwrap();
        let mut c = b.fork(&mut pool).unwrap();
        assert_eq!(c.make_tail_writable(&mut pool, BT), Ok(None), "a full tail is not written");
        b.release_all(&mut pool).unwrap();
        c.release_all(&mut pool).unwrap();
        assert_eq!(pool.free_blocks(), 8);
        pool.audit().unwrap();
    }

    #[test]
    fn a_copy_can_be_undone() {
        let mut pool = BlockPool::new(3).unwrap();
        let mut a = table(&mut pool, 3);
        let mut b = a.fork(&mut pool).unwrap();
        let copy = b.make_tail_writable(&mut pool, BT).unwrap().unwrap();
        b.undo_copy(&mut pool, copy).unwrap();
        assert_eq!((b.blocks(), pool.refs(a.blocks()[0]), pool.free_blocks()), (a.blocks(), 2, 2));
        let wrong = BlockCopy { src: a.blocks()[0], dst: BlockId(2), tokens: 3 };
        assert!(b.undo_copy(&mut pool, wrong).is_err());
        a.release_all(&mut pool).unwrap();
        b.release_all(&mut pool).unwrap();
        pool.audit().unwrap();
    }

    #[test]
    fn adopting_is_all_or_nothing_and_at_boundaries() {
        let mut pool = BlockPool::new(4).unwrap();
        let held = table(&mut pool, 8);
        let mut t = BlockTable::new();
        let bad = [held.blocks()[0], BlockId(3)];
        assert_eq!(t.adopt(&mut pool, bad, BT), Err(Error::BadBlock { block: 3 }));
        assert_eq!((t.tokens(), pool.refs(held.blocks()[0])), (0, 1));
        t.adopt(&mut pool, held.blocks().iter().copied(), BT).unwrap();
        assert_eq!((t.tokens(), t.blocks()), (8, held.blocks()));
        t.extend(&mut pool, 1, BT).unwrap();
        assert!(t.adopt(&mut pool, [held.blocks()[0]], BT).is_err());
        t.truncate(&mut pool, 7, BT).unwrap();
        assert!(t.tail_shared(&pool, BT), "cutting into an adopted block leaves it shared");
    }

    #[test]
    fn what_is_left_behind_keeps_its_place() {
        let mut pool = BlockPool::new(8).unwrap();
        let mut a = table(&mut pool, 14);
        let held = a.blocks().to_vec();
        assert_eq!(a.leave(&mut pool, 2), Ok(2));
        assert_eq!((a.leave(&mut pool, 1), a.left_blocks(), a.tokens()), (Ok(0), 2, 14));
        assert_eq!(a.blocks(), [BlockId::NONE, BlockId::NONE, held[2], held[3]]);
        assert!(a.leave(&mut pool, 5).is_err());
        let mut b = a.fork(&mut pool).unwrap();
        assert_eq!((pool.refs(held[2]), b.left_blocks()), (2, 2));
        assert!(matches!(b.truncate(&mut pool, 7, BT), Err(Error::InvalidState { .. })));
        b.truncate(&mut pool, 8, BT).unwrap();
        b.extend(&mut pool, 1, BT).unwrap();
        b.truncate(&mut pool, 9, BT).unwrap();
        // A hit behind a window: the blocks before it are none.
        let mut c = BlockTable::new();
        let hit = [BlockId::NONE, BlockId::NONE, held[2]];
        c.adopt(&mut pool, hit, BT).unwrap();
        assert_eq!((c.blocks(), c.tokens(), c.left_blocks()), (&hit[..], 12, 2));
        let holes = [held[2], BlockId::NONE];
        assert!(BlockTable::new().adopt(&mut pool, holes, BT).is_err());
        assert!(c.adopt(&mut pool, [BlockId::NONE], BT).is_err());
        assert_eq!((pool.refs(held[2]), c.left_blocks()), (2, 2));
        for mut table in [a, b, c] {
            table.release_all(&mut pool).unwrap();
        }
        assert_eq!(pool.free_blocks(), 8);
        pool.audit().unwrap();
    }

    #[test]
    fn duplicates_merge() {
        let mut pool = BlockPool::new(4).unwrap();
        let a = table(&mut pool, 8);
        let mut b = table(&mut pool, 8);
        assert_eq!(b.replace(&mut pool, 0, a.blocks()[0]), Ok(true));
        assert_eq!((b.blocks()[0], pool.refs(a.blocks()[0])), (a.blocks()[0], 2));
        assert_eq!(b.replace(&mut pool, 0, a.blocks()[0]), Ok(false), "itself: nothing changes");
        assert_eq!(pool.refs(a.blocks()[0]), 2);
        assert!(b.replace(&mut pool, 2, a.blocks()[0]).is_err());
        assert_eq!(b.replace(&mut pool, 1, BlockId(9)), Err(Error::BadBlock { block: 9 }));
        pool.audit().unwrap();
    }
}
