//! Attention of few query rows over INT8_T and INT4_T by products of integers (AVX512_VNNI).
//!
//! Codes are bytes without sign: those of INT8_T plus 128, nibbles as they are. A query is rounded to
//! 16 bits, its largest channel 32639, and multiplied as a high and a low byte (`vpdpbusd`); weights
//! are rounded to 15 bits, the largest of a tile and row 32767, and multiplied in pairs of tokens
//! (`vpdpwssd`). All sums within a tile are exact. So a score is off by at most
//! `scale * max |q| / 65278 * sum |k|`, and an output by at most `1 / 65534` of the largest weight a
//! key times the largest value: the scales of tokens are in the weights.
//!
//! Scales never meet codes: those of keys are factors of scores, those of values of weights.

use core::arch::x86_64::*;

mod rows;
mod values;

use super::avx512::{self, F32x16};
use crate::cpu::decode::{
    Hints, JOB_ROWS, OneByOne, PIECE, Scratch, Side, TILE, Tile, Walk, adjust, by_rows,
    padded_rows, soften,
};
use crate::cpu::job::Job;
use crate::cpu::kernels::Kernel;
use crate::cpu::quant::{expect_scales, query};
use crate::dtype::KvFormat;
use rows::{Ends, Rounded, Scales, of_keys, plane, planes, prepare};
use values::{Weights, put_row, values, weigh};

/// Attention of all rows of a job over INT8_T or INT4_T.
///
/// # Safety
/// As for [`Kernel`], with AVX512_VNNI.
pub(super) unsafe fn decode(job: &Job<'_>) {
    let int4 = job.coding.format == KvFormat::Int4T;
    // SAFETY: the caller's promise.
    unsafe {
        // Latents have two parts with scales of their own; short rows leave most of a register empty.
        if job.v_in_k || job.k_dim < 64 || job.v_dim < 64 {
            return (avx512::kernels(job.coding.format).decode)(job);
        }
        let kernels = match (int4, planes::<false>(job.k_dim), job.k_dim <= 128) {
            (false, 1, _) => by_planes::<false, 1>(),
            (false, 2, _) => by_planes::<false, 2>(),
            (false, 3, _) => by_planes::<false, 3>(),
            (false, _, _) => by_planes::<false, 4>(),
            (true, _, true) => by_planes::<true, 2>(),
            (true, _, false) => by_planes::<true, 4>(),
        };
        by_rows(job, kernels);
    }
}

/// The kernels of keys of one width, for [`by_rows`].
fn by_planes<const INT4: bool, const PLANES: usize>() -> [Kernel; 3] {
    [stream::<INT4, PLANES, 1>, stream::<INT4, PLANES, 2>, stream::<INT4, PLANES, 4>]
}

/// Four rows' factors, in each quarter of a register.
#[inline(always)]
unsafe fn quarters(four: [f32; 4]) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe { _mm512_broadcast_f32x4(_mm_loadu_ps(four.as_ptr())) }
}

