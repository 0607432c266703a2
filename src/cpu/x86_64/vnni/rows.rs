//! Rows as integers: planes of codes, queries in two bytes a channel, scales of a tile.

use core::arch::x86_64::*;

use crate::cpu::decode::{PIECE, Straight, TILE, Tile};
use crate::dtype::f16;

/// The largest magnitude of a query's channel: a high byte of 127 and a low one of 127.
const Q_TOP: f32 = 32639.0;

/// Registers of 64 codes that a row takes.
#[inline(always)]
pub(super) const fn planes<const INT4: bool>(dim: usize) -> usize {
    if INT4 { 2 * dim.div_ceil(128) } else { dim.div_ceil(64) }
}

/// The bytes of each load of a row: where the rows of one side end.
#[derive(Clone, Copy)]
pub(super) struct Ends([u64; 4]);

impl Ends {
    /// Of rows of `bytes` bytes, at most 256.
    fn new(bytes: usize) -> Self {
        let mut masks = [0; 4];
        for (at, mask) in masks.iter_mut().enumerate() {
            let left = bytes.saturating_sub(64 * at).min(64);
            *mask = if left == 0 { 0 } else { u64::MAX >> (64 - left) };
        }
        Self(masks)
    }
}

/// Loads of a row that make `planes` planes.
#[inline(always)]
pub(super) const fn loads<const INT4: bool>(planes: usize) -> usize {
    if INT4 { planes / 2 } else { planes }
}

/// Load `at` of a row, with zeros past its end; `WHOLE` where that is the end of a load.
///
/// # Safety
/// Needs AVX-512 BW; the row must be readable.
#[inline(always)]
pub(super) unsafe fn load_codes<const WHOLE: bool>(
    row: *const u8,
    ends: Ends,
    at: usize,
) -> __m512i {
    let from = row.wrapping_add(64 * at);
    // SAFETY: the caller's promise; the mask ends with the row.
    unsafe {
        if WHOLE {
            _mm512_loadu_si512(from.cast())
        } else {
            _mm512_maskz_loadu_epi8(ends.0[at], from.cast())
        }
    }
}

/// Plane `plane` of what was loaded of rows: 64 codes without sign. What lies past a row is 0, which
/// is -128 of INT8_T and meets channels that queries have 0 in.
///
/// # Safety
/// Needs AVX-512 BW.
#[inline(always)]
pub(super) unsafe fn codes_of<const INT4: bool>(loaded: __m512i, plane: usize) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let low = _mm512_set1_epi8(0x0f);
        match (INT4, plane % 2) {
            (false, _) => _mm512_xor_si512(loaded, _mm512_set1_epi8(-128)),
            (true, 0) => _mm512_and_si512(loaded, low),
            (true, _) => _mm512_and_si512(_mm512_srli_epi16::<4>(loaded), low),
        }
    }
}

/// Where the rows of one head of a tile lie, zeros past the last, and the hints for its pieces.
pub(super) struct HeadRows {
    pub rows: [*const u8; TILE],
    pub straight: [Straight; TILE / PIECE],
    /// Where keys end, and values.
    pub ends: (Ends, Ends),
}

impl HeadRows {
    /// Of no head yet; keys and values of `bytes` bytes.
    pub(super) fn new(bytes: (usize, usize)) -> Self {
        HeadRows {
            rows: [core::ptr::null(); TILE],
            straight: [Straight::NONE; TILE / PIECE],
            ends: (Ends::new(bytes.0), Ends::new(bytes.1)),
        }
    }

    /// Takes the rows `offset` bytes from `first`, the rows of the first head. In place, and eight at a
    /// time, so that nothing waits for stores of another width.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) fn fill(&mut self, tile: &Tile, first: &[*const u8; TILE], offset: isize) {
        let zeros = _mm512_set1_epi64(tile.zeros.addr() as i64);
        let offset = _mm512_set1_epi64(offset as i64);
        let known = u64::MAX >> (64 - tile.keys.max(1));
        for at in (0..TILE).step_by(8) {
            // SAFETY: there are as many rows on both sides.
            unsafe {
                let from = _mm512_loadu_si512(first.as_ptr().add(at).cast());
                let some = (known >> at) as u8 & _mm512_cmpneq_epi64_mask(from, zeros);
                let row = _mm512_mask_add_epi64(zeros, some, from, offset);
                _mm512_storeu_si512(self.rows.as_mut_ptr().add(at).cast(), row);
            }
        }
    }
}

/// Of four keys from `x` on, what belongs to each: once a row.
///
/// # Safety
/// Needs AVX-512 F; four f32 must be readable.
#[inline(always)]
pub(super) unsafe fn of_keys(x: *const f32) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        let spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(_mm_loadu_ps(x)))
    }
}

/// A query row as integers.
#[derive(Clone, Copy, Default)]
pub(super) struct Rounded {
    /// What a unit stands for.
    pub scale: f32,
    /// Sum of all channels.
    pub sum: i32,
}

/// 64 bytes of a rounded row.
#[inline(always)]
unsafe fn load(bytes: &[u8; 256], part: usize) -> __m512i {
    // SAFETY: the caller's promise: `part` is below 4.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().add(64 * part).cast()) }
}

