//! Attention of some rows of one KV head over a range of sealed tiles: unpack, scores, softmax,
//! values, tile by tile.
//!
//! What is computed for a row depends on its query and the tiles alone: whole-number sums are
//! exact, and everything in f32 happens in an order fixed for the level. Values that were stored
//! rotated are added up rotated.

use super::args::RawBlock;
use super::codes::{self, Ahead, channel_of, channels_to_lanes, rows_to_lanes};
use super::dots::{CODE_MIDDLE, Rounded, latent_values, round_query, scores, values};
use super::scratch::{Dims, GROUP, Scratch};
use super::softmax::soften;
use crate::cpu::job::States;
use crate::cpu::vector::{One, prefetch};
use crate::cpu::words::{ByteDot, Words};
use crate::dtype::{DType, KvFormat, f16};
use crate::layout::tile::TileLayout;
use crate::quant::value_step;

/// One range of sealed tiles for some rows of one KV head. Row `r` is query token `r / heads` and
/// query head `r % heads`.
pub(crate) struct SealedJob<'a> {
    pub layout: &'a TileLayout,
    /// What it reads: all before the tile of the queries.
    pub now: Reads,
    /// What the worker is likely to read after that, for what prefetches.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub after: Option<Reads>,
    /// Bytes from a block to the next.
    pub block_bytes: isize,
    /// Blocks that exist.
    pub num_blocks: u32,
    /// Raw tiles: those are left to others where their records are not sealed.
    pub raw: &'a [RawBlock],
    /// Row of the first token and head.
    pub q: *const u8,
    pub q_dtype: DType,
    pub q_token_bytes: isize,
    pub q_head_bytes: isize,
    /// Query heads.
    pub heads: usize,
    /// Query tokens.
    pub tokens: usize,
    /// Position of the first query token.
    pub q_pos: u32,
    pub scale: f32,
    pub window: u32,
    pub softcap: Option<f32>,
    /// `[heads]` slopes.
    pub alibi: Option<&'a [f32]>,
    /// Where the results go: fresh states of the range, in the order of channels.
    pub states: States,
    /// Private memory, 64-byte aligned, [`scratch_bytes`] long.
    pub scratch: *mut u8,
    /// Set to true where a tile of the range is neither sealed nor raw.
    pub bad: &'a core::sync::atomic::AtomicU32,
}

/// Some tiles of one KV head of a sequence.
#[derive(Debug, Clone)]
pub(crate) struct Reads {
    /// Record of block 0 of the head.
    pub records: *const u8,
    /// The sequence's block table.
    pub table: *const i32,
    /// Tiles of the sequence.
    pub tiles: core::ops::Range<u32>,
}

/// Whether a record is sealed in the layout's format: one that is not says so in its header.
///
/// # Safety
/// `record` must be that of the layout, readable.
#[inline(always)]
pub(super) unsafe fn is_sealed(layout: &TileLayout, record: *const u8) -> bool {
    let at = layout.header.start + crate::quant::HEADER_FORMAT;
    // SAFETY: the caller's promise.
    let id = unsafe { record.add(at).cast::<[u8; 2]>().read() };
    u32::from(u16::from_le_bytes(id)) == layout.format().id()
}

