//! A copy of the index elsewhere: its parts as records of u32 words, and which of them changed.
//!
//! The parts are what a lookup reads and nothing else: neither recency nor pins. Records keep their
//! numbers, links are those numbers, so a copy of the parts is walked as the index itself is. A
//! mirrored index marks what it writes with a bit a record; one that is not pays a comparison.
//!
//! | part | a record |
//! |---|---|
//! | `Nodes` | kind (0 free, 1 root, 2 edge, 3 fork), child, start, len, parent, token, namespace (low, high) |
//! | `Branches` | an entry of the table from (fork, token) to child: 32 bits of hash, node |
//! | `Spaces` | an entry of the table from namespace to root: likewise |
//! | `Tokens` | the tokens of a slot |
//! | `Ids` | the block ids of a slot, one a group |
//!
//! A number of `u32::MAX` is no node. Both tables are open-addressed with linear probing and a power
//! of two long, or empty; the hash of a key `k` is the two halves of the 128-bit product
//! `(k ^ seed) * 0x9e3779b97f4a7c15` in exclusive or, its low 32 bits; its home is the top bits of
//! those. The key of a branch is `fork << 32 | token`.

use alloc::vec::Vec;
use core::ops::Range;

use super::PrefixIndex;
use super::blocks::Run;
use super::table::Table;
use super::tree::Kind;
use crate::error::{Error, Result};

/// A part of an index that a lookup reads; see the file's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The nodes of the tree.
    Nodes,
    /// The table of the children of forks.
    Branches,
    /// The table of namespaces.
    Spaces,
    /// The tokens of the slots.
    Tokens,
    /// The block ids of the slots.
    Ids,
}

impl Part {
    /// Every part.
    pub const ALL: [Part; 5] = [Part::Nodes, Part::Branches, Part::Spaces, Part::Tokens, Part::Ids];
}

/// Records of a part that were written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The part.
    pub part: Part,
    /// The records.
    pub records: Range<u32>,
}

impl PrefixIndex {
    /// Marks what is written from now on; everything there is counts as written. One mirror can be
    /// copied to several places.
    ///
    /// # Errors
    /// `OutOfMemory`; `Unsupported` for an index with windows, whose hits are not what a walk along
    /// the tree finds. Nothing is marked then.
    pub fn start_mirror(&mut self) -> Result<()> {
        if !self.windows.is_none() {
            return Err(Error::Unsupported { what: "mirrors of an index with windows" });
        }
        let started = self.tree.start_marks().and_then(|()| self.blocks.start_marks());
        started.inspect_err(|_| self.stop_mirror())
    }

    /// Marks nothing any more, and gives the memory of the marks back.
    pub fn stop_mirror(&mut self) {
        self.tree.stop_marks();
        self.blocks.dirty.stop();
    }

    /// Whether the index marks what it writes.
    pub fn is_mirrored(&self) -> bool {
        self.blocks.dirty.is_on()
    }

    /// Words of a record.
    pub fn record_words(&self, part: Part) -> usize {
        match part {
            Part::Nodes => 8,
            Part::Branches | Part::Spaces => 2,
            Part::Tokens => self.blocks.block_tokens,
            Part::Ids => self.blocks.groups,
        }
    }

    /// Records that a part has now.
    pub fn records(&self, part: Part) -> usize {
        match part {
            Part::Nodes => self.tree.places(),
            Part::Branches => self.tree.branches.places(),
            Part::Spaces => self.tree.spaces.places(),
            Part::Tokens | Part::Ids => self.blocks.touched(),
        }
    }

    /// Records that a part never has more of, however the index is used.
    pub fn most_records(&self, part: Part) -> u64 {
        let blocks = u64::from(self.blocks.capacity());
        // Every edge has a block, every root an edge below it, and the forks below a root or edge
        // are fewer than their edges: two nodes a block, and as many branches. A table is reserved
        // for a few more than it gets.
        const SPARE: u64 = 64;
        match part {
            Part::Nodes => 2 * blocks + SPARE,
            Part::Branches => Table::places_for(2 * blocks + SPARE),
            Part::Spaces => Table::places_for(blocks + SPARE),
            Part::Tokens | Part::Ids => blocks,
        }
    }

    /// The seeds of the tables: of the branches, of the namespaces.
    pub fn table_seeds(&self) -> [u64; 2] {
        [self.tree.branches.seed(), self.tree.spaces.seed()]
    }

    /// Appends the words of `records` to `words`.
    ///
    /// # Errors
    /// `InvalidArgument` where there are no such records, `OutOfMemory`. Nothing is appended then.
    pub fn read_records(
        &self,
        part: Part,
        records: Range<u32>,
        words: &mut Vec<u32>,
    ) -> Result<()> {
        let (start, end) = (records.start as usize, records.end as usize);
        if start > end || end > self.records(part) {
            return Err(Error::invalid("records", "must be there"));
        }
        let count = (end - start) * self.record_words(part);
        let refused = Error::OutOfMemory { bytes: count as u64 * 4 };
        words.try_reserve(count).map_err(|_| refused)?;
        let run = Run { start: records.start, len: records.end - records.start };
        match part {
            Part::Nodes => records.for_each(|at| words.extend(self.node_record(at))),
            Part::Branches => words.extend(self.tree.branches.words(start..end)),
            Part::Spaces => words.extend(self.tree.spaces.words(start..end)),
            Part::Tokens => words.extend_from_slice(self.blocks.tokens(run)),
            Part::Ids => words.extend(self.blocks.ids(run).iter().map(|id| id.0)),
        }
        Ok(())
    }

    fn node_record(&self, at: u32) -> [u32; 8] {
        let node = &self.tree[at];
        let (kind, space) = match node.kind {
            Kind::Free => return [0; 8],
            Kind::Root => (1, node.stamp),
            Kind::Edge => (2, 0),
            Kind::Fork => (3, 0),
        };
        let (low, high) = (space as u32, (space >> 32) as u32);
        [kind, node.child, node.start, node.len, node.parent, node.token, low, high]
    }

    /// Appends what was written since the last call to `changes`, and forgets it. A slot that was
    /// given back is not told: no edge leads there.
    ///
    /// # Errors
    /// `InvalidState` where the index is not mirrored; `OutOfMemory`: everything counts as written
    /// then.
    pub fn take_changes(&mut self, changes: &mut Vec<Change>) -> Result<()> {
        if !self.is_mirrored() {
            return Err(Error::InvalidState { why: "the prefix index is not mirrored" });
        }
        let taken = self.try_take(changes);
        if taken.is_err() {
            self.mark_all();
        }
        taken
    }

    /// Everything counts as written: for a copy that missed something.
    pub fn mark_all(&mut self) {
        self.tree.mark_all();
        self.blocks.dirty.mark_all();
    }

    fn try_take(&mut self, changes: &mut Vec<Change>) -> Result<()> {
        let refused = Error::OutOfMemory { bytes: size_of::<Change>() as u64 };
        let mut add = |part: Part, run: Range<usize>| {
            changes.try_reserve(1).map_err(|_| refused)?;
            let records = run.start as u32..run.end as u32;
            changes.push(Change { part, records });
            Ok(())
        };
        let places = self.tree.places();
        self.tree.dirty.take(places, &mut |run| add(Part::Nodes, run))?;
        self.tree.branches.take_marks(&mut |run| add(Part::Branches, run))?;
        self.tree.spaces.take_marks(&mut |run| add(Part::Spaces, run))?;
        let slots = self.blocks.touched();
        self.blocks.dirty.take(slots, &mut |run| {
            add(Part::Tokens, run.clone())?;
            add(Part::Ids, run)
        })
    }
}
