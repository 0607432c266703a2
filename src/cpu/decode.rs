//! The kernel for few query rows: one pass over K and V, bound by the memory they come from.
//!
//! Keys go by in tiles. For each: dot products of all rows with four keys at a time, the online
//! softmax over the tile, and the values added up with the probabilities. The rows of the next
//! tile are prefetched meanwhile, across block boundaries, which the hardware cannot foresee.

use super::job::{Blocks, Job};
use super::math::{exp, tanh};
use super::vector::{Stored, Vector, prefetch};

/// The most query rows of one job of this kernel.
pub(crate) const DECODE_ROWS: usize = 8;
/// Keys of a tile.
const TILE: usize = 64;
/// Row lengths in scratch are multiples of this many f32: a cache line, and the widest vector.
const PAD: usize = 16;

/// Bytes of scratch that a job needs.
pub(crate) const fn scratch_bytes(k_dim: usize, v_dim: usize) -> usize {
    let zeros = if k_dim > v_dim { k_dim } else { v_dim };
    (DECODE_ROWS * (pad(k_dim) + pad(v_dim) + TILE) + pad(zeros)) * 4
}

const fn pad(n: usize) -> usize {
    n.next_multiple_of(PAD)
}

/// Attention of all rows of a job that has at most [`DECODE_ROWS`].
///
/// # Safety
/// As for [`Kernel`](super::kernels::Kernel).
#[inline(always)]
pub(crate) unsafe fn decode<V: Vector, S: Stored>(job: &Job<'_>) {
    // SAFETY: the caller's promise.
    unsafe { decode_rows::<V, S>(job, 0, job.rows()) }
}

/// Attention of the rows `row..row + rows` of a job, at most [`DECODE_ROWS`].
///
/// # Safety
/// As for [`Kernel`](super::kernels::Kernel), and the rows must be the job's.
#[inline(always)]
pub(crate) unsafe fn decode_rows<V: Vector, S: Stored>(job: &Job<'_>, row: usize, rows: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match rows {
            0 => {}
            1 => stream::<V, S, 1, 1>(job, row, rows),
            2 => stream::<V, S, 2, 1>(job, row, rows),
            3 | 4 => stream::<V, S, 4, 1>(job, row, rows),
            _ => stream::<V, S, 4, 2>(job, row, rows),
        }
    }
}

/// Row addresses of one tile.
struct Tile {
    k: [*const u8; TILE],
    v: [*const u8; TILE],
    /// Keys in the tile.
    keys: usize,
    /// Some of them lie in bad blocks; those have the address of `zeros`.
    bad: bool,
    /// As long as the longest row.
    zeros: *const u8,
}

impl Tile {
    #[inline(always)]
    fn empty(zeros: *const u8) -> Self {
        Tile { k: [zeros; TILE], v: [zeros; TILE], keys: 0, bad: false, zeros }
    }

    /// Whether key `t` lies in a bad block.
    #[inline(always)]
    fn masked(&self, t: usize) -> bool {
        self.k[t] == self.zeros
    }

    /// Looks up the keys from `at`, at most a tile of them and none from `end`. The rest of the
    /// last group of four gets the address of `zeros`.
    ///
    /// # Safety
    /// As for [`Blocks::segment`].
    #[inline(always)]
    unsafe fn fill(&mut self, blocks: &Blocks<'_>, at: u32, end: u32) {
        self.keys = (end.saturating_sub(at) as usize).min(TILE);
        self.bad = false;
        let mut i = 0;
        while i < self.keys {
            // SAFETY: `at + i < end`.
            let run = unsafe { blocks.segment(at + i as u32, at + self.keys as u32) };
            let (mut k, mut v) = (run.k, run.v);
            let (mut k_step, mut v_step) = (blocks.k_token_bytes, blocks.v_token_bytes);
            if k.is_null() {
                self.bad = true;
                (k, v, k_step, v_step) = (self.zeros, self.zeros, 0, 0);
            }
            for j in i..i + run.tokens {
                self.k[j] = k;
                self.v[j] = v;
                k = k.wrapping_offset(k_step);
                v = v.wrapping_offset(v_step);
            }
            i += run.tokens;
        }
        while i % 4 != 0 {
            self.k[i] = self.zeros;
            self.v[i] = self.zeros;
            i += 1;
        }
    }
}

