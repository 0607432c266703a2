//! Raw rows to records, by the rules of [`crate::quant::seal`] and to its bits.
//!
//! Keys keep their channels in the lanes; values, in `seal_values.rs`, have tokens in them. Nothing is
//! fused, and least and largest elements do not depend on an order.

use core::sync::atomic::Ordering;

use super::SealedKernels;
use super::args::SealArgs;
use super::codes;
use super::seal_values::seal_values;
use crate::cpu::executor::Executor;
use crate::cpu::level::CpuLevel;
use crate::cpu::vector::prefetch_far;
use crate::cpu::words::Words;
use crate::error::{Error, Result};
use crate::layout::tile::TileLayout;
use crate::layout::{MAX_HEAD_DIM, Strides};
use crate::quant::{self, HEADER_CRC, HEADER_FORMAT, HEADER_UNITS, Keys};

const K_DIM: usize = MAX_HEAD_DIM as usize;
/// The most lanes.
pub(super) const LANES: usize = 16;

/// One record: rows of bf16 of one head, and where it goes.
pub(crate) struct SealJob<'a> {
    pub layout: &'a TileLayout,
    /// `[tokens]` rows of `k_dim`.
    pub k: HeadRows,
    /// `[tokens]` rows of `v_dim`; not read where values lie in keys.
    pub v: HeadRows,
    /// Written.
    pub record: *mut u8,
    /// What is likely read next, for prefetches: while keys are read, and while values are.
    pub ahead: [HeadRows; 2],
}

/// Rows of one head.
#[derive(Clone, Copy)]
pub(crate) struct HeadRows {
    pub start: *const u8,
    /// Bytes from one to the next.
    pub bytes: isize,
}

impl HeadRows {
    /// Where row `token` begins.
    #[inline(always)]
    pub fn row(&self, token: usize) -> *const u8 {
        self.start.wrapping_offset(token as isize * self.bytes)
    }

    /// Those from row `first` on.
    #[inline(always)]
    pub fn from(self, first: usize) -> Self {
        Self { start: self.row(first), ..self }
    }

    /// Asks for `count` lines of a row, from line `first` on. Any address will do.
    #[inline(always)]
    pub fn prefetch(&self, token: usize, first: usize, count: usize) {
        for line in first..first + count {
            prefetch_far(self.row(token).wrapping_add(LINE * line));
        }
    }
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
        let own = args.rows(args.list[index].slot, head);
        let next = args.list.get((unit + 1) / heads);
        let next = next.and_then(|tile| args.rows(tile.slot, ((unit + 1) % heads) as u32));
        let ahead = own.map(|[k, v]| [v, next.map_or(k, |[k, _]| k)]);
        // SAFETY: the caller's promise; blocks are distinct, so records are.
        unsafe { args.seal_head(index, head, ahead, seal) };
    });
    Ok(())
}

impl SealArgs<'_> {
    /// The raw rows of a slot and head, keys and values (keys again where those lie in them); `None`
    /// for a slot outside the cache.
    fn rows(&self, slot: i32, head: u32) -> Option<[HeadRows; 2]> {
        let (raw, block) = self.tiles.raw(slot)?;
        let at = |base: *mut u8, strides: &Strides| {
            let elements = i64::from(block) * strides.block + i64::from(head) * strides.head;
            let start = base.wrapping_offset(elements as isize * 2).cast_const();
            HeadRows { start, bytes: strides.token as isize * 2 }
        };
        let keys = at(raw.k, &raw.k_strides);
        Some([keys, if self.shape.v_in_k { keys } else { at(raw.v, &raw.v_strides) }])
    }

    /// Seals one head of a tile of the list; its slot and block were checked. `ahead` is what will
    /// be read next, if that is known.
    ///
    /// # Safety
    /// As for [`seal_tiles`], of whose kernels `seal` is one.
    pub(super) unsafe fn seal_head(
        &self,
        index: usize,
        head: u32,
        ahead: Option<[HeadRows; 2]>,
        seal: unsafe fn(&SealJob<'_>) -> bool,
    ) {
        let tile = self.list[index];
        let (Some(record), Some([k, v])) =
            (self.tiles.record(tile.block, head), self.rows(tile.slot, head))
        else {
            return;
        };
        let ahead = ahead.unwrap_or([v, k]);
        let job = SealJob { layout: self.tiles.layout, k, v, record, ahead };
        // SAFETY: the caller's promise.
        if !unsafe { seal(&job) } {
            self.refused[index].store(1, Ordering::Relaxed);
        }
    }
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
        begin_record(job);
        let sealed = seal_keys::<V>(job)
            && (job.layout.shape().v_in_k
                || match job.layout.format().v_bits() {
                    8 => seal_values::<V, 8>(job),
                    4 => seal_values::<V, 4>(job),
                    3 => seal_values::<V, 3>(job),
                    _ => seal_values::<V, 2>(job),
                });
        if sealed {
            finish_record::<V>(job);
        }
        sealed
    }
}

