//! Scores: dot products of sixteen keys at a time with the queries of some rows.
//!
//! Four keys swap words within the quarters of their registers, so that a lane belongs to one key and
//! the same four channels are side by side, for queries laid out alike. So only quarters are left to
//! add up, and of sixteen keys they become the lanes of one register. All of it is exact.

use core::arch::x86_64::*;
use core::mem::MaybeUninit;

use super::super::tiles::{merge, turn};
use super::rows::{Ends, HeadRows, Rounded, Scales, codes_of, load_codes, loads};
use crate::cpu::decode::{Hints, PIECE, Pace, Scratch, Side, Silent, Walk};

/// Queries of `R` rows as keys meet them: of each plane four words of each quarter, of those the high
/// bytes of all rows and then the low ones.
struct Laid<const PLANES: usize, const R: usize>([[[[__m512i; R]; 2]; 4]; PLANES]);

impl<const PLANES: usize, const R: usize> Laid<PLANES, R> {
    /// Of the rows of `bytes` bytes from `q` on.
    #[inline(always)]
    unsafe fn new(q: *const u8, bytes: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let mut laid = [[[[_mm512_setzero_si512(); R]; 2]; 4]; PLANES];
            for (p, words) in laid.iter_mut().enumerate() {
                for half in 0..2 {
                    for r in 0..R {
                        let q = q.add(r * bytes + 128 * p + 64 * half);
                        let q = _mm512_loadu_si512(q.cast());
                        words[0][half][r] = _mm512_shuffle_epi32::<0x00>(q);
                        words[1][half][r] = _mm512_shuffle_epi32::<0x55>(q);
                        words[2][half][r] = _mm512_shuffle_epi32::<0xaa>(q);
                        words[3][half][r] = _mm512_shuffle_epi32::<0xff>(q);
                    }
                }
            }
            Self(laid)
        }
    }
}

/// Scores of a head's rows with the keys of the tile, before scale and soft-cap. Keys that fill up a
/// sixteen have scores that mean nothing.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn scores<const INT4: bool, const PLANES: usize, const R: usize>(
    walk: &Walk<'_, '_>,
    scratch: &Scratch,
    scales: &Scales,
    queries: &[Rounded],
    head: usize,
    padded: usize,
    at: &mut HeadRows,
) {
    let (job, now) = (walk.job, &walk.now);
    at.fill(now, &now.k, head as isize * job.k_head_bytes);
    let (ends, parts) = (at.ends.0, loads::<INT4>(PLANES));
    let whole = walk.k_bytes == 64 * parts;
    let straight = whole && walk.straight_pieces(Side::Keys, head, &mut at.straight);
    for r in (head * padded..(head + 1) * padded).step_by(R) {
        // The first rows of a head send the hints for all.
        let first = r == head * padded;
        // SAFETY: the caller's promise; past the last key there are zeros.
        unsafe {
            let laid = Laid::<PLANES, R>::new(scratch.q.add(r * scratch.q_bytes), scratch.q_bytes);
            for piece in 0..Walk::pieces(now) {
                let mut hints = if first && !straight {
                    Hints::new(walk, Side::Keys, head, piece, usize::MAX, true)
                } else {
                    Hints::NONE
                };
                let mut halves = [const { MaybeUninit::<[__m512i; R]>::uninit() }; 2];
                for half in 0..2 {
                    let keys = at.rows.as_ptr().add(piece * PIECE + 4 * half);
                    let sums = halves[half].as_mut_ptr();
                    if !first {
                        products::<INT4, PLANES, R, false, _>(
                            keys,
                            ends,
                            &laid,
                            0,
                            &mut Silent,
                            sums,
                        );
                    } else if straight {
                        let hints = &mut at.straight[piece];
                        products::<INT4, PLANES, R, true, _>(keys, ends, &laid, 0, hints, sums);
                    } else {
                        let lines = walk.k_bytes / 8 / parts;
                        products::<INT4, PLANES, R, false, _>(
                            keys, ends, &laid, lines, &mut hints, sums,
                        );
                    }
                }
                let sums = merge::<2, R>(halves[0].assume_init(), halves[1].assume_init());
                let t = piece * PIECE;
                let s = _mm512_loadu_ps(scales.s.as_ptr().add(t));
                let m = if INT4 { _mm512_loadu_ps(scales.m.as_ptr().add(t)) } else { s };
                let mut dots = [_mm512_setzero_ps(); R];
                for i in 0..R {
                    let query = &queries[r + i];
                    let bias = _mm512_set1_epi32(if INT4 { 0 } else { query.sum << 7 });
                    let dot = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[i], bias));
                    let dot = _mm512_mul_ps(dot, _mm512_set1_ps(query.scale));
                    dots[i] = if INT4 {
                        let sum = _mm512_set1_ps(query.scale * query.sum as f32);
                        _mm512_fmadd_ps(dot, s, _mm512_mul_ps(m, sum))
                    } else {
                        _mm512_mul_ps(dot, s)
                    };
                }
                put(dots, scratch.s.add(t * scratch.lanes + r), scratch.lanes);
            }
        }
    }
}

