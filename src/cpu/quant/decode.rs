//! Attention of few query rows over codes: the kernel of `cpu::decode`, whose keys and values are
//! expanded to f32 a few rows at a time, in the first-level cache, and used there by all rows of
//! their head.

use super::expand::expand;
use super::turn::rotate;
use super::vector::CodeVector;
use crate::cpu::decode::{
    Hints, OneByOne, PIECE, Part, Rows, Scratch, Side, Silent, TILE, Tile, Walk, add_values,
    adjust, four_keys, pad, padded_rows, soften,
};
use crate::cpu::dot::{KeyDot, Widened};
use crate::cpu::job::{Blocks, Job};
use crate::cpu::vector::prefetch_far;

/// Query rows of a job in f32, rotated as its keys were.
///
/// # Safety
/// As for [`Scratch::query`].
#[inline(always)]
pub(in crate::cpu) unsafe fn query<V: CodeVector>(
    scratch: &Scratch,
    job: &Job<'_>,
    head: usize,
    r: usize,
) -> *mut f32 {
    // SAFETY: the caller's promise; the parts are the row's.
    unsafe {
        let row = scratch.query::<V>(job, head, r);
        if job.coding.k_rotated {
            rotate_parts::<V>(row, job.coding.k_first, job.k_dim);
        }
        row
    }
}

/// Rotates the parts of a key or query.
///
/// # Safety
/// As for [`rotate`].
#[inline(always)]
pub(super) unsafe fn rotate_parts<V: CodeVector>(row: *mut f32, first: usize, dim: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        rotate::<V>(row, first);
        if first < dim {
            rotate::<V>(row.add(first), dim - first);
        }
    }
}

/// Attention of all rows of a job, as [`decode`](crate::cpu::decode::decode).
///
/// # Safety
/// As for [`Kernel`](crate::cpu::kernels::Kernel).
#[inline(always)]
pub(in crate::cpu) unsafe fn decode<V: CodeVector, const R: usize>(job: &Job<'_>) {
    // SAFETY: the caller's promise; scratch has `scratch_bytes`, cut up here.
    unsafe {
        let padded = padded_rows(job.rows());
        let scratch = Scratch::new::<V>(job, padded, <Widened<f32> as KeyDot<V>>::QUERY_BYTES);
        for head in 0..job.kv_heads {
            for r in 0..padded {
                let row = query::<V>(&scratch, job, head, r);
                let at = head * padded + r;
                let to = scratch.q.add(at * scratch.q_bytes);
                <Widened<f32> as KeyDot<V>>::prepare(row, pad(job.k_dim), to);
            }
        }
        let format = job.coding.format;
        let bytes = |dim: usize| format.row_bytes(dim as u32) as usize;
        let bytes = (bytes(job.k_dim), bytes(job.v_dim));
        let mut walk = Walk::new(job, scratch.zeros.cast_const().cast::<u8>(), bytes, true);
        let mut scales = Tile { long: true, ..Tile::empty(walk.now.zeros) };
        let mut at = job.kv_start;
        while at < job.kv_end {
            let after = walk.look_ahead(at);
            scales.fill(&job.blocks.scales(), at, job.kv_end);
            expect_scales(job, after);
            scores::<V, R>(&walk, &scales, &scratch, padded);
            adjust::<V>(job, &scratch, &walk.now, at, padded);
            soften::<V, OneByOne<f32>>(&scratch, walk.now.keys);
            for r in 0..job.kv_heads * padded {
                let grow = scratch.grow.add(r).read();
                if grow != 1.0 {
                    let (o, grow) = (scratch.o.add(r * scratch.v_pad), V::splat(grow));
                    for c in (0..scratch.v_pad).step_by(V::LANES) {
                        V::load(o.add(c)).mul(grow).store(o.add(c));
                    }
                }
            }
            values::<V, R>(&walk, &scales, &scratch, padded);
            at = after;
            core::mem::swap(&mut walk.now, &mut walk.next);
        }
        scratch.put_states(job, padded);
    }
}

/// The most bytes of a head's scales that are prefetched for one run of tokens.
const SCALE_BYTES: usize = 512;

/// Prefetches the scales of the tile from key `at` on, or where the job ends there of the first tile
/// of what comes after it. They are few lines in a place of their own; to the second-level cache, as
/// keys of all heads pass through the first before they are read.
///
/// # Safety
/// As for [`Blocks::segment`] where `at` is a key of the job.
#[inline(always)]
pub(in crate::cpu) unsafe fn expect_scales(job: &Job<'_>, at: u32) {
    let (scales, mut at, end): (Blocks<'_>, _, _) = match &job.coming {
        _ if at < job.kv_end => (job.blocks.scales(), at, job.kv_end),
        Some(coming) => (coming.blocks.scales(), coming.kv_start, coming.kv_end),
        None => return,
    };
    let end = end.min(at.saturating_add(TILE as u32));
    while at < end {
        // SAFETY: the caller's promise.
        let run = unsafe { scales.segment(at, end) };
        if !run.k.is_null() {
            let lines = |token_bytes: isize| {
                (0..(run.tokens * token_bytes.unsigned_abs()).min(SCALE_BYTES)).step_by(64)
            };
            for head in 0..job.kv_heads as isize {
                let k = run.k.wrapping_offset(head * job.k_scale_head_bytes);
                let v = run.v.wrapping_offset(head * job.v_scale_head_bytes);
                lines(scales.k_token_bytes).for_each(|line| prefetch_far(k.wrapping_add(line)));
                lines(scales.v_token_bytes).for_each(|line| prefetch_far(v.wrapping_add(line)));
            }
        }
        at += run.tokens as u32;
    }
}

