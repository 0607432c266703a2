//! Codes in the tile kernel: staged as f32, and from there multiplied like floats.
//!
//! A tile of keys and values is expanded once for all query rows of a job.

use core::marker::PhantomData;

use super::RowCode;
use super::decode::rotate_parts;
use super::expand::expand;
use super::vector::CodeVector;
use crate::cpu::job::Job;
use crate::cpu::prefill::{Floats, Operand};
use crate::dtype::DType;

/// Codes, expanded to f32 values.
pub(in crate::cpu) struct Coded<V>(PhantomData<V>);

// SAFETY: forwards to `V`.
unsafe impl<V: CodeVector> Operand<V> for Coded<V> {
    type Steps = V;
    const PER_STEP: usize = 1;
    // At most; what is prefetched beyond does no harm.
    const STORED_BYTES: usize = 1;
    const CODED: bool = true;

    #[inline(always)]
    unsafe fn load(p: *const u32) -> V {
        // SAFETY: the caller's promise.
        unsafe { <Floats<f32> as Operand<V>>::load(p) }
    }
    #[inline(always)]
    unsafe fn splat(p: *const u32) -> V {
        // SAFETY: the caller's promise.
        unsafe { <Floats<f32> as Operand<V>>::splat(p) }
    }
    #[inline(always)]
    unsafe fn multiply(a: V, b: V, sum: V) -> V {
        // SAFETY: the caller's promise.
        unsafe { a.fma(b, sum) }
    }
    #[inline(always)]
    unsafe fn stage(
        row: *const u8,
        (scales, code): (*const u8, &RowCode),
        dim: usize,
        to: *mut u32,
    ) {
        // SAFETY: the caller's promise; `dim` is a multiple of 16.
        unsafe { expand::<V>(code, row, scales, dim, to.cast()) }
    }
    #[inline(always)]
    unsafe fn stage_query(dtype: DType, row: *const u8, dim: usize, to: *mut u32) {
        // SAFETY: the caller's promise.
        unsafe { <Floats<f32> as Operand<V>>::stage_query(dtype, row, dim, to) }
    }
    #[inline(always)]
    unsafe fn turn_query(job: &Job<'_>, row: *mut u32) {
        if job.coding.k_rotated {
            // SAFETY: the caller's promise; the parts are the row's.
            unsafe { rotate_parts::<V>(row.cast(), job.coding.k_first, job.k_dim) }
        }
    }
    #[inline(always)]
    unsafe fn across(rows: *const u32, stride: usize, c: usize, to: *mut u32) {
        // SAFETY: the caller's promise.
        unsafe { <Floats<f32> as Operand<V>>::across(rows, stride, c, to) }
    }
    #[inline(always)]
    unsafe fn store_weights(low: V, high: V, to: *mut u32) {
        // SAFETY: the caller's promise.
        unsafe { <Floats<f32> as Operand<V>>::store_weights(low, high, to) }
    }
}
