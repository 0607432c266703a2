//! The kernel for few query rows: one pass over K and V, bound by the memory they come from.
//!
//! Keys go by in tiles. For each: dot products of all rows with four keys at a time, the online
//! softmax over the tile, and the values added up with the probabilities.
//!
//! Hardware prefetchers cannot foresee the next block of a table, so every line is prefetched in
//! software, and twice: a prefetch is dropped where the queue of misses is full, and arithmetic
//! that outruns the memory keeps it full. The first hint comes a tile ahead of use, the second
//! half a tile. Farther ahead, one line a page brings in the address translations.

use super::dot::KeyDot;
use super::job::{Blocks, Job};
use super::math::{exp, tanh};
use super::vector::{Stored, Vector, prefetch};

/// The most query rows of one job of this kernel.
pub(crate) const DECODE_ROWS: usize = 8;
/// The most keys of a tile.
const TILE: usize = 64;
/// Bytes of K that a tile aims at: a third of a first-level cache.
const TILE_BYTES: usize = 8 << 10;
/// Row lengths in scratch are multiples of this many f32: two of the widest vectors.
const PAD: usize = 32;
/// Tiles between the look-up of translations and use.
const WARM_TILES: u32 = 4;
/// Shorter runs than this many tokens are not looked up for translations.
const WARM_RUN: u32 = 16;

/// Bytes of scratch that a job needs.
pub(crate) const fn scratch_bytes(k_dim: usize, v_dim: usize) -> usize {
    let zeros = if k_dim > v_dim { k_dim } else { v_dim };
    (DECODE_ROWS * (pad(k_dim) + pad(v_dim) + TILE) + pad(k_dim) + pad(zeros)) * 4
}

const fn pad(n: usize) -> usize {
    n.next_multiple_of(PAD)
}

