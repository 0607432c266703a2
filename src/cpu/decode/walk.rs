//! The order in which the decode kernel walks the memory: tiles of keys, of each the keys of every
//! head, then the values. Computes nothing.

use super::hints::{AGAIN_BYTES, Ahead, FAR_BYTES, STRAIGHT_NEAR_BYTES, Straight};
use crate::cpu::job::{Blocks, Job};
use crate::cpu::prefetch::Prefetch;

/// The most keys of a tile.
pub(in crate::cpu) const TILE: usize = 64;
/// Keys of a piece, the unit in which prefetching runs ahead.
pub(in crate::cpu) const PIECE: usize = 16;
/// Keys of half a piece, the unit in which hints run ahead where memory is straight.
pub(in crate::cpu) const UNIT: usize = PIECE / 2;
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
    /// All of it lies in one block, which is good.
    pub(in crate::cpu) one_block: bool,
}

impl Tile {
    #[inline(always)]
    pub(in crate::cpu) fn empty(zeros: *const u8) -> Self {
        Tile {
            k: [zeros; TILE],
            v: [zeros; TILE],
            keys: 0,
            bad: false,
            zeros,
            long: false,
            one_block: false,
        }
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
        (self.bad, self.one_block) = (false, false);
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
            self.one_block = run.tokens == self.keys && !self.bad;
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
    /// How far hints run ahead where keys and values are as long and lie side by side, for straight
    /// code: in units. None where all hints go to the first-level cache: straight code is faster in
    /// the cache, and loses more of those.
    units: Option<[usize; 3]>,
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
        let steps = [job.blocks.k_token_bytes, job.blocks.v_token_bytes];
        let side_by_side = steps == [k_bytes as isize, v_bytes as isize];
        let unit = UNIT * k_bytes;
        let levels = job.prefetch == Prefetch::Levels;
        let even = k_bytes == v_bytes && unit.is_multiple_of(64);
        let units = (levels && even && side_by_side && !job.v_in_k).then(|| {
            let near = (STRAIGHT_NEAR_BYTES / unit).max(1);
            [near, (AGAIN_BYTES / unit).max(near + 1), (FAR_BYTES / unit).max(near + 2)]
        });
        let mut walk = Walk { job, now, next, k_bytes, v_bytes, units };
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

    /// The first row of a head on one side of the tile at hand, if all rows of the tile lie side by
    /// side, in whole pieces, and so do those ahead of it.
    #[inline(always)]
    pub(in crate::cpu) fn run(&self, side: Side, head: usize) -> Option<*const u8> {
        let (now, next) = (&self.now, &self.next);
        let alike = now.keys == next.keys && now.keys.is_multiple_of(PIECE);
        let straight = self.units.is_some() && now.one_block && next.one_block;
        if straight && alike && now.keys.is_power_of_two() {
            Some(self.first(now, side, head))
        } else {
            None
        }
    }

    /// The first row of a head on one side of a tile.
    #[inline(always)]
    fn first(&self, tile: &Tile, side: Side, head: usize) -> *const u8 {
        let (first, step) = match side {
            Side::Keys => (tile.k[0], self.job.k_head_bytes),
            Side::Values => (tile.v[0], self.job.v_head_bytes),
        };
        first.wrapping_offset(head as isize * step)
    }

    /// The hints while the `unit`th [`UNIT`] rows of a head that has a [`run`](Self::run) are worked
    /// on; `None` where they would reach beyond the next tile.
    #[inline(always)]
    pub(in crate::cpu) fn straight(
        &self,
        side: Side,
        head: usize,
        unit: usize,
    ) -> Option<Straight> {
        let [near, again, far] = self.units?;
        let shift = (self.now.keys / UNIT).trailing_zeros();
        let stretch = if side == Side::Keys { head } else { self.job.kv_heads + head };
        let at = (stretch << shift) + unit;
        if at + far >= (4 * self.job.kv_heads) << shift {
            return None;
        }
        Some(Straight {
            near: self.unit(at + near, shift),
            again: self.unit(at + again, shift),
            far: self.unit(at + far, shift),
        })
    }

    /// Where the unit `at` of the tile at hand and the next begins, `1 << shift` a head and side.
    #[inline(always)]
    fn unit(&self, at: usize, shift: u32) -> *const u8 {
        let heads = self.job.kv_heads;
        let all = (2 * heads) << shift;
        let (tile, at) = if at < all { (&self.now, at) } else { (&self.next, at - all) };
        let (stretch, unit) = (at >> shift, at & ((1 << shift) - 1));
        let first = if stretch < heads {
            self.first(tile, Side::Keys, stretch)
        } else {
            self.first(tile, Side::Values, stretch - heads)
        };
        first.wrapping_add(unit * UNIT * self.k_bytes)
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
