//! Blocks of a device copied, swapped out and in, and zeroed, by a list that lies on the device:
//! all layers in one launch.

use core::ffi::c_void;

use super::device::{kvc_device, opened};
use super::pointer::{self, Plain, Sized32, aligned, flag};
use super::status::{guard, kvc_status};
use crate::device::{Stream, launch};
use crate::error::Result;
use crate::kernels::params::{CopyParams, In, Out};
use crate::kernels::{copy_launch, zero_launch};

/// Blocks of one pool to blocks of another, or of the same. A pool is one or more planes (an
/// allocation of one layer, or K or V of one layer), each with every block, all alike; in a plane a
/// block is one or more runs of bytes. Blocks that lie in one piece are one plane and one run.
///
/// The other pool may be in page-locked host memory that is mapped into the device's addresses:
/// that is how blocks are swapped out and in. Addresses, strides and runs are multiples of 16
/// bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_device_copy_desc {
    /// sizeof(kvc_device_copy_desc); kvc_device_copy_desc_init sets it.
    pub struct_size: u32,
    /// Entries of the list. They have no order: no block is written twice, and within one pool none
    /// is read that another entry writes.
    pub count: u32,
    /// 1: ids are int64; 0 (the default): int32.
    pub wide_ids: u32,
    /// Planes of a pool. 1 by default.
    pub planes: u32,
    /// Runs that a block has in a plane. 1 by default.
    pub runs: u32,
    /// Bytes of a run.
    pub run_bytes: u32,
    /// Bytes of a token in a run; only with tokens.
    pub token_bytes: u32,
    /// Blocks of the pool that is read.
    pub from_blocks: u32,
    /// Blocks of the pool that is written.
    pub to_blocks: u32,
    /// 1: fill the blocks of the list with zeros; from is ignored. 0 by default.
    pub zero: u32,
    /// `[count][2]` ids, from and to; `[count]` ids with zero. One outside its pool is skipped.
    pub list: *const c_void,
    /// NULL for whole runs, or the tokens of each entry that are copied, from the first of a run.
    pub tokens: *const u32,
    /// Block 0 of plane 0 of the pool that is read.
    pub from: *const c_void,
    /// NULL, or the address of block 0 of each plane; else planes are from_plane_stride apart.
    pub from_planes: *const u64,
    /// Bytes from a plane to the next.
    pub from_plane_stride: i64,
    /// Bytes from a block to the next.
    pub from_block_stride: i64,
    /// Bytes from a run of a block to the next.
    pub from_run_stride: i64,
    /// Block 0 of plane 0 of the pool that is written.
    pub to: *mut c_void,
    /// NULL, or the address of block 0 of each plane; else planes are to_plane_stride apart.
    pub to_planes: *const u64,
    /// Bytes from a plane to the next.
    pub to_plane_stride: i64,
    /// Bytes from a block to the next.
    pub to_block_stride: i64,
    /// Bytes from a run of a block to the next.
    pub to_run_stride: i64,
    /// NULL, or a word that is set to other than 0 where an id is outside its pool.
    pub error_flag: *mut u32,
}

// SAFETY: integers, pointers.
unsafe impl Plain for kvc_device_copy_desc {}
// SAFETY: the first field is the size.
unsafe impl Sized32 for kvc_device_copy_desc {
    const NAME: &'static str = "kvc_device_copy_desc";
    const FIRST_BYTES: usize = size_of::<Self>();
    fn initial() -> Self {
        // SAFETY: every bit pattern is a value of a Plain type.
        let zero: Self = unsafe { core::mem::zeroed() };
        Self { struct_size: size_of::<Self>() as u32, planes: 1, runs: 1, ..zero }
    }
}

impl kvc_device_copy_desc {
    fn params(&self) -> Result<CopyParams> {
        let wide = flag(self.wide_ids, "wide_ids")?;
        Ok(CopyParams {
            from: In::at(aligned(self.from, 16, "from")?),
            to: Out::at(aligned(self.to, 16, "to")?),
            from_planes: In::at(aligned(self.from_planes, 8, "from_planes")?),
            to_planes: In::at(aligned(self.to_planes, 8, "to_planes")?),
            list: In::at(aligned(self.list, if wide { 8 } else { 4 }, "list")?),
            tokens: In::at(aligned(self.tokens, 4, "tokens")?),
            error_flag: Out::at(aligned(self.error_flag, 4, "error_flag")?),
            from_plane: self.from_plane_stride,
            from_block: self.from_block_stride,
            from_run: self.from_run_stride,
            to_plane: self.to_plane_stride,
            to_block: self.to_block_stride,
            to_run: self.to_run_stride,
            count: self.count,
            wide_ids: self.wide_ids,
            planes: self.planes,
            runs: self.runs,
            run_bytes: self.run_bytes,
            token_bytes: self.token_bytes,
            from_blocks: self.from_blocks,
            to_blocks: self.to_blocks,
            slices: 0,
            items: 0,
        })
    }
}

/// Fills a kvc_device_copy_desc of `struct_size` bytes with its defaults.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `desc` is writable for `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_copy_desc_init(
    desc: *mut kvc_device_copy_desc,
    struct_size: u32,
) -> kvc_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { pointer::init(desc, struct_size) })
}

/// Enqueues the copies (or the zeroing) that `desc` describes on `stream` (a CUstream; NULL for the
/// default stream). Every pointer of `desc` is a device address. Can be captured in a CUDA graph and
/// replayed with another list of the same length; entries with an id below 0 are skipped.
///
/// Threads: thread-safe, where calls share no blocks.
///
/// # Safety
/// The module's rules; the addresses are of memory of the device, as long as the sizes and strides
/// say, until the stream has done the work; `stream` is one of the device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_copy(
    device: *const kvc_device,
    desc: *const kvc_device_copy_desc,
    stream: *mut c_void,
) -> kvc_status {
    guard(|| {
        let backend = opened(device)?;
        // SAFETY: the caller's promise.
        let desc = unsafe { pointer::read(desc) }?;
        let mut params = desc.params()?;
        let multiprocessors = backend.0.multiprocessors();
        let plan = if flag(desc.zero, "zero")? {
            zero_launch(&mut params, multiprocessors)
        } else {
            copy_launch(&mut params, multiprocessors)
        }?;
        let Some(plan) = plan else { return Ok(()) };
        // SAFETY: the caller's promise.
        unsafe { launch(&*backend.0, &plan, &params, Stream::from_raw(stream)) }
    })
}
