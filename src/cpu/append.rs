//! Append: the keys and values of new tokens, converted and scattered to their slots.
//!
//! All slots are checked before anything is written. Knows slots, not sequences.

use core::slice;
use core::sync::atomic::{AtomicBool, Ordering};

use super::Executor;
use super::args::{KvView, RowsView, check_ptr};
use super::kernels::Kernels;
use super::level::CpuLevel;
use super::rope::{MAX_ROPE_PAIRS, Rope};
use super::scales::stride_bytes;
use crate::attention::HeadShape;
use crate::error::{Error, Result};
use crate::layout::{MAX_HEAD_DIM, Strides};

/// Rows that one unit of work writes.
pub(super) const UNIT_ROWS: u32 = 32;

/// New rows of one layer and where they go.
#[derive(Debug, Clone, Copy)]
pub struct AppendArgs<'a> {
    /// Heads and channels; `q_heads` is not used.
    pub shape: HeadShape,
    /// The cache. Written.
    pub kv: KvView,
    /// `[rows]` slots, `block * block_tokens + offset`; a row with slot -1 is skipped. No two rows
    /// may name the same slot.
    pub slots: *const i64,
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

// SAFETY: the pointers are only followed inside `append`, whose contract covers every worker.
unsafe impl Send for AppendArgs<'_> {}
// SAFETY: as above.
unsafe impl Sync for AppendArgs<'_> {}

/// Writes new keys and values to their slots, rounding to nearest even where the stored format has
/// fewer bits. Allocates nothing.
///
/// # Errors
/// `InvalidArgument`, `NullPointer`, `Misaligned`, `Overflow` for arguments outside their
/// documented ranges, `BadBlock` for a slot outside the cache: nothing has been written then.
/// `InvalidArgument` too where a row of a quantised format is not finite, or too large for its
/// scale to be an f16: such rows are not written, all others are.
///
/// # Safety
/// `slots` (and the positions beside `rope`) must have `rows` readable entries; `k` and `v` must be
/// readable, and the cache writable at every named slot, where sizes and strides lead; slots must
/// be distinct, and nobody else may touch those slots during the call.
pub unsafe fn append(args: &AppendArgs<'_>, executor: &dyn Executor) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { append_at(args, CpuLevel::chosen()?, executor) }
}

/// The same at a given level; what is written does not depend on it.
///
/// # Errors
/// As for [`append`], and `Unsupported` for a level that this CPU lacks.
///
/// # Safety
/// As for [`append`].
pub unsafe fn append_at(
    args: &AppendArgs<'_>,
    level: CpuLevel,
    executor: &dyn Executor,
) -> Result<()> {
    if !level.is_available() {
        return Err(Error::Unsupported { what: "the CPU level" });
    }
    // SAFETY: the caller's promise.
    unsafe { args.check() }?;
    let kernels = Kernels::of(level, args.kv.format);
    let units = args.rows.div_ceil(UNIT_ROWS);
    let refused = AtomicBool::new(false);
    executor.run(units as usize, &|_, unit| {
        let first = unit as u32 * UNIT_ROWS;
        for row in first..(first + UNIT_ROWS).min(args.rows) {
            // SAFETY: checked, and slots are distinct: no two units write the same memory.
            if !unsafe { args.write_row(row, &kernels) } {
                // Relaxed: the end of the run orders it before the load.
                refused.store(true, Ordering::Relaxed);
            }
        }
    });
    if refused.into_inner() {
        return Err(Error::invalid("k, v", "must be finite and in the range of the format"));
    }
    Ok(())
}