/// Attention of all rows of a job that has at most [`DECODE_ROWS`].
///
/// # Safety
/// As for [`Kernel`](super::kernels::Kernel).
#[inline(always)]
pub(crate) unsafe fn decode<V: Vector, S: Stored, D: KeyDot<V>>(job: &Job<'_>) {
    // SAFETY: the caller's promise.
    unsafe {
        match job.rows() {
            0 => {}
            1 => stream::<V, S, D, 1>(job),
            2 => stream::<V, S, D, 2>(job),
            _ => stream::<V, S, D, 4>(job),
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

    /// Looks up the keys from `at`, at most `keys` of them and none from `end`. The rest of the
    /// last group of four gets the address of `zeros`.
    ///
    /// # Safety
    /// As for [`Blocks::segment`].
    #[inline(always)]
    unsafe fn fill(&mut self, blocks: &Blocks<'_>, at: u32, end: u32, keys: usize) {
        self.keys = (end.saturating_sub(at) as usize).min(keys);
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

/// The kernel, its rows in groups of `R`; rows past the last are zeros.
#[inline(always)]
unsafe fn stream<V: Vector, S: Stored, D: KeyDot<V>, const R: usize>(job: &Job<'_>) {
    // SAFETY: the caller's promise; scratch has `scratch_bytes`, cut up here.
    unsafe {
        let rows = job.rows();
        let padded = rows.next_multiple_of(R);
        let (k_pad, v_pad) = (pad(job.k_dim), pad(job.v_dim));
        let q = job.scratch.cast::<f32>();
        let o = q.add(DECODE_ROWS * k_pad);
        let s = o.add(DECODE_ROWS * v_pad);
        let row = s.add(DECODE_ROWS * TILE);
        let zeros = row.add(k_pad);
        core::ptr::write_bytes(o, 0, padded * v_pad);
        core::ptr::write_bytes(row, 0, k_pad);
        core::ptr::write_bytes(zeros, 0, pad(job.k_dim.max(job.v_dim)));
        let q_bytes = k_pad * D::QUERY_BYTES;
        let q = q.cast::<u8>();
        for r in 0..padded {
            if r < rows {
                Job::widen_row(job.q_dtype, job.q_row(r), job.k_dim, row);
            } else {
                core::ptr::write_bytes(row, 0, k_pad);
            }
            D::prepare(row, k_pad, q.add(r * q_bytes));
        }
        let zeros = zeros.cast_const().cast::<u8>();
        let (mut m, mut l) = ([f32::NEG_INFINITY; DECODE_ROWS], [0.0f32; DECODE_ROWS]);

        let keys = (TILE_BYTES / (job.k_dim * S::BYTES)).clamp(16, TILE) / 16 * 16;
        let (mut now, mut next) = (Tile::empty(zeros), Tile::empty(zeros));
        now.fill(&job.blocks, job.kv_start, job.kv_end, keys);
        let mut at = job.kv_start;
        while at < job.kv_end {
            let after = at.saturating_add(keys as u32);
            if after < job.kv_end {
                next.fill(&job.blocks, after, job.kv_end, keys);
            } else if let Some(coming) = &job.coming {
                next.fill(&coming.blocks, coming.kv_start, coming.kv_end, keys);
            } else {
                next.keys = 0;
            }
            warm(job, at, keys as u32);
            for g in (0..padded).step_by(R) {
                let (q, s) = (q.add(g * q_bytes), s.add(g * TILE));
                scores::<V, S, D, R>(job, q, q_bytes, &now, &next, s, g == 0);
            }
            for r in 0..rows {
                let s = s.add(r * TILE);
                score::<V>(job, r, at, &now, s);
                let (top, grow) = soften::<V>(now.keys, s, m[r], &mut l[r]);
                if grow != 1.0 {
                    let (o, grow) = (o.add(r * v_pad), V::splat(grow));
                    for c in (0..v_pad).step_by(V::LANES) {
                        V::load(o.add(c)).mul(grow).store(o.add(c));
                    }
                }
                m[r] = top;
            }
            for g in (0..padded).step_by(R) {
                let (p, o) = (s.add(g * TILE), o.add(g * v_pad));
                values::<V, S, R>(job, p, &now, &next, o, v_pad, g == 0);
            }
            at = after;
            core::mem::swap(&mut now, &mut next);
        }
        for r in 0..rows {
            job.states.m.add(r).write(m[r]);
            job.states.l.add(r).write(l[r]);
            write_out::<V, S>(o.add(r * v_pad), job.states.o.add(r * job.v_dim), job.v_dim);
        }
    }
}

/// Copies an accumulated row, undoing the order in which pairs of vectors are loaded.
#[inline(always)]
unsafe fn write_out<V: Vector, S: Stored>(from: *const f32, to: *mut f32, dim: usize) {
    // SAFETY: the caller's promise; `from` is padded to whole pairs of vectors.
    unsafe {
        if !S::EVEN_ODD {
            return core::ptr::copy_nonoverlapping(from, to, dim);
        }
        for c in (0..dim).step_by(2) {
            let (pair, i) = (c / (2 * V::LANES) * 2 * V::LANES, c % (2 * V::LANES) / 2);
            to.add(c).write(from.add(pair + i).read());
            to.add(c + 1).write(from.add(pair + V::LANES + i).read());
        }
    }
}

/// Prefetches a line of each run of the tile [`WARM_TILES`] ahead, for its address translation.
#[inline(always)]
unsafe fn warm(job: &Job<'_>, at: u32, keys: u32) {
    if job.blocks.block_tokens < WARM_RUN {
        return;
    }
    let from = at.saturating_add(WARM_TILES * keys);
    let (blocks, mut from, end) = match &job.coming {
        _ if from < job.kv_end => (&job.blocks, from, job.kv_end),
        Some(coming) => {
            (&coming.blocks, coming.kv_start.saturating_add(from - job.kv_end), coming.kv_end)
        }
        None => return,
    };
    let end = end.min(from.saturating_add(keys));
    while from < end {
        // SAFETY: `from < end`, which is within the sequence.
        let run = unsafe { blocks.segment(from, end) };
        prefetch(run.k);
        prefetch(run.v);
        from += run.tokens as u32;
    }
}

/// Prefetches a row of `bytes`.
#[inline(always)]
fn fetch(row: *const u8, bytes: usize) {
    let mut at = 0;
    while at < bytes {
        prefetch(row.wrapping_add(at));
        at += 64;
    }
}

/// Dot products of `R` rows with the keys of a tile, four at a time, to `s[r][key]`.
#[inline(always)]
unsafe fn scores<V: Vector, S: Stored, D: KeyDot<V>, const R: usize>(
    job: &Job<'_>,
    q: *const u8,
    q_bytes: usize,
    now: &Tile,
    next: &Tile,
    s: *mut f32,
    ahead: bool,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let step = 2 * V::LANES;
        let (k_dim, whole) = (job.k_dim, job.k_dim - job.k_dim % step);
        let (k_bytes, v_bytes) = (job.k_dim * S::BYTES, job.v_dim * S::BYTES);
        let (more, v_too) = (ahead && next.keys != 0, ahead && !job.v_in_k);
        let mut t = 0;
        while t < now.keys {
            let k = [now.k[t], now.k[t + 1], now.k[t + 2], now.k[t + 3]];
            for j in t..t + 4 {
                if v_too {
                    fetch(now.v[j], v_bytes);
                }
                if more {
                    fetch(next.k[j], k_bytes);
                }
            }
            let mut acc = [[V::splat(0.0); 4]; R];
            let mut c = 0;
            while c < whole {
                let at = c * S::BYTES;
                let keys = [
                    D::load(k[0].add(at)),
                    D::load(k[1].add(at)),
                    D::load(k[2].add(at)),
                    D::load(k[3].add(at)),
                ];
                for r in 0..R {
                    let q = D::load_query(q.add(r * q_bytes + c * D::QUERY_BYTES));
                    for j in 0..4 {
                        acc[r][j] = D::dot(acc[r][j], q, keys[j]);
                    }
                }
                c += step;
            }
            if whole < k_dim {
                for j in 0..4 {
                    let key = D::load_part(k[j].add(whole * S::BYTES), k_dim - whole);
                    for r in 0..R {
                        let q = D::load_query(q.add(r * q_bytes + whole * D::QUERY_BYTES));
                        acc[r][j] = D::dot(acc[r][j], q, key);
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
        for t in to.max(from)..keys.next_multiple_of(16) {
            s.add(t).write(f32::NEG_INFINITY);
        }
    }
}

/// Turns scores into probabilities relative to the new maximum, in place; returns it and the
/// factor that brings older sums to it.
#[inline(always)]
unsafe fn soften<V: Vector>(keys: usize, s: *mut f32, m: f32, l: &mut f32) -> (f32, f32) {
    // SAFETY: the caller's promise.
    unsafe {
        let keys = keys.next_multiple_of(16);
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
    job: &Job<'_>,
    p: *const f32,
    now: &Tile,
    next: &Tile,
    o: *mut f32,
    v_pad: usize,
    ahead: bool,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let (step, width) = (4 * V::LANES, 4 * V::LANES * S::BYTES);
        let (k_bytes, v_bytes) = (job.k_dim * S::BYTES, job.v_dim * S::BYTES);
        let (more, v_too) = (ahead && next.keys != 0, !job.v_in_k);
        let passes = (job.v_dim / step).max(1);
        let mut c = 0;
        while c + step <= job.v_dim {
            let mut acc = [[V::splat(0.0); 4]; R];
            for r in 0..R {
                for j in 0..4 {
                    acc[r][j] = V::load(o.add(r * v_pad + c + j * V::LANES));
                }
            }
            let at = c * S::BYTES;
            for t in 0..now.keys {
                // Rows in the order of memory, spread over all channels' passes.
                if more && (c / step * now.keys + t) % passes == 0 {
                    let row = (c / step * now.keys + t) / passes;
                    fetch(next.k[row], k_bytes);
                    if v_too {
                        fetch(next.v[row], v_bytes);
                    }
                }
                let row = now.v[t].add(at);
                let low = S::load2::<V>(row);
                let high = S::load2::<V>(row.add(width / 2));
                let v = [low[0], low[1], high[0], high[1]];
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
            c += step;
        }
        while c < job.v_dim {
            let n = job.v_dim - c;
            let mut acc = [[V::splat(0.0); 2]; R];
            for r in 0..R {
                for j in 0..2 {
                    acc[r][j] = V::load(o.add(r * v_pad + c + j * V::LANES));
                }
            }
            for t in 0..now.keys {
                let row = now.v[t].add(c * S::BYTES);
                let v =
                    if n < 2 * V::LANES { S::load2_part::<V>(row, n) } else { S::load2::<V>(row) };
                for r in 0..R {
                    let p = V::splat(p.add(r * TILE + t).read());
                    for j in 0..2 {
                        acc[r][j] = p.fma(v[j], acc[r][j]);
                    }
                }
            }
            for r in 0..R {
                for j in 0..2 {
                    acc[r][j].store(o.add(r * v_pad + c + j * V::LANES));
                }
            }
            c += 2 * V::LANES;
        }
    }
}
