//! The K and V of one layer group in memory, behind a safe interface: append, attend, copy.
//!
//! Owns its memory and knows its layout, so that everything a caller gives can be checked against
//! them; the kernels below take raw pointers. It knows block ids, not who holds them.

use alloc::vec::Vec;
use core::ptr;

use super::args::{AttendArgs, BlockTables, KvView, RowsView};
use super::memory::Memory;
use super::scales::{check_scale, has_head_scales};
use super::{AppendArgs, AttendMaxima, CpuLevel, Executor, Rope, attend_workspace_bytes};
use crate::attention::{HeadShape, Scoring};
use crate::dtype::{Rows, RowsMut};
use crate::error::{Error, Result};
use crate::ids::BlockId;
use crate::layout::GroupLayout;

/// The ragged batch of one call, as [`AttendArgs`] describes it, in slices.
#[derive(Debug, Clone, Copy)]
pub struct AttendBatch<'a> {
    /// `[seqs + 1]` offsets of query tokens, from 0.
    pub q_indptr: &'a [i32],
    /// `[seqs]` cached tokens.
    pub kv_lens: &'a [i32],
    /// `[seqs + 1]` offsets into `indices`, from 0.
    pub indptr: &'a [i32],
    /// Block ids.
    pub indices: &'a [i32],
}

impl AttendBatch<'_> {
    /// Checks the lengths against each other; the query heads, or `None` where there is no row.
    ///
    /// # Errors
    /// `InvalidArgument` for lengths that do not fit together.
    pub(super) fn check(
        &self,
        layout: &GroupLayout,
        q: Rows,
        out: &RowsMut,
        lse: Option<&[f32]>,
    ) -> Result<Option<u32>> {
        let seqs = self.kv_lens.len();
        if self.q_indptr.len() != seqs + 1 || self.indptr.len() != seqs + 1 {
            return Err(Error::invalid(
                "q_indptr, indptr",
                "must have one entry more than kv_lens",
            ));
        }
        let rows = self.q_indptr[seqs];
        let rows =
            usize::try_from(rows).map_err(|_| Error::invalid("q_indptr", "must not decrease"))?;
        if self.indptr[0] < 0 || self.indptr[seqs] as i64 > self.indices.len() as i64 {
            return Err(Error::invalid("indptr", "must stay within indices"));
        }
        if rows == 0 {
            return Ok(None);
        }
        let row = rows * layout.spec().k_dim as usize;
        if q.elements() == 0 || !q.elements().is_multiple_of(row) || q.elements() / row > 1 << 16 {
            return Err(Error::invalid("q", "must be [rows][q_heads][k_dim]"));
        }
        let q_heads = (q.elements() / row) as u32;
        check_len("out", out.elements(), rows, q_heads, layout.spec().v_dim)?;
        if lse.is_some_and(|lse| lse.len() != rows * q_heads as usize) {
            return Err(Error::invalid("lse", "must be [rows][q_heads]"));
        }
        Ok(Some(q_heads))
    }
}

/// `blocks` blocks of one layer group.
#[derive(Debug)]
pub struct KvStore {
    layout: GroupLayout,
    blocks: u32,
    level: CpuLevel,
    memory: Memory,
    /// `[layers][kv_heads]` scales of keys and of values; empty while all are 1.
    scales: [Vec<f32>; 2],
}

impl KvStore {
    /// Allocates and zeroes the blocks.
    ///
    /// # Errors
    /// `Overflow`, `OutOfMemory`; `Unsupported` for a format that the kernels cannot read and for a
    /// `KVCACHE_CPU` that this CPU cannot run.
    pub fn new(layout: GroupLayout, blocks: u32) -> Result<Self> {
        super::args::check_format(layout.spec().format)?;
        if blocks > i32::MAX as u32 {
            return Err(Error::invalid("blocks", "must fit in 31 bits"));
        }
        let memory = Memory::zeroed(layout.pool_bytes(u64::from(blocks))?)?;
        Ok(Self {
            layout,
            blocks,
            level: CpuLevel::chosen()?,
            memory,
            scales: [const { Vec::new() }; 2],
        })
    }

