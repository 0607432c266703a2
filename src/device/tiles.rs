//! Sealed tiles on a device: what `cpu::TileStore` is for host memory. The records are the blocks of a
//! [`DeviceStore`]; beside them lie the staging pool, raw blocks of all layers that outlive a step, and
//! scratch, raw blocks of one layer at a time, for tiles that a step fills from end to end.
//!
//! Append writes raw rows and seals what is full, in the order of the stream: nothing is waited for. A
//! tile that cannot be sealed says so in its record, which attention reads, and in a word of the batch,
//! which the host reads before it commits the step; its rows in scratch go to a spare slot, also on the
//! device. Sinks have records that were never sealed, so that their slots are read like those. It knows
//! slots and block ids, not who holds them.

use alloc::sync::Arc;
use core::mem::size_of_val;
use core::ops::Range;
use core::sync::atomic::AtomicU32;

use super::attend::{PlanKey, Planned};
use super::backend::launch;
use super::batch::{BatchView, RawView, Run};
use super::memory::DeviceMemory;
use super::store::{DeviceStore, LayerView};
use super::{Backend, DeviceBatch};
use crate::attention::HeadShape;
use crate::dtype::{FormatClass, KvFormat};
use crate::error::{Error, Result};
use crate::kernels::params::{AppendParams, DecodeTileParams, In, Out, SealParams};
use crate::kernels::{
    AttendArgs, AttendPlan, DecodeBounds, DecodePlan, FIRST_SPARE, Pieces, PrefillBounds,
    SM90_SHARED_BYTES, SPARE_TAKEN, TILE_ROWS, decode_tile_params, prefill_sealed_launch,
    prefill_sealed_params, prefill_sealed_pays, seal_launch,
};
use crate::layout::tile::TileLayout;
use crate::layout::{GroupLayout, GroupSpec};
use crate::quant::Tile;

/// Workspace that is enough for calls in the deterministic mode, unless a few rows alone need more:
/// partial results of all pieces wait there, so a long prompt is attended in several calls.
const WORKSPACE_BYTES: u64 = 128 << 20;

pub(super) const NO_TILES: Error = Error::InvalidState { why: "the format has no sealed tiles" };

/// What a store has for tiles.
#[derive(Debug)]
pub(super) struct Tiles {
    layout: TileLayout,
    /// Raw blocks of all layers, and of one.
    pub(super) raw: GroupLayout,
    raw_layer: GroupLayout,
    pub(super) staging_blocks: u32,
    scratch_blocks: u32,
    pub(super) staging: DeviceMemory,
    scratch: DeviceMemory,
    /// The batch and the layer whose rows are in scratch.
    scratch_of: Option<(u64, u32)>,
}

/// What became of a tile that was to be sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is sealed in every layer.
    Sealed,
    /// Its raw rows stay where they are, in the staging pool.
    Raw,
    /// Its raw rows are in the spare of this number.
    Spare(usize),
    /// Its raw rows were in scratch, and there was no spare left.
    Lost,
}

impl Outcome {
    /// Of a tile whose rows were in scratch or not, by the word that the device has for it.
    pub fn of(word: u32, in_scratch: bool) -> Self {
        match word & !SPARE_TAKEN {
            0 => Outcome::Sealed,
            _ if !in_scratch => Outcome::Raw,
            word => word
                .checked_sub(FIRST_SPARE)
                .map_or(Outcome::Lost, |number| Outcome::Spare(number as usize)),
        }
    }
}

