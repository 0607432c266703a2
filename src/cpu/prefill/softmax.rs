//! The online softmax of one chunk of rows over one key tile.
//!
//! Scores are in units of ln 2, so that weights are powers of 2. Masked scores are -inf and their
//! weights exactly 0, so a row's sums do not depend on which masked keys share its tile.

use super::super::job::Job;
use super::super::math::{exp2, tanh};
use super::super::vector::Vector;
use super::Tile;
use super::operand::{Operand, TILE_HEIGHT};
use super::scratch::{CHUNK_ROWS, MAX_TILE_TOKENS, Scratch};

/// -inf, +inf, -inf: a window into it masks the columns before or after a given one.
static LADDER: [f32; 3 * MAX_TILE_TOKENS] = {
    let mut ladder = [f32::NEG_INFINITY; 3 * MAX_TILE_TOKENS];
    let mut i = MAX_TILE_TOKENS;
    while i < 2 * MAX_TILE_TOKENS {
        ladder[i] = f32::INFINITY;
        i += 1;
    }
    ladder
};

/// 0, 1, 2, ...
static COUNT: [f32; MAX_TILE_TOKENS] = {
    let mut count = [0.0; MAX_TILE_TOKENS];
    let mut i = 0;
    while i < MAX_TILE_TOKENS {
        count[i] = i as f32;
        i += 1;
    }
    count
};

/// The factor by which dot products are multiplied when they are stored.
#[inline(always)]
pub(super) fn score_factor(job: &Job<'_>) -> f32 {
    match job.softcap {
        Some(cap) => job.scale / cap,
        None => job.scale * core::f32::consts::LOG2_E,
    }
}

/// Soft-cap and ALiBi of one row's columns.
///
/// # Safety
/// As for [`chunk`].
#[inline(always)]
unsafe fn adjust<V: Vector>(
    job: &Job<'_>,
    tile: &Tile,
    row: usize,
    scores: *mut f32,
    (low, high): (usize, usize),
) {
    // SAFETY: the columns are the tile's.
    unsafe {
        let log2_e = core::f32::consts::LOG2_E;
        let slope = job.alibi.map_or(0.0, |slopes| slopes[row % job.group]) * log2_e;
        let position = job.q_pos + (row / job.group) as i64;
        let distance = V::splat((i64::from(tile.start) - position) as f32);
        let mut c = low;
        while c < high {
            let mut x = V::load(scores.add(c));
            if let Some(cap) = job.softcap {
                x = tanh(x).mul(V::splat(cap * log2_e));
            }
            if job.alibi.is_some() {
                let distance = distance.add(V::load(COUNT.as_ptr().add(c)));
                x = distance.fma(V::splat(slope), x);
            }
            x.store(scores.add(c));
            c += V::LANES;
        }
    }
}

/// Replaces the scores of the rows `first .. first + rows` by weights, and updates `m`, `l` and
/// `fade`. Register tiles that see nothing of the key tile are left alone.
///
/// # Safety
/// As for [`Kernel`](super::super::kernels::Kernel); the scores of the visible columns must have
/// been stored, up to a multiple of `2 * LANES` columns on both sides.
#[inline(always)]
pub(super) unsafe fn chunk<V: Vector, O: Operand<V>>(
    job: &Job<'_>,
    s: &Scratch,
    tile: &Tile,
    first: usize,
    rows: usize,
) {
    // SAFETY: `first + rows` are rows of the scratch, columns those of the tile.
    unsafe {
        let step = 2 * V::LANES;
        let mut block = 0;
        while block < rows {
            let (low, high) = tile.columns(s, first + block, first + block + TILE_HEIGHT - 1);
            if low == high {
                for r in block..block + TILE_HEIGHT {
                    s.top.add(r).write(s.m.add(first + r).read());
                }
                block += TILE_HEIGHT;
                continue;
            }
            let (low, high) = (low / step * step, high.next_multiple_of(step));
            for r in block..block + TILE_HEIGHT {
                let row = first + r;
                let scores = s.scores.add(r * s.tile_tokens);
                if job.softcap.is_some() || job.alibi.is_some() {
                    adjust::<V>(job, tile, row.min(job.rows() - 1), scores, (low, high));
                }
                let (from, to) = tile.columns(s, row, row);
                let (mut a, mut b) = (V::splat(f32::NEG_INFINITY), V::splat(f32::NEG_INFINITY));
                let mut c = low;
                if low < from || to < high || tile.any_bad {
                    let before = LADDER.as_ptr().add(MAX_TILE_TOKENS - from);
                    let after = LADDER.as_ptr().add(2 * MAX_TILE_TOKENS - to);
                    while c < high {
                        let x = V::load(scores.add(c))
                            .min(V::load(before.add(c)))
                            .min(V::load(after.add(c)))
                            .min(V::load(s.ceiling.add(c)));
                        x.store(scores.add(c));
                        a = a.max(x);
                        c += V::LANES;
                    }
                } else {
                    while c < high {
                        a = a.max(V::load(scores.add(c)));
                        b = b.max(V::load(scores.add(c + V::LANES)));
                        c += step;
                    }
                }
                let m = s.m.add(row).read();
                let top = a.max(b).top();
                s.top.add(r).write(if top > m { top } else { m });
            }
            block += TILE_HEIGHT;
        }

        let mut r = 0;
        while r < rows {
            let (old, new) = (V::load(s.m.add(first + r)), V::load(s.top.add(r)));
            // With nothing visible so far, any finite base gives weights of 0.
            let base = new.max(V::splat(f32::MIN));
            exp2(old.sub(base)).store(s.fade.add(r));
            base.store(s.top.add(r));
            new.store(s.m.add(first + r));
            r += V::LANES;
        }

        let mut block = 0;
        while block < rows {
            let (low, high) = tile.columns(s, first + block, first + block + TILE_HEIGHT - 1);
            if low == high {
                block += TILE_HEIGHT;
                continue;
            }
            let (low, high) = (low / step * step, high.next_multiple_of(step));
            for r in block..block + TILE_HEIGHT {
                let scores = s.scores.add(r * s.tile_tokens);
                let base = V::splat(s.top.add(r).read());
                let (mut a, mut b) = (V::splat(0.0), V::splat(0.0));
                let mut c = low;
                while c < high {
                    let x = exp2(V::load(scores.add(c)).sub(base));
                    let y = exp2(V::load(scores.add(c + V::LANES)).sub(base));
                    a = a.add(x);
                    b = b.add(y);
                    O::store_weights(x, y, scores.cast::<u32>().add(O::step_of(c)));
                    c += step;
                }
                let l = s.l.add(first + r);
                l.write(l.read() * s.fade.add(r).read() + a.add(b).sum());
            }
            block += TILE_HEIGHT;
        }
        debug_assert!(rows <= CHUNK_ROWS);
    }
}
