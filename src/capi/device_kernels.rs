//! The kernels of a device alone, on the caller's own device memory and stream.
//!
//! The same descriptions as for the CPU serve, with device addresses in them; what the host cannot
//! read on a device (the longest sequence) is said beside them. Nothing here allocates, waits or
//! reads device memory, so all of it can be captured in a CUDA graph and replayed with other
//! lengths.

use core::ffi::{c_char, c_void};

use super::append::{KVC_ROPE_HALVES, KVC_ROPE_INTERLEAVED, kvc_append_desc};
use super::attend::kvc_attend_desc;
use super::device::{kvc_device, opened, whole_text};
use super::pointer::{self, Plain, Sized32, address, aligned, flag};
use super::status::{guard, kvc_status};
use crate::device::{Stream, launch, launch_attend};
use crate::dtype::KvFormat;
use crate::error::{Error, Result};
use crate::kernels::params::{AppendParams, In, Out};
use crate::kernels::{
    AttendArgs, AttendBounds, AttendPlan, Pieces, SM90_SHARED_BYTES, ScaleArgs, append_launch,
    append_token_launch, append_token_params, most_workspace_bytes,
};

/// What kvc_device_attend must know beside the call's description.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_device_attend_options {
    /// sizeof(kvc_device_attend_options); kvc_device_attend_options_init sets it.
    pub struct_size: u32,
    /// Most query tokens of one sequence; all have as many where q_indptr is NULL. 1 by default.
    pub max_q_tokens: u32,
    /// Most cached tokens of one sequence.
    pub max_kv_tokens: u32,
    /// 0 (the default): contexts are cut so that the whole device has work. A multiple of 64: in
    /// pieces of so many tokens, and a sequence gets the same bits whatever else is in the batch.
    pub piece_tokens: u32,
    /// Most query tokens of all sequences together; 0 (the default) for seqs times max_q_tokens.
    pub total_q_tokens: u32,
    /// 1: the workspace holds the plan of an earlier call with the same lengths, window, heads and
    /// options (another layer's): it is not made again. 0 by default.
    pub planned: u32,
    /// Multiprocessors to divide the work by; 0 (the default) for those of the device.
    pub multiprocessors: u32,
    /// Bytes of shared memory that a multiprocessor has; 0 (the default) for those of the device, or
    /// of an H100 where there is no device.
    pub multiprocessor_shared_bytes: u32,
    /// NULL, or `[query token]` on the device: which tokens of its sequence's tail (its last tokens,
    /// those of its query tokens) a query token sees, bit j for the j-th. All tokens before the tail
    /// are seen, and causal means nothing. For a tree of drafts, the bits of a path, its own
    /// included. Up to 8 query tokens a sequence.
    pub tail_mask: *const u32,
}

// SAFETY: integers, a pointer.
unsafe impl Plain for kvc_device_attend_options {}
// SAFETY: the first field is the size.
unsafe impl Sized32 for kvc_device_attend_options {
    const NAME: &'static str = "kvc_device_attend_options";
    const FIRST_BYTES: usize = size_of::<Self>();
    fn initial() -> Self {
        Self {
            struct_size: size_of::<Self>() as u32,
            max_q_tokens: 1,
            max_kv_tokens: 0,
            piece_tokens: 0,
            total_q_tokens: 0,
            planned: 0,
            multiprocessors: 0,
            multiprocessor_shared_bytes: 0,
            tail_mask: core::ptr::null(),
        }
    }
}

