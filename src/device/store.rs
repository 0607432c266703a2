//! The K and V of one layer group in device memory: what `cpu::KvStore` is for host memory.
//!
//! Operations are enqueued on one stream, in order. Those that take host rows copy them to the
//! device and back and wait; those that take device rows only enqueue. It knows block ids, not who
//! holds them; how a kernel is launched is planned by `kernels`.

use alloc::sync::Arc;
use core::marker::PhantomData;
use core::mem::size_of_val;

use super::attend::Attend;
use super::backend::launch;
use super::memory::DeviceMemory;
use super::rotation::Rotation;
use super::rows::{DeviceRows, DeviceRowsMut};
use super::tiles::Tiles;
use super::{Backend, DeviceBatch, Span, Stream};
use crate::attention::{HeadShape, Scoring};
use crate::cpu::{Rope, RopeStyle};
use crate::dtype::{DType, Rows, RowsMut};
use crate::error::{Error, Result};
use crate::ids::BlockId;
use crate::kernels::params::{AppendParams, In, Out};
use crate::kernels::{ScaleArgs, append_launch, append_token_launch, append_token_params};
use crate::layout::{GroupLayout, Strides};

/// What kernels raise for new rows that their format cannot hold.
const FLAG_ROW: u32 = 32;

/// How a store works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StoreOptions {
    /// The stream that everything is enqueued on.
    pub stream: Stream,
    /// A sequence gets the same bits whatever else is in the batch, at the price of pieces that
    /// are not balanced.
    pub deterministic: bool,
    /// Read a prefix that neighbours in a batch share once for all of them, where the device's rates
    /// say that it is faster. Never where `deterministic`.
    pub cascade: bool,
    /// Raw blocks of a format with sealed tiles.
    pub staging_blocks: u32,
}

/// `blocks` blocks of one layer group on a device.
#[derive(Debug)]
pub struct DeviceStore {
    pub(super) backend: Arc<dyn Backend>,
    pub(super) options: StoreOptions,
    layout: GroupLayout,
    pub(super) blocks: u32,
    memory: DeviceMemory,
    flag: DeviceMemory,
    rotation: Rotation,
    pub(super) attend: Attend,
    /// Of a format that has them.
    pub(super) tiles: Option<Tiles>,
    scratch: [DeviceMemory; 3],
}

/// Addresses of one layer's K and V, and how their rows lie.
#[derive(Debug, Clone, Copy)]
pub(super) struct LayerView {
    pub k: u64,
    pub v: u64,
    pub k_strides: Strides,
    pub v_strides: Strides,
    pub scales: ScaleArgs,
}

impl LayerView {
    /// One layer of blocks at `base`.
    pub fn new(layout: &GroupLayout, base: u64, layer: u32) -> Self {
        let at = |offset: u64| base + offset;
        Self {
            k: at(layout.k_offset(layer)),
            v: at(layout.v_offset(layer)),
            k_strides: layout.k_strides(),
            v_strides: layout.v_strides(),
            // Every head has the scale 1.
            scales: ScaleArgs {
                k: at(layout.k_scale_offset(layer)),
                v: at(layout.v_scale_offset(layer)),
                k_strides: layout.k_scale_strides(),
                v_strides: layout.v_scale_strides(),
                ..ScaleArgs::NONE
            },
        }
    }

    /// Has an append write there.
    pub fn place(&self, params: &mut AppendParams) {
        params.k_cache = Out::at(self.k);
        params.v_cache = Out::at(self.v);
        params.k_cache_block = self.k_strides.block;
        params.k_cache_head = self.k_strides.head;
        params.k_cache_token = self.k_strides.token;
        params.v_cache_block = self.v_strides.block;
        params.v_cache_head = self.v_strides.head;
        params.v_cache_token = self.v_strides.token;
    }
}

