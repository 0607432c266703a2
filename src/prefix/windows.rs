//! Layer groups with a sliding window: blocks that one group no longer has, and what is a hit then.
//!
//! A query sees the last tokens of a window only, so a block far behind a sequence's end serves its
//! group no more, while groups of full attention need it still. The entry stays; the group's id in
//! it becomes [`BlockId::NONE`] ([`PrefixIndex::forget`]) and its block is free for others. Later a
//! prefix is a hit as far as every group can serve it: one with a window of `w` tokens must have the
//! blocks of the `w - 1` tokens before the end, the others all. Who computes such a block again and
//! inserts it puts it back.
//!
//! Finding the entry of a block is a look into a hash table that stores slots and compares ids.

use alloc::vec::Vec;

use super::PrefixIndex;
use super::blocks::Run;
use super::table::Table;
use super::tree::Kind;
use super::{NIL, Position};
use crate::error::{Error, Result};
use crate::ids::BlockId;
use crate::layout::MAX_GROUPS;

/// The windows of an index; none where every group sees everything.
#[derive(Debug)]
pub(super) struct Windows {
    /// The groups with a window, and it in tokens.
    groups: Vec<(usize, u32)>,
    /// (group, block) to slot, for every id that a group with a window has.
    places: Table,
}

/// The first block that a query at position `tokens` needs of a group with a window, which includes
/// the query's own token.
pub fn first_visible_block(tokens: usize, window: u32, block_tokens: usize) -> usize {
    (tokens + 1).saturating_sub(window as usize) / block_tokens
}

fn key(group: usize, block: BlockId) -> u64 {
    (group as u64) << 32 | u64::from(block.0)
}

impl Windows {
    pub(super) const fn none() -> Self {
        Windows { groups: Vec::new(), places: Table::new(0) }
    }

    #[inline]
    pub(super) fn is_none(&self) -> bool {
        self.groups.is_empty()
    }

    pub(super) fn bytes(&self) -> usize {
        self.places.bytes()
    }

    /// How many of the first `blocks` blocks, whose ids are `ids`, every group can serve.
    fn served(&self, ids: &[BlockId], stride: usize, blocks: usize, block_tokens: usize) -> usize {
        let has = |block: usize, group: usize| ids[block * stride + group] != BlockId::NONE;
        let first =
            |blocks, window| first_visible_block(blocks * block_tokens, window, block_tokens);
        let whole = self.groups.iter().all(|&(group, window)| {
            (first(blocks, window)..blocks).rev().all(|block| has(block, group))
        });
        if whole {
            return blocks;
        }
        // How many blocks up to here each group has without a gap.
        let (mut runs, mut best) = ([0usize; MAX_GROUPS], 0);
        for block in 0..blocks {
            let mut all = true;
            for (run, &(group, window)) in runs.iter_mut().zip(&self.groups) {
                *run = if has(block, group) { *run + 1 } else { 0 };
                all &= block + 1 - first(block + 1, window) <= *run;
            }
            if all {
                best = block + 1;
            }
        }
        best
    }
}

impl PrefixIndex {
    /// Gives layer groups windows of so many tokens, the query's own included; `None` for those
    /// that see everything. From then on a hit ends where every group can serve it, and entries may
    /// lack ids of groups with a window.
    ///
    /// # Errors
    /// `InvalidArgument` unless there is one a group, at most 16, none of 0 tokens; `InvalidState`
    /// where something is cached, or a mirror follows; `OutOfMemory`. Nothing changed then.
    pub fn set_windows(&mut self, windows: &[Option<u32>]) -> Result<()> {
        if windows.len() != self.groups() || windows.len() > MAX_GROUPS {
            return Err(Error::invalid("windows", "must be one a group, at most 16"));
        }
        if windows.contains(&Some(0)) {
            return Err(Error::invalid("windows", "must be at least 1 token"));
        }
        if self.len_blocks() > 0 || self.is_mirrored() {
            return Err(Error::InvalidState { why: "the prefix index is in use" });
        }
        let mut groups = Vec::new();
        let refused = Error::OutOfMemory { bytes: size_of_val(windows) as u64 };
        groups.try_reserve_exact(windows.len()).map_err(|_| refused)?;
        let given = windows.iter().enumerate();
        groups.extend(given.filter_map(|(group, window)| window.map(|tokens| (group, tokens))));
        self.windows = Windows { groups, places: Table::new(self.blocks.address()) };
        Ok(())
    }

    /// Takes a block of a group with a window out of its entry, which stays for the other groups.
    /// True if an entry had it; the caller then gives up the index's reference.
    pub fn forget(&mut self, group: usize, block: BlockId) -> bool {
        let stride = self.blocks.groups;
        let known = self.windows.groups.iter().any(|&(windowed, _)| windowed == group);
        if !known || block == BlockId::NONE {
            return false;
        }
        let blocks = &self.blocks;
        let has = |slot: u32| blocks.ids(Run { start: slot, len: 1 })[group] == block;
        let Some(slot) = self.windows.places.get(key(group, block), has) else {
            return false;
        };
        self.windows.places.remove(key(group, block), slot);
        self.blocks.set_id(slot as usize * stride + group, BlockId::NONE);
        true
    }

