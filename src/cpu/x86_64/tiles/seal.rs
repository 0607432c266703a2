//! Sealing with AVX-512 and VBMI, to the bits of the generic kernel: keys, and the record.
//!
//! Rows are read as the pairs of bf16 that they are: 32 channels a vector, whose least and largest
//! elements are those of 16-bit integers, and whose halves are f32 after one shift or mask. So even
//! and odd channels stand apart here. Where the reference divides, this multiplies by a reciprocal:
//! a quotient that the last bits could bring to another code is divided after all.
//! Latents and head dimensions other than 64, 128 and 256 are the generic kernel's.

use core::arch::x86_64::*;

use super::super::avx512::F32x16;
use super::seal_values;
use crate::cpu::sealed::{SealJob, begin_record, finish_record};
use crate::dtype::f16;
use crate::layout::tile::TileLayout;
use crate::quant::{self, HEADER_UNITS};

/// Channels of a vector of rows.
pub(super) const PAIRS: usize = 32;
/// Vectors of the longest row.
const MOST: usize = 256 / PAIRS;

/// Even and odd channels of each vector of a row.
type Channels = [[__m512; 2]; MOST];

/// Whether the kernel here knows the layout.
pub(in crate::cpu::x86_64) fn seals(layout: &TileLayout) -> bool {
    super::takes(layout) && matches!(layout.shape().v_dim, 64 | 128 | 256)
}

/// [`seal_record`](crate::cpu::sealed::seal_record) of a layout that [`seals`] knows.
///
/// # Safety
/// As there; AVX-512 with VBMI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx2,fma,f16c,sse4.2")]
pub(in crate::cpu::x86_64) unsafe fn seal(job: &SealJob<'_>) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        begin_record(job);
        let keys = match job.layout.format().k_bits() {
            8 => seal_keys::<8>(job),
            4 => seal_keys::<4>(job),
            3 => seal_keys::<3>(job),
            _ => seal_keys::<2>(job),
        };
        let sealed = keys && seal_values::seal_values(job);
        if sealed {
            finish_record::<F32x16>(job);
        }
        sealed
    }
}

/// # Safety
/// As for [`seal`].
#[inline(always)]
unsafe fn seal_keys<const BITS: u32>(job: &SealJob<'_>) -> bool {
    let layout = job.layout;
    let k_dim = layout.shape().k_dim as usize;
    let vectors = k_dim / PAIRS;
    // SAFETY: the caller's promise.
    unsafe {
        let zero = [[_mm512_setzero_ps(); 2]; MOST];
        let (mut low, mut high) = (zero, zero);
        let finite = match vectors {
            2 => ranges::<2>(job, 0, &mut low, &mut high),
            4 => ranges::<4>(job, 0, &mut low, &mut high),
            _ => {
                ranges::<4>(job, 0, &mut low, &mut high) && ranges::<4>(job, 4, &mut low, &mut high)
            }
        };
        if !finite {
            return false;
        }
        let (mut base, mut step) = (zero, zero);
        if measure::<BITS>(job, vectors, &low, &high, &mut base, &mut step).is_none() {
            return false;
        }
        for pair in 0..vectors / 2 {
            codes::<BITS>(job, pair, &base, &step);
        }
    }
    true
}

/// Least and largest elements of the channels of `N` vectors from `first` on; false where one is not
/// finite.
///
/// # Safety
/// As for [`seal`].
#[inline(always)]
unsafe fn ranges<const N: usize>(
    job: &SealJob<'_>,
    first: usize,
    low: &mut Channels,
    high: &mut Channels,
) -> bool {
    // SAFETY: the caller's promise; prefetches may have any address.
    unsafe {
        let magnitude = _mm512_set1_epi16(0x7fff);
        let mut lows = [_mm512_set1_epi16(i16::MAX); N];
        let mut highs = [_mm512_set1_epi16(i16::MIN); N];
        let (rows, ahead) = (job.k, job.ahead[0]);
        for token in 0..job.layout.shape().tokens as usize {
            let row = rows.row(token).add(64 * first);
            ahead.prefetch(token, first, N);
            for i in 0..N {
                let x = ordered(_mm512_loadu_si512(row.add(64 * i).cast()), magnitude);
                lows[i] = _mm512_min_epi16(lows[i], x);
                highs[i] = _mm512_max_epi16(highs[i], x);
            }
        }
        let mut broken = 0;
        for i in 0..N {
            // Infinity and all that is beyond it, of either sign.
            broken |= _mm512_cmpge_epi16_mask(highs[i], _mm512_set1_epi16(0x7f80));
            broken |= _mm512_cmple_epi16_mask(lows[i], _mm512_set1_epi16(!0x7f80));
            low[first + i] = split(ordered(lows[i], magnitude));
            high[first + i] = split(ordered(highs[i], magnitude));
        }
        broken == 0
    }
}

