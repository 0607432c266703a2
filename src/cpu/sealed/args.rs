//! What callers of the sealed-tile kernels hand over: views, tables, and their checks.
//!
//! As in `args.rs` beside: whatever can be checked without reading the cache is checked before a
//! kernel runs. No kernel code here.

use core::sync::atomic::AtomicU32;

use crate::attention::{HeadShape, Scoring};
use crate::cpu::args::{BlockTables, KvView, RowsView, check_ptr, check_span};
use crate::dtype::{FormatClass, KvFormat};
use crate::error::{Error, Result};
use crate::layout::tile::TileLayout;

/// The sealed tiles of one layer, and the raw rows of those that are not sealed.
///
/// The record of block `b` and KV head `h` lies at `records + b * block_bytes + h * head_bytes`,
/// 16-byte aligned. Raw slot `s` is block `s` of `staging`, or past its end block
/// `s - staging.num_blocks` of `scratch`: rows of bf16 in blocks of as many tokens as a tile.
#[derive(Debug, Clone, Copy)]
pub struct TileView<'a> {
    /// Format, dimensions and arrays of a record.
    pub layout: &'a TileLayout,
    /// Record of block 0, head 0.
    pub records: *mut u8,
    /// Bytes from a block to the next: a multiple of 16.
    pub block_bytes: i64,
    /// Bytes from a KV head to the next within a block: a multiple of 16.
    pub head_bytes: i64,
    /// Blocks that exist.
    pub num_blocks: u32,
    /// Raw rows that outlive a step.
    pub staging: KvView,
    /// Raw rows of tiles that a step fills from end to end; may have no blocks.
    pub scratch: KvView,
}

/// Where the raw rows of one tile of a sequence lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct RawBlock {
    /// Which tile of the sequence: its tokens are `tile * tokens ..`.
    pub tile: i32,
    /// Raw slot.
    pub slot: i32,
}

/// The second table: the raw tiles of each sequence, ascending. Every tile that holds a query of
/// the call must be there, and every one before it whose record says that it is not sealed.
#[derive(Debug, Clone, Copy)]
pub struct RawTables {
    /// `[seqs + 1]` offsets into `blocks`, never decreasing, the first at least 0.
    pub indptr: *const i32,
    /// Tiles and slots.
    pub blocks: *const RawBlock,
}

/// One batched attention call over sealed tiles. Fields are those of
/// [`AttendArgs`](crate::cpu::AttendArgs), but for the cache itself.
#[derive(Debug, Clone, Copy)]
pub struct TileAttendArgs<'a> {
    /// Heads and channels: those of the record.
    pub shape: HeadShape,
    /// How scores are made; causal.
    pub scoring: Scoring<'a>,
    /// The cache.
    pub tiles: TileView<'a>,
    /// The block of each tile of each sequence. Not read for tiles that hold queries.
    pub tables: BlockTables,
    /// The raw tiles.
    pub raw: RawTables,
    /// Sequences in the batch.
    pub seqs: u32,
    /// `[seqs + 1]` offsets of query tokens, the first at least 0, never decreasing.
    pub q_indptr: *const i32,
    /// `[seqs]` cached tokens, at least 0, those of the queries included.
    pub kv_lens: *const i32,
    /// Queries, `q_heads` rows of `k_dim` a token. Only read.
    pub q: RowsView,
    /// Outputs, `q_heads` rows of `v_dim` a token. Must overlap nothing that the call reads.
    pub out: RowsView,
    /// `[query tokens][q_heads]` natural logarithms of the softmax denominators, or NULL.
    pub lse: *mut f32,
    /// Raised (set to 1) where a tile that is to be read has no block, or is neither sealed nor
    /// raw; its keys are masked.
    pub bad_block: Option<&'a AtomicU32>,
}

// SAFETY: the pointers are only followed inside `unsafe` entry points, whose contract makes what
// they point at readable (outputs: writable, disjoint per unit) from every worker of the call.
unsafe impl Send for TileAttendArgs<'_> {}
// SAFETY: as above.
unsafe impl Sync for TileAttendArgs<'_> {}

