//! A hash table from a 64-bit key to a node, for the namespaces and for the branches of forks.
//!
//! It stores no keys: an entry is 32 bits of hash and the node, and the caller says whether a node
//! is the one it meant. So a hash can cost time, never exactness. Open addressing with linear
//! probing; a removal shifts the entries behind it back, so there are no tombstones and the cost
//! of a probe does not grow with age. The place of an entry follows from its 32 bits, so growing
//! needs no keys either. Hashing is seeded, so that token ids cannot be chosen to collide without
//! knowing the process's addresses.

use alloc::vec::Vec;
use core::ops::Range;

use super::NIL;
use super::dirty::Dirty;
use crate::error::{Error, Result};

#[derive(Debug, Clone, Copy)]
struct Entry {
    tag: u32,
    /// The node, or `NIL` for an empty place.
    node: u32,
}

const EMPTY: Entry = Entry { tag: 0, node: NIL };

/// Key to node; see the file's head.
#[derive(Debug)]
pub(super) struct Table {
    /// A power of two long, or empty; at least a quarter of the places are empty.
    entries: Vec<Entry>,
    len: usize,
    seed: u64,
    /// Groups of `MARKED` places that were written.
    dirty: Dirty,
}

/// Places that share a mark.
const MARKED: usize = 16;

impl Table {
    pub(super) const fn new(seed: u64) -> Self {
        Table { entries: Vec::new(), len: 0, seed, dirty: Dirty::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn bytes(&self) -> usize {
        self.entries.capacity() * size_of::<Entry>() + self.dirty.bytes()
    }

    pub(super) fn seed(&self) -> u64 {
        self.seed
    }

    /// Places, with an entry or empty.
    pub(super) fn places(&self) -> usize {
        self.entries.len()
    }

    /// Places of a table that has room for `entries`.
    pub(super) fn places_for(entries: u64) -> u64 {
        (entries * 4 / 3 + 1).next_power_of_two().max(8)
    }

    /// The places of `range` as words: hash and node of each.
    pub(super) fn words(&self, range: Range<usize>) -> impl Iterator<Item = u32> + '_ {
        self.entries[range].iter().flat_map(|entry| [entry.tag, entry.node])
    }

    /// Marks the places that are written from now on.
    pub(super) fn start_marks(&mut self) -> Result<()> {
        self.dirty.start(self.entries.len().div_ceil(MARKED))
    }

    pub(super) fn stop_marks(&mut self) {
        self.dirty.stop();
    }

    pub(super) fn mark_all(&mut self) {
        self.dirty.mark_all();
    }

    /// Shows the runs of places that were written, and forgets them.
    pub(super) fn take_marks(
        &mut self,
        see: &mut dyn FnMut(Range<usize>) -> Result<()>,
    ) -> Result<()> {
        let places = self.entries.len();
        self.dirty.take(places.div_ceil(MARKED), &mut |run| {
            see(run.start * MARKED..places.min(run.end * MARKED))
        })
    }

    fn write(&mut self, at: usize, entry: Entry) {
        self.entries[at] = entry;
        self.dirty.mark(at / MARKED);
    }

    /// The nodes in the table, in no order.
    pub(super) fn nodes(&self) -> impl Iterator<Item = u32> + '_ {
        self.entries.iter().map(|e| e.node).filter(|&n| n != NIL)
    }

    #[inline]
    fn tag(&self, key: u64) -> u32 {
        let product = u128::from(key ^ self.seed) * 0x9e37_79b9_7f4a_7c15;
        ((product >> 64) as u64 ^ product as u64) as u32
    }

    #[inline]
    fn home(&self, tag: u32) -> usize {
        // The top bits; a table of one entry has none.
        ((u64::from(tag) * self.entries.len() as u64) >> 32) as usize
    }

    /// The node under `key` for which `is` holds.
    #[inline]
    pub(super) fn get(&self, key: u64, is: impl Fn(u32) -> bool) -> Option<u32> {
        self.find(self.tag(key), is).map(|at| self.entries[at].node)
    }