/// Products of eight keys with each row: four keys in a row, and those eight further. Those of key `j`
/// of four are in lane `j` of a quarter; the first four keys have the first two quarters. `WHOLE`: keys
/// fill the registers that they take, else `lines` of hints go out with each. A function of its own,
/// as a compiler that sees more of what is around it runs out of registers.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn products<
    const INT4: bool,
    const PLANES: usize,
    const R: usize,
    const WHOLE: bool,
    H: Pace,
>(
    keys: *const *const u8,
    ends: Ends,
    laid: &Laid<PLANES, R>,
    lines: usize,
    hints: &mut H,
    sums: *mut [__m512i; R],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let zero = _mm512_setzero_si512();
        let (mut high, mut low) = ([[zero; R]; 2], [[zero; R]; 2]);
        let parts = loads::<INT4>(PLANES);
        for at in 0..parts {
            let mut words = [[zero; 4]; 2];
            for b in 0..2 {
                for j in 0..4 {
                    let key = keys.add(8 * b + j).read();
                    words[b][j] = load_codes::<WHOLE>(key, ends, at);
                }
                words[b] = turn(words[b], 4);
            }
            if !WHOLE {
                hints.advance(if at == 0 { 8 } else { 0 }, lines);
            }
            for p in at * PLANES / parts..(at + 1) * PLANES / parts {
                for w in 0..4 {
                    if WHOLE {
                        // Between the products: a burst of hints would fill the queue.
                        hints.advance(0, if INT4 { 1 } else { 2 });
                    }
                    let codes =
                        [codes_of::<INT4>(words[0][w], p), codes_of::<INT4>(words[1][w], p)];
                    for i in 0..R {
                        let [by_high, by_low] = [laid.0[p][w][0][i], laid.0[p][w][1][i]];
                        for b in 0..2 {
                            high[b][i] = _mm512_dpbusd_epi32(high[b][i], codes[b], by_high);
                            low[b][i] = _mm512_dpbusd_epi32(low[b][i], codes[b], by_low);
                        }
                    }
                }
            }
        }
        for b in 0..2 {
            for i in 0..R {
                high[b][i] = _mm512_add_epi32(_mm512_slli_epi32::<8>(high[b][i]), low[b][i]);
            }
        }
        sums.write(merge::<3, R>(high[0], high[1]));
    }
}

/// Writes what rows have in lanes, to `to[lane * stride + row]`.
#[inline(always)]
unsafe fn put<const R: usize>(x: [__m512; R], to: *mut f32, stride: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        if R == 4 {
            let (a, b, c, d) = (x[0], x[1 % R], x[2 % R], x[3 % R]);
            let (ab, cd) = (_mm512_unpacklo_ps(a, b), _mm512_unpacklo_ps(c, d));
            let (ef, gh) = (_mm512_unpackhi_ps(a, b), _mm512_unpackhi_ps(c, d));
            let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
            let (ef, gh) = (_mm512_castps_pd(ef), _mm512_castps_pd(gh));
            let lanes = [
                _mm512_unpacklo_pd(ab, cd),
                _mm512_unpackhi_pd(ab, cd),
                _mm512_unpacklo_pd(ef, gh),
                _mm512_unpackhi_pd(ef, gh),
            ];
            for lane in 0..4 {
                let (x, to) = (_mm512_castpd_ps(lanes[lane]), to.add(lane * stride));
                _mm_storeu_ps(to, _mm512_castps512_ps128(x));
                _mm_storeu_ps(to.add(4 * stride), _mm512_extractf32x4_ps::<1>(x));
                _mm_storeu_ps(to.add(8 * stride), _mm512_extractf32x4_ps::<2>(x));
                _mm_storeu_ps(to.add(12 * stride), _mm512_extractf32x4_ps::<3>(x));
            }
        } else {
            for r in 0..R {
                let mut lanes = [0.0f32; 16];
                _mm512_storeu_ps(lanes.as_mut_ptr(), x[r]);
                for lane in 0..16 {
                    to.add(lane * stride + r).write(lanes[lane]);
                }
            }
        }
    }
}