impl DeviceStore {
    /// Allocates the blocks; their content is of no consequence, since nothing is read that was not
    /// appended.
    ///
    /// # Errors
    /// `Unsupported` for a format or head that the device has no kernels for; `Overflow`,
    /// `OutOfMemory`, `DeviceFailed`.
    pub fn new(
        backend: &Arc<dyn Backend>,
        layout: GroupLayout,
        blocks: u32,
        options: StoreOptions,
    ) -> Result<Self> {
        if blocks > i32::MAX as u32 {
            return Err(Error::invalid("blocks", "must fit in 31 bits"));
        }
        Attend::check(&layout)?;
        let memory = DeviceMemory::new(backend, layout.pool_bytes(u64::from(blocks))?)?;
        let tiles = Tiles::new(backend, &layout, options.staging_blocks)?;
        let mut flag = DeviceMemory::new(backend, 4)?;
        flag.zero(options.stream)?;
        let scratch = || DeviceMemory::new(backend, 1);
        Ok(Self {
            options,
            layout,
            blocks,
            memory,
            flag,
            rotation: Rotation::new(backend)?,
            attend: Attend::new(backend)?,
            tiles,
            scratch: [scratch()?, scratch()?, scratch()?],
            backend: backend.clone(),
        })
    }

    /// Where things lie in a block.
    pub fn layout(&self) -> &GroupLayout {
        &self.layout
    }

    /// Bytes held for blocks.
    pub fn bytes(&self) -> u64 {
        self.memory.bytes()
    }

    /// The address of the first block on the device.
    pub fn address(&self) -> u64 {
        self.memory.address()
    }

    /// From here on everything is enqueued on `stream`, after what was enqueued before.
    ///
    /// # Errors
    /// `DeviceFailed` where work on the old stream has failed.
    pub fn set_stream(&mut self, stream: Stream) -> Result<()> {
        if stream != self.options.stream {
            self.backend.sync(self.options.stream)?;
            self.options.stream = stream;
        }
        Ok(())
    }

    /// Waits for everything that was enqueued, and answers what a kernel found wrong: `BadBlock` for
    /// a block id or slot outside the store, which it did not follow; `InvalidArgument` for new rows
    /// that a quantised format cannot hold, which it did not write.
    ///
    /// # Errors
    /// See above; `DeviceFailed`.
    pub fn sync(&mut self) -> Result<()> {
        let mut raised = [0; 4];
        self.flag.download(0, &mut raised, self.options.stream)?;
        if raised == [0; 4] {
            return Ok(());
        }
        self.flag.zero(self.options.stream)?;
        if u32::from_ne_bytes(raised) == FLAG_ROW {
            return Err(Error::invalid("k, v", "must be finite and in the range of the format"));
        }
        Err(Error::BadBlock { block: u32::MAX })
    }

    /// The word that kernels raise.
    pub(super) fn flag(&self) -> u64 {
        self.flag.address()
    }

    pub(super) fn view(&self, layer: u32) -> Result<LayerView> {
        if layer >= self.layout.spec().layers {
            return Err(Error::invalid("layer", "is not in the group"));
        }
        Ok(LayerView::new(&self.layout, self.memory.address(), layer))
    }

    pub(super) fn shape(&self, q_heads: u32) -> HeadShape {
        let spec = self.layout.spec();
        HeadShape {
            q_heads,
            kv_heads: spec.kv_heads,
            k_dim: spec.k_dim,
            v_dim: spec.v_dim,
            v_in_k: spec.v_in_k,
        }
    }

    /// Writes the rows of the batch's new tokens to its slots, as `cpu::KvStore::append` does.
    /// Waits until it is done, so that `k` and `v` are free again.
    ///
    /// # Errors
    /// As for [`append_device`](Self::append_device).
    pub fn append(
        &mut self,
        layer: u32,
        batch: &DeviceBatch,
        group: usize,
        k: Rows,
        v: Rows,
        rope: Option<(&Rope, &[u32])>,
    ) -> Result<()> {
        let stream = self.options.stream;
        // SAFETY: the scratch memory outlives the call, which waits at its end; rows go there only.
        let done = unsafe {
            self.lend(0, k).and_then(|k| {
                let v = self.lend(1, v)?;
                self.append_device(layer, batch, group, k, v, rope)
            })
        };
        // Whatever happened, nothing may still be reading the rows.
        let waited = self.backend.sync(stream);
        if self.layout.spec().format.is_float() { done.and(waited) } else { done.and(self.sync()) }
    }

