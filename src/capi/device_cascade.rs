//! Cascade attention on a device: whether it pays, and the call. The arguments are those of
//! kvc_device_attend, and a list of which sequences share what.

use core::ffi::c_void;

use super::attend::kvc_attend_desc;
use super::device::{kvc_device, opened};
use super::device_kernels::{bounds, kvc_device_attend_options, workspace};
use super::pointer::{self, Plain, Sized32, address, aligned, flag};
use super::status::{guard, kvc_status};
use crate::device::{Stream, launch, launch_attend};
use crate::error::{Error, Result};
use crate::kernels::params::{CascadeSegment, In};
use crate::kernels::{
    AttendArgs, CascadeAttendPlan, CascadeShape, DeviceRates, SharedPrefix, cascade_choice,
};

/// Neighbouring sequences of a batch that share a prefix, or none of whose prefixes is used. This
/// struct never grows.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_device_cascade_segment {
    /// The first sequence.
    pub first_seq: u32,
    /// How many; 0 in an entry that only fills the list up, whose first_seq is the batch.
    pub seqs: u32,
    /// Blocks at the start of their tables that all of them share; 0 for none.
    pub shared_blocks: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: integers.
unsafe impl Plain for kvc_device_cascade_segment {}

/// Neighbouring sequences whose tables begin with the same blocks. This struct never grows.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_device_cascade_prefix {
    /// The first sequence.
    pub first_seq: u32,
    /// How many.
    pub seqs: u32,
    /// Blocks that all of them begin with, whole ones before every query.
    pub blocks: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: integers.
unsafe impl Plain for kvc_device_cascade_prefix {}

/// One layer's attention, and what the device does in a microsecond: what the cost model of
/// kvc_device_cascade_choose goes by, from memory_bytes to multiprocessors as kvc_device_rates has
/// it. Nothing but q_tokens has a default.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_device_cascade_query {
    /// sizeof(kvc_device_cascade_query); kvc_device_cascade_query_init sets it.
    pub struct_size: u32,
    /// Query heads, a multiple of kv_heads.
    pub q_heads: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Channels of a head.
    pub head_dim: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Bytes of one token's keys and values of all KV heads in a layer.
    pub token_bytes: u32,
    /// Query tokens of a sequence. 1 by default.
    pub q_tokens: u32,
    /// Sequences.
    pub seqs: u32,
    /// Cached tokens of all sequences together, shared ones counted in each; an estimate will do.
    pub kv_tokens: u64,
    /// Bytes from memory in a microsecond.
    pub memory_bytes: f64,
    /// Bytes from the second-level cache in a microsecond.
    pub cache_bytes: f64,
    /// Size of that cache, in bytes.
    pub cache_size: u64,
    /// Operations (two a multiplication and addition) of the prefill kernel in a microsecond.
    pub operations: f64,
    /// Microseconds from one launch's end to the next one's work.
    pub launch: f64,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: integers, floats.
unsafe impl Plain for kvc_device_cascade_query {}
// SAFETY: the first field is the size.
unsafe impl Sized32 for kvc_device_cascade_query {
    const NAME: &'static str = "kvc_device_cascade_query";
    const FIRST_BYTES: usize = size_of::<Self>();
    fn initial() -> Self {
        // SAFETY: every bit pattern is a value of a Plain type.
        let zero: Self = unsafe { core::mem::zeroed() };
        Self { struct_size: size_of::<Self>() as u32, q_tokens: 1, ..zero }
    }
}

/// What the cost model says of a batch, for one layer.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_device_cascade_estimate {
    /// 1: a cascade is faster, by a margin.
    pub pays: u32,
    /// 0.
    pub reserved: u32,
    /// Microseconds of kvc_device_attend, by the model.
    pub plain: f64,
    /// Microseconds of kvc_device_cascade, by the model.
    pub cascade: f64,
}

// SAFETY: integers, floats.
unsafe impl Plain for kvc_device_cascade_estimate {}