/// Dot products of all rows with the keys of the tile at hand, four keys at a time.
#[inline(always)]
unsafe fn scores<V: CodeVector, const R: usize>(
    walk: &Walk<'_, '_>,
    scales: &Tile,
    scratch: &Scratch,
    padded: usize,
) {
    let (job, now) = (walk.job, &walk.now);
    let (k_dim, k_pad) = (job.k_dim, pad(job.k_dim));
    let zeros = now.zeros;
    for head in 0..job.kv_heads {
        let offset = head as isize * job.k_head_bytes;
        let scale_offset = head as isize * job.k_scale_head_bytes;
        // SAFETY: the caller's promise.
        let code = unsafe { job.coding.keys(head) };
        for piece in 0..Walk::pieces(now) {
            let mut hints = Hints::new(walk, Side::Keys, head, piece, usize::MAX, false);
            let mut t = piece * PIECE;
            let end = now.keys.min(t + PIECE);
            while t < end {
                hints.rows(4);
                let mut k = [zeros; 4];
                for j in 0..4 {
                    if now.k[t + j] != zeros {
                        // SAFETY: the key is readable, and so are its scales; the room has rows.
                        unsafe {
                            let to = scratch.room.add(j * k_pad);
                            let codes = now.row(now.k[t + j], offset);
                            let scale = scales.row(scales.k[t + j], scale_offset);
                            expand::<V>(&code, codes, scale, k_dim, to);
                            k[j] = to.cast_const().cast();
                        }
                    }
                }
                for r in (head * padded..(head + 1) * padded).step_by(R) {
                    // SAFETY: the caller's promise.
                    unsafe {
                        let q = scratch.q.add(r * scratch.q_bytes);
                        let s = scratch.s.add(t * scratch.lanes + r);
                        let (bytes, lanes) = (scratch.q_bytes, scratch.lanes);
                        let none = &mut Silent;
                        if k_dim == 128 {
                            four_keys::<V, Widened<f32>, R, _>(128, q, bytes, k, s, lanes, none);
                        } else {
                            four_keys::<V, Widened<f32>, R, _>(k_dim, q, bytes, k, s, lanes, none);
                        }
                    }
                }
                t += 4;
            }
        }
    }
}

/// Adds the values of the tile at hand, weighted by the probabilities, to `o`.
#[inline(always)]
unsafe fn values<V: CodeVector, const R: usize>(
    walk: &Walk<'_, '_>,
    scales: &Tile,
    scratch: &Scratch,
    padded: usize,
) {
    let (job, now) = (walk.job, &walk.now);
    let (v_dim, v_pad) = (job.v_dim, scratch.v_pad);
    let step = 4 * V::LANES;
    for head in 0..job.kv_heads {
        // SAFETY: the caller's promise.
        let (offset, scale_offset, code) = unsafe {
            if job.v_in_k {
                let scales = job.k_scale_head_bytes;
                (job.k_head_bytes, scales, job.coding.keys(head))
            } else {
                (job.v_head_bytes, job.v_scale_head_bytes, job.coding.values(head))
            }
        };
        let (offset, scale_offset) = (head as isize * offset, head as isize * scale_offset);
        for from in (0..now.keys).step_by(PIECE) {
            let keys = now.keys.min(from + PIECE) - from;
            let mut hints = if job.v_in_k {
                Hints::NONE
            } else {
                Hints::new(walk, Side::Values, head, from / PIECE, usize::MAX, false)
            };
            let (mut rows, mut none) = (Tile::empty(now.zeros), Silent);
            for i in 0..keys {
                hints.rows(1);
                if now.v[from + i] != now.zeros {
                    // SAFETY: the value is readable, and so are its scales; the room has rows.
                    unsafe {
                        let to = scratch.room.add(i * v_pad);
                        let codes = now.row(now.v[from + i], offset);
                        let scale = scales.row(scales.v[from + i], scale_offset);
                        expand::<V>(&code, codes, scale, v_dim, to);
                        rows.v[i] = to.cast_const().cast();
                    }
                }
            }
            for r in (head * padded..(head + 1) * padded).step_by(R) {
                // SAFETY: the caller's promise.
                unsafe {
                    let part = Part {
                        rows: Rows { tile: &rows, offset: 0 },
                        p: scratch.s.add(from * scratch.lanes + r),
                        lanes: scratch.lanes,
                        o: scratch.o.add(r * v_pad),
                        v_pad,
                    };
                    let mut c = 0;
                    while c + step <= v_dim {
                        add_values::<V, OneByOne<f32>, R, 2, _, _>(
                            &part,
                            0..keys,
                            c,
                            step,
                            &mut none,
                        );
                        c += step;
                    }
                    while c < v_dim {
                        let n = (v_dim - c).min(2 * V::LANES);
                        add_values::<V, OneByOne<f32>, R, 1, _, _>(&part, 0..keys, c, n, &mut none);
                        c += n;
                    }
                }
            }
        }
    }
}