/// A full raw tile and the block that it is sealed into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct SealTile {
    /// Raw slot.
    pub slot: i32,
    /// Block of the record.
    pub block: i32,
}

/// Raw tiles that are to be sealed.
#[derive(Debug, Clone, Copy)]
pub struct SealArgs<'a> {
    /// Heads and channels; `q_heads` is not used.
    pub shape: HeadShape,
    /// The cache. Records are written, raw rows only read.
    pub tiles: TileView<'a>,
    /// What to seal; blocks must be distinct.
    pub list: &'a [SealTile],
    /// One for each of `list`: set to 1 where rows of some head cannot be sealed (NaN, infinity,
    /// scales past f16), else left as it is. The record of such a head says that it is not sealed,
    /// and its rows are read raw as long as the second table has them.
    pub refused: &'a [AtomicU32],
}

// SAFETY: as for `TileAttendArgs`.
unsafe impl Send for SealArgs<'_> {}
// SAFETY: as above.
unsafe impl Sync for SealArgs<'_> {}

/// The rows and tables of one sequence of a batch, as validated.
#[derive(Debug, Clone, Copy)]
pub(super) struct TileSequence<'a> {
    /// First query token.
    pub q_start: u32,
    /// Query tokens.
    pub q_tokens: u32,
    /// Cached tokens.
    pub kv_len: u32,
    /// Its block table.
    pub table: *const i32,
    /// Its raw tiles.
    pub raw: &'a [RawBlock],
}

impl<'a> TileView<'a> {
    /// Checks pointers, sizes and strides for `shape`.
    pub(super) fn check(&self, shape: &HeadShape) -> Result<()> {
        let tile = self.layout.shape();
        if (tile.k_dim, tile.v_dim, tile.v_in_k) != (shape.k_dim, shape.v_dim, shape.v_in_k) {
            return Err(Error::invalid("layout", "must have the channels of the call's shape"));
        }
        if self.num_blocks > i32::MAX as u32 {
            return Err(Error::invalid("num_blocks", "must fit in 31 bits"));
        }
        if self.num_blocks != 0 {
            check_ptr("records", self.records, KvFormat::ALIGN_BYTES)?;
        }
        if self.block_bytes % 16 != 0 || self.head_bytes % 16 != 0 {
            return Err(Error::invalid("block_bytes, head_bytes", "must be multiples of 16"));
        }
        check_span("block_bytes", self.block_bytes, self.num_blocks, 1)?;
        check_span("head_bytes", self.head_bytes, shape.kv_heads, 1)?;
        for raw in [&self.staging, &self.scratch] {
            if raw.num_blocks == 0 {
                continue;
            }
            if raw.format != KvFormat::Bf16 {
                return Err(Error::invalid("staging, scratch", "must hold rows of bf16"));
            }
            if raw.block_tokens != tile.tokens {
                return Err(Error::invalid("staging, scratch", "must have blocks of a tile"));
            }
            // SAFETY: rows of floats have no scales that would be read.
            unsafe { raw.check(shape) }?;
        }
        debug_assert_eq!(self.layout.format().class(), FormatClass::Tile);
        Ok(())
    }

    /// The raw view and the block in it of a slot; `None` for one outside both.
    pub(super) fn raw(&self, slot: i32) -> Option<(&KvView, u32)> {
        let slot = u32::try_from(slot).ok()?;
        if slot < self.staging.num_blocks {
            return Some((&self.staging, slot));
        }
        let slot = slot - self.staging.num_blocks;
        (slot < self.scratch.num_blocks).then_some((&self.scratch, slot))
    }

    /// The record of a block and head; `None` for a block outside the pool.
    #[inline(always)]
    pub(super) fn record(&self, block: i32, head: u32) -> Option<*mut u8> {
        let known = u32::try_from(block).is_ok_and(|block| block < self.num_blocks);
        let at = i64::from(block) * self.block_bytes + i64::from(head) * self.head_bytes;
        known.then(|| self.records.wrapping_offset(at as isize))
    }
}

