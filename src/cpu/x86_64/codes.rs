//! Codes in the vectors of AVX2 and AVX-512.

use core::arch::x86_64::*;

use super::avx2::F32x8;
use super::avx512::F32x16;
use crate::cpu::quant::{CodeVector, Halves, LookUp, Nibbles};

/// Eight bytes of nibbles as sixteen values, in the order of their channels.
///
/// # Safety
/// Needs SSSE3.
#[inline(always)]
unsafe fn nibbles(codes: &[u8], how: &Nibbles, to: &mut [i8]) {
    // SAFETY: the caller's promise; chunks have the sizes that are read and written.
    unsafe {
        let order = _mm_loadu_si128(how.order.as_ptr().cast());
        let values = _mm_loadu_si128(how.values.as_ptr().cast());
        let low = _mm_set1_epi8(0x0f);
        for (to, codes) in to.chunks_exact_mut(16).zip(codes.chunks_exact(8)) {
            let bytes = _mm_loadl_epi64(codes.as_ptr().cast());
            let even = _mm_and_si128(bytes, low);
            let odd = _mm_and_si128(_mm_srli_epi16::<4>(bytes), low);
            let stored = _mm_unpacklo_epi8(even, odd);
            let wide = _mm_shuffle_epi8(values, _mm_shuffle_epi8(stored, order));
            _mm_storeu_si128(to.as_mut_ptr().cast(), wide);
        }
    }
}

/// E4M3 as f16 of 1/256 of the value, in 16-bit lanes: exponent and mantissa move to their places.
macro_rules! e4m3_bits {
    ($bytes:expr, $or:ident, $and:ident, $shift:ident, $splat:ident) => {{
        let wide = $bytes;
        let magnitude = $shift::<7>($and(wide, $splat(0x7f)));
        let sign = $shift::<8>($and(wide, $splat(0x80)));
        $or(magnitude, sign)
    }};
}

// SAFETY: only called where AVX2, FMA and F16C are enabled.
#[allow(clippy::undocumented_unsafe_blocks)] // the callers' promise; chunks have the sizes used
unsafe impl CodeVector for F32x8 {
    #[inline(always)]
    unsafe fn swap<const HALF: usize>(self) -> Self {
        Self(unsafe {
            match HALF {
                1 => _mm256_permute_ps::<0xb1>(self.0),
                2 => _mm256_permute_ps::<0x4e>(self.0),
                _ => _mm256_permute2f128_ps::<0x01>(self.0, self.0),
            }
        })
    }
    #[inline(always)]
    unsafe fn splat_f16(p: *const u8) -> Self {
        unsafe {
            let bits = i32::from(p.cast::<u16>().read_unaligned());
            Self(_mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(bits))))
        }
    }
    #[inline(always)]
    unsafe fn e4m3(codes: &[u8], scale: f32, to: &mut [f32]) {
        unsafe {
            let scale = _mm256_set1_ps(scale * 256.0);
            for (to, codes) in to.chunks_exact_mut(8).zip(codes.chunks_exact(8)) {
                let bytes = _mm_cvtepu8_epi16(_mm_loadl_epi64(codes.as_ptr().cast()));
                let half =
                    e4m3_bits!(bytes, _mm_or_si128, _mm_and_si128, _mm_slli_epi16, _mm_set1_epi16);
                _mm256_storeu_ps(to.as_mut_ptr(), _mm256_mul_ps(_mm256_cvtph_ps(half), scale));
            }
        }
    }
    #[inline(always)]
    unsafe fn e5m2(codes: &[u8], scale: f32, to: &mut [f32]) {
        unsafe {
            let scale = _mm256_set1_ps(scale);
            for (to, codes) in to.chunks_exact_mut(8).zip(codes.chunks_exact(8)) {
                let bytes = _mm_loadl_epi64(codes.as_ptr().cast());
                let half = _mm_unpacklo_epi8(_mm_setzero_si128(), bytes);
                _mm256_storeu_ps(to.as_mut_ptr(), _mm256_mul_ps(_mm256_cvtph_ps(half), scale));
            }
        }
    }
    #[inline(always)]
    unsafe fn nibbles(codes: &[u8], how: &Nibbles, to: &mut [i8]) {
        unsafe { nibbles(codes, how, to) }
    }
}

