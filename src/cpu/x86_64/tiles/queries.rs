//! Queries as whole numbers in the order in which codes come apart.

use core::arch::x86_64::*;

use super::GROUP;
use super::rows::{Order, Weights, packed};
use crate::cpu::sealed::{Dims, Scratch, WIDE};

/// What the rounding of a query leaves to be undone: a score is `(sum + start) * unit + shift`.
#[derive(Clone, Copy, Default)]
pub(super) struct Query {
    pub start: i32,
    pub unit: f32,
    pub shift: f32,
}

/// Scales the channels of `count` queries from `first` on to whole numbers and lays them out.
///
/// # Safety
/// As for [`attend`](super::attend).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c")]
pub(super) unsafe fn round_queries(
    dims: &Dims,
    s: &Scratch,
    first: usize,
    count: usize,
    order: &Order,
    queries: &mut [Query; GROUP],
    weights: &mut Weights<GROUP>,
) {
    let wide = dims.k_bits == 8;
    let limit = if wide { WIDE } else { 127.0 };
    let zero = _mm512_setzero_si512();
    // SAFETY: the caller's promise.
    unsafe {
        let mut largest = [0.0f32; GROUP];
        let mut middle = [0.0f32; GROUP];
        for r in 0..count {
            let q = s.q.add((first + r) * dims.k_dim);
            let (mut top, mut sum) = (_mm512_setzero_ps(), _mm512_setzero_ps());
            for c in (0..dims.k_dim).step_by(16) {
                let q = _mm512_loadu_ps(q.add(c));
                // The larger magnitude of both.
                top =
                    _mm512_range_ps::<0b1011>(top, _mm512_mul_ps(q, _mm512_load_ps(s.step.add(c))));
                sum = _mm512_fmadd_ps(q, _mm512_load_ps(s.mid.add(c)), sum);
            }
            largest[r] = _mm512_reduce_max_ps(top);
            middle[r] = _mm512_reduce_add_ps(sum);
        }
        for r in 0..count {
            let q = s.q.add((first + r) * dims.k_dim);
            // Smaller ones mean nothing beside any other term.
            let usable = largest[r] > 1e-30 && largest[r] < 1e30;
            let factor = _mm512_set1_ps(if usable { limit / largest[r] } else { 0.0 });
            let mut sum = zero;
            let mut bytes = [[zero; 4]; 2];
            for i in 0..dims.k_dim / 64 {
                let mut x = [zero; 4];
                for k in 0..4 {
                    let c = 64 * i + 16 * k;
                    let q = _mm512_mul_ps(_mm512_loadu_ps(q.add(c)), _mm512_load_ps(s.step.add(c)));
                    x[k] = _mm512_cvtps_epi32(_mm512_mul_ps(q, factor));
                    sum = _mm512_add_epi32(sum, x[k]);
                }
                [bytes[0][i], bytes[1][i]] = packed(x);
            }
            if wide {
                order.lay_out(&bytes[0], &mut weights[r][0]);
                order.lay_out(&bytes[1], &mut weights[r][1]);
            } else {
                order.lay_out(&bytes[1], &mut weights[r][0]);
            }
            let sum = _mm512_reduce_add_epi32(sum);
            // What is past f32 shows as such.
            let unit = if usable {
                largest[r] / limit
            } else if largest[r] <= 1e-30 {
                0.0
            } else {
                f32::NAN
            };
            queries[r] = Query {
                start: -(sum << (dims.k_bits - 1)),
                unit,
                shift: 0.5 * sum as f32 * unit + middle[r],
            };
        }
    }
}
