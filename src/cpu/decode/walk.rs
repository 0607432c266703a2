//! The order in which the decode kernel walks the memory, and what it prefetches of it.
//!
//! Hardware prefetchers cannot foresee the next block of a table, so every line is prefetched in
//! software, and twice: to the second-level cache about 32 KiB ahead, to the first about 2 KiB ahead.
//! A core has few buffers for misses of its first-level cache, and one that waits for memory holds
//! its buffer all the while; the hints to the second level do not hold them, and those that follow
//! wait for that level only. Computes nothing.

use crate::cpu::job::{Blocks, Job};
use crate::cpu::vector::{prefetch, prefetch_far};

/// The most keys of a tile.
pub(in crate::cpu) const TILE: usize = 64;
/// Keys of a piece, the unit in which prefetching runs ahead.
pub(in crate::cpu) const PIECE: usize = 16;
/// How far the second hint, to the first-level cache, runs ahead, about.
const NEAR_BYTES: usize = 2 << 10;
/// How far the first hint, to the second-level cache, runs ahead, about.
const FAR_BYTES: usize = 32 << 10;

/// How far the hints for rows of some length run ahead.
#[derive(Clone, Copy)]
struct Distances {
    /// Whole pieces between use and the second hint, and lines beyond.
    near: (usize, usize),
    /// Pieces between use and the first hint.
    far: usize,
}

impl Distances {
    /// For rows of `bytes`.
    #[inline(always)]
    fn of(bytes: usize) -> Self {
        let piece = PIECE * bytes;
        // Pieces that are not whole lines, or no longer than the distance, are told apart by pieces.
        let near = match NEAR_BYTES / piece {
            0 if piece.is_multiple_of(64) => (0, NEAR_BYTES / 64),
            pieces => (pieces.max(1), 0),
        };
        Self { near, far: (FAR_BYTES / piece).max(near.0 + 1) }
    }
}

/// Row addresses of one tile in the first KV head of the job.
pub(in crate::cpu) struct Tile {
    pub(in crate::cpu) k: [*const u8; TILE],
    pub(in crate::cpu) v: [*const u8; TILE],
    /// Keys in the tile.
    pub(in crate::cpu) keys: usize,
    /// Some of them lie in bad blocks; those have the address of `zeros`.
    pub(in crate::cpu) bad: bool,
    /// As long as the longest row.
    pub(in crate::cpu) zeros: *const u8,
    /// Spans small blocks: for kernels whose work a tile costs more than a jump in memory.
    pub(in crate::cpu) long: bool,
}

impl Tile {
    #[inline(always)]
    pub(in crate::cpu) fn empty(zeros: *const u8) -> Self {
        Tile { k: [zeros; TILE], v: [zeros; TILE], keys: 0, bad: false, zeros, long: false }
    }

    /// Looks up the keys from `at` to the end of their tile, and none from `end`. The rest of the
    /// last group of four gets the address of `zeros`.
    ///
    /// # Safety
    /// As for [`Blocks::segment`].
    #[inline(always)]
    pub(in crate::cpu) unsafe fn fill(&mut self, blocks: &Blocks<'_>, at: u32, end: u32) {
        // A tile is a block or an even part of one, so that it is one run of memory.
        let whole = match blocks.block_tokens {
            16 | 32 if self.long => 64,
            16 | 32 => blocks.block_tokens,
            tokens if tokens % 64 == 0 => 64,
            _ => 32,
        };
        self.keys = end.saturating_sub(at).min(whole - at % whole) as usize;
        self.bad = false;
        let mut i = 0;
        while i < self.keys {
            // SAFETY: `at + i < end`.
            let run = unsafe { blocks.segment(at + i as u32, at + self.keys as u32) };
            let (mut k, mut v) = (run.k, run.v);
            let (mut k_step, mut v_step) = (blocks.k_token_bytes, blocks.v_token_bytes);
            if k.is_null() {
                self.bad = true;
                (k, v, k_step, v_step) = (self.zeros, self.zeros, 0, 0);
            }
            for j in i..i + run.tokens {
                self.k[j] = k;
                self.v[j] = v;
                k = k.wrapping_offset(k_step);
                v = v.wrapping_offset(v_step);
            }
            i += run.tokens;
        }
        while i % 4 != 0 {
            self.k[i] = self.zeros;
            self.v[i] = self.zeros;
            i += 1;
        }
    }

