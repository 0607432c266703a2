//! The storage of the index's blocks: tokens and pool ids of each, in slots, and which are free.
//!
//! Slot `s` has its tokens at `tokens[s * block_tokens ..]` and its ids at `ids[s * groups ..]`. An
//! edge of the tree is a run of neighbouring slots, so comparing it is one comparison of slices.
//! Free slots form maximal runs, kept in lists by power of two of their length. Finding a run,
//! cutting it and merging neighbours are O(1). A request that no run can hold gets several: it is
//! refused only where too few slots are free at all.
//!
//! The room for all slots is reserved once and touched as it is first used. The list links live in
//! the free slots themselves (next in the first id, previous in the first token), the length of a
//! run in `length` at its first and last slot; for a slot in use `length` is 0. Knows nothing of
//! nodes.

use alloc::vec::Vec;

use super::NIL;
use super::dirty::Dirty;
use crate::error::{Error, Result};
use crate::ids::{BlockId, TokenId};

/// Neighbouring slots: the first, and how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub start: u32,
    pub len: u32,
}

/// Slots for the blocks of an index.
#[derive(Debug)]
pub(super) struct Blocks {
    pub block_tokens: usize,
    pub groups: usize,
    capacity: u32,
    free: u32,
    tokens: Vec<TokenId>,
    ids: Vec<BlockId>,
    length: Vec<u32>,
    /// The first run of each list: list `b` has the runs of `2^b` to `2^(b+1) - 1` slots.
    lists: [u32; 32],
    /// Bit `b` is set where list `b` has a run.
    some: u32,
    /// Slots whose tokens and ids were written. Free slots' links are not.
    pub dirty: Dirty,
}

fn reserved<T>(n: u128) -> Result<Vec<T>> {
    let bytes = n.saturating_mul(size_of::<T>() as u128);
    let refused = Error::OutOfMemory { bytes: u64::try_from(bytes).unwrap_or(u64::MAX) };
    let n = usize::try_from(n).map_err(|_| refused)?;
    let mut v = Vec::new();
    v.try_reserve_exact(n).map_err(|_| refused)?;
    Ok(v)
}

impl Blocks {
    pub(super) fn new(block_tokens: usize, groups: usize, capacity: u32) -> Result<Self> {
        Ok(Blocks {
            block_tokens,
            groups,
            capacity,
            free: capacity,
            tokens: reserved(u128::from(capacity) * block_tokens as u128)?,
            ids: reserved(u128::from(capacity) * groups as u128)?,
            length: reserved(u128::from(capacity))?,
            lists: [NIL; 32],
            some: 0,
            dirty: Dirty::new(),
        })
    }

    pub(super) fn capacity(&self) -> u32 {
        self.capacity
    }

    pub(super) fn free(&self) -> u32 {
        self.free
    }

    pub(super) fn used(&self) -> u32 {
        self.capacity - self.free
    }

    /// Slots that were ever used: those below this number.
    pub(super) fn touched(&self) -> usize {
        self.length.len()
    }