/// What kvc_device_append can do beside the call's description: rotate, and write rotated queries.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_device_append_options {
    /// sizeof(kvc_device_append_options); kvc_device_append_options_init sets it.
    pub struct_size: u32,
    /// KVC_ROPE_HALVES (the default) or KVC_ROPE_INTERLEAVED.
    pub rope_style: u32,
    /// Channels that are rotated, even; 0 for no rotation.
    pub rotary_dim: u32,
    /// The first of them, a multiple of 8.
    pub first_channel: u32,
    /// Rows of cosines and sines: positions from 0 on.
    pub table_positions: u32,
    /// Query heads; 0 without q.
    pub q_heads: u32,
    /// `[table_positions][rotary_dim / 2]` cosines, any scale included.
    pub cosines: *const f32,
    /// Sines of the same shape.
    pub sines: *const f32,
    /// NULL, or queries `[row][q_head][k_dim]` of the description's dtype, to be rotated.
    pub q: *const c_void,
    /// Elements from a row to the next. Both 0: contiguous.
    pub q_token_stride: i64,
    /// Elements from a head to the next.
    pub q_head_stride: i64,
    /// Where rotated queries are written; must not overlap q.
    pub q_out: *mut c_void,
    /// Elements from a row to the next. Both 0: contiguous.
    pub q_out_token_stride: i64,
    /// Elements from a head to the next.
    pub q_out_head_stride: i64,
    /// NULL, or a word in which bit 0 is set where a slot is past the blocks, and bit 1 where a
    /// position is past the tables; such rows are skipped.
    pub error_flag: *mut u32,
}

// SAFETY: integers, pointers.
unsafe impl Plain for kvc_device_append_options {}
// SAFETY: the first field is the size.
unsafe impl Sized32 for kvc_device_append_options {
    const NAME: &'static str = "kvc_device_append_options";
    const FIRST_BYTES: usize = size_of::<Self>();
    fn initial() -> Self {
        // SAFETY: every bit pattern is a value of a Plain type.
        let zero: Self = unsafe { core::mem::zeroed() };
        Self { struct_size: size_of::<Self>() as u32, rope_style: KVC_ROPE_HALVES, ..zero }
    }
}

/// The options of a call, and its maxima.
///
/// # Safety
/// As for [`pointer::read`] of the options.
pub(super) unsafe fn bounds(
    device: *const kvc_device,
    desc: &kvc_attend_desc,
    options: *const kvc_device_attend_options,
) -> Result<(AttendBounds, kvc_device_attend_options)> {
    let options = if options.is_null() {
        kvc_device_attend_options::initial()
    } else {
        // SAFETY: the caller's promise.
        unsafe { pointer::read(options) }?
    };
    let (multiprocessors, shared) =
        match (options.multiprocessors, options.multiprocessor_shared_bytes) {
            (0, 0) => {
                let device = opened(device)?;
                (device.0.multiprocessors(), device.0.multiprocessor_shared_bytes())
            }
            (0, shared) => (opened(device)?.0.multiprocessors(), shared),
            (given, 0) if device.is_null() => (given, SM90_SHARED_BYTES),
            (given, 0) => (given, opened(device)?.0.multiprocessor_shared_bytes()),
            given => given,
        };
    let bounds = AttendBounds {
        shape: desc.shape()?,
        format: desc.cache()?,
        seqs: desc.seqs,
        q_len: options.max_q_tokens,
        q_tokens: match options.total_q_tokens {
            0 => desc.seqs.saturating_mul(options.max_q_tokens),
            total => total,
        },
        kv_len: options.max_kv_tokens,
        pieces: match options.piece_tokens {
            0 => Pieces::Balanced,
            tokens => Pieces::Fixed(tokens),
        },
        multiprocessors,
        multiprocessor_shared_bytes: shared,
    };
    Ok((bounds, options))
}

/// The plan of a call.
///
/// # Safety
/// As for [`bounds`].
unsafe fn plan(
    device: *const kvc_device,
    desc: &kvc_attend_desc,
    options: *const kvc_device_attend_options,
) -> Result<(AttendPlan, kvc_device_attend_options)> {
    // SAFETY: the caller's promise.
    let (bounds, options) = unsafe { bounds(device, desc, options) }?;
    Ok((AttendPlan::new(&bounds)?, options))
}

