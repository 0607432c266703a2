//! Raw rows to records, by the rules of [`crate::quant::seal`] and to its bits.
//!
//! Keys keep their channels in the lanes; values have tokens in them, so that the rotation and the
//! sums over a row are the reference's own, operation for operation, for several tokens at once.
//! Nothing is fused, and least and largest elements do not depend on an order.

use core::mem::MaybeUninit;
use core::sync::atomic::Ordering;

use super::SealedKernels;
use super::args::SealArgs;
use super::codes;
use crate::cpu::executor::Executor;
use crate::cpu::level::CpuLevel;
use crate::cpu::words::Words;
use crate::dtype::f16;
use crate::error::{Error, Result};
use crate::layout::tile::TileLayout;
use crate::layout::{MAX_HEAD_DIM, MAX_SPLIT_HEAD_DIM};
use crate::quant::{self, HEADER_CRC, HEADER_FORMAT, HEADER_UNITS, Keys};

/// The most tokens of a tile.
const MAX_TOKENS: usize = 128;
const K_DIM: usize = MAX_HEAD_DIM as usize;
const V_DIM: usize = MAX_SPLIT_HEAD_DIM as usize;
/// The most lanes.
const LANES: usize = 16;

/// One record: rows of bf16 of one head, and where it goes.
pub(crate) struct SealJob<'a> {
    pub layout: &'a TileLayout,
    /// `[tokens]` rows of `k_dim`, and the bytes from one to the next.
    pub k: *const u8,
    pub k_row_bytes: isize,
    /// The same of values; not read where values lie in keys.
    pub v: *const u8,
    pub v_row_bytes: isize,
    /// Written.
    pub record: *mut u8,
}

/// Seals full raw tiles, every head of the layer, as [`crate::quant::seal`] does: the same bits at
/// every level and with any number of threads. A head that cannot be sealed leaves a record that
/// says so, and sets its tile's entry of `refused`. Allocates nothing.
///
/// # Errors
/// `InvalidArgument`, `NullPointer`, `Misaligned`, `Overflow` for arguments outside their documented
/// ranges, `BadBlock` for a slot or block outside the cache, `Unsupported` for a level this CPU
/// lacks. Nothing has been written then.
///
/// # Safety
/// All rows of the slots must be readable and the blocks' records writable; blocks must be
/// distinct, and nobody else may touch those records during the call.
pub unsafe fn seal_tiles(
    args: &SealArgs<'_>,
    level: CpuLevel,
    executor: &(impl Executor + ?Sized),
) -> Result<()> {
    if !level.is_available() {
        return Err(Error::Unsupported { what: "the CPU level" });
    }
    args.check()?;
    let seal = SealedKernels::of(level).seal;
    let heads = args.shape.kv_heads as usize;
    let units = args.list.len().checked_mul(heads).ok_or(Error::Overflow { what: "tiles" })?;
    executor.run(units, &|_, unit| {
        let (index, head) = (unit / heads, (unit % heads) as u32);
        let tile = args.list[index];
        let (Some(record), Some((raw, block))) =
            (args.tiles.record(tile.block, head), args.tiles.raw(tile.slot))
        else {
            return;
        };
        let at = |base: *mut u8, block_stride: i64, head_stride: i64| {
            let elements = i64::from(block) * block_stride + i64::from(head) * head_stride;
            base.wrapping_offset(elements as isize * 2).cast_const()
        };
        let (k, v) = (&raw.k_strides, &raw.v_strides);
        let job = SealJob {
            layout: args.tiles.layout,
            k: at(raw.k, k.block, k.head),
            k_row_bytes: k.token as isize * 2,
            v: at(raw.v, v.block, v.head),
            v_row_bytes: v.token as isize * 2,
            record,
        };
        // SAFETY: the caller's promise; blocks are distinct, so records are.
        if !unsafe { seal(&job) } {
            args.refused[index].store(1, Ordering::Relaxed);
        }
    });
    Ok(())
}

