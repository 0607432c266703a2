//! Rows of values with a token in each lane: transposed, rotated, and summed over their channels.
//!
//! Rows are transposed as the pairs of bf16 that they are, half as much as f32 would be. The rotation
//! goes through sixteen channels in registers, and then through what is left of it: the reference's
//! operations in the reference's order, as the sums are.

use core::arch::x86_64::*;

use super::super::avx512::transposed;
use super::seal::{PAIRS, split};
use crate::cpu::sealed::HeadRows;
use crate::quant;

/// The most channels.
pub(super) const MOST: usize = 256;
/// Channels that the first steps of the rotation mix.
const MIXED: usize = 16;

/// Rows of 32 tokens, and those that will be read next.
#[derive(Clone, Copy)]
pub(super) struct From {
    pub rows: HeadRows,
    pub ahead: HeadRows,
}

/// The pairs of channels of vector `group`, a token in each lane.
///
/// # Safety
/// As for [`seal`](super::seal::seal).
#[inline(always)]
pub(super) unsafe fn pairs(
    from: &From,
    tokens: &[usize; 16],
    group: usize,
    signs: __m512i,
) -> [__m512i; 16] {
    // SAFETY: the caller's promise; prefetches may have any address.
    unsafe {
        let mut rows = [_mm512_setzero_ps(); 16];
        for lane in 0..16 {
            let token = tokens[lane];
            from.ahead.prefetch(token, group, 1);
            let row = from.rows.row(token).add(64 * group);
            let x = _mm512_xor_si512(_mm512_loadu_si512(row.cast()), signs);
            rows[lane] = _mm512_castsi512_ps(x);
        }
        core::mem::transmute::<[__m512; 16], [__m512i; 16]>(transposed(rows))
    }
}

/// The sign bits that the rotation begins with.
const SIGNS: [[u16; PAIRS]; MOST / PAIRS] = {
    let (mut signs, mut c) = ([[0; PAIRS]; MOST / PAIRS], 0);
    while c < MOST {
        signs[c / PAIRS][c % PAIRS] = ((quant::SIGNS[c / 64] >> (c % 64) & 1) as u16) << 15;
        c += 1;
    }
    signs
};

/// Rotates the rows of sixteen tokens, a token a lane, as [`crate::quant::rotate`] does one.
///
/// # Safety
/// As for [`seal`](super::seal::seal).
#[inline(always)]
pub(super) unsafe fn rotate<const DIM: usize, const N: usize>(
    from: &From,
    tokens: &[usize; 16],
    y: &mut [__m512; DIM],
) {
    const { assert!(DIM == MIXED * N) };
    // SAFETY: the caller's promise.
    unsafe {
        for group in 0..DIM / PAIRS {
            let signs = _mm512_loadu_si512(SIGNS[group].as_ptr().cast());
            let pairs = pairs(from, tokens, group, signs);
            for half in 0..PAIRS / MIXED {
                let mut x = [_mm512_setzero_ps(); MIXED];
                for i in 0..MIXED / 2 {
                    [x[2 * i], x[2 * i + 1]] = split(pairs[half * MIXED / 2 + i]);
                }
                butterflies(&mut x);
                for i in 0..MIXED {
                    y[group * PAIRS + half * MIXED + i] = x[i];
                }
            }
        }
        let scale = _mm512_set1_ps(quant::hadamard_scale(DIM));
        for c in 0..MIXED {
            let mut x = [_mm512_setzero_ps(); N];
            for i in 0..N {
                x[i] = y[c + MIXED * i];
            }
            butterflies(&mut x);
            for i in 0..N {
                y[c + MIXED * i] = _mm512_mul_ps(x[i], scale);
            }
        }
    }
}

/// The Hadamard transform of `N` vectors.
///
/// # Safety
/// As for [`seal`](super::seal::seal).
#[inline(always)]
unsafe fn butterflies<const N: usize>(x: &mut [__m512; N]) {
    // SAFETY: the caller's promise.
    unsafe {
        // Each by itself, so that all of it is unrolled and stays in registers.
        step::<N, 1>(x);
        step::<N, 2>(x);
        if N > 4 {
            step::<N, 4>(x);
        }
        if N > 8 {
            step::<N, 8>(x);
        }
    }
}

/// # Safety
/// As for [`seal`](super::seal::seal).
#[inline(always)]
unsafe fn step<const N: usize, const HALF: usize>(x: &mut [__m512; N]) {
    for first in 0..N / (2 * HALF) {
        for i in 2 * HALF * first..2 * HALF * first + HALF {
            let (a, b) = (x[i], x[i + HALF]);
            // SAFETY: the caller's promise.
            unsafe { (x[i], x[i + HALF]) = (_mm512_add_ps(a, b), _mm512_sub_ps(a, b)) };
        }
    }
}

/// Channels that are summed in registers.
pub(super) const EIGHT: usize = 8;

/// The sum of eight vectors, neighbours first.
///
/// # Safety
/// As for [`seal`](super::seal::seal).
#[inline(always)]
pub(super) unsafe fn sum_of(x: [__m512; EIGHT]) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        let (a, b) = (_mm512_add_ps(x[0], x[1]), _mm512_add_ps(x[2], x[3]));
        let (c, d) = (_mm512_add_ps(x[4], x[5]), _mm512_add_ps(x[6], x[7]));
        _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d))
    }
}

/// Sums of eights to the sum of all.
///
/// # Safety
/// As for [`seal`](super::seal::seal).
#[inline(always)]
pub(super) unsafe fn sum_of_eights<const DIM: usize>(sums: &[__m512; MOST / EIGHT]) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        let mut x = *sums;
        let mut count = DIM / EIGHT;
        while count > 1 {
            count /= 2;
            for i in 0..count {
                x[i] = _mm512_add_ps(x[2 * i], x[2 * i + 1]);
            }
        }
        x[0]
    }
}

/// # Safety
/// As for [`seal`](super::seal::seal).
#[inline(always)]
pub(super) unsafe fn sum_of_squares<const DIM: usize>(y: &[__m512; DIM]) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [_mm512_setzero_ps(); MOST / EIGHT];
        for at in 0..DIM / EIGHT {
            let mut x = [_mm512_setzero_ps(); EIGHT];
            for i in 0..EIGHT {
                let y = y[EIGHT * at + i];
                x[i] = _mm512_mul_ps(y, y);
            }
            sums[at] = sum_of(x);
        }
        sum_of_eights::<DIM>(&sums)
    }
}
