//! The plan noun: the memory planner. Also the description of layer groups that caches share.

use super::pointer::{self, Plain, Sized32, flag};
use super::status::{guard, kvc_status};
use crate::dtype::KvFormat;
use crate::error::{Error, Result};
use crate::layout::{CacheSpec, GroupSpec, MAX_GROUPS};
use crate::plan::{Budget, Workload, plan};

/// Layers of a model that share a geometry, a format and a window. A uniform model has one group.
/// In an array all must have the same struct_size, which is the distance from one to the next.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_group_spec {
    /// sizeof(kvc_group_spec); kvc_group_spec_init sets it.
    pub struct_size: u32,
    /// Layers in the group.
    pub layers: u32,
    /// KV heads of each layer: 1 for multi-query and latent attention.
    pub kv_heads: u32,
    /// Channels of a key row: a multiple of 8, to 256 (576 with v_in_k).
    pub k_dim: u32,
    /// Channels of a value row: a multiple of 8.
    pub v_dim: u32,
    /// 1: values are the first v_dim channels of the keys and not stored (latent attention: k_dim
    /// 576, v_dim 512 in DeepSeek-V3).
    pub v_in_k: u32,
    /// KVC_FORMAT_* of K and V; KVC_FORMAT_BF16 by default.
    pub format: u32,
    /// Sliding window in tokens, the query's own included; 0 for full attention.
    pub window: u32,
    /// Of sealed tiles, the first tokens of every sequence that stay raw in bf16: a multiple of the
    /// tokens of a block, 0 (none) by default.
    pub sink_tokens: u32,
}

// SAFETY: integers.
unsafe impl Plain for kvc_group_spec {}
// SAFETY: the first field is the size.
unsafe impl Sized32 for kvc_group_spec {
    const NAME: &'static str = "kvc_group_spec";
    const FIRST_BYTES: usize = 32;
    fn initial() -> Self {
        Self {
            struct_size: size_of::<Self>() as u32,
            layers: 0,
            kv_heads: 0,
            k_dim: 0,
            v_dim: 0,
            v_in_k: 0,
            format: KvFormat::Bf16.id(),
            window: 0,
            sink_tokens: 0,
        }
    }
}

/// What to plan for.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_plan_options {
    /// sizeof(kvc_plan_options); kvc_plan_options_init sets it.
    pub struct_size: u32,
    /// Tokens of a block: a power of two, 16 to 256. 16 by default.
    pub block_tokens: u32,
    /// Share of memory_bytes left to activations and the run time, in millionths. 100000 (a
    /// tenth) by default.
    pub reserve_ppm: u32,
    /// 0.
    pub reserved: u32,
    /// Memory of the device.
    pub memory_bytes: u64,
    /// What the model's weights take of it.
    pub weight_bytes: u64,
    /// Tokens of each sequence, prompt and answer together.
    pub context_tokens: u64,
    /// Sequences at the same time. 1 by default.
    pub batch: u64,
}

// SAFETY: integers.
unsafe impl Plain for kvc_plan_options {}
// SAFETY: the first field is the size.
unsafe impl Sized32 for kvc_plan_options {
    const NAME: &'static str = "kvc_plan_options";
    const FIRST_BYTES: usize = size_of::<Self>();
    fn initial() -> Self {
        Self {
            struct_size: size_of::<Self>() as u32,
            block_tokens: 16,
            reserve_ppm: 100_000,
            reserved: 0,
            memory_bytes: 0,
            weight_bytes: 0,
            context_tokens: 0,
            batch: 1,
        }
    }
}

/// What a budget holds.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_plan_result {
    /// Bytes left for keys and values.
    pub kv_bytes: u64,
    /// Bytes that one more token takes, all groups, while no window is full.
    pub token_bytes: u64,
    /// Bytes of one sequence of the context, in whole blocks.
    pub sequence_bytes: u64,
    /// Bytes of the whole batch at the context.
    pub batch_bytes: u64,
    /// The most sequences of the context that fit; 0 where one is too long.
    pub max_batch: u64,
    /// The longest context at which the batch fits; UINT64_MAX where every layer has a window and
    /// any length does.
    pub max_context_tokens: u64,
    /// 1 where batch_bytes fits in kv_bytes.
    pub fits: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: integers.
unsafe impl Plain for kvc_plan_result {}

