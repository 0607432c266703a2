//! Brings Q, K and V into the order in which the register tile reads them.
//!
//! Rows are staged first (widened or copied, zero-padded, absent tokens as zeros), sixteen tokens
//! at a time, so that everything after this file works on full vectors of defined values.

use super::super::job::Job;
use super::super::vector::{Vector, prefetch};
use super::operand::{Operand, TILE_HEIGHT};
use super::scratch::Scratch;

/// Tokens staged at a time: a multiple of every vector's lanes.
pub(super) const STAGED: usize = 16;

/// Query rows between the one that is packed and the one that is prefetched: those of different
/// tokens lie pages apart.
const QUERIES_AHEAD: usize = 32;

/// Packs all query rows as `[row / TILE_HEIGHT][step][row % TILE_HEIGHT]`, zeros after the last.
///
/// # Safety
/// As for [`Kernel`](super::super::kernels::Kernel).
#[inline(always)]
pub(super) unsafe fn queries<V: Vector, O: Operand<V>>(job: &Job<'_>, s: &Scratch) {
    // SAFETY: the rows are those of the job, and the scratch is laid out for them.
    unsafe {
        let steps = job.k_dim / O::PER_STEP;
        for row in 0..job.rows().next_multiple_of(TILE_HEIGHT) {
            let to = s.q.add(row / TILE_HEIGHT * TILE_HEIGHT * steps + row % TILE_HEIGHT);
            if row < job.rows() {
                let coming = (row + QUERIES_AHEAD).min(job.rows() - 1);
                lines(job.q_row(coming), job.k_dim * job.q_dtype.bytes() as usize);
                O::stage_query(job.q_dtype, job.q_row(row), job.k_dim, s.stage);
                O::turn_query(job, s.stage);
                for step in 0..steps {
                    to.add(step * TILE_HEIGHT).write(s.stage.add(step).read());
                }
            } else {
                for step in 0..steps {
                    to.add(step * TILE_HEIGHT).write(0);
                }
            }
        }
    }
}

/// Packs the keys and values of the tokens `from .. to` of the tile that starts at token `start`.
///
/// K becomes `[column / panel][step][column % panel]` with the column `token - start`, V
/// `[channel / panel][token step][channel % panel]`. Columns next to the range, down and up to a
/// multiple of `panel` and of [`STAGED`], become zeros, as do the tokens of bad blocks; those get
/// -inf in `s.ceiling` (all others +inf), and the result is whether there were any. The job's keys
/// end at `limit`.
///
/// # Safety
/// As for [`Kernel`](super::super::kernels::Kernel); `from < to`, both in the tile.
#[inline(always)]
pub(super) unsafe fn keys_and_values<V: Vector, O: Operand<V>>(
    job: &Job<'_>,
    s: &Scratch,
    start: u32,
    (from, to): (u32, u32),
    limit: u32,
    panel: usize,
) -> bool {
    // SAFETY: tokens from .. to are the job's, so the table has their entries; all writes stay in
    // the tile, which the scratch is laid out for.
    unsafe {
        let unit = panel.max(STAGED);
        let first = (from - start) as usize / unit * unit;
        let last = ((to - start) as usize).next_multiple_of(unit).min(s.tile_tokens);
        let mut any_bad = false;
        let (k_stride, v_stride) = (s.k_stage_stride, s.v_stage_stride);
        let scale_blocks = job.blocks.scales();
        let (k_code, v_code) = (job.coding.keys(0), job.coding.values(0));
        let mut column = first;
        while column < last {
            ahead::<V, O>(job, start + (column + STAGED) as u32, limit);
            let mut i = 0;
            while i < STAGED {
                let token = start + (column + i) as u32;
                if token < from || token >= to {
                    s.ceiling.add(column + i).write(f32::INFINITY);
                    absent(s, i, 1);
                    i += 1;
                    continue;
                }
                let end = to.min(start + (column + STAGED) as u32);
                let segment = job.blocks.segment(token, end);
                let bad = segment.k.is_null();
                for j in 0..segment.tokens {
                    let ceiling = if bad { f32::NEG_INFINITY } else { f32::INFINITY };
                    s.ceiling.add(column + i + j).write(ceiling);
                }
                if bad {
                    any_bad = true;
                    absent(s, i, segment.tokens);
                } else {
                    let scales = if O::CODED { scale_blocks.segment(token, end) } else { segment };
                    for j in 0..segment.tokens {
                        let nth = j as isize;
                        let k = segment.k.wrapping_offset(nth * job.blocks.k_token_bytes);
                        let scale = scales.k.wrapping_offset(nth * scale_blocks.k_token_bytes);
                        let to = s.stage.add((i + j) * k_stride);
                        O::stage(k, (scale, &k_code), job.k_dim, to);
                        if !job.v_in_k {
                            let v = segment.v.wrapping_offset(nth * job.blocks.v_token_bytes);
                            let scale = scales.v.wrapping_offset(nth * scale_blocks.v_token_bytes);
                            let to = s.v_stage.add((i + j) * v_stride);
                            O::stage(v, (scale, &v_code), job.v_dim, to);
                        }
                    }
                }
                i += segment.tokens;
            }
            keys::<V, O>(job, s, column, panel);
            values::<V, O>(job, s, column, panel);
            column += STAGED;
        }
        any_bad
    }
}

