//! Descs of the attend noun whose pointers are addresses of a device: what the device's kernels take of
//! them. Nothing here is followed.

use super::attend::kvc_attend_desc;
use super::pointer::address;
use crate::cpu::{RowsView, ScaleView};
use crate::error::Result;
use crate::kernels::{AttendArgs, ScaleArgs};

impl kvc_attend_desc {
    /// The call with its pointers as device addresses.
    ///
    /// # Safety
    /// `scales` must be as documented: a struct on the host.
    pub(super) unsafe fn device_args(&self) -> Result<AttendArgs> {
        let shape = self.shape()?;
        // SAFETY: the caller's promise.
        let kv = unsafe { self.kv(&shape) }?;
        let scoring = self.scoring_values()?;
        scoring.check(shape.q_heads)?;
        let (q, out) = self.rows(&shape)?;
        let strides = |rows: &RowsView| [rows.token_stride, rows.head_stride];
        Ok(AttendArgs {
            q: address(self.q),
            q_dtype: q.dtype,
            q_strides: strides(&q),
            out: address(self.out),
            out_dtype: out.dtype,
            out_strides: strides(&out),
            lse: address(self.lse),
            k: address(self.k),
            k_strides: kv.k_strides,
            v: address(self.v),
            v_strides: kv.v_strides,
            scales: ScaleArgs::on_device(&kv.scales),
            block_tokens: self.block_tokens,
            num_blocks: self.num_blocks,
            table: address(self.table),
            table_stride: self.table_stride,
            table_indptr: address(self.table_indptr),
            seqs: self.seqs,
            q_indptr: address(self.q_indptr),
            kv_lens: address(self.kv_lens),
            tail_mask: 0,
            scale: scoring.scale,
            causal: scoring.causal,
            window: scoring.window,
            softcap: scoring.softcap,
            sinks: address(self.sinks),
            slopes: address(self.alibi),
            error_flag: address(self.bad_block),
        })
    }
}

impl ScaleArgs {
    /// Scales whose pointers are device addresses.
    pub(super) fn on_device(scales: &ScaleView) -> Self {
        Self {
            k: address(scales.k),
            v: address(scales.v),
            k_strides: scales.k_strides,
            v_strides: scales.v_strides,
            k_heads: address(scales.k_heads),
            v_heads: address(scales.v_heads),
            k_rotated: scales.k_rotated,
        }
    }
}
