//! Attention over a device store: which kernel serves a batch, its plan, its workspace.
//!
//! A plan is made on the device from the lengths that stand there, once a batch; the layers after
//! the first reuse it. Sequences of up to eight new tokens are decoded; longer ones go through the
//! same kernel eight tokens at a time.

use alloc::sync::Arc;
use alloc::vec::Vec;

use super::backend::launch;
use super::batch::{BatchView, DeviceBatch};
use super::memory::DeviceMemory;
use super::rows::{DeviceRows, DeviceRowsMut};
use super::store::{DeviceStore, check_len};
use super::{Backend, Stream};
use crate::attention::{HeadShape, Scoring};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernels::params::{DecodeParams, In, Out};
use crate::kernels::{DecodeBounds, DecodePlan, Pieces, decode_kernel};
use crate::layout::GroupLayout;

/// Query tokens of a sequence that the decode kernel takes at once.
const MAX_DECODE_TOKENS: u32 = 8;
/// Tokens of a piece in the deterministic mode: long enough that merging them costs little, short
/// enough that a long sequence alone has work for a device.
const FIXED_PIECE: u32 = 512;

/// What attention keeps between calls.
#[derive(Debug)]
pub(super) struct Attend {
    /// The plan that the workspace holds, and what it was made for.
    planned: Option<(PlanKey, DecodePlan)>,
    workspace: DeviceMemory,
    /// Sinks and slopes, and what was uploaded there last.
    per_head: DeviceMemory,
    per_head_bytes: Vec<u8>,
    /// Lengths of sequences cut at their queries.
    lengths: DeviceMemory,
    lengths_bytes: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct PlanKey {
    serial: u64,
    q_heads: u32,
    window: Option<u32>,
}

/// One call, its arguments checked.
struct Call<'a> {
    shape: HeadShape,
    batch: BatchView,
    params: DecodeParams,
    scoring: &'a Scoring<'a>,
}

impl Attend {
    pub fn new(backend: &Arc<dyn Backend>) -> Result<Self> {
        let memory = || DeviceMemory::new(backend, 1);
        Ok(Self {
            planned: None,
            workspace: memory()?,
            per_head: memory()?,
            per_head_bytes: Vec::new(),
            lengths: memory()?,
            lengths_bytes: Vec::new(),
        })
    }

    /// Whether there are kernels for a layout.
    ///
    /// # Errors
    /// `Unsupported` where there are none.
    pub fn check(layout: &GroupLayout) -> Result<()> {
        let spec = layout.spec();
        if spec.v_in_k || spec.k_dim != spec.v_dim {
            return Err(Error::Unsupported { what: "this kind of attention on this device" });
        }
        decode_kernel(spec.format.dtype(), spec.k_dim).map(|_| ())
    }

    /// Addresses of sinks and slopes on the device, null where there are none.
    fn per_head(
        &mut self,
        backend: &dyn Backend,
        stream: Stream,
        scoring: &Scoring,
    ) -> Result<(In<f32>, In<f32>)> {
        let lists = [scoring.sinks, scoring.alibi];
        let bytes = lists.iter().flatten().map(|list| list.len() * 4).sum::<usize>();
        if bytes == 0 {
            return Ok((In::NULL, In::NULL));
        }
        let wanted = || lists.into_iter().flatten().flatten().flat_map(|x| x.to_ne_bytes());
        if !self.per_head_bytes.iter().copied().eq(wanted()) {
            self.per_head_bytes.clear();
            self.per_head.grow(bytes as u64)?;
            let list: Vec<u8> = wanted().collect();
            // SAFETY: the memory has these bytes; the list is not page-locked.
            unsafe { backend.upload(self.per_head.address(), &list, stream) }?;
            self.per_head_bytes = list;
        }
        let sinks = self.per_head.address();
        let slopes = sinks + scoring.sinks.map_or(0, |list| list.len() as u64 * 4);
        Ok((
            In::at(if scoring.sinks.is_some() { sinks } else { 0 }),
            In::at(if scoring.alibi.is_some() { slopes } else { 0 }),
        ))
    }
}