    /// A row of a head `offset` bytes from the first; zeros stay zeros.
    #[inline(always)]
    pub(in crate::cpu) fn row(&self, first: *const u8, offset: isize) -> *const u8 {
        if first == self.zeros { first } else { first.wrapping_offset(offset) }
    }
}

/// The piece that is to be prefetched: rows of one head.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Ahead<'a> {
    rows: &'a [*const u8],
    offset: isize,
    bytes: usize,
}

impl Ahead<'_> {
    const NONE: Self = Ahead { rows: &[], offset: 0, bytes: 0 };

    /// The first byte of the piece, if all of it is one run of memory.
    #[inline(always)]
    fn run(&self) -> Option<*const u8> {
        let (first, last) = (*self.rows.first()?, *self.rows.get(PIECE - 1)?);
        let run = last.addr().wrapping_sub(first.addr()) == (PIECE - 1) * self.bytes;
        run.then(|| first.wrapping_offset(self.offset))
    }

    /// Hints at row `i` of the piece, if it has that many: at its use soon, or far ahead.
    #[inline(always)]
    pub(in crate::cpu) fn fetch<const FAR: bool>(&self, i: usize) {
        if let Some(row) = self.rows.get(i) {
            let mut line = row.wrapping_offset(self.offset);
            let mut left = self.bytes;
            while left > 0 {
                if FAR {
                    prefetch_far(line)
                } else {
                    prefetch(line)
                }
                line = line.wrapping_add(64);
                left = left.saturating_sub(64);
            }
        }
    }
}

/// Which rows of a tile.
#[derive(Clone, Copy, PartialEq)]
pub(in crate::cpu) enum Side {
    Keys,
    Values,
}

/// The tile at hand and the next, as a sequence of pieces: of each tile the keys of every head,
/// then the values.
pub(in crate::cpu) struct Walk<'a, 'b> {
    pub(in crate::cpu) job: &'a Job<'b>,
    pub(in crate::cpu) now: Tile,
    pub(in crate::cpu) next: Tile,
    /// Bytes of a key.
    pub(in crate::cpu) k_bytes: usize,
    /// Bytes of a value.
    pub(in crate::cpu) v_bytes: usize,
}

impl<'a, 'b> Walk<'a, 'b> {
    /// At the first tile of a job whose keys and values have `bytes` bytes each.
    ///
    /// # Safety
    /// As for [`Tile::fill`].
    #[inline(always)]
    pub(in crate::cpu) unsafe fn new(
        job: &'a Job<'b>,
        zeros: *const u8,
        (k_bytes, v_bytes): (usize, usize),
        long: bool,
    ) -> Self {
        let tile = || Tile { long, ..Tile::empty(zeros) };
        let (now, next) = (tile(), tile());
        let mut walk = Walk { job, now, next, k_bytes, v_bytes };
        // SAFETY: the caller's promise.
        unsafe { walk.now.fill(&job.blocks, job.kv_start, job.kv_end) };
        walk
    }

    /// Looks up the tile after the one at hand, which starts at key `at`; where that starts.
    ///
    /// # Safety
    /// As for [`Tile::fill`].
    #[inline(always)]
    pub(in crate::cpu) unsafe fn look_ahead(&mut self, at: u32) -> u32 {
        let job = self.job;
        let after = at + self.now.keys as u32;
        // SAFETY: the caller's promise.
        unsafe {
            if after < job.kv_end {
                self.next.fill(&job.blocks, after, job.kv_end);
            } else if let Some(coming) = &job.coming {
                self.next.fill(&coming.blocks, coming.kv_start, coming.kv_end);
            } else {
                self.next.keys = 0;
            }
        }
        after
    }
}

impl Walk<'_, '_> {
    /// Pieces of `tile` of one head.
    #[inline(always)]
    pub(in crate::cpu) fn pieces(tile: &Tile) -> usize {
        tile.keys.div_ceil(PIECE)
    }

