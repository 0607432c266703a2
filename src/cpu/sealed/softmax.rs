//! The online softmax over one sealed tile, a row at a time, and the rounding of its probabilities.

use super::dots::{Rounded, WIDE, halves, order};
use super::kernel::SealedJob;
use super::scratch::{Dims, Scratch};
use crate::cpu::math::{exp, tanh};
use crate::cpu::words::Words;

/// Turns the scores of group row `r` into probabilities times the values' scales: in place, and as
/// bytes. Brings the state of `row` up to date; `query` is the row whose position and head it has.
///
/// # Safety
/// As for [`tiles`](super::kernel::tiles).
#[inline(always)]
pub(super) unsafe fn soften<V: Words>(
    job: &SealedJob<'_>,
    dims: &Dims,
    s: &Scratch,
    tile: u32,
    query: usize,
    row: usize,
    r: usize,
) -> Rounded {
    let tokens = dims.tokens;
    let position = i64::from(job.q_pos) + (query / job.heads) as i64;
    let start = i64::from(tile) * tokens as i64;
    // SAFETY: the caller's promise.
    unsafe {
        let scores = s.s.add(r * tokens);
        if let Some(cap) = job.softcap {
            let (cap, inverse) = (V::splat(cap), V::splat(1.0 / cap));
            for t in (0..tokens).step_by(V::LANES) {
                tanh(V::load(scores.add(t)).mul(inverse)).mul(cap).store(scores.add(t));
            }
        }
        if let Some(slopes) = job.alibi {
            let slope = V::splat(slopes[query % job.heads]);
            let distance = V::splat((start - position) as f32);
            for t in (0..tokens).step_by(V::LANES) {
                let distance = V::load(s.count.add(t)).add(distance);
                slope.fma(distance, V::load(scores.add(t))).store(scores.add(t));
            }
        }
        if job.window != u32::MAX {
            let hidden = position + 1 - i64::from(job.window) - start;
            for t in 0..hidden.clamp(0, tokens as i64) as usize {
                scores.add(t).write(f32::NEG_INFINITY);
            }
        }

        let old = s.m.add(row).read();
        let mut top = V::splat(old);
        for t in (0..tokens).step_by(V::LANES) {
            top = top.max(V::load(scores.add(t)));
        }
        let top = top.top();
        // A finite stand-in where nothing has been seen: -inf less it is still -inf.
        let finite = V::splat(top.max(f32::MIN));
        let (mut sum, mut largest) = (V::splat(0.0), V::splat(0.0));
        for t in (0..tokens).step_by(V::LANES) {
            let p = exp(V::load(scores.add(t)).sub(finite));
            sum = sum.add(p);
            let p = if dims.v_in_k { p } else { p.mul(V::load(s.v_scale.add(t))) };
            largest = largest.max(p);
            p.store(scores.add(t));
        }
        let grow = exp(V::splat(old).sub(finite)).top();
        s.l.add(row).write(s.l.add(row).read() * grow + sum.sum());
        s.m.add(row).write(top);
        if dims.v_in_k {
            return Rounded { more: grow, ..Rounded::default() };
        }
        let rounded = round::<V>(dims, s, scores, largest.top(), r);
        Rounded { more: grow, ..rounded }
    }
}

/// Scales probabilities to whole numbers, as bytes in the order of the values' codes.
#[inline(always)]
unsafe fn round<V: Words>(
    dims: &Dims,
    s: &Scratch,
    p: *const f32,
    largest: f32,
    r: usize,
) -> Rounded {
    let tokens = dims.tokens;
    // SAFETY: the caller's promise.
    unsafe {
        // Smaller ones mean nothing beside the denominator, which is at least 1.
        let usable = largest > 1e-30;
        let factor = V::splat(if usable { WIDE / largest } else { 0.0 });
        let (mut sum_high, mut sum_low) = (V::splat(0.0), V::splat(0.0));
        let (high, low) = (s.buffer, s.buffer.add(tokens));
        for t in (0..tokens).step_by(V::LANES) {
            let x = V::load(p.add(t)).mul(factor).min(V::splat(WIDE)).round();
            let (h, l) = halves::<V>(x);
            (sum_high, sum_low) = (sum_high.add(h), sum_low.add(l));
            h.store_bytes(high.add(t));
            l.store_bytes(low.add(t));
        }
        let to = s.p_bytes.add(r * 2 * tokens / 4).cast::<u8>();
        order::<V>(dims.v_bits, high, tokens, to);
        order::<V>(dims.v_bits, low, tokens, to.add(tokens));
        let unit = if usable { largest / WIDE } else { 0.0 };
        Rounded { unit, high: sum_high.sum(), low: sum_low.sum(), more: 0.0 }
    }
}