    /// Where things lie in a block.
    pub fn layout(&self) -> &GroupLayout {
        &self.layout
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        self.memory.bytes()
    }

    /// K and V of one layer, as the kernels take them. Valid while the store lives; following the
    /// pointers is up to the caller's `unsafe`.
    ///
    /// # Errors
    /// `InvalidArgument` for a layer that the layout does not have.
    pub fn view(&self, layer: u32) -> Result<KvView> {
        let mut view = KvView::native(&self.layout, self.memory.start(), self.blocks, layer)?;
        let first = layer as usize * self.layout.spec().kv_heads as usize;
        let of = |scales: &Vec<f32>| scales.get(first).map_or(ptr::null(), ptr::from_ref);
        [view.scales.k_heads, view.scales.v_heads] = [of(&self.scales[0]), of(&self.scales[1])];
        Ok(view)
    }

    /// Sets the scales that the keys and the values of a layer's heads share: `[kv_heads]` each, none
    /// for values that lie in keys. What is stored already is misread from then on.
    ///
    /// # Errors
    /// `InvalidArgument` for another layer or number, a format that has no such scales, and a scale
    /// that is not positive and finite; `OutOfMemory`. Nothing changes then.
    pub fn set_scales(&mut self, layer: u32, k: &[f32], v: &[f32]) -> Result<()> {
        let spec = self.layout.spec();
        let heads = spec.kv_heads as usize;
        if layer >= spec.layers {
            return Err(Error::invalid("layer", "is not in the group"));
        }
        if !has_head_scales(spec.format) {
            return Err(Error::invalid("scales", "only fp8 and nvfp4 have one a layer and head"));
        }
        let v_count = if spec.v_in_k { 0 } else { heads };
        if k.len() != heads || v.len() != v_count {
            return Err(Error::invalid(
                "scales",
                "must be one a KV head (none of latents' values)",
            ));
        }
        k.iter().chain(v).try_for_each(|&scale| check_scale("scales", scale))?;
        let count = spec.layers as usize * heads;
        for (all, new) in self.scales.iter_mut().zip([k, v]) {
            if all.is_empty() && !new.is_empty() {
                let bytes = count as u64 * 4;
                all.try_reserve_exact(count).map_err(|_| Error::OutOfMemory { bytes })?;
                all.resize(count, 1.0);
            }
        }
        let first = layer as usize * heads;
        for (all, new) in self.scales.iter_mut().zip([k, v]) {
            if !new.is_empty() {
                all[first..first + heads].copy_from_slice(new);
            }
        }
        Ok(())
    }

    /// The scales of keys and of values, `[layers][kv_heads]`; empty while all are 1.
    pub fn scales(&self) -> [&[f32]; 2] {
        [&self.scales[0], &self.scales[1]]
    }

    /// Writes the rows of new tokens: row `i` goes to slot `slots[i]`
    /// (`block * block_tokens + offset`), -1 to nowhere. `k` is `[slots][kv_heads][k_dim]`, `v`
    /// `[slots][kv_heads][v_dim]`, empty where values lie in keys. With `rope`, keys are rotated to
    /// the positions that stand beside it.
    ///
    /// # Errors
    /// `InvalidArgument` for lengths that do not fit together, `BadBlock` for a slot outside the
    /// store: nothing is written then. `InvalidArgument` too where a row of a quantised format is
    /// not finite or out of range: it is left out, the others are written.
    pub fn append(
        &mut self,
        layer: u32,
        slots: &[i64],
        k: Rows,
        v: Rows,
        rope: Option<(&Rope, &[u32])>,
        executor: &dyn Executor,
    ) -> Result<()> {
        let spec = self.layout.spec();
        let shape = self.shape(spec.kv_heads);
        check_len("k", k.elements(), slots.len(), shape.kv_heads, shape.k_dim)?;
        check_len(
            "v",
            v.elements(),
            slots.len(),
            shape.kv_heads,
            if spec.v_in_k { 0 } else { shape.v_dim },
        )?;
        if rope.is_some_and(|(_, positions)| positions.len() != slots.len()) {
            return Err(Error::invalid("positions", "must have one entry a row"));
        }
        let args = AppendArgs {
            shape,
            kv: self.view(layer)?,
            slots: slots.as_ptr(),
            rows: u32::try_from(slots.len()).map_err(|_| Error::Overflow { what: "rows" })?,
            k: RowsView::contiguous(k.as_ptr().cast_mut(), k.dtype(), shape.kv_heads, shape.k_dim),
            v: RowsView::contiguous(v.as_ptr().cast_mut(), v.dtype(), shape.kv_heads, shape.v_dim),
            rope: rope.map(|(rope, positions)| (rope, positions.as_ptr())),
        };
        // SAFETY: lengths were checked against the slices, the view is this store's own memory, and
        // `&mut self` keeps readers out.
        unsafe { super::append(&args, executor) }
    }