/// bf16 as integers in the order of the numbers, and back.
///
/// # Safety
/// As for [`seal`].
#[inline(always)]
unsafe fn ordered(x: __m512i, magnitude: __m512i) -> __m512i {
    // x ^ (sign & magnitude)
    // SAFETY: the caller's promise.
    unsafe { _mm512_ternarylogic_epi32::<0x78>(x, _mm512_srai_epi16::<15>(x), magnitude) }
}

/// Pairs of bf16 as f32: the first of each, and the second.
///
/// # Safety
/// As for [`seal`].
#[inline(always)]
pub(super) unsafe fn split(pairs: __m512i) -> [__m512; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let second = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
        [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), _mm512_castsi512_ps(second)]
    }
}

/// Units, steps and middles into the record, and what codes are made with; `None` where a unit is
/// past f16. The steps of [`Keys`](crate::quant::Keys), operation for operation.
///
/// # Safety
/// As for [`seal`].
#[inline(always)]
unsafe fn measure<const BITS: u32>(
    job: &SealJob<'_>,
    vectors: usize,
    low: &Channels,
    high: &Channels,
    base: &mut Channels,
    step: &mut Channels,
) -> Option<()> {
    let layout = job.layout;
    let n = ((1u32 << BITS) - 1) as f32;
    // SAFETY: the caller's promise.
    unsafe {
        let (half, one) = (_mm512_set1_ps(0.5), _mm512_set1_ps(1.0));
        let mut middle = [[_mm512_setzero_ps(); 2]; MOST];
        let mut farthest = _mm512_setzero_ps();
        for i in 0..vectors {
            for j in 0..2 {
                middle[i][j] = _mm512_mul_ps(_mm512_add_ps(low[i][j], high[i][j]), half);
                farthest = _mm512_max_ps(farthest, _mm512_abs_ps(middle[i][j]));
            }
        }
        let mid_unit = quant::f16_up(_mm512_reduce_max_ps(farthest) / 127.0)?;
        let mids_unit = mid_unit.to_f32();
        let mids = _mm512_set1_ps(mids_unit);
        let (mut stored, mut steps) = (middle, middle);
        let mut widest = _mm512_setzero_ps();
        for i in 0..vectors {
            let mut bytes = [_mm512_setzero_si512(); 2];
            for j in 0..2 {
                let mut code = _mm512_setzero_si512();
                if mids_unit != 0.0 {
                    let x = _mm512_roundscale_ps::<0>(_mm512_div_ps(middle[i][j], mids));
                    let x = _mm512_min_ps(x, _mm512_set1_ps(127.0));
                    code = _mm512_cvtps_epi32(_mm512_max_ps(x, _mm512_set1_ps(-127.0)));
                }
                bytes[j] = code;
                stored[i][j] = _mm512_mul_ps(_mm512_cvtepi32_ps(code), mids);
                let around = if BITS == 8 {
                    let above = _mm512_sub_ps(high[i][j], stored[i][j]);
                    _mm512_max_ps(above, _mm512_sub_ps(stored[i][j], low[i][j]))
                } else {
                    let shift = _mm512_abs_ps(_mm512_sub_ps(middle[i][j], stored[i][j]));
                    let range = _mm512_mul_ps(_mm512_sub_ps(high[i][j], low[i][j]), half);
                    let clip = const { quant::key_clip(BITS) };
                    _mm512_max_ps(_mm512_mul_ps(range, _mm512_set1_ps(clip)), shift)
                };
                let twice = _mm512_mul_ps(around, _mm512_set1_ps(2.0));
                steps[i][j] = _mm512_div_ps(twice, _mm512_set1_ps(n));
                widest = _mm512_max_ps(widest, steps[i][j]);
            }
            store_channels(job.record.add(layout.k_mids.start + PAIRS * i), bytes);
        }
        let unit = quant::f16_up(_mm512_reduce_max_ps(widest) / 255.0 + 0.0)?;
        let (units, steps_unit) = (_mm512_set1_ps(unit.to_f32()), unit.to_f32());
        for i in 0..vectors {
            let mut bytes = [_mm512_setzero_si512(); 2];
            for j in 0..2 {
                let mut count = one;
                if steps_unit != 0.0 {
                    // 0x0a: up, without exceptions.
                    count = _mm512_roundscale_ps::<0x0a>(_mm512_div_ps(steps[i][j], units));
                    count = _mm512_min_ps(_mm512_max_ps(count, one), _mm512_set1_ps(255.0));
                }
                bytes[j] = _mm512_cvtps_epi32(count);
                step[i][j] = _mm512_mul_ps(count, units);
                let below = _mm512_mul_ps(step[i][j], _mm512_set1_ps(n * 0.5));
                base[i][j] = _mm512_sub_ps(stored[i][j], below);
            }
            store_channels(job.record.add(layout.k_steps.start + PAIRS * i), bytes);
        }
        let header = job.record.add(layout.header.start + HEADER_UNITS);
        for (i, x) in [unit, mid_unit, f16::ZERO, f16::ZERO].into_iter().enumerate() {
            header.add(2 * i).cast::<[u8; 2]>().write(x.to_le_bytes());
        }
    }
    Some(())
}

