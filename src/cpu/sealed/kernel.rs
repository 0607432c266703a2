//! Attention of some rows of one KV head over a range of sealed tiles: unpack, scores, softmax,
//! values, tile by tile.
//!
//! What is computed for a row depends on its query and the tiles alone: whole-number sums are
//! exact, and everything in f32 happens in an order fixed for the level. Values that were stored
//! rotated are added up rotated.

use super::args::RawBlock;
use super::codes::{self, Ahead, channel_of, channels_to_lanes, rows_to_lanes, whole};
use super::softmax::soften;
use crate::cpu::job::States;
use crate::cpu::vector::{One, prefetch};
use crate::cpu::words::{ByteDot, Words};
use crate::dtype::{DType, KvFormat, f16};
use crate::layout::tile::TileLayout;
use crate::quant::value_step;

/// The most query rows of a job.
pub(super) const JOB_ROWS: usize = 64;
/// Rows that are worked on together.
pub(super) const GROUP: usize = 4;
/// The largest whole number that a query or probability of two bytes is rounded to: its high byte
/// stays within 127.
pub(super) const WIDE: f32 = 32639.0;

/// One range of sealed tiles for some rows of one KV head. Row `r` is query token `r / heads` and
/// query head `r % heads`.
pub(crate) struct SealedJob<'a> {
    pub layout: &'a TileLayout,
    /// Record of block 0 of the head.
    pub records: *const u8,
    /// Bytes from a block to the next.
    pub block_bytes: isize,
    /// Blocks that exist.
    pub num_blocks: u32,
    /// The sequence's block table.
    pub table: *const i32,
    /// Tiles of the range: all before the tile of the queries.
    pub tiles: core::ops::Range<u32>,
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

/// The parts of a job's scratch; f32s and words.
#[derive(Clone, Copy)]
pub(super) struct Scratch {
    /// Packed keys and their third bits in lanes.
    pub k: *mut u32,
    pub k_plane: *mut u32,
    /// Packed values and their third bits in lanes; `[token][v_dim]` f32 where values lie in keys.
    pub v: *mut u32,
    pub v_plane: *mut u32,
    /// `[k_dim]` step and middle of each key channel.
    pub step: *mut f32,
    pub mid: *mut f32,
    /// `[tokens]` scales of the values.
    pub v_scale: *mut f32,
    /// `[tokens]` 0, 1, 2, ...
    pub count: *mut f32,
    /// `[row][k_dim]` queries.
    pub q: *mut f32,
    /// `[row][v_dim]` weighted values, in the order of lanes.
    pub o: *mut f32,
    /// `[row]` largest score, sum of probabilities.
    pub m: *mut f32,
    pub l: *mut f32,
    /// `[group row][high, low][channels]` queries as bytes.
    pub q_bytes: *mut u32,
    /// `[group row][tokens]` scores, then probabilities.
    pub s: *mut f32,
    /// `[group row][high, low][tokens]` probabilities as bytes.
    pub p_bytes: *mut u32,
    /// Bytes on their way into order.
    pub buffer: *mut u8,
}

/// The dimensions of a job, as indices.
#[derive(Clone, Copy)]
pub(super) struct Dims {
    pub k_dim: usize,
    pub v_dim: usize,
    pub tokens: usize,
    pub k_bits: u32,
    pub v_bits: u32,
    pub v_in_k: bool,
    /// Words of a stored key row, padding included, and of its third bits.
    pub k_row: usize,
    pub k_plane_row: usize,
    /// Words of a value channel and of its third bits.
    pub v_words: usize,
    pub v_plane_words: usize,
}

impl Dims {
    pub fn new(layout: &TileLayout) -> Self {
        let shape = layout.shape();
        let (tokens, v_dim) = (shape.tokens as usize, shape.v_dim as usize);
        let words = |bytes: usize, rows: usize| bytes / rows / 4;
        Self {
            k_dim: shape.k_dim as usize,
            v_dim,
            tokens,
            k_bits: layout.format().k_bits(),
            v_bits: layout.format().v_bits(),
            v_in_k: shape.v_in_k,
            k_row: words(layout.k_codes.len(), tokens),
            k_plane_row: words(layout.k_plane.len(), tokens),
            v_words: words(layout.v_codes.len(), v_dim),
            v_plane_words: words(layout.v_plane.len(), v_dim),
        }
    }

    /// Words of a key row without padding.
    fn k_words(&self) -> usize {
        let bits = if self.k_bits == 3 { 2 } else { self.k_bits as usize };
        self.k_dim * bits / 32
    }
}

