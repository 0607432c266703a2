//! The kernel for few query rows: one pass over K and V, bound by the memory they come from.
//!
//! A job covers several KV heads, whose rows lie side by side in a block. Keys go by in tiles: dot
//! products of all heads, the softmax with all rows in the lanes, weighted values. So memory is
//! walked in its own order.

mod hints;
mod scores;
mod softmax;
mod values;
mod walk;

pub(super) use hints::{Hints, Silent};
#[cfg(target_arch = "x86_64")]
pub(super) use hints::{Pace, Straight};
pub(super) use scores::four_keys;
use scores::scores;
pub(super) use softmax::{adjust, soften};
#[cfg(target_arch = "x86_64")]
pub(super) use values::InPairs;
pub(super) use values::{OneByOne, Part, Rows, Weigh, add_values};
use values::{in_order, values};
pub(super) use walk::{PIECE, Side, TILE, Tile, Walk};

use super::dot::KeyDot;
use super::job::Job;
use super::kernels::Kernel;
use super::vector::Vector;
use crate::dtype::DType;

/// The most query rows of one KV head in a job of this kernel.
pub(crate) const DECODE_ROWS: usize = 8;
/// The most query rows of a job, those of each head padded by [`padded_rows`].
pub(crate) const JOB_ROWS: usize = 64;
/// Row lengths in scratch are multiples of this many f32: two of the widest vectors.
const PAD: usize = 32;
/// Values a row that the softmax keeps.
const ROW_VALUES: usize = 5;

/// Keys or values that may be decoded at a time, each at most the longest row.
pub(super) const ROOM_ROWS: usize = PIECE;
/// f32 beside them, for the keys of a tile.
pub(super) const ROOM_EXTRA: usize = 16 * TILE;

/// Bytes of scratch that a job needs.
pub(crate) const fn scratch_bytes(k_dim: usize, v_dim: usize) -> usize {
    let longest = if k_dim > v_dim { k_dim } else { v_dim };
    let rows = JOB_ROWS * (area(k_dim) + area(v_dim) + TILE + ROW_VALUES);
    (rows + (2 + ROOM_ROWS) * pad(longest) + ROOM_EXTRA) * 4
}

pub(super) const fn pad(n: usize) -> usize {
    n.next_multiple_of(PAD)
}

/// f32 that a row has in scratch at most: registers of bytes are filled.
const fn area(n: usize) -> usize {
    n.next_multiple_of(128)
}

/// The rows that `rows` query rows of a KV head take in a job: they are worked on four at a time.
pub(crate) const fn padded_rows(rows: usize) -> usize {
    if rows < 3 { rows } else { rows.next_multiple_of(4) }
}

/// Runs a job with the one of three kernels whose number of rows at a time fits its own: one, two or
/// four. They are functions of their own: inlined into one they were up to 400 KB of code, which
/// compiled slowly.
///
/// # Safety
/// As for [`Kernel`].
pub(crate) unsafe fn by_rows(job: &Job<'_>, kernels: [Kernel; 3]) {
    let [one, two, four] = kernels;
    // SAFETY: the caller's promise.
    unsafe {
        match job.rows() {
            0 => {}
            1 => one(job),
            2 => two(job),
            _ => four(job),
        }
    }
}

/// The parts of a job's scratch.
#[derive(Clone, Copy)]
pub(super) struct Scratch {
    /// `[row][k_pad]` prepared queries.
    pub q: *mut u8,
    /// Bytes of a prepared query.
    pub q_bytes: usize,
    /// `[row][v_pad]` weighted values.
    pub o: *mut f32,
    pub v_pad: usize,
    /// `[key][lanes]` scores, then weights as [`Weigh`] has them.
    pub s: *mut f32,
    /// Rows, in whole vectors.
    pub lanes: usize,
    /// `[row]` largest score.
    pub m: *mut f32,
    /// `[row]` sum of probabilities.
    pub l: *mut f32,
    /// `[row]` factor of older sums.
    pub grow: *mut f32,
    /// `[row]` ALiBi slope.
    pub slope: *mut f32,
    /// `[row]` first key of the job less the query's position.
    pub distance: *mut f32,
    /// One row, as long as the longest.
    pub row: *mut f32,
    /// As many zeros.
    pub zeros: *mut f32,
    /// [`ROOM_ROWS`] such rows and [`ROOM_EXTRA`] more, for what is decoded.
    pub room: *mut f32,
}

