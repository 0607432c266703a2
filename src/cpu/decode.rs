//! The kernel for few query rows: one pass over K and V, bound by the memory they come from.
//!
//! A job covers several KV heads, because their rows lie side by side in a block. Keys go by in
//! tiles: the dot products of all heads with their keys, the online softmax with the rows of all
//! heads in the lanes, then the values of all heads weighted by the probabilities. So the memory is
//! walked in its own order: of a block, the keys of every head and then the values.

mod softmax;
pub(crate) mod values;
mod walk;

use softmax::{adjust, soften};
use values::{Weigh, values, write_out};
use walk::{Hints, PIECE, Side, TILE, Tile, Walk};

use super::dot::KeyDot;
use super::job::Job;
use super::vector::{Stored, Vector};
use crate::dtype::DType;

/// The most query rows of one KV head in a job of this kernel.
pub(crate) const DECODE_ROWS: usize = 8;
/// The most query rows of a job, those of each head padded by [`padded_rows`].
pub(crate) const JOB_ROWS: usize = 64;
/// Row lengths in scratch are multiples of this many f32: two of the widest vectors.
const PAD: usize = 32;
/// Values a row that the softmax keeps.
const ROW_VALUES: usize = 5;

/// Bytes of scratch that a job needs.
pub(crate) const fn scratch_bytes(k_dim: usize, v_dim: usize) -> usize {
    let longest = if k_dim > v_dim { k_dim } else { v_dim };
    (JOB_ROWS * (pad(k_dim) + pad(v_dim) + TILE + ROW_VALUES) + 2 * pad(longest)) * 4
}

const fn pad(n: usize) -> usize {
    n.next_multiple_of(PAD)
}

/// The rows that `rows` query rows of a KV head take in a job: they are worked on four at a time.
pub(crate) const fn padded_rows(rows: usize) -> usize {
    if rows < 3 { rows } else { rows.next_multiple_of(4) }
}

/// Attention of all rows of a job that has at most [`DECODE_ROWS`] a KV head and, padded,
/// [`JOB_ROWS`] in all.
///
/// # Safety
/// As for [`Kernel`](super::kernels::Kernel).
#[inline(always)]
pub(crate) unsafe fn decode<V: Vector, S: Stored, D: KeyDot<V>, W: Weigh<V>>(job: &Job<'_>) {
    // SAFETY: the caller's promise.
    unsafe {
        match job.rows() {
            0 => {}
            1 => stream::<V, S, D, W, 1>(job),
            2 => stream::<V, S, D, W, 2>(job),
            _ => stream::<V, S, D, W, 4>(job),
        }
    }
}

/// The parts of a job's scratch.
#[derive(Clone, Copy)]
struct Scratch {
    /// `[row][k_pad]` prepared queries.
    q: *mut u8,
    /// Bytes of a prepared query.
    q_bytes: usize,
    /// `[row][v_pad]` weighted values.
    o: *mut f32,
    v_pad: usize,
    /// `[key][lanes]` scores, then weights as [`Weigh`] has them.
    s: *mut f32,
    /// Rows, in whole vectors.
    lanes: usize,
    /// `[row]` largest score.
    m: *mut f32,
    /// `[row]` sum of probabilities.
    l: *mut f32,
    /// `[row]` factor of older sums.
    grow: *mut f32,
    /// `[row]` ALiBi slope.
    slope: *mut f32,
    /// `[row]` first key of the job less the query's position.
    distance: *mut f32,
}

