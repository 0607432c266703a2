//! The values of a record, with AVX-512 and VBMI: to the bits of the generic kernel.
//!
//! 32 tokens at a time, in the lanes of two vectors. Which token has which lane is chosen so that
//! codes of the two come together in one byte, and bytes in the order of the record. As with keys, a
//! quotient that its last bits could bring to another code is divided after all.

use core::arch::x86_64::*;
use core::mem::MaybeUninit;

use super::lanes::{EIGHT, From, MOST, pairs, rotate, sum_of, sum_of_eights, sum_of_squares};
use super::seal::{PAIRS, farthest, split};
use crate::cpu::sealed::SealJob;
use crate::quant;

/// Tokens that are worked on together.
const TOKENS: usize = 32;

/// The tokens in the lanes of both vectors, for codes of `bits`.
const fn lanes(bits: u32) -> [[usize; 16]; 2] {
    let (mut tokens, mut lane) = ([[0; 16]; 2], 0);
    while lane < 16 {
        let (four, at) = (lane / 4 * 8, lane % 4);
        [tokens[0][lane], tokens[1][lane]] = match bits {
            8 => [four + at, four + 4 + at],
            4 => [four + [0, 4, 1, 5][at], four + [2, 6, 3, 7][at]],
            _ => [2 * lane, 2 * lane + 1],
        };
        lane += 1;
    }
    tokens
}

/// For each token, which element of both vectors it is.
const fn places(bits: u32) -> [u16; TOKENS] {
    let (tokens, mut places, mut i) = (lanes(bits), [0; TOKENS], 0);
    while i < TOKENS {
        places[tokens[i / 16][i % 16]] = i as u16;
        i += 1;
    }
    places
}

/// Codes and scales of the values; false where they cannot be sealed.
///
/// # Safety
/// As for [`seal`](super::seal::seal).
#[inline(always)]
pub(super) unsafe fn seal_values(job: &SealJob<'_>) -> bool {
    let shape = job.layout.shape();
    // SAFETY: the caller's promise.
    unsafe {
        for first in (0..shape.tokens as usize).step_by(TOKENS) {
            let [rows, ahead] = [job.v, job.ahead[1]].map(|rows| rows.from(first));
            let from = From { rows, ahead };
            let sealed = match (job.layout.format().v_bits(), shape.v_dim) {
                (8, _) => plain(job, from, first),
                (4, 64) => rotated::<4, 64, 4>(job, from, first),
                (4, 128) => rotated::<4, 128, 8>(job, from, first),
                (4, _) => rotated::<4, 256, 16>(job, from, first),
                (3, 64) => rotated::<3, 64, 4>(job, from, first),
                (3, 128) => rotated::<3, 128, 8>(job, from, first),
                (3, _) => rotated::<3, 256, 16>(job, from, first),
                (_, 64) => rotated::<2, 64, 4>(job, from, first),
                (_, 128) => rotated::<2, 128, 8>(job, from, first),
                _ => rotated::<2, 256, 16>(job, from, first),
            };
            if !sealed {
                return false;
            }
        }
    }
    true
}

/// Scales of 32 tokens into the record; false where one is past f16.
///
/// # Safety
/// As for [`seal_values`].
#[inline(always)]
unsafe fn store_scales<const BITS: u32>(
    job: &SealJob<'_>,
    first: usize,
    scales: [__m256i; 2],
) -> bool {
    let places = const { &places(BITS) };
    // SAFETY: the caller's promise.
    unsafe {
        let scales = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(scales[0]), scales[1]);
        let exponent = _mm512_and_si512(scales, _mm512_set1_epi16(0x7c00));
        if _mm512_cmpeq_epi16_mask(exponent, _mm512_set1_epi16(0x7c00)) != 0 {
            return false;
        }
        let scales = _mm512_permutexvar_epi16(_mm512_loadu_si512(places.as_ptr().cast()), scales);
        let to = job.record.add(job.layout.v_scales.start + 2 * first);
        _mm512_storeu_si512(to.cast(), scales);
    }
    true
}

