//! A cascade as one attention call: the split at shared prefixes, attention over both halves, the
//! merge, in one workspace.
//!
//! The arguments are those of the plain call, so that who has a cost model's answer
//! ([`super::cascade_choice`]) passes one list more. Split and plans depend on lengths, tables and
//! segments alone: they are made once for all layers. What a half cannot know (a window, ALiBi) is
//! refused; sinks join in the merge.

use super::attend::most_workspace_bytes;
use super::cascade::{CascadeBounds, CascadeInput, CascadeOutput, CascadePlan, Half};
use super::params::{
    Any, CascadeSegment, CascadeSplitParams, DecodePlanParams, In, MergeParams, Out,
};
use super::{AttendArgs, AttendBounds, AttendParams, AttendPlan, Launch};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// The launches of one call, in order.
#[derive(Debug, Clone, Copy)]
pub struct CascadeLaunches {
    /// The lengths of the own half, which are zeroed before the split: address and bytes. A list
    /// that leaves a sequence out then reads nothing for it.
    pub cleared: (u64, u64),
    /// Makes both halves.
    pub split: (Launch, CascadeSplitParams),
    /// The plan of each half, where its kernel has one.
    pub plans: [Option<(Launch, DecodePlanParams)>; 2],
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
    /// entries.
    ///
    /// # Errors
    /// Those of [`AttendPlan::new`] for either half (the rows of all members of a segment are one
    /// sequence's queries) and of [`CascadePlan::new`].
    pub fn new(bounds: &AttendBounds, block_tokens: u32, segments: u32) -> Result<Self> {
        let b = bounds;
        let own = AttendPlan::new(b)?;
        let cascade = CascadePlan::new(CascadeBounds {
            q_heads: b.shape.q_heads,
            head_dim: b.shape.v_dim,
            batch: b.seqs,
            rows: b.q_tokens,
            segments,
            block_tokens,
        })?;
        let of_shared = AttendBounds { seqs: segments, q_len: b.q_tokens, ..*b };
        let shared = AttendPlan::new(&of_shared)?;
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

    /// The launches of a call that plain attention would make with `args`; `segments` is on the
    /// device. Merged are all rows of the bounds, or of the call's sequences where each has as many.
    ///
    /// # Errors
    /// `Unsupported` with a window or ALiBi; those of the plain call; those of
    /// [`CascadePlan::split_launch`] and [`CascadePlan::merge_launch`].
    pub fn launches(
        &self,
        workspace: u64,
        args: &AttendArgs,
        segments: In<CascadeSegment>,
    ) -> Result<CascadeLaunches> {
        if args.window.is_some() || args.slopes != 0 {
            return Err(Error::Unsupported { what: "a window or ALiBi in cascade attention" });
        }
        let (b, ragged) = (&self.bounds, args.q_indptr != 0);
        let rows = if ragged { Some(b.q_tokens) } else { args.seqs.checked_mul(b.q_len) };
        let rows = rows.ok_or(Error::Overflow { what: "query tokens" })?;
        let split = self.cascade.split_launch(
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
        let shared = self.cascade.shared(workspace);
        let shared = AttendArgs {
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
            cleared: (split.1.own_lens.0, u64::from(args.seqs) * 4),
            split,
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
