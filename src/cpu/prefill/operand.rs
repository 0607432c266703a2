//! What the tile kernel multiplies: f32 values, or pairs of bf16 where the machine multiplies
//! them itself; and the register tile that multiplies them.
//!
//! An operand is a stream of 32-bit *steps*: one f32, or two consecutive bf16 (channels of Q and
//! K, tokens of the weights and V). Everything else in the tile kernel is the same for both.

use core::marker::PhantomData;

use super::super::job::Job;
use super::super::quant::RowCode;
use super::super::vector::{PairDot, Stored, Vector};
use crate::dtype::{DType, bf16, f16};

/// Query rows of a register tile.
pub(super) const TILE_HEIGHT: usize = 6;

/// One way to multiply.
///
/// # Safety
/// As for [`Vector`]; pointers to steps are valid for `LANES` steps unless said otherwise.
pub(in crate::cpu) unsafe trait Operand<V: Vector> {
    /// `LANES` steps.
    type Steps: Copy;
    /// Elements of one step.
    const PER_STEP: usize;
    /// Bytes of a stored element of K or V.
    const STORED_BYTES: usize;
    /// Whether rows are codes with scales.
    const CODED: bool = false;

    /// Reads `LANES` steps.
    unsafe fn load(p: *const u32) -> Self::Steps;
    /// The one step at `p` in every lane.
    unsafe fn splat(p: *const u32) -> Self::Steps;
    /// `sum + a * b`, lane by lane.
    unsafe fn multiply(a: Self::Steps, b: Self::Steps, sum: V) -> V;
    /// Writes `dim` elements of the K or V row `row` as steps to `to`, and zeros up to a multiple
    /// of 16 elements. The scales and what they mean are those of the row, where it is codes.
    unsafe fn stage(row: *const u8, scales: (*const u8, &RowCode), dim: usize, to: *mut u32);
    /// The same for a query row of `dtype`.
    unsafe fn stage_query(dtype: DType, row: *const u8, dim: usize, to: *mut u32);
    /// Rotates a staged query row where the job's keys are rotated.
    #[inline(always)]
    unsafe fn turn_query(_job: &Job<'_>, _row: *mut u32) {}
    /// From `PER_STEP` staged rows, `stride` steps apart, the elements `c .. c + LANES` as steps
    /// across the rows.
    unsafe fn across(rows: *const u32, stride: usize, c: usize, to: *mut u32);
    /// Turns `2 * LANES` weights into steps, possibly over themselves: `to` may be where they
    /// were read from, or before.
    unsafe fn store_weights(low: V, high: V, to: *mut u32);
    /// Where the weight of column `c` starts, in steps.
    #[inline(always)]
    fn step_of(c: usize) -> usize {
        c / Self::PER_STEP
    }
}

/// f32 values; K and V are widened from `S`.
pub(in crate::cpu) struct Floats<S>(PhantomData<S>);

/// Widens `dim` elements of `T` into `to`, then zeros up to a multiple of 16.
///
/// # Safety
/// `row` must have `dim` elements, `to` room for `dim` rounded up to 16.
#[inline(always)]
unsafe fn widen<V: Vector, T: Stored>(row: *const u8, dim: usize, to: *mut u32) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut c = 0;
        while c + V::LANES <= dim {
            T::load::<V>(row.add(c * T::BYTES)).store(to.add(c).cast());
            c += V::LANES;
        }
        if c < dim {
            T::load_part::<V>(row.add(c * T::BYTES), dim - c).store(to.add(c).cast());
            c += V::LANES;
        }
        while c < dim.next_multiple_of(16) {
            V::splat(0.0).store(to.add(c).cast());
            c += V::LANES;
        }
    }
}

// SAFETY: forwards to `V`.
unsafe impl<V: Vector, S: Stored> Operand<V> for Floats<S> {
    type Steps = V;
    const PER_STEP: usize = 1;
    const STORED_BYTES: usize = S::BYTES;

    #[inline(always)]
    unsafe fn load(p: *const u32) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load(p.cast()) }
    }
    #[inline(always)]
    unsafe fn splat(p: *const u32) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::splat(p.cast::<f32>().read()) }
    }
    #[inline(always)]
    unsafe fn multiply(a: V, b: V, sum: V) -> V {
        // SAFETY: the caller's promise.
        unsafe { a.fma(b, sum) }
    }
    #[inline(always)]
    unsafe fn stage(row: *const u8, _: (*const u8, &RowCode), dim: usize, to: *mut u32) {
        // SAFETY: the caller's promise.
        unsafe { widen::<V, S>(row, dim, to) }
    }
    #[inline(always)]
    unsafe fn stage_query(dtype: DType, row: *const u8, dim: usize, to: *mut u32) {
        // SAFETY: the caller's promise.
        unsafe {
            match dtype {
                DType::F32 => widen::<V, f32>(row, dim, to),
                DType::F16 => widen::<V, f16>(row, dim, to),
                DType::Bf16 => widen::<V, bf16>(row, dim, to),
            }
        }
    }
    #[inline(always)]
    unsafe fn across(rows: *const u32, _stride: usize, c: usize, to: *mut u32) {
        // SAFETY: the caller's promise.
        unsafe { V::load(rows.add(c).cast()).store(to.cast()) }
    }
    #[inline(always)]
    unsafe fn store_weights(low: V, high: V, to: *mut u32) {
        // SAFETY: the caller's promise.
        unsafe {
            low.store(to.cast());
            high.store(to.add(V::LANES).cast());
        }
    }
}

