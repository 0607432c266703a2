//! A cascade as one attention call: both halves of it, attention over each, the merge, in one
//! workspace.
//!
//! The arguments are those of the plain call. The halves are made by the split, on the device, or
//! written by the host that knows what is shared ([`CascadeAttendPlan::views`]). They and the plans
//! depend on lengths, tables and segments alone: they are made once for all layers. What a half
//! cannot know (a window, ALiBi) is refused; sinks join in the merge.

use alloc::vec::Vec;

use super::attend::most_workspace_bytes;
use super::cascade::{CascadeBounds, CascadeInput, CascadeOutput, CascadePlan, Half};
use super::params::{
    Any, CascadeSegment, CascadeSplitParams, CopyParams, DecodePlanParams, In, MergeParams, Out,
};
use super::shared_prefix::HostBatch;
use super::{AttendArgs, AttendBounds, AttendParams, AttendPlan, Launch, copy_launch};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// What makes both halves on the device, in order.
#[derive(Debug, Clone, Copy)]
pub struct CascadeSplit {
    /// The lengths of the own half, which are zeroed before the split: address and bytes. A list
    /// that leaves a sequence out then reads nothing for it.
    pub cleared: (u64, u64),
    /// Makes both halves.
    pub launch: (Launch, CascadeSplitParams),
}

/// The launches of one call over the halves, in order.
#[derive(Debug, Clone, Copy)]
pub struct CascadeLaunches {
    /// The plan of each half, where its kernel has one; once for all layers.
    pub plans: [Option<(Launch, DecodePlanParams)>; 2],
    /// Copies the queries, one copy a chunk; `None` for one chunk.
    pub queries: Option<(Launch, CopyParams)>,
    /// Attention over each half.
    pub halves: [(Launch, AttendParams); 2],
    /// Joins them; `None` without rows.
    pub merge: Option<(Launch, MergeParams)>,
}

/// The plan of a cascade for some bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CascadeAttendPlan {
    bounds: AttendBounds,
    cascade: CascadePlan,
    shared: AttendPlan,
    own: AttendPlan,
    shared_at: u64,
    own_at: u64,
    workspace_bytes: u64,
}

impl CascadeAttendPlan {
    /// Plans for calls within `bounds` over blocks of `block_tokens` tokens, with lists of `segments`
    /// entries, and each shared prefix in `chunks` chunks: 1 for [`split`](Self::split).
    ///
    /// # Errors
    /// Those of [`AttendPlan::new`] for either half (the rows of all members of a segment are one
    /// sequence's queries) and of [`CascadePlan::new`]; `InvalidArgument` for chunks of what is
    /// decoded.
    pub fn new(
        bounds: &AttendBounds,
        block_tokens: u32,
        segments: u32,
        chunks: u32,
    ) -> Result<Self> {
        let b = bounds;
        let own = AttendPlan::new(b)?;
        let of_cascade = CascadeBounds {
            q_heads: b.shape.q_heads,
            head_dim: b.shape.v_dim,
            batch: b.seqs,
            rows: b.q_tokens,
            segments,
            block_tokens,
            chunks,
        };
        let cascade = CascadePlan::new(of_cascade)?;
        let of_shared = AttendBounds {
            seqs: of_cascade.shared_seqs(),
            q_len: b.q_tokens,
            q_tokens: b.q_tokens * chunks,
            ..*b
        };
        let shared = AttendPlan::new(&of_shared)?;
        if chunks > 1 && !matches!(shared, AttendPlan::Prefill(_)) {
            return Err(Error::invalid("chunks", "must be 1 for so few query tokens"));
        }
        let overflow = Error::Overflow { what: "cascade workspace" };
        let after = |at: u64, bytes: u64| {
            at.checked_add(bytes).and_then(|end| end.checked_next_multiple_of(256)).ok_or(overflow)
        };
        let shared_at = cascade.workspace_bytes();
        let own_at = after(shared_at, most_workspace_bytes(&of_shared)?)?;
        let workspace_bytes = after(own_at, most_workspace_bytes(b)?)?;
        Ok(Self { bounds: *b, cascade, shared, own, shared_at, own_at, workspace_bytes })
    }

    /// Bytes of workspace that any call within the bounds needs, from an address that is a multiple
    /// of 256.
    pub fn workspace_bytes(&self) -> u64 {
        self.workspace_bytes
    }

    /// The plans of the halves: the shared one, the own.
    pub fn halves(&self) -> [&AttendPlan; 2] {
        [&self.shared, &self.own]
    }

    /// Both halves of a batch, as bytes for the beginning of the workspace.
    ///
    /// # Errors
    /// `InvalidArgument` where the batch or the segments are not what the plan was made for.
    pub fn views(
        &self,
        batch: &HostBatch,
        segments: &[CascadeSegment],
        bytes: &mut Vec<u8>,
    ) -> Result<()> {
        self.cascade.views(batch, segments, bytes)
    }

