//! The kernel for many query rows: tiles of queries against tiles of keys.
//!
//! A job packs its queries once; then for every key tile it packs K and V once, and takes the
//! rows through scores, online softmax and weighted values in chunks. All products run in one
//! register tile ([`operand::multiply_add`]) over packed operands.
//!
//! What is computed for a row does not depend on the rows it shares a job with: key tiles start at
//! multiples of the tile size, counted from the first token of the sequence; dot products add up
//! over the channels, weighted values over the tokens, one after the other; masked keys have a
//! weight of exactly 0, and adding those changes nothing.
//!
//! Arithmetic is in f32, with one exception: where storage and queries are both bf16 and the
//! machine multiplies pairs of bf16, products are exact, sums f32, and the softmax weights are
//! rounded to bf16 before they meet V (the denominator is summed up before that). That adds a
//! relative error of at most 2^-8 to each weight, so at most `2^-8 * max |v|` to an output.

mod operand;
mod pack;
mod scratch;
mod softmax;
#[cfg(test)]
mod tests;

use super::job::Job;
use super::quant::{CodeVector, Coded};
use super::vector::{PairDot, Stored, Vector};
use crate::dtype::{DType, bf16};
use operand::{Broadcast, Pairs, TILE_HEIGHT, multiply_add};
pub(super) use operand::{Floats, Operand};
use scratch::{CHUNK_ROWS, Scratch, TILE_STEPS};

/// The most query rows that a job of the tile kernel may have: as many as keep queries and
/// outputs in the second cache beside a tile of keys and values, since the work of packing that
/// tile is shared by all of them.
pub(crate) const fn tile_rows(k_dim: usize, v_dim: usize) -> usize {
    match k_dim + v_dim {
        0..=256 => 384,
        257..=512 => 192,
        _ => 132,
    }
}

/// Bytes of scratch that a job needs.
pub(crate) fn scratch_bytes(k_dim: usize, v_dim: usize) -> usize {
    let base = core::ptr::null_mut();
    let rows = tile_rows(k_dim, v_dim);
    let bytes = |per_step| Scratch::new(base, rows, (k_dim, v_dim, false), per_step).1;
    bytes(1).max(bytes(2))
}

/// Attention of up to [`tile_rows`] rows.
///
/// # Safety
/// As for [`Kernel`](super::kernels::Kernel).
#[inline(always)]
pub(crate) unsafe fn tile<V: Vector, S: Stored>(job: &Job<'_>) {
    // SAFETY: the caller's promise.
    unsafe {
        if V::MANY_REGISTERS {
            run::<V, Floats<S>, 4>(job);
        } else {
            run::<V, Floats<S>, 2>(job);
        }
    }
}

/// The same over codes.
///
/// # Safety
/// As for [`Kernel`](super::kernels::Kernel).
#[inline(always)]
pub(crate) unsafe fn tile_coded<V: CodeVector>(job: &Job<'_>) {
    // SAFETY: the caller's promise.
    unsafe {
        if V::MANY_REGISTERS {
            run::<V, Coded<V>, 4>(job);
        } else {
            run::<V, Coded<V>, 2>(job);
        }
    }
}

/// The same over bf16, without widening where the queries are bf16 too.
///
/// # Safety
/// As for [`Kernel`](super::kernels::Kernel).
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // used where the machine has such products
#[inline(always)]
pub(crate) unsafe fn tile_pairs<V: PairDot>(job: &Job<'_>) {
    // SAFETY: the caller's promise.
    unsafe {
        match job.q_dtype {
            DType::Bf16 => run::<V, Pairs, 4>(job),
            _ => tile::<V, bf16>(job),
        }
    }
}

/// A tile of keys.
struct Tile {
    /// Its first token: a multiple of the tile size.
    start: u32,
    /// Whether a token of it lies in a bad block.
    any_bad: bool,
}