impl Scratch {
    /// Cuts `base` up; the bytes that takes.
    pub fn new(base: *mut u8, dims: &Dims) -> (Self, usize) {
        let Dims { k_dim, v_dim, tokens, .. } = *dims;
        let base = base.cast::<u32>();
        let mut at = 0;
        let mut next = |words: usize| {
            let start = base.wrapping_add(at);
            at += words.next_multiple_of(16);
            start
        };
        let value_words = if dims.v_in_k { tokens * v_dim } else { dims.v_words * v_dim };
        let scratch = Self {
            k: next(tokens * whole(dims.k_words())),
            k_plane: next(tokens * whole(dims.k_plane_row)),
            v: next(value_words),
            v_plane: next(dims.v_plane_words * v_dim),
            step: next(k_dim).cast(),
            mid: next(k_dim).cast(),
            v_scale: next(tokens).cast(),
            count: next(tokens).cast(),
            q: next(JOB_ROWS * k_dim).cast(),
            o: next(JOB_ROWS * v_dim).cast(),
            m: next(JOB_ROWS).cast(),
            l: next(JOB_ROWS).cast(),
            q_bytes: next(GROUP * 2 * k_dim / 4),
            s: next(GROUP * tokens).cast(),
            p_bytes: next(GROUP * 2 * tokens / 4),
            buffer: next(2 * k_dim.max(tokens) / 4).cast(),
        };
        (scratch, at * 4)
    }
}

