//! The memory planner: from a model's geometry and a memory budget to blocks, tokens, sequences.
//!
//! Pure arithmetic over [`CacheSpec`] and the layouts it makes; every result is exact, and what
//! does not fit in 64 bits is an error, never a wrapped number. It allocates no cache and knows
//! nothing of pools, devices or weights beyond their size.
//!
//! A layer group with a sliding window holds, for each sequence, the blocks that a window can
//! touch at its worst alignment, and no more however long the context grows. That is the steady
//! state of decoding; a prefill in chunks of `n` tokens holds up to `n - 1` further tokens while
//! it runs. A group of sealed tiles also holds raw blocks in a staging pool, for each sequence at
//! most [`STAGING_BLOCKS`] and its sinks.

pub mod presets;

use alloc::vec::Vec;

use crate::dtype::{FormatClass, KvFormat};
use crate::error::{Error, Result};
use crate::layout::{CacheSpec, GroupLayout, STAGING_BLOCKS};

/// Parts per million in one: the scale of [`Budget::reserve_ppm`].
pub const PPM: u32 = 1_000_000;

/// The memory that the cache has to share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Memory of the device, in bytes.
    pub memory_bytes: u64,
    /// What the model's weights take of it, in bytes.
    pub weight_bytes: u64,
    /// Share of `memory_bytes` left to activations and the run time, in parts per million: below
    /// 1,000,000.
    pub reserve_ppm: u32,
}

impl Budget {
    /// Bytes left for keys and values.
    ///
    /// # Errors
    /// `InvalidArgument` where the memory is 0, the reserve is not below 1,000,000 ppm, or weights
    /// and reserve leave nothing.
    pub fn kv_bytes(&self) -> Result<u64> {
        if self.memory_bytes == 0 {
            return Err(Error::invalid("memory_bytes", "must be at least 1"));
        }
        if self.reserve_ppm >= PPM {
            return Err(Error::invalid("reserve_ppm", "must be below 1000000"));
        }
        let reserve = (u128::from(self.memory_bytes) * u128::from(self.reserve_ppm))
            .div_ceil(u128::from(PPM)) as u64; // below memory_bytes + 1
        (self.memory_bytes - reserve)
            .checked_sub(self.weight_bytes)
            .filter(|&bytes| bytes != 0)
            .ok_or(Error::invalid("weight_bytes", "weights and reserve leave no memory for KV"))
    }
}

/// What shall run in the budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Workload {
    /// Tokens of each sequence, prompt and answer together: at least 1.
    pub context_tokens: u64,
    /// Sequences at the same time: at least 1.
    pub batch: u64,
}

/// One layer group's part of a [`Plan`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupPlan {
    /// Bytes that a token takes in this group while it is held.
    pub token_bytes: u64,
    /// Bytes of one block.
    pub block_bytes: u64,
    /// Blocks that one sequence of the context holds.
    pub sequence_blocks: u64,
    /// Blocks of the group's pool when the budget is split as sequences of the context need it.
    pub blocks: u64,
    /// Bytes of one raw block of the staging pool; 0 unless the format has sealed tiles.
    pub staging_block_bytes: u64,
    /// Blocks of the staging pool when the budget is split likewise.
    pub staging_blocks: u64,
}

/// What a budget holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Bytes left for keys and values.
    pub kv_bytes: u64,
    /// Bytes that one more token takes, all groups, while no window is full.
    pub token_bytes: u64,
    /// Bytes of one sequence of the context, whole blocks, windows respected, staging included.
    pub sequence_bytes: u64,
    /// Bytes of the whole batch at the context.
    pub batch_bytes: u64,
    /// Whether `batch_bytes` fits in `kv_bytes`.
    pub fits: bool,
    /// The most sequences of the context that fit; 0 where one is too long.
    pub max_batch: u64,
    /// The longest context, in tokens, at which the batch fits; 0 where not one block a sequence
    /// fits, `None` where every layer has a window and any length does.
    pub max_context_tokens: Option<u64>,
    /// The groups, in the order of the spec.
    pub groups: Vec<GroupPlan>,
}