/// Fills a kvc_device_cascade_query of `struct_size` bytes with its defaults.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `query` is writable for `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_cascade_query_init(
    query: *mut kvc_device_cascade_query,
    struct_size: u32,
) -> kvc_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { pointer::init(query, struct_size) })
}

/// Chooses among `prefixes[prefix_count]`, in order and apart, those that a cascade should split off,
/// by a model of what it saves (a prefix that several sequences share is read once) and what it costs
/// (launches, partial results, arithmetic that may not fill the device). The model is no measurement,
/// and leans towards plain attention. All of it is host memory; no device is needed.
///
/// `out_segments[segment_count]` (at least 1) receives the list that kvc_device_cascade takes on the
/// device, filled up to its length; where a cascade does not pay it splits nothing off, so a captured
/// graph can be replayed with it. What was weighed goes to `out`, `out_bytes` (its sizeof) at most.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; inputs are readable and outputs writable to their sizes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_cascade_choose(
    query: *const kvc_device_cascade_query,
    prefixes: *const kvc_device_cascade_prefix,
    prefix_count: u32,
    out_segments: *mut kvc_device_cascade_segment,
    segment_count: u32,
    out: *mut kvc_device_cascade_estimate,
    out_bytes: u64,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let (q, prefixes, segments) = unsafe {
            (
                pointer::read(query)?,
                pointer::slice(prefixes, prefix_count.into(), "prefixes")?,
                pointer::slice_out(out_segments, segment_count.into(), "out_segments")?,
            )
        };
        if q.reserved != 0 || prefixes.iter().any(|prefix| prefix.reserved != 0) {
            return Err(Error::invalid("reserved", "must be 0"));
        }
        let shape = CascadeShape {
            q_heads: q.q_heads,
            kv_heads: q.kv_heads,
            head_dim: q.head_dim,
            block_tokens: q.block_tokens,
            token_bytes: q.token_bytes,
            q_len: q.q_tokens,
            batch: q.seqs,
            tokens: q.kv_tokens,
        };
        let rates = DeviceRates {
            memory_bytes: q.memory_bytes,
            cache_bytes: q.cache_bytes,
            cache_size: q.cache_size,
            operations: q.operations,
            launch: q.launch,
            multiprocessors: q.multiprocessors,
        };
        let mut shared = alloc::vec::Vec::new();
        let refused = Error::OutOfMemory { bytes: size_of_val(prefixes) as u64 };
        shared.try_reserve_exact(prefixes.len()).map_err(|_| refused)?;
        shared.extend(prefixes.iter().map(|prefix| SharedPrefix {
            first_seq: prefix.first_seq,
            seqs: prefix.seqs,
            blocks: prefix.blocks,
        }));
        let choice = cascade_choice(&shape, &rates, &shared, segment_count)?;
        let estimate = kvc_device_cascade_estimate {
            pays: u32::from(!choice.segments.is_empty()),
            reserved: 0,
            plain: choice.estimate.plain,
            cascade: choice.estimate.cascade,
        };
        // SAFETY: the caller's promise.
        unsafe { pointer::write(out, out_bytes, estimate, "out", 24) }?;
        let none = |first_seq, seqs| CascadeSegment { first_seq, seqs, ..Default::default() };
        for (i, to) in segments.iter_mut().enumerate() {
            let all = if i == 0 { none(0, q.seqs) } else { none(q.seqs, 0) };
            let from = choice.segments.get(i).unwrap_or(&all);
            *to = kvc_device_cascade_segment {
                first_seq: from.first_seq,
                seqs: from.seqs,
                shared_blocks: from.shared_blocks,
                reserved: 0,
            };
        }
        Ok(())
    })
}