    /// Bytes of the slots that were ever used.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(&self.tokens[..])
            + size_of_val(&self.ids[..])
            + size_of_val(&self.length[..])
            + self.dirty.bytes()
    }

    /// Marks the slots that are written from now on.
    pub(super) fn start_marks(&mut self) -> Result<()> {
        self.dirty.start(self.capacity as usize)
    }

    /// A number that differs from process to process where addresses do.
    pub(super) fn address(&self) -> u64 {
        self.tokens.as_ptr().addr() as u64
    }

    #[inline]
    pub(super) fn tokens(&self, run: Run) -> &[TokenId] {
        let at = run.start as usize * self.block_tokens;
        &self.tokens[at..at + run.len as usize * self.block_tokens]
    }

    #[inline]
    pub(super) fn ids(&self, run: Run) -> &[BlockId] {
        let at = run.start as usize * self.groups;
        &self.ids[at..at + run.len as usize * self.groups]
    }

    /// Fills the slots of `run`, which were taken; the slices have its tokens and ids exactly.
    pub(super) fn fill(&mut self, run: Run, tokens: &[TokenId], ids: &[BlockId]) {
        let (t, i) = (run.start as usize * self.block_tokens, run.start as usize * self.groups);
        self.tokens[t..t + tokens.len()].copy_from_slice(tokens);
        self.ids[i..i + ids.len()].copy_from_slice(ids);
        self.mark(run);
    }

    /// Replaces one id; `at` counts ids.
    pub(super) fn set_id(&mut self, at: usize, id: BlockId) {
        self.ids[at] = id;
        self.dirty.mark(at / self.groups);
    }

    /// Takes `want` slots, at most as many as are free, and appends their runs to `runs`: one if
    /// there is one long enough, else the longest there are.
    pub(super) fn take(&mut self, want: u32, runs: &mut Vec<Run>) -> Result<()> {
        debug_assert!(want <= self.free);
        let (old, mut left) = (runs.len(), want);
        while left > 0 {
            if runs.try_reserve(1).is_err() {
                for run in runs.drain(old..) {
                    self.give(run);
                }
                return Err(Error::OutOfMemory { bytes: size_of::<Run>() as u64 });
            }
            let run = self.take_run(left);
            left -= run.len;
            runs.push(run);
        }
        Ok(())
    }

    /// Takes one run of `want` slots, or of fewer where none is that long. Some slot is free.
    fn take_run(&mut self, want: u32) -> Run {
        if let Some(run) = self.take_whole(want) {
            return run;
        }
        let fresh = self.capacity - self.length.len() as u32;
        let longest = self.some.checked_ilog2().map(|list| self.lists[list as usize]);
        match longest.map(|start| (start, self.length[start as usize])) {
            Some((start, len)) if len >= fresh => self.cut(start, len),
            _ => self.grow(fresh),
        }
    }

    /// Takes one run of `want` slots if one is found: it may miss one that is hardly longer than
    /// `want`, to be O(1).
    pub(super) fn take_whole(&mut self, want: u32) -> Option<Run> {
        let sure = want.next_power_of_two().trailing_zeros();
        let longer = self.some & (u32::MAX << sure);
        if longer != 0 {
            let start = self.lists[longer.trailing_zeros() as usize];
            return Some(self.cut(start, want));
        }
        // The list below may have one too: look at a few.
        let mut at = if sure > 0 { self.lists[sure as usize - 1] } else { NIL };
        for _ in 0..4 {
            if at == NIL {
                break;
            }
            if self.length[at as usize] >= want {
                return Some(self.cut(at, want));
            }
            at = self.next(at);
        }
        let fresh = self.capacity - self.length.len() as u32;
        (fresh >= want).then(|| self.grow(want))
    }

    /// Takes the slots right behind `run`, up to `want`, as far as they are free: maybe none.
    pub(super) fn take_behind(&mut self, run: Run, want: u32) -> Run {
        let end = run.start + run.len;
        match self.length.get(end as usize) {
            None => self.grow(want.min(self.capacity - end)),
            Some(&0) => Run { start: end, len: 0 },
            Some(&len) => self.cut(end, want.min(len)),
        }
    }

    /// Copies tokens and ids of `from` to the slots from `to` on, which were taken.
    pub(super) fn copy(&mut self, from: Run, to: u32) {
        let (start, end, to) = (from.start as usize, (from.start + from.len) as usize, to as usize);
        let (n, g) = (self.block_tokens, self.groups);
        self.tokens.copy_within(start * n..end * n, to * n);
        self.ids.copy_within(start * g..end * g, to * g);
        self.mark(Run { start: to as u32, len: from.len });
    }

    fn mark(&mut self, run: Run) {
        if self.dirty.is_on() {
            (run.start..run.start + run.len).for_each(|slot| self.dirty.mark(slot as usize));
        }
    }

    /// Takes `len` slots that were never used before.
    fn grow(&mut self, len: u32) -> Run {
        let start = self.length.len() as u32;
        let slots = self.length.len() + len as usize;
        // Within what `new` reserved: no allocation.
        self.tokens.resize(slots * self.block_tokens, 0);
        self.ids.resize(slots * self.groups, BlockId::NONE);
        self.length.resize(slots, 0);
        self.free -= len;
        Run { start, len }
    }

    /// Takes the first `len` slots of the free run at `start`.
    fn cut(&mut self, start: u32, len: u32) -> Run {
        let whole = self.length[start as usize];
        self.unlink(start);
        self.length[start as usize..(start + len) as usize].fill(0);
        if whole > len {
            self.link(Run { start: start + len, len: whole - len });
        }
        self.free -= len;
        Run { start, len }
    }

    /// Gives the slots of `run` back and merges them with free neighbours.
    pub(super) fn give(&mut self, run: Run) {
        let Run { mut start, mut len } = run;
        self.free += len;
        if start > 0 {
            let left = self.length[start as usize - 1];
            if left > 0 {
                self.unlink(start - left);
                (start, len) = (start - left, len + left);
            }
        }
        let end = start + len;
        if let Some(&right) = self.length.get(end as usize)
            && right > 0
        {
            self.unlink(end);
            len += right;
        }
        self.link(Run { start, len });
    }

    fn next(&self, start: u32) -> u32 {
        self.ids[start as usize * self.groups].0
    }

    fn set_next(&mut self, start: u32, next: u32) {
        self.ids[start as usize * self.groups] = BlockId(next);
    }

    fn prev(&self, start: u32) -> u32 {
        self.tokens[start as usize * self.block_tokens]
    }

    fn set_prev(&mut self, start: u32, prev: u32) {
        self.tokens[start as usize * self.block_tokens] = prev;
    }

    fn link(&mut self, run: Run) {
        let Run { start, len } = run;
        self.length[start as usize] = len;
        self.length[(start + len) as usize - 1] = len;
        let list = len.ilog2() as usize;
        let next = self.lists[list];
        self.set_next(start, next);
        self.set_prev(start, NIL);
        if next != NIL {
            self.set_prev(next, start);
        }
        self.lists[list] = start;
        self.some |= 1 << list;
    }

    fn unlink(&mut self, start: u32) {
        let list = self.length[start as usize].ilog2() as usize;
        let (prev, next) = (self.prev(start), self.next(start));
        if next != NIL {
            self.set_prev(next, prev);
        }
        if prev != NIL {
            self.set_next(prev, next);
        } else {
            self.lists[list] = next;
            if next == NIL {
                self.some &= !(1 << list);
            }
        }
    }

    /// Proves that the slots outside `used` (true = in use) are exactly the free ones, in maximal
    /// runs that the lists hold. `used` covers the slots that were ever used.
    pub(super) fn audit(&self, used: &[bool]) -> Result<()> {
        let broken = |why| Err(Error::InvalidState { why });
        if used.len() != self.length.len() {
            return broken("prefix: a slot past the touched ones is in use");
        }
        let (mut slots, mut runs, mut at) = (0u32, 0u32, 0usize);
        while at < used.len() {
            let len = used[at..].iter().take_while(|&&u| u == used[at]).count();
            if used[at] {
                if self.length[at..at + len].iter().any(|&l| l != 0) {
                    return broken("prefix: a slot in use is marked free");
                }
            } else {
                if self.length[at] as usize != len || self.length[at + len - 1] as usize != len {
                    return broken("prefix: a free run is not maximal, or a slot is lost");
                }
                slots += len as u32;
                runs += 1;
            }
            at += len;
        }
        if slots + (self.capacity - used.len() as u32) != self.free {
            return broken("prefix: the count of free slots is wrong");
        }
        let mut listed = 0u32;
        for (b, &head) in self.lists.iter().enumerate() {
            if (head != NIL) != (self.some & (1 << b) != 0) {
                return broken("prefix: the map of free lists is wrong");
            }
            let (mut prev, mut at) = (NIL, head);
            while at != NIL {
                let known = used.get(at as usize) == Some(&false);
                if !known || self.length[at as usize].checked_ilog2() != Some(b as u32) {
                    return broken("prefix: a free list holds a run that is not its own");
                }
                if self.prev(at) != prev || listed == runs {
                    return broken("prefix: a free list is tangled");
                }
                listed += 1;
                (prev, at) = (at, self.next(at));
            }
        }
        if listed != runs { broken("prefix: a free run is in no list") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[test]
    fn runs_are_cut_merged_and_pieced_together() {
        for (bt, groups) in [(1, 1), (4, 2)] {
            let mut blocks = Blocks::new(bt, groups, 64).unwrap();
            let mut held: Vec<Run> = vec![];
            let mut x = 12345u64;
            for _ in 0..if cfg!(miri) { 100 } else { 4000 } {
                x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let r = (x >> 33) as u32;
                if !r.is_multiple_of(3) && blocks.free() > 0 {
                    let want = 1 + (r >> 8) % blocks.free().min(20);
                    blocks.take(want, &mut held).unwrap();
                } else if !held.is_empty() {
                    let run = held.swap_remove((r >> 8) as usize % held.len());
                    // As eviction does: part of the run from its end, or all of it.
                    let part = 1 + (r >> 20) % run.len;
                    blocks.give(Run { start: run.start + run.len - part, len: part });
                    if part < run.len {
                        held.push(Run { start: run.start, len: run.len - part });
                    }
                }
                let mut used = vec![false; blocks.length.len()];
                for run in &held {
                    for s in run.start..run.start + run.len {
                        assert!(!used[s as usize], "a slot was given out twice");
                        used[s as usize] = true;
                    }
                }
                blocks.audit(&used).unwrap();
            }
        }
    }

    #[test]
    fn sizes_that_no_machine_has_are_refused() {
        let huge = Blocks::new(usize::MAX, 1, u32::MAX).unwrap_err();
        assert!(matches!(huge, Error::OutOfMemory { .. }), "{huge:?}");
    }
}
