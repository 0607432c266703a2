//! Append for sealed tiles: the raw rows of new tokens, and the records of tiles that are full then.
//!
//! A tile is sealed right after its rows were written, by the same worker, while its caches have
//! them: written and sealed one after the other, the rows of a long prompt would come back from
//! memory. A call that fills few tiles spreads their heads over the workers instead. Knows slots and
//! blocks, not sequences.

use core::ops::Range;

use super::SealedKernels;
use super::args::SealArgs;
use super::seal::{HeadRows, seal_tiles};
use crate::cpu::append::{AppendArgs, UNIT_ROWS};
use crate::cpu::args::{KvView, RowsView};
use crate::cpu::executor::Executor;
use crate::cpu::kernels::Kernels;
use crate::cpu::level::CpuLevel;
use crate::cpu::rope::Rope;
use crate::dtype::KvFormat;
use crate::error::{Error, Result};

/// New rows of one layer, and what becomes of them.
#[derive(Debug, Clone, Copy)]
pub struct TileAppendArgs<'a> {
    /// The tiles that are full when the rows are there, and the cache: its raw rows are written too.
    pub seals: SealArgs<'a>,
    /// For each of those tiles, which of the new rows are its own: ascending, disjoint; none where
    /// all are there already.
    pub own: &'a [Range<u32>],
    /// `[rows]` slots of the staging pool, `slot * tokens + offset`; -1 for a row that is not kept
    /// there. No two rows may name the same slot.
    pub staging: *const i64,
    /// The same in scratch, counted from its own beginning; not read where scratch has no blocks.
    pub scratch: *const i64,
    /// New tokens.
    pub rows: u32,
    /// New keys, `kv_heads` rows of `k_dim` a token. Only read.
    pub k: RowsView,
    /// New values, `kv_heads` rows of `v_dim` a token. Only read, and not at all where values lie
    /// in keys.
    pub v: RowsView,
    /// Rotates the keys to `[rows]` positions on the way.
    pub rope: Option<(&'a Rope, *const u32)>,
}

// SAFETY: the pointers are only followed inside `append_tiles`, whose contract covers every worker.
unsafe impl Send for TileAppendArgs<'_> {}
// SAFETY: as above.
unsafe impl Sync for TileAppendArgs<'_> {}

/// Writes new rows and seals the tiles that are full then, as [`append`](fn@crate::cpu::append) and
/// [`seal_tiles`] do one after the other. Allocates nothing.
///
/// # Errors
/// As theirs, and `InvalidArgument` for ranges of rows that are not as documented. Nothing has been
/// written then.
///
/// # Safety
/// As for both; all rows of a tile must be in its slot once its own among the new ones are written.
pub unsafe fn append_tiles(
    args: &TileAppendArgs<'_>,
    level: CpuLevel,
    executor: &dyn Executor,
) -> Result<()> {
    if !level.is_available() {
        return Err(Error::Unsupported { what: "the CPU level" });
    }
    // SAFETY: the caller's promise.
    let appends = unsafe { args.check() }?;
    let kernels = Kernels::of(level, KvFormat::Bf16);
    let write = |rows: Range<u32>| {
        for row in rows {
            for append in appends.iter().flatten() {
                // SAFETY: checked, and slots are distinct: no two workers write the same memory.
                // Rows of floats are never refused.
                unsafe { append.write_row(row, &kernels) };
            }
        }
    };
    let seals = &args.seals;
    let seal = SealedKernels::of(level).seal;
    let workers = executor.workers();
    let together = if seals.list.len() >= 2 * workers { seals.list.len() } else { 0 };
    let others = args.rows.div_ceil(UNIT_ROWS) as usize;
    executor.run(together + others, &|_, unit| {
        if unit < together {
            write(args.own[unit].clone());
            let next = args.own.get(unit + workers).map_or(0..0, Range::clone);
            for head in 0..args.seals.shape.kv_heads {
                // SAFETY: the caller's promise; blocks are distinct, so records are.
                unsafe { seals.seal_head(unit, head, args.ahead(&next, head), seal) };
            }
            return;
        }
        let mut row = (unit - together) as u32 * UNIT_ROWS;
        let end = (row + UNIT_ROWS).min(args.rows);
        while row < end {
            let next = args.own[..together].partition_point(|own| own.end <= row);
            let own = args.own[..together].get(next).map_or(end..end, Range::clone);
            write(row..own.start.clamp(row, end));
            row = own.end.clamp(row, end);
        }
    });
    if together == 0 && !seals.list.is_empty() {
        // SAFETY: the caller's promise.
        unsafe { seal_tiles(seals, level, executor) }?;
    }
    Ok(())
}

impl TileAppendArgs<'_> {
    /// What is written where, the staging pool and scratch, after all that can be checked was.
    ///
    /// # Safety
    /// As for [`append_tiles`].
    unsafe fn check(&self) -> Result<[Option<AppendArgs<'_>>; 2]> {
        self.seals.check()?;
        let mut from = 0;
        for own in self.own {
            if own.start < from || own.end < own.start || own.end > self.rows {
                return Err(Error::invalid("own", "must be ascending ranges of the rows"));
            }
            from = own.end;
        }
        if self.own.len() != self.seals.list.len() {
            return Err(Error::invalid("own", "must have one range a tile"));
        }
        let to = |kv: KvView, slots: *const i64| AppendArgs {
            shape: self.seals.shape,
            kv,
            slots,
            rows: self.rows,
            k: self.k,
            v: self.v,
            rope: self.rope,
        };
        let tiles = &self.seals.tiles;
        let staging = to(tiles.staging, self.staging);
        let scratch = (tiles.scratch.num_blocks != 0).then(|| to(tiles.scratch, self.scratch));
        // SAFETY: the caller's promise.
        unsafe {
            staging.check()?;
            scratch.as_ref().map_or(Ok(()), |scratch| scratch.check())?;
        }
        Ok([Some(staging), scratch])
    }

    /// The new rows of a head, keys and values, for prefetches.
    fn ahead(&self, rows: &Range<u32>, head: u32) -> Option<[HeadRows; 2]> {
        let of = |view: &RowsView| {
            let bytes = view.token_stride as isize * view.dtype.bytes() as isize;
            HeadRows { start: view.row(rows.start, head), bytes }
        };
        let values = if self.seals.shape.v_in_k { &self.k } else { &self.v };
        (!rows.is_empty()).then(|| [of(&self.k), of(values)])
    }
}
