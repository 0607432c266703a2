//! Attention over a device store: the call's plan, its workspace, its launches.
//!
//! A plan is made on the device from the lengths that stand there, once a batch; the layers after
//! the first reuse it. Which kernel serves a batch is the plan's choice, and where sequences share a
//! prefix it may be a cascade (`cascade`).

use alloc::sync::Arc;
use alloc::vec::Vec;

use super::backend::{launch, launch_attend};
use super::batch::{BatchView, DeviceBatch};
use super::cascade::Cascade;
use super::memory::DeviceMemory;
use super::rows::{DeviceRows, DeviceRowsMut};
use super::store::{DeviceStore, check_len};
use super::tiles::{Tiles, is_tiled};
use super::{Backend, Stream};
use crate::attention::{HeadShape, Scoring};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernels::{
    AttendArgs, AttendBounds, AttendPlan, CascadeAttendPlan, Pieces, SM90_SHARED_BYTES,
};
use crate::layout::GroupLayout;

/// Tokens of a piece in the deterministic mode: long enough that merging them costs little, short
/// enough that a long sequence alone has work for a device.
const FIXED_PIECE: u32 = 512;

/// What attention keeps between calls.
#[derive(Debug)]
pub(super) struct Attend {
    /// The plan that the workspace holds, and what it was made for.
    pub planned: Option<(PlanKey, Planned)>,
    workspace: DeviceMemory,
    pub cascade: Cascade,
    /// Sinks and slopes, and what was uploaded there last.
    per_head: DeviceMemory,
    per_head_bytes: Vec<u8>,
}

/// What was planned for a batch.
#[derive(Debug, Clone, Copy)]
#[allow(clippy::large_enum_variant, reason = "one a store, and no allocation a step")]
pub(super) enum Planned {
    /// Every sequence by itself.
    Plain(AttendPlan),
    /// What sequences share once for all of them.
    Cascade(CascadeAttendPlan),
}

/// What a plan was made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PlanKey {
    pub serial: u64,
    pub q_heads: u32,
    pub window: Option<u32>,
    /// Whether what sequences share may be read once for all of them.
    pub may_share: bool,
    /// The first of the parts that it is for; of sealed tiles.
    pub first_part: u32,
}

impl Attend {
    pub fn new(backend: &Arc<dyn Backend>) -> Result<Self> {
        let memory = || DeviceMemory::new(backend, 1);
        Ok(Self {
            planned: None,
            workspace: memory()?,
            cascade: Cascade::default(),
            per_head: memory()?,
            per_head_bytes: Vec::new(),
        })
    }

    /// The address of a workspace of at least this size.
    pub fn room(&mut self, bytes: u64) -> Result<u64> {
        self.workspace.grow(bytes)?;
        Ok(self.workspace.address())
    }

    /// Whether there are kernels for a layout.
    ///
    /// # Errors
    /// `Unsupported` where there are none.
    pub fn check(layout: &GroupLayout) -> Result<()> {
        let spec = layout.spec();
        if is_tiled(layout) {
            return Tiles::check(layout);
        }
        AttendPlan::new(&AttendBounds {
            shape: HeadShape {
                q_heads: spec.kv_heads,
                kv_heads: spec.kv_heads,
                k_dim: spec.k_dim,
                v_dim: spec.v_dim,
                v_in_k: spec.v_in_k,
            },
            format: spec.format,
            seqs: 1,
            q_len: 1,
            q_tokens: 1,
            kv_len: 1,
            pieces: Pieces::Balanced,
            multiprocessors: 1,
            multiprocessor_shared_bytes: SM90_SHARED_BYTES,
        })
        .map(|_| ())
    }