impl Tile {
    /// The columns of the tile that the rows `first ..= last` see, from the first to the last.
    ///
    /// # Safety
    /// Both must be rows of `s`.
    #[inline(always)]
    unsafe fn columns(&self, s: &Scratch, first: usize, last: usize) -> (usize, usize) {
        // SAFETY: the caller's promise.
        let (from, to) = unsafe { (s.from.add(first).read(), s.to.add(last).read()) };
        let column = |token: u32| (token.saturating_sub(self.start) as usize).min(s.tile_tokens);
        (column(from), column(to).max(column(from)))
    }
}

/// The kernel, for one way to multiply; `WIDTH` is the width of the register tile in vectors.
///
/// # Safety
/// As for [`Kernel`](super::kernels::Kernel).
#[inline(always)]
unsafe fn run<V: Vector, O: Operand<V>, const WIDTH: usize>(job: &Job<'_>) {
    // SAFETY: the scratch is laid out for the job's rows, and was sized for more.
    unsafe {
        let dims = (job.k_dim, job.v_dim, job.v_in_k);
        let (s, _) = Scratch::new(job.scratch, job.rows(), dims, O::PER_STEP);
        let rows = job.rows().next_multiple_of(TILE_HEIGHT);
        pack::queries::<V, O>(job, &s);
        for row in 0..rows {
            let (from, to) = job.visible(row.min(job.rows() - 1) / job.group);
            s.from.add(row).write(from);
            s.to.add(row).write(to);
        }
        for row in 0..rows + 16 {
            s.m.add(row).write(f32::NEG_INFINITY);
            s.l.add(row).write(0.0);
        }
        s.o.write_bytes(0, rows * s.o_stride);
        s.top.write_bytes(0, CHUNK_ROWS);

        let (from, to) = (s.from.read(), s.to.add(rows - 1).read());
        let tokens = s.tile_tokens as u32;
        let mut start = from / tokens * tokens;
        while start < to {
            let range = (from.max(start), to.min(start + tokens));
            let any_bad =
                pack::keys_and_values::<V, O>(job, &s, start, range, to, WIDTH * V::LANES);
            let tile = Tile { start, any_bad };
            let mut first = 0;
            while first < rows {
                let count = CHUNK_ROWS.min(rows - first);
                let (low, high) = tile.columns(&s, first, first + count - 1);
                if low < high {
                    scores::<V, O, WIDTH>(job, &s, &tile, first, count);
                    softmax::chunk::<V, O>(job, &s, &tile, first, count);
                    values::<V, O, WIDTH>(job, &s, &tile, first, count);
                }
                first += count;
            }
            start += tokens;
        }

        for row in 0..job.rows() {
            let m = s.m.add(row).read() * core::f32::consts::LN_2;
            job.states.m.add(row).write(m);
            job.states.l.add(row).write(s.l.add(row).read());
            let o = job.states.o.add(row * job.v_dim);
            o.copy_from_nonoverlapping(s.o.add(row * s.o_stride), job.v_dim);
        }
    }
}

/// Scores of a chunk of rows against the key tile, scaled.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
unsafe fn scores<V: Vector, O: Operand<V>, const WIDTH: usize>(
    job: &Job<'_>,
    s: &Scratch,
    tile: &Tile,
    first: usize,
    rows: usize,
) {
    // SAFETY: rows and columns are those of the chunk and the tile.
    unsafe {
        let panel = WIDTH * V::LANES;
        let steps = job.k_dim / O::PER_STEP;
        let factor = V::splat(softmax::score_factor(job));
        let (low, high) = tile.columns(s, first, first + rows - 1);
        let mut column = low / panel * panel;
        while column < high {
            let keys = s.k.add(column * s.k_steps);
            let mut block = 0;
            while block < rows {
                let row = first + block;
                let (low, high) = tile.columns(s, row, row + TILE_HEIGHT - 1);
                let q = s.q.add(row * steps);
                let q = Broadcast { at: q, row_stride: 1, step_stride: TILE_HEIGHT };
                let to = s.scores.add(block * s.tile_tokens + column);
                if low < high && low < column + panel && column < high {
                    if WIDTH > 2 && high <= column + 2 * V::LANES {
                        score_tile::<V, O, 2>(steps, q, keys, panel, factor, to, s.tile_tokens);
                    } else {
                        score_tile::<V, O, WIDTH>(steps, q, keys, panel, factor, to, s.tile_tokens);
                    }
                }
                block += TILE_HEIGHT;
            }
            column += panel;
        }
    }
}

