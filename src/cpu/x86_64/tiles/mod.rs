//! Sealed tiles with AVX-512, VNNI and VBMI. Decode: the generic kernel's steps, without bringing
//! records into lanes first. Sealing is in `seal.rs`,
//! `seal_values.rs` and `lanes.rs`.
//!
//! A tile's keys are multiplied with four rows of queries as they lie, its values with the
//! probabilities of those. Beside these products there is one rounding of queries, one softmax and
//! one rounding of probabilities a tile, of four rows each so that their chains overlap. A row's bits follow from its query and the tiles alone. Latents and
//! head dimensions other than 64, 128 and 256 are the generic kernel's.

mod ahead;
mod lanes;
mod quads;
mod queries;
mod rows;
mod seal;
mod seal_values;
mod softmax;
#[cfg(test)]
mod tests;

use core::arch::x86_64::*;

use crate::cpu::sealed::{Dims, Scratch, SealedJob, begin, find};
use crate::dtype::f16;
use crate::layout::tile::TileLayout;
use ahead::{Ahead, Hints};
use quads::GROUP;
use queries::rounding;
use rows::{MOST, Order, Rows, Weights, dots, lines};
pub(super) use rows::{merge, turn};
pub(super) use seal::{seal, seals};
use softmax::{Place, Probabilities, softening};

use super::avx512::F32x16;

/// Whether the kernel here knows the layout.
pub(super) fn takes(layout: &TileLayout) -> bool {
    let shape = layout.shape();
    !shape.v_in_k && matches!(shape.k_dim, 64 | 128 | 256)
}

/// Products of the codes of one side of a record with up to [`GROUP`] rows of weights.
type Multiply = unsafe fn(&Turn<'_>);

/// What a [`Multiply`] works on.
struct Turn<'a> {
    rows: Rows,
    /// Sixteen rows each.
    groups: usize,
    weights: &'a Weights<GROUP>,
    /// `[row][..]` whole sums.
    sums: *mut i32,
    stride: usize,
    hints: Hints,
}

/// Instantiates [`dots`] for all rows of a side.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c")]
unsafe fn multiply<
    const BITS: u32,
    const COUNT: usize,
    const WIDE: bool,
    const VALUES: bool,
    const R: usize,
>(
    turn: &Turn<'_>,
) {
    // SAFETY: the caller's promise, and `R` is at most a group.
    unsafe {
        let weights = &*core::ptr::from_ref(turn.weights).cast::<Weights<R>>();
        for group in 0..turn.groups {
            let lines = turn.hints.group(group, turn.groups, const { lines(BITS, COUNT) });
            let sums = dots::<BITS, COUNT, WIDE, VALUES, R>(&turn.rows, group, weights, lines);
            for r in 0..R {
                let to = turn.sums.add(r * turn.stride + 16 * group);
                _mm512_storeu_si512(to.cast(), sums[r]);
            }
        }
    }
}

/// The products of keys with several rows at a time.
fn key_products(bits: u32, k_dim: usize, many: bool) -> Multiply {
    macro_rules! of {
        ($bits:literal, $wide:literal, $dim:literal) => {
            if many {
                multiply::<$bits, $dim, $wide, false, GROUP>
            } else {
                multiply::<$bits, $dim, $wide, false, 1>
            }
        };
        ($bits:literal, $wide:literal) => {
            match k_dim {
                64 => of!($bits, $wide, 64),
                128 => of!($bits, $wide, 128),
                _ => of!($bits, $wide, 256),
            }
        };
    }
    match bits {
        8 => of!(8, true),
        4 => of!(4, false),
        3 => of!(3, false),
        _ => of!(2, false),
    }
}

/// The products of values.
fn value_products(bits: u32, tokens: usize, many: bool) -> Multiply {
    macro_rules! of {
        ($bits:literal, $wide:literal, $tokens:literal) => {
            if many {
                multiply::<$bits, $tokens, $wide, true, GROUP>
            } else {
                multiply::<$bits, $tokens, $wide, true, 1>
            }
        };
        ($bits:literal, $wide:literal) => {
            match tokens {
                32 => of!($bits, $wide, 32),
                64 => of!($bits, $wide, 64),
                _ => of!($bits, $wide, 128),
            }
        };
    }
    match bits {
        8 => of!(8, true),
        4 => of!(4, false),
        3 => of!(3, false),
        _ => of!(2, false),
    }
}

