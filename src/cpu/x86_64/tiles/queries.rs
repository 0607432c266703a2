//! Queries as whole numbers in the order in which codes come apart.

use core::arch::x86_64::*;

use super::quads::{self, GROUP};
use super::rows::{Order, Weights, bytes, packed};
use crate::cpu::sealed::{Dims, Scratch, WIDE};

/// What the rounding of queries leaves to be undone, in quads: a score is
/// `(sum + start) * unit + shift`.
#[derive(Clone, Copy)]
pub(super) struct Queries {
    pub start: __m512i,
    pub unit: __m512,
    pub shift: __m512,
}

/// Rounds the queries of some rows, from `first` on.
pub(super) type Round =
    unsafe fn(&Dims, &Scratch, first: usize, &Order, &mut Weights<GROUP>) -> Queries;

/// The [`Round`] for keys of `k_dim` channels: 64, 128 or 256.
pub(super) fn rounding(k_bits: u32, k_dim: usize, many: bool) -> Round {
    macro_rules! of {
        ($vectors:literal, $wide:literal) => {
            if many { round::<GROUP, $vectors, $wide> } else { round::<1, $vectors, $wide> }
        };
        ($vectors:literal) => {
            if k_bits == 8 { of!($vectors, true) } else { of!($vectors, false) }
        };
    }
    match k_dim {
        64 => of!(4),
        128 => of!(8),
        _ => of!(16),
    }
}

/// Scales the channels of `R` queries of `N` vectors to whole numbers, of two bytes if `WIDE`, and
/// lays them out.
///
/// # Safety
/// As for [`attend`](super::attend).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c")]
unsafe fn round<const R: usize, const N: usize, const WIDE_ROWS: bool>(
    dims: &Dims,
    s: &Scratch,
    first: usize,
    order: &Order,
    weights: &mut Weights<GROUP>,
) -> Queries {
    let limit = _mm512_set1_ps(if WIDE_ROWS { WIDE } else { 127.0 });
    let zero = _mm512_setzero_si512();
    // SAFETY: the caller's promise.
    unsafe {
        let row = |r: usize| s.q.add((first + r) * 16 * N);
        let step = |c: usize| _mm512_load_ps(s.step.add(16 * c));
        let mut tops = [_mm512_setzero_ps(); R];
        let mut middles = [_mm512_setzero_ps(); R];
        for c in 0..N {
            let (step, mid) = (step(c), _mm512_load_ps(s.mid.add(16 * c)));
            for r in 0..R {
                let q = _mm512_loadu_ps(row(r).add(16 * c));
                // The larger magnitude of both.
                tops[r] = _mm512_range_ps::<0b1011>(tops[r], _mm512_mul_ps(q, step));
                middles[r] = _mm512_fmadd_ps(q, mid, middles[r]);
            }
        }
        let (top, middle) = (quads::largest(tops), quads::sum(middles));
        // Smaller ones mean nothing beside any other term; what is past f32 shows as such.
        let some = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(top, _mm512_set1_ps(1e-30));
        let none = _mm512_cmp_ps_mask::<_CMP_LE_OQ>(top, _mm512_set1_ps(1e-30));
        let usable = some & _mm512_cmp_ps_mask::<_CMP_LT_OQ>(top, _mm512_set1_ps(1e30));
        let factor = _mm512_maskz_div_ps(usable, limit, top);
        let odd = _mm512_mask_mov_ps(_mm512_set1_ps(f32::NAN), none, _mm512_setzero_ps());
        let unit = _mm512_mask_div_ps(odd, usable, top, limit);
        let mut sums = [zero; R];
        let ones = _mm512_set1_epi8(1);
        for r in 0..R {
            let factor = quads::of_row(factor, r);
            let (mut high, mut low, mut low_sum) = ([zero; 4], [zero; 4], zero);
            for i in 0..N / 4 {
                let mut x = [zero; 4];
                for k in 0..4 {
                    let q = _mm512_loadu_ps(row(r).add(64 * i + 16 * k));
                    let q = _mm512_mul_ps(q, step(4 * i + k));
                    x[k] = _mm512_cvtps_epi32(_mm512_mul_ps(q, factor));
                }
                if WIDE_ROWS {
                    [high[i], low[i]] = packed(x);
                    low_sum = _mm512_dpbusd_epi32(low_sum, ones, low[i]);
                } else {
                    high[i] = bytes(x);
                }
                sums[r] = _mm512_dpbusd_epi32(sums[r], ones, high[i]);
            }
            order.lay_out(&high, &mut weights[r][0]);
            if WIDE_ROWS {
                order.lay_out(&low, &mut weights[r][1]);
                sums[r] = _mm512_add_epi32(_mm512_slli_epi32::<8>(sums[r]), low_sum);
            }
        }
        let sum = quads::whole_sum(sums);
        let middles = _mm_cvtsi32_si128(dims.k_bits as i32 - 1);
        let shift = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(0.5));
        Queries {
            start: _mm512_sub_epi32(zero, _mm512_sll_epi32(sum, middles)),
            unit,
            shift: _mm512_fmadd_ps(shift, unit, middle),
        }
    }
}