/// Codes of 8 bits of 32 tokens, and their scales.
///
/// # Safety
/// As for [`seal_values`].
#[inline(always)]
unsafe fn plain(job: &SealJob<'_>, from: From, first: usize) -> bool {
    let tokens = const { &lanes(8) };
    let v_dim = job.layout.shape().v_dim as usize;
    let mut rows = MaybeUninit::<[[__m512i; MOST / 2]; 2]>::uninit();
    let rows = rows.as_mut_ptr().cast::<[__m512i; MOST / 2]>();
    // SAFETY: the caller's promise; what is read of the rows was written.
    unsafe {
        let (zero, ones) = (_mm512_setzero_si512(), _mm512_set1_ps(1.0));
        let magnitude = _mm512_set1_epi16(0x7fff);
        let mut scales = [_mm256_setzero_si256(); 2];
        let (mut step, mut by, mut some) = ([ones; 2], [ones; 2], [0; 2]);
        for half in 0..2 {
            let mut top = zero;
            for group in 0..v_dim / PAIRS {
                let pairs = pairs(&from, &tokens[half], group, zero);
                for i in 0..16 {
                    top = _mm512_max_epu16(top, _mm512_and_si512(pairs[i], magnitude));
                    (*rows.add(half))[16 * group + i] = pairs[i];
                }
            }
            // Infinity and all that is beyond it.
            if _mm512_cmpge_epu16_mask(top, _mm512_set1_epi16(0x7f80)) != 0 {
                return false;
            }
            let [a, b] = split(top);
            let (mut largest, mut steps, mut units) = ([0.0f32; 16], [0.0f32; 16], [0u16; 16]);
            _mm512_storeu_ps(largest.as_mut_ptr(), _mm512_max_ps(a, b));
            for lane in 0..16 {
                let Some(scale) = quant::f16_up(largest[lane] / 127.0) else { return false };
                (units[lane], steps[lane]) = (scale.to_bits(), scale.to_f32());
            }
            scales[half] = _mm256_loadu_si256(units.as_ptr().cast());
            step[half] = _mm512_loadu_ps(steps.as_ptr());
            // A step of 0 has only code 0.
            some[half] = _mm512_cmp_ps_mask::<_CMP_NEQ_OQ>(step[half], _mm512_setzero_ps());
            by[half] = _mm512_maskz_div_ps(some[half], ones, step[half]);
        }
        if !store_scales::<8>(job, first, scales) {
            return false;
        }
        // As with keys: a quotient is at most 127.
        let far = _mm512_set1_ps(0.5 - 128.0 / (1 << 22) as f32);
        let channel_bytes = job.layout.shape().tokens as usize;
        let to = job.record.add(job.layout.v_codes.start + first);
        for pair in 0..v_dim / 2 {
            let [a, b] = split((*rows)[pair]);
            let [c, d] = split((*rows.add(1))[pair]);
            let mut q = [
                _mm512_mul_ps(a, by[0]),
                _mm512_mul_ps(b, by[0]),
                _mm512_mul_ps(c, by[1]),
                _mm512_mul_ps(d, by[1]),
            ];
            if _mm512_cmp_ps_mask::<_CMP_GE_OQ>(farthest(q), far) != 0 {
                q = [
                    _mm512_maskz_div_ps(some[0], a, step[0]),
                    _mm512_maskz_div_ps(some[0], b, step[0]),
                    _mm512_maskz_div_ps(some[1], c, step[1]),
                    _mm512_maskz_div_ps(some[1], d, step[1]),
                ];
            }
            let [a, b, c, d] = [
                _mm512_cvtps_epi32(q[0]),
                _mm512_cvtps_epi32(q[1]),
                _mm512_cvtps_epi32(q[2]),
                _mm512_cvtps_epi32(q[3]),
            ];
            // In each quarter eight tokens of both channels.
            let bytes = _mm512_packs_epi16(_mm512_packs_epi32(a, c), _mm512_packs_epi32(b, d));
            let order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
            let bytes = _mm512_permutexvar_epi64(order, bytes);
            let to = to.add(2 * pair * channel_bytes);
            _mm256_storeu_si256(to.cast(), _mm512_castsi512_si256(bytes));
            let to = to.add(channel_bytes);
            _mm256_storeu_si256(to.cast(), _mm512_extracti64x4_epi64::<1>(bytes));
        }
    }
    true
}

