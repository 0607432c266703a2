//! Weights as integers and the sums of weighted values. Functions of their own, not one with the
//! kernels: they are the same for every width of keys.

use core::arch::x86_64::*;
use core::mem::MaybeUninit;

use super::rows::{Ends, HeadRows, Scales, codes_of, load_codes, loads, of_keys, planes};
use crate::cpu::decode::{Hints, PIECE, Pace, Scratch, Side, Silent, Straight, TILE, Tile, Walk};

/// The largest weight.
const P_TOP: f32 = 32767.0;

/// What the values of one head and group of rows need beside the codes.
pub(super) struct Weights {
    /// `[pair of tokens][row]` weights, the even token's in the low half.
    pub pairs: [i32; TILE / 2 * 4],
    /// What a unit stands for.
    pub scale: [f32; 4],
    /// Sum of all weights.
    pub sum: [i32; 4],
    /// Probabilities times the minima of values.
    pub shift: [f32; 4],
}

/// Rounds the weights of the rows from `r` on: probabilities times the scales of values.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn weigh<const INT4: bool, const R: usize>(
    now: &Tile,
    scratch: &Scratch,
    scales: &Scales,
    r: usize,
    weights: &mut Weights,
) {
    // SAFETY: the caller's promise; probabilities of keys past the last are not looked at.
    unsafe {
        let mut products = [_mm512_setzero_ps(); TILE / 4];
        let (mut top, mut shift) = (_mm512_setzero_ps(), _mm512_setzero_ps());
        for t in (0..now.keys).step_by(4) {
            let mut four = [_mm_setzero_ps(); 4];
            for j in 0..4.min(now.keys - t) {
                let p = scratch.s.add((t + j) * scratch.lanes + r);
                four[j] = match R {
                    4 => _mm_loadu_ps(p),
                    2 => _mm_castpd_ps(_mm_load_sd(p.cast())),
                    _ => _mm_load_ss(p),
                };
            }
            let p = _mm512_castps128_ps512(four[0]);
            let p = _mm512_insertf32x4::<1>(p, four[1]);
            let p = _mm512_insertf32x4::<3>(_mm512_insertf32x4::<2>(p, four[2]), four[3]);
            let product = _mm512_mul_ps(p, of_keys(scales.s.as_ptr().add(t)));
            if INT4 {
                shift = _mm512_fmadd_ps(p, of_keys(scales.m.as_ptr().add(t)), shift);
            }
            top = _mm512_max_ps(top, product);
            products[t / 4] = product;
        }
        // A row's largest in all quarters.
        top = _mm512_max_ps(top, _mm512_shuffle_f32x4::<0x4e>(top, top));
        top = _mm512_max_ps(top, _mm512_shuffle_f32x4::<0xb1>(top, top));
        let some = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(top, _mm512_set1_ps(1e-30));
        let inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(P_TOP), top);
        let unit = _mm512_maskz_mul_ps(some, top, _mm512_set1_ps(1.0 / P_TOP));
        _mm_storeu_ps(weights.scale.as_mut_ptr(), _mm512_castps512_ps128(unit));
        let mut sum = _mm512_setzero_si512();
        for t in (0..now.keys).step_by(8) {
            let a = _mm512_cvtps_epi32(_mm512_mul_ps(products[t / 4], inverse));
            let b = _mm512_cvtps_epi32(_mm512_mul_ps(products[t / 4 + 1], inverse));
            let even = _mm512_shuffle_i32x4::<0x88>(a, b);
            let odd = _mm512_shuffle_i32x4::<0xdd>(a, b);
            sum = _mm512_add_epi32(sum, _mm512_add_epi32(even, odd));
            let pairs = _mm512_or_si512(even, _mm512_slli_epi32::<16>(odd));
            _mm512_storeu_si512(weights.pairs.as_mut_ptr().add(2 * t).cast(), pairs);
        }
        let sum = _mm512_add_epi32(sum, _mm512_shuffle_i32x4::<0x4e>(sum, sum));
        let sum = _mm512_add_epi32(sum, _mm512_shuffle_i32x4::<0xb1>(sum, sum));
        _mm_storeu_si128(weights.sum.as_mut_ptr().cast(), _mm512_castsi512_si128(sum));
        if INT4 {
            let shift = _mm512_add_ps(shift, _mm512_shuffle_f32x4::<0x4e>(shift, shift));
            let shift = _mm512_add_ps(shift, _mm512_shuffle_f32x4::<0xb1>(shift, shift));
            _mm_storeu_ps(weights.shift.as_mut_ptr(), _mm512_castps512_ps128(shift));
        }
    }
}