impl Scratch {
    /// Lays out the scratch of a job whose heads take `padded` rows each; nothing is seen yet.
    ///
    /// # Safety
    /// The job's scratch must have [`scratch_bytes`].
    #[inline(always)]
    pub unsafe fn new<V: Vector>(job: &Job<'_>, padded: usize, query_bytes: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let (k_pad, v_pad) = (pad(job.k_dim), pad(job.v_dim));
            let longest = pad(job.k_dim.max(job.v_dim));
            let lanes = (job.kv_heads * padded).next_multiple_of(V::LANES);
            let base = job.scratch.cast::<f32>();
            let o = base.add(JOB_ROWS * area(job.k_dim));
            let s = o.add(JOB_ROWS * area(job.v_dim));
            let m = s.add(JOB_ROWS * TILE);
            let row = m.add(JOB_ROWS * ROW_VALUES);
            let scratch = Scratch {
                q: base.cast(),
                q_bytes: k_pad * query_bytes,
                o,
                v_pad,
                s,
                lanes,
                m,
                l: m.add(JOB_ROWS),
                grow: m.add(2 * JOB_ROWS),
                slope: m.add(3 * JOB_ROWS),
                distance: m.add(4 * JOB_ROWS),
                row,
                zeros: row.add(longest),
                room: row.add(2 * longest),
            };
            core::ptr::write_bytes(o, 0, job.kv_heads * padded * v_pad);
            core::ptr::write_bytes(s, 0, lanes * TILE);
            core::ptr::write_bytes(m, 0, JOB_ROWS * ROW_VALUES);
            core::ptr::write_bytes(row, 0, 2 * longest);
            for r in 0..lanes {
                m.add(r).write(f32::NEG_INFINITY);
            }
            for head in 0..job.kv_heads {
                for r in 0..job.rows() {
                    let at = head * padded + r;
                    let position = job.q_pos + (r / job.group) as i64;
                    scratch.distance.add(at).write((i64::from(job.kv_start) - position) as f32);
                    if let Some(slopes) = job.alibi {
                        scratch.slope.add(at).write(slopes[head * job.group + r % job.group]);
                    }
                }
            }
            scratch
        }
    }

    /// Writes the states of all rows; `o` has its channels in order.
    ///
    /// # Safety
    /// As for [`new`](Self::new).
    #[inline(always)]
    pub unsafe fn put_states(&self, job: &Job<'_>, padded: usize) {
        let rows = job.rows();
        for head in 0..job.kv_heads {
            for r in 0..rows {
                let (from, to) = (head * padded + r, head * rows + r);
                // SAFETY: the caller's promise.
                unsafe {
                    job.states.m.add(to).write(self.m.add(from).read());
                    job.states.l.add(to).write(self.l.add(from).read());
                    let o = job.states.o.add(to * job.v_dim);
                    o.copy_from_nonoverlapping(self.o.add(from * self.v_pad), job.v_dim);
                }
            }
        }
    }

    /// Query row `r` of a head in f32, zeros past the head's last row.
    ///
    /// # Safety
    /// As for [`new`](Self::new).
    #[inline(always)]
    pub unsafe fn query<V: Vector>(&self, job: &Job<'_>, head: usize, r: usize) -> *mut f32 {
        // SAFETY: the caller's promise.
        unsafe {
            if r < job.rows() {
                widen_query::<V>(job, head, r, self.row);
            } else {
                core::ptr::write_bytes(self.row, 0, pad(job.k_dim));
            }
        }
        self.row
    }
}

/// Attention of all rows of a job that has at most [`DECODE_ROWS`] a KV head and, padded,
/// [`JOB_ROWS`] in all: the rows of each head in groups of `R`; rows past a head's last are zeros.
///
/// # Safety
/// As for [`Kernel`].
#[inline(always)]
pub(crate) unsafe fn decode<V: Vector, D: KeyDot<V>, W: Weigh<V>, const R: usize>(job: &Job<'_>) {
    // SAFETY: the caller's promise.
    unsafe {
        let padded = padded_rows(job.rows());
        let scratch = Scratch::new::<V>(job, padded, D::QUERY_BYTES);
        let (o, v_pad) = (scratch.o, scratch.v_pad);
        for head in 0..job.kv_heads {
            for r in 0..padded {
                let row = scratch.query::<V>(job, head, r);
                let at = head * padded + r;
                D::prepare(row, pad(job.k_dim), scratch.q.add(at * scratch.q_bytes));
            }
        }
        let bytes = (job.k_dim * D::BYTES, job.v_dim * W::BYTES);
        let mut walk = Walk::new(job, scratch.zeros.cast_const().cast::<u8>(), bytes, D::CODED);
        let mut at = job.kv_start;
        while at < job.kv_end {
            let after = walk.look_ahead(at);
            scores::<V, D, R>(&walk, &scratch, padded);
            if D::CODED && !job.coding.k_heads.is_null() {
                scale_scores::<V>(job, &scratch, walk.now.keys, padded);
            }
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
        if D::CODED {
            scale_sums::<V>(job, &scratch, padded);
        }
        if !W::IN_ORDER {
            for r in 0..job.kv_heads * padded {
                in_order::<V, W>(o.add(r * v_pad), scratch.row, job.v_dim);
            }
        }
        scratch.put_states(job, padded);
    }
}

/// Multiplies the scores of codes with the scales of their heads.
#[inline(always)]
unsafe fn scale_scores<V: Vector>(job: &Job<'_>, scratch: &Scratch, keys: usize, padded: usize) {
    let mut scales = [0.0f32; JOB_ROWS];
    // SAFETY: the caller's promise; heads have scales, and scores whole vectors.
    unsafe {
        for head in 0..job.kv_heads {
            scales[head * padded..(head + 1) * padded].fill(job.coding.keys(head).scale);
        }
        for r in (0..scratch.lanes).step_by(V::LANES) {
            let scale = V::load(scales.as_ptr().add(r));
            for t in 0..keys {
                let s = scratch.s.add(t * scratch.lanes + r);
                V::load(s).mul(scale).store(s);
            }
        }
    }
}

/// Multiplies the weighted sums of codes with the scales of their heads.
#[inline(always)]
unsafe fn scale_sums<V: Vector>(job: &Job<'_>, scratch: &Scratch, padded: usize) {
    // SAFETY: the caller's promise; sums are whole vectors.
    unsafe {
        for head in 0..job.kv_heads {
            let coding = &job.coding;
            let code = if job.v_in_k { coding.keys(head) } else { coding.values(head) };
            let scale = V::splat(code.scale);
            for r in head * padded..(head + 1) * padded {
                let o = scratch.o.add(r * scratch.v_pad);
                for c in (0..scratch.v_pad).step_by(V::LANES) {
                    V::load(o.add(c)).mul(scale).store(o.add(c));
                }
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
