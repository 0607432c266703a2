//! Probabilities and values: the weighted sums of the decode kernel.
//!
//! [`Weigh`] is one way to multiply. Weights stand in scratch as the softmax leaves them; sums are in
//! an order of channels of their own until [`in_order`].

use core::marker::PhantomData;
use core::ops::Range;

use super::Scratch;
use super::hints::{Hints, Pace, Silent};
use super::walk::{PIECE, Side, Tile, UNIT, Walk};
use crate::cpu::vector::{PairDot, Stored, Vector};

/// One way to weigh values, `2 * V::LANES` channels a step.
///
/// # Safety
/// As for [`Vector`].
pub(crate) unsafe trait Weigh<V: Vector> {
    /// A step of the values of `KEYS` keys.
    type Step: Copy;
    /// The weights of `KEYS` keys, in every lane.
    type Weight: Copy;
    /// Keys that are worked on at once: 1 or 2.
    const KEYS: usize;
    /// Bytes of a stored channel.
    const BYTES: usize;
    /// Whether channels lie in the sum as in the values.
    const IN_ORDER: bool;

    /// A step of zeros.
    unsafe fn zeros() -> Self::Step;
    /// Reads a step from the rows of the first and the last of the keys.
    unsafe fn load(rows: [*const u8; 2]) -> Self::Step;
    /// Reads `n < 2 * LANES` channels and nothing after them; the others are 0.
    unsafe fn load_part(rows: [*const u8; 2], n: usize) -> Self::Step;
    /// Writes the weights of the first and the last of the keys for `LANES` rows of a job to
    /// `to[0..LANES]`.
    unsafe fn store_weights(first: V, last: V, to: *mut f32);
    /// Reads the weights of one row, written by [`store_weights`](Self::store_weights).
    unsafe fn weight(p: *const f32) -> Self::Weight;
    /// `sum` plus the weighted values.
    unsafe fn add(sum: [V; 2], weight: Self::Weight, step: Self::Step) -> [V; 2];
    /// Where channel `i` of a step lies in the sum.
    fn place(i: usize) -> usize;
}

/// Key by key, in f32.
pub(crate) struct OneByOne<S>(PhantomData<S>);

#[allow(clippy::undocumented_unsafe_blocks)] // the callers' promise, as the trait says
// SAFETY: only instructions of `V`.
unsafe impl<V: Vector, S: Stored> Weigh<V> for OneByOne<S> {
    type Step = [V; 2];
    type Weight = V;
    const KEYS: usize = 1;
    const IN_ORDER: bool = !S::EVEN_ODD;
    const BYTES: usize = S::BYTES;

    #[inline(always)]
    unsafe fn zeros() -> [V; 2] {
        unsafe { [V::splat(0.0); 2] }
    }
    #[inline(always)]
    unsafe fn load(rows: [*const u8; 2]) -> [V; 2] {
        unsafe { S::load2(rows[0]) }
    }
    #[inline(always)]
    unsafe fn load_part(rows: [*const u8; 2], n: usize) -> [V; 2] {
        unsafe { S::load2_part(rows[0], n) }
    }
    #[inline(always)]
    unsafe fn store_weights(first: V, _: V, to: *mut f32) {
        unsafe { first.store(to) }
    }
    #[inline(always)]
    unsafe fn weight(p: *const f32) -> V {
        unsafe { V::splat(p.read()) }
    }
    #[inline(always)]
    unsafe fn add(sum: [V; 2], weight: V, step: [V; 2]) -> [V; 2] {
        unsafe { [weight.fma(step[0], sum[0]), weight.fma(step[1], sum[1])] }
    }
    #[inline(always)]
    fn place(i: usize) -> usize {
        if S::EVEN_ODD { i % 2 * V::LANES + i / 2 } else { i }
    }
}

/// Two bf16 values at a time by the machine's pair products, with weights rounded to bf16 (the
/// denominator is summed up before that): for calls whose queries are bf16 too. A relative error of
/// at most 2^-8 a weight, so at most `2^-8 * max |v|` in an output, as in the kernel for many rows.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // used where the machine has such products
pub(crate) struct InPairs;

