//! The values of a record: rotated, and coded by token.
//!
//! Tokens are in the lanes, so that the rotation and the sums over a row are the reference's own,
//! operation for operation, for several tokens at once.

use core::mem::MaybeUninit;

use super::seal::{LANES, SealJob, pack};
use crate::cpu::words::Words;
use crate::dtype::f16;
use crate::layout::MAX_SPLIT_HEAD_DIM;
use crate::quant;

/// The most tokens of a tile.
const MAX_TOKENS: usize = 128;
const V_DIM: usize = MAX_SPLIT_HEAD_DIM as usize;

/// Codes and scales of the values; false where they cannot be sealed.
///
/// # Safety
/// As for [`seal_record`](super::seal_record), where values are stored.
#[inline(always)]
pub(super) unsafe fn seal_values<V: Words, const BITS: u32>(job: &SealJob<'_>) -> bool {
    let layout = job.layout;
    let (v_dim, tokens) = (layout.shape().v_dim as usize, layout.shape().tokens as usize);
    let mut rows = MaybeUninit::<[f32; LANES * V_DIM]>::uninit();
    let mut lanes = MaybeUninit::<[f32; LANES * V_DIM]>::uninit();
    let mut bytes = MaybeUninit::<[u8; V_DIM * MAX_TOKENS]>::uninit();
    let (rows, y) = (rows.as_mut_ptr().cast::<f32>(), lanes.as_mut_ptr().cast::<f32>());
    let bytes = bytes.as_mut_ptr().cast::<u8>();
    // SAFETY: the caller's promise; the buffers hold the largest tile, and are written before they
    // are read.
    unsafe {
        let mut broken = V::splat(0.0);
        for first in (0..tokens).step_by(V::LANES) {
            for i in 0..V::LANES {
                let row = job.v.row(first + i);
                job.ahead[1].prefetch(first + i, 0, v_dim.div_ceil(32));
                for c in (0..v_dim).step_by(V::LANES) {
                    let x = V::load_bf16(row.cast::<u16>().add(c));
                    broken = broken.add(x.sub(x));
                    x.store(rows.add(i * v_dim + c));
                }
            }
            for c in (0..v_dim).step_by(V::LANES) {
                let to = y.add(c * V::LANES).cast();
                V::transpose(rows.add(c).cast(), v_dim, to, V::LANES);
            }
            if broken.sum() != 0.0 {
                return false;
            }
            let bytes = bytes.add(first);
            let scales = if BITS == 8 {
                plain_codes::<V>(y, v_dim, tokens, bytes)
            } else {
                rotate::<V>(y, v_dim);
                rotated_codes::<V, BITS>(y, rows, v_dim, tokens, bytes)
            };
            let Some(scales) = scales else { return false };
            let to = job.record.add(layout.v_scales.start + 2 * first).cast::<[u8; 2]>();
            for i in 0..V::LANES {
                to.add(i).write(scales[i].to_le_bytes());
            }
        }
        for c in 0..v_dim {
            let (main, plane) = layout.v_channel(c);
            let (main, plane) = (job.record.add(main.start), job.record.add(plane.start));
            pack::<V, BITS>(bytes.add(c * tokens), tokens, main, plane);
        }
    }
    true
}

/// Codes of 8 bits of `LANES` tokens, `[channel]` bytes `tokens` apart, and the tokens' scales.
///
/// # Safety
/// As for [`seal_values`].
#[inline(always)]
unsafe fn plain_codes<V: Words>(
    y: *const f32,
    v_dim: usize,
    tokens: usize,
    bytes: *mut u8,
) -> Option<[f16; LANES]> {
    let (mut largest, mut steps) = ([0.0f32; LANES], [0.0f32; LANES]);
    let mut scales = [f16::ZERO; LANES];
    // SAFETY: the caller's promise.
    unsafe {
        let mut top = V::splat(0.0);
        for c in 0..v_dim {
            let x = V::load(y.add(c * V::LANES));
            top = top.max(x).max(V::splat(0.0).sub(x));
        }
        top.store(largest.as_mut_ptr());
        for i in 0..V::LANES {
            // Not the sign of a zero that happened to be the largest.
            scales[i] = quant::f16_up(largest[i] / 127.0 + 0.0)?;
            steps[i] = scales[i].to_f32();
        }
        let step = V::load(steps.as_ptr());
        for c in 0..v_dim {
            let x = V::load(y.add(c * V::LANES)).div(step);
            let code = x.max(V::splat(-127.0)).min(V::splat(127.0)).round();
            code.above(step, V::splat(f32::from_bits(1))).store_bytes(bytes.add(c * tokens));
        }
    }
    Some(scales)
}