    /// Enqueues the same for rows in device memory: `k` is `[rows][kv_heads][k_dim]`, `v`
    /// `[rows][kv_heads][v_dim]` of the same type, ignored where values lie in keys. With `rope`,
    /// keys are rotated to the `[rows]` positions beside it.
    ///
    /// # Errors
    /// `InvalidArgument` for sizes that do not fit together, `InvalidState` for a batch that is not
    /// on the device, `NoKernels`, `DeviceFailed`.
    pub fn append_device(
        &mut self,
        layer: u32,
        batch: &DeviceBatch,
        group: usize,
        k: DeviceRows,
        v: DeviceRows,
        rope: Option<(&Rope, &[u32])>,
    ) -> Result<()> {
        let (view, at) = (self.view(layer)?, batch.view(group)?);
        let shape = self.shape(self.layout.spec().kv_heads);
        let v_dim = if shape.v_in_k { 0 } else { shape.v_dim };
        check_len("k", k.elements(), at.rows, shape.kv_heads, shape.k_dim)?;
        if v_dim != 0 {
            check_len("v", v.elements(), at.rows, shape.kv_heads, v_dim)?;
            if v.dtype() != k.dtype() {
                return Err(Error::invalid("v", "must have the type of k"));
            }
        }
        let row = |dim: u32| i64::from(shape.kv_heads) * i64::from(dim);
        let mut params = AppendParams {
            k: In::at(k.address()),
            v: In::at(if v_dim == 0 { 0 } else { v.address() }),
            slots: In::at(at.slots),
            error_flag: Out::at(self.flag()),
            k_token: row(shape.k_dim),
            k_head: shape.k_dim.into(),
            v_token: row(v_dim),
            v_head: v_dim.into(),
            tokens: at.rows,
            kv_heads: shape.kv_heads,
            k_dim: shape.k_dim,
            v_dim,
            block_tokens: self.layout.block_tokens(),
            num_blocks: self.blocks,
            row_dtype: k.dtype().id(),
            cache_dtype: self.layout.spec().format.dtype().id(),
            ..AppendParams::default()
        };
        view.place(&mut params);
        if let Some((rope, positions)) = rope {
            rope.check(shape.k_dim)?;
            if positions.len() != at.rows as usize {
                return Err(Error::invalid("positions", "must have one entry a row"));
            }
            let (backend, stream) = (&*self.backend, self.options.stream);
            let (cosines, sines) =
                self.rotation.tables(backend, stream, at.serial, rope, positions)?;
            (params.cosines, params.sines) = (In::at(cosines), In::at(sines));
            // The tables have a row for each row of the batch.
            params.positions = In::at(at.row_numbers);
            params.rope_positions = at.rows;
            (params.rope_first, params.rope_dim) = rope.channels();
            params.rope_interleaved = u32::from(rope.style() == RopeStyle::Interleaved);
        }
        let format = self.layout.spec().format;
        if self.tiles.is_some() {
            return self.append_tiles(layer, &at, params);
        }
        if !format.is_float() {
            let mut params = append_token_params(params, format, &view.scales);
            let Some(plan) = append_token_launch(&mut params)? else { return Ok(()) };
            // SAFETY: as below.
            return unsafe { launch(&*self.backend, &plan, &params, self.options.stream) };
        }
        self.append_rows(params)
    }

    /// Enqueues the append of rows of floats.
    pub(super) fn append_rows(&self, mut params: AppendParams) -> Result<()> {
        let Some(plan) = append_launch(&mut params)? else { return Ok(()) };
        // SAFETY: rows were vouched for, and have the elements that the sizes say; tables and cache
        // are this store's and the batch's own memory, which is freed after what is enqueued.
        unsafe { launch(&*self.backend, &plan, &params, self.options.stream) }
    }

