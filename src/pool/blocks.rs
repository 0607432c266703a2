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
    /// Blocks whose only holder is the index.
    cached: u32,
}

/// The mark of a block that the prefix index holds.
const CACHED: u32 = 1 << 31;
/// The word of a block that only the index holds.
const ONLY_CACHED: u32 = CACHED | 1;
/// The most holders.
const MAX_REFS: u32 = CACHED - 1;

/// An empty array of `len` words that `fill` completes, or an error where memory is refused.
fn words(len: usize, fill: impl FnOnce(&mut Vec<u32>)) -> Result<Box<[u32]>> {
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
            cached: 0,
        })
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
        let word = &mut self.refs[block.index()];
        self.cached -= u32::from(*word == ONLY_CACHED);
        *word &= !CACHED;
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
                self.cached -= u32::from(*word == ONLY_CACHED);
                *word += 1;
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
                    self.cached += u32::from(self.refs[done.index()] == ONLY_CACHED);
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
                self.cached += u32::from(*refs == ONLY_CACHED);
                let freed = *refs == 0;
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
                        self.cached -= u32::from(self.refs[done.index()] == ONLY_CACHED);
                        self.refs[done.index()] += 1;
                    }
                    return Err(Error::BadBlock { block: block.0 });
                }
                Some(refs) => {
                    *refs -= 1;
                    self.cached += u32::from(*refs == ONLY_CACHED);
                    // A held block means that the stack is not full: the slot exists.
                    self.free[len] = block.0;
                    len += usize::from(*refs == 0);
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
        if self.free.len() != n || self.free_len > n {
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
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_out_of_range_are_refused() {
        for blocks in [0, BlockPool::MAX_BLOCKS + 1, u32::MAX] {
            assert!(matches!(BlockPool::new(blocks), Err(Error::InvalidArgument { .. })));
        }
    }

    #[test]
    fn a_batch_is_all_or_nothing() {
        let mut pool = BlockPool::new(4).unwrap();
        let mut out = [BlockId::NONE; 5];
        let error = pool.allocate_n(&mut out).unwrap_err();
        assert_eq!(error, Error::OutOfBlocks { needed: 5, missing: 1 });
        assert_eq!((out, pool.free_blocks()), ([BlockId::NONE; 5], 4));
        pool.allocate_n(&mut out[..4]).unwrap();
        assert_eq!(out[..4], [0, 1, 2, 3].map(BlockId));
        assert_eq!(pool.allocate(), Err(Error::OutOfBlocks { needed: 1, missing: 1 }));
        pool.audit().unwrap();
    }

    #[test]
    fn a_bad_batch_frees_nothing() {
        let mut pool = BlockPool::new(4).unwrap();
        let mut b = [BlockId::NONE; 3];
        pool.allocate_n(&mut b).unwrap();
        pool.retain(b[1]).unwrap();
        for bad in [[b[0], b[1], BlockId(3)], [BlockId(9), b[1], b[2]], [b[0], b[2], b[0]]] {
            assert!(matches!(pool.free_n(&bad), Err(Error::BadBlock { .. })));
            assert_eq!((pool.free_blocks(), b.map(|b| pool.refs(b))), (1, [1, 2, 1]));
            pool.audit().unwrap();
        }
        assert_eq!(pool.free_n(&[b[1], b[0], b[1]]), Ok(2));
        assert_eq!(pool.free_blocks(), 3);
        pool.audit().unwrap();
    }

    #[test]
    fn freed_blocks_come_back_in_their_order() {
        let mut pool = BlockPool::new(8).unwrap();
        let mut b = [BlockId::NONE; 6];
        pool.allocate_n(&mut b).unwrap();
        pool.free_n(&b[2..5]).unwrap();
        let mut again = [BlockId::NONE; 3];
        pool.allocate_n(&mut again).unwrap();
        assert_eq!(again, b[2..5]);
    }

    #[test]
    fn counts_cannot_overflow_or_go_below_zero() {
        let mut pool = BlockPool::new(2).unwrap();
        let b = pool.allocate().unwrap();
        pool.refs[b.index()] = MAX_REFS - 1;
        let error = Err(Error::Overflow { what: "reference count" });
        assert_eq!(pool.retain_n(&[b, b]), error);
        assert_eq!(pool.refs(b), MAX_REFS - 1);
        pool.retain(b).unwrap();
        assert_eq!(pool.retain(b), error);
        pool.refs[b.index()] = 1;
        assert_eq!(pool.release(b), Ok(true));
        assert_eq!(pool.release(b), Err(Error::BadBlock { block: b.0 }));
        assert_eq!(pool.retain(BlockId::NONE), Err(Error::BadBlock { block: u32::MAX }));
        pool.audit().unwrap();
    }

    #[test]
    fn the_index_is_one_holder_more() {
        let mut pool = BlockPool::new(4).unwrap();
        let b = pool.allocate().unwrap();
        assert!(pool.uncache(b).is_err() && pool.cache(BlockId(1)).is_err());
        pool.cache(b).unwrap();
        assert!(pool.cache(b).is_err());
        assert_eq!((pool.refs(b), pool.cached_blocks()), (2, 0));
        assert_eq!(pool.free_n(&[b]), Ok(0));
        assert_eq!((pool.refs(b), pool.cached_blocks(), pool.free_blocks()), (1, 1, 3));
        // The index's own reference is not for others to give up.
        assert!(pool.release(b).is_err() && pool.free_n(&[b]).is_err());
        pool.audit().unwrap();
        pool.retain_n(&[b, b]).unwrap();
        assert!(
            pool.free_n(&[BlockId(3), b, b]).is_err() && pool.retain_n(&[b, BlockId(3)]).is_err()
        );
        assert_eq!((pool.refs(b), pool.cached_blocks()), (3, 0));
        assert_eq!(pool.uncache(b), Ok(false));
        assert_eq!(pool.free_n(&[b, b]), Ok(1));
        let c = pool.allocate().unwrap();
        pool.cache(c).unwrap();
        assert_eq!((pool.release(c), pool.uncache(c)), (Ok(false), Ok(true)));
        assert_eq!(pool.free_blocks(), 4);
        pool.audit().unwrap();
    }

    #[test]
    fn the_audit_notices_damage() {
        let damage: [fn(&mut BlockPool); 6] = [
            |p| p.cached = 1,
            |p| p.refs[3] = CACHED,
            |p| p.refs[3] = 1,
            |p| p.free[0] = p.free[1],
            |p| p.free_len -= 1,
            |p| p.free[1] = 77,
        ];
        for harm in damage {
            let mut pool = BlockPool::new(4).unwrap();
            pool.audit().unwrap();
            harm(&mut pool);
            assert!(matches!(pool.audit(), Err(Error::InvalidState { .. })));
        }
    }
}