/// Rounds a row of `dim` channels and writes its planes, each as 64 high bytes and 64 low ones.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn prepare<const INT4: bool, const PLANES: usize>(
    row: *const f32,
    dim: usize,
    to: *mut u8,
) -> Rounded {
    // SAFETY: the caller's promise; rows are whole vectors of at most 256 channels.
    unsafe {
        let (mut top, mut odd) = (_mm512_setzero_ps(), _mm512_setzero_ps());
        for c in (0..dim).step_by(16) {
            let x = _mm512_loadu_ps(row.add(c));
            top = _mm512_max_ps(top, _mm512_abs_ps(x));
            odd = _mm512_fmadd_ps(x, _mm512_setzero_ps(), odd);
        }
        let (top, odd) = (_mm512_reduce_max_ps(top), _mm512_reduce_add_ps(odd));
        let (mut high, mut low) = ([0u8; 256], [0u8; 256]);
        let mut sum = _mm512_setzero_si512();
        // Smaller ones, whose inverse may be infinite, add nothing to any score.
        let tiny = top < 1e-30;
        let inverse = _mm512_set1_ps(if tiny { 0.0 } else { Q_TOP / top });
        for c in (0..dim).step_by(16) {
            let x = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(row.add(c)), inverse));
            sum = _mm512_add_epi32(sum, x);
            let upper = _mm512_srai_epi32::<8>(_mm512_add_epi32(x, _mm512_set1_epi32(128)));
            let lower = _mm512_sub_epi32(x, _mm512_slli_epi32::<8>(upper));
            _mm_storeu_si128(high.as_mut_ptr().add(c).cast(), _mm512_cvtepi32_epi8(upper));
            _mm_storeu_si128(low.as_mut_ptr().add(c).cast(), _mm512_cvtepi32_epi8(lower));
        }
        for (half, bytes) in [&high, &low].into_iter().enumerate() {
            let to = to.add(64 * half);
            let mut plane = 0;
            while plane < PLANES {
                if INT4 {
                    // Of eight channels those of the low nibbles, then those of the high ones.
                    let order = _mm512_broadcast_i32x4(_mm_setr_epi8(
                        0, 4, 1, 5, 8, 12, 9, 13, 2, 6, 3, 7, 10, 14, 11, 15,
                    ));
                    let a = _mm512_shuffle_epi8(load(bytes, plane), order);
                    let b = _mm512_shuffle_epi8(load(bytes, plane + 1), order);
                    let even = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
                    let odd = _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15);
                    let (low, high) = (
                        _mm512_permutex2var_epi64(a, even, b),
                        _mm512_permutex2var_epi64(a, odd, b),
                    );
                    _mm512_storeu_si512(to.add(128 * plane).cast(), low);
                    _mm512_storeu_si512(to.add(128 * (plane + 1)).cast(), high);
                    plane += 2;
                } else {
                    _mm512_storeu_si512(to.add(128 * plane).cast(), load(bytes, plane));
                    plane += 1;
                }
            }
        }
        // What is not finite must not look as if it were.
        let scale = if odd == 0.0 { if tiny { 0.0 } else { top / Q_TOP } } else { f32::NAN };
        Rounded { scale, sum: _mm512_reduce_add_epi32(sum) }
    }
}

/// The f16 at `p`.
#[inline(always)]
unsafe fn half(p: *const u8) -> f32 {
    // SAFETY: the caller's promise.
    f16::from_bits(unsafe { p.cast::<u16>().read_unaligned() }).to_f32_const()
}

/// Scales and, of INT4_T, minima of the tokens of a tile.
pub(super) struct Scales {
    pub s: [f32; TILE],
    pub m: [f32; TILE],
}

impl Scales {
    /// Reads those at `rows`, `offset` bytes on. In blocks of 16 tokens or more 16 rows lie in two at
    /// most, so that what is as long as a run is one.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) unsafe fn read<const INT4: bool>(
        &mut self,
        tile: &Tile,
        rows: &[*const u8; TILE],
        offset: isize,
        block_tokens: u32,
    ) {
        let bytes = if INT4 { 4 } else { 2 };
        for from in (0..tile.keys).step_by(16) {
            let first = tile.row(rows[from], offset);
            let run = block_tokens >= 16
                && from + 16 <= tile.keys
                && rows[from + 15].addr().wrapping_sub(rows[from].addr()) == 15 * bytes;
            // SAFETY: the scales of keys of the tile are readable; a run of 16 is 16 in a row.
            unsafe {
                let (s, m) = (self.s.as_mut_ptr().add(from), self.m.as_mut_ptr().add(from));
                if run && INT4 {
                    let both = _mm512_loadu_si512(first.cast());
                    let minima = _mm512_srli_epi32::<16>(both);
                    _mm512_storeu_ps(s, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both)));
                    _mm512_storeu_ps(m, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(minima)));
                } else if run {
                    _mm512_storeu_ps(s, _mm512_cvtph_ps(_mm256_loadu_si256(first.cast())));
                } else {
                    for i in 0..16 {
                        let known = from + i < tile.keys;
                        let at = if known { tile.row(rows[from + i], offset) } else { tile.zeros };
                        s.add(i).write(half(at));
                        if INT4 {
                            m.add(i).write(half(at.add(2)));
                        }
                    }
                }
            }
        }
    }
}
