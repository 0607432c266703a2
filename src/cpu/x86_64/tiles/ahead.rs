//! What is prefetched while tiles are worked on: no hardware foresees the next block of a table.
//!
//! As in the decode kernel for rows, every line of codes is asked for twice, as [`Prefetch`] says: by
//! the second-level cache tens of KiB ahead and by the first shortly before its use, or by the first
//! both times. Each load of codes sends the hints
//! for one line, so that they need no branch and keep the pace of the work. Computes nothing.

use core::ops::Range;

use super::rows::Rows;
use crate::cpu::prefetch::Prefetch;
use crate::cpu::sealed::{Reads, SealedJob};
use crate::cpu::vector::{self, prefetch, prefetch_far};
use crate::layout::tile::TileLayout;

/// How far ahead the last and the first hint for a line run, about.
struct Distances {
    near: usize,
    far: usize,
}

impl Distances {
    const fn of(prefetch: Prefetch) -> Self {
        match prefetch {
            Prefetch::Levels => Self { near: 2 << 10, far: 32 << 10 },
            Prefetch::First => Self { near: 8 << 10, far: 24 << 10 },
        }
    }
}

/// Bytes of records whose pages are asked for together, about.
const PAGES_BYTES: usize = 80 << 10;
/// The smallest page that a system may have.
const PAGE: usize = 4 << 10;

/// What is asked for while one side of a tile is worked on: from where on, a line for each that
/// is read.
#[derive(Clone, Copy)]
pub(super) struct Hints {
    /// The side's own codes, and what is read after them.
    pub codes: *const u8,
    pub then: *const u8,
    /// The side's codes of a tile some way ahead.
    pub far: *const u8,
    pub prefetch: Prefetch,
}

/// The hints for the lines of sixteen rows.
#[derive(Clone, Copy)]
pub(super) struct Lines {
    near: *const u8,
    far: *const u8,
    prefetch: Prefetch,
}

impl Hints {
    /// Those of group `group` of `groups`, each of which has `lines` lines.
    #[inline(always)]
    pub fn group(&self, group: usize, groups: usize, lines: usize) -> Lines {
        let lead = (Distances::of(self.prefetch).near / 64 / lines).clamp(1, groups);
        let (at, from) = if group + lead < groups {
            (group + lead, self.codes)
        } else {
            (group + lead - groups, self.then)
        };
        Lines {
            near: from.wrapping_add(64 * at * lines),
            far: self.far.wrapping_add(64 * group * lines),
            prefetch: self.prefetch,
        }
    }
}

impl Lines {
    /// Asks for line `at` of codes of `BITS` bits.
    #[inline(always)]
    pub fn hint<const BITS: u32>(&self, at: usize) {
        prefetch(self.near.wrapping_add(64 * at));
        let far = self.far.wrapping_add(64 * at);
        if BITS == 8 && self.prefetch == Prefetch::First {
            prefetch(far);
        } else {
            prefetch_far(far);
        }
    }
}

/// Tiles of a job and of what comes after it.
pub(super) struct Ahead<'a, 'b> {
    job: &'a SealedJob<'b>,
    prefetch: Prefetch,
    /// Tiles that the first hints run ahead.
    far: usize,
    /// Tiles whose pages are asked for together.
    pages: usize,
}

impl<'a, 'b> Ahead<'a, 'b> {
    /// Asks for the start of the first tile.
    ///
    /// # Safety
    /// As for [`attend`](super::attend).
    pub unsafe fn new(job: &'a SealedJob<'b>) -> Self {
        let tiles = |bytes: usize| (bytes / job.layout.bytes()).max(1);
        let prefetch = Prefetch::of_tiles(job.layout.format());
        let Distances { near, far } = Distances::of(prefetch);
        let ahead = Self { job, prefetch, far: tiles(far), pages: tiles(PAGES_BYTES) };
        // SAFETY: the caller's promise.
        let first = unsafe { ahead.record(0) };
        let codes = &job.layout.k_codes;
        each(first, &(codes.start..codes.end.min(codes.start + near)), vector::prefetch);
        each(first, &rest(job.layout), vector::prefetch);
        ahead
    }

    /// Record `at` of the job, or of what comes after; the last there is where there are fewer.
    ///
    /// # Safety
    /// As for [`attend`](super::attend).
    unsafe fn record(&self, at: usize) -> *const u8 {
        let job = self.job;
        let of = |reads: &Reads, at: usize| {
            // SAFETY: the caller's promise. Any address may be prefetched.
            let block = unsafe { reads.table.add(reads.tiles.start as usize + at).read() };
            reads.records.wrapping_offset((block as isize).wrapping_mul(job.block_bytes))
        };
        match &job.after {
            _ if at < job.now.tiles.len() => of(&job.now, at),
            Some(after) if !after.tiles.is_empty() => {
                of(after, (at - job.now.tiles.len()).min(after.tiles.len() - 1))
            }
            _ => of(&job.now, job.now.tiles.len() - 1),
        }
    }

    /// What to ask for while tile `at` of the job is worked on, keys and values. Asks for what is
    /// not codes.
    ///
    /// # Safety
    /// As for [`attend`](super::attend).
    pub unsafe fn tile(&self, at: usize, k: &Rows, v: &Rows) -> [Hints; 2] {
        let layout = self.job.layout;
        // SAFETY: the caller's promise.
        let (next, far) = unsafe { (self.record(at + 1), self.record(at + self.far)) };
        // It seems that nothing retires while a page is looked up, and several are looked up at
        // once: so the pages of some tiles come first, each by one line.
        if at.is_multiple_of(self.pages) {
            for tile in 0..self.pages {
                // SAFETY: the caller's promise.
                let record = unsafe { self.record(at + self.far + tile) };
                for byte in (0..layout.bytes()).step_by(PAGE) {
                    prefetch_far(record.wrapping_add(byte));
                }
            }
        }
        each(next, &rest(layout), prefetch);
        for range in [&layout.k_plane, &layout.v_plane, &rest(layout)] {
            each(far, range, prefetch_far);
        }
        let (k_start, v_start) = (layout.k_codes.start, layout.v_codes.start);
        [
            Hints {
                codes: k.codes,
                then: v.codes,
                far: far.wrapping_add(k_start),
                prefetch: self.prefetch,
            },
            Hints {
                codes: v.codes,
                then: next.wrapping_add(k_start),
                far: far.wrapping_add(v_start),
                prefetch: self.prefetch,
            },
        ]
    }
}

/// What a record holds after its codes.
fn rest(layout: &TileLayout) -> Range<usize> {
    layout.k_steps.start..layout.bytes()
}

/// Asks for each line of a range.
#[inline(always)]
fn each(record: *const u8, range: &Range<usize>, hint: fn(*const u8)) {
    for at in range.clone().step_by(64) {
        hint(record.wrapping_add(at));
    }
}