/// Bytes of scratch that a job needs.
pub(super) fn scratch_bytes(layout: &TileLayout) -> usize {
    Scratch::new(core::ptr::null_mut(), &Dims::new(layout)).1
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

/// What a row's rounding to whole numbers leaves to be undone.
#[derive(Clone, Copy, Default)]
pub(super) struct Rounded {
    /// What a whole number stands for.
    pub unit: f32,
    /// Sums of the high and of the low bytes.
    pub high: f32,
    pub low: f32,
    /// Of a query: its dot product with the middles. Of probabilities: the factor of older sums.
    pub more: f32,
}

/// The kernel.
///
/// # Safety
/// The CPU must have the level of `V` and `D`, and every pointer of the job must be valid as its
/// field documents.
#[inline(always)]
pub(crate) unsafe fn tiles<V: Words, D: ByteDot<V>>(job: &SealedJob<'_>) {
    // SAFETY: the caller's promise.
    unsafe {
        match job.heads * job.tokens {
            0 => {}
            1 => run::<V, D, 1>(job),
            _ => run::<V, D, 4>(job),
        }
    }
}

#[inline(always)]
unsafe fn run<V: Words, D: ByteDot<V>, const R: usize>(job: &SealedJob<'_>) {
    let dims = Dims::new(job.layout);
    let (s, _) = Scratch::new(job.scratch, &dims);
    let rows = job.heads * job.tokens;
    let padded = rows.next_multiple_of(R);
    let Dims { k_dim, v_dim, tokens, .. } = dims;
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
        s.o.write_bytes(0, padded * v_dim);
        for t in 0..tokens {
            s.count.add(t).write(t as f32);
        }
        let mut record = find(job, job.tiles.start);
        for tile in job.tiles.clone() {
            let next = if tile + 1 < job.tiles.end { find(job, tile + 1) } else { None };
            if tile + 2 < job.tiles.end {
                let block = job.table.add(tile as usize + 2).read();
                let record = job.records.wrapping_offset(block as isize * job.block_bytes);
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

/// The record of a tile; `None` where it is not sealed, or has none.
#[inline(always)]
unsafe fn find(job: &SealedJob<'_>, tile: u32) -> Option<*const u8> {
    // SAFETY: the caller's promise.
    unsafe {
        let block = job.table.add(tile as usize).read();
        if block >= 0 && (block as u32) < job.num_blocks {
            let record = job.records.wrapping_offset(block as isize * job.block_bytes);
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
    let half = V_HALF[BITS as usize];
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

/// The middle of the codes of each number of bits.
const V_HALF: [f32; 9] = [0.0, 0.5, 1.5, 3.5, 7.5, 15.5, 31.5, 63.5, 127.5];

/// Scales a query's channels to whole numbers, as bytes in the order of the codes.
#[inline(always)]
unsafe fn round_query<V: Words>(dims: &Dims, s: &Scratch, row: usize, r: usize) -> Rounded {
    let wide = dims.k_bits == 8;
    // SAFETY: the caller's promise.
    unsafe {
        let q = s.q.add(row * dims.k_dim);
        let (mut top, mut low) = (V::splat(0.0), V::splat(0.0));
        let mut middle = V::splat(0.0);
        for c in (0..dims.k_dim).step_by(V::LANES) {
            let q = V::load(q.add(c));
            let x = q.mul(V::load(s.step.add(c)));
            (top, low) = (top.max(x), low.min(x));
            middle = q.fma(V::load(s.mid.add(c)), middle);
        }
        let largest = top.top().max(V::splat(0.0).sub(low).top());
        let limit = if wide { WIDE } else { 127.0 };
        // Smaller ones mean nothing beside any other term.
        let usable = largest > 1e-30 && largest < 1e30;
        let factor = V::splat(if usable { limit / largest } else { 0.0 });
        let (mut sum_high, mut sum_low) = (V::splat(0.0), V::splat(0.0));
        let (high, low) = (s.buffer, s.buffer.add(dims.k_dim));
        for c in (0..dims.k_dim).step_by(V::LANES) {
            let x = V::load(q.add(c)).mul(V::load(s.step.add(c))).mul(factor).round();
            let (h, l) = if wide { halves::<V>(x) } else { (x, V::splat(0.0)) };
            sum_high = sum_high.add(h);
            h.store_bytes(high.add(c));
            if wide {
                sum_low = sum_low.add(l);
                l.store_bytes(low.add(c));
            }
        }
        let to = s.q_bytes.add(r * 2 * dims.k_dim / 4).cast::<u8>();
        order::<V>(dims.k_bits, high, dims.k_dim, to);
        if wide {
            order::<V>(dims.k_bits, low, dims.k_dim, to.add(dims.k_dim));
        }
        // What is past f32 shows as such.
        let unit = if usable {
            largest / limit
        } else if largest <= 1e-30 {
            0.0
        } else {
            f32::NAN
        };
        Rounded { unit, high: sum_high.sum(), low: sum_low.sum(), more: middle.sum() }
    }
}

/// A whole number within [`WIDE`] as `256 * high + low`, both within a signed byte.
#[inline(always)]
pub(super) unsafe fn halves<V: Words>(x: V) -> (V, V) {
    // SAFETY: the caller's promise.
    unsafe {
        let high = x.add(V::splat(0.5)).mul(V::splat(1.0 / 256.0)).round();
        (high, x.sub(high.mul(V::splat(256.0))))
    }
}

/// Brings bytes into the order of the codes.
#[inline(always)]
pub(super) unsafe fn order<V: Words>(bits: u32, from: *const u8, count: usize, to: *mut u8) {
    let pattern = match bits {
        8 => const { &codes::pattern(8) },
        4 => const { &codes::pattern(4) },
        _ => const { &codes::pattern(2) },
    };
    for at in (0..count).step_by(16) {
        // SAFETY: the caller's promise.
        unsafe { V::permute16(from.add(at), pattern, to.add(at)) }
    }
}

/// Scores of `R` rows with all keys of the tile, scaled.
#[inline(always)]
unsafe fn scores<V: Words, D: ByteDot<V>, const BITS: u32, const R: usize>(
    job: &SealedJob<'_>,
    dims: &Dims,
    s: &Scratch,
    queries: &[Rounded; GROUP],
) {
    let wide = BITS == 8;
    let (words, row_words) = (dims.k_words(), whole(dims.k_words()));
    let (parts, q_words) = (codes::parts(BITS), 2 * dims.k_dim / 4);
    let side = if V::MANY_REGISTERS { 2 } else { 1 };
    // SAFETY: the caller's promise.
    unsafe {
        let mut t = 0;
        while t < dims.tokens {
            let zero = V::splat_word(0);
            let (mut high, mut low) = ([[zero; R]; 2], [[zero; R]; 2]);
            for w in 0..words {
                let mut codes = [[zero; 4]; 2];
                for i in 0..side {
                    let at = (t + i * V::LANES) * row_words + w * V::LANES;
                    let third = if BITS == 3 {
                        let row = whole(dims.k_plane_row);
                        V::load_words(s.k_plane.add((t + i * V::LANES) * row + w / 2 * V::LANES))
                    } else {
                        zero
                    };
                    codes[i] = codes::bytes::<V, BITS>(V::load_words(s.k.add(at)), third, w);
                }
                for part in 0..parts {
                    for r in 0..R {
                        let q = s.q_bytes.add(r * q_words + w * parts + part);
                        let by = V::splat_word(q.read());
                        for i in 0..side {
                            high[i][r] = dot::<V, D, BITS>(high[i][r], codes[i][part], by);
                        }
                        if wide {
                            let by = V::splat_word(q.add(dims.k_dim / 4).read());
                            for i in 0..side {
                                low[i][r] = dot::<V, D, BITS>(low[i][r], codes[i][part], by);
                            }
                        }
                    }
                }
            }
            for i in 0..side {
                for r in 0..R {
                    let query = &queries[r];
                    let half = V_HALF[BITS as usize];
                    let mut x = V::words_to_f32(high[i][r]).sub(V::splat(half * query.high));
                    if wide {
                        let low = V::words_to_f32(low[i][r]).sub(V::splat(half * query.low));
                        x = x.fma(V::splat(256.0), low);
                    }
                    let unit = V::splat(query.unit * job.scale);
                    let x = x.fma(unit, V::splat(query.more * job.scale));
                    x.store(s.s.add(r * dims.tokens + t + i * V::LANES));
                }
            }
            t += side * V::LANES;
        }
    }
}

#[inline(always)]
unsafe fn dot<V: Words, D: ByteDot<V>, const BITS: u32>(
    acc: V::Word,
    codes: V::Word,
    by: V::Word,
) -> V::Word {
    // SAFETY: the caller's promise.
    unsafe {
        if BITS == 8 { D::dot::<false>(acc, codes, by) } else { D::dot::<true>(acc, codes, by) }
    }
}

/// Adds the values of the tile, weighted by the probabilities of `R` rows, to their sums.
#[inline(always)]
unsafe fn values<V: Words, D: ByteDot<V>, const BITS: u32, const R: usize>(
    dims: &Dims,
    s: &Scratch,
    first: usize,
    weights: &[Rounded; GROUP],
) {
    let (words, parts, p_words) = (dims.v_words, codes::parts(BITS), 2 * dims.tokens / 4);
    let side = if V::MANY_REGISTERS && (dims.v_dim / V::LANES).is_multiple_of(2) { 2 } else { 1 };
    // 8-bit codes are signed: flipped in their highest bit they are 128 more, and unsigned.
    let half = if BITS == 8 { 128.0 } else { V_HALF[BITS as usize] };
    let step = if BITS == 8 { 1.0 } else { value_step(BITS) };
    // SAFETY: the caller's promise.
    unsafe {
        let mut c = 0;
        while c < dims.v_dim {
            let zero = V::splat_word(0);
            let (mut high, mut low) = ([[zero; R]; 2], [[zero; R]; 2]);
            for w in 0..words {
                let mut codes = [[zero; 4]; 2];
                for i in 0..side {
                    let at = (c + i * V::LANES) * words + w * V::LANES;
                    let mut word = V::load_words(s.v.add(at));
                    if BITS == 8 {
                        word = V::xor_high_bits(word);
                    }
                    let third = if BITS == 3 {
                        let words = dims.v_plane_words;
                        V::load_words(s.v_plane.add((c + i * V::LANES) * words + w / 2 * V::LANES))
                    } else {
                        zero
                    };
                    codes[i] = codes::bytes::<V, BITS>(word, third, w);
                }
                for part in 0..parts {
                    for r in 0..R {
                        let p = s.p_bytes.add(r * p_words + w * parts + part);
                        let by = V::splat_word(p.read());
                        let by_low = V::splat_word(p.add(dims.tokens / 4).read());
                        for i in 0..side {
                            high[i][r] = dot::<V, D, BITS>(high[i][r], codes[i][part], by);
                            low[i][r] = dot::<V, D, BITS>(low[i][r], codes[i][part], by_low);
                        }
                    }
                }
            }
            for i in 0..side {
                for r in 0..R {
                    let p = &weights[r];
                    let high = V::words_to_f32(high[i][r]).sub(V::splat(half * p.high));
                    let low = V::words_to_f32(low[i][r]).sub(V::splat(half * p.low));
                    let sum = high.fma(V::splat(256.0), low);
                    let o = s.o.add((first + r) * dims.v_dim + c + i * V::LANES);
                    let older = V::load(o).mul(V::splat(p.more));
                    sum.fma(V::splat(p.unit * step), older).store(o);
                }
            }
            c += side * V::LANES;
        }
    }
}

/// The same for values that lie in keys, from f32.
#[inline(always)]
unsafe fn latent_values<V: Words, const R: usize>(
    dims: &Dims,
    s: &Scratch,
    first: usize,
    weights: &[Rounded; GROUP],
) {
    let rows = s.v.cast::<f32>();
    // SAFETY: the caller's promise.
    unsafe {
        for c in (0..dims.v_dim).step_by(V::LANES) {
            let mut sums = [V::splat(0.0); R];
            for r in 0..R {
                let o = V::load(s.o.add((first + r) * dims.v_dim + c));
                sums[r] = o.mul(V::splat(weights[r].more));
            }
            for t in 0..dims.tokens {
                let x = V::load(rows.add(t * dims.v_dim + c));
                for r in 0..R {
                    let p = V::splat(s.s.add(r * dims.tokens + t).read());
                    sums[r] = x.fma(p, sums[r]);
                }
            }
            for r in 0..R {
                sums[r].store(s.o.add((first + r) * dims.v_dim + c));
            }
        }
    }
}

/// Formats whose values are summed up rotated.
pub(super) fn rotated(format: KvFormat, v_in_k: bool) -> bool {
    !v_in_k && format.v_bits() < 8
}
