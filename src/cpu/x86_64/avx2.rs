//! AVX2 with FMA and F16C: eight lanes.

use core::arch::x86_64::*;

use crate::cpu::vector::Vector;
use crate::cpu::words::Words;

/// Eight f32 lanes.
#[derive(Clone, Copy)]
pub(crate) struct F32x8(pub(super) __m256);

/// A mask of the lanes below `n`.
#[inline(always)]
unsafe fn below(n: usize) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))
    }
}

/// `n < 8` 16-bit elements through a buffer: AVX2 has no masked load of that width.
#[inline(always)]
unsafe fn part16(p: *const u16, n: usize) -> __m128i {
    let mut buffer = [0u16; 8];
    // SAFETY: the caller's promise, and `n` fits the buffer.
    unsafe {
        core::ptr::copy_nonoverlapping(p, buffer.as_mut_ptr(), n);
        _mm_loadu_si128(buffer.as_ptr().cast())
    }
}

/// bf16 to f32: the sixteen bits become the upper half.
#[inline(always)]
unsafe fn widen(bits: __m128i) -> F32x8 {
    // SAFETY: the caller's promise.
    F32x8(unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits))) })
}

// SAFETY: only called where AVX2, FMA and F16C are enabled.
#[allow(clippy::undocumented_unsafe_blocks)] // one intrinsic each: the callers' promise
unsafe impl Vector for F32x8 {
    const LANES: usize = 8;
    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self(unsafe { _mm256_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Self(unsafe { _mm256_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> Self {
        Self(unsafe { _mm256_maskload_ps(p, below(n)) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        unsafe { _mm256_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        Self(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) })
    }
    #[inline(always)]
    unsafe fn load_f16_part(p: *const u16, n: usize) -> Self {
        Self(unsafe { _mm256_cvtph_ps(part16(p, n)) })
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16) {
        unsafe { _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<0>(self.0)) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        unsafe { widen(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16_part(p: *const u16, n: usize) -> Self {
        unsafe { widen(part16(p, n)) }
    }
    #[inline(always)]
    unsafe fn load2_bf16(p: *const u16) -> [Self; 2] {
        unsafe {
            let bits = _mm256_loadu_si256(p.cast());
            let high = _mm256_and_si256(bits, _mm256_set1_epi32(0xffff_0000_u32 as i32));
            [
                Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))),
                Self(_mm256_castsi256_ps(high)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        Self(unsafe { _mm256_add_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        Self(unsafe { _mm256_sub_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        Self(unsafe { _mm256_mul_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        Self(unsafe { _mm256_div_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        Self(unsafe { _mm256_fmadd_ps(self.0, b.0, c.0) })
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        Self(unsafe { _mm256_max_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        Self(unsafe { _mm256_min_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn above(self, x: Self, floor: Self) -> Self {
        Self(unsafe { _mm256_and_ps(self.0, _mm256_cmp_ps::<_CMP_GE_OQ>(x.0, floor.0)) })
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps(self.0, 1));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    unsafe fn top(self) -> f32 {
        unsafe {
            let four = _mm_max_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps(self.0, 1));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    unsafe fn sum4(v: [Self; 4], p: *mut f32) {
        unsafe {
            let quads =
                _mm256_hadd_ps(_mm256_hadd_ps(v[0].0, v[1].0), _mm256_hadd_ps(v[2].0, v[3].0));
            let four = _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1));
            _mm_storeu_ps(p, four);
        }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        Self(unsafe {
            _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0)
        })
    }
    #[inline(always)]
    unsafe fn scale2(self, n: Self) -> Self {
        unsafe {
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n.0), _mm256_set1_epi32(127));
            Self(_mm256_mul_ps(self.0, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))))
        }
    }
    #[inline(always)]
    unsafe fn transpose(from: *const u32, from_stride: usize, to: *mut u32, to_stride: usize) {
        #[allow(clippy::needless_range_loop)] // the indices run over arrays and addresses
        unsafe {
            let mut r = [_mm256_setzero_ps(); 8];
            let mut t = r;
            for i in 0..8 {
                r[i] = _mm256_loadu_ps(from.add(i * from_stride).cast());
            }
            // Within 128-bit halves: pairs of rows, then quadruples; then the halves.
            for i in 0..4 {
                t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            for i in 0..2 {
                r[4 * i] = _mm256_shuffle_ps::<0x44>(t[4 * i], t[4 * i + 2]);
                r[4 * i + 1] = _mm256_shuffle_ps::<0xee>(t[4 * i], t[4 * i + 2]);
                r[4 * i + 2] = _mm256_shuffle_ps::<0x44>(t[4 * i + 1], t[4 * i + 3]);
                r[4 * i + 3] = _mm256_shuffle_ps::<0xee>(t[4 * i + 1], t[4 * i + 3]);
            }
            for i in 0..4 {
                let low = _mm256_permute2f128_ps::<0x20>(r[i], r[i + 4]);
                let high = _mm256_permute2f128_ps::<0x31>(r[i], r[i + 4]);
                _mm256_storeu_ps(to.add(i * to_stride).cast(), low);
                _mm256_storeu_ps(to.add((i + 4) * to_stride).cast(), high);
            }
        }
    }
}

// SAFETY: only called where AVX2, FMA and F16C are enabled; SSE4.2 comes before AVX2.
#[allow(clippy::undocumented_unsafe_blocks)] // a few intrinsics each: the callers' promise
unsafe impl Words for F32x8 {
    type Word = __m256i;

    #[inline(always)]
    unsafe fn load_words(p: *const u32) -> __m256i {
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn splat_word(word: u32) -> __m256i {
        unsafe { _mm256_set1_epi32(word as i32) }
    }
    #[inline(always)]
    unsafe fn and(a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_and_si256(a, b) }
    }
    #[inline(always)]
    unsafe fn or(a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_or_si256(a, b) }
    }
    #[inline(always)]
    unsafe fn shl(a: __m256i, n: u32) -> __m256i {
        unsafe { _mm256_sll_epi32(a, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn shr(a: __m256i, n: u32) -> __m256i {
        unsafe { _mm256_srl_epi32(a, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn xor_high_bits(a: __m256i) -> __m256i {
        unsafe { _mm256_xor_si256(a, _mm256_set1_epi8(-128)) }
    }
    #[inline(always)]
    unsafe fn dot_bytes<const SMALL: bool>(acc: __m256i, codes: __m256i, by: __m256i) -> __m256i {
        unsafe {
            if SMALL {
                let pairs = _mm256_maddubs_epi16(codes, by);
                return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            }
            // Products of 8-bit codes would saturate: even bytes, then odd ones.
            let even = _mm256_madd_epi16(
                _mm256_and_si256(codes, _mm256_set1_epi16(0xff)),
                _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(by)),
            );
            let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(codes), _mm256_srai_epi16::<8>(by));
            _mm256_add_epi32(acc, _mm256_add_epi32(even, odd))
        }
    }
    #[inline(always)]
    unsafe fn words_to_f32(words: __m256i) -> Self {
        Self(unsafe { _mm256_cvtepi32_ps(words) })
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> Self {
        Self(unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()))) })
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self {
        Self(unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) })
    }
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut u8) {
        unsafe {
            let low = _mm256_and_si256(_mm256_cvtps_epi32(self.0), _mm256_set1_epi32(0xff));
            let (a, b) = (_mm256_castsi256_si128(low), _mm256_extracti128_si256::<1>(low));
            let words = _mm_packus_epi32(a, b);
            _mm_storel_epi64(p.cast(), _mm_packus_epi16(words, words));
        }
    }
    #[inline(always)]
    unsafe fn permute16(from: *const u8, pattern: &[u8; 16], to: *mut u8) {
        unsafe { super::permute16(from, pattern, to) }
    }
    #[cfg(not(feature = "std"))]
    #[inline(always)]
    unsafe fn crc32c(before: u32, p: *const u8, bytes: usize) -> u32 {
        unsafe { super::crc32c(before, p, bytes) }
    }
}

crate::cpu::kernels::instantiate!(kernels, F32x8, "avx2,fma,f16c");
crate::cpu::sealed::instantiate_sealed!(sealed, F32x8, Plain, "avx2,fma,f16c");
