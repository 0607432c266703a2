//! What the decode kernel prefetches of the memory that it walks.
//!
//! Hardware prefetchers cannot foresee the next block of a table, so every line is prefetched in
//! software, and twice: a hint that finds no buffer is lost, and where the kernel is faster than memory
//! for a while, that is every third or so. The second costs little where the first was heard. Where
//! both go to, [`Prefetch`] says. A core with few buffers for misses of its first-level cache, each of
//! which is held while memory is waited for, does better with hints to the second level, about 32 and
//! 16 KiB ahead, and a last one to the first, which then waits for the second level only. One with
//! more does better with the first level alone. Computes nothing.

use super::walk::{PIECE, Side, Walk};
use crate::cpu::prefetch::Prefetch;
use crate::cpu::vector::{prefetch, prefetch_far};

/// How far the last hint, to the first-level cache, runs ahead, about.
const NEAR_BYTES: usize = 2 << 10;
/// The same of straight code, which is faster.
pub(super) const STRAIGHT_NEAR_BYTES: usize = 4 << 10;
/// How far the second hint to the second-level cache runs ahead, about.
pub(super) const AGAIN_BYTES: usize = 16 << 10;
/// How far the first hint, to the second-level cache, runs ahead, about.
pub(super) const FAR_BYTES: usize = 32 << 10;
/// How far the last hint runs ahead where both go to the first-level cache, about; the first runs
/// twice as far.
const FIRST_BYTES: usize = 8 << 10;

/// How far the hints for rows of some length run ahead.
#[derive(Clone, Copy)]
pub(super) struct Distances {
    /// Whole pieces between use and the last hint, and lines beyond.
    near: (usize, usize),
    /// Pieces between use and the second hint.
    again: usize,
    /// Pieces between use and the first hint; 0 for none.
    far: usize,
}

impl Distances {
    /// For rows of `bytes`.
    #[inline(always)]
    pub(super) fn of(prefetch: Prefetch, bytes: usize) -> Self {
        let piece = PIECE * bytes;
        if prefetch == Prefetch::First {
            let near = (FIRST_BYTES / piece).max(1);
            return Self { near: (near, 0), again: 2 * near, far: 0 };
        }
        // Pieces that are not whole lines, or no longer than the distance, are told apart by pieces.
        let near = match NEAR_BYTES / piece {
            0 if piece.is_multiple_of(64) => (0, NEAR_BYTES / 64),
            pieces => (pieces.max(1), 0),
        };
        let beyond_near = |bytes: usize| (bytes / piece).max(near.0 + 1);
        Self { near, again: beyond_near(AGAIN_BYTES), far: beyond_near(FAR_BYTES) }
    }
}

/// The piece that is to be prefetched: rows of one head.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Ahead<'a> {
    pub(super) rows: &'a [*const u8],
    pub(super) offset: isize,
    pub(super) bytes: usize,
}

impl Ahead<'_> {
    pub(super) const NONE: Self = Ahead { rows: &[], offset: 0, bytes: 0 };

    /// The first byte of the piece, if all of it is one run of memory.
    #[inline(always)]
    fn run(&self) -> Option<*const u8> {
        let (first, last) = (*self.rows.first()?, *self.rows.get(PIECE - 1)?);
        let run = last.addr().wrapping_sub(first.addr()) == (PIECE - 1) * self.bytes;
        run.then(|| first.wrapping_offset(self.offset))
    }

    /// Hints at row `i` of the piece, if it has that many, to the first-level cache or the second.
    #[inline(always)]
    fn fetch(&self, i: usize, first: bool) {
        if let Some(row) = self.rows.get(i) {
            let mut line = row.wrapping_offset(self.offset);
            let mut left = self.bytes;
            while left > 0 {
                if first {
                    prefetch(line)
                } else {
                    prefetch_far(line)
                }
                line = line.wrapping_add(64);
                left = left.saturating_sub(64);
            }
        }
    }
}

/// Hints that go out at the pace of the work.
pub(in crate::cpu) trait Pace {
    /// Goes one step on, which takes `lines` lines or some part of a row.
    fn step(&mut self, lines: usize);

    /// Goes `rows` whole rows on that are `lines` whole lines in a run of memory.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // by kernels over codes
    #[inline(always)]
    fn advance(&mut self, _rows: usize, lines: usize) {
        self.step(lines);
    }
}

/// No hints.
pub(in crate::cpu) struct Silent;

impl Pace for Silent {
    #[inline(always)]
    fn step(&mut self, _: usize) {}
}

impl Pace for Option<&mut Hints<'_>> {
    #[inline(always)]
    fn step(&mut self, lines: usize) {
        if let Some(hints) = self {
            hints.step(lines);
        }
    }
}

/// The next lines of three runs of memory that last as long as the work does: three addresses, which
/// stay in registers.
pub(in crate::cpu) struct Straight {
    pub(super) near: *const u8,
    pub(super) again: *const u8,
    pub(super) far: *const u8,
}

impl Straight {
    /// Nowhere.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // by kernels over codes
    pub(in crate::cpu) const NONE: Self =
        Straight { near: core::ptr::null(), again: core::ptr::null(), far: core::ptr::null() };
}