/// Writes the low bytes of even and odd channels in the order of channels.
///
/// # Safety
/// As for [`seal`].
#[inline(always)]
unsafe fn store_channels(to: *mut u8, [even, odd]: [__m512i; 2]) {
    // SAFETY: the caller's promise.
    unsafe {
        let low = _mm512_and_si512(even, _mm512_set1_epi32(0xff));
        let pairs = _mm512_or_si512(low, _mm512_slli_epi32::<8>(odd));
        _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(pairs));
    }
}

/// Where the channels of 64 stand among bytes that [`codes`] has packed.
const CHANNELS: [u8; 64] = {
    let (mut at, mut c) = ([0; 64], 0);
    while c < 64 {
        let (vector, lane, odd) = (c / PAIRS, c % PAIRS / 2, c % 2);
        at[c] = (lane / 4 * 16 + vector * 8 + odd * 4 + lane % 4) as u8;
        c += 1;
    }
    at
};

/// Where the bytes of their nibbles stand among sums of neighbours of those.
const NIBBLES: [u8; 64] = {
    let (mut at, mut i) = ([0; 64], 0);
    while i < 32 {
        let (word, byte) = (i / 4, i % 4);
        at[i] = (word % 4 * 16 + word / 4 * 8 + byte * 2) as u8;
        i += 1;
    }
    at
};