/// The kernel, for `R` rows at a time; a job of one row has the one of 1, any other that of 4.
///
/// # Safety
/// The CPU must have the level of `V` and `D`, and every pointer of the job must be valid as its
/// field documents.
#[inline(always)]
pub(crate) unsafe fn tiles<V: Words, D: ByteDot<V>, const R: usize>(job: &SealedJob<'_>) {
    let dims = Dims::new(job.layout);
    let (s, _) = Scratch::new(job.scratch, &dims);
    let rows = job.heads * job.tokens;
    let padded = rows.next_multiple_of(R);
    let v_dim = dims.v_dim;
    // SAFETY: the caller's promise; scratch is laid out for the job.
    unsafe {
        begin::<V>(job, &dims, &s, padded);
        let mut record = find(job, job.now.tiles.start);
        for tile in job.now.tiles.clone() {
            let next = if tile + 1 < job.now.tiles.end { find(job, tile + 1) } else { None };
            if tile + 2 < job.now.tiles.end {
                let block = job.now.table.add(tile as usize + 2).read();
                let record = job.now.records.wrapping_offset(block as isize * job.block_bytes);
                // Read at the next turn; any address may be prefetched.
                prefetch(record.wrapping_add(job.layout.header.start));
            }
            if let Some(record) = record {
                let mut ahead = Ahead {
                    line: next.unwrap_or(core::ptr::null()),
                    lines: if next.is_some() { job.layout.bytes().div_ceil(64) } else { 0 },
                    pace: 0,
                };
                unpack::<V>(job, &dims, &s, record, &mut ahead);
                for first in (0..padded).step_by(R) {
                    let mut queries = [Rounded::default(); GROUP];
                    let mut weights = [Rounded::default(); GROUP];
                    for r in 0..R {
                        queries[r] = round_query::<V>(&dims, &s, first + r, r);
                    }
                    match dims.k_bits {
                        8 => scores::<V, D, 8, R>(job, &dims, &s, &queries),
                        4 => scores::<V, D, 4, R>(job, &dims, &s, &queries),
                        3 => scores::<V, D, 3, R>(job, &dims, &s, &queries),
                        _ => scores::<V, D, 2, R>(job, &dims, &s, &queries),
                    }
                    for r in 0..R {
                        weights[r] = soften::<V>(
                            job,
                            &dims,
                            &s,
                            tile,
                            (first + r).min(rows - 1),
                            first + r,
                            r,
                        );
                    }
                    if dims.v_in_k {
                        latent_values::<V, R>(&dims, &s, first, &weights);
                        continue;
                    }
                    match dims.v_bits {
                        8 => values::<V, D, 8, R>(&dims, &s, first, &weights),
                        4 => values::<V, D, 4, R>(&dims, &s, first, &weights),
                        3 => values::<V, D, 3, R>(&dims, &s, first, &weights),
                        _ => values::<V, D, 2, R>(&dims, &s, first, &weights),
                    }
                }
            }
            record = next;
        }
        let interleaved = codes::interleaved(V::LANES, v_dim, dims.v_words);
        for row in 0..rows {
            job.states.m.add(row).write(s.m.add(row).read());
            job.states.l.add(row).write(s.l.add(row).read());
            let (from, to) = (s.o.add(row * v_dim), job.states.o.add(row * v_dim));
            if dims.v_in_k || interleaved == 1 {
                core::ptr::copy_nonoverlapping(from, to, v_dim);
                continue;
            }
            for at in 0..v_dim {
                let channel = channel_of(at / V::LANES, at % V::LANES, V::LANES, interleaved);
                to.add(channel).write(from.add(at).read());
            }
        }
    }
}

/// Widens the queries, those past the job's as zeros, and starts the states of `padded` rows.
#[inline(always)]
pub(in crate::cpu) unsafe fn begin<V: Words>(
    job: &SealedJob<'_>,
    dims: &Dims,
    s: &Scratch,
    padded: usize,
) {
    let (rows, k_dim) = (job.heads * job.tokens, dims.k_dim);
    // SAFETY: the caller's promise; scratch is laid out for the job.
    unsafe {
        for row in 0..padded {
            let q = s.q.add(row * k_dim);
            if row < rows {
                widen::<V>(job, row, q, k_dim)
            } else {
                q.write_bytes(0, k_dim)
            }
            s.m.add(row).write(f32::NEG_INFINITY);
            s.l.add(row).write(0.0);
        }
        s.o.write_bytes(0, padded * dims.v_dim);
        for t in 0..dims.tokens {
            s.count.add(t).write(t as f32);
        }
    }
}

/// The record of a tile; `None` where it is not sealed, or has none.
#[inline(always)]
pub(in crate::cpu) unsafe fn find(job: &SealedJob<'_>, tile: u32) -> Option<*const u8> {
    // SAFETY: the caller's promise.
    unsafe {
        let block = job.now.table.add(tile as usize).read();
        if block >= 0 && (block as u32) < job.num_blocks {
            let record = job.now.records.wrapping_offset(block as isize * job.block_bytes);
            if is_sealed(job.layout, record) {
                return Some(record);
            }
        }
    }
    if job.raw.binary_search_by_key(&(tile as i32), |raw| raw.tile).is_err() {
        job.bad.store(1, core::sync::atomic::Ordering::Relaxed);
    }
    None
}

/// Widens a query row.
#[inline(always)]
unsafe fn widen<V: Words>(job: &SealedJob<'_>, row: usize, to: *mut f32, k_dim: usize) {
    let (token, head) = ((row / job.heads) as isize, (row % job.heads) as isize);
    let from = job.q.wrapping_offset(token * job.q_token_bytes + head * job.q_head_bytes);
    for c in (0..k_dim).step_by(V::LANES) {
        // SAFETY: the caller's promise; channels come in whole vectors.
        unsafe {
            let x = match job.q_dtype {
                DType::F32 => V::load(from.cast::<f32>().add(c)),
                DType::F16 => V::load_f16(from.cast::<u16>().add(c)),
                DType::Bf16 => V::load_bf16(from.cast::<u16>().add(c)),
            };
            x.store(to.add(c));
        }
    }
}