/// The kernel for up to `R * G` rows: `G` groups of `R`, rows past `rows` being zeros.
#[inline(always)]
unsafe fn stream<V: Vector, S: Stored, const R: usize, const G: usize>(
    job: &Job<'_>,
    row: usize,
    rows: usize,
) {
    // SAFETY: the caller's promise; scratch has `scratch_bytes`, cut up here.
    unsafe {
        let (k_pad, v_pad) = (pad(job.k_dim), pad(job.v_dim));
        let q = job.scratch.cast::<f32>();
        let o = q.add(DECODE_ROWS * k_pad);
        let s = o.add(DECODE_ROWS * v_pad);
        let zeros = s.add(DECODE_ROWS * TILE);
        core::ptr::write_bytes(q, 0, R * G * k_pad);
        core::ptr::write_bytes(o, 0, R * G * v_pad);
        core::ptr::write_bytes(zeros, 0, pad(job.k_dim.max(job.v_dim)));
        for r in 0..rows {
            Job::widen_row(job.q_dtype, job.q_row(row + r), job.k_dim, q.add(r * k_pad));
        }
        let zeros = zeros.cast_const().cast::<u8>();
        let (mut m, mut l) = ([f32::NEG_INFINITY; 8], [0.0f32; 8]);

        let (mut now, mut next) = (Tile::empty(zeros), Tile::empty(zeros));
        now.fill(&job.blocks, job.kv_start, job.kv_end);
        let mut at = job.kv_start;
        while at < job.kv_end {
            next.fill(&job.blocks, at.saturating_add(TILE as u32), job.kv_end);
            for g in 0..G {
                scores::<V, S, R>(
                    q.add(g * R * k_pad),
                    k_pad,
                    job.k_dim,
                    &now,
                    &next,
                    s.add(g * R * TILE),
                    g == 0,
                );
            }
            for r in 0..rows {
                let s = s.add(r * TILE);
                score::<V>(job, row + r, at, &now, s);
                let (top, grow) = soften::<V>(now.keys, s, m[r], &mut l[r]);
                if grow != 1.0 {
                    let (o, grow) = (o.add(r * v_pad), V::splat(grow));
                    for c in (0..v_pad).step_by(V::LANES) {
                        V::load(o.add(c)).mul(grow).store(o.add(c));
                    }
                }
                m[r] = top;
            }
            for g in 0..G {
                values::<V, S, R>(
                    s.add(g * R * TILE),
                    &now,
                    &next,
                    job.v_dim,
                    o.add(g * R * v_pad),
                    v_pad,
                    g == 0 && !job.v_in_k,
                );
            }
            at = at.saturating_add(TILE as u32);
            core::mem::swap(&mut now, &mut next);
        }
        for r in 0..rows {
            job.states.m.add(row + r).write(m[r]);
            job.states.l.add(row + r).write(l[r]);
            let to = job.states.o.add((row + r) * job.v_dim);
            core::ptr::copy_nonoverlapping(o.add(r * v_pad), to, job.v_dim);
        }
    }
}

/// Dot products of `R` rows with the keys of a tile, four at a time, to `s[r][key]`.
#[inline(always)]
unsafe fn scores<V: Vector, S: Stored, const R: usize>(
    q: *const f32,
    k_pad: usize,
    k_dim: usize,
    now: &Tile,
    next: &Tile,
    s: *mut f32,
    ahead: bool,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let whole = k_dim - k_dim % V::LANES;
        let mut t = 0;
        while t < now.keys {
            if ahead {
                prefetch_rows(&next.k, next.keys, t, k_dim * S::BYTES);
            }
            let k = [now.k[t], now.k[t + 1], now.k[t + 2], now.k[t + 3]];
            let mut acc = [[V::splat(0.0); 4]; R];
            let mut c = 0;
            while c < whole {
                let keys = [
                    S::load::<V>(k[0].add(c * S::BYTES)),
                    S::load::<V>(k[1].add(c * S::BYTES)),
                    S::load::<V>(k[2].add(c * S::BYTES)),
                    S::load::<V>(k[3].add(c * S::BYTES)),
                ];
                for r in 0..R {
                    let q = V::load(q.add(r * k_pad + c));
                    for j in 0..4 {
                        acc[r][j] = q.fma(keys[j], acc[r][j]);
                    }
                }
                c += V::LANES;
            }
            if whole < k_dim {
                let n = k_dim - whole;
                for j in 0..4 {
                    let key = S::load_part::<V>(k[j].add(whole * S::BYTES), n);
                    for r in 0..R {
                        acc[r][j] = V::load(q.add(r * k_pad + whole)).fma(key, acc[r][j]);
                    }
                }
            }
            for r in 0..R {
                V::sum4(acc[r], s.add(r * TILE + t));
            }
            t += 4;
        }
    }
}

/// Prefetches the rows `t..t + 4` of a tile.
#[inline(always)]
unsafe fn prefetch_rows(rows: &[*const u8; TILE], keys: usize, t: usize, bytes: usize) {
    if t < keys {
        for j in 0..4 {
            let mut at = 0;
            while at < bytes {
                prefetch(rows[t + j].wrapping_add(at));
                at += 64;
            }
        }
    }
}