/// Seals one record; false where its rows cannot be sealed.
///
/// # Safety
/// The CPU must have the level of `V`, and every pointer of the job must be valid as its field
/// documents.
#[inline(always)]
pub(crate) unsafe fn seal_record<V: Words>(job: &SealJob<'_>) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        let header = job.record.add(job.layout.header.start);
        let format = header.add(HEADER_FORMAT);
        format.write_bytes(0, HEADER_CRC - HEADER_FORMAT);
        let sealed = seal_keys::<V>(job)
            && (job.layout.shape().v_in_k
                || match job.layout.format().v_bits() {
                    8 => seal_values::<V, 8>(job),
                    4 => seal_values::<V, 4>(job),
                    3 => seal_values::<V, 3>(job),
                    _ => seal_values::<V, 2>(job),
                });
        if sealed {
            let identity = quant::header_identity(job.layout);
            format.copy_from_nonoverlapping(identity.as_ptr(), identity.len());
            let before = quant::crc32c(0, &quant::header_dims(job.layout));
            let bytes = job.layout.header.start + HEADER_CRC;
            let crc = V::crc32c(before, job.record, bytes).to_le_bytes();
            header.add(HEADER_CRC).copy_from_nonoverlapping(crc.as_ptr(), crc.len());
        }
        sealed
    }
}

/// # Safety
/// As for [`seal_record`].
#[inline(always)]
unsafe fn seal_keys<V: Words>(job: &SealJob<'_>) -> bool {
    let (layout, shape) = (job.layout, job.layout.shape());
    let (k_dim, tokens) = (shape.k_dim as usize, shape.tokens as usize);
    let mut keys = Keys::new(layout);
    let mut ranges = [(0.0, 0.0); K_DIM];
    // SAFETY: the caller's promise.
    unsafe {
        let row = |token: usize| job.k.wrapping_offset(token as isize * job.k_row_bytes);
        let mut broken = V::splat(0.0);
        for c in (0..k_dim).step_by(V::LANES) {
            let first = V::load_bf16(row(0).cast::<u16>().add(c));
            let (mut low, mut high) = (first, first);
            for token in 0..tokens {
                let x = V::load_bf16(row(token).cast::<u16>().add(c));
                (low, high) = (low.min(x), high.max(x));
                // 0, or NaN for what is not finite.
                broken = broken.add(x.sub(x));
            }
            let (mut lows, mut highs) = ([0.0f32; LANES], [0.0f32; LANES]);
            low.store(lows.as_mut_ptr());
            high.store(highs.as_mut_ptr());
            for i in 0..V::LANES {
                ranges[c + i] = (lows[i], highs[i]);
            }
        }
        if broken.sum() != 0.0 {
            return false;
        }
        for (part, channels) in layout.k_parts().into_iter().enumerate() {
            if !channels.is_empty() && keys.measure(part, channels, &ranges).is_none() {
                return false;
            }
        }
        let (mut base, mut step) = ([0.0f32; K_DIM], [0.0f32; K_DIM]);
        for c in 0..k_dim {
            (base[c], step[c]) = (keys.channels[c].base, keys.channels[c].step);
        }
        let mut codes = [0u8; K_DIM];
        let n = ((1u32 << layout.format().k_bits()) - 1) as f32;
        for token in 0..tokens {
            let row = row(token).cast::<u16>();
            for c in (0..k_dim).step_by(V::LANES) {
                let step = V::load(step.as_ptr().add(c));
                let x = V::load_bf16(row.add(c)).sub(V::load(base.as_ptr().add(c))).div(step);
                let code = x.max(V::splat(-1.0)).min(V::splat(n + 1.0)).round();
                let code = code.max(V::splat(0.0)).min(V::splat(n));
                // A step of 0 has only code 0.
                code.above(step, V::splat(f32::from_bits(1)))
                    .store_bytes(codes.as_mut_ptr().add(c));
            }
            let (main, plane) = layout.k_row(token);
            let bytes = main.len();
            let (main, plane) = (job.record.add(main.start), job.record.add(plane.start));
            let used = match layout.format().k_bits() {
                8 => pack::<V, 8>(codes.as_ptr(), k_dim, main, plane),
                4 => pack::<V, 4>(codes.as_ptr(), k_dim, main, plane),
                3 => pack::<V, 3>(codes.as_ptr(), k_dim, main, plane),
                _ => pack::<V, 2>(codes.as_ptr(), k_dim, main, plane),
            };
            main.add(used).write_bytes(0, bytes - used);
            if layout.format().k_bits() == 3 {
                let used = k_dim.div_ceil(32) * 4;
                plane.add(used).write_bytes(0, layout.k_row(token).1.len() - used);
            }
        }
        let (steps, mids) = (layout.k_steps.start, layout.k_mids.start);
        job.record.add(steps).copy_from_nonoverlapping(keys.steps.as_ptr(), k_dim);
        job.record.add(mids).copy_from_nonoverlapping(keys.mids.as_ptr().cast(), k_dim);
        let mut at = layout.header.start + HEADER_UNITS;
        for (unit, mid_unit) in keys.units {
            for x in [unit, mid_unit] {
                job.record.add(at).cast::<[u8; 2]>().write(x.to_le_bytes());
                at += 2;
            }
        }
    }
    true
}