/// One register tile of scores.
///
/// # Safety
/// As for [`run`].
#[allow(clippy::needless_range_loop)] // the indices run over arrays and addresses
#[inline(always)]
unsafe fn score_tile<V: Vector, O: Operand<V>, const WIDTH: usize>(
    steps: usize,
    q: Broadcast,
    keys: *const u32,
    panel: usize,
    factor: V,
    to: *mut f32,
    to_stride: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[V::splat(0.0); WIDTH]; TILE_HEIGHT];
        multiply_add::<V, O, WIDTH>(steps, q, keys, panel, &mut sums);
        for r in 0..TILE_HEIGHT {
            for v in 0..WIDTH {
                sums[r][v].mul(factor).store(to.add(r * to_stride + v * V::LANES));
            }
        }
    }
}

/// Adds the weighted values of the key tile to the outputs of a chunk of rows.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
unsafe fn values<V: Vector, O: Operand<V>, const WIDTH: usize>(
    job: &Job<'_>,
    s: &Scratch,
    tile: &Tile,
    first: usize,
    rows: usize,
) {
    // SAFETY: rows, columns and channels are those of the chunk, the tile and the job.
    unsafe {
        let panel = WIDTH * V::LANES;
        let mut channel = 0;
        while channel < job.v_dim {
            let width = (job.v_dim - channel).div_ceil(V::LANES);
            let mut block = 0;
            while block < rows {
                let row = first + block;
                let (low, high) = tile.columns(s, row, row + TILE_HEIGHT - 1);
                if low < high {
                    let (low, high) = (low / O::PER_STEP, high.div_ceil(O::PER_STEP));
                    let weights = s.scores.add(block * s.tile_tokens + low).cast();
                    let weights =
                        Broadcast { at: weights, row_stride: s.tile_tokens, step_stride: 1 };
                    let from = s.v.add(channel * TILE_STEPS + low * panel);
                    let to = s.o.add(row * s.o_stride + channel);
                    let fade = s.fade.add(block);
                    let steps = high - low;
                    let o = s.o_stride;
                    match width {
                        1 => value_tile::<V, O, 1>(steps, weights, from, panel, fade, to, o),
                        2 => value_tile::<V, O, 2>(steps, weights, from, panel, fade, to, o),
                        3 if WIDTH > 2 => {
                            value_tile::<V, O, 3>(steps, weights, from, panel, fade, to, o)
                        }
                        _ => value_tile::<V, O, WIDTH>(steps, weights, from, panel, fade, to, o),
                    }
                }
                block += TILE_HEIGHT;
            }
            channel += panel;
        }
    }
}

/// One register tile of outputs: fades what is there and adds to it.
///
/// # Safety
/// As for [`run`].
#[allow(clippy::needless_range_loop)] // the indices run over arrays and addresses
#[inline(always)]
unsafe fn value_tile<V: Vector, O: Operand<V>, const WIDTH: usize>(
    steps: usize,
    weights: Broadcast,
    values: *const u32,
    panel: usize,
    fade: *const f32,
    to: *mut f32,
    to_stride: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[V::splat(0.0); WIDTH]; TILE_HEIGHT];
        for r in 0..TILE_HEIGHT {
            let fade = V::splat(fade.add(r).read());
            for v in 0..WIDTH {
                sums[r][v] = V::load(to.add(r * to_stride + v * V::LANES)).mul(fade);
            }
        }
        multiply_add::<V, O, WIDTH>(steps, weights, values, panel, &mut sums);
        for r in 0..TILE_HEIGHT {
            for v in 0..WIDTH {
                sums[r][v].store(to.add(r * to_stride + v * V::LANES));
            }
        }
    }
}
