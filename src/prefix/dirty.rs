//! Which records of a growing array were written since somebody last asked: a bit each.
//!
//! Off, and without memory, until a mirror of the index is started; a mark is then one comparison
//! that fails. Room for the marks is made where room for the records is, so marking cannot fail.
//! Knows nothing of what the records are.

use alloc::vec::Vec;
use core::ops::Range;

use crate::error::{Error, Result};

/// The marks of one array.
#[derive(Debug)]
pub(super) struct Dirty {
    bits: Vec<u64>,
    on: bool,
}

impl Dirty {
    pub(super) const fn new() -> Self {
        Dirty { bits: Vec::new(), on: false }
    }

    pub(super) fn is_on(&self) -> bool {
        self.on
    }

    pub(super) fn bytes(&self) -> usize {
        self.bits.capacity() * 8
    }

    /// Marks from now on, for `len` records, all of which count as written.
    pub(super) fn start(&mut self, len: usize) -> Result<()> {
        self.on = true;
        self.reserve(len).inspect_err(|_| self.stop())?;
        self.mark_all();
        Ok(())
    }

    pub(super) fn stop(&mut self) {
        *self = Dirty::new();
    }

    /// Makes room for the marks of `len` records.
    pub(super) fn reserve(&mut self, len: usize) -> Result<()> {
        let words = len.div_ceil(64);
        if self.on && words > self.bits.len() {
            let more = words - self.bits.len();
            let refused = Error::OutOfMemory { bytes: more as u64 * 8 };
            self.bits.try_reserve(more).map_err(|_| refused)?;
            self.bits.resize(words, 0);
        }
        Ok(())
    }

    /// The record at `at` was written.
    #[inline]
    pub(super) fn mark(&mut self, at: usize) {
        debug_assert!(!self.on || at / 64 < self.bits.len());
        if let Some(word) = self.bits.get_mut(at / 64) {
            *word |= 1 << (at % 64);
        }
    }

    /// All were, those with room included that do not exist yet.
    pub(super) fn mark_all(&mut self) {
        self.bits.fill(u64::MAX);
    }

    /// Shows the marked runs among the first `len` records, in ascending order, until `see` fails,
    /// and clears the marks that it showed.
    pub(super) fn take(
        &mut self,
        len: usize,
        see: &mut dyn FnMut(Range<usize>) -> Result<()>,
    ) -> Result<()> {
        let mut open: Option<usize> = None;
        for word in 0..self.bits.len() {
            let bits = core::mem::take(&mut self.bits[word]);
            if (bits == 0 && open.is_none()) || (bits == u64::MAX && open.is_some()) {
                continue;
            }
            for bit in 0..64 {
                let at = word * 64 + bit;
                match (bits >> bit & 1 == 1, open) {
                    (true, None) => open = Some(at),
                    (false, Some(start)) => {
                        open = None;
                        see_clamped(start..at, len, see)?;
                    }
                    _ => {}
                }
            }
        }
        open.map_or(Ok(()), |start| see_clamped(start..self.bits.len() * 64, len, see))
    }
}

fn see_clamped(
    run: Range<usize>,
    len: usize,
    see: &mut dyn FnMut(Range<usize>) -> Result<()>,
) -> Result<()> {
    let end = run.end.min(len);
    if run.start < end { see(run.start..end) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    fn runs(dirty: &mut Dirty, len: usize) -> Vec<(usize, usize)> {
        let mut runs = Vec::new();
        dirty
            .take(len, &mut |run| {
                runs.push((run.start, run.end));
                Ok(())
            })
            .unwrap();
        runs
    }

    #[test]
    fn marks_come_back_once_as_runs() {
        let mut dirty = Dirty::new();
        dirty.mark(5);
        assert_eq!((runs(&mut dirty, 100), dirty.bytes()), (vec![], 0));
        dirty.start(200).unwrap();
        assert_eq!(runs(&mut dirty, 150), [(0, 150)]);
        assert_eq!(runs(&mut dirty, 150), []);
        for at in [0, 3, 4, 62, 63, 64, 65, 190, 191, 199] {
            dirty.mark(at);
        }
        assert_eq!(runs(&mut dirty, 200), [(0, 1), (3, 5), (62, 66), (190, 192), (199, 200)]);
        (60..200).for_each(|at| dirty.mark(at));
        assert_eq!(runs(&mut dirty, 191), [(60, 191)]);
        dirty.reserve(1000).unwrap();
        assert_eq!(runs(&mut dirty, 1000), []);
        dirty.mark(999);
        assert_eq!(runs(&mut dirty, 1000), [(999, 1000)]);
        dirty.stop();
        assert_eq!(runs(&mut dirty, 1000), []);
    }
}