/// # Safety
/// As for [`seal_record`], where values are stored.
#[inline(always)]
unsafe fn seal_values<V: Words, const BITS: u32>(job: &SealJob<'_>) -> bool {
    let layout = job.layout;
    let (v_dim, tokens) = (layout.shape().v_dim as usize, layout.shape().tokens as usize);
    let mut rows = MaybeUninit::<[f32; LANES * V_DIM]>::uninit();
    let mut lanes = MaybeUninit::<[f32; LANES * V_DIM]>::uninit();
    let mut bytes = MaybeUninit::<[u8; V_DIM * MAX_TOKENS]>::uninit();
    let (rows, y) = (rows.as_mut_ptr().cast::<f32>(), lanes.as_mut_ptr().cast::<f32>());
    let bytes = bytes.as_mut_ptr().cast::<u8>();
    // SAFETY: the caller's promise; the buffers hold the largest tile, and are written before they
    // are read.
    unsafe {
        let mut broken = V::splat(0.0);
        for first in (0..tokens).step_by(V::LANES) {
            for i in 0..V::LANES {
                let row = job.v.wrapping_offset((first + i) as isize * job.v_row_bytes);
                for c in (0..v_dim).step_by(V::LANES) {
                    let x = V::load_bf16(row.cast::<u16>().add(c));
                    broken = broken.add(x.sub(x));
                    x.store(rows.add(i * v_dim + c));
                }
            }
            for c in (0..v_dim).step_by(V::LANES) {
                let to = y.add(c * V::LANES).cast();
                V::transpose(rows.add(c).cast(), v_dim, to, V::LANES);
            }
            if broken.sum() != 0.0 {
                return false;
            }
            let bytes = bytes.add(first);
            let scales = if BITS == 8 {
                plain_codes::<V>(y, v_dim, tokens, bytes)
            } else {
                rotate::<V>(y, v_dim);
                rotated_codes::<V, BITS>(y, rows, v_dim, tokens, bytes)
            };
            let Some(scales) = scales else { return false };
            let to = job.record.add(layout.v_scales.start + 2 * first).cast::<[u8; 2]>();
            for i in 0..V::LANES {
                to.add(i).write(scales[i].to_le_bytes());
            }
        }
        for c in 0..v_dim {
            let (main, plane) = layout.v_channel(c);
            let (main, plane) = (job.record.add(main.start), job.record.add(plane.start));
            pack::<V, BITS>(bytes.add(c * tokens), tokens, main, plane);
        }
    }
    true
}