/// The kernel for one width of keys and `R` rows at a time.
///
/// # Safety
/// As for [`decode`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,f16c")]
unsafe fn stream<const INT4: bool, const PLANES: usize, const R: usize>(job: &Job<'_>) {
    // SAFETY: the caller's promise; scratch has `scratch_bytes`, cut up here.
    unsafe {
        let padded = padded_rows(job.rows());
        let mut scratch = Scratch::new::<F32x16>(job, padded, 4);
        let mut queries = [Rounded::default(); JOB_ROWS];
        for head in 0..job.kv_heads {
            for r in 0..padded {
                let row = query_row(&scratch, job, head, r);
                let at = head * padded + r;
                let to = scratch.q.add(at * scratch.q_bytes);
                queries[at] = prepare::<INT4, PLANES>(row, job.k_dim, to);
            }
        }
        scratch.v_pad = 64 * planes::<INT4>(job.v_dim);
        core::ptr::write_bytes(scratch.o, 0, job.kv_heads * padded * scratch.v_pad);
        let mut shifts = [0.0f32; JOB_ROWS];
        let format = job.coding.format;
        let bytes = (
            format.row_bytes(job.k_dim as u32) as usize,
            format.row_bytes(job.v_dim as u32) as usize,
        );
        let mut walk = Walk::new(job, scratch.zeros.cast_const().cast::<u8>(), bytes, true);
        let mut places = Tile { long: true, ..Tile::empty(walk.now.zeros) };
        let mut scales = Scales { s: [0.0; TILE], m: [0.0; TILE] };
        let mut weights =
            Weights { pairs: [0; TILE / 2 * 4], scale: [0.0; 4], sum: [0; 4], shift: [0.0; 4] };
        let mut at = job.kv_start;
        while at < job.kv_end {
            let after = walk.look_ahead(at);
            places.fill(&job.blocks.scales(), at, job.kv_end);
            expect_scales(job, after);
            for head in 0..job.kv_heads {
                let offset = head as isize * job.k_scale_head_bytes;
                scales.read::<INT4>(&places, &places.k, offset, job.blocks.block_tokens);
                scores::<INT4, PLANES, R>(&walk, &scratch, &scales, &queries, head, padded);
            }
            weights_of_scores(job, &scratch, &walk.now, at, padded);
            for head in 0..job.kv_heads {
                let offset = head as isize * job.v_scale_head_bytes;
                scales.read::<INT4>(&places, &places.v, offset, job.blocks.block_tokens);
                for r in (head * padded..(head + 1) * padded).step_by(R) {
                    weigh::<INT4, R>(&walk.now, &scratch, &scales, r, &mut weights);
                    for i in 0..R {
                        let grow = scratch.grow.add(r + i).read();
                        shifts[r + i] = shifts[r + i] * grow + weights.shift[i];
                    }
                    values::<INT4, R>(&walk, &scratch, &weights, head, r, r == head * padded);
                }
            }
            at = after;
            core::mem::swap(&mut walk.now, &mut walk.next);
        }
        let rows = job.rows();
        for head in 0..job.kv_heads {
            for r in 0..rows {
                let (from, to) = (head * padded + r, head * rows + r);
                job.states.m.add(to).write(scratch.m.add(from).read());
                job.states.l.add(to).write(scratch.l.add(from).read());
                let o = scratch.o.add(from * scratch.v_pad);
                put_row::<INT4>(o, shifts[from], job.v_dim, job.states.o.add(to * job.v_dim));
            }
        }
    }
}

/// The online softmax, once for every width of keys.
///
/// # Safety
/// As for [`adjust`] and [`soften`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn weights_of_scores(job: &Job<'_>, scratch: &Scratch, now: &Tile, at: u32, padded: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        adjust::<F32x16>(job, scratch, now, at, padded);
        soften::<F32x16, OneByOne<f32>>(scratch, now.keys);
    }
}

/// Query rows of a job, once for every width of keys.
///
/// # Safety
/// As for [`query`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn query_row(scratch: &Scratch, job: &Job<'_>, head: usize, r: usize) -> *mut f32 {
    // SAFETY: the caller's promise.
    unsafe { query::<F32x16>(scratch, job, head, r) }
}

