//! Codes in the vectors of AVX2 and AVX-512.

use core::arch::x86_64::*;

use super::avx2::F32x8;
use super::avx512::F32x16;
use crate::cpu::quant::{CodeVector, Nibbles};

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
