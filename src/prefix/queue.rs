//! An order of nodes: a binary heap by key, the lowest first, that can find a node's entry.
//!
//! Keys are lower bounds: using a leaf does not reach into the heap, its true key is looked up when
//! it comes to the top. Likewise a node that has become inner, pinned or empty is only dropped
//! there. So touching and locking cost nothing here, and the order is exact all the same: the top is
//! the first once its key is the true one, for every other key is at least its entry's. A key that
//! falls (a priority that ends, a hint) is the exception, and lowered at once.
//!
//! Entries set aside (leaves whose eviction was vetoed) wait behind the heap in the same array,
//! until `restore`. A node has at most one entry, so room for every node is room enough.

use alloc::vec::Vec;

use super::NIL;
use crate::error::{Error, Result};

/// What nodes are ordered by: first the rank, then the order within it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub rank: u32,
    pub order: u64,
}

/// Rank, order and node in one number, so that one comparison does it.
fn pack(key: Key, node: u32) -> u128 {
    u128::from(key.rank) << 96 | u128::from(key.order) << 32 | u128::from(node)
}

fn unpack(entry: u128) -> (Key, u32) {
    (Key { rank: (entry >> 96) as u32, order: (entry >> 32) as u64 }, entry as u32)
}

#[derive(Debug)]
pub(super) struct Queue {
    /// `entries[..heap]` is the heap, the rest is set aside.
    entries: Vec<u128>,
    heap: usize,
    /// Where each node's entry is, or `NIL`.
    places: Vec<u32>,
}

impl Queue {
    pub(super) const fn new() -> Self {
        Queue { entries: Vec::new(), heap: 0, places: Vec::new() }
    }

    pub(super) fn bytes(&self) -> usize {
        self.entries.capacity() * size_of::<u128>() + self.places.capacity() * size_of::<u32>()
    }