#[allow(clippy::undocumented_unsafe_blocks)] // the callers' promise, as the trait says
// SAFETY: only instructions of `V`.
unsafe impl<V: PairDot> Weigh<V> for InPairs {
    type Step = [V::Pairs; 2];
    type Weight = V::Pairs;
    const KEYS: usize = 2;
    const IN_ORDER: bool = false;
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn zeros() -> [V::Pairs; 2] {
        unsafe { [V::splat_pair(0); 2] }
    }
    #[inline(always)]
    unsafe fn load(rows: [*const u8; 2]) -> [V::Pairs; 2] {
        unsafe { V::interleave(V::load_pairs(rows[0].cast()), V::load_pairs(rows[1].cast())) }
    }
    #[inline(always)]
    unsafe fn load_part(rows: [*const u8; 2], n: usize) -> [V::Pairs; 2] {
        unsafe {
            let first = V::load_pairs_part(rows[0].cast(), n);
            V::interleave(first, V::load_pairs_part(rows[1].cast(), n))
        }
    }
    #[inline(always)]
    unsafe fn store_weights(first: V, last: V, to: *mut f32) {
        unsafe { V::store_pairs(V::pair_up(first, last), to.cast()) }
    }
    #[inline(always)]
    unsafe fn weight(p: *const f32) -> V::Pairs {
        unsafe { V::splat_pair(p.cast::<u32>().read()) }
    }
    #[inline(always)]
    unsafe fn add(sum: [V; 2], weight: V::Pairs, step: [V::Pairs; 2]) -> [V; 2] {
        unsafe { [sum[0].dot_pairs(weight, step[0]), sum[1].dot_pairs(weight, step[1])] }
    }
    #[inline(always)]
    fn place(i: usize) -> usize {
        // Eights of channels: the first half of each lies in the first vector.
        i % 8 / 4 * V::LANES + i / 8 * 4 + i % 4
    }
}

/// Brings the channels of an accumulated row from the order of the sums into their own.
#[inline(always)]
pub(super) unsafe fn in_order<V: Vector, W: Weigh<V>>(row: *mut f32, buffer: *mut f32, dim: usize) {
    let step = 2 * V::LANES;
    // SAFETY: the caller's promise; both have room for whole steps.
    unsafe {
        core::ptr::copy_nonoverlapping(row, buffer, dim.next_multiple_of(step));
        for from in (0..dim).step_by(step) {
            // A constant number of times, so that the places are constants.
            for i in 0..step {
                row.add(from + i).write(buffer.add(from + W::place(i)).read());
            }
        }
    }
}

/// Adds the values of the tile at hand, weighted by the probabilities, to `o`.
#[inline(always)]
pub(super) unsafe fn values<V: Vector, W: Weigh<V>, const R: usize>(
    walk: &Walk<'_, '_>,
    scratch: &Scratch,
    padded: usize,
) {
    let (job, now) = (walk.job, &walk.now);
    let step = 4 * V::LANES;
    let passes = (job.v_dim / step).max(1);
    let even = job.v_dim.is_multiple_of(step) && step * W::BYTES >= 64;
    for head in 0..job.kv_heads {
        let offset = head as isize * job.v_head_bytes;
        let run = if even && job.v_dim == 128 { walk.run(Side::Values, head) } else { None };
        // A piece at a time, so that the hints keep to the pieces too. Two where arithmetic and not
        // memory is the bound, as it is where 16 bits are widened: sums are loaded half as often.
        let widens = W::KEYS == 1 && W::BYTES == 2;
        let two = run.is_some() && widens && now.keys >= 2 * PIECE;
        let many = if two { 2 * PIECE } else { PIECE };
        for from in (0..now.keys).step_by(many) {
            let keys = from..now.keys.min(from + many);
            for r in (head * padded..(head + 1) * padded).step_by(R) {
                let part = Part {
                    rows: Rows { tile: now, offset },
                    // SAFETY: the caller's promise.
                    p: unsafe { scratch.s.add(r) },
                    lanes: scratch.lanes,
                    // SAFETY: the caller's promise.
                    o: unsafe { scratch.o.add(r * scratch.v_pad) },
                    v_pad: scratch.v_pad,
                };
                let first = r == head * padded;
                // SAFETY: the caller's promise.
                unsafe {
                    if let Some(run) = run
                        && values_of_run::<V, W, R>(walk, head, keys.clone(), run, &part, first)
                    {
                        continue;
                    }
                    let mut hints = if first && !job.v_in_k {
                        Hints::new(walk, Side::Values, head, from / PIECE, passes, even)
                    } else {
                        Hints::NONE
                    };
                    let mut c = 0;
                    while c + step <= job.v_dim {
                        add_values::<V, W, R, 2, _, _>(&part, keys.clone(), c, step, &mut hints);
                        c += step;
                    }
                    while c < job.v_dim {
                        let n = (job.v_dim - c).min(2 * V::LANES);
                        add_values::<V, W, R, 1, _, _>(&part, keys.clone(), c, n, &mut hints);
                        c += n;
                    }
                }
            }
        }
    }
}