    /// Attention of query rows over the store. `q` is `[rows][q_heads][k_dim]`, `out`
    /// `[rows][q_heads][v_dim]`, `lse` `[rows][q_heads]`; `rows` is the last entry of `q_indptr`,
    /// and `q_heads` follows from the length of `q`. `workspace` grows to what is needed.
    ///
    /// # Errors
    /// `InvalidArgument` for lengths that do not fit together or a batch that is not ragged rows,
    /// `BadBlock` for a table entry outside the store (the output is then unspecified).
    #[allow(clippy::too_many_arguments)]
    pub fn attend(
        &self,
        layer: u32,
        batch: &AttendBatch,
        q: Rows,
        mut out: RowsMut,
        lse: Option<&mut [f32]>,
        scoring: &Scoring,
        workspace: &mut Vec<u8>,
        executor: &dyn Executor,
    ) -> Result<()> {
        let Some(q_heads) = batch.check(&self.layout, q, &out, lse.as_deref())? else {
            return Ok(());
        };
        let (shape, seqs) = (self.shape(q_heads), batch.kv_lens.len());
        let rows = batch.q_indptr[seqs];
        let bad_block = core::sync::atomic::AtomicU32::new(0);
        let args = AttendArgs {
            shape,
            scoring: *scoring,
            kv: self.view(layer)?,
            tables: BlockTables::Csr {
                indptr: batch.indptr.as_ptr(),
                indices: batch.indices.as_ptr(),
            },
            seqs: u32::try_from(seqs).map_err(|_| Error::Overflow { what: "seqs" })?,
            q_indptr: batch.q_indptr.as_ptr(),
            kv_lens: batch.kv_lens.as_ptr(),
            q: RowsView::contiguous(q.as_ptr().cast_mut(), q.dtype(), shape.q_heads, shape.k_dim),
            out: RowsView::contiguous(out.as_mut_ptr(), out.dtype(), shape.q_heads, shape.v_dim),
            lse: lse.map_or(ptr::null_mut(), |lse| lse.as_mut_ptr()),
            bad_block: Some(&bad_block),
        };
        let maxima = AttendMaxima {
            seqs: args.seqs,
            q_tokens: rows as u32,
            kv_len: batch.kv_lens.iter().copied().max().unwrap_or(0).max(0) as u32,
            workers: executor.workers(),
        };
        grow(workspace, attend_workspace_bytes(&shape, &maxima)?)?;
        // SAFETY: the slices are as long as the arguments say: `check` inside holds every offset
        // of `q_indptr` and `indptr` between 0 and the last, which were compared with the lengths.
        unsafe {
            super::attend(&args, self.level, executor, workspace)?;
        }
        match bad_block.into_inner() {
            0 => Ok(()),
            _ => Err(Error::BadBlock { block: u32::MAX }),
        }
    }

    /// Copies the first `tokens` tokens of a block, all layers, to another.
    ///
    /// # Errors
    /// `BadBlock`; `InvalidArgument` for more tokens than a block has.
    pub fn copy_tokens(&mut self, src: BlockId, dst: BlockId, tokens: u32) -> Result<()> {
        copy_rows(&mut self.memory, &self.layout, self.blocks, [src, dst], tokens)
    }

