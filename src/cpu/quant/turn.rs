//! The rotation of `crate::quant::rotate` over vectors, with its bits.
//!
//! Every butterfly is one rounded sum or difference of the same two elements whatever the width, so
//! lanes may take them in any order within a stage.

use super::vector::CodeVector;
use crate::layout::MAX_HEAD_DIM;
use crate::quant::{SIGNS, hadamard_block};

/// `SIGNS` as factors.
static FACTORS: [f32; MAX_HEAD_DIM as usize] = {
    let mut factors = [1.0; MAX_HEAD_DIM as usize];
    let mut c = 0;
    while c < factors.len() {
        if SIGNS[c / 64] >> (c % 64) & 1 == 1 {
            factors[c] = -1.0;
        }
        c += 1;
    }
    factors
};

/// Of the stages within a vector: 1 in the lower lane of a pair, -1 in the upper one.
static HALVES: [[f32; 16]; 4] = {
    let mut halves = [[1.0; 16]; 4];
    let mut stage = 0;
    while stage < 4 {
        let mut lane = 0;
        while lane < 16 {
            if lane >> stage & 1 == 1 {
                halves[stage][lane] = -1.0;
            }
            lane += 1;
        }
        stage += 1;
    }
    halves
};

/// Rotates `dim` channels in place: a multiple of 16, at most 576.
///
/// # Safety
/// As for [`Vector`](crate::cpu::vector::Vector).
#[inline(always)]
pub(in crate::cpu) unsafe fn rotate<V: CodeVector>(row: *mut f32, dim: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        negate::<V>(row, dim);
        transform::<V>(row, dim);
    }
}

/// Undoes [`rotate`], but for rounding.
///
/// # Safety
/// As for [`rotate`].
#[inline(always)]
pub(in crate::cpu) unsafe fn unrotate<V: CodeVector>(row: *mut f32, dim: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        transform::<V>(row, dim);
        negate::<V>(row, dim);
    }
}

#[inline(always)]
unsafe fn negate<V: CodeVector>(row: *mut f32, dim: usize) {
    for c in (0..dim).step_by(V::LANES) {
        // SAFETY: the caller's promise.
        unsafe { V::load(row.add(c)).mul(V::load(FACTORS.as_ptr().add(c))).store(row.add(c)) };
    }
}

/// One stage within a vector: sums in the lower lanes of pairs, differences in the upper ones.
#[inline(always)]
unsafe fn stage<V: CodeVector, const HALF: usize>(x: V) -> V {
    if HALF >= V::LANES {
        return x;
    }
    // SAFETY: the caller's promise. The product is exact, so the sum is rounded once.
    unsafe {
        let signs = V::load(HALVES[HALF.trailing_zeros() as usize].as_ptr());
        x.fma(signs, x.swap::<HALF>())
    }
}

#[inline(always)]
unsafe fn transform<V: CodeVector>(row: *mut f32, dim: usize) {
    let n = hadamard_block(dim);
    // SAFETY: the caller's promise; blocks are whole vectors.
    unsafe {
        for c in (0..dim).step_by(V::LANES) {
            let x = stage::<V, 1>(V::load(row.add(c)));
            let x = stage::<V, 4>(stage::<V, 2>(x));
            stage::<V, 8>(x).store(row.add(c));
        }
        let mut half = V::LANES;
        while half < n {
            for pair in (0..dim).step_by(2 * half) {
                for c in (pair..pair + half).step_by(V::LANES) {
                    let (a, b) = (V::load(row.add(c)), V::load(row.add(c + half)));
                    a.add(b).store(row.add(c));
                    a.sub(b).store(row.add(c + half));
                }
            }
            half *= 2;
        }
        // 1 / sqrt(n): a power of two, or one times 1 / sqrt(2).
        let log = n.trailing_zeros();
        let root = f32::from_bits((127 - log / 2) << 23);
        let scale =
            if log.is_multiple_of(2) { root } else { core::f32::consts::FRAC_1_SQRT_2 * root };
        for c in (0..dim).step_by(V::LANES) {
            V::load(row.add(c)).mul(V::splat(scale)).store(row.add(c));
        }
    }
}