    /// Attention of the batch's query rows, as `cpu::KvStore::attend` does: `q` is
    /// `[rows][q_heads][k_dim]`, `out` `[rows][q_heads][v_dim]`, `lse` `[rows][q_heads]`. Waits for
    /// the result.
    ///
    /// # Errors
    /// As for [`attend_device`](Self::attend_device); `BadBlock` for a table entry outside the
    /// store (the output is then unspecified).
    #[allow(clippy::too_many_arguments)]
    pub fn attend(
        &mut self,
        layer: u32,
        batch: &DeviceBatch,
        group: usize,
        q: Rows,
        mut out: RowsMut,
        lse: Option<&mut [f32]>,
        scoring: &Scoring,
    ) -> Result<()> {
        let stream = self.options.stream;
        let out_bytes = out.elements() as u64 * u64::from(out.dtype().bytes());
        // Both sizes were those of slices.
        self.scratch[1].grow(out_bytes)?;
        let lse_bytes = lse.as_ref().map_or(0, |lse| size_of_val(*lse) as u64);
        self.scratch[2].grow(lse_bytes)?;
        // SAFETY: the scratch memory outlives the call, which waits at its end, and has the bytes.
        let done = unsafe {
            let device_out =
                DeviceRowsMut::new(self.scratch[1].address(), out.dtype(), out.elements() as u64);
            let device_lse = lse.as_ref().map(|lse| {
                DeviceRowsMut::new(self.scratch[2].address(), DType::F32, lse.len() as u64)
            });
            self.lend(0, q).and_then(|q| {
                self.attend_device(layer, batch, group, q, device_out, device_lse, scoring)
            })
        };
        // Whatever happened, nothing may still be reading the rows; and the flag says what it saw.
        done.and(self.sync())?;
        // SAFETY: as many bytes as the elements have, of a type that has no invalid ones.
        let bytes =
            unsafe { core::slice::from_raw_parts_mut(out.as_mut_ptr(), out_bytes as usize) };
        self.scratch[1].download(0, bytes, stream)?;
        if let Some(lse) = lse {
            // SAFETY: as above.
            let bytes = unsafe {
                core::slice::from_raw_parts_mut(lse.as_mut_ptr().cast(), lse_bytes as usize)
            };
            self.scratch[2].download(0, bytes, stream)?;
        }
        Ok(())
    }

    /// Enqueues a copy of a block with all its layers. At least the first `tokens` tokens are
    /// copied; a block is one contiguous object, and so all of it is.
    ///
    /// # Errors
    /// `BadBlock`; `InvalidArgument` for more tokens than a block has; `DeviceFailed`.
    pub fn copy_tokens(&mut self, src: BlockId, dst: BlockId, tokens: u32) -> Result<()> {
        if let Some(bad) = [src, dst].into_iter().find(|id| id.0 >= self.blocks) {
            return Err(Error::BadBlock { block: bad.0 });
        }
        if tokens > self.layout.block_tokens() {
            return Err(Error::invalid("tokens", "must be at most block_tokens"));
        }
        let bytes = self.layout.block_bytes();
        // Below the pool's bytes, which were checked.
        let at = |id: BlockId| self.memory.address() + u64::from(id.0) * bytes;
        // SAFETY: both blocks are in the memory; blocks are apart or the same.
        unsafe { self.backend.copy(at(src), at(dst), bytes, self.options.stream) }
    }

    /// Enqueues zeroing a block.
    ///
    /// # Errors
    /// `BadBlock`, `DeviceFailed`.
    pub fn zero(&mut self, block: BlockId) -> Result<()> {
        if block.0 >= self.blocks {
            return Err(Error::BadBlock { block: block.0 });
        }
        let bytes = self.layout.block_bytes();
        let at = self.memory.address() + u64::from(block.0) * bytes;
        // SAFETY: the block is in the memory.
        unsafe { self.backend.zero(at, bytes, self.options.stream) }
    }