/// Scores of a head's rows with the keys of the tile, before scale and soft-cap.
#[inline(always)]
unsafe fn scores<const INT4: bool, const PLANES: usize, const R: usize>(
    walk: &Walk<'_, '_>,
    scratch: &Scratch,
    scales: &Scales,
    queries: &[Rounded],
    head: usize,
    padded: usize,
) {
    let (job, now) = (walk.job, &walk.now);
    let offset = head as isize * job.k_head_bytes;
    let ends = Ends::new(walk.k_bytes);
    for piece in 0..Walk::pieces(now) {
        let mut hints = Hints::new(walk, Side::Keys, head, piece, usize::MAX, true);
        let from = piece * PIECE;
        for t in (from..now.keys.min(from + PIECE)).step_by(4) {
            hints.advance(4, 4 * walk.k_bytes / 64);
            // SAFETY: the caller's promise; keys past the last are zeros.
            unsafe {
                let mut codes = [[_mm512_setzero_si512(); PLANES]; 4];
                for j in 0..4 {
                    let row = now.row(now.k[t + j], offset);
                    for p in 0..PLANES {
                        codes[j][p] = plane::<INT4>(row, ends, p);
                    }
                }
                let s = of_keys(scales.s.as_ptr().add(t));
                let m = if INT4 { of_keys(scales.m.as_ptr().add(t)) } else { s };
                for r in (head * padded..(head + 1) * padded).step_by(R) {
                    let mut sums = [[_mm512_setzero_si512(); R]; 4];
                    let q = scratch.q.add(r * scratch.q_bytes);
                    for half in 0..2 {
                        for p in 0..PLANES {
                            for i in 0..R {
                                let q = q.add(i * scratch.q_bytes + 128 * p + 64 * half);
                                let q = _mm512_loadu_si512(q.cast());
                                for j in 0..4 {
                                    sums[j][i] = _mm512_dpbusd_epi32(sums[j][i], codes[j][p], q);
                                }
                            }
                        }
                        if half == 0 {
                            for j in 0..4 {
                                for i in 0..R {
                                    sums[j][i] = _mm512_slli_epi32::<8>(sums[j][i]);
                                }
                            }
                        }
                    }
                    let (mut unit, mut sum, mut bias) = ([0.0; 4], [0.0; 4], [0; 4]);
                    for i in 0..R {
                        unit[i] = queries[r + i].scale;
                        sum[i] = unit[i] * queries[r + i].sum as f32;
                        bias[i] = if INT4 { 0 } else { queries[r + i].sum << 7 };
                    }
                    let bias = _mm512_broadcast_i32x4(_mm_loadu_si128(bias.as_ptr().cast()));
                    let sums = _mm512_sub_epi32(reduce::<R>(&sums), bias);
                    let dots = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), quarters(unit));
                    let dots = if INT4 {
                        _mm512_fmadd_ps(dots, s, _mm512_mul_ps(m, quarters(sum)))
                    } else {
                        _mm512_mul_ps(dots, s)
                    };
                    let to = scratch.s.add(t * scratch.lanes + r);
                    if R == 4 {
                        let quarter = [
                            _mm512_castps512_ps128(dots),
                            _mm512_extractf32x4_ps::<1>(dots),
                            _mm512_extractf32x4_ps::<2>(dots),
                            _mm512_extractf32x4_ps::<3>(dots),
                        ];
                        for j in 0..4 {
                            _mm_storeu_ps(to.add(j * scratch.lanes), quarter[j]);
                        }
                    } else {
                        let mut all = [0.0f32; 16];
                        _mm512_storeu_ps(all.as_mut_ptr(), dots);
                        for j in 0..4 {
                            for i in 0..R {
                                to.add(j * scratch.lanes + i).write(all[4 * j + i]);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The lane sums `[key][row]`; rows past the last are unspecified.
#[inline(always)]
unsafe fn reduce<const R: usize>(sums: &[[__m512i; R]; 4]) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let mut quads = [_mm512_setzero_si512(); 4];
        for (quad, row) in quads.iter_mut().zip(sums) {
            let [a, b, c, d] = [row[0], row[1 % R], row[2 % R], row[3 % R]];
            let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
            *quad = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
        }
        let [x, y, z, w] = quads;
        let low = _mm512_shuffle_i32x4::<0x44>(x, y);
        let a = _mm512_add_epi32(low, _mm512_shuffle_i32x4::<0xee>(x, y));
        let low = _mm512_shuffle_i32x4::<0x44>(z, w);
        let b = _mm512_add_epi32(low, _mm512_shuffle_i32x4::<0xee>(z, w));
        let even = _mm512_shuffle_i32x4::<0x88>(a, b);
        _mm512_add_epi32(even, _mm512_shuffle_i32x4::<0xdd>(a, b))
    }
}