/// The kernel: the rows of each head in groups of `R`; rows past a head's last are zeros.
#[inline(always)]
unsafe fn stream<V: Vector, S: Stored, D: KeyDot<V>, W: Weigh<V>, const R: usize>(job: &Job<'_>) {
    // SAFETY: the caller's promise; scratch has `scratch_bytes`, cut up here.
    unsafe {
        let (rows, padded) = (job.rows(), padded_rows(job.rows()));
        let (k_pad, v_pad) = (pad(job.k_dim), pad(job.v_dim));
        let longest = pad(job.k_dim.max(job.v_dim));
        let lanes = (job.kv_heads * padded).next_multiple_of(V::LANES);
        let base = job.scratch.cast::<f32>();
        let o = base.add(JOB_ROWS * k_pad);
        let s = o.add(JOB_ROWS * v_pad);
        let m = s.add(JOB_ROWS * TILE);
        let row = m.add(JOB_ROWS * ROW_VALUES);
        let zeros = row.add(longest);
        let scratch = Scratch {
            q: base.cast(),
            q_bytes: k_pad * D::QUERY_BYTES,
            o,
            v_pad,
            s,
            lanes,
            m,
            l: m.add(JOB_ROWS),
            grow: m.add(2 * JOB_ROWS),
            slope: m.add(3 * JOB_ROWS),
            distance: m.add(4 * JOB_ROWS),
        };
        core::ptr::write_bytes(o, 0, job.kv_heads * padded * v_pad);
        core::ptr::write_bytes(s, 0, lanes * TILE);
        core::ptr::write_bytes(m, 0, JOB_ROWS * ROW_VALUES);
        core::ptr::write_bytes(row, 0, 2 * longest);
        for r in 0..lanes {
            m.add(r).write(f32::NEG_INFINITY);
        }
        for head in 0..job.kv_heads {
            for r in 0..padded {
                let at = head * padded + r;
                if r < rows {
                    widen_query::<V>(job, head, r, row);
                    let position = job.q_pos + (r / job.group) as i64;
                    scratch.distance.add(at).write((i64::from(job.kv_start) - position) as f32);
                    if let Some(slopes) = job.alibi {
                        scratch.slope.add(at).write(slopes[head * job.group + r % job.group]);
                    }
                } else {
                    core::ptr::write_bytes(row, 0, k_pad);
                }
                D::prepare(row, k_pad, scratch.q.add(at * scratch.q_bytes));
            }
        }
        let zeros = zeros.cast_const().cast::<u8>();
        let mut walk = Walk {
            job,
            now: Tile::empty(zeros),
            next: Tile::empty(zeros),
            k_bytes: job.k_dim * S::BYTES,
            v_bytes: job.v_dim * S::BYTES,
        };
        walk.now.fill(&job.blocks, job.kv_start, job.kv_end);
        let mut at = job.kv_start;
        while at < job.kv_end {
            let after = at + walk.now.keys as u32;
            if after < job.kv_end {
                walk.next.fill(&job.blocks, after, job.kv_end);
            } else if let Some(coming) = &job.coming {
                walk.next.fill(&coming.blocks, coming.kv_start, coming.kv_end);
            } else {
                walk.next.keys = 0;
            }
            scores::<V, S, D, R>(&walk, &scratch, padded);
            adjust::<V>(job, &scratch, &walk.now, at, padded);
            soften::<V, W>(&scratch, walk.now.keys);
            for r in 0..job.kv_heads * padded {
                let grow = scratch.grow.add(r).read();
                if grow != 1.0 {
                    let (o, grow) = (o.add(r * v_pad), V::splat(grow));
                    for c in (0..v_pad).step_by(V::LANES) {
                        V::load(o.add(c)).mul(grow).store(o.add(c));
                    }
                }
            }
            values::<V, W, R>(&walk, &scratch, padded);
            at = after;
            core::mem::swap(&mut walk.now, &mut walk.next);
        }
        for head in 0..job.kv_heads {
            for r in 0..rows {
                let (from, to) = (head * padded + r, head * rows + r);
                job.states.m.add(to).write(m.add(from).read());
                job.states.l.add(to).write(scratch.l.add(from).read());
                let to = job.states.o.add(to * job.v_dim);
                write_out::<V, W>(o.add(from * v_pad), to, job.v_dim);
            }
        }
    }
}

/// Widens query row `r` of a head of the job to `to`, which has room for whole vectors.
#[inline(always)]
unsafe fn widen_query<V: Vector>(job: &Job<'_>, head: usize, r: usize, to: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe {
        let from = job.q_row(r).wrapping_offset((head * job.group) as isize * job.q_head_bytes);
        let whole = job.k_dim - job.k_dim % V::LANES;
        for c in (0..whole).step_by(V::LANES) {
            let x = match job.q_dtype {
                DType::F32 => V::load(from.cast::<f32>().add(c)),
                DType::F16 => V::load_f16(from.cast::<u16>().add(c)),
                DType::Bf16 => V::load_bf16(from.cast::<u16>().add(c)),
            };
            x.store(to.add(c));
        }
        if whole < job.k_dim {
            let n = job.k_dim - whole;
            let x = match job.q_dtype {
                DType::F32 => V::load_part(from.cast::<f32>().add(whole), n),
                DType::F16 => V::load_f16_part(from.cast::<u16>().add(whole), n),
                DType::Bf16 => V::load_bf16_part(from.cast::<u16>().add(whole), n),
            };
            x.store(to.add(whole));
        }
    }
}