/// The address of the workspace of `desc`, which is as long as is needed.
pub(super) fn workspace(desc: &kvc_attend_desc, needed: u64) -> Result<u64> {
    if desc.workspace_bytes < needed {
        return Err(Error::BufferTooSmall { what: "workspace", needed });
    }
    if needed != 0 && desc.workspace.is_null() {
        return Err(Error::NullPointer { what: "workspace" });
    }
    aligned(desc.workspace, 256, "workspace")
}

/// Fills a kvc_device_attend_options of `struct_size` bytes with its defaults.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `options` is writable for `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_attend_options_init(
    options: *mut kvc_device_attend_options,
    struct_size: u32,
) -> kvc_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { pointer::init(options, struct_size) })
}

/// Writes an upper bound of the workspace of kvc_device_attend to `out_bytes`, for every call with
/// the heads, dimensions and format of `desc`, at most `desc->seqs` sequences, and at most the maxima
/// of `options`, which may be NULL for its defaults. No pointer of `desc` is followed. `device` may be
/// NULL where the options say how many multiprocessors it has.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out_bytes` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_attend_workspace_size(
    device: *const kvc_device,
    desc: *const kvc_attend_desc,
    options: *const kvc_device_attend_options,
    out_bytes: *mut u64,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let (desc, out) = unsafe { (pointer::read(desc)?, pointer::out(out_bytes, "out_bytes")?) };
        // SAFETY: the caller's promise.
        let (bounds, _) = unsafe { bounds(device, &desc, options) }?;
        out.write(most_workspace_bytes(&bounds)?);
        Ok(())
    })
}

/// Writes the name of the kernel that kvc_device_attend would run to `buf`, with a NUL. `len` is the
/// size of `buf`; KVC_ERR_BUFFER_TOO_SMALL where the name does not fit (64 bytes are enough),
/// KVC_ERR_UNSUPPORTED where there is no kernel. No pointer of `desc` is followed; `device` as for
/// kvc_device_attend_workspace_size.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `buf` is writable for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_attend_kernel(
    device: *const kvc_device,
    desc: *const kvc_attend_desc,
    options: *const kvc_device_attend_options,
    buf: *mut c_char,
    len: u64,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let desc = unsafe { pointer::read(desc) }?;
        // SAFETY: the caller's promise.
        let (plan, _) = unsafe { plan(device, &desc, options) }?;
        // SAFETY: the caller's promise.
        unsafe { whole_text(plan.kernel()?.name, buf, len) }
    })
}

/// Enqueues attention for the batch that `desc` describes on `stream` (a CUstream; NULL for the
/// default stream). Every pointer of `desc` is a device address: rows of Q, K, V and out begin at
/// multiples of 16 bytes, the workspace at one of 256. `q_indptr` may be NULL where all sequences
/// have max_q_tokens query tokens, 8 at most; `threads` is ignored. `bad_block`, if given, is set to other than
/// 0 where a table has an entry that is not a block: such keys are masked and never read.
///
/// Heads have 64, 80, 96, 128, 192 or 256 channels, of which a default build for GPUs has 64, 128 and
/// 256. fp8, int8_t, int4_t and nvfp4 are read as stored: products are of f16 then. `scales` itself is
/// on the host, the addresses in it are the device's. More than 8 query tokens a sequence turn keys and
/// values into f16, which ends at 65504.
///
/// Latents (v_in_k) have 576 channels, 512 of them values, in f16, bf16, fp8, int8_t or int4_t, up to 128
/// query heads, and at most 8 query tokens a sequence.
///
/// Threads: thread-safe, where calls share no outputs and no workspace.
///
/// # Safety
/// The module's rules; the addresses are of memory of the device, as long as kvc_attend says, until
/// the stream has done the work; `stream` is one of the device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_attend(
    device: *const kvc_device,
    desc: *const kvc_attend_desc,
    options: *const kvc_device_attend_options,
    stream: *mut c_void,
) -> kvc_status {
    guard(|| {
        let backend = opened(device)?;
        // SAFETY: the caller's promise, here and below.
        let desc = unsafe { pointer::read(desc) }?;
        // SAFETY: see above.
        let (plan, options) = unsafe { plan(device, &desc, options) }?;
        let planned = flag(options.planned, "planned")?;
        // SAFETY: see above.
        let args = unsafe { desc.device_args() }?;
        let args = AttendArgs { tail_mask: address(options.tail_mask), ..args };
        let workspace = workspace(&desc, plan.workspace_bytes())?;
        // Everything is checked before anything is enqueued.
        let first = plan.plan_launch(workspace, &args)?;
        let (second, params) = plan.attend_launch(workspace, &args)?;
        // SAFETY: see above.
        unsafe {
            let stream = Stream::from_raw(stream);
            if let Some((first, params)) = first.filter(|_| !planned) {
                launch(&*backend.0, &first, &params, stream)?;
            }
            launch_attend(&*backend.0, &second, &params, stream)
        }
    })
}

