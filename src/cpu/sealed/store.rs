//! The sealed tiles of one layer group in memory, behind a safe interface: append and seal, attend.
//!
//! Three ranges of memory: the records; the staging pool, raw blocks of all layers that outlive a
//! step; and scratch, raw blocks of one layer at a time, for tiles that a step fills from end to
//! end. It knows slots and block ids, not who holds them.

use alloc::vec::Vec;
use core::ops::Range;
use core::ptr;
use core::sync::atomic::AtomicU32;

use super::{
    RawBlock, RawTables, SealArgs, SealTile, TileAppendArgs, TileAttendArgs, TileView,
    append_tiles, attend_tiles, attend_tiles_workspace_bytes,
};
use crate::attention::{HeadShape, Scoring};
use crate::cpu::memory::Memory;
use crate::cpu::store::{AttendBatch, check_len, copy_rows, grow};
use crate::cpu::{AttendMaxima, BlockTables, CpuLevel, Executor, KvView, Rope, RowsView};
use crate::dtype::{FormatClass, KvFormat, Rows, RowsMut};
use crate::error::{Error, Result};
use crate::ids::BlockId;
use crate::layout::tile::TileLayout;
use crate::layout::{GroupLayout, GroupSpec};
use crate::quant::{HEADER_CRC, HEADER_FORMAT, Tile};

/// Where a step's new rows go, and what becomes of them.
#[derive(Debug, Default)]
pub struct RawRows {
    /// `[seqs + 1]` offsets into `blocks`, from 0.
    pub indptr: Vec<i32>,
    /// The raw tiles of each sequence, ascending.
    pub blocks: Vec<RawBlock>,
    /// For each new token, `slot * block_tokens + offset` in the staging pool, or -1.
    pub staging: Vec<i64>,
    /// The same in scratch, counted from its own beginning.
    pub scratch: Vec<i64>,
    /// Tiles that are full when the rows are there.
    pub seals: Vec<SealTile>,
    /// For each of them, which of the new tokens are its own: ascending.
    pub own: Vec<Range<u32>>,
    /// For each of them, raised where it could not be sealed in some layer.
    pub refused: Vec<AtomicU32>,
    /// Blocks of scratch that are used.
    pub scratch_blocks: u32,
    /// A number that no other step of the cache has: whose rows are in scratch.
    pub serial: u64,
    /// Slots of the staging pool for rows in scratch that a device cannot seal.
    pub spares: Vec<i32>,
}

impl RawRows {
    /// Empties it, keeping the buffers.
    pub fn clear(&mut self) {
        self.indptr.clear();
        self.blocks.clear();
        self.staging.clear();
        self.scratch.clear();
        self.seals.clear();
        self.own.clear();
        self.refused.clear();
        self.scratch_blocks = 0;
        self.serial = 0;
        self.spares.clear();
    }
}

/// `blocks` sealed and `staging` raw blocks of one layer group.
#[derive(Debug)]
pub struct TileStore {
    layout: GroupLayout,
    tile: TileLayout,
    /// Raw blocks of all layers, and of one.
    raw: GroupLayout,
    raw_layer: GroupLayout,
    blocks: u32,
    staging_blocks: u32,
    scratch_blocks: u32,
    level: CpuLevel,
    records: Memory,
    staging: Memory,
    scratch: Memory,
    /// The step and layer whose rows are in scratch.
    scratch_of: Option<(u64, u32)>,
}

impl TileStore {
    /// Allocates the blocks.
    ///
    /// # Errors
    /// `InvalidArgument` for a format without tiles, `Overflow`, `OutOfMemory`, `Unsupported` for a
    /// `KVCACHE_CPU` that this CPU cannot run.
    pub fn new(layout: GroupLayout, blocks: u32, staging_blocks: u32) -> Result<Self> {
        let Some(tile) = layout.tile() else {
            return Err(Error::invalid("format", "must be one of sealed tiles"));
        };
        if blocks > i32::MAX as u32 || staging_blocks > i32::MAX as u32 {
            return Err(Error::invalid("blocks, staging_blocks", "must fit in 31 bits"));
        }
        debug_assert_eq!(layout.spec().format.class(), FormatClass::Tile);
        let spec = GroupSpec { format: KvFormat::Bf16, sink_tokens: 0, ..layout.spec().clone() };
        let raw_layer =
            GroupLayout::new(GroupSpec { layers: 1, ..spec.clone() }, layout.block_tokens())?;
        let raw = GroupLayout::new(spec, layout.block_tokens())?;
        debug_assert_eq!(raw.block_bytes(), layout.staging_block_bytes());
        Ok(Self {
            records: Memory::zeroed(layout.pool_bytes(u64::from(blocks))?)?,
            staging: Memory::zeroed(raw.pool_bytes(u64::from(staging_blocks))?)?,
            scratch: Memory::zeroed(0)?,
            scratch_of: None,
            level: CpuLevel::chosen()?,
            layout,
            tile,
            raw,
            raw_layer,
            blocks,
            staging_blocks,
            scratch_blocks: 0,
        })
    }

