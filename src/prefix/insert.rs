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
    /// Leading blocks of those given that were cached already, under the ids now in `canonical`.
    /// The index does not take the caller's ids for them.
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
    /// touched. Where an entry lacked the block of a group with a window and one is given, the index
    /// takes it, as if it was new: `canonical` has the caller's own id then, and the caller retains
    /// it.
    ///
    /// # Errors
    /// `InvalidArgument` if `tokens` are not whole blocks or `blocks` are not as many, or one without
    /// a window is [`BlockId::NONE`] where others have windows; `OutOfMemory`. Nothing is cached
    /// then and `canonical` is empty.
    pub fn insert(
        &mut self,
        space: Namespace,
        tokens: &[TokenId],
        blocks: &[BlockId],
        canonical: &mut Vec<BlockId>,
    ) -> Result<Inserted> {
        self.insert_below(space, Position::default(), tokens, blocks, canonical)
    }

    /// The same for `tokens` that follow the prefix that ends at `above`, without walking that
    /// again: for a sequence that grows, or after the lookup of its prompt. `space` is read only
    /// where `above` is the empty prefix; else it is that of `above`.
    ///
    /// # Errors
    /// As for [`Self::insert`], and `StaleHandle` if `above` is no longer cached.
    pub fn insert_below(
        &mut self,
        space: Namespace,
        above: Position,
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
        if !self.full_groups_have_ids(blocks) {
            return Err(Error::invalid("blocks", "may lack only those of groups with a window"));
        }
        self.reserve_places(count)?;
        let mut from = self.root(space);
        if self.notes_every_edge() {
            // What is noted of the blocks below is not true of those above.
            self.settle(above)?;
        }
        if above.blocks > 0 {
            (from.node, from.inside) = self.find(above)?;
            from.depth = above.blocks;
        }
        let walk = self.walk(from, tokens, Some(canonical));
        let present = (walk.depth - above.blocks) as usize;
        let stored = (count - present).min(self.blocks.free() as usize);
        let result = if walk.out_of_memory {
            Err(Error::OutOfMemory { bytes: (count * groups * 4) as u64 })
        } else if stored == 0 {
            self.settle(self.position(&walk)).map(|end| {
                self.note_use(end, above.blocks);
                self.position(&walk)
            })
        } else {
            let new = present..present + stored;
            let ids = &blocks[new.start * groups..new.end * groups];
            let new = &tokens[new.start * block_tokens..new.end * block_tokens];
            self.store(space, &walk, above.blocks, new, ids)
        };
        match result {
            Ok(at) => {
                let known = at.first(above.blocks() + present);
                self.refill(known, &blocks[..present * groups], canonical);
                Ok(Inserted { present, stored, at })
            }
            Err(error) => {
                canonical.clear();
                Err(error)
            }
        }
    }

    /// Stores whole new blocks below the end of `walk`.
    fn store(
        &mut self,
        space: Namespace,
        walk: &Walk,
        above: u32,
        tokens: &[TokenId],
        ids: &[BlockId],
    ) -> Result<Position> {
        let (block_tokens, groups) = (self.blocks.block_tokens, self.blocks.groups);
        let mut runs = core::mem::take(&mut self.runs);
        runs.clear();
        let count = (tokens.len() / block_tokens) as u32;
        let grown = self.grow_leaf(walk, count);
        // An edge for each run, a root, the upper part of a split edge, a fork.
        let reserved = self.blocks.take(count - grown.len, &mut runs).and_then(|()| {
            let nodes = if runs.is_empty() { 0 } else { runs.len() + 3 };
            self.reserve_nodes(nodes).inspect_err(|_| {
                for &run in &runs {
                    self.blocks.give(run);
                }
            })
        });
        if let Err(error) = reserved {
            if grown.len > 0 {
                self.blocks.give(grown);
            }
            self.runs = runs;
            return Err(error);
        }

        // Nothing fails from here on.
        let (mut depth, mut at, mut end) = (walk.depth, 0, walk.node);
        let mut first = NIL;
        let behind = (grown.len > 0).then_some(grown);
        for (i, run) in behind.into_iter().chain(runs.drain(..)).enumerate() {
            let next = at + run.len as usize;
            self.blocks.fill(
                run,
                &tokens[at * block_tokens..next * block_tokens],
                &ids[at * groups..next * groups],
            );
            self.place(run);
            depth += run.len;
            if i == 0 && grown.len > 0 {
                let leaf = &mut self.tree[end];
                (leaf.len, leaf.end) = (leaf.len + run.len, depth);
                self.lane_blocks[0] += u64::from(run.len);
            } else {
                let edge = self.tree.new_edge(run.start, run.len, depth);
                if first == NIL {
                    first = edge;
                }
                if at == 0 {
                    self.hang(space, walk, edge, tokens);
                } else {
                    self.tree.attach(end, edge);
                }
                end = edge;
            }
            at = next;
        }
        self.runs = runs;
        if self.notes_every_edge() {
            // Nothing was appended to an edge: the new ones begin with `first`.
            let present = self.tree.owner(first);
            let used = if self.tree[present].kind == Kind::Edge { present } else { NIL };
            self.note_use(used, above);
        }
        if first == NIL {
            self.note_use(end, 0);
        } else {
            self.note_stored(first, end);
        }
        Ok(Position { node: end, generation: self.tree[end].generation, blocks: depth })
    }

    /// Slots right behind the edge at whose end `walk` ended, if that is a leaf without pins, so
    /// that the edge can be made longer instead of hanging new ones below it. At most `count`,
    /// maybe none: also where uses are noted in every edge, for then the new blocks are not as the
    /// old ones. A short edge is moved to where all have room: sequences that are inserted a
    /// block at a time (while they are decoded) would else become chains of edges of one block.
    fn grow_leaf(&mut self, walk: &Walk, count: u32) -> Run {
        const MOVED_BLOCKS: u32 = 64;
        let none = Run { start: 0, len: 0 };
        if walk.depth == 0 || self.notes_every_edge() {
            return none;
        }
        let edge = &self.tree[walk.node];
        if walk.inside < edge.len || edge.child != NIL || edge.pins > 0 {
            return none;
        }
        let old = Run { start: edge.start, len: edge.len };
        let behind = self.blocks.take_behind(old, count);
        if behind.len > 0 || old.len > MOVED_BLOCKS {
            return behind;
        }
        let Some(whole) = self.blocks.take_whole(old.len + count) else {
            return none;
        };
        self.unplace(old);
        self.blocks.copy(old, whole.start);
        self.place(Run { start: whole.start, len: old.len });
        self.blocks.give(old);
        self.tree[walk.node].start = whole.start;
        Run { start: whole.start + old.len, len: count }
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