/// Codes below 8 bits of 32 tokens of `DIM` channels, 16 times `N`, and their scales.
///
/// # Safety
/// As for [`seal_values`].
#[inline(always)]
unsafe fn rotated<const BITS: u32, const DIM: usize, const N: usize>(
    job: &SealJob<'_>,
    from: From,
    first: usize,
) -> bool {
    let tokens = const { &lanes(BITS) };
    let mut y = MaybeUninit::<[[__m512; DIM]; 2]>::uninit();
    let y = y.as_mut_ptr().cast::<[__m512; DIM]>();
    // SAFETY: the caller's promise; what is read of `y` was written.
    unsafe {
        let zero = _mm512_setzero_ps();
        let (mut squares, mut widths) = ([zero; 2], [zero; 2]);
        let step = _mm512_set1_ps(const { quant::value_step(BITS) });
        for half in 0..2 {
            let y = &mut *y.add(half);
            rotate::<DIM, N>(&from, &tokens[half], y);
            squares[half] = sum_of_squares::<DIM>(y);
            // Neither infinite nor no number: those of a row that is not finite are.
            let limit = _mm512_set1_ps(f32::INFINITY);
            if _mm512_cmp_ps_mask::<_CMP_LT_OQ>(squares[half], limit) != 0xffff {
                return false;
            }
            let mean = _mm512_div_ps(squares[half], _mm512_set1_ps(DIM as f32));
            widths[half] = _mm512_mul_ps(_mm512_sqrt_ps(mean), step);
        }
        let y = [&*y, &*y.add(1)];
        let aligned = match codes::<BITS, DIM, false>(job, first, y, widths) {
            Some(sums) => sums,
            None => codes::<BITS, DIM, true>(job, first, y, widths).unwrap_or([zero; 2]),
        };
        let mut scales = [_mm256_setzero_si256(); 2];
        for half in 0..2 {
            let some = _mm512_cmp_ps_mask::<_CMP_NEQ_OQ>(widths[half], zero);
            let scale = _mm512_maskz_div_ps(some, squares[half], aligned[half]);
            scales[half] = _mm512_cvtps_ph::<0>(scale);
        }
        store_scales::<BITS>(job, first, scales)
    }
}

/// What codes stand for, for a scale of 1.
const fn points(bits: u32) -> [f32; 16] {
    let (middle, mut points, mut code) = ((1u32 << (bits - 1)) as f32, [0.0; 16], 0);
    while code < 1 << bits {
        points[code] = (code as f32 + 0.5 - middle) * quant::value_step(bits);
        code += 1;
    }
    points
}

/// Codes into the record, and the sums of values times what their codes stand for. Without `DIVIDE`
/// `None` where only a division can tell a code, or a width is 0; the record is unspecified then.
///
/// # Safety
/// As for [`seal_values`].
#[inline(always)]
unsafe fn codes<const BITS: u32, const DIM: usize, const DIVIDE: bool>(
    job: &SealJob<'_>,
    first: usize,
    y: [&[__m512; DIM]; 2],
    widths: [__m512; 2],
) -> Option<[__m512; 2]> {
    const FOUR: usize = 4;
    let layout = job.layout;
    let (n, middle) = ((1 << BITS) - 1, (1u32 << (BITS - 1)) as f32);
    let channel_bytes = layout.v_codes.len() / DIM;
    let plane_bytes = layout.v_plane.len() / DIM;
    // SAFETY: the caller's promise.
    unsafe {
        let (zero, ones) = (_mm512_setzero_ps(), _mm512_set1_ps(1.0));
        let some = _mm512_cmp_ps_mask::<_CMP_NEQ_OQ>(widths[0], zero)
            & _mm512_cmp_ps_mask::<_CMP_NEQ_OQ>(widths[1], zero);
        if !DIVIDE && some != 0xffff {
            return None;
        }
        let points = _mm512_loadu_ps(const { &points(BITS) }.as_ptr());
        let (most, middles) = (_mm512_set1_epi32(n), _mm512_set1_ps(middle));
        let by = [_mm512_div_ps(ones, widths[0]), _mm512_div_ps(ones, widths[1])];
        let mut near = ones;
        let mut sums = [[zero; MOST / EIGHT]; 2];
        let to = layout.v_codes.start + first / TOKENS * if BITS == 4 { 16 } else { 8 };
        let to = job.record.add(to);
        let plane = job.record.add(layout.v_plane.start + first / TOKENS * 4);
        for at in 0..DIM / EIGHT {
            let mut terms = [[zero; EIGHT]; 2];
            for four in 0..EIGHT / FOUR {
                let mut words = [_mm512_setzero_si512(); FOUR];
                for i in 0..FOUR {
                    let within = FOUR * four + i;
                    let channel = EIGHT * at + within;
                    for half in 0..2 {
                        let y = y[half][channel];
                        let code = if DIVIDE {
                            // Codes end long before 16 widths.
                            let x = _mm512_div_ps(y, widths[half]);
                            let x = _mm512_max_ps(x, _mm512_set1_ps(-16.0));
                            let x = _mm512_min_ps(x, _mm512_set1_ps(16.0));
                            let code = _mm512_add_ps(_mm512_roundscale_ps::<0x09>(x), middles);
                            let some = _mm512_cmp_ps_mask::<_CMP_NEQ_OQ>(widths[half], zero);
                            _mm512_maskz_cvtps_epi32(some, code)
                        } else {
                            let x = _mm512_fmadd_ps(y, by[half], middles);
                            // 0x0a: the smaller magnitude, without its sign.
                            near = _mm512_range_ps::<0x0a>(near, _mm512_reduce_ps::<0>(x));
                            const DOWN: i32 = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
                            _mm512_cvt_roundps_epi32::<DOWN>(x)
                        };
                        let code = _mm512_max_epi32(code, _mm512_setzero_si512());
                        let code = _mm512_min_epi32(code, most);
                        let point = _mm512_permutexvar_ps(code, points);
                        terms[half][within] = _mm512_mul_ps(y, point);
                        words[i] = if half == 0 {
                            code
                        } else {
                            _mm512_or_si512(words[i], _mm512_slli_epi32::<4>(code))
                        };
                    }
                }
                let channel = EIGHT * at + FOUR * four;
                let to = to.add(channel * channel_bytes);
                let plane = plane.add(channel * plane_bytes);
                store::<BITS>(words, to, channel_bytes, plane, plane_bytes);
            }
            sums[0][at] = sum_of(terms[0]);
            sums[1][at] = sum_of(terms[1]);
        }
        if !DIVIDE {
            // As far as codes go a quotient and this product are less than 2^-19 apart.
            let far = _mm512_set1_ps(1.0 / (1 << 19) as f32);
            if _mm512_cmp_ps_mask::<_CMP_GT_OQ>(near, far) != 0xffff {
                return None;
            }
        }
        Some([sum_of_eights::<DIM>(&sums[0]), sum_of_eights::<DIM>(&sums[1])])
    }
}