/// One layer group's part of a plan. This struct never grows.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_plan_group {
    /// Bytes that a token takes in the group while it is held.
    pub token_bytes: u64,
    /// Bytes of one block.
    pub block_bytes: u64,
    /// Blocks that one sequence of the context holds.
    pub sequence_blocks: u64,
    /// Blocks of the group's pool where the budget is split as sequences of the context need it.
    pub blocks: u64,
}

// SAFETY: integers.
unsafe impl Plain for kvc_plan_group {}

/// The spec that an array of groups describes.
///
/// # Safety
/// As for [`pointer::read_array`].
pub(super) unsafe fn read_spec(
    block_tokens: u32,
    groups: *const kvc_group_spec,
    count: u32,
) -> Result<CacheSpec> {
    if count == 0 || count as usize > MAX_GROUPS {
        return Err(Error::invalid("group_count", "must be 1 to 16"));
    }
    // SAFETY: the caller's promise.
    let groups = unsafe { pointer::read_array(groups, count) }?
        .map(|group| {
            let group = group?;
            Ok(GroupSpec {
                layers: group.layers,
                kv_heads: group.kv_heads,
                k_dim: group.k_dim,
                v_dim: group.v_dim,
                v_in_k: flag(group.v_in_k, "v_in_k")?,
                format: KvFormat::from_id(group.format)?,
                window: (group.window != 0).then_some(group.window),
                sink_tokens: group.sink_tokens,
            })
        })
        .collect::<Result<_>>()?;
    Ok(CacheSpec { block_tokens, groups })
}

/// Fills a kvc_group_spec of `struct_size` bytes with its defaults.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `spec` is writable for `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_group_spec_init(
    spec: *mut kvc_group_spec,
    struct_size: u32,
) -> kvc_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { pointer::init(spec, struct_size) })
}

/// Fills a kvc_plan_options of `struct_size` bytes with its defaults.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `options` is writable for `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_plan_options_init(
    options: *mut kvc_plan_options,
    struct_size: u32,
) -> kvc_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { pointer::init(options, struct_size) })
}

/// Plans a cache of `groups[group_count]` (1 to 16) in the memory that `options` give. Writes the
/// totals to `out`, `out_bytes` (its sizeof) at most, and each group's part to
/// `out_groups[group_count]`, which may be NULL. A workload that does not fit is no error: see
/// `fits`. KVC_ERR_OVERFLOW where a size leaves 64 bits.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; outputs are writable to their sizes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_plan_compute(
    options: *const kvc_plan_options,
    groups: *const kvc_group_spec,
    group_count: u32,
    out: *mut kvc_plan_result,
    out_bytes: u64,
    out_groups: *mut kvc_plan_group,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let options = unsafe { pointer::read(options) }?;
        if options.reserved != 0 {
            return Err(Error::invalid("reserved", "must be 0"));
        }
        // SAFETY: the caller's promise.
        let spec = unsafe { read_spec(options.block_tokens, groups, group_count) }?;
        let group_slots = if out_groups.is_null() {
            None
        } else {
            // SAFETY: the caller's promise.
            Some(unsafe { pointer::slice_out(out_groups, u64::from(group_count), "out_groups") }?)
        };
        let kvc_plan_options { memory_bytes, weight_bytes, reserve_ppm, .. } = options;
        let budget = Budget { memory_bytes, weight_bytes, reserve_ppm };
        let workload = Workload { context_tokens: options.context_tokens, batch: options.batch };
        let plan = plan(&spec, &budget, &workload)?;
        let result = kvc_plan_result {
            kv_bytes: plan.kv_bytes,
            token_bytes: plan.token_bytes,
            sequence_bytes: plan.sequence_bytes,
            batch_bytes: plan.batch_bytes,
            max_batch: plan.max_batch,
            max_context_tokens: plan.max_context_tokens.unwrap_or(u64::MAX),
            fits: u32::from(plan.fits),
            reserved: 0,
        };
        // SAFETY: the caller's promise.
        unsafe { pointer::write(out, out_bytes, result, "out", 56) }?;
        for (slot, group) in group_slots.into_iter().flatten().zip(&plan.groups) {
            *slot = kvc_plan_group {
                token_bytes: group.token_bytes,
                block_bytes: group.block_bytes,
                sequence_blocks: group.sequence_blocks,
                blocks: group.blocks,
            };
        }
        Ok(())
    })
}