/// Turns dot products into scores: scale, soft-cap, ALiBi; -inf for what the row must not see and
/// behind the last key to a multiple of the widest vector.
#[inline(always)]
unsafe fn score<V: Vector>(job: &Job<'_>, row: usize, at: u32, tile: &Tile, s: *mut f32) {
    let (from, to) = job.visible(row / job.group);
    let keys = tile.keys;
    let from = (from.saturating_sub(at) as usize).min(keys);
    let to = (to.saturating_sub(at) as usize).min(keys);
    // SAFETY: the caller's promise: `s` has a tile.
    unsafe {
        let scale = V::splat(job.scale);
        for t in (0..keys).step_by(V::LANES) {
            V::load(s.add(t)).mul(scale).store(s.add(t));
        }
        if let Some(cap) = job.softcap {
            let (cap, inverse) = (V::splat(cap), V::splat(1.0 / cap));
            for t in (0..keys).step_by(V::LANES) {
                tanh(V::load(s.add(t)).mul(inverse)).mul(cap).store(s.add(t));
            }
        }
        if let Some(slopes) = job.alibi {
            let slope = slopes[row % job.group];
            let position = job.q_pos + (row / job.group) as i64;
            let first = i64::from(at) - position;
            for t in 0..keys {
                *s.add(t) += slope * (first + t as i64) as f32;
            }
        }
        if tile.bad {
            for t in 0..keys {
                if tile.masked(t) {
                    s.add(t).write(f32::NEG_INFINITY);
                }
            }
        }
        for t in 0..from {
            s.add(t).write(f32::NEG_INFINITY);
        }
        for t in to.max(from)..keys.next_multiple_of(PAD) {
            s.add(t).write(f32::NEG_INFINITY);
        }
    }
}

/// Turns raw dot products into probabilities relative to the new maximum, in place; returns it
/// and the factor that brings older sums to it.
#[inline(always)]
unsafe fn soften<V: Vector>(keys: usize, s: *mut f32, m: f32, l: &mut f32) -> (f32, f32) {
    // SAFETY: the caller's promise.
    unsafe {
        let keys = keys.next_multiple_of(PAD);
        let mut top = V::splat(f32::NEG_INFINITY);
        for t in (0..keys).step_by(V::LANES) {
            top = top.max(V::load(s.add(t)));
        }
        let top = top.top().max(m);
        if top == f32::NEG_INFINITY {
            for t in (0..keys).step_by(V::LANES) {
                V::splat(0.0).store(s.add(t));
            }
            return (top, 1.0);
        }
        let mut sum = V::splat(0.0);
        for t in (0..keys).step_by(V::LANES) {
            let p = exp(V::load(s.add(t)).sub(V::splat(top)));
            p.store(s.add(t));
            sum = sum.add(p);
        }
        let grow = if m == top { 1.0 } else { exp(V::splat(m - top)).top() };
        *l = *l * grow + sum.sum();
        (top, grow)
    }
}

/// Adds the values of a tile, weighted by the probabilities of `R` rows, to `o[r]`.
#[inline(always)]
unsafe fn values<V: Vector, S: Stored, const R: usize>(
    p: *const f32,
    now: &Tile,
    next: &Tile,
    v_dim: usize,
    o: *mut f32,
    v_pad: usize,
    ahead: bool,
) {
    // SAFETY: the caller's promise.
    unsafe {
        if ahead {
            for t in (0..next.keys).step_by(4) {
                prefetch_rows(&next.v, next.keys, t, v_dim * S::BYTES);
            }
        }
        let mut c = 0;
        while c + 4 * V::LANES <= v_dim {
            let mut acc = [[V::splat(0.0); 4]; R];
            for r in 0..R {
                for j in 0..4 {
                    acc[r][j] = V::load(o.add(r * v_pad + c + j * V::LANES));
                }
            }
            for t in 0..now.keys {
                let row = now.v[t].add(c * S::BYTES);
                let v = [
                    S::load::<V>(row),
                    S::load::<V>(row.add(V::LANES * S::BYTES)),
                    S::load::<V>(row.add(2 * V::LANES * S::BYTES)),
                    S::load::<V>(row.add(3 * V::LANES * S::BYTES)),
                ];
                for r in 0..R {
                    let p = V::splat(p.add(r * TILE + t).read());
                    for j in 0..4 {
                        acc[r][j] = p.fma(v[j], acc[r][j]);
                    }
                }
            }
            for r in 0..R {
                for j in 0..4 {
                    acc[r][j].store(o.add(r * v_pad + c + j * V::LANES));
                }
            }
            c += 4 * V::LANES;
        }
        while c < v_dim {
            let n = v_dim - c;
            let mut acc = [V::splat(0.0); R];
            for r in 0..R {
                acc[r] = V::load(o.add(r * v_pad + c));
            }
            for t in 0..now.keys {
                let row = now.v[t].add(c * S::BYTES);
                let v = if n < V::LANES { S::load_part::<V>(row, n) } else { S::load::<V>(row) };
                for r in 0..R {
                    acc[r] = V::splat(p.add(r * TILE + t).read()).fma(v, acc[r]);
                }
            }
            for r in 0..R {
                acc[r].store(o.add(r * v_pad + c));
            }
            c += V::LANES;
        }
    }
}