/// Makes the record say that it is not sealed.
///
/// # Safety
/// As for [`seal_record`].
#[inline(always)]
pub(in crate::cpu) unsafe fn begin_record(job: &SealJob<'_>) {
    let format = job.layout.header.start + HEADER_FORMAT;
    // SAFETY: the caller's promise.
    unsafe { job.record.add(format).write_bytes(0, HEADER_CRC - HEADER_FORMAT) }
}

/// Makes a record whose arrays and units are written say that it is sealed.
///
/// # Safety
/// As for [`seal_record`].
#[inline(always)]
pub(in crate::cpu) unsafe fn finish_record<V: Words>(job: &SealJob<'_>) {
    // SAFETY: the caller's promise.
    unsafe {
        let header = job.record.add(job.layout.header.start);
        let identity = quant::header_identity(job.layout);
        header.add(HEADER_FORMAT).copy_from_nonoverlapping(identity.as_ptr(), identity.len());
        let before = quant::crc32c(0, &quant::header_dims(job.layout));
        let bytes = job.layout.header.start + HEADER_CRC;
        let crc = V::crc32c(before, job.record, bytes).to_le_bytes();
        header.add(HEADER_CRC).copy_from_nonoverlapping(crc.as_ptr(), crc.len());
    }
}

/// Bytes of a cache line.
const LINE: usize = 64;

/// Least and largest elements of the channels of `N` vectors from `c` on; 0 in every lane, or NaN for
/// what is not finite.
///
/// # Safety
/// As for [`seal_record`].
#[inline(always)]
unsafe fn ranges_of<V: Words, const N: usize>(
    job: &SealJob<'_>,
    c: usize,
    ranges: &mut [(f32, f32); K_DIM],
) -> V {
    let (shape, lines) = (job.layout.shape(), (2 * N * V::LANES).div_ceil(LINE));
    // SAFETY: the caller's promise; prefetches may have any address.
    unsafe {
        let at = |token: usize, i: usize| job.k.row(token).cast::<u16>().add(c + i * V::LANES);
        let (mut low, mut broken) = ([V::splat(0.0); N], [V::splat(0.0); N]);
        for i in 0..N {
            low[i] = V::load_bf16(at(0, i));
        }
        let mut high = low;
        for token in 0..shape.tokens as usize {
            job.ahead[0].prefetch(token, 2 * c / LINE, lines);
            for i in 0..N {
                let x = V::load_bf16(at(token, i));
                (low[i], high[i]) = (low[i].min(x), high[i].max(x));
                broken[i] = broken[i].add(x.sub(x));
            }
        }
        let (mut lows, mut highs) = ([0.0f32; LANES], [0.0f32; LANES]);
        for i in 0..N {
            low[i].store(lows.as_mut_ptr());
            high[i].store(highs.as_mut_ptr());
            for lane in 0..V::LANES {
                ranges[c + i * V::LANES + lane] = (lows[lane], highs[lane]);
            }
        }
        let mut all = broken[0];
        for i in 1..N {
            all = all.add(broken[i]);
        }
        all
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
        let mut broken = V::splat(0.0);
        let mut c = 0;
        while c < k_dim {
            // As many as registers hold.
            let left = (k_dim - c) / V::LANES;
            let (found, vectors) = match left {
                8.. if V::LANES == 16 => (ranges_of::<V, 8>(job, c, &mut ranges), 8),
                4.. => (ranges_of::<V, 4>(job, c, &mut ranges), 4),
                _ => (ranges_of::<V, 1>(job, c, &mut ranges), 1),
            };
            broken = broken.add(found);
            c += vectors * V::LANES;
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
            let row = job.k.row(token).cast::<u16>();
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

/// Packs `count` codes (a multiple of 16) as [`crate::quant`] does; the bytes of `main` that takes.
///
/// # Safety
/// As for [`seal_record`].
#[inline(always)]
pub(super) unsafe fn pack<V: Words, const BITS: u32>(
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