/// Codes of 8 bits of `LANES` tokens, `[channel]` bytes `tokens` apart, and the tokens' scales.
///
/// # Safety
/// As for [`seal_record`].
#[inline(always)]
unsafe fn plain_codes<V: Words>(
    y: *const f32,
    v_dim: usize,
    tokens: usize,
    bytes: *mut u8,
) -> Option<[f16; LANES]> {
    let (mut largest, mut steps) = ([0.0f32; LANES], [0.0f32; LANES]);
    let mut scales = [f16::ZERO; LANES];
    // SAFETY: the caller's promise.
    unsafe {
        let mut top = V::splat(0.0);
        for c in 0..v_dim {
            let x = V::load(y.add(c * V::LANES));
            top = top.max(x).max(V::splat(0.0).sub(x));
        }
        top.store(largest.as_mut_ptr());
        for i in 0..V::LANES {
            // Not the sign of a zero that happened to be the largest.
            scales[i] = quant::f16_up(largest[i] / 127.0 + 0.0)?;
            steps[i] = scales[i].to_f32();
        }
        let step = V::load(steps.as_ptr());
        for c in 0..v_dim {
            let x = V::load(y.add(c * V::LANES)).div(step);
            let code = x.max(V::splat(-127.0)).min(V::splat(127.0)).round();
            code.above(step, V::splat(f32::from_bits(1))).store_bytes(bytes.add(c * tokens));
        }
    }
    Some(scales)
}

/// Rotates `LANES` rows, `[channel][lane]`, as [`crate::quant::rotate`] does one.
///
/// # Safety
/// As for [`seal_record`].
#[inline(always)]
unsafe fn rotate<V: Words>(y: *mut f32, dim: usize) {
    let n = quant::hadamard_block(dim);
    // SAFETY: the caller's promise.
    unsafe {
        for c in 0..dim {
            if quant::SIGNS[c / 64] >> (c % 64) & 1 == 1 {
                let y = y.add(c * V::LANES);
                V::load(y).mul(V::splat(-1.0)).store(y);
            }
        }
        // Two steps at a time: half as much goes through memory, and sums are the same.
        let mut half = 1;
        while 2 * half < n {
            for first in (0..dim).step_by(4 * half) {
                for at in first..first + half {
                    let p = |i: usize| y.add((at + i * half) * V::LANES);
                    let (a, b) = (V::load(p(0)), V::load(p(1)));
                    let (c, d) = (V::load(p(2)), V::load(p(3)));
                    let (a, b, c, d) = (a.add(b), a.sub(b), c.add(d), c.sub(d));
                    a.add(c).store(p(0));
                    b.add(d).store(p(1));
                    a.sub(c).store(p(2));
                    b.sub(d).store(p(3));
                }
            }
            half *= 4;
        }
        if half < n {
            for first in (0..dim).step_by(2 * half) {
                for at in first..first + half {
                    let (a, b) = (y.add(at * V::LANES), y.add((at + half) * V::LANES));
                    let (low, high) = (V::load(a), V::load(b));
                    low.add(high).store(a);
                    low.sub(high).store(b);
                }
            }
        }
        let scale = V::splat(quant::hadamard_scale(n));
        for c in 0..dim {
            V::load(y.add(c * V::LANES)).mul(scale).store(y.add(c * V::LANES));
        }
    }
}

/// Codes below 8 bits of `LANES` rotated tokens, `[channel]` bytes `tokens` apart, and their
/// scales. `terms` has room for as many f32 as `y`.
///
/// # Safety
/// As for [`seal_record`].
#[inline(always)]
unsafe fn rotated_codes<V: Words, const BITS: u32>(
    y: *const f32,
    terms: *mut f32,
    v_dim: usize,
    tokens: usize,
    bytes: *mut u8,
) -> Option<[f16; LANES]> {
    let (mut squares, mut widths) = ([0.0f32; LANES], [0.0f32; LANES]);
    let mut scales = [f16::ZERO; LANES];
    let (step, middle) = (quant::value_step(BITS), (1u32 << (BITS - 1)) as f32);
    let n = ((1u32 << BITS) - 1) as f32;
    // SAFETY: the caller's promise.
    unsafe {
        for c in 0..v_dim {
            let y = V::load(y.add(c * V::LANES));
            y.mul(y).store(terms.add(c * V::LANES));
        }
        tree_sum::<V>(terms, v_dim).store(squares.as_mut_ptr());
        for i in 0..V::LANES {
            if !squares[i].is_finite() {
                return None;
            }
            widths[i] = libm::sqrtf(squares[i] / v_dim as f32) * step;
        }
        let width = V::load(widths.as_ptr());
        let tiny = V::splat(f32::from_bits(1));
        for c in 0..v_dim {
            let y = V::load(y.add(c * V::LANES));
            // Codes end long before 16 widths.
            let x = y.div(width).max(V::splat(-16.0)).min(V::splat(16.0));
            let near = x.round();
            let floor = near.sub(V::splat(1.0).above(near.sub(x), tiny));
            let code = floor.add(V::splat(middle)).max(V::splat(0.0)).min(V::splat(n));
            let code = code.above(width, tiny);
            code.store_bytes(bytes.add(c * tokens));
            let point = code.add(V::splat(0.5)).sub(V::splat(middle)).mul(V::splat(step));
            y.mul(point).store(terms.add(c * V::LANES));
        }
        let mut aligned = [0.0f32; LANES];
        tree_sum::<V>(terms, v_dim).store(aligned.as_mut_ptr());
        for i in 0..V::LANES {
            if widths[i] != 0.0 {
                scales[i] = f16::from_f32(squares[i] / aligned[i]);
                if !scales[i].is_finite() {
                    return None;
                }
            }
        }
    }
    Some(scales)
}