impl DeviceStore {
    /// Enqueues attention for rows in device memory: `q` is `[rows][q_heads][k_dim]`, `out`
    /// `[rows][q_heads][v_dim]`, `lse`, of f32, `[rows][q_heads]`; `q_heads` follows from the
    /// length of `q`. The lists in `scoring` are host memory and are copied.
    ///
    /// # Errors
    /// `InvalidArgument` for sizes that do not fit together, `InvalidState` for a batch that is not
    /// on the device, `Unsupported` for what no kernel does, `NoKernels`, `OutOfMemory`,
    /// `DeviceFailed`.
    #[allow(clippy::too_many_arguments)]
    pub fn attend_device(
        &mut self,
        layer: u32,
        batch: &DeviceBatch,
        group: usize,
        q: DeviceRows,
        out: DeviceRowsMut,
        lse: Option<DeviceRowsMut>,
        scoring: &Scoring,
    ) -> Result<()> {
        let (view, at) = (self.view(layer)?, batch.view(group)?);
        let row = u64::from(at.rows) * u64::from(self.layout().spec().k_dim);
        if at.rows == 0 {
            return Ok(());
        }
        if q.elements() == 0 || !q.elements().is_multiple_of(row) || q.elements() / row > 1 << 16 {
            return Err(Error::invalid("q", "must be [rows][q_heads][k_dim]"));
        }
        let shape = self.shape((q.elements() / row) as u32);
        shape.check()?;
        scoring.check(shape.q_heads)?;
        check_len("out", out.elements(), at.rows, shape.q_heads, shape.v_dim)?;
        if let Some(lse) = &lse {
            check_len("lse", lse.elements(), at.rows, shape.q_heads, 1)?;
            if lse.dtype() != DType::F32 {
                return Err(Error::invalid("lse", "must be f32"));
            }
        }
        let (sinks, slopes) = self.attend.per_head(&*self.backend, self.options.stream, scoring)?;
        let heads = i64::from(shape.q_heads);
        let params = DecodeParams {
            q: In::at(q.address()),
            k: In::at(view.k),
            v: In::at(view.v),
            out: Out::at(out.address()),
            lse: Out::at(lse.map_or(0, |lse| lse.address())),
            q_indptr: In::at(at.q_indptr),
            table: In::at(at.indices),
            table_indptr: In::at(at.indptr),
            seq_lens: In::at(at.kv_lens),
            sinks,
            slopes,
            error_flag: self.flag(),
            q_row: heads * i64::from(shape.k_dim),
            q_head: shape.k_dim.into(),
            out_row: heads * i64::from(shape.v_dim),
            out_head: shape.v_dim.into(),
            k_block: view.k_strides.block,
            k_head: view.k_strides.head,
            k_token: view.k_strides.token,
            v_block: view.v_strides.block,
            v_head: view.v_strides.head,
            v_token: view.v_strides.token,
            causal: u32::from(scoring.causal),
            block_tokens: self.layout().block_tokens(),
            num_blocks: self.blocks,
            window: scoring.window.unwrap_or(0),
            q_dtype: q.dtype().id(),
            out_dtype: out.dtype().id(),
            scale: scoring.scale,
            softcap: scoring.softcap.unwrap_or(0.0),
            ..DecodeParams::default()
        };
        let call = Call { shape, batch: at, params, scoring };
        if at.max_q <= MAX_DECODE_TOKENS {
            self.decode(call)
        } else {
            let (q_bytes, out_bytes) = (q.dtype().bytes(), out.dtype().bytes());
            self.decode_in_chunks(call, batch, q_bytes.into(), out_bytes.into())
        }
    }

    /// Decodes a batch of at most eight query tokens a sequence.
    fn decode(&mut self, mut call: Call) -> Result<()> {
        let (at, window) = (call.batch, call.scoring.window);
        let key = PlanKey { serial: at.serial, q_heads: call.shape.q_heads, window };
        let plan = match self.attend.planned {
            Some((of, plan)) if of == key => plan,
            _ => {
                let plan = self.plan(&call, at.max_q, at.seqs, at.max_kv)?;
                self.launch_plan(&plan, In::at(at.kv_lens), at.seqs, window)?;
                self.attend.planned = Some((key, plan));
                plan
            }
        };
        self.launch_decode(&plan, &mut call.params)
    }