impl AppendArgs<'_> {
    /// # Safety
    /// As for [`append`].
    pub(super) unsafe fn check(&self) -> Result<()> {
        self.shape.check()?;
        // SAFETY: the caller's promise.
        unsafe { self.kv.check(&self.shape) }?;
        if self.rows == 0 {
            return Ok(());
        }
        check_ptr("slots", self.slots.cast(), 8)?;
        self.k.check("k", self.rows, self.shape.kv_heads)?;
        if !self.shape.v_in_k {
            self.v.check("v", self.rows, self.shape.kv_heads)?;
        }
        if let Some((rope, positions)) = self.rope {
            rope.check(self.shape.k_dim)?;
            check_ptr("positions", positions.cast(), 4)?;
        }
        let end = i64::from(self.kv.num_blocks) * i64::from(self.kv.block_tokens);
        for row in 0..self.rows as usize {
            // SAFETY: the caller's promise.
            let slot = unsafe { self.slots.add(row).read() };
            if slot < -1 || slot >= end {
                let block = slot.div_euclid(i64::from(self.kv.block_tokens));
                return Err(Error::BadBlock { block: u32::try_from(block).unwrap_or(u32::MAX) });
            }
        }
        Ok(())
    }

    /// Whether all of the row could be written.
    ///
    /// # Safety
    /// As for [`append`], after the checks.
    pub(super) unsafe fn write_row(&self, row: u32, kernels: &Kernels) -> bool {
        // SAFETY: `row` is below `rows`; the checks hold every address to the caller's promise.
        unsafe {
            let slot = self.slots.add(row as usize).read();
            if slot < 0 {
                return true;
            }
            let mut buffer = [(0.0, 0.0); MAX_ROPE_PAIRS];
            let turn = self.rope.map(|(rope, positions)| {
                (rope, rope.turn(positions.add(row as usize).read(), &mut buffer))
            });
            let mut written = true;
            for head in 0..self.shape.kv_heads {
                written &= self.write(Side::Keys, row, head, slot, turn, kernels);
                if !self.shape.v_in_k {
                    written &= self.write(Side::Values, row, head, slot, None, kernels);
                }
            }
            written
        }
    }

    /// Where strides of `unit` bytes lead.
    fn address(&self, base: *mut u8, strides: Strides, unit: u32, slot: i64, head: u32) -> *mut u8 {
        let block_tokens = i64::from(self.kv.block_tokens);
        let units = slot / block_tokens * strides.block
            + i64::from(head) * strides.head
            + slot % block_tokens * strides.token;
        base.wrapping_offset((units * i64::from(unit)) as isize)
    }

    /// Whether the row of one head could be written.
    ///
    /// # Safety
    /// As for [`append`], after the checks.
    unsafe fn write(
        &self,
        side: Side,
        row: u32,
        head: u32,
        slot: i64,
        turn: Option<(&Rope, &[(f32, f32)])>,
        kernels: &Kernels,
    ) -> bool {
        let kv = &self.kv;
        let (rows, base, strides, dim) = match side {
            Side::Keys => (&self.k, kv.k, kv.k_strides, self.shape.k_dim as usize),
            Side::Values => (&self.v, kv.v, kv.v_strides, self.shape.v_dim as usize),
        };
        let from = rows.row(row, head).cast_const();
        let to = self.address(base, strides, stride_bytes(kv.format), slot, head);
        let quantised = !kv.format.is_float();
        let (source, target) = (rows.dtype, self.kv.format.dtype());
        // SAFETY: the caller's promise; rows are aligned to their elements.
        unsafe {
            if source == target && turn.is_none() && !quantised {
                to.copy_from_nonoverlapping(from, dim * target.bytes() as usize);
                return true;
            }
            let mut wide = [0.0; MAX_HEAD_DIM as usize];
            let wide = &mut wide[..dim];
            (kernels.widen)(source, from, wide);
            if let Some((rope, turn)) = turn {
                rope.rotate_head(wide, turn);
            }
            if quantised {
                return self.encode(side, wide, to, (slot, head), kernels);
            }
            (kernels.narrow)(target, wide, to);
        }
        true
    }

    /// Encodes a row; whether it could be.
    ///
    /// # Safety
    /// As for [`append`], after the checks; `codes` is where the row's codes go.
    unsafe fn encode(
        &self,
        side: Side,
        wide: &mut [f32],
        codes: *mut u8,
        (slot, head): (i64, u32),
        kernels: &Kernels,
    ) -> bool {
        let (kv, view) = (&self.kv, &self.kv.scales);
        // SAFETY: the caller's promise; head scales were checked.
        let (codec, scales) = unsafe {
            match side {
                Side::Keys => (
                    view.key_codec(kv.format, &self.shape, head),
                    self.address(view.k, view.k_strides, 1, slot, head),
                ),
                Side::Values => (
                    view.value_codec(kv.format, &self.shape, head),
                    self.address(view.v, view.v_strides, 1, slot, head),
                ),
            }
        };
        let Ok(codec) = codec else { return false };
        // SAFETY: the caller's promise; the level was checked.
        unsafe {
            let codes = slice::from_raw_parts_mut(codes, codec.code_bytes());
            let scales = match codec.scale_bytes() {
                0 => &mut [],
                bytes => slice::from_raw_parts_mut(scales, bytes),
            };
            (kernels.encode)(&codec, wide, codes, scales)
        }
    }
}

/// Keys or values.
#[derive(Clone, Copy)]
enum Side {
    Keys,
    Values,
}