    /// Where things lie in a block of records.
    pub fn layout(&self) -> &GroupLayout {
        &self.layout
    }

    /// Bytes of the records.
    pub fn bytes(&self) -> u64 {
        self.records.bytes()
    }

    /// Bytes of the staging pool and of scratch.
    pub fn raw_bytes(&self) -> u64 {
        self.staging.bytes() + self.scratch.bytes()
    }

    /// Makes room for a step that fills so many tiles from end to end.
    ///
    /// # Errors
    /// `Overflow`, `OutOfMemory`; nothing changed then.
    pub fn reserve_scratch(&mut self, blocks: u32) -> Result<()> {
        if blocks > self.scratch_blocks {
            if blocks > i32::MAX as u32 - self.staging_blocks {
                return Err(Error::Overflow { what: "raw blocks" });
            }
            self.scratch = Memory::zeroed(self.raw_layer.pool_bytes(u64::from(blocks))?)?;
            self.scratch_blocks = blocks;
            self.scratch_of = None;
        }
        Ok(())
    }

    /// One layer, as the kernels take it.
    fn view(&self, layer: u32) -> Result<TileView<'_>> {
        let staging = KvView::native(&self.raw, self.staging.start(), self.staging_blocks, layer)?;
        let scratch =
            KvView::native(&self.raw_layer, self.scratch.start(), self.scratch_blocks, 0)?;
        let records = self.records.start().wrapping_add(self.layout.k_offset(layer) as usize);
        Ok(TileView {
            layout: &self.tile,
            records,
            block_bytes: self.layout.block_bytes() as i64,
            head_bytes: self.tile.bytes() as i64,
            num_blocks: self.blocks,
            staging,
            scratch,
        })
    }

    /// Writes the rows of new tokens and seals the tiles that are full then. `k` is
    /// `[rows][kv_heads][k_dim]`, `v` `[rows][kv_heads][v_dim]`, empty where values lie in keys.
    ///
    /// # Errors
    /// `InvalidArgument` for lengths that do not fit together, `BadBlock` for a slot outside the
    /// store. Nothing is written then.
    pub fn append(
        &mut self,
        layer: u32,
        raw: &RawRows,
        k: Rows,
        v: Rows,
        rope: Option<(&Rope, &[u32])>,
        executor: &dyn Executor,
    ) -> Result<()> {
        let spec = self.layout.spec();
        let shape = self.shape(spec.kv_heads);
        let rows = raw.staging.len();
        if raw.scratch.len() != rows {
            return Err(Error::invalid("scratch", "must have one entry a row"));
        }
        let v_dim = if spec.v_in_k { 0 } else { shape.v_dim };
        check_len("k", k.elements(), rows, shape.kv_heads, shape.k_dim)?;
        check_len("v", v.elements(), rows, shape.kv_heads, v_dim)?;
        if rope.is_some_and(|(_, positions)| positions.len() != rows) {
            return Err(Error::invalid("positions", "must have one entry a row"));
        }
        let tiles = self.view(layer)?;
        let args = TileAppendArgs {
            seals: SealArgs { shape, tiles, list: &raw.seals, refused: &raw.refused },
            own: &raw.own,
            staging: raw.staging.as_ptr(),
            scratch: raw.scratch.as_ptr(),
            rows: u32::try_from(rows).map_err(|_| Error::Overflow { what: "rows" })?,
            k: RowsView::contiguous(k.as_ptr().cast_mut(), k.dtype(), shape.kv_heads, shape.k_dim),
            v: RowsView::contiguous(v.as_ptr().cast_mut(), v.dtype(), shape.kv_heads, shape.v_dim),
            rope: rope.map(|(rope, positions)| (rope, positions.as_ptr())),
        };
        // SAFETY: lengths were checked against the slices, the views are this store's own memory,
        // and `&mut self` keeps readers out.
        unsafe { append_tiles(&args, self.level, executor) }?;
        if raw.scratch_blocks != 0 {
            self.scratch_of = Some((raw.serial, layer));
        }
        Ok(())
    }

    /// Attention of query rows over the store, as [`KvStore::attend`](crate::cpu::KvStore::attend).
    ///
    /// # Errors
    /// As there; `InvalidState` where the raw rows of a long chunk are those of another layer, or of
    /// another step that was appended since.
    #[allow(clippy::too_many_arguments)]
    pub fn attend(
        &self,
        layer: u32,
        batch: &AttendBatch,
        raw: &RawRows,
        q: Rows,
        mut out: RowsMut,
        lse: Option<&mut [f32]>,
        scoring: &Scoring,
        workspace: &mut Vec<u8>,
        executor: &dyn Executor,
    ) -> Result<()> {
        if raw.scratch_blocks != 0 && self.scratch_of != Some((raw.serial, layer)) {
            let why = "a layer must be attended before the next is appended";
            return Err(Error::InvalidState { why });
        }
        let q_heads = batch.check(&self.layout, q, &out, lse.as_deref())?;
        let Some(q_heads) = q_heads else { return Ok(()) };
        let shape = self.shape(q_heads);
        let bad_block = AtomicU32::new(0);
        let seqs = batch.kv_lens.len() as u32;
        if raw.indptr.len() != seqs as usize + 1 {
            return Err(Error::invalid("raw indptr", "must have one entry more than kv_lens"));
        }
        let args = TileAttendArgs {
            shape,
            scoring: *scoring,
            tiles: self.view(layer)?,
            tables: BlockTables::Csr {
                indptr: batch.indptr.as_ptr(),
                indices: batch.indices.as_ptr(),
            },
            raw: RawTables { indptr: raw.indptr.as_ptr(), blocks: raw.blocks.as_ptr() },
            seqs,
            q_indptr: batch.q_indptr.as_ptr(),
            kv_lens: batch.kv_lens.as_ptr(),
            q: RowsView::contiguous(q.as_ptr().cast_mut(), q.dtype(), shape.q_heads, shape.k_dim),
            out: RowsView::contiguous(out.as_mut_ptr(), out.dtype(), shape.q_heads, shape.v_dim),
            lse: lse.map_or(ptr::null_mut(), |lse| lse.as_mut_ptr()),
            bad_block: Some(&bad_block),
        };
        let maxima = AttendMaxima {
            seqs,
            q_tokens: batch.q_indptr[seqs as usize] as u32,
            kv_len: batch.kv_lens.iter().copied().max().unwrap_or(0).max(0) as u32,
            workers: executor.workers(),
        };
        grow(workspace, attend_tiles_workspace_bytes(&shape, &self.tile, &maxima)?)?;
        // SAFETY: the slices are as long as the arguments say, and the views are this store's own
        // memory; the raw tables are those of the step that planned the batch.
        unsafe { attend_tiles(&args, self.level, executor, workspace) }?;
        match bad_block.into_inner() {
            0 => Ok(()),
            _ => Err(Error::BadBlock { block: u32::MAX }),
        }
    }

    /// Copies the first `tokens` raw rows of a slot, all layers, to another.
    ///
    /// # Errors
    /// `BadBlock`; `InvalidArgument` for more tokens than a tile has.
    pub fn copy_raw(&mut self, src: BlockId, dst: BlockId, tokens: u32) -> Result<()> {
        copy_rows(&mut self.staging, &self.raw, self.staging_blocks, [src, dst], tokens)
    }

    /// Keeps the rows of a scratch block, those of one layer, in a slot of the staging pool.
    ///
    /// # Errors
    /// `BadBlock`, `InvalidArgument` for a layer that is none.
    pub fn keep_raw(&mut self, scratch: u32, slot: BlockId, layer: u32) -> Result<()> {
        if scratch >= self.scratch_blocks || slot.0 >= self.staging_blocks {
            return Err(Error::BadBlock { block: scratch });
        }
        if layer >= self.raw.spec().layers {
            return Err(Error::invalid("layer", "is not in the group"));
        }
        let layer_bytes = self.raw_layer.block_bytes() as usize;
        // SAFETY: one layer of a block has the same shape in both, and both are in their memory.
        unsafe {
            let from = self.scratch.start().add(scratch as usize * layer_bytes);
            let to = slot.index() * self.raw.block_bytes() as usize;
            let to = self.staging.start().add(to + self.raw.k_offset(layer) as usize);
            ptr::copy_nonoverlapping(from, to, layer_bytes);
        }
        Ok(())
    }

    /// Makes the records of a block, all layers, say that they are not sealed: its rows are read raw.
    ///
    /// # Errors
    /// `BadBlock`.
    pub fn unseal(&mut self, id: BlockId) -> Result<()> {
        let bytes = self.layout.block_bytes() as usize;
        let at = self.block_at(id, bytes)?;
        let id = self.tile.header.start + HEADER_FORMAT;
        for record in (at..at + bytes).step_by(self.tile.bytes()) {
            // SAFETY: the block is in the memory, and it is whole records.
            unsafe {
                self.records.start().add(record + id).write_bytes(0, HEADER_CRC - HEADER_FORMAT)
            }
        }
        Ok(())
    }

    /// Copies the records of a block, all layers, to `to`.
    ///
    /// # Errors
    /// `BadBlock`; `InvalidArgument` where `to` is not as long as a block.
    pub fn read_block(&self, id: BlockId, to: &mut [u8]) -> Result<()> {
        let at = self.block_at(id, to.len())?;
        // SAFETY: the block is in the memory, `to` is as long, and elsewhere: it is borrowed.
        unsafe { ptr::copy_nonoverlapping(self.records.start().add(at), to.as_mut_ptr(), to.len()) }
        Ok(())
    }

    /// Copies the records of a block, all layers, from where they were kept outside, and checks each:
    /// format, tile size and checksum.
    ///
    /// # Errors
    /// `BadBlock`; `InvalidArgument` where `from` is not as long as a block, or a record is damaged
    /// or another format's. Nothing changed then.
    pub fn write_block(&mut self, id: BlockId, from: &[u8]) -> Result<()> {
        let at = self.block_at(id, from.len())?;
        for record in from.chunks_exact(self.tile.bytes()) {
            Tile::open(&self.tile, record)?;
        }
        // SAFETY: as above.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), self.records.start().add(at), from.len()) }
        Ok(())
    }

    /// The same for consecutive layers of a block, from layer `first` on.
    ///
    /// # Errors
    /// As for [`write_block`](Self::write_block), `InvalidArgument` too where `from` is not whole layers.
    pub fn write_layers(&mut self, id: BlockId, first: u32, from: &[u8]) -> Result<()> {
        let at = self.layout.layers_at(first, from.len())? as usize;
        let at = at + self.block_at(id, self.layout.block_bytes() as usize)?;
        for record in from.chunks_exact(self.tile.bytes()) {
            Tile::open(&self.tile, record)?;
        }
        // SAFETY: the layers are within the block, as above.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), self.records.start().add(at), from.len()) }
        Ok(())
    }

    /// Copies bytes of a raw slot, from `at` on, to `to`.
    ///
    /// # Errors
    /// `BadBlock`; `InvalidArgument` past the end of the slot.
    pub fn read_raw(&self, slot: BlockId, at: usize, to: &mut [u8]) -> Result<()> {
        let at = self.raw_at(slot, at, to.len())?;
        // SAFETY: the bytes are in the memory, `to` is as long, and elsewhere: it is borrowed.
        unsafe { ptr::copy_nonoverlapping(self.staging.start().add(at), to.as_mut_ptr(), to.len()) }
        Ok(())
    }

    /// Copies bytes to a raw slot, from `at` on.
    ///
    /// # Errors
    /// As for [`read_raw`](Self::read_raw).
    pub fn write_raw(&mut self, slot: BlockId, at: usize, from: &[u8]) -> Result<()> {
        let at = self.raw_at(slot, at, from.len())?;
        // SAFETY: as above.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), self.staging.start().add(at), from.len()) }
        Ok(())
    }

    fn raw_at(&self, slot: BlockId, at: usize, bytes: usize) -> Result<usize> {
        if slot.0 >= self.staging_blocks {
            return Err(Error::BadBlock { block: slot.0 });
        }
        let slot_bytes = self.raw.block_bytes() as usize;
        if at.checked_add(bytes).is_none_or(|end| end > slot_bytes) {
            return Err(Error::invalid("bytes", "must lie within a slot"));
        }
        Ok(slot.index() * slot_bytes + at)
    }

    fn block_at(&self, id: BlockId, bytes: usize) -> Result<usize> {
        if id.0 >= self.blocks {
            return Err(Error::BadBlock { block: id.0 });
        }
        if bytes as u64 != self.layout.block_bytes() {
            return Err(Error::invalid("bytes", "must be as many as a block has"));
        }
        Ok(id.index() * bytes)
    }

    /// Whether a slot of a step's second table lies in scratch, and which block of it is meant.
    pub fn in_scratch(&self, slot: i32) -> Option<u32> {
        (slot as u32).checked_sub(self.staging_blocks)
    }

    fn shape(&self, q_heads: u32) -> HeadShape {
        let spec = self.layout.spec();
        HeadShape {
            q_heads,
            kv_heads: spec.kv_heads,
            k_dim: spec.k_dim,
            v_dim: spec.v_dim,
            v_in_k: spec.v_in_k,
        }
    }
}