/// The sums over the channels of `[channel][lane]` terms, which it uses up, in the order of
/// [`crate::quant::tree_sum`].
///
/// # Safety
/// As for [`seal_record`].
#[inline(always)]
unsafe fn tree_sum<V: Words>(terms: *mut f32, mut count: usize) -> V {
    // SAFETY: the caller's promise.
    unsafe {
        while count > 1 {
            for at in 0..count / 2 {
                let (a, b) = (terms.add(2 * at * V::LANES), terms.add((2 * at + 1) * V::LANES));
                V::load(a).add(V::load(b)).store(terms.add(at * V::LANES));
            }
            if count % 2 == 1 {
                V::load(terms.add((count - 1) * V::LANES)).store(terms.add(count / 2 * V::LANES));
            }
            count = count.div_ceil(2);
        }
        V::load(terms)
    }
}

/// Packs `count` codes (a multiple of 16) as [`crate::quant`] does; the bytes of `main` that takes.
///
/// # Safety
/// As for [`seal_record`].
#[inline(always)]
unsafe fn pack<V: Words, const BITS: u32>(
    codes: *const u8,
    count: usize,
    main: *mut u8,
    plane: *mut u8,
) -> usize {
    let group_bytes = 16 / codes::parts(BITS);
    let pattern = const { &codes::pattern(BITS) };
    // SAFETY: the caller's promise; records are little-endian in memory.
    unsafe {
        for group in 0..count / 16 {
            let (from, to) = (codes.add(16 * group), main.add(group_bytes * group));
            if BITS == 8 {
                to.copy_from_nonoverlapping(from, 16);
                continue;
            }
            let mut ordered = [0u8; 16];
            V::permute16(from, pattern, ordered.as_mut_ptr());
            let word =
                |i: usize| u32::from_le_bytes(ordered.as_ptr().cast::<[u8; 4]>().add(i).read());
            // Written out: a map of the array becomes a call here.
            let p = [word(0), word(1), word(2), word(3)];
            if BITS == 4 {
                let words = u64::from(p[0] | p[1] << 4) | u64::from(p[2] | p[3] << 4) << 32;
                to.cast::<[u8; 8]>().write(words.to_le_bytes());
                continue;
            }
            let two = 0x0303_0303;
            let low = [p[0] & two, p[1] & two, p[2] & two, p[3] & two];
            let word = low[0] | low[1] << 2 | low[2] << 4 | low[3] << 6;
            to.cast::<[u8; 4]>().write(word.to_le_bytes());
            if BITS == 3 {
                let third = |i: usize| (p[i] >> 2 & 0x0101_0101) << i;
                let nibbles = third(0) | third(1) | third(2) | third(3);
                let half = nibbles & 0x000f_000f | (nibbles & 0x0f00_0f00) >> 4;
                let to = plane.add(group / 2 * 4).cast::<[u8; 4]>();
                let word =
                    if group % 2 == 0 { half } else { u32::from_le_bytes(to.read()) | half << 8 };
                to.write(word.to_le_bytes());
            }
        }
    }
    count / 16 * group_bytes
}
