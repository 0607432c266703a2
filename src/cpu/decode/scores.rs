//! Queries and keys: the dot products of the decode kernel, to `s[key][row]` in scratch.
//!
//! Where keys of the usual length lie side by side, straight code; else key by key, wherever the tile
//! says. Both add up in the same order, so that it does not matter which of them a key meets.

use super::Scratch;
use super::hints::{Hints, Pace, Silent, Straight};
use super::walk::{PIECE, Side, UNIT, Walk};
use crate::cpu::dot::KeyDot;
use crate::cpu::vector::Vector;

/// Dot products of all rows with the keys of the tile at hand, to `s[key][row]`.
#[inline(always)]
pub(super) unsafe fn scores<V: Vector, D: KeyDot<V>, const R: usize>(
    walk: &Walk<'_, '_>,
    scratch: &Scratch,
    padded: usize,
) {
    let (job, now) = (walk.job, &walk.now);
    let even = job.k_dim.is_multiple_of(D::CHANNELS) && D::KEYS * D::CHANNELS * D::BYTES >= 64;
    for head in 0..job.kv_heads {
        let offset = head as isize * job.k_head_bytes;
        let run = if even && job.k_dim == 128 { walk.run(Side::Keys, head) } else { None };
        for piece in 0..Walk::pieces(now) {
            if let Some(run) = run {
                // SAFETY: the caller's promise.
                if unsafe { scores_of_run::<V, D, R>(walk, scratch, head, piece, run, padded) } {
                    continue;
                }
            }
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
                        let (mut hint, lanes) = (hint.take(), scratch.lanes);
                        // The usual dimension as a constant, which unrolls the loop over channels.
                        if k_dim == 128 {
                            four_keys::<V, D, R, _>(128, q, q_bytes, k, s, lanes, &mut hint);
                        } else {
                            four_keys::<V, D, R, _>(k_dim, q, q_bytes, k, s, lanes, &mut hint);
                        }
                    }
                }
                t += 4;
            }
        }
    }
}

/// Dot products of a head's rows with a piece of keys of 128 channels that is part of a run of
/// memory, to `s[key][row]`: straight code, for the shape that most models have. Whether it did: not
/// where there are no hints.
#[inline(always)]
unsafe fn scores_of_run<V: Vector, D: KeyDot<V>, const R: usize>(
    walk: &Walk<'_, '_>,
    scratch: &Scratch,
    head: usize,
    piece: usize,
    run: *const u8,
    padded: usize,
) -> bool {
    let (row, bytes, lanes) = (128 * D::BYTES, scratch.q_bytes, scratch.lanes);
    // SAFETY: the caller's promise.
    unsafe {
        let q = scratch.q.add(head * padded * bytes);
        let s = scratch.s.add(head * padded);
        for unit in 2 * piece..2 * piece + 2 {
            let Some(mut hints) = walk.straight(Side::Keys, head, unit) else { return false };
            // Rows of 32 bits keep the other pace: faster, they lose more hints than they gain.
            if R == 4 && padded == 4 && D::CHANNELS == 32 && D::BYTES == 2 {
                let s = s.add(unit * UNIT * lanes);
                held_queries::<V, D>(q, bytes, run.add(unit * UNIT * row), s, lanes, &mut hints);
                continue;
            }
            for t in (unit * UNIT..(unit + 1) * UNIT).step_by(4) {
                let k = run.add(t * row);
                let k = [k, k.add(row), k.add(2 * row), k.add(3 * row)];
                let s = s.add(t * lanes);
                four_keys::<V, D, R, _>(128, q, bytes, k, s, lanes, &mut hints);
                for r in (R..padded).step_by(R) {
                    let (q, s) = (q.add(r * bytes), s.add(r));
                    four_keys::<V, D, R, _>(128, q, bytes, k, s, lanes, &mut Silent);
                }
            }
        }
    }
    true
}