/// Fades `o` of the rows from `r` on and adds the weighted values of the tile, each plane in the
/// order in which its bytes become words.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn values<const INT4: bool, const R: usize>(
    walk: &Walk<'_, '_>,
    scratch: &Scratch,
    weights: &Weights,
    head: usize,
    r: usize,
    hinted: bool,
    at: &mut HeadRows,
) {
    let (job, now) = (walk.job, &walk.now);
    at.fill(now, &now.v, head as isize * job.v_head_bytes);
    let planes = planes::<INT4>(job.v_dim);
    let whole = walk.v_bytes == 64 * loads::<INT4>(planes);
    let straight = hinted && whole && walk.straight_pieces(Side::Values, head, &mut at.straight);
    for plane in 0..planes {
        let values = Plane {
            rows: &at.rows[..now.keys.next_multiple_of(4)],
            ends: at.ends.1,
            plane,
            weights: &weights.pairs,
        };
        // SAFETY: the caller's promise; a value past the last is zeros.
        unsafe {
            let mut sums = [[_mm512_setzero_si512(); 4]; R];
            if straight {
                // Every plane goes on where the one before has left off.
                add_whole::<INT4, R>(&mut sums, &values, &mut at.straight);
            } else if hinted {
                add_hinted::<INT4, R>(&mut sums, &values, walk, head);
            } else {
                add_silent::<INT4, R>(&mut sums, &values);
            }
            for i in 0..R {
                let bias = if INT4 { 0 } else { weights.sum[i] << 7 };
                let bias = _mm512_set1_epi32(bias);
                let unit = _mm512_set1_ps(weights.scale[i]);
                let grow = _mm512_set1_ps(scratch.grow.add(r + i).read());
                for k in 0..4 {
                    let o = scratch.o.add((r + i) * scratch.v_pad + 64 * plane + 16 * k);
                    let sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[i][k], bias));
                    let old = _mm512_mul_ps(_mm512_loadu_ps(o), grow);
                    _mm512_storeu_ps(o, _mm512_fmadd_ps(sum, unit, old));
                }
            }
        }
    }
}

/// One plane of the values of a tile.
struct Plane<'a> {
    /// Fours of tokens.
    rows: &'a [*const u8],
    ends: Ends,
    plane: usize,
    /// `[pair of tokens][row]`, as in [`Weights`].
    weights: &'a [i32; TILE / 2 * 4],
}

/// Adds values that fill the registers that they take; each plane sends its part of the hints.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn add_whole<const INT4: bool, const R: usize>(
    sums: &mut [[__m512i; 4]; R],
    values: &Plane<'_>,
    hints: &mut [Straight; TILE / PIECE],
) {
    let lines = if INT4 { 1 } else { 2 };
    // A copy, which stays in registers from piece to piece.
    let mut all = *sums;
    for (piece, hints) in hints.iter_mut().enumerate().take(values.rows.len() / PIECE) {
        // SAFETY: the caller's promise.
        unsafe { add::<INT4, R, true, _>(&mut all, values, piece * PIECE, lines, hints) };
    }
    *sums = all;
}

/// Adds values anywhere, the hints with the first plane.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn add_hinted<const INT4: bool, const R: usize>(
    sums: &mut [[__m512i; 4]; R],
    values: &Plane<'_>,
    walk: &Walk<'_, '_>,
    head: usize,
) {
    let lines = walk.v_bytes / 32;
    for piece in (0..values.rows.len()).step_by(PIECE) {
        let mut hints = if values.plane == 0 {
            Hints::new(walk, Side::Values, head, piece / PIECE, usize::MAX, true)
        } else {
            Hints::NONE
        };
        // SAFETY: the caller's promise.
        unsafe { add::<INT4, R, false, _>(sums, values, piece, lines, &mut hints) };
    }
}

/// Adds values that other rows have had hints for.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn add_silent<const INT4: bool, const R: usize>(
    sums: &mut [[__m512i; 4]; R],
    values: &Plane<'_>,
) {
    for piece in (0..values.rows.len()).step_by(PIECE) {
        // SAFETY: the caller's promise.
        unsafe { add::<INT4, R, false, _>(sums, values, piece, 0, &mut Silent) };
    }
}

