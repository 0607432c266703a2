//! Attention of few query rows over INT8_T and INT4_T by products of integers (AVX512_VNNI).
//!
//! Codes are bytes without sign: those of INT8_T plus 128, nibbles as they are. A query is rounded to
//! 16 bits, its largest channel 32639, and multiplied as a high and a low byte (`vpdpbusd`); weights
//! are rounded to 15 bits, the largest of a tile and row 32767, and multiplied in pairs of tokens
//! (`vpdpwssd`). All sums within a tile are exact. So a score is off by at most
//! `scale * max |q| / 65278 * sum |k|`, and an output by at most `1 / 65534` of the largest weight a
//! key times the largest value: the scales of tokens are in the weights.
//!
//! Scales never meet codes: those of keys are factors of scores, those of values of weights.

mod keys;
mod rows;
mod values;

use super::avx512::{self, F32x16};
use crate::cpu::decode::{
    JOB_ROWS, OneByOne, Scratch, TILE, Tile, Walk, adjust, by_rows, padded_rows, soften,
};
use crate::cpu::job::Job;
use crate::cpu::kernels::Kernel;
use crate::cpu::quant::{expect_scales, query};
use crate::dtype::KvFormat;
use keys::scores;
use rows::{HeadRows, Rounded, Scales, planes, prepare};
use values::{Weights, put_row, values, weigh};

/// Attention of all rows of a job over INT8_T or INT4_T.
///
/// # Safety
/// As for [`Kernel`], with AVX512_VNNI.
pub(super) unsafe fn decode(job: &Job<'_>) {
    let int4 = job.coding.format == KvFormat::Int4T;
    // SAFETY: the caller's promise.
    unsafe {
        // Latents have two parts with scales of their own; short rows leave most of a register empty.
        if job.v_in_k || job.k_dim < 64 || job.v_dim < 64 {
            return (avx512::kernels(job.coding.format).decode)(job);
        }
        let kernels = match (int4, planes::<false>(job.k_dim), job.k_dim <= 128) {
            (false, 1, _) => by_planes::<false, 1>(),
            (false, 2, _) => by_planes::<false, 2>(),
            (false, 3, _) => by_planes::<false, 3>(),
            (false, _, _) => by_planes::<false, 4>(),
            (true, _, true) => by_planes::<true, 2>(),
            (true, _, false) => by_planes::<true, 4>(),
        };
        by_rows(job, kernels);
    }
}

/// The kernels of keys of one width, for [`by_rows`].
fn by_planes<const INT4: bool, const PLANES: usize>() -> [Kernel; 3] {
    [stream::<INT4, PLANES, 1>, stream::<INT4, PLANES, 2>, stream::<INT4, PLANES, 4>]
}

/// The kernel for one width of keys and `R` rows at a time.
///
/// # Safety
/// As for [`decode`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,f16c")]
unsafe fn stream<const INT4: bool, const PLANES: usize, const R: usize>(job: &Job<'_>) {
    // SAFETY: the caller's promise; scratch has `scratch_bytes`, cut up here.
    unsafe {
        let padded = padded_rows(job.rows());
        let mut scratch = Scratch::new::<F32x16>(job, padded, 4);
        let mut queries = [Rounded::default(); JOB_ROWS];
        for head in 0..job.kv_heads {
            for r in 0..padded {
                let row = query_row(&scratch, job, head, r);
                let at = head * padded + r;
                let to = scratch.q.add(at * scratch.q_bytes);
                queries[at] = prepare::<INT4, PLANES>(row, job.k_dim, to);
            }
        }
        scratch.v_pad = 64 * planes::<INT4>(job.v_dim);
        core::ptr::write_bytes(scratch.o, 0, job.kv_heads * padded * scratch.v_pad);
        let mut shifts = [0.0f32; JOB_ROWS];
        let format = job.coding.format;
        let bytes = (
            format.row_bytes(job.k_dim as u32) as usize,
            format.row_bytes(job.v_dim as u32) as usize,
        );
        let mut walk = Walk::new(job, scratch.zeros.cast_const().cast::<u8>(), bytes, true);
        let mut places = Tile { long: true, ..Tile::empty(walk.now.zeros) };
        let mut scales = Scales { s: [0.0; TILE], m: [0.0; TILE] };
        let mut weights =
            Weights { pairs: [0; TILE / 2 * 4], scale: [0.0; 4], sum: [0; 4], shift: [0.0; 4] };
        let mut rows = HeadRows::new((walk.k_bytes, walk.v_bytes));
        let mut at = job.kv_start;
        while at < job.kv_end {
            let after = walk.look_ahead(at);
            places.fill(&job.blocks.scales(), at, job.kv_end);
            expect_scales(job, after);
            for head in 0..job.kv_heads {
                let offset = head as isize * job.k_scale_head_bytes;
                scales.read::<INT4>(&places, &places.k, offset, job.blocks.block_tokens);
                scores::<INT4, PLANES, R>(
                    &walk, &scratch, &scales, &queries, head, padded, &mut rows,
                );
            }
            weights_of_scores(job, &scratch, &walk.now, at, padded);
            for head in 0..job.kv_heads {
                let offset = head as isize * job.v_scale_head_bytes;
                scales.read::<INT4>(&places, &places.v, offset, job.blocks.block_tokens);
                for r in (head * padded..(head + 1) * padded).step_by(R) {
                    weigh::<INT4, R>(&walk.now, &scratch, &scales, r, &mut weights);
                    for i in 0..R {
                        let grow = scratch.grow.add(r + i).read();
                        shifts[r + i] = shifts[r + i] * grow + weights.shift[i];
                    }
                    let first = r == head * padded;
                    values::<INT4, R>(&walk, &scratch, &weights, head, r, first, &mut rows);
                }
            }
            at = after;
            core::mem::swap(&mut walk.now, &mut walk.next);
        }
        let rows = job.rows();
        for head in 0..job.kv_heads {
            for r in 0..rows {
                let (from, to) = (head * padded + r, head * rows + r);
                job.states.m.add(to).write(scratch.m.add(from).read());
                job.states.l.add(to).write(scratch.l.add(from).read());
                let o = scratch.o.add(from * scratch.v_pad);
                put_row::<INT4>(o, shifts[from], job.v_dim, job.states.o.add(to * job.v_dim));
            }
        }
    }
}

/// The online softmax, once for every width of keys.
///
/// # Safety
/// As for [`adjust`] and [`soften`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn weights_of_scores(job: &Job<'_>, scratch: &Scratch, now: &Tile, at: u32, padded: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        adjust::<F32x16>(job, scratch, now, at, padded);
        soften::<F32x16, OneByOne<f32>>(scratch, now.keys);
    }
}

/// Query rows of a job, once for every width of keys.
///
/// # Safety
/// As for [`query`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn query_row(scratch: &Scratch, job: &Job<'_>, head: usize, r: usize) -> *mut f32 {
    // SAFETY: the caller's promise.
    unsafe { query::<F32x16>(scratch, job, head, r) }
}