/// The plan of a call, and its options.
///
/// # Safety
/// As for [`bounds`].
unsafe fn plan(
    device: *const kvc_device,
    desc: &kvc_attend_desc,
    options: *const kvc_device_attend_options,
    segment_count: u32,
) -> Result<(CascadeAttendPlan, kvc_device_attend_options)> {
    // SAFETY: the caller's promise.
    let (bounds, options) = unsafe { bounds(device, desc, options) }?;
    Ok((CascadeAttendPlan::new(&bounds, desc.block_tokens, segment_count, 1)?, options))
}

/// Writes an upper bound of the workspace of kvc_device_cascade to `out_bytes`, as
/// kvc_device_attend_workspace_size does for plain attention; `segment_count` is the length of the
/// list. KVC_ERR_UNSUPPORTED where a half has no kernel.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out_bytes` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_cascade_workspace_size(
    device: *const kvc_device,
    desc: *const kvc_attend_desc,
    options: *const kvc_device_attend_options,
    segment_count: u32,
    out_bytes: *mut u64,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let (desc, out) = unsafe { (pointer::read(desc)?, pointer::out(out_bytes, "out_bytes")?) };
        // SAFETY: the caller's promise.
        let (plan, _) = unsafe { plan(device, &desc, options, segment_count) }?;
        out.write(plan.workspace_bytes());
        Ok(())
    })
}

/// Enqueues what kvc_device_attend computes, on `stream` (a CUstream; NULL for the default stream),
/// as a cascade: the prefix that the sequences of a segment share is attended once for the queries of
/// all of them, then what follows it in each, and the two are merged. `segments` is a device address,
/// of a list as kvc_device_cascade_choose writes it, which covers the sequences in order: what it
/// leaves out has outputs without meaning. No claim is trusted: a prefix is used as far as the tables
/// agree and before every query, and bit 3 of `bad_block` is set where that is less than its segment
/// says. With q_indptr, total_q_tokens rows of out and lse are written; those past the last sequence's
/// mean nothing.
///
/// Allocates nothing and waits for nothing, so it can be captured in a CUDA graph and replayed with
/// other lengths and another list of the same length. KVC_ERR_UNSUPPORTED with a window or ALiBi.
///
/// Threads: thread-safe, where calls share no outputs and no workspace.
///
/// # Safety
/// As for kvc_device_attend; `segments` has `segment_count` entries on the device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_cascade(
    device: *const kvc_device,
    desc: *const kvc_attend_desc,
    options: *const kvc_device_attend_options,
    segments: *const kvc_device_cascade_segment,
    segment_count: u32,
    stream: *mut c_void,
) -> kvc_status {
    guard(|| {
        let backend = opened(device)?;
        // SAFETY: the caller's promise, here and below.
        let desc = unsafe { pointer::read(desc) }?;
        // SAFETY: see above.
        let (plan, options) = unsafe { plan(device, &desc, options, segment_count) }?;
        let planned = flag(options.planned, "planned")?;
        // SAFETY: see above.
        let args = unsafe { desc.device_args() }?;
        let args = AttendArgs { tail_mask: address(options.tail_mask), ..args };
        let workspace = workspace(&desc, plan.workspace_bytes())?;
        let segments = In::at(aligned(segments, 4, "segments")?);
        // Everything is checked before anything is enqueued.
        let split = plan.split(workspace, &args, segments)?;
        let calls = plan.launches(workspace, &args)?;
        let backend = &*backend.0;
        // SAFETY: see above.
        unsafe {
            let stream = Stream::from_raw(stream);
            if !planned {
                let (lens, bytes) = split.cleared;
                backend.zero(lens, bytes, stream)?;
                launch(backend, &split.launch.0, &split.launch.1, stream)?;
                for (first, params) in calls.plans.iter().flatten() {
                    launch(backend, first, params, stream)?;
                }
            }
            for (half, params) in &calls.halves {
                launch_attend(backend, half, params, stream)?;
            }
            if let Some((merge, params)) = &calls.merge {
                launch(backend, merge, params, stream)?;
            }
        }
        Ok(())
    })
}