/// Adds the weighted values of a piece, which begins at token `from`; `lines` of hints for two tokens.
#[inline(always)]
unsafe fn add<const INT4: bool, const R: usize, const WHOLE: bool, H: Pace>(
    sums: &mut [[__m512i; 4]; R],
    values: &Plane<'_>,
    from: usize,
    lines: usize,
    hints: &mut H,
) {
    let &Plane { rows, ends, plane, weights } = values;
    let at = if INT4 { plane / 2 } else { plane };
    for t in (from..rows.len().min(from + PIECE)).step_by(2) {
        hints.advance(2, lines);
        // SAFETY: the caller's promise; rows are fours, and each pair of them has weights.
        unsafe {
            let zero = _mm512_setzero_si512();
            let a = load_codes::<WHOLE>(*rows.get_unchecked(t), ends, at);
            let b = load_codes::<WHOLE>(*rows.get_unchecked(t + 1), ends, at);
            let (a, b) = (codes_of::<INT4>(a, plane), codes_of::<INT4>(b, plane));
            let (low, high) = (_mm512_unpacklo_epi8(a, b), _mm512_unpackhi_epi8(a, b));
            let pairs = [
                _mm512_unpacklo_epi8(low, zero),
                _mm512_unpackhi_epi8(low, zero),
                _mm512_unpacklo_epi8(high, zero),
                _mm512_unpackhi_epi8(high, zero),
            ];
            for i in 0..R {
                let weight = _mm512_set1_epi32(*weights.get_unchecked(2 * t + i));
                for k in 0..4 {
                    sums[i][k] = _mm512_dpwssd_epi32(sums[i][k], pairs[k], weight);
                }
            }
        }
    }
}

/// A plane's sums in the order of its bytes: of each register four in a row are neighbours, so
/// quarters change places.
#[inline(always)]
unsafe fn in_order(from: *const f32) -> [__m512; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let (x, y) = (_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(16)));
        let (z, w) = (_mm512_loadu_ps(from.add(32)), _mm512_loadu_ps(from.add(48)));
        let (a, b) = (_mm512_shuffle_f32x4::<0x44>(x, y), _mm512_shuffle_f32x4::<0x44>(z, w));
        let (c, d) = (_mm512_shuffle_f32x4::<0xee>(x, y), _mm512_shuffle_f32x4::<0xee>(z, w));
        [
            _mm512_shuffle_f32x4::<0x88>(a, b),
            _mm512_shuffle_f32x4::<0xdd>(a, b),
            _mm512_shuffle_f32x4::<0x88>(c, d),
            _mm512_shuffle_f32x4::<0xdd>(c, d),
        ]
    }
}

/// Writes an accumulated row in the order of its channels, plus `shift`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn put_row<const INT4: bool>(
    from: *const f32,
    shift: f32,
    dim: usize,
    to: *mut f32,
) {
    let mut row = [const { MaybeUninit::<f32>::uninit() }; 256];
    let whole = dim == 64 * planes::<INT4>(dim);
    // SAFETY: the caller's promise; rows have at most 256 channels.
    unsafe {
        let shift = _mm512_set1_ps(shift);
        let all = if whole { to } else { row.as_mut_ptr().cast() };
        for p in (0..planes::<INT4>(dim)).step_by(if INT4 { 2 } else { 1 }) {
            let first = in_order(from.add(64 * p));
            if INT4 {
                // Of eight channels the low nibbles have 0, 4, 1, 5 and the high ones 2, 6, 3, 7.
                let second = in_order(from.add(64 * (p + 1)));
                let lower =
                    _mm512_setr_epi32(0, 2, 16, 18, 1, 3, 17, 19, 4, 6, 20, 22, 5, 7, 21, 23);
                let upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
                for k in 0..4 {
                    let at = all.add(64 * p + 32 * k);
                    let low = _mm512_permutex2var_ps(first[k], lower, second[k]);
                    let high = _mm512_permutex2var_ps(first[k], upper, second[k]);
                    _mm512_storeu_ps(at, _mm512_add_ps(low, shift));
                    _mm512_storeu_ps(at.add(16), _mm512_add_ps(high, shift));
                }
            } else {
                for k in 0..4 {
                    _mm512_storeu_ps(all.add(64 * p + 16 * k), first[k]);
                }
            }
        }
        if !whole {
            to.copy_from_nonoverlapping(all, dim);
        }
    }
}
