//! AVX-512: sixteen lanes, and pairs of bf16 where the CPU multiplies them itself.

use core::arch::x86_64::*;

use super::{tiles, vnni};
use crate::cpu::decode::{self, InPairs, OneByOne, Weigh};
use crate::cpu::dot::{KeyDot, Pairs, SplitPairs};
use crate::cpu::job::Job;
use crate::cpu::kernels::{Kernel, Kernels};
use crate::cpu::prefill;
use crate::cpu::quant::{CodePairs, E4m3, E5m2};
use crate::cpu::sealed::{SealJob, SealedJob, SealedKernels};
use crate::cpu::vector::{PairDot, Vector};
use crate::cpu::words::{ByteDot, Words};
use crate::dtype::{DType, KvFormat, bf16};

/// Sixteen f32 lanes.
#[derive(Clone, Copy)]
pub(crate) struct F32x16(pub __m512);

/// A mask of the lanes below `n`.
#[inline(always)]
fn below(n: usize) -> u16 {
    ((1u32 << n) - 1) as u16
}

// SAFETY: only called where AVX-512 F, BW, VL, DQ are enabled.
#[allow(clippy::undocumented_unsafe_blocks)] // one intrinsic each: the callers' promise
unsafe impl Vector for F32x16 {
    const LANES: usize = 16;
    const MANY_REGISTERS: bool = true;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self(unsafe { _mm512_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Self(unsafe { _mm512_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> Self {
        Self(unsafe { _mm512_maskz_loadu_ps(below(n), p) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        unsafe { _mm512_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) })
    }
    #[inline(always)]
    unsafe fn load_f16_part(p: *const u16, n: usize) -> Self {
        Self(unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(below(n), p.cast())) })
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16) {
        unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<0>(self.0)) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        unsafe { widen(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16_part(p: *const u16, n: usize) -> Self {
        unsafe { widen(_mm256_maskz_loadu_epi16(below(n), p.cast())) }
    }
    #[inline(always)]
    unsafe fn load2_bf16(p: *const u16) -> [Self; 2] {
        unsafe { split(_mm512_loadu_si512(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load2_bf16_part(p: *const u16, n: usize) -> [Self; 2] {
        unsafe { split(_mm512_maskz_loadu_epi16(((1u64 << n) - 1) as u32, p.cast())) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        Self(unsafe { _mm512_add_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        Self(unsafe { _mm512_sub_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        Self(unsafe { _mm512_mul_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        Self(unsafe { _mm512_div_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        Self(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        Self(unsafe { _mm512_max_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        Self(unsafe { _mm512_min_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn above(self, x: Self, floor: Self) -> Self {
        unsafe {
            let keep = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(x.0, floor.0);
            Self(_mm512_maskz_mov_ps(keep, self.0))
        }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        unsafe { _mm512_reduce_add_ps(self.0) }
    }
    #[inline(always)]
    unsafe fn top(self) -> f32 {
        unsafe { _mm512_reduce_max_ps(self.0) }
    }
    #[inline(always)]
    unsafe fn sum4(v: [Self; 4], p: *mut f32) {
        unsafe {
            let ab = _mm512_add_ps(
                _mm512_unpacklo_ps(v[0].0, v[1].0),
                _mm512_unpackhi_ps(v[0].0, v[1].0),
            );
            let cd = _mm512_add_ps(
                _mm512_unpacklo_ps(v[2].0, v[3].0),
                _mm512_unpackhi_ps(v[2].0, v[3].0),
            );
            let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
            let lo = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
            let hi = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
            let quads = _mm512_add_ps(lo, hi);
            let half =
                _mm256_add_ps(_mm512_castps512_ps256(quads), _mm512_extractf32x8_ps(quads, 1));
            let four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
            _mm_storeu_ps(p, four);
        }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        Self(unsafe { _mm512_roundscale_ps::<0>(self.0) })
    }
    #[inline(always)]
    unsafe fn scale2(self, n: Self) -> Self {
        Self(unsafe { _mm512_scalef_ps(self.0, n.0) })
    }
    #[inline(always)]
    unsafe fn transpose(from: *const u32, from_stride: usize, to: *mut u32, to_stride: usize) {
        #[allow(clippy::needless_range_loop)] // the indices run over arrays and addresses
        unsafe {
            let mut r = [_mm512_setzero_ps(); 16];
            for i in 0..16 {
                r[i] = _mm512_loadu_ps(from.add(i * from_stride).cast());
            }
            let r = transposed(r);
            for i in 0..16 {
                _mm512_storeu_ps(to.add(i * to_stride).cast(), r[i]);
            }
        }
    }
}

/// Transposes 16 rows of 16 elements of 32 bits.
///
/// # Safety
/// AVX-512 with DQ.
#[inline(always)]
pub(super) unsafe fn transposed(mut r: [__m512; 16]) -> [__m512; 16] {
    #[allow(clippy::needless_range_loop)] // the indices run over two arrays
    // SAFETY: the caller's promise.
    unsafe {
        let mut t = r;
        // Within 128-bit quarters: pairs of rows, then quadruples; then the quarters.
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        for i in 0..4 {
            r[4 * i] = _mm512_shuffle_ps::<0x44>(t[4 * i], t[4 * i + 2]);
            r[4 * i + 1] = _mm512_shuffle_ps::<0xee>(t[4 * i], t[4 * i + 2]);
            r[4 * i + 2] = _mm512_shuffle_ps::<0x44>(t[4 * i + 1], t[4 * i + 3]);
            r[4 * i + 3] = _mm512_shuffle_ps::<0xee>(t[4 * i + 1], t[4 * i + 3]);
        }
        for i in 0..4 {
            t[i] = _mm512_shuffle_f32x4::<0x88>(r[i], r[i + 4]);
            t[i + 4] = _mm512_shuffle_f32x4::<0xdd>(r[i], r[i + 4]);
            t[i + 8] = _mm512_shuffle_f32x4::<0x88>(r[i + 8], r[i + 12]);
            t[i + 12] = _mm512_shuffle_f32x4::<0xdd>(r[i + 8], r[i + 12]);
        }
        for i in 0..8 {
            r[i] = _mm512_shuffle_f32x4::<0x88>(t[i], t[i + 8]);
            r[i + 8] = _mm512_shuffle_f32x4::<0xdd>(t[i], t[i + 8]);
        }
        r
    }
}

/// Pairs of bf16 to f32: the low halves, then the high ones.
#[inline(always)]
unsafe fn split(bits: __m512i) -> [F32x16; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let high = _mm512_and_si512(bits, _mm512_set1_epi32(0xffff_0000_u32 as i32));
        [
            F32x16(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))),
            F32x16(_mm512_castsi512_ps(high)),
        ]
    }
}

/// bf16 to f32: the sixteen bits become the upper half.
#[inline(always)]
unsafe fn widen(bits: __m256i) -> F32x16 {
    // SAFETY: the caller's promise.
    F32x16(unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits))) })
}

// SAFETY: only called where AVX512_BF16 is enabled too.
#[allow(clippy::undocumented_unsafe_blocks)] // one intrinsic each: the callers' promise
unsafe impl PairDot for F32x16 {
    type Pairs = __m512i;

    #[inline(always)]
    unsafe fn load_pairs(p: *const u16) -> __m512i {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_pairs_part(p: *const u16, n: usize) -> __m512i {
        unsafe { _mm512_maskz_loadu_epi16(((1u64 << n) - 1) as u32, p.cast()) }
    }
    #[inline(always)]
    unsafe fn splat_pair(bits: u32) -> __m512i {
        unsafe { _mm512_set1_epi32(bits as i32) }
    }
    #[inline(always)]
    unsafe fn dot_pairs(self, a: __m512i, b: __m512i) -> Self {
        unsafe {
            let (a, b) = (
                core::mem::transmute::<__m512i, __m512bh>(a),
                core::mem::transmute::<__m512i, __m512bh>(b),
            );
            Self(_mm512_dpbf16_ps(self.0, a, b))
        }
    }
    #[inline(always)]
    unsafe fn store_pairs(pairs: __m512i, p: *mut u16) {
        unsafe { _mm512_storeu_si512(p.cast(), pairs) }
    }
    #[inline(always)]
    unsafe fn round_pairs(low: Self, high: Self) -> __m512i {
        unsafe { core::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high.0, low.0)) }
    }
    #[inline(always)]
    unsafe fn zip(even: *const u16, odd: *const u16) -> __m512i {
        unsafe {
            let even = _mm512_cvtepu16_epi32(_mm256_loadu_si256(even.cast()));
            let odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256(odd.cast()));
            _mm512_or_si512(even, _mm512_slli_epi32::<16>(odd))
        }
    }
    #[inline(always)]
    unsafe fn pair_up(even: Self, odd: Self) -> __m512i {
        unsafe {
            let low = core::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(even.0));
            let high = core::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(odd.0));
            let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high));
            _mm512_or_si512(_mm512_cvtepu16_epi32(low), high)
        }
    }
    #[inline(always)]
    unsafe fn interleave(even: __m512i, odd: __m512i) -> [__m512i; 2] {
        unsafe { [_mm512_unpacklo_epi16(even, odd), _mm512_unpackhi_epi16(even, odd)] }
    }
}

// SAFETY: only called where AVX-512 F, BW, VL, DQ are enabled.
#[allow(clippy::undocumented_unsafe_blocks)] // a few intrinsics each: the callers' promise
unsafe impl Words for F32x16 {
    type Word = __m512i;

    #[inline(always)]
    unsafe fn load_words(p: *const u32) -> __m512i {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn splat_word(word: u32) -> __m512i {
        unsafe { _mm512_set1_epi32(word as i32) }
    }
    #[inline(always)]
    unsafe fn and(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_and_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn shl(a: __m512i, n: u32) -> __m512i {
        unsafe { _mm512_sll_epi32(a, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn shr(a: __m512i, n: u32) -> __m512i {
        unsafe { _mm512_srl_epi32(a, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn xor_high_bits(a: __m512i) -> __m512i {
        unsafe { _mm512_xor_si512(a, _mm512_set1_epi8(-128)) }
    }
    #[inline(always)]
    unsafe fn dot_bytes<const SMALL: bool>(acc: __m512i, codes: __m512i, by: __m512i) -> __m512i {
        unsafe {
            if SMALL {
                let pairs = _mm512_maddubs_epi16(codes, by);
                return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
            }
            // Products of 8-bit codes would saturate: even bytes, then odd ones.
            let even = _mm512_madd_epi16(
                _mm512_and_si512(codes, _mm512_set1_epi16(0xff)),
                _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(by)),
            );
            let odd = _mm512_madd_epi16(_mm512_srli_epi16::<8>(codes), _mm512_srai_epi16::<8>(by));
            _mm512_add_epi32(acc, _mm512_add_epi32(even, odd))
        }
    }
    #[inline(always)]
    unsafe fn words_to_f32(words: __m512i) -> Self {
        Self(unsafe { _mm512_cvtepi32_ps(words) })
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> Self {
        Self(unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()))) })
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self {
        Self(unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) })
    }
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut u8) {
        unsafe { _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(self.0))) }
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

/// Byte products by AVX512_VNNI.
struct Vnni;

// SAFETY: only called where AVX512_VNNI is enabled too.
unsafe impl ByteDot<F32x16> for Vnni {
    #[inline(always)]
    unsafe fn dot<const SMALL: bool>(acc: __m512i, codes: __m512i, by: __m512i) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { _mm512_dpbusd_epi32(acc, codes, by) }
    }
}

crate::cpu::sealed::instantiate_sealed!(
    sealed,
    F32x16,
    Plain,
    "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"
);
crate::cpu::sealed::instantiate_sealed!(
    sealed_any_vnni,
    F32x16,
    Vnni,
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"
);

/// The kernels of the level with VNNI: those that read records as they lie, where they can.
pub(crate) fn sealed_vnni() -> SealedKernels {
    unsafe fn attend(job: &SealedJob<'_>) {
        // SAFETY: the caller's promise.
        unsafe {
            if tiles::takes(job.layout) {
                tiles::attend(job)
            } else {
                (sealed_any_vnni().attend)(job)
            }
        }
    }
    unsafe fn seal(job: &SealJob<'_>) -> bool {
        // SAFETY: the caller's promise.
        unsafe {
            if tiles::seals(job.layout) { tiles::seal(job) } else { (sealed_any_vnni().seal)(job) }
        }
    }
    SealedKernels { attend, seal }
}

crate::cpu::kernels::instantiate!(
    kernels,
    F32x16,
    "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"
);

/// The kernels of the level with bf16 dot products: those of [`kernels`] but for bf16.
pub(crate) fn kernels_bf16(format: KvFormat) -> Kernels {
    /// [`prefill::tile_pairs`] with the level's instructions.
    ///
    /// # Safety
    /// As for [`Kernel`](crate::cpu::kernels::Kernel).
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
    unsafe fn tile(job: &Job<'_>) {
        // SAFETY: the caller's promise; the features are enabled here.
        unsafe { prefill::tile_pairs::<F32x16>(job) }
    }
    /// [`decode::decode`] with the level's instructions.
    ///
    /// # Safety
    /// As for [`Kernel`].
    #[target_feature(
        enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,avx2,fma,f16c"
    )]
    unsafe fn rows<D: KeyDot<F32x16>, W: Weigh<F32x16>, const R: usize>(job: &Job<'_>) {
        // SAFETY: the caller's promise; the features are enabled here.
        unsafe { decode::decode::<F32x16, D, W, R>(job) }
    }
    unsafe fn decode<D: KeyDot<F32x16>, W: Weigh<F32x16>>(job: &Job<'_>) {
        let rows = [rows::<D, W, 1> as Kernel, rows::<D, W, 2>, rows::<D, W, 4>];
        // SAFETY: the caller's promise.
        unsafe { decode::by_rows(job, rows) }
    }
    /// By pair products: bf16 queries as they are, f16 ones in two parts; f32 ones would need three,
    /// and multiply as fast as widened keys.
    unsafe fn decode_pairs(job: &Job<'_>) {
        // SAFETY: the caller's promise.
        unsafe {
            match job.q_dtype {
                DType::Bf16 => decode::<Pairs, InPairs>(job),
                DType::F16 => decode::<SplitPairs, OneByOne<bf16>>(job),
                DType::F32 => (kernels(KvFormat::Bf16).decode)(job),
            }
        }
    }
    /// FP8 by pair products, for queries that are bf16; wider ones multiply in f32.
    unsafe fn decode_fp8(job: &Job<'_>) {
        let format = job.coding.format;
        // SAFETY: the caller's promise.
        unsafe {
            match (job.q_dtype, format) {
                (DType::Bf16, KvFormat::Fp8E4m3) => decode::<CodePairs<E4m3>, CodePairs<E4m3>>(job),
                (DType::Bf16, _) => decode::<CodePairs<E5m2>, CodePairs<E5m2>>(job),
                _ => (kernels(format).decode)(job),
            }
        }
    }
    match format {
        KvFormat::Fp8E4m3 | KvFormat::Fp8E5m2 => Kernels { decode: decode_fp8, ..kernels(format) },
        KvFormat::Int8T | KvFormat::Int4T => Kernels { decode: vnni::decode, ..kernels(format) },
        KvFormat::Bf16 => Kernels { decode: decode_pairs, tile, ..kernels(format) },
        _ => kernels(format),
    }
}