/// The codes of all tokens for two vectors of channels.
///
/// # Safety
/// As for [`seal`].
#[inline(always)]
unsafe fn codes<const BITS: u32>(job: &SealJob<'_>, pair: usize, base: &Channels, step: &Channels) {
    let layout = job.layout;
    let tokens = layout.shape().tokens as usize;
    let n = (1u32 << BITS) - 1;
    let (row_bytes, plane_bytes) = (layout.k_codes.len() / tokens, layout.k_plane.len() / tokens);
    let unit_bytes = if BITS == 3 { 16 } else { 8 * BITS as usize };
    // A quotient and this product are at most 3 ulp apart.
    let far = 0.5 - (n + 2) as f32 / (1 << 22) as f32;
    // SAFETY: the caller's promise.
    unsafe {
        let (a, b) = (2 * pair, 2 * pair + 1);
        let base = [base[a][0], base[a][1], base[b][0], base[b][1]];
        let step = [step[a][0], step[a][1], step[b][0], step[b][1]];
        let mut by = step;
        for i in 0..4 {
            // A step of 0 has only code 0.
            let some = _mm512_cmp_ps_mask::<_CMP_NEQ_OQ>(step[i], _mm512_setzero_ps());
            by[i] = _mm512_maskz_div_ps(some, _mm512_set1_ps(1.0), step[i]);
        }
        let far = _mm512_set1_ps(far);
        let most = _mm512_set1_epi8(n as u8 as i8);
        let channels = _mm512_loadu_si512(CHANNELS.as_ptr().cast());
        let nibbles = _mm512_loadu_si512(NIBBLES.as_ptr().cast());
        let main = job.record.add(layout.k_codes.start + pair * unit_bytes);
        let plane = job.record.add(layout.k_plane.start + pair * 8);
        let rows = job.k;
        for token in 0..tokens {
            let row = rows.row(token).add(128 * pair);
            let [x0, x1] = split(_mm512_loadu_si512(row.cast()));
            let [x2, x3] = split(_mm512_loadu_si512(row.add(64).cast()));
            let (mut x, mut q) = ([x0, x1, x2, x3], [x0; 4]);
            for i in 0..4 {
                x[i] = _mm512_sub_ps(x[i], base[i]);
                q[i] = _mm512_mul_ps(x[i], by[i]);
            }
            if _mm512_cmp_ps_mask::<_CMP_GE_OQ>(farthest(q), far) != 0 {
                for i in 0..4 {
                    q[i] = _mm512_div_ps(x[i], step[i]);
                }
            }
            // What is no number, by a step of 0, is below all others then: 0.
            let low = _mm512_packs_epi32(_mm512_cvtps_epi32(q[0]), _mm512_cvtps_epi32(q[1]));
            let high = _mm512_packs_epi32(_mm512_cvtps_epi32(q[2]), _mm512_cvtps_epi32(q[3]));
            let bytes = _mm512_min_epu8(_mm512_packus_epi16(low, high), most);
            let main = main.add(token * row_bytes);
            if BITS == 4 {
                let pairs = _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(0x1001));
                let packed = _mm512_castsi512_si256(_mm512_permutexvar_epi8(nibbles, pairs));
                _mm256_storeu_si256(main.cast(), packed);
                continue;
            }
            let bytes = _mm512_permutexvar_epi8(channels, bytes);
            if BITS == 8 {
                _mm512_storeu_si512(main.cast(), bytes);
                continue;
            }
            _mm_storeu_si128(main.cast(), quarters(bytes));
            if BITS == 3 {
                // The bits of elements 8 to 15 and 16 to 23 of 32 change places.
                let thirds = _mm512_permutex_epi64::<0b11_01_10_00>(bytes);
                let thirds = _mm512_test_epi8_mask(thirds, _mm512_set1_epi8(4));
                plane.add(token * plane_bytes).cast::<[u8; 8]>().write(thirds.to_le_bytes());
            }
        }
    }
}

/// The low two bits of 64 bytes, four to a byte.
///
/// # Safety
/// As for [`seal`].
#[inline(always)]
unsafe fn quarters(bytes: __m512i) -> __m128i {
    // SAFETY: the caller's promise.
    unsafe {
        let low = _mm512_and_si512(bytes, _mm512_set1_epi8(3));
        let pairs = _mm512_maddubs_epi16(low, _mm512_set1_epi16(0x0401));
        let fours = _mm512_madd_epi16(pairs, _mm512_set1_epi32(0x0010_0001));
        _mm512_cvtepi32_epi8(fours)
    }
}

/// How far the farthest element of each lane is from a whole number.
///
/// # Safety
/// As for [`seal`].
#[inline(always)]
pub(super) unsafe fn farthest(q: [__m512; 4]) -> __m512 {
    // 0x0b: the larger magnitude, without its sign.
    // SAFETY: the caller's promise.
    unsafe {
        let off = [
            _mm512_reduce_ps::<0>(q[0]),
            _mm512_reduce_ps::<0>(q[1]),
            _mm512_reduce_ps::<0>(q[2]),
            _mm512_reduce_ps::<0>(q[3]),
        ];
        let low = _mm512_range_ps::<0x0b>(off[0], off[1]);
        _mm512_range_ps::<0x0b>(low, _mm512_range_ps::<0x0b>(off[2], off[3]))
    }
}
