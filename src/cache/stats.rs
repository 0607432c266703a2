//! What a cache counts.

use super::KvCache;

/// Counts since creation; tokens and blocks, never rates.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Totals {
    pub looked_up_tokens: u64,
    pub hit_tokens: u64,
    pub evicted_blocks: u64,
    pub copied_blocks: u64,
    pub merged_blocks: u64,
    pub unsealed_blocks: u64,
}

/// A snapshot of a cache. Block counts are of the first layer group; in a cache with several
/// groups they are equal until windows release blocks early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheStats {
    /// Blocks of the pool.
    pub blocks: u32,
    /// Blocks that hold nothing.
    pub free_blocks: u32,
    /// Blocks that only the prefix index holds: reusable, and evictable.
    pub cached_blocks: u32,
    /// Blocks that sequences use.
    pub referenced_blocks: u32,
    /// Live sequences.
    pub sequences: u32,
    /// Tokens whose K and V the live sequences hold, shared ones counted for each.
    pub sequence_tokens: u64,
    /// Unused slots in the last blocks of live sequences, in tokens.
    pub waste_tokens: u64,
    /// Bytes of one block in all groups.
    pub block_bytes: u64,
    /// Bytes of the whole pool in all groups.
    pub pool_bytes: u64,
    /// Prompt tokens given to `start`.
    pub looked_up_tokens: u64,
    /// Those of them that were found.
    pub hit_tokens: u64,
    /// Entries taken out of the prefix index to make room.
    pub evicted_blocks: u64,
    /// Blocks copied on write or for a partial hit.
    pub copied_blocks: u64,
    /// Blocks given back because the index had their tokens already.
    pub merged_blocks: u64,
    /// Blocks of the staging pools, for raw rows of formats with sealed tiles; 0 without.
    pub staging_blocks: u32,
    /// Those of them that are in use.
    pub staged_blocks: u32,
    /// Bytes of the staging pools and of the scratch beside them, in all groups.
    pub staging_bytes: u64,
    /// Full tiles that stay raw because their rows cannot be sealed (NaN, infinity, out of range).
    pub unsealed_blocks: u64,
    /// Attention calls (one a layer and step) on a device that read a shared prefix once for all
    /// sequences that have it.
    pub cascades: u64,
}

impl KvCache {
    /// Counts blocks, sequences and what happened so far.
    pub fn stats(&self) -> CacheStats {
        let pool = &self.pools[0];
        let block_tokens = u64::from(self.spec.block_tokens);
        let tokens = || {
            // A step in flight already holds slots for its tokens.
            self.sequences.iter().map(|sequence| sequence.tables[0].tokens() as u64)
        };
        let block_bytes = self.stores.iter().map(|store| store.layout().block_bytes()).sum::<u64>();
        let staging = || self.staging.iter().flatten();
        CacheStats {
            blocks: pool.blocks(),
            free_blocks: pool.free_blocks(),
            cached_blocks: pool.cached_blocks(),
            referenced_blocks: pool.blocks() - pool.free_blocks() - pool.cached_blocks(),
            sequences: self.sequences.live(),
            sequence_tokens: tokens().sum(),
            waste_tokens: tokens().map(|n| n.next_multiple_of(block_tokens) - n).sum(),
            block_bytes,
            pool_bytes: self.stores.iter().map(|store| store.bytes()).sum(),
            looked_up_tokens: self.totals.looked_up_tokens,
            hit_tokens: self.totals.hit_tokens,
            evicted_blocks: self.totals.evicted_blocks,
            copied_blocks: self.totals.copied_blocks,
            merged_blocks: self.totals.merged_blocks,
            staging_blocks: staging().map(|pool| pool.blocks()).sum(),
            staged_blocks: staging().map(|pool| pool.blocks() - pool.free_blocks()).sum(),
            staging_bytes: self.stores.iter().map(|store| store.raw_bytes()).sum(),
            unsealed_blocks: self.totals.unsealed_blocks,
            cascades: self.stores.iter().map(|store| store.cascades()).sum(),
        }
    }
}
