//! The online softmax over one sealed tile for a few rows, and the rounding of their probabilities.
//!
//! In front of codes of 8 bits probabilities have two bytes. In front of fewer they have one: each is
//! rounded up or down by where it lies against a threshold of its token's own, and the thresholds are
//! spread evenly. So of many that are small beside one that is large, as many as make up their sum
//! become 1. What that adds to a weighted value is less than what the rounding of values has done to
//! the largest one's: of a tile of 64 tokens, a fiftieth of the energy of that of 4 bits where all
//! the others are half a unit, which is the worst.

use core::arch::x86_64::*;

use super::super::avx512::F32x16;
use super::quads::{self, GROUP, of_row, whole_of_row};
use super::queries::Queries;
use super::rows::{Order, Weights, bytes_unsigned, packed_unsigned};
use crate::cpu::math::{exp2, tanh};
use crate::cpu::sealed::{Dims, Scratch, SealedJob, value_unit};
use core::f32::consts::LOG2_E;

/// The largest whole number that a probability is rounded to, in two bytes and in one.
const WIDEST: f32 = 65535.0;
const BYTE: f32 = 255.0;

/// What is added to the probabilities of a tile of `tokens` before they are rounded to the nearest
/// whole number: evenly spread within a half to either side, those of neighbours far apart.
pub(super) const fn thresholds(tokens: usize) -> [f32; 128] {
    let (mut all, mut t) = ([0.0; 128], 0);
    while t < tokens {
        let place = (t as u32).reverse_bits() >> (32 - tokens.trailing_zeros());
        all[t] = (place as f32 + 0.5) / tokens as f32 - 0.5;
        t += 1;
    }
    all
}

/// What the rounding of the rows' probabilities leaves to be undone: a row's weighted values are
/// `values * grow + (sum + start) * unit + shift`.
#[derive(Clone, Copy, Default)]
pub(super) struct Probabilities {
    pub start: [i32; GROUP],
    pub unit: [f32; GROUP],
    pub shift: [f32; GROUP],
    pub grow: [f32; GROUP],
}

/// A tile's place in the job at hand.
pub(super) struct Place<'a, 'b> {
    pub job: &'a SealedJob<'b>,
    pub dims: &'a Dims,
    pub s: &'a Scratch,
    pub tile: u32,
    /// The first of the rows.
    pub first: usize,
}

/// Turns the whole sums of some rows into probabilities times the values' scales, rounded and laid
/// out, and brings the states of the rows up to date.
pub(super) type Soften =
    unsafe fn(&Place<'_, '_>, &Queries, &Order, &mut Weights<GROUP>) -> Probabilities;

/// The [`Soften`] of a job.
pub(super) fn softening(dims: &Dims, many: bool) -> Soften {
    macro_rules! of {
        ($vectors:literal, $wide:literal) => {
            if many { soften::<GROUP, $vectors, $wide> } else { soften::<1, $vectors, $wide> }
        };
        ($vectors:literal) => {
            if dims.v_bits == 8 { of!($vectors, true) } else { of!($vectors, false) }
        };
    }
    match dims.tokens {
        32 => of!(2),
        64 => of!(4),
        _ => of!(8),
    }
}