impl Tiles {
    /// The raw rows beside a store; `None` for a format without tiles.
    pub fn new(
        backend: &Arc<dyn Backend>,
        layout: &GroupLayout,
        staging_blocks: u32,
    ) -> Result<Option<Self>> {
        let Some(tile) = layout.tile() else { return Ok(None) };
        if staging_blocks > i32::MAX as u32 {
            return Err(Error::invalid("staging_blocks", "must fit in 31 bits"));
        }
        let spec = GroupSpec { format: KvFormat::Bf16, sink_tokens: 0, ..layout.spec().clone() };
        let one = GroupSpec { layers: 1, ..spec.clone() };
        let raw = GroupLayout::new(spec, layout.block_tokens())?;
        let staging = raw.pool_bytes(u64::from(staging_blocks))?;
        Ok(Some(Self {
            layout: tile,
            raw_layer: GroupLayout::new(one, layout.block_tokens())?,
            raw,
            staging_blocks,
            scratch_blocks: 0,
            staging: DeviceMemory::new(backend, staging)?,
            scratch: DeviceMemory::new(backend, 1)?,
            scratch_of: None,
        }))
    }

    /// Whether there are kernels for a layout that has tiles.
    ///
    /// # Errors
    /// `Unsupported` where there are none.
    pub fn check(layout: &GroupLayout) -> Result<()> {
        let spec = layout.spec();
        if spec.v_in_k {
            return Err(Error::Unsupported {
                what: "latents in sealed tiles on a device: f16, bf16, fp8, int8_t and int4_t are supported",
            });
        }
        if spec.k_dim != spec.v_dim {
            return Err(Error::Unsupported { what: "k_dim other than v_dim on a device" });
        }
        DecodePlan::new(DecodeBounds {
            format: spec.format,
            head_dim: spec.k_dim,
            tile_tokens: layout.block_tokens(),
            q_heads: spec.kv_heads,
            kv_heads: spec.kv_heads,
            q_len: 1,
            batch: 1,
            max_tokens: 1,
            pieces: Pieces::Balanced,
            multiprocessors: 1,
            multiprocessor_shared_bytes: SM90_SHARED_BYTES,
        })?;
        match layout.tile() {
            Some(tile) => seal_launch(&tile, 0, &mut SealParams::default()).map(|_| ()),
            None => Err(Error::InvalidState { why: "the layout has no tiles" }),
        }
    }

    fn staged(&self, layer: u32) -> LayerView {
        LayerView::new(&self.raw, self.staging.address(), layer)
    }

    fn in_scratch(&self) -> LayerView {
        LayerView::new(&self.raw_layer, self.scratch.address(), 0)
    }
}

impl DeviceStore {
    /// Bytes of the staging pool and of scratch.
    pub fn raw_bytes(&self) -> u64 {
        self.tiles.as_ref().map_or(0, |tiles| tiles.staging.bytes() + tiles.scratch.bytes())
    }

    pub(super) fn tiles(&mut self) -> Result<&mut Tiles> {
        self.tiles.as_mut().ok_or(NO_TILES)
    }

    /// Makes room for a step that fills so many tiles from end to end.
    ///
    /// # Errors
    /// `Overflow`, `OutOfMemory`; nothing changed then.
    pub fn reserve_scratch(&mut self, blocks: u32) -> Result<()> {
        let tiles = self.tiles()?;
        if blocks > tiles.scratch_blocks {
            if blocks > i32::MAX as u32 - tiles.staging_blocks {
                return Err(Error::Overflow { what: "raw blocks" });
            }
            tiles.scratch.grow(tiles.raw_layer.pool_bytes(u64::from(blocks))?)?;
            tiles.scratch_blocks = blocks;
            tiles.scratch_of = None;
        }
        Ok(())
    }

    /// Whether a slot of a step's second table lies in scratch, and which block of it is meant.
    pub fn in_scratch(&self, slot: i32) -> Option<u32> {
        (slot as u32).checked_sub(self.tiles.as_ref()?.staging_blocks)
    }