/// Plans `workload` within `budget`.
///
/// # Errors
/// `InvalidArgument` for a geometry that [`CacheSpec::layouts`] refuses, a budget that leaves
/// nothing, a context or batch of 0; `Overflow` where bytes leave 64 bits or a pool would need more
/// blocks than block ids exist. A workload that does not fit is no error: see [`Plan::fits`].
pub fn plan(spec: &CacheSpec, budget: &Budget, workload: &Workload) -> Result<Plan> {
    if workload.context_tokens == 0 || workload.batch == 0 {
        return Err(Error::invalid("context_tokens, batch", "must be at least 1"));
    }
    let layouts = spec.layouts()?;
    let kv_bytes = budget.kv_bytes()?;
    let sequence_bytes = sequence_bytes(&layouts, workload.context_tokens)?;
    let batch_bytes = sequence_bytes
        .checked_mul(workload.batch)
        .ok_or(Error::Overflow { what: "bytes of the batch" })?;

    let mut token_bytes = 0u64;
    let mut groups = Vec::with_capacity(layouts.len());
    for layout in &layouts {
        token_bytes = token_bytes
            .checked_add(layout.token_bytes())
            .ok_or(Error::Overflow { what: "bytes of a token" })?;
        let sequence_blocks = sequence_blocks(layout, workload.context_tokens);
        // Each group's share is kv_bytes * (its bytes / all bytes of a sequence), in whole blocks.
        let share = |count: u64| {
            let blocks = u128::from(kv_bytes) * u128::from(count) / u128::from(sequence_bytes);
            // The highest id marks "no block", so ids number u32::MAX blocks.
            u32::try_from(blocks)
                .map(u64::from)
                .map_err(|_| Error::Overflow { what: "blocks of a group" })
        };
        groups.push(GroupPlan {
            token_bytes: layout.token_bytes(),
            block_bytes: layout.block_bytes(),
            sequence_blocks,
            blocks: share(sequence_blocks)?,
            staging_block_bytes: layout.staging_block_bytes(),
            staging_blocks: share(staging_blocks(layout, sequence_blocks))?,
        });
    }
    Ok(Plan {
        kv_bytes,
        token_bytes,
        sequence_bytes,
        batch_bytes,
        fits: batch_bytes <= kv_bytes,
        max_batch: kv_bytes / sequence_bytes,
        max_context_tokens: max_context(&layouts, kv_bytes / workload.batch),
        groups,
    })
}

/// The same spec with every group stored as `format`; without sinks where it has no sealed tiles.
pub fn with_format(spec: &CacheSpec, format: KvFormat) -> CacheSpec {
    let mut spec = spec.clone();
    for group in &mut spec.groups {
        group.format = format;
        if format.class() != FormatClass::Tile {
            group.sink_tokens = 0;
        }
    }
    spec
}

/// Blocks that one sequence of `tokens` tokens holds in a group.
pub fn sequence_blocks(layout: &GroupLayout, tokens: u64) -> u64 {
    layout.blocks_for(tokens).min(window_blocks(layout))
}

/// Raw blocks that a sequence of `blocks` blocks holds in a group's staging pool.
fn staging_blocks(layout: &GroupLayout, blocks: u64) -> u64 {
    if layout.staging_block_bytes() == 0 {
        return 0;
    }
    blocks.min(STAGING_BLOCKS + u64::from(layout.sink_blocks()))
}

/// Bytes that one sequence of `tokens` tokens holds in all groups, staging included.
///
/// # Errors
/// `Overflow` past 63 bits in a group or 64 in the sum.
pub fn sequence_bytes(layouts: &[GroupLayout], tokens: u64) -> Result<u64> {
    let overflow = Error::Overflow { what: "bytes of a sequence" };
    layouts.iter().try_fold(0u64, |sum, layout| {
        let blocks = sequence_blocks(layout, tokens);
        let staged = layout
            .staging_block_bytes()
            .checked_mul(staging_blocks(layout, blocks))
            .ok_or(overflow)?;
        sum.checked_add(layout.pool_bytes(blocks)?)
            .and_then(|sum| sum.checked_add(staged))
            .ok_or(overflow)
    })
}

/// The most blocks that a window of `w` consecutive tokens touches: its first token may be the
/// last of a block. Unlimited without a window.
fn window_blocks(layout: &GroupLayout) -> u64 {
    match layout.spec().window {
        None => u64::MAX,
        Some(window) => {
            let block_tokens = u64::from(layout.block_tokens());
            (u64::from(window) + block_tokens - 2) / block_tokens + 1
        }
    }
}

/// The longest context whose blocks fit in `sequence_budget` bytes, `None` where all do.
fn max_context(layouts: &[GroupLayout], sequence_budget: u64) -> Option<u64> {
    // A group holds min(n, cap) blocks of an n-block context: monotone in n, so bisect. Every group
    // has the same block_tokens. At most 2^60 blocks of 2^63 bytes in 16 groups, and 2^28 raw ones:
    // below 2^128.
    let block_tokens = layouts.first().map_or(1, |layout| u64::from(layout.block_tokens()));
    let fits = |blocks: u64| {
        let bytes: u128 = layouts
            .iter()
            .map(|layout| {
                let held = blocks.min(window_blocks(layout));
                let staged = u128::from(staging_blocks(layout, held));
                u128::from(held) * u128::from(layout.block_bytes())
                    + staged * u128::from(layout.staging_block_bytes())
            })
            .sum();
        bytes <= u128::from(sequence_budget)
    };
    let (mut low, mut high) = (0, u64::MAX / block_tokens);
    if fits(high) {
        return None;
    }
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle) { low = middle } else { high = middle }
    }
    Some(low * block_tokens)
}

#[cfg(test)]
mod tests;