/// Adds a piece of values of 128 channels that is part of a run of memory: straight code, for the
/// shape that most models have. Whether it did: not where there are no hints for the `first` rows.
#[inline(always)]
unsafe fn values_of_run<V: Vector, W: Weigh<V>, const R: usize>(
    walk: &Walk<'_, '_>,
    head: usize,
    keys: Range<usize>,
    run: *const u8,
    part: &Part<Rows<'_>>,
    first: bool,
) -> bool {
    let (row, step) = (128 * W::BYTES, 4 * V::LANES);
    let (from, keys) = (keys.start, keys.len());
    let unit = from / UNIT;
    // SAFETY: the caller's promise.
    unsafe {
        let part = Part {
            rows: Run { first: run.add(from * row), bytes: row },
            p: part.p.add(from / W::KEYS * part.lanes),
            lanes: part.lanes,
            o: part.o,
            v_pad: part.v_pad,
        };
        if !first {
            for c in (0..128).step_by(step) {
                add_values::<V, W, R, 2, _, _>(&part, 0..keys, c, step, &mut Silent);
            }
            return true;
        }
        let low = walk.straight(Side::Values, head, unit);
        let (Some(mut low), Some(mut high)) =
            (low, walk.straight(Side::Values, head, unit + keys / PIECE))
        else {
            return false;
        };
        // The hints of half a piece go out with half the channels.
        for c in (0..64).step_by(step) {
            add_values::<V, W, R, 2, _, _>(&part, 0..keys, c, step, &mut low);
        }
        for c in (64..128).step_by(step) {
            add_values::<V, W, R, 2, _, _>(&part, 0..keys, c, step, &mut high);
        }
    }
    true
}

/// Where the values of a tile lie.
pub(in crate::cpu) trait ValueRows: Copy {
    /// The row of a key.
    fn at(&self, key: usize) -> *const u8;
}

/// Each where the tile says.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Rows<'a> {
    pub tile: &'a Tile,
    /// From a row of the first head to that of the head at hand.
    pub offset: isize,
}

impl ValueRows for Rows<'_> {
    #[inline(always)]
    fn at(&self, key: usize) -> *const u8 {
        self.tile.row(self.tile.v[key], self.offset)
    }
}

/// One after the other.
#[derive(Clone, Copy)]
struct Run {
    first: *const u8,
    bytes: usize,
}

impl ValueRows for Run {
    #[inline(always)]
    fn at(&self, key: usize) -> *const u8 {
        self.first.wrapping_add(key * self.bytes)
    }
}

/// What is added up for one group of rows: values, with the weights
/// `p[key / W::KEYS * lanes + row]`, to `o[row * v_pad]`.
pub(in crate::cpu) struct Part<T> {
    pub rows: T,
    pub p: *const f32,
    pub lanes: usize,
    pub o: *mut f32,
    pub v_pad: usize,
}

/// Adds up to `2 * P` vectors of channels from `c` on of the values of some keys: `n` channels,
/// whole unless `P` is 1.
#[inline(always)]
pub(in crate::cpu) unsafe fn add_values<V, W, const R: usize, const P: usize, T, H>(
    part: &Part<T>,
    keys: Range<usize>,
    c: usize,
    n: usize,
    hints: &mut H,
) where
    V: Vector,
    W: Weigh<V>,
    T: ValueRows,
    H: Pace,
{
    let Part { ref rows, p, lanes, o, v_pad } = *part;
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[[V::splat(0.0); 2]; P]; R];
        for r in 0..R {
            for j in 0..P {
                let o = o.add(r * v_pad + c + j * 2 * V::LANES);
                acc[r][j] = [V::load(o), V::load(o.add(V::LANES))];
            }
        }
        for t in keys.step_by(W::KEYS) {
            for _ in 0..W::KEYS {
                hints.step(P * 2 * V::LANES * W::BYTES / 64);
            }
            // The second of a pair exists, as zeros after the last key: tiles are padded.
            let (first, last) = (rows.at(t), rows.at(t + W::KEYS - 1));
            let rows = [first.add(c * W::BYTES), last.add(c * W::BYTES)];
            let mut v = [W::zeros(); P];
            for j in 0..P {
                let bytes = j * 2 * V::LANES * W::BYTES;
                let rows = [rows[0].add(bytes), rows[1].add(bytes)];
                v[j] =
                    if P > 1 || n == 2 * V::LANES { W::load(rows) } else { W::load_part(rows, n) };
            }
            for r in 0..R {
                let p = W::weight(p.add(t / W::KEYS * lanes + r));
                for j in 0..P {
                    acc[r][j] = W::add(acc[r][j], p, v[j]);
                }
            }
        }
        for r in 0..R {
            for j in 0..P {
                let o = o.add(r * v_pad + c + j * 2 * V::LANES);
                acc[r][j][0].store(o);
                acc[r][j][1].store(o.add(V::LANES));
            }
        }
    }
}