    /// Every entry, those of the heap first.
    pub(super) fn entries(&self) -> impl Iterator<Item = (Key, u32)> + '_ {
        self.entries.iter().map(|&entry| unpack(entry))
    }

    /// Room for an entry of each of `nodes` nodes, so that `lower` does not allocate.
    pub(super) fn reserve(&mut self, nodes: usize) -> Result<()> {
        let bytes = (nodes * size_of::<u128>()) as u64;
        let refused = |_| Error::OutOfMemory { bytes };
        let more = nodes.saturating_sub(self.entries.len());
        self.entries.try_reserve(more).map_err(refused)?;
        let more = nodes.saturating_sub(self.places.len());
        self.places.try_reserve(more).map_err(refused)?;
        self.places.resize(self.places.len() + more, NIL);
        Ok(())
    }

    #[cfg(test)]
    fn contains(&self, node: u32) -> bool {
        self.places.get(node as usize).is_some_and(|&place| place != NIL)
    }

    /// Adds `node` under `key`; one that is there already gets the key if it is lower than its own.
    pub(super) fn lower(&mut self, key: Key, node: u32) {
        let entry = pack(key, node);
        let mut at = self.places[node as usize] as usize;
        if at == NIL as usize {
            self.entries.push(entry);
            // The first of those set aside makes room at the end of the heap.
            let last = self.entries.len() - 1;
            if self.heap < last {
                self.put(last, self.entries[self.heap]);
            }
            at = self.heap;
            self.heap += 1;
        } else if self.entries[at] <= entry {
            return;
        } else if at >= self.heap {
            self.entries[at] = entry;
            return;
        }
        self.up(at, entry);
    }

    /// The entry with the lowest key.
    #[inline]
    pub(super) fn top(&self) -> Option<(Key, u32)> {
        self.entries[..self.heap].first().map(|&entry| unpack(entry))
    }

    /// Gives the top entry a higher key.
    pub(super) fn raise_top(&mut self, key: Key) {
        let (_, node) = unpack(self.entries[0]);
        self.down(pack(key, node));
    }

    /// Removes the top entry.
    pub(super) fn drop_top(&mut self) {
        self.set_top_aside();
        let gone = self.entries[self.heap];
        self.places[gone as u32 as usize] = NIL;
        let moved = self.entries.swap_remove(self.entries.len() - 1);
        if self.heap < self.entries.len() {
            self.put(self.heap, moved);
        }
    }

    pub(super) fn set_top_aside(&mut self) {
        let top = self.entries[0];
        self.heap -= 1;
        if self.heap > 0 {
            self.down(self.entries[self.heap]);
        }
        self.put(self.heap, top);
    }

    /// Takes what was set aside back into the heap.
    pub(super) fn restore(&mut self) {
        while self.heap < self.entries.len() {
            self.heap += 1;
            self.up(self.heap - 1, self.entries[self.heap - 1]);
        }
    }

    fn put(&mut self, at: usize, entry: u128) {
        self.entries[at] = entry;
        self.places[entry as u32 as usize] = at as u32;
    }

    /// Puts `entry` at `at` or above.
    fn up(&mut self, mut at: usize, entry: u128) {
        while at > 0 {
            let parent = (at - 1) / 2;
            if self.entries[parent] <= entry {
                break;
            }
            self.put(at, self.entries[parent]);
            at = parent;
        }
        self.put(at, entry);
    }

    /// Puts `entry` at the top or below.
    fn down(&mut self, entry: u128) {
        let mut at = 0;
        loop {
            let mut child = 2 * at + 1;
            if child >= self.heap {
                break;
            }
            if child + 1 < self.heap && self.entries[child + 1] < self.entries[child] {
                child += 1;
            }
            if entry <= self.entries[child] {
                break;
            }
            self.put(at, self.entries[child]);
            at = child;
        }
        self.put(at, entry);
    }

    /// Whether the heap is in order and every entry is where `places` says. For the audit.
    pub(super) fn is_sound(&self) -> bool {
        let placed = |(at, &entry): (usize, &u128)| self.places[entry as u32 as usize] == at as u32;
        let listed = self.places.iter().filter(|&&place| place != NIL).count();
        listed == self.entries.len()
            && self.heap == self.entries.len()
            && self.entries.iter().enumerate().all(placed)
            && (1..self.heap).all(|at| self.entries[(at - 1) / 2] <= self.entries[at])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeMap;

    #[test]
    fn agrees_with_a_map_when_keys_fall_and_entries_wait_aside() {
        const NODES: u32 = 50;
        let (mut queue, mut map, mut aside) = (Queue::new(), BTreeMap::new(), BTreeMap::new());
        queue.reserve(NODES as usize).unwrap();
        let mut x = 3u64;
        for _ in 0..if cfg!(miri) { 300 } else { 20_000 } {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let r = (x >> 33) as u32;
            let key = Key { rank: r % 3, order: u64::from(r >> 8) % 40 };
            let first = map.iter().map(|(&node, &key)| (key, node)).min();
            assert_eq!(queue.top(), first);
            match (r >> 3) % 8 {
                0 if first.is_some() => {
                    let node = first.unwrap().1;
                    map.remove(&node);
                    queue.drop_top();
                }
                1 if first.is_some() => {
                    let (old, node) = first.unwrap();
                    let key = Key { rank: old.rank + 1, ..key };
                    map.insert(node, key);
                    queue.raise_top(key);
                }
                2 if first.is_some() => {
                    let (key, node) = first.unwrap();
                    map.remove(&node);
                    aside.insert(node, key);
                    queue.set_top_aside();
                }
                3 => {
                    map.append(&mut aside);
                    queue.restore();
                    assert!(queue.is_sound());
                }
                _ => {
                    let node = (r >> 20) % NODES;
                    let known = if aside.contains_key(&node) { &mut aside } else { &mut map };
                    let entry = known.entry(node).or_insert(key);
                    *entry = key.min(*entry);
                    queue.lower(key, node);
                }
            }
            assert_eq!(queue.entries().count(), map.len() + aside.len());
            assert!(
                (0..NODES)
                    .all(|n| queue.contains(n) == (map.contains_key(&n) || aside.contains_key(&n)))
            );
        }
    }
}