    /// Zeroes a block.
    ///
    /// # Errors
    /// `BadBlock`.
    pub fn zero(&mut self, block: BlockId) -> Result<()> {
        if block.0 >= self.blocks {
            return Err(Error::BadBlock { block: block.0 });
        }
        let bytes = self.layout.block_bytes() as usize;
        // SAFETY: the block is in the memory.
        unsafe { self.memory.start().add(block.index() * bytes).write_bytes(0, bytes) };
        Ok(())
    }

    /// Copies a block, all layers, to `to`.
    ///
    /// # Errors
    /// `BadBlock`; `InvalidArgument` where `to` is not as long as a block.
    pub fn read_block(&self, id: BlockId, to: &mut [u8]) -> Result<()> {
        let at = self.block_at(id, to.len())?;
        // SAFETY: the block is in the memory, `to` is as long, and elsewhere: it is borrowed.
        unsafe { ptr::copy_nonoverlapping(self.memory.start().add(at), to.as_mut_ptr(), to.len()) }
        Ok(())
    }

    /// Copies a block, all layers, from `from`.
    ///
    /// # Errors
    /// `BadBlock`; `InvalidArgument` where `from` is not as long as a block.
    pub fn write_block(&mut self, id: BlockId, from: &[u8]) -> Result<()> {
        let at = self.block_at(id, from.len())?;
        // SAFETY: as above.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), self.memory.start().add(at), from.len()) }
        Ok(())
    }

    /// Copies consecutive layers of a block, from layer `first` on, from `from`.
    ///
    /// # Errors
    /// `BadBlock`; `InvalidArgument` where `from` is not whole layers of the block.
    pub fn write_layers(&mut self, id: BlockId, first: u32, from: &[u8]) -> Result<()> {
        let at = self.layout.layers_at(first, from.len())? as usize;
        let at = at + self.block_at(id, self.layout.block_bytes() as usize)?;
        // SAFETY: the layers are within the block, as above.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), self.memory.start().add(at), from.len()) }
        Ok(())
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

/// Copies the first `tokens` tokens of a block, all layers, to another of the same `blocks`.
///
/// # Errors
/// `BadBlock`; `InvalidArgument` for more tokens than a block has.
pub(super) fn copy_rows(
    memory: &mut Memory,
    layout: &GroupLayout,
    blocks: u32,
    [src, dst]: [BlockId; 2],
    tokens: u32,
) -> Result<()> {
    if let Some(bad) = [src, dst].into_iter().find(|id| id.0 >= blocks) {
        return Err(Error::BadBlock { block: bad.0 });
    }
    if tokens > layout.block_tokens() {
        return Err(Error::invalid("tokens", "must be at most block_tokens"));
    }
    let start = |id: BlockId| id.index() * layout.block_bytes() as usize;
    let (from, to) = (start(src), start(dst));
    for (offset, token_bytes) in layout.runs() {
        let bytes = token_bytes as usize * tokens as usize;
        // SAFETY: both blocks are in the memory, a run lies within a block, and `copy` allows
        // them to be the same block.
        unsafe {
            let base = memory.start().add(offset as usize);
            ptr::copy(base.add(from), base.add(to), bytes);
        }
    }
    Ok(())
}

pub(super) fn grow(workspace: &mut Vec<u8>, bytes: u64) -> Result<()> {
    let refused = Error::OutOfMemory { bytes };
    let size = usize::try_from(bytes).map_err(|_| refused)?;
    if workspace.len() < size {
        workspace.try_reserve(size - workspace.len()).map_err(|_| refused)?;
        workspace.resize(size, 0);
    }
    Ok(())
}

pub(super) fn check_len(
    what: &'static str,
    elements: usize,
    rows: usize,
    heads: u32,
    dim: u32,
) -> Result<()> {
    let expected =
        (rows as u64).checked_mul(u64::from(heads)).and_then(|n| n.checked_mul(u64::from(dim)));
    if expected == Some(elements as u64) {
        Ok(())
    } else {
        Err(Error::invalid(what, "must be [rows][heads][dim], contiguous"))
    }
}