/// Brings a record into lanes, and its scales into f32.
#[inline(always)]
unsafe fn unpack<V: Words>(
    job: &SealedJob<'_>,
    dims: &Dims,
    s: &Scratch,
    record: *const u8,
    ahead: &mut Ahead,
) {
    let (layout, lanes) = (job.layout, V::LANES);
    // SAFETY: the caller's promise: all of the record can be read.
    unsafe {
        let words = |at: usize| record.add(at).cast::<u32>();
        let calls = (dims.tokens / lanes * dims.k_words().div_ceil(lanes))
            + (dims.v_words * dims.v_dim).div_ceil(lanes * lanes);
        ahead.pace = ahead.lines.div_ceil(calls.max(1));
        let readable = |at: usize| (layout.bytes() - at) / 4;
        let at = layout.k_codes.start;
        let k_words = dims.k_words();
        rows_to_lanes::<V>(words(at), dims.tokens, dims.k_row, k_words, readable(at), s.k, ahead);
        if dims.k_bits == 3 {
            let at = layout.k_plane.start;
            let row = dims.k_plane_row;
            rows_to_lanes::<V>(words(at), dims.tokens, row, row, readable(at), s.k_plane, ahead);
        }
        let unit = |at: usize| {
            let at = record.add(layout.header.start + crate::quant::HEADER_UNITS + at);
            f16::from_le_bytes(at.cast::<[u8; 2]>().read()).to_f32()
        };
        for (part, channels) in layout.k_parts().into_iter().enumerate() {
            if channels.is_empty() {
                continue;
            }
            let (step, mid) = (V::splat(unit(4 * part)), V::splat(unit(4 * part + 2)));
            for c in channels.step_by(lanes) {
                V::load_u8(record.add(layout.k_steps.start + c)).mul(step).store(s.step.add(c));
                let mids = record.add(layout.k_mids.start + c).cast::<i8>();
                V::load_i8(mids).mul(mid).store(s.mid.add(c));
            }
        }
        if dims.v_in_k {
            match dims.k_bits {
                8 => latent_rows::<V, 8>(layout, dims, s, record),
                4 => latent_rows::<V, 4>(layout, dims, s, record),
                3 => latent_rows::<V, 3>(layout, dims, s, record),
                _ => latent_rows::<V, 2>(layout, dims, s, record),
            }
            return;
        }
        let interleaved = codes::interleaved(lanes, dims.v_dim, dims.v_words);
        let at = words(layout.v_codes.start);
        channels_to_lanes::<V>(at, dims.v_dim, dims.v_words, interleaved, s.v, ahead);
        if dims.v_bits == 3 {
            let at = words(layout.v_plane.start);
            codes::scatter::<V>(at, dims.v_dim, dims.v_plane_words, interleaved, s.v_plane);
        }
        let scales = record.add(layout.v_scales.start).cast::<u16>();
        for t in (0..dims.tokens).step_by(lanes) {
            V::load_f16(scales.add(t)).store(s.v_scale.add(t));
        }
    }
}

/// The values of latents: keys as f32, a row a token.
#[inline(always)]
unsafe fn latent_rows<V: Words, const BITS: u32>(
    layout: &TileLayout,
    dims: &Dims,
    s: &Scratch,
    record: *const u8,
) {
    let half = CODE_MIDDLE[BITS as usize];
    let (per_word, parts) = (4 * codes::parts(BITS), codes::parts(BITS));
    // SAFETY: the caller's promise.
    unsafe {
        for token in 0..dims.tokens {
            let (main, plane) = layout.k_row(token);
            let (main, plane) =
                (record.add(main.start).cast::<u32>(), record.add(plane.start).cast::<u32>());
            for c in (0..dims.v_dim).step_by(16) {
                let mut packed = [0u32; 4];
                for w in 0..16 / per_word {
                    let word = c / per_word + w;
                    let third = if BITS == 3 { plane.add(word / 2).read() } else { 0 };
                    let bytes = codes::bytes::<One, BITS>(main.add(word).read(), third, word);
                    packed[w * parts..(w + 1) * parts].copy_from_slice(&bytes[..parts]);
                }
                let mut row = [0u8; 16];
                let order = const { codes::inverse(BITS) };
                V::permute16(packed.as_ptr().cast(), &order, row.as_mut_ptr());
                for i in (0..16).step_by(V::LANES) {
                    let code = V::load_u8(row.as_ptr().add(i)).sub(V::splat(half));
                    let step = V::load(s.step.add(c + i));
                    let x = code.fma(step, V::load(s.mid.add(c + i)));
                    x.store(s.v.cast::<f32>().add(token * dims.v_dim + c + i));
                }
            }
        }
    }
}

/// The step of value codes of `bits`.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(in crate::cpu) const fn value_unit(bits: u32) -> f32 {
    if bits == 8 { 1.0 } else { value_step(bits) }
}

/// Formats whose values are summed up rotated.
pub(super) fn rotated(format: KvFormat, v_in_k: bool) -> bool {
    !v_in_k && format.v_bits() < 8
}