    /// The words for the tiles of a batch that were to be sealed, in their order, for
    /// `Outcome::of`; waits for them.
    ///
    /// # Errors
    /// `InvalidArgument` where they are not as many; `InvalidState` for a batch without raw rows or
    /// that is not on the device; `DeviceFailed`.
    pub(crate) fn read_refused(
        &self,
        batch: &DeviceBatch,
        group: usize,
        words: &mut [AtomicU32],
    ) -> Result<()> {
        let raw = raw_of(&batch.view(group)?)?;
        if words.len() != raw.seal_count as usize {
            return Err(Error::invalid("words", "must be as many as tiles"));
        }
        // SAFETY: the words are plain memory, borrowed, as long; the batch has as many.
        unsafe {
            let bytes = size_of_val(words);
            let to = core::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), bytes);
            self.backend.download(raw.refused, to, self.options.stream)
        }
    }

    /// Checks records that are to be stored: format, tile size and checksum.
    pub(crate) fn check_records(&self, from: &[u8]) -> Result<()> {
        let Some(tiles) = &self.tiles else { return Ok(()) };
        from.chunks_exact(tiles.layout.bytes())
            .try_for_each(|record| Tile::open(&tiles.layout, record).map(|_| ()))
    }

    /// Enqueues the append of raw rows, and the sealing of the tiles that are full then. `params` has
    /// everything but where rows go.
    pub(super) fn append_tiles(
        &mut self,
        layer: u32,
        at: &BatchView,
        params: AppendParams,
    ) -> Result<()> {
        let raw = raw_of(at)?;
        let records = self.view(layer)?.k;
        let tiles = self.tiles()?;
        let (staged, scratch) = (tiles.staged(layer), tiles.in_scratch());
        let (staging_blocks, scratch_blocks) = (tiles.staging_blocks, tiles.scratch_blocks);
        let cache_dtype = KvFormat::Bf16.dtype().id();
        let mut rows = AppendParams { cache_dtype, ..params };
        staged.place(&mut rows);
        (rows.slots, rows.num_blocks) = (In::at(raw.staging), staging_blocks);
        self.append_rows(rows)?;
        if raw.scratch_blocks != 0 {
            scratch.place(&mut rows);
            (rows.slots, rows.num_blocks) = (In::at(raw.scratch), scratch_blocks);
            self.append_rows(rows)?;
            self.tiles()?.scratch_of = Some((at.serial, layer));
        }
        let mut seal = SealParams {
            k: Out::at(staged.k),
            v: Out::at(staged.v),
            records: Out::at(records),
            list: In::at(raw.seals),
            refused: Out::at(raw.refused),
            spares: In::at(raw.spares),
            spares_taken: Out::at(raw.spares_taken),
            spare_count: raw.spare_count,
            error_flag: Out::at(self.flag()),
            k_block: staged.k_strides.block,
            k_head: staged.k_strides.head,
            k_token: staged.k_strides.token,
            v_block: staged.v_strides.block,
            v_head: staged.v_strides.head,
            v_token: staged.v_strides.token,
            record_block: self.layout().block_bytes() as i64,
            record_head: self.layout().k_strides().head,
            staging_blocks,
            num_blocks: self.blocks,
            kv_heads: self.layout().spec().kv_heads,
            ..SealParams::default()
        };
        if raw.scratch_blocks != 0 {
            seal.scratch_k = In::at(scratch.k);
            seal.scratch_v = In::at(scratch.v);
            seal.scratch_k_block = scratch.k_strides.block;
            seal.scratch_k_head = scratch.k_strides.head;
            seal.scratch_k_token = scratch.k_strides.token;
            seal.scratch_v_block = scratch.v_strides.block;
            seal.scratch_v_head = scratch.v_strides.head;
            seal.scratch_v_token = scratch.v_strides.token;
            seal.scratch_blocks = scratch_blocks;
        }
        let layout = &self.tiles()?.layout;
        let Some(plan) = seal_launch(layout, raw.seal_count, &mut seal)? else { return Ok(()) };
        // SAFETY: raw rows and records are this store's own memory, the lists the batch's.
        unsafe { launch(&*self.backend, &plan, &seal, self.options.stream) }
    }

    /// Enqueues attention: `args` is a call over the records, whose sequences are those of the batch.
    pub(super) fn attend_tiles(
        &mut self,
        layer: u32,
        batch: &DeviceBatch,
        at: &BatchView,
        shape: &HeadShape,
        args: AttendArgs,
    ) -> Result<()> {
        let (raw, records) = (raw_of(at)?, args.k);
        let tiles = self.tiles()?;
        if raw.scratch_blocks != 0 && tiles.scratch_of != Some((at.serial, layer)) {
            let why = "a layer must be attended before the next is appended";
            return Err(Error::InvalidState { why });
        }
        let (staged, scratch) = (tiles.staged(layer), tiles.in_scratch());
        let args = AttendArgs {
            k: staged.k,
            k_strides: staged.k_strides,
            v: staged.v,
            v_strides: staged.v_strides,
            ..args
        };
        let mut params = DecodeTileParams {
            records: In::at(records),
            raw_indptr: In::at(raw.indptr),
            raw_blocks: In::at(raw.blocks),
            record_block: self.layout().block_bytes() as i64,
            record_head: self.layout().k_strides().head,
            staging_blocks: self.tiles()?.staging_blocks,
            ..decode_tile_params(&args)?
        };
        if raw.scratch_blocks != 0 {
            params.scratch_k = In::at(scratch.k);
            params.scratch_v = In::at(scratch.v);
            params.scratch_k_block = scratch.k_strides.block;
            params.scratch_k_head = scratch.k_strides.head;
            params.scratch_k_token = scratch.k_strides.token;
            params.scratch_v_block = scratch.v_strides.block;
            params.scratch_v_head = scratch.v_strides.head;
            params.scratch_v_token = scratch.v_strides.token;
            params.scratch_blocks = self.tiles()?.scratch_blocks;
        }
        let long = |run: &&Run| run.long;
        let (seqs, rows) = batch
            .runs()
            .iter()
            .filter(long)
            .fold((0, 0), |(seqs, rows), run| (seqs + run.seqs.len() as u32, rows + run.rows));
        let multiprocessors = self.backend.multiprocessors();
        let by_prefill = !self.options.deterministic
            && rows != 0
            && prefill_sealed_pays(seqs, rows, shape.q_heads, shape.kv_heads, multiprocessors);
        if !by_prefill {
            return self.decode_tiles(at, shape, &mut params, 0..at.parts.count);
        }
        for run in batch.runs() {
            if run.long {
                self.prefill_tiles(at, shape, &args, &params, run)?;
            } else {
                self.decode_tiles(at, shape, &mut params, run.parts.clone())?;
            }
        }
        Ok(())
    }

    /// Enqueues the attention of a run's sequences by the kernel for many rows.
    fn prefill_tiles(
        &mut self,
        at: &BatchView,
        shape: &HeadShape,
        args: &AttendArgs,
        tiles: &DecodeTileParams,
        run: &Run,
    ) -> Result<()> {
        // Rows are those of the batch; the tables begin with the run's first sequence.
        let from = 4 * u64::from(run.seqs.start);
        let args = AttendArgs {
            seqs: run.seqs.len() as u32,
            q_indptr: at.q_indptr + from,
            kv_lens: at.kv_lens + from,
            table_indptr: args.table_indptr + from,
            ..*args
        };
        let bounds = PrefillBounds {
            format: self.layout().spec().format,
            head_dim: shape.k_dim,
            q_heads: shape.q_heads,
            kv_heads: shape.kv_heads,
            batch: args.seqs,
            q_tokens: run.end_row,
        };
        let mut params = prefill_sealed_params(&args, tiles)?;
        params.raw_indptr = In::at(tiles.raw_indptr.0 + from);
        let plan = prefill_sealed_launch(&bounds, &mut params)?;
        // SAFETY: rows were vouched for and have the elements that the sizes say; the rest is this
        // store's and the batch's own memory.
        unsafe { launch(&*self.backend, &plan, &params, self.options.stream) }
    }

    /// Enqueues the attention of some parts of a batch by the decode kernel.
    fn decode_tiles(
        &mut self,
        at: &BatchView,
        shape: &HeadShape,
        params: &mut DecodeTileParams,
        range: Range<u32>,
    ) -> Result<()> {
        let (parts, all) = (at.parts, range.len() as u32);
        let window = (params.call.window != 0).then_some(params.call.window);
        let (serial, q_heads) = (at.serial, shape.q_heads);
        let key = PlanKey { serial, q_heads, window, may_share: false, first_part: range.start };
        let known = match self.attend.planned {
            Some((of, Planned::Plain(AttendPlan::Decode(plan)))) if of == key => Some(plan),
            _ => None,
        };
        let most = match known {
            Some(_) => all,
            None => self.parts_at_once(shape, at, all)?,
        };
        for first in range.clone().step_by(most.max(1) as usize) {
            let count = most.min(range.end - first);
            let lens = parts.lens + 4 * u64::from(first);
            params.call.q_indptr = In::at(parts.q_indptr + 4 * u64::from(first));
            params.call.seq_lens = In::at(lens);
            params.owners = In::at(parts.owners + 4 * u64::from(first));
            let plan = match known {
                Some(plan) => plan,
                None => {
                    let plan = self.tile_plan(shape, at, most)?;
                    self.attend.planned = None;
                    let (workspace, flag) =
                        (self.attend.room(plan.workspace_bytes())?, self.flag());
                    let (first, planning) = plan.plan_tile_launch(
                        workspace,
                        In::at(lens),
                        count,
                        window,
                        Out::at(flag),
                    )?;
                    // SAFETY: the workspace has the bytes that the plan asks for; the lengths are the
                    // batch's own.
                    unsafe { launch(&*self.backend, &first, &planning, self.options.stream) }?;
                    if count == all {
                        let plan = Planned::Plain(AttendPlan::Decode(plan));
                        self.attend.planned = Some((key, plan));
                    }
                    plan
                }
            };
            let workspace = self.attend.room(plan.workspace_bytes())?;
            let second = plan.decode_tile_launch(workspace, params)?;
            // SAFETY: rows were vouched for and have the elements that the sizes say; the rest is this
            // store's and the batch's own memory.
            unsafe { launch(&*self.backend, &second, params, self.options.stream) }?;
        }
        Ok(())
    }

    /// Parts of a batch whose partial results fit in the workspace together.
    fn parts_at_once(&self, shape: &HeadShape, at: &BatchView, all: u32) -> Result<u32> {
        if !self.options.deterministic {
            return Ok(all);
        }
        let one = self.tile_plan(shape, at, 1)?.workspace_bytes().max(1);
        Ok(all.min((WORKSPACE_BYTES / one).clamp(1, 1 << 20) as u32))
    }

    fn tile_plan(&self, shape: &HeadShape, at: &BatchView, parts: u32) -> Result<DecodePlan> {
        DecodePlan::new(DecodeBounds {
            format: self.layout().spec().format,
            head_dim: shape.k_dim,
            tile_tokens: self.layout().block_tokens(),
            q_heads: shape.q_heads,
            kv_heads: shape.kv_heads,
            q_len: at.parts.rows.clamp(1, TILE_ROWS),
            batch: parts,
            max_tokens: at.max_kv,
            pieces: self.pieces(),
            multiprocessors: self.backend.multiprocessors(),
            multiprocessor_shared_bytes: self.backend.multiprocessor_shared_bytes(),
        })
    }
}

fn raw_of(at: &BatchView) -> Result<RawView> {
    at.raw.ok_or(Error::InvalidState { why: "the batch has no raw rows for this group" })
}

/// Whether a layout's blocks are sealed tiles.
pub(super) fn is_tiled(layout: &GroupLayout) -> bool {
    layout.spec().format.class() == FormatClass::Tile
}
