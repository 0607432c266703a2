//! Insertion: what is new hangs below what is there already.

use alloc::vec::Vec;

use super::blocks::Run;
use super::lookup::Walk;
use super::tree::Kind;
use super::{NIL, Position, PrefixIndex};
use crate::error::{Error, Result};
use crate::ids::{BlockId, Namespace, TokenId};

/// What an insertion did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inserted {
    /// Leading blocks that were cached already, under the ids now in `canonical`. The index does
    /// not take the caller's ids for them.
    pub present: usize,
    /// Blocks after those that are cached now: the caller retains their ids for the index. Fewer
    /// than the rest if the index is full: evict and insert again to store more.
    pub stored: usize,
    /// The end of the last of both, for [`PrefixIndex::lock`].
    pub at: Position,
}

impl PrefixIndex {
    /// Caches `tokens`, whole blocks, with the ids `blocks` (`[block][group]`), in `space`.
    ///
    /// `canonical` receives the ids of the blocks that were cached already, `[block][group]`, so
    /// that the caller can use those and give its duplicates up. The whole sequence counts as
    /// touched.
    ///
    /// # Errors
    /// `InvalidArgument` if `tokens` are not whole blocks or `blocks` are not as many, `OutOfMemory`.
    /// Nothing is cached then and `canonical` is empty.
    pub fn insert(
        &mut self,
        space: Namespace,
        tokens: &[TokenId],
        blocks: &[BlockId],
        canonical: &mut Vec<BlockId>,
    ) -> Result<Inserted> {
        let (block_tokens, groups) = (self.blocks.block_tokens, self.blocks.groups);
        canonical.clear();
        if !tokens.len().is_multiple_of(block_tokens) {
            return Err(Error::invalid("tokens", "must be whole blocks"));
        }
        let count = tokens.len() / block_tokens;
        if count.checked_mul(groups) != Some(blocks.len()) {
            return Err(Error::invalid("blocks", "must be one id per block and group"));
        }
        let walk = self.walk(space, tokens, Some(canonical));
        let present = walk.depth as usize;
        let stored = (count - present).min(self.blocks.free() as usize);
        let result = if walk.out_of_memory {
            Err(Error::OutOfMemory { bytes: (count * groups * 4) as u64 })
        } else if stored == 0 {
            self.touch(self.position(&walk)).map(|()| self.position(&walk))
        } else {
            let new = present..present + stored;
            let ids = &blocks[new.start * groups..new.end * groups];
            let new = &tokens[new.start * block_tokens..new.end * block_tokens];
            self.store(space, &walk, new, ids)
        };
        match result {
            Ok(at) => Ok(Inserted { present, stored, at }),
            Err(error) => {
                canonical.clear();
                Err(error)
            }
        }
    }

    /// Hangs whole new blocks below the end of `walk`.
    fn store(
        &mut self,
        space: Namespace,
        walk: &Walk,
        tokens: &[TokenId],
        ids: &[BlockId],
    ) -> Result<Position> {
        let (block_tokens, groups) = (self.blocks.block_tokens, self.blocks.groups);
        let mut runs = core::mem::take(&mut self.runs);
        runs.clear();
        let count = (tokens.len() / block_tokens) as u32;
        // An edge for each run, a root, the upper part of a split edge, a fork.
        let reserved = self.blocks.take(count, &mut runs).and_then(|()| {
            self.reserve_nodes(runs.len() + 3).inspect_err(|_| {
                for &run in &runs {
                    self.blocks.give(run);
                }
            })
        });
        if let Err(error) = reserved {
            self.runs = runs;
            return Err(error);
        }

        // Nothing fails from here on.
        let (mut depth, mut at, mut end) = (walk.depth, 0, NIL);
        for &run in &runs {
            let next = at + run.len as usize;
            self.blocks.fill(
                run,
                &tokens[at * block_tokens..next * block_tokens],
                &ids[at * groups..next * groups],
            );
            depth += run.len;
            let edge = self.tree.new_edge(run.start, run.len, depth);
            if end == NIL {
                self.hang(space, walk, edge, tokens);
            } else {
                self.tree.attach(end, edge);
            }
            (at, end) = (next, edge);
        }
        self.runs = runs;
        self.tree[end].stamp = self.tick();
        self.queue_if_leaf(end);
        Ok(Position { node: end, generation: self.tree[end].generation, blocks: depth })
    }

    /// Hangs `edge`, which begins with `tokens`, below the end of `walk`.
    fn hang(&mut self, space: Namespace, walk: &Walk, edge: u32, tokens: &[TokenId]) {
        let tree = &mut self.tree;
        let owner = match walk.node {
            NIL => tree.root_or_new(space),
            node if walk.inside < tree[node].len => tree.split(node, walk.inside),
            node => node,
        };
        if tree[owner].child == NIL {
            tree.attach(owner, edge);
            return;
        }
        // All below `owner` agree with `near` up to the fork above which the new edge leaves.
        let token = tokens[walk.common as usize];
        let mut near = walk.near;
        while tree[near].kind != Kind::Fork || tree[near].start > walk.common {
            let parent = tree[near].parent;
            if tree[parent].kind == Kind::Fork && tree[parent].start >= walk.common {
                near = parent;
                continue;
            }
            let below = &tree[tree.some_edge(near)];
            let first = self.blocks.tokens(Run { start: below.start, len: 1 });
            near = tree.fork_above(near, walk.common, first[walk.common as usize]);
        }
        tree.add_branch(near, edge, token);
    }
}