/// Dot products of four rows with the keys of a unit, of four steps of channels, to `s[key][row]`:
/// key by key, the queries in registers as far as those suffice. A key's sums are added up in the
/// order of [`some_keys`].
#[inline(always)]
unsafe fn held_queries<V: Vector, D: KeyDot<V>>(
    q: *const u8,
    q_bytes: usize,
    run: *const u8,
    s: *mut f32,
    lanes: usize,
    hints: &mut Straight,
) {
    let step = D::CHANNELS;
    // SAFETY: the caller's promise.
    unsafe {
        let mut held = [[D::load_query(q); 4]; 4];
        for r in 0..4 {
            for c in 0..4 {
                held[r][c] = D::load_query(q.add(r * q_bytes + c * step * D::QUERY_BYTES));
            }
        }
        for t in 0..UNIT {
            let mut acc = [V::splat(0.0); 4];
            for c in 0..4 {
                hints.step(step * D::BYTES / 64);
                let key = D::load(run.add((t * 4 + c) * step * D::BYTES));
                for r in 0..4 {
                    acc[r] = D::dot(acc[r], held[r][c], key);
                }
            }
            V::sum4(acc, s.add(t * lanes));
        }
    }
}

/// Dot products of `R` rows with four keys, to `s[key][row]`.
#[inline(always)]
pub(in crate::cpu) unsafe fn four_keys<V: Vector, D: KeyDot<V>, const R: usize, H: Pace>(
    k_dim: usize,
    q: *const u8,
    q_bytes: usize,
    k: [*const u8; 4],
    s: *mut f32,
    lanes: usize,
    hints: &mut H,
) {
    // SAFETY: the caller's promise.
    unsafe {
        if R == 4 && D::KEYS == 2 {
            some_keys::<V, D, R, 2, H>(k_dim, q, q_bytes, [k[0], k[1]], s, lanes, hints);
            let s = s.add(2 * lanes);
            some_keys::<V, D, R, 2, H>(k_dim, q, q_bytes, [k[2], k[3]], s, lanes, hints);
        } else {
            some_keys::<V, D, R, 4, H>(k_dim, q, q_bytes, k, s, lanes, hints);
        }
    }
}

/// Dot products of `R` rows with `K` keys, to `s[key][row]`.
#[inline(always)]
unsafe fn some_keys<V: Vector, D: KeyDot<V>, const R: usize, const K: usize, H: Pace>(
    k_dim: usize,
    q: *const u8,
    q_bytes: usize,
    k: [*const u8; K],
    s: *mut f32,
    lanes: usize,
    hints: &mut H,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let step = D::CHANNELS;
        let whole = k_dim - k_dim % step;
        let mut acc = [[V::splat(0.0); R]; K];
        let mut c = 0;
        while c < whole {
            // Hints go out between the products: a burst of them would fill the queue.
            hints.step(K * step * D::BYTES / 64);
            let at = c * D::BYTES;
            let mut keys = [D::load(k[0].add(at)); K];
            for j in 1..K {
                keys[j] = D::load(k[j].add(at));
            }
            for r in 0..R {
                let q = D::load_query(q.add(r * q_bytes + c * D::QUERY_BYTES));
                for j in 0..K {
                    acc[j][r] = D::dot(acc[j][r], q, keys[j]);
                }
            }
            c += step;
        }
        if whole < k_dim {
            for j in 0..K {
                let key = D::load_part(k[j].add(whole * D::BYTES), k_dim - whole);
                for r in 0..R {
                    let q = D::load_query(q.add(r * q_bytes + whole * D::QUERY_BYTES));
                    acc[j][r] = D::dot(acc[j][r], q, key);
                }
            }
        }
        if R == 4 {
            for j in 0..K {
                V::sum4([acc[j][0], acc[j][1 % R], acc[j][2 % R], acc[j][3 % R]], s.add(j * lanes));
            }
        } else {
            for r in 0..R {
                let mut sums = [0.0f32; 4];
                let four = [acc[0][r], acc[1 % K][r], acc[2 % K][r], acc[3 % K][r]];
                V::sum4(four, sums.as_mut_ptr());
                for j in 0..K {
                    s.add(j * lanes + r).write(sums[j]);
                }
            }
        }
    }
}