impl Pace for Straight {
    #[inline(always)]
    fn step(&mut self, lines: usize) {
        for line in 0..lines {
            prefetch(self.near.wrapping_add(64 * line));
            prefetch_far(self.again.wrapping_add(64 * line));
            prefetch_far(self.far.wrapping_add(64 * line));
        }
        self.near = self.near.wrapping_add(64 * lines);
        self.again = self.again.wrapping_add(64 * lines);
        self.far = self.far.wrapping_add(64 * lines);
    }
}

/// The next lines of three runs of memory.
struct Lines {
    near: *const u8,
    /// NULL for none.
    again: *const u8,
    /// NULL for none.
    far: *const u8,
    /// Where the near ones go on after `left` more.
    then: *const u8,
    left: isize,
}

/// Hints that go out while a piece of keys or of values is worked on: those for three pieces ahead
/// of it, at the pace of the work.
pub(in crate::cpu) struct Hints<'a> {
    near: Ahead<'a>,
    /// None for kernels over codes: where rows are not straight they are slower than memory, lose few
    /// hints, and each costs them.
    again: Ahead<'a>,
    /// None where all hints go to the first level.
    far: Ahead<'a>,
    /// Whether `again` is a hint to the first level.
    first: bool,
    /// Where the pieces are runs of memory.
    lines: Option<Lines>,
    /// The next row, where they are not.
    row: usize,
    /// Steps a row, and steps until the next.
    pace: usize,
    wait: usize,
}

impl<'a> Hints<'a> {
    /// No hints.
    pub(in crate::cpu) const NONE: Hints<'static> = Hints {
        near: Ahead::NONE,
        again: Ahead::NONE,
        far: Ahead::NONE,
        first: false,
        lines: None,
        row: PIECE,
        pace: usize::MAX,
        wait: usize::MAX,
    };

    /// For the piece `piece` of a head, whose rows take `pace` steps each; `even` where the steps
    /// are all alike.
    #[inline(always)]
    pub(in crate::cpu) fn new(
        walk: &'a Walk<'_, '_>,
        side: Side,
        head: usize,
        piece: usize,
        pace: usize,
        even: bool,
    ) -> Self {
        let bytes = if side == Side::Keys { walk.k_bytes } else { walk.v_bytes };
        let Distances { near: (pieces, beyond), again, far } = walk.distances(side);
        // Which hints there are.
        let first = walk.job.prefetch == Prefetch::First;
        let (twice, early) = (!walk.now.long, !first);
        let hint = |wanted: bool, pieces: usize| {
            if wanted { walk.ahead(side, head, piece + pieces) } else { Ahead::NONE }
        };
        let (again, far) = (hint(twice, again), hint(early, far));
        // A part of a piece beyond: the rest of one piece, then the beginning of the next.
        let near = walk.ahead(side, head, piece + pieces + usize::from(beyond != 0));
        let start = if beyond == 0 { near } else { walk.ahead(side, head, piece + pieces) };
        let run = |wanted: bool, ahead: &Ahead<'_>| {
            if wanted { ahead.run() } else { Some(core::ptr::null()) }
        };
        let lines = match (start.run(), near.run(), run(twice, &again), run(early, &far)) {
            (Some(start), Some(then), Some(again), Some(far))
                if even && walk.k_bytes == walk.v_bytes =>
            {
                let left = (PIECE * bytes / 64 - beyond) as isize;
                Some(Lines { near: start.wrapping_add(beyond * 64), again, far, then, left })
            }
            _ => None,
        };
        Hints { near, again, far, first, lines, row: 0, pace, wait: 1 }
    }

    /// Goes `rows` rows on at once, where the pieces are not runs of memory.
    #[inline(always)]
    pub(in crate::cpu) fn rows(&mut self, rows: usize) {
        if self.lines.is_none() {
            for _ in 0..rows {
                self.near.fetch(self.row, true);
                self.again.fetch(self.row, self.first);
                self.far.fetch(self.row, false);
                self.row += 1;
            }
        }
    }
}

impl Pace for Hints<'_> {
    #[inline(always)]
    fn step(&mut self, lines: usize) {
        if let Some(Lines { near, again, far, then, left }) = &mut self.lines {
            // Between steps alone: a check a line costs more than the few lines it would save.
            if *left <= 0 {
                (*near, *left) = (*then, isize::MAX);
            }
            for line in 0..lines {
                prefetch(near.wrapping_add(64 * line));
            }
            *near = near.wrapping_add(64 * lines);
            *left -= lines as isize;
            if !again.is_null() {
                for line in 0..lines {
                    if self.first {
                        prefetch(again.wrapping_add(64 * line));
                    } else {
                        prefetch_far(again.wrapping_add(64 * line));
                    }
                }
                *again = again.wrapping_add(64 * lines);
            }
            if !far.is_null() {
                for line in 0..lines {
                    prefetch_far(far.wrapping_add(64 * line));
                }
                *far = far.wrapping_add(64 * lines);
            }
            return;
        }
        self.wait -= 1;
        if self.wait == 0 {
            self.wait = self.pace;
            self.rows(1);
        }
    }
    #[inline(always)]
    fn advance(&mut self, rows: usize, lines: usize) {
        if self.lines.is_some() {
            self.step(lines);
        } else {
            self.rows(rows);
        }
    }
}