    /// The piece `piece` pieces from the first of a head on one side of the tile at hand. Walks
    /// there by steps: it is a few pieces away, and divisions take longer.
    #[inline(always)]
    pub(in crate::cpu) fn ahead(&self, side: Side, head: usize, piece: usize) -> Ahead<'_> {
        let job = self.job;
        let (mut side, mut head, mut piece) = (side, head, piece);
        let (mut tile, mut pieces, mut last) = (&self.now, Self::pieces(&self.now), false);
        while piece >= pieces {
            piece -= pieces;
            head += 1;
            if head == job.kv_heads {
                head = 0;
                if side == Side::Keys && !job.v_in_k {
                    side = Side::Values;
                } else {
                    side = Side::Keys;
                    (tile, pieces) = (&self.next, Self::pieces(&self.next));
                    if last || pieces == 0 {
                        return Ahead::NONE;
                    }
                    last = true;
                }
            }
        }
        let (rows, bytes, step) = match side {
            Side::Keys => (&tile.k, self.k_bytes, job.k_head_bytes),
            Side::Values => (&tile.v, self.v_bytes, job.v_head_bytes),
        };
        let from = piece * PIECE;
        let rows = &rows[from..tile.keys.min(from + PIECE)];
        Ahead { rows, offset: head as isize * step, bytes }
    }
}

/// The next lines of two runs of memory.
struct Lines {
    near: *const u8,
    far: *const u8,
    /// Where the near ones go on after `left` more.
    then: *const u8,
    left: isize,
}

/// Hints that go out while a piece of keys or of values is worked on: those for two pieces ahead of
/// it, at the pace of the work.
pub(in crate::cpu) struct Hints<'a> {
    near: Ahead<'a>,
    far: Ahead<'a>,
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
        far: Ahead::NONE,
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
        let Distances { near: (pieces, beyond), far } = Distances::of(bytes);
        let far = walk.ahead(side, head, piece + far);
        // A part of a piece beyond: the rest of one piece, then the beginning of the next.
        let near = walk.ahead(side, head, piece + pieces + usize::from(beyond != 0));
        let first = if beyond == 0 { near } else { walk.ahead(side, head, piece + pieces) };
        let lines = match (first.run(), near.run(), far.run()) {
            (Some(first), Some(then), Some(far)) if even && walk.k_bytes == walk.v_bytes => {
                let left = (PIECE * bytes / 64 - beyond) as isize;
                Some(Lines { near: first.wrapping_add(beyond * 64), far, then, left })
            }
            _ => None,
        };
        Hints { near, far, lines, row: 0, pace, wait: 1 }
    }

    /// Goes one step on, which takes `lines` lines or some part of a row.
    #[inline(always)]
    pub(in crate::cpu) fn step(&mut self, lines: usize) {
        if let Some(Lines { near, far, then, left }) = &mut self.lines {
            // Between steps alone: a check a line costs more than the few lines it would save.
            if *left <= 0 {
                (*near, *left) = (*then, isize::MAX);
            }
            for line in 0..lines {
                prefetch(near.wrapping_add(64 * line));
                prefetch_far(far.wrapping_add(64 * line));
            }
            *near = near.wrapping_add(64 * lines);
            *far = far.wrapping_add(64 * lines);
            *left -= lines as isize;
            return;
        }
        self.wait -= 1;
        if self.wait == 0 {
            self.wait = self.pace;
            self.rows(1);
        }
    }

    /// Goes some rows on that are `lines` whole lines in a run of memory.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // by kernels over codes
    #[inline(always)]
    pub(in crate::cpu) fn advance(&mut self, rows: usize, lines: usize) {
        if self.lines.is_some() {
            self.step(lines);
        } else {
            self.rows(rows);
        }
    }

    /// Goes `rows` rows on at once, where the pieces are not runs of memory.
    #[inline(always)]
    pub(in crate::cpu) fn rows(&mut self, rows: usize) {
        if self.lines.is_none() {
            for _ in 0..rows {
                self.near.fetch::<false>(self.row);
                self.far.fetch::<true>(self.row);
                self.row += 1;
            }
        }
    }
}