/// Fills a kvc_device_append_options of `struct_size` bytes with its defaults.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `options` is writable for `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_append_options_init(
    options: *mut kvc_device_append_options,
    struct_size: u32,
) -> kvc_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { pointer::init(options, struct_size) })
}

/// Enqueues the writing of new keys and values to their slots on `stream` (a CUstream; NULL for the
/// default stream). Every pointer of `desc` is a device address, rows begin at multiples of 16
/// bytes, and `rope` is NULL: keys, and queries if given, are rotated by the tables of `options`,
/// which may be NULL for none, to the positions of `desc`. A row with slot -1 stores nothing; its queries
/// are rotated and written all the same. Slots past the blocks are skipped, and
/// raise the error flag; so do rows that a quantised format cannot hold (bit 5), and are not written.
/// `scales` itself is on the host, the addresses in it are the device's.
///
/// Threads: thread-safe, where calls share no slots.
///
/// # Safety
/// The module's rules; the addresses are of memory of the device, as long as kvc_append says, until
/// the stream has done the work; `stream` is one of the device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_append(
    device: *const kvc_device,
    desc: *const kvc_append_desc,
    options: *const kvc_device_append_options,
    stream: *mut c_void,
) -> kvc_status {
    guard(|| {
        let backend = opened(device)?;
        // SAFETY: the caller's promise, here and below.
        let desc = unsafe { pointer::read(desc) }?;
        let options = if options.is_null() {
            kvc_device_append_options::initial()
        } else {
            // SAFETY: see above.
            unsafe { pointer::read(options) }?
        };
        // SAFETY: see above.
        let (mut params, format, scales) = unsafe { append_params(&desc, &options) }?;
        if !format.is_float() {
            let mut params = append_token_params(params, format, &scales);
            let Some(plan) = append_token_launch(&mut params)? else { return Ok(()) };
            // SAFETY: see above.
            return unsafe { launch(&*backend.0, &plan, &params, Stream::from_raw(stream)) };
        }
        let Some(plan) = append_launch(&mut params)? else { return Ok(()) };
        // SAFETY: see above.
        unsafe { launch(&*backend.0, &plan, &params, Stream::from_raw(stream)) }
    })
}