/// Prefetches the rows that are staged next, from token `token` on: hardware does not foresee the
/// next block. Tokens from `limit` on are not of interest, nor those before the job's first, whose
/// blocks a window may have left behind.
#[inline(always)]
unsafe fn ahead<V: Vector, O: Operand<V>>(job: &Job<'_>, token: u32, limit: u32) {
    let end = limit.min(token.saturating_add(STAGED as u32));
    let mut at = token.max(job.kv_start);
    while at < end {
        // SAFETY: tokens below `limit` have an entry in the table.
        let segment = unsafe { job.blocks.segment(at, end) };
        if !segment.k.is_null() {
            for j in 0..segment.tokens as isize {
                let k = segment.k.wrapping_offset(j * job.blocks.k_token_bytes);
                lines(k, job.k_dim * O::STORED_BYTES);
                if !job.v_in_k {
                    let v = segment.v.wrapping_offset(j * job.blocks.v_token_bytes);
                    lines(v, job.v_dim * O::STORED_BYTES);
                }
            }
        }
        at += segment.tokens as u32;
    }
}

/// Prefetches `bytes` bytes.
#[inline(always)]
fn lines(row: *const u8, bytes: usize) {
    let mut at = 0;
    while at < bytes {
        prefetch(row.wrapping_add(at));
        at += 64;
    }
}

/// Stages zeros for `tokens` tokens from `i`.
#[inline(always)]
unsafe fn absent(s: &Scratch, i: usize, tokens: usize) {
    // SAFETY: `i + tokens <= STAGED`, as the caller sees to.
    unsafe {
        s.stage.add(i * s.k_stage_stride).write_bytes(0, tokens * s.k_stage_stride);
        s.v_stage.add(i * s.v_stage_stride).write_bytes(0, tokens * s.v_stage_stride);
    }
}

/// Transposes the staged keys into columns `column .. column + STAGED`.
#[inline(always)]
unsafe fn keys<V: Vector, O: Operand<V>>(job: &Job<'_>, s: &Scratch, column: usize, panel: usize) {
    // SAFETY: as for `keys_and_values`; `q_steps` is a multiple of 4, the staged rows and the
    // panels are padded to a multiple of 16 steps.
    unsafe {
        let steps = job.k_dim / O::PER_STEP;
        let mut i = 0;
        while i < STAGED {
            let column = column + i;
            let to = s.k.add(column / panel * panel * s.k_steps + column % panel);
            let mut step = 0;
            while step < steps {
                let from = s.stage.add(i * s.k_stage_stride + step);
                V::transpose(from, s.k_stage_stride, to.add(step * panel), panel);
                step += V::LANES;
            }
            i += V::LANES;
        }
    }
}

/// Spreads the staged values over the panels.
#[inline(always)]
unsafe fn values<V: Vector, O: Operand<V>>(
    job: &Job<'_>,
    s: &Scratch,
    column: usize,
    panel: usize,
) {
    // SAFETY: as for `keys_and_values`; staged rows and panels are padded to full vectors.
    unsafe {
        let (rows, stride) =
            if job.v_in_k { (s.stage, s.k_stage_stride) } else { (s.v_stage, s.v_stage_stride) };
        let token_steps = s.tile_tokens / O::PER_STEP;
        for i in 0..STAGED / O::PER_STEP {
            let step = column / O::PER_STEP + i;
            let rows = rows.add(i * O::PER_STEP * stride);
            let mut c = 0;
            while c < job.v_dim {
                let to = s.v.add((c / panel * token_steps + step) * panel + c % panel);
                O::across(rows, stride, c, to);
                c += V::LANES;
            }
        }
    }
}
