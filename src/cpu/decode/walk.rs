//! The order in which the decode kernel walks the memory, and what it prefetches of it.
//!
//! Hardware prefetchers cannot foresee the next block of a table, so every line is prefetched in
//! software, and twice, [`FAR_BYTES`] and [`NEAR_BYTES`] ahead: a prefetch is dropped where the
//! queue of misses is full, and arithmetic that outruns the memory keeps it full. More distance
//! is no better: the lines push each other out of the first-level cache. Computes nothing.

use crate::cpu::job::{Blocks, Job};
use crate::cpu::vector::prefetch;

/// The most keys of a tile.
pub(super) const TILE: usize = 64;
/// Keys of a piece, the unit in which prefetching runs ahead.
pub(super) const PIECE: usize = 16;
/// How far the first hint runs ahead, about.
const FAR_BYTES: usize = 16 << 10;
/// How far the second hint runs ahead, about.
const NEAR_BYTES: usize = 8 << 10;

/// Pieces of rows of `bytes` between use and the second hint, and the first.
#[inline(always)]
pub(super) fn distances(bytes: usize) -> (usize, usize) {
    let near = (NEAR_BYTES / (PIECE * bytes)).max(1);
    (near, (FAR_BYTES / (PIECE * bytes)).max(near + 1))
}

/// Row addresses of one tile in the first KV head of the job.
pub(super) struct Tile {
    pub(super) k: [*const u8; TILE],
    pub(super) v: [*const u8; TILE],
    /// Keys in the tile.
    pub(super) keys: usize,
    /// Some of them lie in bad blocks; those have the address of `zeros`.
    pub(super) bad: bool,
    /// As long as the longest row.
    pub(super) zeros: *const u8,
}

impl Tile {
    #[inline(always)]
    pub(super) fn empty(zeros: *const u8) -> Self {
        Tile { k: [zeros; TILE], v: [zeros; TILE], keys: 0, bad: false, zeros }
    }

    /// Looks up the keys from `at` to the end of their tile, and none from `end`. The rest of the
    /// last group of four gets the address of `zeros`.
    ///
    /// # Safety
    /// As for [`Blocks::segment`].
    #[inline(always)]
    pub(super) unsafe fn fill(&mut self, blocks: &Blocks<'_>, at: u32, end: u32) {
        // A tile is a block or an even part of one, so that it is one run of memory.
        let whole = match blocks.block_tokens {
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
    pub(super) fn row(&self, first: *const u8, offset: isize) -> *const u8 {
        if first == self.zeros { first } else { first.wrapping_offset(offset) }
    }
}

/// The piece that is to be prefetched: rows of one head.
#[derive(Clone, Copy)]
pub(super) struct Ahead<'a> {
    rows: &'a [*const u8],
    offset: isize,
    bytes: usize,
}

impl Ahead<'_> {
    /// Prefetches row `i` of the piece, if it has that many.
    #[inline(always)]
    pub(super) fn fetch(&self, i: usize) {
        if let Some(row) = self.rows.get(i) {
            let row = row.wrapping_offset(self.offset);
            let mut at = 0;
            while at < self.bytes {
                prefetch(row.wrapping_add(at));
                at += 64;
            }
        }
    }
}

/// The tile at hand and the next, as a sequence of pieces: of each tile the keys of every head,
/// then the values.
pub(super) struct Walk<'a, 'b> {
    pub(super) job: &'a Job<'b>,
    pub(super) now: Tile,
    pub(super) next: Tile,
    /// Bytes of a key.
    pub(super) k_bytes: usize,
    /// Bytes of a value.
    pub(super) v_bytes: usize,
}

impl Walk<'_, '_> {
    /// Pieces of `tile` of one head.
    #[inline(always)]
    pub(super) fn pieces(tile: &Tile) -> usize {
        tile.keys.div_ceil(PIECE)
    }

    /// The piece `index` pieces from the start of the tile at hand.
    #[inline(always)]
    pub(super) fn ahead(&self, index: usize) -> Ahead<'_> {
        let (job, sides) = (self.job, if self.job.v_in_k { 1 } else { 2 });
        let (mut tile, mut index) = (&self.now, index);
        let here = Self::pieces(tile) * job.kv_heads * sides;
        if index >= here {
            (tile, index) = (&self.next, index - here);
        }
        let side = Self::pieces(tile) * job.kv_heads;
        if index >= side * sides {
            return Ahead { rows: &[], offset: 0, bytes: 0 };
        }
        let (rows, bytes, step, index) = if index < side {
            (&tile.k, self.k_bytes, job.k_head_bytes, index)
        } else {
            (&tile.v, self.v_bytes, job.v_head_bytes, index - side)
        };
        let (head, piece) = (index / Self::pieces(tile), index % Self::pieces(tile));
        let from = piece * PIECE;
        let rows = &rows[from..tile.keys.min(from + PIECE)];
        Ahead { rows, offset: head as isize * step, bytes }
    }
}

/// Hints that go out while values are added up: the rows of a piece in the order of memory, spread
/// over the passes that the channels take.
pub(super) struct Hints<'a, 'b, 'c> {
    walk: &'a Walk<'b, 'c>,
    passes: usize,
    /// Steps so far: a step is one row in one pass.
    at: usize,
    near: usize,
    far: usize,
    index: usize,
    ahead: bool,
}

impl<'a, 'b, 'c> Hints<'a, 'b, 'c> {
    /// For the values of KV head `head`, each row of which takes `passes` steps; `on` where hints
    /// are wanted at all.
    #[inline(always)]
    pub(super) fn new(walk: &'a Walk<'b, 'c>, head: usize, passes: usize, on: bool) -> Self {
        let (near, far) = distances(walk.v_bytes);
        let index = (walk.job.kv_heads + head) * Walk::pieces(&walk.now);
        Hints { walk, passes, at: 0, near, far, index, ahead: on }
    }

    /// Goes one step on.
    #[inline(always)]
    pub(super) fn step(&mut self) {
        if self.ahead && self.at.is_multiple_of(self.passes) {
            let row = self.at / self.passes;
            let piece = self.index + row / PIECE;
            self.walk.ahead(piece + self.near).fetch(row % PIECE);
            self.walk.ahead(piece + self.far).fetch(row % PIECE);
        }
        self.at += 1;
    }
}