    /// Enqueues zeroing all blocks.
    ///
    /// # Errors
    /// `DeviceFailed`.
    pub fn zero_all(&mut self) -> Result<()> {
        self.memory.zero(self.options.stream)
    }

    /// Copies a block, all layers, to host memory, after what is enqueued, and waits for it.
    ///
    /// # Errors
    /// `BadBlock`; `InvalidArgument` where `to` is not as long as a block; `DeviceFailed`.
    pub fn read_block(&self, id: BlockId, to: &mut [u8]) -> Result<()> {
        let at = self.block_at(id, to.len())?;
        self.memory.download(at, to, self.options.stream)
    }

    /// Copies a block, all layers, from host memory, and waits until that has been read.
    ///
    /// # Errors
    /// `BadBlock`; `InvalidArgument` where `from` is not as long as a block, or a sealed record of it
    /// is damaged or another format's; `DeviceFailed`.
    pub fn write_block(&mut self, id: BlockId, from: &[u8]) -> Result<()> {
        let at = self.block_at(id, from.len())?;
        self.check_records(from)?;
        self.memory.upload(at, from, self.options.stream)
    }

    /// The stream that everything is enqueued on.
    pub fn stream(&self) -> Stream {
        self.options.stream
    }

    /// Where a block lies, all its layers.
    ///
    /// # Errors
    /// `BadBlock`.
    pub fn span(&self, id: BlockId) -> Result<Span<'_>> {
        self.layers_span(id, 0, self.layout.block_bytes() as usize)
    }

    /// Where consecutive layers of a block lie, from layer `first` on, `bytes` bytes.
    ///
    /// # Errors
    /// `BadBlock`; `InvalidArgument` where that is not whole layers of the block.
    pub fn layers_span(&self, id: BlockId, first: u32, bytes: usize) -> Result<Span<'_>> {
        let at = self.layout.layers_at(first, bytes)?;
        let at = at + self.block_at(id, self.layout.block_bytes() as usize)?;
        let address = self.memory.part(at, bytes as u64)?;
        Ok(Span { address, bytes, store: PhantomData })
    }

    fn block_at(&self, id: BlockId, bytes: usize) -> Result<u64> {
        if id.0 >= self.blocks {
            return Err(Error::BadBlock { block: id.0 });
        }
        if bytes as u64 != self.layout.block_bytes() {
            return Err(Error::invalid("bytes", "must be as many as a block has"));
        }
        Ok(u64::from(id.0) * bytes as u64)
    }

    /// Puts rows of host memory into scratch memory `n`.
    ///
    /// # Safety
    /// The rows' host memory stays as it is, and the scratch memory is used for nothing else, until
    /// the stream has been waited for.
    unsafe fn lend(&mut self, n: usize, rows: Rows) -> Result<DeviceRows> {
        let bytes = rows.elements() * rows.dtype().bytes() as usize;
        self.scratch[n].grow(bytes as u64)?;
        let address = self.scratch[n].address();
        // SAFETY: rows are that many initialised bytes; the scratch memory has them; the caller's
        // promise for the rest.
        unsafe {
            let bytes = core::slice::from_raw_parts(rows.as_ptr(), bytes);
            self.backend.upload(address, bytes, self.options.stream)?;
            Ok(DeviceRows::new(address, rows.dtype(), rows.elements() as u64))
        }
    }
}

pub(super) fn check_len(
    what: &'static str,
    elements: u64,
    rows: u32,
    heads: u32,
    dim: u32,
) -> Result<()> {
    let expected =
        (u64::from(rows)).checked_mul(u64::from(heads)).and_then(|n| n.checked_mul(dim.into()));
    if expected == Some(elements) {
        Ok(())
    } else {
        Err(Error::invalid(what, "must be [rows][heads][dim], contiguous"))
    }
}
