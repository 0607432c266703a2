//! The blocks that only the prefix index holds, in the order in which their last other holder left:
//! what a pool gives up one by one where whole entries of the index are not to go (a layer group
//! with a window). A list through two arrays by block id; off, and without memory, until asked for.

use alloc::boxed::Box;

use super::blocks::words;
use crate::error::Result;

const NIL: u32 = u32::MAX;
/// The link of a block that is not in the list.
const OUT: u32 = u32::MAX - 1;

#[derive(Debug)]
pub(super) struct Idle {
    /// The next later block, `NIL` for none.
    next: Box<[u32]>,
    /// The next earlier one; `OUT` for a block that is not in the list.
    prev: Box<[u32]>,
    first: u32,
    last: u32,
}

impl Idle {
    pub(super) fn off() -> Self {
        Idle { next: Box::default(), prev: Box::default(), first: NIL, last: NIL }
    }

    pub(super) fn new(blocks: usize) -> Result<Self> {
        let links = || words(blocks, |v| v.resize(blocks, OUT));
        Ok(Idle { next: links()?, prev: links()?, ..Self::off() })
    }

    #[inline]
    pub(super) fn is_on(&self) -> bool {
        !self.prev.is_empty()
    }

    pub(super) fn first(&self) -> Option<u32> {
        (self.first != NIL).then_some(self.first)
    }

    /// A block that has become idle; the last to go.
    #[inline]
    pub(super) fn push(&mut self, block: u32) {
        if self.is_on() {
            self.link(block);
        }
    }

    /// A block that is idle no more.
    #[inline]
    pub(super) fn remove(&mut self, block: u32) {
        if self.is_on() {
            self.unlink(block);
        }
    }

    fn link(&mut self, block: u32) {
        let last = core::mem::replace(&mut self.last, block);
        (self.prev[block as usize], self.next[block as usize]) = (last, NIL);
        match last {
            NIL => self.first = block,
            last => self.next[last as usize] = block,
        }
    }

    fn unlink(&mut self, block: u32) {
        let (prev, next) = (self.prev[block as usize], self.next[block as usize]);
        self.prev[block as usize] = OUT;
        match prev {
            NIL => self.first = next,
            prev => self.next[prev as usize] = next,
        }
        match next {
            NIL => self.last = prev,
            next => self.prev[next as usize] = prev,
        }
    }

    /// Whether exactly the blocks for which `is` holds are in the list. For the audit.
    pub(super) fn is_exactly(&self, is: impl Fn(usize) -> bool) -> bool {
        if !self.is_on() {
            return true;
        }
        let (mut at, mut prev, mut listed) = (self.first, NIL, 0);
        while at != NIL {
            let place = at as usize;
            if self.prev.get(place) != Some(&prev) || listed == self.next.len() || !is(place) {
                return false;
            }
            listed += 1;
            (prev, at) = (at, self.next[place]);
        }
        prev == self.last
            && listed == (0..self.prev.len()).filter(|&block| is(block)).count()
            && listed == self.prev.iter().filter(|&&link| link != OUT).count()
    }
}