// SAFETY: only called where AVX-512 F, BW, VL, DQ are enabled, and AVX2 with them.
#[allow(clippy::undocumented_unsafe_blocks)] // the callers' promise; chunks have the sizes used
unsafe impl CodeVector for F32x16 {
    #[inline(always)]
    unsafe fn swap<const HALF: usize>(self) -> Self {
        Self(unsafe {
            match HALF {
                1 => _mm512_permute_ps::<0xb1>(self.0),
                2 => _mm512_permute_ps::<0x4e>(self.0),
                4 => _mm512_shuffle_f32x4::<0xb1>(self.0, self.0),
                _ => _mm512_shuffle_f32x4::<0x4e>(self.0, self.0),
            }
        })
    }
    #[inline(always)]
    unsafe fn splat_f16(p: *const u8) -> Self {
        unsafe {
            let bits = i32::from(p.cast::<u16>().read_unaligned());
            Self(_mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(bits))))
        }
    }
    #[inline(always)]
    unsafe fn e4m3(codes: &[u8], scale: f32, to: &mut [f32]) {
        unsafe {
            let scale = _mm512_set1_ps(scale * 256.0);
            for (to, codes) in to.chunks_exact_mut(16).zip(codes.chunks_exact(16)) {
                let bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(codes.as_ptr().cast()));
                let half = e4m3_bits!(
                    bytes,
                    _mm256_or_si256,
                    _mm256_and_si256,
                    _mm256_slli_epi16,
                    _mm256_set1_epi16
                );
                _mm512_storeu_ps(to.as_mut_ptr(), _mm512_mul_ps(_mm512_cvtph_ps(half), scale));
            }
        }
    }
    #[inline(always)]
    unsafe fn e5m2(codes: &[u8], scale: f32, to: &mut [f32]) {
        unsafe {
            let scale = _mm512_set1_ps(scale);
            for (to, codes) in to.chunks_exact_mut(16).zip(codes.chunks_exact(16)) {
                let bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(codes.as_ptr().cast()));
                let half = _mm256_slli_epi16::<8>(bytes);
                _mm512_storeu_ps(to.as_mut_ptr(), _mm512_mul_ps(_mm512_cvtph_ps(half), scale));
            }
        }
    }
    #[inline(always)]
    unsafe fn nibbles(codes: &[u8], how: &Nibbles, to: &mut [i8]) {
        unsafe { nibbles(codes, how, to) }
    }
}

/// A table of 128 bytes.
#[inline(always)]
unsafe fn table(bytes: &[u8; 128]) -> [__m512i; 2] {
    let p = bytes.as_ptr();
    // SAFETY: the caller's promise.
    unsafe { [_mm512_loadu_si512(p.cast()), _mm512_loadu_si512(p.add(64).cast())] }
}

/// Low and high bytes of the bf16 of 64 codes.
#[inline(always)]
unsafe fn halves(codes: __m512i, values: &Halves) -> [__m512i; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let (low, high) = (table(&values.low), table(&values.high));
        // An index is seven bits: the sign does not count.
        let low = _mm512_permutex2var_epi8(low[0], codes, low[1]);
        let high = _mm512_permutex2var_epi8(high[0], codes, high[1]);
        // high | (codes & 0x80)
        let sign = _mm512_set1_epi8(-128);
        [low, _mm512_ternarylogic_epi32::<0xf8>(high, codes, sign)]
    }
}

// SAFETY: only called where AVX512_VBMI is enabled too.
#[allow(clippy::undocumented_unsafe_blocks)] // the callers' promise; masks end with the codes
unsafe impl LookUp for F32x16 {
    #[inline(always)]
    unsafe fn look_up(p: *const u8, n: usize, values: &Halves) -> [__m512i; 2] {
        unsafe {
            let codes = if n == 64 {
                _mm512_loadu_si512(p.cast())
            } else {
                _mm512_maskz_loadu_epi8((1 << n) - 1, p.cast())
            };
            let [low, high] = halves(codes, values);
            [_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)]
        }
    }
    #[inline(always)]
    unsafe fn look_up_zip(
        even: *const u8,
        odd: *const u8,
        n: usize,
        values: &Halves,
    ) -> [__m512i; 2] {
        unsafe {
            let (even, odd) = if n == 32 {
                (_mm256_loadu_si256(even.cast()), _mm256_loadu_si256(odd.cast()))
            } else {
                let mask = (1 << n) - 1;
                let even = _mm256_maskz_loadu_epi8(mask, even.cast());
                (even, _mm256_maskz_loadu_epi8(mask, odd.cast()))
            };
            let codes = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(even), odd);
            let [low, high] = halves(codes, values);
            // Of channel `c`: low and high byte of the even code, then of the odd one.
            let order = _mm512_loadu_si512(ZIPPED.as_ptr().cast());
            let upper = _mm512_or_si512(order, _mm512_set1_epi8(16));
            [_mm512_permutex2var_epi8(low, order, high), _mm512_permutex2var_epi8(low, upper, high)]
        }
    }
}

/// Where the bytes of the first sixteen pairs lie in low bytes, then high ones, of 32 even and 32 odd
/// codes; those of the others are 16 further.
static ZIPPED: [u8; 64] = {
    let mut order = [0; 64];
    let mut at = 0;
    while at < 64 {
        let (channel, part) = (at / 4, at % 4);
        order[at] = (channel + part / 2 * 32 + part % 2 * 64) as u8;
        at += 1;
    }
    order
};
