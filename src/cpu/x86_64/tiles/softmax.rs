//! The online softmax over one sealed tile for a few rows, and the rounding of their probabilities.

use core::arch::x86_64::*;

use super::super::avx512::F32x16;
use super::GROUP;
use super::queries::Query;
use super::rows::{Order, Weights, packed_unsigned};
use crate::cpu::math::{exp2, tanh};
use crate::cpu::sealed::{Dims, Scratch, SealedJob};
use core::f32::consts::LOG2_E;

/// The largest whole number that a probability is rounded to.
const WIDEST: f32 = 65535.0;

/// What the rounding of a row's probabilities leaves to be undone: its weighted values are
/// `values * grow + (sum + start) * unit + shift`.
#[derive(Clone, Copy, Default)]
pub(super) struct Probabilities {
    pub start: i32,
    pub unit: f32,
    pub shift: f32,
    pub grow: f32,
}

/// Turns the whole sums of rows from `first` on into probabilities times the values' scales, rounded
/// and laid out, and brings the states of the rows up to date.
///
/// # Safety
/// As for [`attend`](super::attend).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c")]
pub(super) unsafe fn soften(
    (job, dims, s): (&SealedJob<'_>, &Dims, &Scratch),
    tile: u32,
    first: usize,
    queries: &[Query],
    order: &Order,
    factors: &mut [Probabilities; GROUP],
    weights: &mut Weights<GROUP>,
) {
    let tokens = dims.tokens;
    // SAFETY: the caller's promise.
    unsafe {
        let mut top = [0.0f32; GROUP];
        for (r, query) in queries.iter().enumerate() {
            let scores = s.s.add(r * tokens);
            let start = _mm512_set1_epi32(query.start);
            let scale = if plain(job) { job.scale * LOG2_E } else { job.scale };
            let (unit, shift) =
                (_mm512_set1_ps(query.unit * scale), _mm512_set1_ps(query.shift * scale));
            let mut largest = _mm512_set1_ps(f32::NEG_INFINITY);
            for t in (0..tokens).step_by(16) {
                let sum = _mm512_add_epi32(_mm512_loadu_si512(scores.add(t).cast()), start);
                let x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), unit, shift);
                largest = _mm512_max_ps(largest, x);
                _mm512_storeu_ps(scores.add(t), x);
            }
            if !plain(job) {
                largest = rules(job, dims, s, tile, first + r, scores);
            }
            top[r] = _mm512_reduce_max_ps(largest);
        }
        let mut largest = [0.0f32; GROUP];
        for r in 0..queries.len() {
            let scores = s.s.add(r * tokens);
            let old = s.m.add(first + r).read();
            let new = old.max(top[r]);
            // A finite stand-in where nothing has been seen: -inf less it is still -inf.
            let finite = _mm512_set1_ps(new.max(f32::MIN));
            let (mut sum, mut most) = (_mm512_setzero_ps(), _mm512_setzero_ps());
            for t in (0..tokens).step_by(16) {
                let x = _mm512_sub_ps(_mm512_loadu_ps(scores.add(t)), finite);
                let p = exp2(F32x16(x)).0;
                sum = _mm512_add_ps(sum, p);
                let p = _mm512_mul_ps(p, _mm512_load_ps(s.v_scale.add(t)));
                most = _mm512_max_ps(most, p);
                _mm512_storeu_ps(scores.add(t), p);
            }
            let grow = _mm512_cvtss_f32(exp2(F32x16(_mm512_sub_ps(_mm512_set1_ps(old), finite))).0);
            let l = s.l.add(first + r);
            l.write(l.read() * grow + _mm512_reduce_add_ps(sum));
            s.m.add(first + r).write(new);
            factors[r].grow = grow;
            largest[r] = _mm512_reduce_max_ps(most);
        }
        let zero = _mm512_setzero_si512();
        for r in 0..queries.len() {
            let p = s.s.add(r * tokens);
            // Smaller ones mean nothing beside the denominator, which is at least 1.
            let usable = largest[r] > 1e-30;
            let factor = _mm512_set1_ps(if usable { WIDEST / largest[r] } else { 0.0 });
            let mut sum = zero;
            let mut bytes = [[zero; 4]; 2];
            for i in 0..tokens.div_ceil(64) {
                let mut x = [zero; 4];
                for k in 0..4.min(tokens / 16 - 4 * i) {
                    let p = _mm512_mul_ps(_mm512_loadu_ps(p.add(64 * i + 16 * k)), factor);
                    x[k] = _mm512_cvtps_epi32(_mm512_min_ps(p, _mm512_set1_ps(WIDEST)));
                    sum = _mm512_add_epi32(sum, x[k]);
                }
                [bytes[0][i], bytes[1][i]] = packed_unsigned(x);
            }
            order.lay_out(&bytes[0], &mut weights[r][0]);
            order.lay_out(&bytes[1], &mut weights[r][1]);
            let by = &mut factors[r];
            by.unit = if usable { largest[r] / WIDEST } else { 0.0 };
            if dims.v_bits < 8 {
                let sum = _mm512_reduce_add_epi32(sum);
                by.start = -(sum << (dims.v_bits - 1));
                by.shift = 0.5 * sum as f32 * by.unit;
            }
        }
    }
}

/// Whether scores are products alone.
fn plain(job: &SealedJob<'_>) -> bool {
    job.softcap.is_none() && job.alibi.is_none() && job.window == u32::MAX
}

/// Soft-cap, ALiBi and window of a row's scores, which become powers of two; their largest.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c")]
unsafe fn rules(
    job: &SealedJob<'_>,
    dims: &Dims,
    s: &Scratch,
    tile: u32,
    row: usize,
    scores: *mut f32,
) -> __m512 {
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