/// [`Soften`] for `R` rows and tiles of `N` vectors, with probabilities of two bytes if `WIDE`.
///
/// # Safety
/// As for [`attend`](super::attend).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c")]
unsafe fn soften<const R: usize, const N: usize, const WIDE: bool>(
    place: &Place<'_, '_>,
    queries: &Queries,
    order: &Order,
    weights: &mut Weights<GROUP>,
) -> Probabilities {
    let Place { job, dims, s, first, .. } = *place;
    let zero = _mm512_setzero_si512();
    // SAFETY: the caller's promise.
    unsafe {
        let plain = plain(job);
        let scale = _mm512_set1_ps(if plain { job.scale * LOG2_E } else { job.scale });
        let unit = _mm512_mul_ps(queries.unit, scale);
        let shift = _mm512_mul_ps(queries.shift, scale);
        let sums = |r: usize, i: usize| s.s.add((r * N + i) * 16);
        let score = |r: usize, i: usize, shift: __m512| {
            let sum = _mm512_loadu_si512(sums(r, i).cast());
            let sum = _mm512_add_epi32(sum, whole_of_row(queries.start, r));
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), of_row(unit, r), of_row(shift, r))
        };
        let top = if plain {
            // A larger sum is a larger score.
            let mut tops = [zero; R];
            for r in 0..R {
                tops[r] = _mm512_loadu_si512(sums(r, 0).cast());
                for i in 1..N {
                    tops[r] = _mm512_max_epi32(tops[r], _mm512_loadu_si512(sums(r, i).cast()));
                }
            }
            let top = _mm512_add_epi32(quads::whole_largest(tops), queries.start);
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(top), unit, shift)
        } else {
            let mut tops = [_mm512_setzero_ps(); R];
            for r in 0..R {
                for i in 0..N {
                    _mm512_storeu_ps(sums(r, i), score(r, i, shift));
                }
                tops[r] = rules(place, first + r, sums(r, 0));
            }
            quads::largest(tops)
        };
        let old = quads::load::<R>(s.m.add(first));
        // Where a score is no number, the older one.
        let new = _mm512_max_ps(top, old);
        // A finite stand-in where nothing has been seen: -inf less it is still -inf.
        let finite = _mm512_max_ps(new, _mm512_set1_ps(f32::MIN));
        let below = _mm512_sub_ps(shift, finite);
        let mut p = [[_mm512_setzero_ps(); N]; R];
        let (mut l, mut most) = ([_mm512_setzero_ps(); R], [_mm512_setzero_ps(); R]);
        for r in 0..R {
            for i in 0..N {
                let x = if plain {
                    score(r, i, below)
                } else {
                    _mm512_sub_ps(_mm512_loadu_ps(sums(r, i)), of_row(finite, r))
                };
                let x = exp2(F32x16(x)).0;
                l[r] = _mm512_add_ps(l[r], x);
                p[r][i] = _mm512_mul_ps(x, _mm512_load_ps(s.v_scale.add(16 * i)));
                most[r] = _mm512_max_ps(most[r], p[r][i]);
            }
        }
        let grow = exp2(F32x16(_mm512_sub_ps(old, finite))).0;
        let l = _mm512_fmadd_ps(quads::load::<R>(s.l.add(first)), grow, quads::sum(l));
        quads::store::<R>(s.l.add(first), l);
        quads::store::<R>(s.m.add(first), new);

        let largest = quads::largest(most);
        let limit = _mm512_set1_ps(if WIDE { WIDEST } else { BYTE });
        // Smaller ones mean nothing beside the denominator, which is at least 1.
        let usable = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(largest, _mm512_set1_ps(1e-30));
        let factor = _mm512_maskz_div_ps(usable, limit, largest);
        let unit = _mm512_maskz_div_ps(usable, largest, limit);
        let mut sums = [zero; R];
        for r in 0..R {
            let factor = of_row(factor, r);
            let (mut high, mut low) = ([zero; 4], [zero; 4]);
            for i in 0..N.div_ceil(4) {
                let mut x = [zero; 4];
                for k in 0..4.min(N - 4 * i) {
                    let p = p[r][4 * i + k];
                    let p = if WIDE {
                        _mm512_mul_ps(p, factor)
                    } else {
                        let spread = const { &thresholds(16 * N) };
                        let at = spread.as_ptr().add(16 * (4 * i + k));
                        _mm512_fmadd_ps(p, factor, _mm512_loadu_ps(at))
                    };
                    x[k] = _mm512_cvtps_epi32(p);
                }
                if WIDE {
                    [high[i], low[i]] = packed_unsigned(x);
                } else {
                    high[i] = bytes_unsigned(x);
                    sums[r] = _mm512_dpbusd_epi32(sums[r], high[i], _mm512_set1_epi8(1));
                }
            }
            order.lay_out(&high, &mut weights[r][0]);
            if WIDE {
                order.lay_out(&low, &mut weights[r][1]);
            }
        }
        let mut factors = Probabilities::default();
        let start = factors.start.as_mut_ptr().cast();
        // What a whole number stands for in front of codes, whose step it meets here.
        let unit = _mm512_mul_ps(unit, _mm512_set1_ps(value_unit(dims.v_bits)));
        quads::store::<GROUP>(factors.unit.as_mut_ptr(), unit);
        quads::store::<GROUP>(factors.grow.as_mut_ptr(), grow);
        if !WIDE {
            let sum = quads::whole_sum(sums);
            let half = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(0.5));
            let middles = _mm_cvtsi32_si128(dims.v_bits as i32 - 1);
            let sum = _mm512_sub_epi32(zero, _mm512_sll_epi32(sum, middles));
            quads::store::<GROUP>(factors.shift.as_mut_ptr(), _mm512_mul_ps(half, unit));
            quads::store::<GROUP>(start, _mm512_castsi512_ps(sum));
        }
        factors
    }
}

/// Whether scores are products alone, and larger with them.
fn plain(job: &SealedJob<'_>) -> bool {
    job.softcap.is_none() && job.alibi.is_none() && job.window == u32::MAX && job.scale >= 0.0
}

/// Soft-cap, ALiBi and window of a row's scores, which become powers of two; their largest.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c")]
unsafe fn rules(place: &Place<'_, '_>, row: usize, scores: *mut f32) -> __m512 {
    let Place { job, dims, s, tile, .. } = *place;
    let tokens = dims.tokens;
    let query = row.min(job.heads * job.tokens - 1);
    let position = i64::from(job.q_pos) + (query / job.heads) as i64;
    let start = i64::from(tile) * tokens as i64;
    // SAFETY: the caller's promise.
    unsafe {
        let mut largest = _mm512_set1_ps(f32::NEG_INFINITY);
        let hidden =
            if job.window == u32::MAX { 0 } else { position + 1 - i64::from(job.window) - start };
        for t in (0..tokens).step_by(16) {
            let mut x = _mm512_loadu_ps(scores.add(t));
            if let Some(cap) = job.softcap {
                let ratio = _mm512_mul_ps(x, _mm512_set1_ps(1.0 / cap));
                x = _mm512_mul_ps(tanh(F32x16(ratio)).0, _mm512_set1_ps(cap));
            }
            let count = _mm512_loadu_ps(s.count.add(t));
            if let Some(slopes) = job.alibi {
                let distance = _mm512_add_ps(count, _mm512_set1_ps((start - position) as f32));
                x = _mm512_fmadd_ps(_mm512_set1_ps(slopes[query % job.heads]), distance, x);
            }
            x = _mm512_mul_ps(x, _mm512_set1_ps(LOG2_E));
            let hidden = _mm512_set1_ps(hidden.clamp(0, tokens as i64) as f32);
            let hidden = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(count, hidden);
            x = _mm512_mask_mov_ps(x, hidden, _mm512_set1_ps(f32::NEG_INFINITY));
            largest = _mm512_max_ps(largest, x);
            _mm512_storeu_ps(scores.add(t), x);
        }
        largest
    }
}
