//! The quarters of 512-bit registers as rows: words that change places within them, and sums over
//! them. Knows nothing of what the words are.

use core::arch::x86_64::*;

/// Swaps words within quarters: word `i` of each quarter of `x[j]` becomes word `j` of vector `i`.
///
/// # Safety
/// AVX-512.
#[inline(always)]
pub(super) unsafe fn turn(x: [__m512i; 4]) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let (a, b) = (_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpacklo_epi32(x[2], x[3]));
        let (c, d) = (_mm512_unpackhi_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[2], x[3]));
        [
            _mm512_unpacklo_epi64(a, b),
            _mm512_unpackhi_epi64(a, b),
            _mm512_unpacklo_epi64(c, d),
            _mm512_unpackhi_epi64(c, d),
        ]
    }
}

/// Sums of lanes that differ in bit `BIT` of their index, 2 or 3: those of `x` where it is 0, of `y`
/// where it is 1.
///
/// # Safety
/// AVX-512.
#[inline(always)]
pub(super) unsafe fn merge<const BIT: u32, const R: usize>(
    x: [__m512i; R],
    y: [__m512i; R],
) -> [__m512i; R] {
    const { assert!(BIT == 2 || BIT == 3) };
    let mut sums = x;
    for r in 0..R {
        // SAFETY: the caller's promise.
        unsafe {
            let (x, y) = (x[r], y[r]);
            sums[r] = if BIT == 3 {
                _mm512_add_epi32(
                    _mm512_mask_blend_epi32(0xff00, x, y),
                    _mm512_shuffle_i64x2::<0x4e>(x, y),
                )
            } else {
                let others = _mm512_mask_blend_epi32(0xf0f0, y, x);
                _mm512_add_epi32(
                    _mm512_mask_blend_epi32(0xf0f0, x, y),
                    _mm512_shuffle_i32x4::<0xb1>(others, others),
                )
            };
        }
    }
    sums
}
