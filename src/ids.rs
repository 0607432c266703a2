//! The identifiers that every layer speaks: blocks, sequences, tokens.

/// A token id, as the model's tokenizer numbers it.
pub type TokenId = u32;

/// A block of a pool: an index below the pool's block count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct BlockId(pub u32);

impl BlockId {
    /// No block: what a group out of its window has in the prefix index.
    pub const NONE: BlockId = BlockId(u32::MAX);

    /// The id as an index.
    #[inline]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// A sequence of a cache. Carries a generation, so that an id outlives its sequence harmlessly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct SeqId(pub u32);

/// Separates what may share prefixes from what may not (tenant, adapter, ...). The server chooses
/// it; nothing that a client sends may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Namespace(pub u64);
