//! Partial results of attention merged on a device: what split a call's keys itself needs it.

use core::ffi::c_void;

use super::device::{kvc_device, opened};
use super::pointer::{self, Plain, Sized32, aligned};
use super::status::{guard, kvc_status};
use crate::device::{Stream, launch};
use crate::error::{Error, Result};
use crate::kernels::merge_launch;
use crate::kernels::params::{In, MergeParams, Out};

/// Attention over `count` disjoint sets of keys, each with its outputs (normalised) and the natural
/// logarithms of its denominators, to be made one. Every pointer is a device address, strides are in
/// elements; rows of parts and out begin at multiples of 16 bytes and of 8 channels.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_device_merge_desc {
    /// sizeof(kvc_device_merge_desc); kvc_device_merge_desc_init sets it.
    pub struct_size: u32,
    /// Parts, at least 1.
    pub count: u32,
    /// Rows (query tokens).
    pub rows: u32,
    /// Query heads of a row.
    pub heads: u32,
    /// Channels of a head, a multiple of 8.
    pub dim: u32,
    /// KVC_DTYPE_* of parts. KVC_DTYPE_F32 by default.
    pub part_dtype: u32,
    /// KVC_DTYPE_* of out. KVC_DTYPE_F32 by default.
    pub out_dtype: u32,
    /// 0.
    pub reserved: u32,
    /// Outputs `[part][row][head][dim]`.
    pub parts: *const c_void,
    /// Elements from a part to the next; of two that were allocated apart the difference of their
    /// addresses. All three 0: contiguous.
    pub part_stride: i64,
    /// Elements from a row to the next.
    pub row_stride: i64,
    /// Elements from a head to the next.
    pub head_stride: i64,
    /// Logarithms `[part][row][head]`, natural. A part that saw no key has -INFINITY, and its outputs
    /// are not read.
    pub lse: *const f32,
    /// Elements from a part to the next. All three 0: contiguous.
    pub lse_part_stride: i64,
    /// Elements from a row to the next.
    pub lse_row_stride: i64,
    /// Elements from a head to the next.
    pub lse_head_stride: i64,
    /// Merged outputs `[row][head][dim]`. Must not overlap parts.
    pub out: *mut c_void,
    /// Elements from a row to the next. Both 0: contiguous.
    pub out_row_stride: i64,
    /// Elements from a head to the next.
    pub out_head_stride: i64,
    /// NULL, or their logarithms `[row][head]`. Must not overlap lse.
    pub out_lse: *mut f32,
    /// Elements from a row to the next. Both 0: contiguous.
    pub out_lse_row_stride: i64,
    /// Elements from a head to the next.
    pub out_lse_head_stride: i64,
    /// NULL, or `[heads]` logits that join the denominators: attention sinks, where no part had them.
    pub sinks: *const f32,
}

// SAFETY: integers, pointers.
unsafe impl Plain for kvc_device_merge_desc {}
// SAFETY: the first field is the size.
unsafe impl Sized32 for kvc_device_merge_desc {
    const NAME: &'static str = "kvc_device_merge_desc";
    const FIRST_BYTES: usize = size_of::<Self>();
    fn initial() -> Self {
        // SAFETY: every bit pattern is a value of a Plain type.
        let zero: Self = unsafe { core::mem::zeroed() };
        let f32_ = crate::dtype::DType::F32.id();
        Self { struct_size: size_of::<Self>() as u32, part_dtype: f32_, out_dtype: f32_, ..zero }
    }
}

impl kvc_device_merge_desc {
    fn params(&self) -> Result<MergeParams> {
        if self.reserved != 0 {
            return Err(Error::invalid("reserved", "must be 0"));
        }
        // Sizes past 63 bits are far past what the kernel takes, and refused with it.
        let (heads, dim) = (i64::from(self.heads), i64::from(self.dim));
        let rows = i64::from(self.rows);
        let lines = rows.saturating_mul(heads);
        let or = |given: [i64; 3], dense: [i64; 3]| if given == [0; 3] { dense } else { given };
        let line = heads.saturating_mul(dim);
        let [part, row, head] = or(
            [self.part_stride, self.row_stride, self.head_stride],
            [lines.saturating_mul(dim), line, dim],
        );
        let [lse_part, lse_row, lse_head] = or(
            [self.lse_part_stride, self.lse_row_stride, self.lse_head_stride],
            [lines, heads, 1],
        );
        let [_, out_row, out_head] =
            or([0, self.out_row_stride, self.out_head_stride], [0, line, dim]);
        let [_, out_lse_row, out_lse_head] =
            or([0, self.out_lse_row_stride, self.out_lse_head_stride], [0, heads, 1]);
        Ok(MergeParams {
            parts: In::at(aligned(self.parts, 16, "parts")?),
            lse: In::at(aligned(self.lse, 4, "lse")?),
            out: Out::at(aligned(self.out, 16, "out")?),
            out_lse: Out::at(aligned(self.out_lse, 4, "out_lse")?),
            sinks: In::at(aligned(self.sinks, 4, "sinks")?),
            part,
            row,
            head,
            lse_part,
            lse_row,
            lse_head,
            out_row,
            out_head,
            out_lse_row,
            out_lse_head,
            count: self.count,
            rows: self.rows,
            heads: self.heads,
            dim: self.dim,
            part_dtype: self.part_dtype,
            out_dtype: self.out_dtype,
        })
    }
}

/// Fills a kvc_device_merge_desc of `struct_size` bytes with its defaults.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `desc` is writable for `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_merge_desc_init(
    desc: *mut kvc_device_merge_desc,
    struct_size: u32,
) -> kvc_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { pointer::init(desc, struct_size) })
}

/// Enqueues the merge that `desc` describes on `stream` (a CUstream; NULL for the default stream).
/// Allocates nothing and waits for nothing: it can be captured in a CUDA graph. kvc_merge_states is
/// the same on the host.
///
/// Threads: thread-safe, where calls share no outputs.
///
/// # Safety
/// The module's rules; the addresses are of memory of the device, as long as the sizes and strides
/// say, until the stream has done the work; `stream` is one of the device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_merge(
    device: *const kvc_device,
    desc: *const kvc_device_merge_desc,
    stream: *mut c_void,
) -> kvc_status {
    guard(|| {
        let backend = opened(device)?;
        // SAFETY: the caller's promise.
        let params = unsafe { pointer::read(desc) }?.params()?;
        let Some(plan) = merge_launch(&params, backend.0.multiprocessors())? else {
            return Ok(());
        };
        // SAFETY: the caller's promise.
        unsafe { launch(&*backend.0, &plan, &params, Stream::from_raw(stream)) }
    })
}