    /// What makes both halves on the device for a call with `args`; `segments` is on the device.
    ///
    /// # Errors
    /// Those of [`CascadePlan::split_launch`].
    pub fn split(
        &self,
        workspace: u64,
        args: &AttendArgs,
        segments: In<CascadeSegment>,
    ) -> Result<CascadeSplit> {
        let (b, ragged) = (&self.bounds, args.q_indptr != 0);
        let launch = self.cascade.split_launch(
            workspace,
            &CascadeInput {
                segments,
                batch: args.seqs,
                seq_lens: In::at(args.kv_lens),
                q_indptr: In::at(args.q_indptr),
                q_len: if ragged { 0 } else { b.q_len },
                table: In::at(args.table),
                table_indptr: In::at(args.table_indptr),
                table_stride: args.table_stride,
                error_flag: Out::at(args.error_flag),
            },
        )?;
        Ok(CascadeSplit { cleared: (launch.1.own_lens.0, u64::from(args.seqs) * 4), launch })
    }

    /// The launches of a call that plain attention would make with `args`, once the halves are made.
    /// Merged are all rows of the bounds, or of the call's sequences where each has as many.
    ///
    /// # Errors
    /// `Unsupported` with a window or ALiBi; those of the plain call and of
    /// [`CascadePlan::merge_launch`]; with chunks `InvalidArgument` for queries that do not lie in one
    /// piece.
    pub fn launches(&self, workspace: u64, args: &AttendArgs) -> Result<CascadeLaunches> {
        if args.window.is_some() || args.slopes != 0 {
            return Err(Error::Unsupported { what: "a window or ALiBi in cascade attention" });
        }
        let (b, ragged) = (&self.bounds, args.q_indptr != 0);
        let rows = if ragged { Some(b.q_tokens) } else { args.seqs.checked_mul(b.q_len) };
        let rows = rows.ok_or(Error::Overflow { what: "query tokens" })?;
        let queries = self.queries(workspace, args)?;
        let shared = self.cascade.shared(workspace);
        let shared = AttendArgs {
            q: queries.map_or(args.q, |(_, copies)| copies.to.0),
            q_indptr: shared.q_indptr.0,
            causal: false,
            tail_mask: 0,
            ..self.half(args, &shared)
        };
        let own = self.half(args, &self.cascade.own(workspace, args.seqs));
        let (shared_at, own_at) = (workspace + self.shared_at, workspace + self.own_at);
        let to = CascadeOutput::<Any> {
            out: Out::at(args.out),
            dtype: args.out_dtype,
            row: args.out_strides[0],
            head: args.out_strides[1],
            lse: Out::at(args.lse),
            sinks: In::at(args.sinks),
        };
        Ok(CascadeLaunches {
            queries,
            plans: [
                self.shared.plan_launch(shared_at, &shared)?,
                self.own.plan_launch(own_at, &own)?,
            ],
            halves: [
                self.shared.attend_launch(shared_at, &shared)?,
                self.own.attend_launch(own_at, &own)?,
            ],
            merge: self.cascade.merge_launch(workspace, rows, &to, b.multiprocessors)?,
        })
    }

    /// Copies the rows of the queries, one copy after another.
    fn queries(&self, workspace: u64, args: &AttendArgs) -> Result<Option<(Launch, CopyParams)>> {
        let (b, chunks) = (&self.bounds, self.cascade.chunks());
        if chunks == 1 {
            return Ok(None);
        }
        let row = i64::from(b.shape.q_heads) * i64::from(b.shape.k_dim);
        if args.q_strides != [row, i64::from(b.shape.k_dim)] {
            return Err(Error::invalid("q", "must lie in one piece"));
        }
        let bytes = i64::from(b.q_tokens) * row * i64::from(args.q_dtype.bytes());
        let run_bytes = u32::try_from(bytes).map_err(|_| Error::Overflow { what: "queries" })?;
        let [list, copies] = self.cascade.copies_at(workspace);
        // One block whose runs are read at the same place and written one after another.
        let mut params = CopyParams {
            from: In::at(args.q),
            to: Out::at(copies),
            list: In::at(list),
            from_run: 0,
            to_run: bytes,
            count: 1,
            planes: 1,
            runs: chunks,
            run_bytes,
            from_blocks: 1,
            to_blocks: 1,
            ..CopyParams::default()
        };
        Ok(copy_launch(&mut params, b.multiprocessors)?.map(|launch| (launch, params)))
    }

    /// The plain call on a half of it.
    fn half(&self, args: &AttendArgs, half: &Half) -> AttendArgs {
        let (heads, dim) =
            (i64::from(self.bounds.shape.q_heads), i64::from(self.bounds.shape.v_dim));
        AttendArgs {
            out: half.out.0,
            out_dtype: DType::F32,
            out_strides: [heads * dim, dim],
            lse: half.lse.0,
            table_indptr: half.table_indptr.0,
            seqs: half.batch,
            kv_lens: half.seq_lens.0,
            sinks: 0,
            ..*args
        }
    }
}