    /// Cuts a match to what every group can serve; `depth` blocks have `ids`.
    pub(super) fn served(&self, ids: &[BlockId], depth: usize) -> usize {
        if self.windows.is_none() {
            return depth;
        }
        self.windows.served(ids, self.blocks.groups, depth, self.blocks.block_tokens)
    }

    /// Makes room for the ids of `blocks` further blocks, so that `place` cannot fail.
    pub(super) fn reserve_places(&mut self, blocks: usize) -> Result<()> {
        let Windows { groups, places } = &mut self.windows;
        if groups.is_empty() { Ok(()) } else { places.reserve(blocks * groups.len()) }
    }

    /// Notes where the ids of `run` are. Room was reserved.
    pub(super) fn place(&mut self, run: Run) {
        self.each_windowed(run, |places, key, slot| places.insert(key, slot));
    }

    /// Forgets where they are.
    pub(super) fn unplace(&mut self, run: Run) {
        self.each_windowed(run, |places, key, slot| places.remove(key, slot));
    }

    fn each_windowed(&mut self, run: Run, mut act: impl FnMut(&mut Table, u64, u32)) {
        let Windows { groups, places } = &mut self.windows;
        if groups.is_empty() {
            return;
        }
        let entries = self.blocks.ids(run).chunks_exact(self.blocks.groups);
        for (slot, ids) in (run.start..).zip(entries) {
            for &(group, _) in &*groups {
                if ids[group] != BlockId::NONE {
                    act(places, key(group, ids[group]), slot);
                }
            }
        }
    }

    /// Whether every entry of `ids` has an id of each group without a window.
    pub(super) fn full_groups_have_ids(&self, ids: &[BlockId]) -> bool {
        let stride = self.blocks.groups;
        let windowed = |at: usize| self.windows.groups.iter().any(|w| w.0 == at % stride);
        self.windows.is_none() || (0..ids.len()).all(|at| ids[at] != BlockId::NONE || windowed(at))
    }

    /// Puts ids of groups with a window back into entries that lack them: those of the blocks that
    /// end at `at`, whose ids `known` are; `given` are to be taken. What is taken is written to
    /// `known`. Room was reserved.
    pub(super) fn refill(&mut self, at: Position, given: &[BlockId], known: &mut [BlockId]) {
        let stride = self.blocks.groups;
        if self.windows.is_none() || !known.contains(&BlockId::NONE) {
            return;
        }
        let first = at.blocks() - known.len() / stride;
        let Ok((mut node, _)) = self.find(at) else { return };
        while node != NIL && self.tree[node].kind == Kind::Edge {
            let edge = &self.tree[node];
            let (start, depth) = (edge.start as usize, (edge.end - edge.len) as usize);
            let blocks = depth.max(first)..(edge.end as usize).min(at.blocks());
            for block in blocks {
                let slot = start + block - depth;
                for nth in 0..self.windows.groups.len() {
                    let group = self.windows.groups[nth].0;
                    let place = (block - first) * stride + group;
                    if known[place] == BlockId::NONE && given[place] != BlockId::NONE {
                        known[place] = given[place];
                        self.blocks.set_id(slot * stride + group, given[place]);
                        self.windows.places.insert(key(group, given[place]), slot as u32);
                    }
                }
            }
            if depth <= first {
                return;
            }
            node = self.tree.owner(node);
        }
    }

    /// Whether the table has exactly the ids of groups with a window. For the audit.
    pub(super) fn windows_are_sound(&self) -> bool {
        let mut count = 0;
        let found = self.tree.edges().all(|edge| {
            (edge.start..edge.start + edge.len).all(|slot| {
                let ids = self.blocks.ids(Run { start: slot, len: 1 });
                self.windows.groups.iter().all(|&(group, _)| {
                    let id = ids[group];
                    count += usize::from(id != BlockId::NONE);
                    let is = |place| place == slot;
                    id == BlockId::NONE || self.windows.places.get(key(group, id), is).is_some()
                })
            })
        });
        found && count == self.windows.places.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_needs_the_blocks_of_the_tokens_before() {
        // (position, window) to the first block of 16.
        for (tokens, window, block) in [
            (0, 1, 0),
            (64, 1, 4),
            (64, 2, 3),
            (64, 17, 3),
            (64, 18, 2),
            (70, 7, 4),
            (70, 8, 3),
            (64, 1000, 0),
            (64, u32::MAX, 0),
        ] {
            assert_eq!(first_visible_block(tokens, window, 16), block, "{tokens} {window}");
        }
    }
}