/// Dot products of all rows with the keys of the tile at hand, four keys at a time, to
/// `s[key][row]`.
#[inline(always)]
unsafe fn scores<V: Vector, S: Stored, D: KeyDot<V>, const R: usize>(
    walk: &Walk<'_, '_>,
    scratch: &Scratch,
    padded: usize,
) {
    let (job, now) = (walk.job, &walk.now);
    let even = job.k_dim.is_multiple_of(2 * V::LANES) && 8 * V::LANES * S::BYTES >= 64;
    for head in 0..job.kv_heads {
        let offset = head as isize * job.k_head_bytes;
        for piece in 0..Walk::pieces(now) {
            let mut hints = Hints::new(walk, Side::Keys, head, piece, usize::MAX, even);
            let mut t = piece * PIECE;
            let end = now.keys.min(t + PIECE);
            while t < end {
                let k = [
                    now.row(now.k[t], offset),
                    now.row(now.k[t + 1], offset),
                    now.row(now.k[t + 2], offset),
                    now.row(now.k[t + 3], offset),
                ];
                hints.rows(4);
                // The first rows of a head send the hints for all.
                let mut hint = Some(&mut hints);
                for r in (head * padded..(head + 1) * padded).step_by(R) {
                    // SAFETY: the caller's promise.
                    unsafe {
                        let (k_dim, q_bytes) = (job.k_dim, scratch.q_bytes);
                        let q = scratch.q.add(r * q_bytes);
                        let s = scratch.s.add(t * scratch.lanes + r);
                        let hint = hint.take();
                        let lanes = scratch.lanes;
                        // The usual dimension as a constant, which unrolls the loop over channels.
                        if k_dim == 128 {
                            four_keys::<V, S, D, R>(128, q, q_bytes, k, s, lanes, hint);
                        } else {
                            four_keys::<V, S, D, R>(k_dim, q, q_bytes, k, s, lanes, hint);
                        }
                    }
                }
                t += 4;
            }
        }
    }
}

/// Dot products of `R` rows with four keys, to `s[key][row]`.
#[inline(always)]
unsafe fn four_keys<V: Vector, S: Stored, D: KeyDot<V>, const R: usize>(
    k_dim: usize,
    q: *const u8,
    q_bytes: usize,
    k: [*const u8; 4],
    s: *mut f32,
    lanes: usize,
    mut hints: Option<&mut Hints<'_>>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let step = 2 * V::LANES;
        let whole = k_dim - k_dim % step;
        let mut acc = [[V::splat(0.0); R]; 4];
        let mut c = 0;
        while c < whole {
            // Hints go out between the products: a burst of them would fill the queue.
            if let Some(hints) = &mut hints {
                hints.step(4 * step * S::BYTES / 64);
            }
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
                    acc[j][r] = D::dot(acc[j][r], q, keys[j]);
                }
            }
            c += step;
        }
        if whole < k_dim {
            for j in 0..4 {
                let key = D::load_part(k[j].add(whole * S::BYTES), k_dim - whole);
                for r in 0..R {
                    let q = D::load_query(q.add(r * q_bytes + whole * D::QUERY_BYTES));
                    acc[j][r] = D::dot(acc[j][r], q, key);
                }
            }
        }
        if R == 4 {
            for j in 0..4 {
                V::sum4([acc[j][0], acc[j][1 % R], acc[j][2 % R], acc[j][3 % R]], s.add(j * lanes));
            }
        } else {
            for r in 0..R {
                let mut sums = [0.0f32; 4];
                V::sum4([acc[0][r], acc[1][r], acc[2][r], acc[3][r]], sums.as_mut_ptr());
                for j in 0..4 {
                    s.add(j * lanes + r).write(sums[j]);
                }
            }
        }
    }
}