/// Copies `dim` bf16 as pairs, then zeros up to a multiple of 16.
///
/// # Safety
/// As for [`Operand::stage`]; `dim` is even.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // used where the machine has such products
#[inline(always)]
unsafe fn stage_pairs<V: PairDot>(row: *const u8, dim: usize, to: *mut u32) {
    // SAFETY: the caller's promise; `dim` is even.
    unsafe {
        let (row, to) = (row.cast::<u16>(), to.cast::<u16>());
        let mut c = 0;
        while c + 2 * V::LANES <= dim {
            V::store_pairs(V::load_pairs(row.add(c)), to.add(c));
            c += 2 * V::LANES;
        }
        if c < dim {
            let rest = V::load_pairs_part(row.add(c), dim - c);
            V::store_pairs(rest, to.add(c));
        }
    }
}

/// Pairs of bf16, multiplied exactly and added in f32. Queries, K and V are bf16 as they are
/// stored; the weights are rounded to bf16.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // used where the machine has such products
pub(super) struct Pairs;

// SAFETY: forwards to `V`.
unsafe impl<V: PairDot> Operand<V> for Pairs {
    type Steps = V::Pairs;
    const PER_STEP: usize = 2;
    const STORED_BYTES: usize = 2;

    #[inline(always)]
    unsafe fn load(p: *const u32) -> V::Pairs {
        // SAFETY: the caller's promise.
        unsafe { V::load_pairs(p.cast()) }
    }
    #[inline(always)]
    unsafe fn splat(p: *const u32) -> V::Pairs {
        // SAFETY: the caller's promise.
        unsafe { V::splat_pair(p.read()) }
    }
    #[inline(always)]
    unsafe fn multiply(a: V::Pairs, b: V::Pairs, sum: V) -> V {
        // SAFETY: the caller's promise.
        unsafe { sum.dot_pairs(a, b) }
    }
    #[inline(always)]
    unsafe fn stage(row: *const u8, _: (*const u8, &RowCode), dim: usize, to: *mut u32) {
        // SAFETY: the caller's promise; `dim` is even.
        unsafe { stage_pairs::<V>(row, dim, to) }
    }
    #[inline(always)]
    unsafe fn stage_query(_dtype: DType, row: *const u8, dim: usize, to: *mut u32) {
        // SAFETY: the caller's promise; the kernel is only run with bf16 queries.
        unsafe { stage_pairs::<V>(row, dim, to) }
    }
    #[inline(always)]
    unsafe fn across(rows: *const u32, stride: usize, c: usize, to: *mut u32) {
        // SAFETY: the caller's promise.
        unsafe {
            let (even, odd) = (rows.cast::<u16>(), rows.add(stride).cast::<u16>());
            V::store_pairs(V::zip(even.add(c), odd.add(c)), to.cast());
        }
    }
    #[inline(always)]
    unsafe fn store_weights(low: V, high: V, to: *mut u32) {
        // SAFETY: the caller's promise.
        unsafe { V::store_pairs(V::round_pairs(low, high), to.cast()) }
    }
}

/// A matrix of steps whose rows are broadcast: `(row, step)` is at
/// `at + row * row_stride + step * step_stride`.
#[derive(Clone, Copy)]
pub(super) struct Broadcast {
    pub at: *const u32,
    pub row_stride: usize,
    pub step_stride: usize,
}

/// `sums[r][v] += sum over the steps of a(r, step) * b[step][v]`, with `b` of `b_stride` steps a
/// row. The sums stay in registers; the order of the additions is that of the steps.
///
/// # Safety
/// As for [`Operand`]; `a` must have `TILE_HEIGHT` rows and `b` `WIDTH` vectors a row.
#[allow(clippy::needless_range_loop)] // the indices run over several arrays
#[inline(always)]
pub(super) unsafe fn multiply_add<V: Vector, O: Operand<V>, const WIDTH: usize>(
    steps: usize,
    a: Broadcast,
    b: *const u32,
    b_stride: usize,
    sums: &mut [[V; WIDTH]; TILE_HEIGHT],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let (mut a_at, mut b_at) = (a.at, b);
        for _ in 0..steps {
            let mut columns = [O::load(b_at); WIDTH];
            for v in 1..WIDTH {
                columns[v] = O::load(b_at.add(v * V::LANES));
            }
            for r in 0..TILE_HEIGHT {
                let x = O::splat(a_at.add(r * a.row_stride));
                for v in 0..WIDTH {
                    sums[r][v] = O::multiply(x, columns[v], sums[r][v]);
                }
            }
            a_at = a_at.wrapping_add(a.step_stride);
            b_at = b_at.wrapping_add(b_stride);
        }
    }
}