/// Writes the codes of four channels, two of four bits in the low byte of each lane.
///
/// # Safety
/// As for [`seal_values`].
#[inline(always)]
unsafe fn store<const BITS: u32>(
    words: [__m512i; 4],
    to: *mut u8,
    channel_bytes: usize,
    plane: *mut u8,
    plane_bytes: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let low = _mm512_packs_epi32(words[0], words[1]);
        let bytes = _mm512_packus_epi16(low, _mm512_packs_epi32(words[2], words[3]));
        // A channel in each quarter.
        let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        let bytes = _mm512_permutexvar_epi32(order, bytes);
        if BITS == 4 {
            let four = [
                _mm512_castsi512_si128(bytes),
                _mm512_extracti32x4_epi32::<1>(bytes),
                _mm512_extracti32x4_epi32::<2>(bytes),
                _mm512_extracti32x4_epi32::<3>(bytes),
            ];
            for i in 0..4 {
                _mm_storeu_si128(to.add(i * channel_bytes).cast(), four[i]);
            }
            return;
        }
        // Two tokens a byte; in four bits, then four tokens.
        let pairs = _mm512_and_si512(bytes, _mm512_set1_epi8(0x03));
        let second = _mm512_and_si512(bytes, _mm512_set1_epi8(0x30));
        let pairs = _mm512_or_si512(pairs, _mm512_srli_epi16::<2>(second));
        let packed = _mm512_maddubs_epi16(pairs, _mm512_set1_epi16(0x1001));
        let packed = _mm512_cvtepi16_epi8(packed);
        let (a, b) = (_mm256_castsi256_si128(packed), _mm256_extracti128_si256::<1>(packed));
        let four = [
            _mm_extract_epi64::<0>(a),
            _mm_extract_epi64::<1>(a),
            _mm_extract_epi64::<0>(b),
            _mm_extract_epi64::<1>(b),
        ];
        for i in 0..4 {
            to.add(i * channel_bytes).cast::<[u8; 8]>().write(four[i].to_le_bytes());
        }
        if BITS == 3 {
            // In the order of the plane: tokens 0 to 7, 16 to 23, 8 to 15, 24 to 31.
            let bytes = _mm512_shuffle_epi32::<0b11_01_10_00>(bytes);
            let next = _mm512_srli_epi16::<4>(bytes);
            let third = _mm512_set1_epi8(4);
            let low = _mm512_test_epi8_mask(_mm512_unpacklo_epi8(bytes, next), third);
            let high = _mm512_test_epi8_mask(_mm512_unpackhi_epi8(bytes, next), third);
            for i in 0..4 {
                let word = (low >> (16 * i) & 0xffff) as u32 | ((high >> (16 * i)) as u32) << 16;
                plane.add(i * plane_bytes).cast::<[u8; 4]>().write(word.to_le_bytes());
            }
        }
    }
}