/// The kernel.
///
/// # Safety
/// As for [`tiles`](crate::cpu::sealed::tiles), of a layout that [`takes`] knows; AVX-512 with VNNI
/// and VBMI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c")]
pub(super) unsafe fn attend(job: &SealedJob<'_>) {
    let layout = job.layout;
    let dims = Dims::new(layout);
    let (s, _) = Scratch::new(job.scratch, &dims);
    let rows = job.heads * job.tokens;
    let Dims { k_dim, v_dim, tokens, k_bits, v_bits, .. } = dims;
    let count = if rows > 1 { GROUP } else { 1 };
    let padded = rows.next_multiple_of(count);
    let keys = key_products(k_bits, k_dim, rows > 1);
    let values = value_products(v_bits, tokens, rows > 1);
    let round = rounding(k_bits, k_dim, rows > 1);
    let soften = softening(&dims, rows > 1);
    let (k_order, v_order) = (Order::of(k_bits, k_dim), Order::of(v_bits, tokens));
    let zero = _mm512_setzero_si512();
    let mut weights: Weights<GROUP> = [[[zero; MOST]; 2]; GROUP];
    // SAFETY: the caller's promise; scratch is laid out for the job.
    unsafe {
        begin::<F32x16>(job, &dims, &s, padded);
        let ahead = Ahead::new(job);
        for (at, tile) in job.now.tiles.clone().enumerate() {
            if let Some(record) = find(job, tile) {
                scales(layout, &dims, &s, record);
                let side = |range: &core::ops::Range<usize>| record.add(range.start);
                let k = Rows { codes: side(&layout.k_codes), plane: side(&layout.k_plane) };
                let v = Rows { codes: side(&layout.v_codes), plane: side(&layout.v_plane) };
                let [k_hints, v_hints] = ahead.tile(at, &k, &v);
                for first in (0..padded).step_by(count) {
                    let queries = round(&dims, &s, first, k_order, &mut weights);
                    keys(&Turn {
                        rows: k,
                        groups: tokens / 16,
                        weights: &weights,
                        sums: s.s.cast(),
                        stride: tokens,
                        hints: k_hints,
                    });
                    let place = Place { job, dims: &dims, s: &s, tile, first };
                    let factors = soften(&place, &queries, v_order, &mut weights);
                    values(&Turn {
                        rows: v,
                        groups: v_dim / 16,
                        weights: &weights,
                        sums: s.sums,
                        stride: v_dim,
                        hints: v_hints,
                    });
                    for r in 0..count {
                        let (o, sums) = (s.o.add((first + r) * v_dim), s.sums.add(r * v_dim));
                        add_values(o, sums, v_dim, &factors, r);
                    }
                }
            }
        }
        for row in 0..rows {
            job.states.m.add(row).write(s.m.add(row).read() * core::f32::consts::LN_2);
            job.states.l.add(row).write(s.l.add(row).read());
            let to = job.states.o.add(row * v_dim);
            core::ptr::copy_nonoverlapping(s.o.add(row * v_dim), to, v_dim);
        }
    }
}

/// Brings the scales of a record into f32.
#[inline(always)]
unsafe fn scales(layout: &TileLayout, dims: &Dims, s: &Scratch, record: *const u8) {
    // SAFETY: the caller's promise: all of the record can be read.
    unsafe {
        let unit = |at: usize| {
            let at = record.add(layout.header.start + crate::quant::HEADER_UNITS + at);
            f16::from_le_bytes(at.cast::<[u8; 2]>().read()).to_f32()
        };
        let (step, mid) = (_mm512_set1_ps(unit(0)), _mm512_set1_ps(unit(2)));
        for c in (0..dims.k_dim).step_by(16) {
            let steps = _mm_loadu_si128(record.add(layout.k_steps.start + c).cast());
            let mids = _mm_loadu_si128(record.add(layout.k_mids.start + c).cast());
            let steps = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(steps));
            let mids = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(mids));
            _mm512_store_ps(s.step.add(c), _mm512_mul_ps(steps, step));
            _mm512_store_ps(s.mid.add(c), _mm512_mul_ps(mids, mid));
        }
        let from = record.add(layout.v_scales.start).cast::<u16>();
        for t in (0..dims.tokens).step_by(16) {
            let scales = _mm512_cvtph_ps(_mm256_loadu_si256(from.add(t).cast()));
            _mm512_store_ps(s.v_scale.add(t), scales);
        }
    }
}

/// Adds the sums of a tile to those of row `r` of a group.
#[inline(always)]
unsafe fn add_values(o: *mut f32, sums: *const i32, dim: usize, by: &Probabilities, r: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let (start, unit) = (_mm512_set1_epi32(by.start[r]), _mm512_set1_ps(by.unit[r]));
        let (shift, grow) = (_mm512_set1_ps(by.shift[r]), _mm512_set1_ps(by.grow[r]));
        for c in (0..dim).step_by(16) {
            let sum = _mm512_add_epi32(_mm512_loadu_si512(sums.add(c).cast()), start);
            let older = _mm512_fmadd_ps(_mm512_loadu_ps(o.add(c)), grow, shift);
            let all = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), unit, older);
            _mm512_storeu_ps(o.add(c), all);
        }
    }
}