impl<'a> TileAttendArgs<'a> {
    /// Checks all that can be checked without reading tiles, rows and queries.
    ///
    /// # Safety
    /// `q_indptr`, `kv_lens`, the CSR `indptr` and that of the raw tables must be readable to their
    /// documented lengths (or NULL or misaligned, which is an error).
    pub(super) unsafe fn check(&self) -> Result<()> {
        self.shape.check()?;
        self.scoring.check(self.shape.q_heads)?;
        if !self.scoring.causal {
            return Err(Error::invalid("causal", "must be set for sealed tiles"));
        }
        self.tiles.check(&self.shape)?;
        check_ptr("q_indptr", self.q_indptr.cast(), 4)?;
        if self.seqs == 0 {
            return Ok(());
        }
        check_ptr("kv_lens", self.kv_lens.cast(), 4)?;
        self.tables.check()?;
        check_ptr("raw indptr", self.raw.indptr.cast(), 4)?;
        if !self.lse.is_null() {
            check_ptr("lse", self.lse.cast_const().cast(), 4)?;
        }
        // SAFETY: the caller's promise.
        let total = unsafe { *self.q_indptr.add(self.seqs as usize) };
        let total = u32::try_from(total)
            .map_err(|_| Error::invalid("q_indptr", "must never decrease from 0"))?;
        self.q.check("q", total, self.shape.q_heads)?;
        self.out.check("out", total, self.shape.q_heads)?;
        for s in 0..self.seqs {
            // SAFETY: the caller's promise.
            unsafe { self.sequence(s) }?;
        }
        Ok(())
    }

    /// The rows and the tables of sequence `s`.
    ///
    /// # Safety
    /// As for [`check`](Self::check), and `s` must be below `seqs`.
    pub(super) unsafe fn sequence(&self, s: u32) -> Result<TileSequence<'a>> {
        let i = s as usize;
        // SAFETY: the caller's promise.
        let [from, to, kv_len, raw_from, raw_to] = unsafe {
            [
                *self.q_indptr.add(i),
                *self.q_indptr.add(i + 1),
                *self.kv_lens.add(i),
                *self.raw.indptr.add(i),
                *self.raw.indptr.add(i + 1),
            ]
        };
        if from < 0 || to < from {
            return Err(Error::invalid("q_indptr", "must never decrease from 0"));
        }
        if kv_len < 0 {
            return Err(Error::invalid("kv_lens", "must be at least 0"));
        }
        if raw_from < 0 || raw_to < raw_from {
            return Err(Error::invalid("raw indptr", "must never decrease from 0"));
        }
        let (q_tokens, kv_len) = ((to - from) as u32, kv_len as u32);
        if q_tokens > kv_len && kv_len != 0 {
            return Err(Error::invalid("kv_lens", "must count the sequence's query tokens"));
        }
        let raw = if raw_from == raw_to {
            &[]
        } else {
            check_ptr("raw blocks", self.raw.blocks.cast(), 4)?;
            let count = (raw_to - raw_from) as usize;
            // SAFETY: the caller's promise.
            unsafe { core::slice::from_raw_parts(self.raw.blocks.add(raw_from as usize), count) }
        };
        let blocks = kv_len.div_ceil(self.tiles.layout.shape().tokens);
        // SAFETY: the caller's promise.
        let table = unsafe { self.tables.of(s, blocks) }?;
        Ok(TileSequence { q_start: from as u32, q_tokens, kv_len, table, raw })
    }
}

impl SealArgs<'_> {
    /// Checks everything but the raw rows.
    pub(super) fn check(&self) -> Result<()> {
        self.shape.check()?;
        self.tiles.check(&self.shape)?;
        if self.refused.len() != self.list.len() {
            return Err(Error::invalid("refused", "must have one entry a tile"));
        }
        for tile in self.list {
            if self.tiles.record(tile.block, 0).is_none() {
                return Err(Error::BadBlock { block: tile.block as u32 });
            }
            if self.tiles.raw(tile.slot).is_none() {
                return Err(Error::BadBlock { block: tile.slot as u32 });
            }
        }
        Ok(())
    }
}