    #[inline]
    fn find(&self, tag: u32, is: impl Fn(u32) -> bool) -> Option<usize> {
        if self.entries.is_empty() {
            return None;
        }
        let mask = self.entries.len() - 1;
        let mut at = self.home(tag);
        loop {
            let entry = self.entries[at & mask];
            if entry.node == NIL {
                return None;
            }
            if entry.tag == tag && is(entry.node) {
                return Some(at & mask);
            }
            at += 1;
        }
    }

    /// Makes room for `more` further entries, so that `insert` cannot fail.
    pub(super) fn reserve(&mut self, more: usize) -> Result<()> {
        let need = self.len + more;
        if need * 4 <= self.entries.len() * 3 {
            return Ok(());
        }
        let size = Self::places_for(need as u64) as usize;
        self.dirty.reserve(size.div_ceil(MARKED))?;
        let mut entries: Vec<Entry> = Vec::new();
        let bytes = (size * size_of::<Entry>()) as u64;
        entries.try_reserve_exact(size).map_err(|_| Error::OutOfMemory { bytes })?;
        entries.resize(size, EMPTY);
        let old = core::mem::replace(&mut self.entries, entries);
        for entry in old.into_iter().filter(|e| e.node != NIL) {
            self.place(entry);
        }
        self.dirty.mark_all();
        Ok(())
    }

    fn place(&mut self, entry: Entry) {
        let mask = self.entries.len() - 1;
        let mut at = self.home(entry.tag);
        while self.entries[at & mask].node != NIL {
            at += 1;
        }
        self.write(at & mask, entry);
    }

    /// Adds `node` under a key that has none yet. Room must have been reserved.
    pub(super) fn insert(&mut self, key: u64, node: u32) {
        debug_assert!((self.len + 1) * 4 <= self.entries.len() * 3);
        let tag = self.tag(key);
        self.place(Entry { tag, node });
        self.len += 1;
    }

    /// Puts `new` in the place of `old`, which is in the table under `key`.
    pub(super) fn replace(&mut self, key: u64, old: u32, new: u32) {
        let at = self.find(self.tag(key), |n| n == old);
        debug_assert!(at.is_some());
        if let Some(at) = at {
            self.write(at, Entry { node: new, ..self.entries[at] });
        }
    }

    /// Removes `node`, which is in the table under `key`.
    pub(super) fn remove(&mut self, key: u64, node: u32) {
        let Some(mut hole) = self.find(self.tag(key), |n| n == node) else {
            debug_assert!(false);
            return;
        };
        let mask = self.entries.len() - 1;
        let mut at = hole;
        loop {
            at = (at + 1) & mask;
            let entry = self.entries[at];
            if entry.node == NIL {
                break;
            }
            // An entry may move back to the hole unless its home lies behind the hole.
            let (from_home, from_hole) =
                (at.wrapping_sub(self.home(entry.tag)) & mask, at.wrapping_sub(hole) & mask);
            if from_home >= from_hole {
                self.write(hole, entry);
                hole = at;
            }
        }
        self.write(hole, EMPTY);
        self.len -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeMap;

    #[test]
    fn agrees_with_a_map_under_insertions_and_removals() {
        let mut table = Table::new(7);
        let mut map = BTreeMap::new();
        let mut x = 1u64;
        for step in 0..if cfg!(miri) { 500 } else { 20_000u32 } {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let key = (x >> 33) % 300;
            if let Some(node) = map.remove(&key) {
                assert_eq!(table.get(key, |n| n == node), Some(node));
                if step % 3 == 0 {
                    table.replace(key, node, step);
                    map.insert(key, step);
                } else {
                    table.remove(key, node);
                }
            } else {
                table.reserve(1).unwrap();
                table.insert(key, step);
                map.insert(key, step);
            }
            assert_eq!(table.len(), map.len());
            if step % 64 == 0 {
                for key in 0..300 {
                    let want = map.get(&key).copied();
                    assert_eq!(table.get(key, |n| Some(n) == want), want);
                }
            }
        }
    }
}
