//! What codes ask of a vector beyond [`Vector`]: lanes that change places, and codes widened to f32.
//!
//! Loops over slices that the compiler turns into the level's instructions by itself stand in
//! `expand.rs` and `encode.rs`; here is what it does not find.

use crate::cpu::vector::{One, Vector};
use crate::dtype::f16;
use crate::quant::{e4m3_to_f32, e5m2_to_f32};

/// Nibbles of eight bytes in the order of their channels, and what each stands for.
pub(crate) struct Nibbles {
    /// Of the low nibble of byte 0, its high one, those of byte 1 and so on: which comes first,
    /// second, ...
    pub order: [u8; 16],
    /// The value of each nibble.
    pub values: [i8; 16],
}

/// INT4_T: within a word the even channels come first.
pub(crate) static INT4: Nibbles = Nibbles {
    order: [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15],
    values: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
};

/// E2M1 in halves: channels in order.
pub(crate) static E2M1: Nibbles = Nibbles {
    order: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    values: [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12],
};

/// A vector that kernels over codes use.
///
/// # Safety
/// As for [`Vector`].
pub(crate) unsafe trait CodeVector: Vector {
    /// Lane `i` gets lane `i ^ HALF`, for a power of two below `LANES`.
    unsafe fn swap<const HALF: usize>(self) -> Self;

    /// The f16 at `p`, which need not be aligned, in every lane.
    #[inline(always)]
    unsafe fn splat_f16(p: *const u8) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Self::splat(f16::from_bits(p.cast::<u16>().read_unaligned()).to_f32_const()) }
    }

    /// `codes` times `scale`; the NaN codes may read as 480 with their sign: `expand` sets them.
    #[inline(always)]
    unsafe fn e4m3(codes: &[u8], scale: f32, to: &mut [f32]) {
        for (x, &code) in to.iter_mut().zip(codes) {
            *x = e4m3_to_f32(code) * scale;
        }
    }

    /// `codes` times `scale`.
    #[inline(always)]
    unsafe fn e5m2(codes: &[u8], scale: f32, to: &mut [f32]) {
        for (x, &code) in to.iter_mut().zip(codes) {
            *x = e5m2_to_f32(code) * scale;
        }
    }

    /// The nibbles of `codes` as what they stand for, in the order of their channels; `to` is twice
    /// as long, a multiple of 16.
    #[inline(always)]
    unsafe fn nibbles(codes: &[u8], how: &Nibbles, to: &mut [i8]) {
        for (to, codes) in to.chunks_exact_mut(16).zip(codes.chunks_exact(8)) {
            for (x, &from) in to.iter_mut().zip(&how.order) {
                let nibble = codes[usize::from(from / 2)] >> (from % 2 * 4) & 15;
                *x = how.values[usize::from(nibble)];
            }
        }
    }
}

// SAFETY: needs no instructions beyond the target's own.
unsafe impl CodeVector for One {
    #[inline(always)]
    unsafe fn swap<const HALF: usize>(self) -> Self {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::KvFormat;
    use crate::quant::RowCodec;
    use alloc::vec;

    /// The order and the values, against what the reference reads from the same bytes.
    #[test]
    fn nibbles_are_those_of_the_formats() {
        let codes: [u8; 32] = core::array::from_fn(|at| (at * 89 + 7) as u8);
        let mut wide = [0i8; 64];
        let mut row = vec![0.0; 64];
        let one = 0x3c00u16.to_le_bytes();
        let scales = [one[0], one[1], 0, 0];
        let int4 = RowCodec::key(KvFormat::Int4T, 64).unwrap();
        // SAFETY: one lane needs nothing.
        unsafe { One::nibbles(&codes, &INT4, &mut wide) };
        int4.decode_rotated(&codes, &scales, &mut row).unwrap();
        assert!(row.iter().zip(wide).all(|(&x, code)| x == f32::from(code)));
        let nvfp4 = RowCodec::key(KvFormat::Nvfp4, 64).unwrap();
        // SAFETY: as above.
        unsafe { One::nibbles(&codes, &E2M1, &mut wide) };
        nvfp4.decode_rotated(&codes, &[0x38; 4], &mut row).unwrap();
        assert!(row.iter().zip(wide).all(|(&x, code)| 2.0 * x == f32::from(code)));
    }
}