    /// Decodes sequences one after another, eight query tokens at a time: each chunk is a batch of
    /// one sequence that ends with the chunk.
    fn decode_in_chunks(
        &mut self,
        mut call: Call,
        batch: &DeviceBatch,
        q_bytes: u64,
        out_bytes: u64,
    ) -> Result<()> {
        if !call.scoring.causal {
            return Err(Error::Unsupported {
                what: "more than 8 query tokens without a causal mask on this device",
            });
        }
        let (q_indptr, kv_lens) = batch.lengths();
        let mut chunks = Vec::new();
        for (seq, bounds) in q_indptr.windows(2).enumerate() {
            let mut row = bounds[0];
            while row < bounds[1] {
                let count = (bounds[1] - row).min(MAX_DECODE_TOKENS as i32);
                let length = i64::from(kv_lens[seq]) - i64::from(bounds[1] - row - count);
                chunks.push((seq as u64, row as u64, count as u32, length.max(0) as i32));
                row += count;
            }
        }
        let attend = &mut self.attend;
        attend.planned = None;
        attend.lengths_bytes.clear();
        attend.lengths_bytes.extend(chunks.iter().flat_map(|chunk| chunk.3.to_ne_bytes()));
        attend.lengths.grow(attend.lengths_bytes.len() as u64)?;
        let lengths = attend.lengths.address();
        // SAFETY: the memory has these bytes; the staging buffer is not page-locked.
        unsafe { self.backend.upload(lengths, &attend.lengths_bytes, self.options.stream) }?;
        let whole = call.params;
        for (n, &(seq, row, count, length)) in chunks.iter().enumerate() {
            let plan = self.plan(&call, count, 1, length as u32)?;
            let length = In::at(lengths + 4 * n as u64);
            self.launch_plan(&plan, length, 1, call.scoring.window)?;
            call.params = DecodeParams {
                q: In::at(whole.q.0 + row * whole.q_row as u64 * q_bytes),
                out: Out::at(whole.out.0 + row * whole.out_row as u64 * out_bytes),
                lse: match whole.lse.0 {
                    0 => Out::NULL,
                    lse => Out::at(lse + row * u64::from(call.shape.q_heads) * 4),
                },
                q_indptr: In::NULL,
                table_indptr: In::at(whole.table_indptr.0 + 4 * seq),
                seq_lens: length,
                ..whole
            };
            self.launch_decode(&plan, &mut call.params)?;
        }
        Ok(())
    }

    /// A plan for these maxima, with workspace for it.
    fn plan(&mut self, call: &Call, q_len: u32, batch: u32, max_tokens: u32) -> Result<DecodePlan> {
        let plan = DecodePlan::new(DecodeBounds {
            cache: self.layout().spec().format.dtype(),
            head_dim: call.shape.k_dim,
            q_heads: call.shape.q_heads,
            kv_heads: call.shape.kv_heads,
            q_len,
            batch,
            max_tokens,
            pieces: if self.options.deterministic {
                Pieces::Fixed(FIXED_PIECE)
            } else {
                Pieces::Balanced
            },
            multiprocessors: self.backend.multiprocessors(),
        })?;
        self.attend.planned = None;
        self.attend.workspace.grow(plan.workspace_bytes())?;
        Ok(plan)
    }

    fn launch_plan(
        &mut self,
        plan: &DecodePlan,
        lengths: In<i32>,
        batch: u32,
        window: Option<u32>,
    ) -> Result<()> {
        let workspace = self.attend.workspace.address();
        let (first, params) = plan.plan_launch(workspace, lengths, batch, window, self.flag())?;
        // SAFETY: the workspace has the bytes that the plan asks for, and the lengths are those of
        // the batch; all of it is freed after what is enqueued.
        unsafe { launch(&*self.backend, &first, &params, self.options.stream) }
    }

    fn launch_decode(&mut self, plan: &DecodePlan, params: &mut DecodeParams) -> Result<()> {
        let second = plan.decode_launch(self.attend.workspace.address(), params)?;
        // SAFETY: as above; rows were vouched for and have the elements that the sizes say.
        unsafe { launch(&*self.backend, &second, params, self.options.stream) }
    }
}
