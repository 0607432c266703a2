//! The order of eviction: a binary heap of leaves by stamp, the oldest first.
//!
//! Keys are lower bounds: touching a leaf does not reach into the heap, the true stamp is looked up
//! when the leaf comes to the top. Likewise a node that has become inner, pinned or empty is only
//! dropped there. So touching and locking cost nothing here, and the order is exact all the same:
//! the top is the oldest once its key is its stamp, for every other stamp is at least its key.
//!
//! Entries set aside (leaves whose eviction was vetoed) wait behind the heap in the same array,
//! until `restore`. A node has at most one entry, so room for every node is room enough.

use alloc::vec::Vec;

use crate::error::{Error, Result};

#[derive(Debug)]
pub(super) struct Queue {
    /// `entries[..heap]` is the heap, the rest is set aside.
    entries: Vec<(u64, u32)>,
    heap: usize,
}

impl Queue {
    pub(super) const fn new() -> Self {
        Queue { entries: Vec::new(), heap: 0 }
    }

    pub(super) fn bytes(&self) -> usize {
        self.entries.capacity() * size_of::<(u64, u32)>()
    }

    pub(super) fn entries(&self) -> &[(u64, u32)] {
        &self.entries
    }

    /// Room for an entry of each of `nodes` nodes, so that `push` does not allocate.
    pub(super) fn reserve(&mut self, nodes: usize) -> Result<()> {
        let bytes = (nodes * size_of::<(u64, u32)>()) as u64;
        let more = nodes.saturating_sub(self.entries.len());
        self.entries.try_reserve(more).map_err(|_| Error::OutOfMemory { bytes })
    }

    pub(super) fn push(&mut self, key: u64, node: u32) {
        self.entries.push((key, node));
        let last = self.entries.len() - 1;
        self.entries.swap(self.heap, last);
        self.heap += 1;
        self.up(self.heap - 1);
    }

    /// The entry with the lowest key.
    pub(super) fn top(&self) -> Option<(u64, u32)> {
        self.entries[..self.heap].first().copied()
    }

    /// Gives the top entry a higher key.
    pub(super) fn raise_top(&mut self, key: u64) {
        self.entries[0].0 = key;
        self.down();
    }

    pub(super) fn drop_top(&mut self) {
        self.set_top_aside();
        self.entries.swap_remove(self.heap);
    }

    pub(super) fn set_top_aside(&mut self) {
        self.heap -= 1;
        self.entries.swap(0, self.heap);
        self.down();
    }

    /// Takes what was set aside back into the heap.
    pub(super) fn restore(&mut self) {
        while self.heap < self.entries.len() {
            self.heap += 1;
            self.up(self.heap - 1);
        }
    }

    fn up(&mut self, mut at: usize) {
        while at > 0 {
            let parent = (at - 1) / 2;
            if self.entries[parent] <= self.entries[at] {
                break;
            }
            self.entries.swap(parent, at);
            at = parent;
        }
    }

    fn down(&mut self) {
        let heap = &mut self.entries[..self.heap];
        let mut at = 0;
        loop {
            let mut child = 2 * at + 1;
            if child >= heap.len() {
                return;
            }
            if child + 1 < heap.len() && heap[child + 1] < heap[child] {
                child += 1;
            }
            if heap[at] <= heap[child] {
                return;
            }
            heap.swap(at, child);
            at = child;
        }
    }
}