/// # Safety
/// `desc.scales` must be as documented: a struct on the host.
unsafe fn append_params(
    desc: &kvc_append_desc,
    options: &kvc_device_append_options,
) -> Result<(AppendParams, KvFormat, ScaleArgs)> {
    if !desc.rope.is_null() {
        return Err(Error::invalid("rope", "must be NULL on a device: options have the tables"));
    }
    // SAFETY: the caller's promise.
    let args = unsafe { desc.args() }?;
    let v_in_k = args.shape.v_in_k;
    let rotates = options.rotary_dim != 0;
    let interleaved = match options.rope_style {
        KVC_ROPE_HALVES => 0,
        KVC_ROPE_INTERLEAVED => 1,
        _ => return Err(Error::invalid("rope_style", "must be 1 (halves) or 2 (interleaved)")),
    };
    let q_strides = |token: i64, head: i64| {
        if (token, head) == (0, 0) {
            let dim = i64::from(desc.k_dim);
            (i64::from(options.q_heads) * dim, dim)
        } else {
            (token, head)
        }
    };
    let (q_token, q_head) = q_strides(options.q_token_stride, options.q_head_stride);
    let (q_out_token, q_out_head) =
        q_strides(options.q_out_token_stride, options.q_out_head_stride);
    let needed = [
        ("k", address(desc.k), true),
        ("k_rows", address(desc.k_rows), true),
        ("v", address(desc.v), !v_in_k),
        ("v_rows", address(desc.v_rows), !v_in_k),
        ("slots", address(desc.slots), true),
        ("cosines", address(options.cosines), rotates),
        ("sines", address(options.sines), rotates),
        ("positions", address(desc.positions), rotates),
        ("q", address(options.q), options.q_heads != 0),
        ("q_out", address(options.q_out), options.q_heads != 0),
    ];
    for (what, at, wanted) in needed {
        if wanted && at == 0 && desc.rows != 0 {
            return Err(Error::NullPointer { what });
        }
    }
    let words = [
        ("slots", address(desc.slots), 8),
        ("positions", address(desc.positions), 4),
        ("cosines", address(options.cosines), 4),
        ("sines", address(options.sines), 4),
        ("error_flag", address(options.error_flag), 4),
    ];
    for (what, at, align) in words {
        if !at.is_multiple_of(u64::from(align)) {
            return Err(Error::Misaligned { what, align_bytes: align });
        }
    }
    if desc.num_blocks > i32::MAX as u32 {
        return Err(Error::invalid("num_blocks", "must be below 2^31"));
    }
    let (k, v) = (args.kv.k_strides, args.kv.v_strides);
    let v_dim = if v_in_k { 0 } else { desc.v_dim };
    let scales = ScaleArgs::on_device(&args.kv.scales);
    let params = AppendParams {
        k: In::at(address(desc.k_rows)),
        v: In::at(if v_in_k { 0 } else { address(desc.v_rows) }),
        q: In::at(if options.q_heads == 0 { 0 } else { address(options.q) }),
        q_out: Out::at(address(options.q_out)),
        k_cache: Out::at(address(desc.k)),
        v_cache: Out::at(if v_in_k { 0 } else { address(desc.v) }),
        slots: In::at(address(desc.slots)),
        positions: In::at(address(desc.positions)),
        cosines: In::at(if rotates { address(options.cosines) } else { 0 }),
        sines: In::at(if rotates { address(options.sines) } else { 0 }),
        error_flag: Out::at(address(options.error_flag)),
        k_token: args.k.token_stride,
        k_head: args.k.head_stride,
        v_token: if v_in_k { 0 } else { args.v.token_stride },
        v_head: if v_in_k { 0 } else { args.v.head_stride },
        q_token,
        q_head,
        q_out_token,
        q_out_head,
        k_cache_block: k.block,
        k_cache_head: k.head,
        k_cache_token: k.token,
        v_cache_block: v.block,
        v_cache_head: v.head,
        v_cache_token: v.token,
        tokens: desc.rows,
        tokens_per_block: 0,
        q_heads: options.q_heads,
        kv_heads: desc.kv_heads,
        k_dim: desc.k_dim,
        v_dim,
        block_tokens: desc.block_tokens,
        num_blocks: desc.num_blocks,
        rope_first: options.first_channel,
        rope_dim: options.rotary_dim,
        rope_positions: options.table_positions,
        rope_interleaved: interleaved,
        row_dtype: args.k.dtype.id(),
        cache_dtype: args.kv.format.dtype().id(),
    };
    Ok((params, args.kv.format, scales))
}