/// Rotates `LANES` rows, `[channel][lane]`, as [`crate::quant::rotate`] does one.
///
/// # Safety
/// As for [`seal_values`].
#[inline(always)]
unsafe fn rotate<V: Words>(y: *mut f32, dim: usize) {
    let n = quant::hadamard_block(dim);
    // SAFETY: the caller's promise.
    unsafe {
        for c in 0..dim {
            if quant::SIGNS[c / 64] >> (c % 64) & 1 == 1 {
                let y = y.add(c * V::LANES);
                V::load(y).mul(V::splat(-1.0)).store(y);
            }
        }
        // Two steps at a time: half as much goes through memory, and sums are the same. The last of
        // them scales.
        let (mut half, scale) = (1, V::splat(quant::hadamard_scale(n)));
        while 2 * half < n {
            let end = if 4 * half == n { scale } else { V::splat(1.0) };
            for first in (0..dim).step_by(4 * half) {
                for at in first..first + half {
                    let p = |i: usize| y.add((at + i * half) * V::LANES);
                    let (a, b) = (V::load(p(0)), V::load(p(1)));
                    let (c, d) = (V::load(p(2)), V::load(p(3)));
                    let (a, b, c, d) = (a.add(b), a.sub(b), c.add(d), c.sub(d));
                    a.add(c).mul(end).store(p(0));
                    b.add(d).mul(end).store(p(1));
                    a.sub(c).mul(end).store(p(2));
                    b.sub(d).mul(end).store(p(3));
                }
            }
            half *= 4;
        }
        if half < n {
            for first in (0..dim).step_by(2 * half) {
                for at in first..first + half {
                    let (a, b) = (y.add(at * V::LANES), y.add((at + half) * V::LANES));
                    let (low, high) = (V::load(a), V::load(b));
                    low.add(high).mul(scale).store(a);
                    low.sub(high).mul(scale).store(b);
                }
            }
        }
    }
}

/// Codes below 8 bits of `LANES` rotated tokens, `[channel]` bytes `tokens` apart, and their
/// scales. `terms` has room for as many f32 as `y`.
///
/// # Safety
/// As for [`seal_values`].
#[inline(always)]
unsafe fn rotated_codes<V: Words, const BITS: u32>(
    y: *const f32,
    terms: *mut f32,
    v_dim: usize,
    tokens: usize,
    bytes: *mut u8,
) -> Option<[f16; LANES]> {
    let (mut squares, mut widths) = ([0.0f32; LANES], [0.0f32; LANES]);
    let mut scales = [f16::ZERO; LANES];
    let (step, middle) = (quant::value_step(BITS), (1u32 << (BITS - 1)) as f32);
    let n = ((1u32 << BITS) - 1) as f32;
    // SAFETY: the caller's promise.
    unsafe {
        for c in (0..v_dim).step_by(EIGHT) {
            let mut of = [V::splat(0.0); EIGHT];
            for i in 0..EIGHT {
                let y = V::load(y.add((c + i) * V::LANES));
                of[i] = y.mul(y);
            }
            sum_of(of).store(terms.add(c / EIGHT * V::LANES));
        }
        tree_sum::<V>(terms, v_dim / EIGHT).store(squares.as_mut_ptr());
        for i in 0..V::LANES {
            if !squares[i].is_finite() {
                return None;
            }
            widths[i] = libm::sqrtf(squares[i] / v_dim as f32) * step;
        }
        let width = V::load(widths.as_ptr());
        let tiny = V::splat(f32::from_bits(1));
        // Written out: a closure becomes a call here.
        for c in (0..v_dim).step_by(EIGHT) {
            let mut of = [V::splat(0.0); EIGHT];
            for i in 0..EIGHT {
                let y = V::load(y.add((c + i) * V::LANES));
                // Codes end long before 16 widths.
                let x = y.div(width).max(V::splat(-16.0)).min(V::splat(16.0));
                let near = x.round();
                let floor = near.sub(V::splat(1.0).above(near.sub(x), tiny));
                let code = floor.add(V::splat(middle)).max(V::splat(0.0)).min(V::splat(n));
                let code = code.above(width, tiny);
                code.store_bytes(bytes.add((c + i) * tokens));
                let point = code.add(V::splat(0.5)).sub(V::splat(middle)).mul(V::splat(step));
                of[i] = y.mul(point);
            }
            sum_of(of).store(terms.add(c / EIGHT * V::LANES));
        }
        let mut aligned = [0.0f32; LANES];
        tree_sum::<V>(terms, v_dim / EIGHT).store(aligned.as_mut_ptr());
        for i in 0..V::LANES {
            if widths[i] != 0.0 {
                scales[i] = f16::from_f32(squares[i] / aligned[i]);
                if !scales[i].is_finite() {
                    return None;
                }
            }
        }
    }
    Some(scales)
}

/// Channels that are summed in registers; every dimension is a multiple.
const EIGHT: usize = 8;

/// The first three rounds of [`tree_sum`].
///
/// # Safety
/// The CPU must have the level of `V`.
#[inline(always)]
unsafe fn sum_of<V: Words>(x: [V; EIGHT]) -> V {
    // SAFETY: the caller's promise.
    unsafe {
        let (a, b) = (x[0].add(x[1]), x[2].add(x[3]));
        let (c, d) = (x[4].add(x[5]), x[6].add(x[7]));
        a.add(b).add(c.add(d))
    }
}

/// The sums over the channels of `[channel][lane]` terms, which it uses up, in the order of
/// [`crate::quant::tree_sum`].
///
/// # Safety
/// As for [`seal_values`].
#[inline(always)]
unsafe fn tree_sum<V: Words>(terms: *mut f32, mut count: usize) -> V {
    // SAFETY: the caller's promise.
    unsafe {
        while count > 1 {
            for at in 0..count / 2 {
                let (a, b) = (terms.add(2 * at * V::LANES), terms.add((2 * at + 1) * V::LANES));
                V::load(a).add(V::load(b)).store(terms.add(at * V::LANES));
            }
            if count % 2 == 1 {
                V::load(terms.add((count - 1) * V::LANES)).store(terms.add(count / 2 * V::LANES));
            }
            count = count.div_ceil(2);
        }
        V::load(terms)
    }
}