    /// Addresses of sinks and slopes on the device, 0 where there are none.
    fn per_head(
        &mut self,
        backend: &dyn Backend,
        stream: Stream,
        scoring: &Scoring,
    ) -> Result<(u64, u64)> {
        let lists = [scoring.sinks, scoring.alibi];
        let bytes = lists.iter().flatten().map(|list| list.len() * 4).sum::<usize>();
        if bytes == 0 {
            return Ok((0, 0));
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
            if scoring.sinks.is_some() { sinks } else { 0 },
            if scoring.alibi.is_some() { slopes } else { 0 },
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
        let strides = |dim: u32| [i64::from(shape.q_heads) * i64::from(dim), i64::from(dim)];
        let args = AttendArgs {
            q: q.address(),
            q_dtype: q.dtype(),
            q_strides: strides(shape.k_dim),
            out: out.address(),
            out_dtype: out.dtype(),
            out_strides: strides(shape.v_dim),
            lse: lse.map_or(0, |lse| lse.address()),
            k: view.k,
            k_strides: view.k_strides,
            v: view.v,
            v_strides: view.v_strides,
            scales: view.scales,
            block_tokens: self.layout().block_tokens(),
            num_blocks: self.blocks,
            table: at.indices,
            table_stride: 0,
            table_indptr: at.indptr,
            seqs: at.seqs,
            q_indptr: at.q_indptr,
            kv_lens: at.kv_lens,
            tail_mask: 0,
            scale: scoring.scale,
            causal: scoring.causal,
            window: scoring.window,
            softcap: scoring.softcap,
            sinks,
            slopes,
            error_flag: self.flag(),
        };
        if self.tiles.is_some() {
            return self.attend_tiles(layer, batch, &at, &shape, args);
        }
        let key = PlanKey {
            serial: at.serial,
            q_heads: shape.q_heads,
            window: scoring.window,
            may_share: self.may_share(&args, &at)?,
            first_part: 0,
        };
        let plan = match self.attend.planned {
            Some((of, plan)) if of == key => plan,
            _ => {
                self.attend.planned = None;
                let bounds = self.bounds(&shape, &at);
                let shared = if key.may_share {
                    self.plan_cascade(&bounds, &args, &batch.host(group, args.block_tokens)?)?
                } else {
                    None
                };
                let plan = match shared {
                    Some(plan) => Planned::Cascade(plan),
                    None => Planned::Plain(self.plan(&bounds, &args)?),
                };
                self.attend.planned = Some((key, plan));
                plan
            }
        };
        match plan {
            Planned::Plain(plan) => self.run(&plan, &args),
            Planned::Cascade(plan) => self.run_cascade(&plan, &args),
        }
    }

    /// The largest call of a batch: itself.
    fn bounds(&self, shape: &HeadShape, at: &BatchView) -> AttendBounds {
        AttendBounds {
            shape: *shape,
            format: self.layout().spec().format,
            seqs: at.seqs,
            q_len: at.max_q,
            q_tokens: at.rows,
            kv_len: at.max_kv,
            pieces: self.pieces(),
            multiprocessors: self.backend.multiprocessors(),
            multiprocessor_shared_bytes: self.backend.multiprocessor_shared_bytes(),
        }
    }

    /// Plans for a call with these maxima: on the host, and on the device where its kernel wants
    /// that.
    fn plan(&mut self, bounds: &AttendBounds, args: &AttendArgs) -> Result<AttendPlan> {
        let plan = AttendPlan::new(bounds)?;
        let workspace = self.attend.room(plan.workspace_bytes())?;
        if let Some((first, params)) = plan.plan_launch(workspace, args)? {
            // SAFETY: the workspace has the bytes that the plan asks for, and the lengths are those
            // of the batch; all of it is freed after what is enqueued.
            unsafe { launch(&*self.backend, &first, &params, self.options.stream) }?;
        }
        Ok(plan)
    }

    /// How contexts are cut.
    pub(super) fn pieces(&self) -> Pieces {
        if self.options.deterministic { Pieces::Fixed(FIXED_PIECE) } else { Pieces::Balanced }
    }

    fn run(&mut self, plan: &AttendPlan, args: &AttendArgs) -> Result<()> {
        let (second, params) = plan.attend_launch(self.attend.workspace.address(), args)?;
        // SAFETY: as above; rows were vouched for and have the elements that the sizes say.
        unsafe { launch_attend(&*self.backend, &second, &params, self.options.stream) }
    }
}
