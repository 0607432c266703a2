//! What belongs to four rows, a lane of each quarter of a vector to each: sums and largest of four
//! rows take as many instructions as those of one and a half. A row's result does not depend on the
//! others, nor on how many there are.

use core::arch::x86_64::*;

/// Rows that are worked on together.
pub(super) const GROUP: usize = 4;

/// One way to bring the lanes of up to four vectors together: of floats, or of whole numbers.
macro_rules! quads {
    ($name:ident, $op:ident, floats) => {
        quads!(
            $name,
            $op,
            __m512,
            _mm512_unpacklo_ps,
            _mm512_unpackhi_ps,
            _mm512_shuffle_f32x4,
            _mm512_castps_pd,
            _mm512_unpacklo_pd,
            _mm512_unpackhi_pd,
            _mm512_castpd_ps
        );
    };
    ($name:ident, $op:ident, whole) => {
        quads!(
            $name,
            $op,
            __m512i,
            _mm512_unpacklo_epi32,
            _mm512_unpackhi_epi32,
            _mm512_shuffle_i32x4,
            same,
            _mm512_unpacklo_epi64,
            _mm512_unpackhi_epi64,
            same
        );
    };
    ($name:ident, $op:ident, $vector:ty, $low:ident, $high:ident, $swap:ident,
     $to:ident, $wide_low:ident, $wide_high:ident, $from:ident) => {
        /// Of each vector all lanes in one.
        ///
        /// # Safety
        /// AVX-512.
        #[inline(always)]
        pub unsafe fn $name<const R: usize>(x: [$vector; R]) -> $vector {
            // SAFETY: the caller's promise.
            unsafe {
                let (a, b, c, d) = (x[0], x[1 % R], x[2 % R], x[3 % R]);
                let (ab, cd) = ($op($low(a, b), $high(a, b)), $op($low(c, d), $high(c, d)));
                let (ab, cd) = ($to(ab), $to(cd));
                let all = $op($from($wide_low(ab, cd)), $from($wide_high(ab, cd)));
                let all = $op(all, $swap::<0x4e>(all, all));
                $op(all, $swap::<0xb1>(all, all))
            }
        }
    };
}

quads!(sum, _mm512_add_ps, floats);
quads!(largest, _mm512_max_ps, floats);
quads!(whole_sum, _mm512_add_epi32, whole);
quads!(whole_largest, _mm512_max_epi32, whole);

#[inline(always)]
fn same(x: __m512i) -> __m512i {
    x
}

/// What belongs to row `row`, in every lane.
///
/// # Safety
/// AVX-512.
#[inline(always)]
pub(super) unsafe fn of_row(x: __m512, row: usize) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        match row {
            0 => _mm512_permute_ps::<0x00>(x),
            1 => _mm512_permute_ps::<0x55>(x),
            2 => _mm512_permute_ps::<0xaa>(x),
            _ => _mm512_permute_ps::<0xff>(x),
        }
    }
}

/// The same of whole numbers.
///
/// # Safety
/// AVX-512.
#[inline(always)]
pub(super) unsafe fn whole_of_row(x: __m512i, row: usize) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe { _mm512_castps_si512(of_row(_mm512_castsi512_ps(x), row)) }
}

/// What lies at `p` for each of `R` rows, 0 for others.
///
/// # Safety
/// AVX-512; `R` f32 must be readable.
#[inline(always)]
pub(super) unsafe fn load<const R: usize>(p: *const f32) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe { _mm512_broadcast_f32x4(if R == GROUP { _mm_loadu_ps(p) } else { _mm_load_ss(p) }) }
}

/// Writes what belongs to each of `R` rows.
///
/// # Safety
/// AVX-512; there must be room for `R` f32.
#[inline(always)]
pub(super) unsafe fn store<const R: usize>(p: *mut f32, x: __m512) {
    // SAFETY: the caller's promise.
    unsafe {
        let x = _mm512_castps512_ps128(x);
        if R == GROUP { _mm_storeu_ps(p, x) } else { _mm_store_ss(p, x) }
    }
}
