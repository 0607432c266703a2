//! The online softmax of the decode kernel, with the rows of all heads in the lanes.
//!
//! Works on the scores of one tile in scratch; knows nothing of how they were made.

use super::Scratch;
use super::values::Weigh;
use super::walk::Tile;
use crate::cpu::job::Job;
use crate::cpu::math::{exp, tanh};
use crate::cpu::vector::Vector;

/// Turns dot products into scores: scale, soft-cap, ALiBi; -inf for what a row must not see.
#[inline(always)]
pub(in crate::cpu) unsafe fn adjust<V: Vector>(
    job: &Job<'_>,
    scratch: &Scratch,
    tile: &Tile,
    at: u32,
    padded: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let (s, lanes) = (scratch.s, scratch.lanes);
        let scale = V::splat(job.scale);
        for i in (0..tile.keys * lanes).step_by(V::LANES) {
            V::load(s.add(i)).mul(scale).store(s.add(i));
        }
        if let Some(cap) = job.softcap {
            let (cap, inverse) = (V::splat(cap), V::splat(1.0 / cap));
            for i in (0..tile.keys * lanes).step_by(V::LANES) {
                tanh(V::load(s.add(i)).mul(inverse)).mul(cap).store(s.add(i));
            }
        }
        if job.alibi.is_some() {
            for t in 0..tile.keys {
                let key = V::splat((at - job.kv_start) as f32 + t as f32);
                for r in (0..lanes).step_by(V::LANES) {
                    let s = s.add(t * lanes + r);
                    let distance = V::load(scratch.distance.add(r)).add(key);
                    V::load(scratch.slope.add(r)).fma(distance, V::load(s)).store(s);
                }
            }
        }
        let hidden = V::splat(f32::NEG_INFINITY);
        if tile.bad {
            for t in 0..tile.keys {
                if tile.k[t] == tile.zeros {
                    for r in (0..lanes).step_by(V::LANES) {
                        hidden.store(s.add(t * lanes + r));
                    }
                }
            }
        }
        for token in 0..job.tokens {
            let (from, to) = job.visible(token);
            let from = (from.saturating_sub(at) as usize).min(tile.keys);
            let to = (to.saturating_sub(at) as usize).min(tile.keys).max(from);
            if from == 0 && to == tile.keys {
                continue;
            }
            for t in (0..from).chain(to..tile.keys) {
                for head in 0..job.kv_heads {
                    let r = head * padded + token * job.group;
                    for r in r..r + job.group {
                        s.add(t * lanes + r).write(f32::NEG_INFINITY);
                    }
                }
            }
        }
    }
}

/// Turns scores into probabilities relative to the new maxima, in place, as weights of `W`; brings
/// `m` and `l` up to date and leaves in `grow` what older sums must be multiplied with.
#[inline(always)]
pub(in crate::cpu) unsafe fn soften<V: Vector, W: Weigh<V>>(scratch: &Scratch, keys: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let lanes = scratch.lanes;
        for r in (0..lanes).step_by(V::LANES) {
            let s = scratch.s.add(r);
            let old = V::load(scratch.m.add(r));
            let mut top = old;
            for t in 0..keys {
                top = top.max(V::load(s.add(t * lanes)));
            }
            // A finite stand-in where nothing has been seen: -inf less it is still -inf.
            let finite = top.max(V::splat(f32::MIN));
            let mut sum = V::splat(0.0);
            for t in (0..keys).step_by(W::KEYS) {
                let first = exp(V::load(s.add(t * lanes)).sub(finite));
                sum = sum.add(first);
                let mut last = V::splat(0.0);
                if W::KEYS > 1 && t + 1 < keys {
                    last = exp(V::load(s.add((t + 1) * lanes)).sub(finite));
                    sum = sum.add(last);
                }
                // Never past what has been read.
                W::store_weights(first, last, s.add(t / W::KEYS * lanes));
            }
            let grow = exp(old.sub(finite));
            V::load(scratch.l.add(r)).fma(grow, sum).store(scratch.l.add(r));
            grow.store(scratch.grow.add(r));
            top.store(scratch.m.add(r));
        }
    }
}
