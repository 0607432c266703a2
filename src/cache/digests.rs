//! The digests of a cache's committed blocks: a side table by group and block id, made only where
//! something needs them, which the index and the pools know nothing of. A digest is computed when
//! its block is committed, from that of the block before, and read from here ever after.

use alloc::vec::Vec;

use super::media::MediaKeys;
use super::reserve;
use crate::error::Result;
use crate::events::{Locked, Medium};
use crate::ids::{BlockId, TokenId};
use crate::prefix::{Chain, Digest};

/// The digest of each cached block; of other blocks it is stale.
#[derive(Debug)]
pub(super) struct Digests {
    block_tokens: usize,
    /// `[group][block]`.
    tables: Vec<Vec<Digest>>,
}

impl Digests {
    pub(super) fn new(block_tokens: u32, groups: usize, blocks: u32) -> Result<Self> {
        let mut tables = Vec::new();
        reserve(&mut tables, groups)?;
        for _ in 0..groups {
            let mut table = Vec::new();
            reserve(&mut table, blocks as usize)?;
            table.resize(blocks as usize, Digest::default());
            tables.push(table);
        }
        Ok(Digests { block_tokens: block_tokens as usize, tables })
    }

    /// Of a block of a group.
    pub(super) fn of(&self, group: usize, block: BlockId) -> Option<Digest> {
        self.tables.get(group)?.get(block.index()).copied()
    }

    /// Of an entry with these ids, one per group: that of any group that has a block. `None` where
    /// none has.
    pub(super) fn of_entry(&self, ids: &[BlockId]) -> Option<Digest> {
        (0..ids.len()).find_map(|group| self.of(group, ids[group]))
    }

    fn entries<'a>(
        &self,
        chain: &Chain<'a>,
    ) -> impl Iterator<Item = (&'a [BlockId], &'a [TokenId])> + use<'a> {
        let ids = chain.blocks.chunks_exact(self.tables.len());
        ids.zip(chain.tokens.chunks_exact(self.block_tokens))
    }

    /// What stands before a chain; `seed` stands before a sequence's first block in its namespace.
    /// `before` are the sequence's tokens before the chain: they are read where no group has the
    /// last of their blocks any more. All tokens are as the index has them.
    pub(super) fn before(
        &self,
        chain: &Chain,
        before: &[TokenId],
        seed: Option<Digest>,
        media: &MediaKeys,
    ) -> Option<Digest> {
        self.of_entry(chain.above).or_else(|| {
            let blocks = before.chunks_exact(self.block_tokens);
            blocks.fold(seed, |parent, tokens| Some(media.digest(parent.as_ref(), tokens)))
        })
    }

    /// Computes those of a chain, as for [`before`](Self::before).
    pub(super) fn fill(
        &mut self,
        chain: &Chain,
        before: &[TokenId],
        seed: Option<Digest>,
        media: &MediaKeys,
    ) {
        let mut parent = self.before(chain, before, seed, media);
        for (ids, tokens) in self.entries(chain) {
            let digest = media.digest(parent.as_ref(), tokens);
            for (id, table) in ids.iter().zip(&mut self.tables) {
                if let Some(place) = table.get_mut(id.index()) {
                    *place = digest;
                }
            }
            parent = Some(digest);
        }
    }

    /// Queues a chain as stored in every group that has its blocks; `seed` is what stands before
    /// the first block in its namespace. A block whose parent nobody has any more is left out: it
    /// cannot be told where it hangs.
    pub(super) fn tell_stored(
        &self,
        chain: &Chain,
        seed: Option<Digest>,
        media: &MediaKeys,
        queue: &mut Locked,
    ) {
        // Events name blocks only: what stands for a namespace is in the digests that follow it.
        let start = chain.above.is_empty();
        let first = if start { seed } else { self.of_entry(chain.above) };
        for group in 0..self.tables.len() {
            let place = (Medium::Gpu, group as u32, chain.space);
            let (mut parent, mut known) = (first, start || first.is_some());
            for (nth, (ids, tokens)) in self.entries(chain).enumerate() {
                if let Some(digest) = self.of(group, ids[group]).filter(|_| known) {
                    let named = if start && nth == 0 { None } else { parent };
                    media.tell(tokens, |tokens, media| {
                        queue.stored_with_media(place, named, digest, tokens, media);
                    });
                }
                parent = self
                    .of_entry(ids)
                    .or_else(|| known.then(|| media.digest(parent.as_ref(), tokens)));
                known |= parent.is_some();
            }
        }
    }

    /// Queues entries (`[entry][group]`) as removed.
    pub(super) fn tell_removed(&self, entries: &[BlockId], queue: &mut Locked) {
        let groups = self.tables.len();
        for group in 0..groups {
            for &id in entries.iter().skip(group).step_by(groups) {
                if let Some(digest) = self.of(group, id) {
                    queue.removed(Medium::Gpu, group as u32, digest);
                }
            }
        }
    }
}
