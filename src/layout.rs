//! What a cache stores and where: specs, block layouts, strides, checked byte math.
//!
//! The only place that multiplies dimensions. A block holds `block_tokens` tokens of every layer
//! of its group, contiguous:
//!
//! ```text
//! [block][layer][K: kv_head][token][k_dim]
//!               [V: kv_head][token][v_dim]
//! ```
//!
//! so that a block is one object for tiers, and one run per (layer, head) for kernels. All sizes
//! are `u64` and every product is checked once, in [`GroupLayout::new`]; what it accepts cannot
//! overflow later.

use alloc::vec::Vec;

use crate::dtype::KvFormat;
use crate::error::{Error, Result};

/// The largest head dimension that a key row may have (multi-head latent attention uses 576).
pub const MAX_HEAD_DIM: u32 = 576;
/// The widest head for which keys and values of ordinary attention may be stored.
pub const MAX_SPLIT_HEAD_DIM: u32 = 256;
/// Accepted block sizes: powers of two in this range.
pub const BLOCK_TOKENS_RANGE: core::ops::RangeInclusive<u32> = 16..=256;

/// Layers that share a geometry, a format and a window; they share a pool and block tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupSpec {
    /// Layers in the group.
    pub layers: u32,
    /// KV heads of each layer (1 for multi-query and latent attention).
    pub kv_heads: u32,
    /// Channels of a key row: a multiple of 8.
    pub k_dim: u32,
    /// Channels of a value row: a multiple of 8.
    pub v_dim: u32,
    /// Multi-head latent attention: a value row is the first `v_dim` channels of the key row, and
    /// no value is stored of its own.
    pub v_in_k: bool,
    /// How K and V are stored.
    pub format: KvFormat,
    /// Sliding window in tokens, the query's own included; `None` for full attention.
    pub window: Option<u32>,
}

impl GroupSpec {
    /// Ordinary attention: `kv_heads` heads of `head_dim` for K and for V.
    pub const fn uniform(layers: u32, kv_heads: u32, head_dim: u32, format: KvFormat) -> Self {
        Self {
            layers,
            kv_heads,
            k_dim: head_dim,
            v_dim: head_dim,
            v_in_k: false,
            format,
            window: None,
        }
    }

    /// Multi-head latent attention: one shared head of `latent + rope` channels, whose first
    /// `latent` are the values (512 + 64 in DeepSeek-V3).
    pub const fn latent(layers: u32, latent: u32, rope: u32, format: KvFormat) -> Self {
        Self {
            layers,
            kv_heads: 1,
            k_dim: latent.saturating_add(rope),
            v_dim: latent,
            v_in_k: true,
            format,
            window: None,
        }
    }
}

/// The shape of a whole cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheSpec {
    /// Tokens of one block: a power of two, 16 to 256.
    pub block_tokens: u32,
    /// Layer groups; a uniform model has one.
    pub groups: Vec<GroupSpec>,
}

impl CacheSpec {
    /// A model whose layers are all alike.
    pub fn uniform(block_tokens: u32, group: GroupSpec) -> Self {
        Self { block_tokens, groups: alloc::vec![group] }
    }

    /// The layouts of all groups, or the first thing wrong with the spec.
    pub fn layouts(&self) -> Result<Vec<GroupLayout>> {
        if self.groups.is_empty() || self.groups.len() > MAX_GROUPS {
            return Err(Error::invalid("groups", "must be 1 to 16"));
        }
        self.groups.iter().map(|group| GroupLayout::new(group.clone(), self.block_tokens)).collect()
    }
}

/// The most layer groups a cache may have.
pub const MAX_GROUPS: usize = 16;

/// Distances between rows of one layer's K or V, in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Strides {
    /// From a block to the next.
    pub block: i64,
    /// From a KV head to the next within a block.
    pub head: i64,
    /// From a token to the next within a block and head.
    pub token: i64,
}

/// Where the rows of one group lie, checked once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupLayout {
    spec: GroupSpec,
    block_tokens: u32,
    k_run_bytes: u64,
    v_run_bytes: u64,
    layer_bytes: u64,
    block_bytes: u64,
}

impl GroupLayout {
    /// Checks the spec and multiplies its dimensions out.
    ///
    /// # Errors
    /// `InvalidArgument` for a geometry outside the documented ranges, `Overflow` where a block
    /// would not fit in 63 bits.
    pub fn new(spec: GroupSpec, block_tokens: u32) -> Result<Self> {
        if !block_tokens.is_power_of_two() || !BLOCK_TOKENS_RANGE.contains(&block_tokens) {
            return Err(Error::invalid("block_tokens", "must be a power of two, 16 to 256"));
        }
        if spec.layers == 0 || spec.kv_heads == 0 {
            return Err(Error::invalid("layers, kv_heads", "must be at least 1"));
        }
        if spec.window == Some(0) {
            return Err(Error::invalid("window", "must be at least 1 token"));
        }
        let dim_ok = |dim: u32, max: u32| dim != 0 && dim.is_multiple_of(8) && dim <= max;
        if spec.v_in_k {
            if spec.kv_heads != 1 {
                return Err(Error::invalid("kv_heads", "must be 1 where values lie in keys"));
            }
            if !dim_ok(spec.k_dim, MAX_HEAD_DIM) || !dim_ok(spec.v_dim, spec.k_dim) {
                return Err(Error::invalid(
                    "k_dim, v_dim",
                    "must be multiples of 8, v_dim <= k_dim <= 576, where values lie in keys",
                ));
            }
        } else if !dim_ok(spec.k_dim, MAX_SPLIT_HEAD_DIM) || !dim_ok(spec.v_dim, MAX_SPLIT_HEAD_DIM)
        {
            return Err(Error::invalid("k_dim, v_dim", "must be multiples of 8, 8 to 256"));
        }
        let overflow = Error::Overflow { what: "block_bytes" };
        let k_run_bytes = spec.format.row_bytes(spec.k_dim) * u64::from(block_tokens);
        let v_run_bytes = if spec.v_in_k {
            0
        } else {
            spec.format.row_bytes(spec.v_dim) * u64::from(block_tokens)
        };
        let layer_bytes =
            (k_run_bytes + v_run_bytes).checked_mul(u64::from(spec.kv_heads)).ok_or(overflow)?;
        let block_bytes = layer_bytes.checked_mul(u64::from(spec.layers)).ok_or(overflow)?;
        if block_bytes > i64::MAX as u64 {
            return Err(overflow);
        }
        Ok(Self { spec, block_tokens, k_run_bytes, v_run_bytes, layer_bytes, block_bytes })
    }

    /// The spec this layout was made from.
    pub fn spec(&self) -> &GroupSpec {
        &self.spec
    }

    /// Tokens of one block.
    pub fn block_tokens(&self) -> u32 {
        self.block_tokens
    }

    /// Bytes of one block, all layers of the group.
    pub fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    /// Bytes that one token takes in the group (its share of a full block).
    pub fn token_bytes(&self) -> u64 {
        self.block_bytes / u64::from(self.block_tokens)
    }

    /// Bytes of `blocks` blocks.
    ///
    /// # Errors
    /// `Overflow` past 63 bits, which is more than an address space.
    pub fn pool_bytes(&self, blocks: u64) -> Result<u64> {
        match self.block_bytes.checked_mul(blocks) {
            Some(bytes) if bytes <= i64::MAX as u64 => Ok(bytes),
            _ => Err(Error::Overflow { what: "pool bytes" }),
        }
    }

    /// Blocks that hold `tokens` tokens.
    pub fn blocks_for(&self, tokens: u64) -> u64 {
        tokens.div_ceil(u64::from(self.block_tokens))
    }

    /// Byte offset of the keys of `layer` in a block. `layer` must be below `layers`.
    pub fn k_offset(&self, layer: u32) -> u64 {
        debug_assert!(layer < self.spec.layers);
        u64::from(layer) * self.layer_bytes
    }

    /// Byte offset of the values of `layer` in a block (that of the keys where values lie in keys).
    pub fn v_offset(&self, layer: u32) -> u64 {
        let keys =
            if self.spec.v_in_k { 0 } else { self.k_run_bytes * u64::from(self.spec.kv_heads) };
        self.k_offset(layer) + keys
    }

    /// Strides of the keys, in elements.
    pub fn k_strides(&self) -> Strides {
        self.strides(self.spec.k_dim)
    }

    /// Strides of the values, in elements (those of the keys where values lie in keys).
    pub fn v_strides(&self) -> Strides {
        self.strides(if self.spec.v_in_k { self.spec.k_dim } else { self.spec.v_dim })
    }

    fn strides(&self, dim: u32) -> Strides {
        Strides {
            block: (self.block_bytes / u64::from(self.spec.format.dtype().bytes())) as i64,
            head: i64::from(dim) * i64::from(self.block_tokens),
            token: i64::from(dim),
        }
    }

    /// The contiguous runs of a block that hold K or V of one head, as (byte offset, bytes a
    /// token): what a copy of the first tokens of a block walks over.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let tokens = u64::from(self.block_tokens);
        (0..self.spec.layers).flat_map(move |layer| {
            (0..self.spec.kv_heads).flat_map(move |head| {
                let k = (
                    self.k_offset(layer) + u64::from(head) * self.k_run_bytes,
                    self.k_run_bytes / tokens,
                );
                let v = (
                    self.v_offset(layer) + u64::from(head) * self.v_run_bytes,
                    self.v_run_bytes / tokens,
                );
                core::iter::once(k).chain((!self.spec.v_in_k).then_some(v))
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uniform_block_is_contiguous_and_covered_by_its_runs() {
        let layout = GroupLayout::new(GroupSpec::uniform(3, 2, 64, KvFormat::Bf16), 16).unwrap();
        assert_eq!(layout.token_bytes(), 2 * 3 * 2 * 64 * 2);
        let mut runs: Vec<_> = layout.runs().collect();
        runs.sort_unstable();
        let mut at = 0;
        for (offset, token_bytes) in runs {
            assert_eq!(offset, at);
            at += token_bytes * 16;
        }
        assert_eq!(at, layout.block_bytes());
    }

    #[test]
    fn latent_attention_stores_one_row_a_token() {
        let layout = GroupLayout::new(GroupSpec::latent(61, 512, 64, KvFormat::Bf16), 64).unwrap();
        assert_eq!(layout.token_bytes(), 70_272);
        assert_eq!(layout.v_offset(7), layout.k_offset(7));
        assert_eq!(layout.runs().count(), 61);
    }

    #[test]
    fn impossible_geometry_is_refused() {
        let bad =
            |group: GroupSpec, block_tokens| GroupLayout::new(group, block_tokens).unwrap_err();
        let good = GroupSpec::uniform(1, 1, 64, KvFormat::F16);
        for block_tokens in [0, 8, 17, 48, 512] {
            bad(good.clone(), block_tokens);
        }
        for dim in [0, 4, 65, 264, u32::MAX] {
            bad(GroupSpec::uniform(1, 1, dim, KvFormat::F16), 16);
        }
        bad(GroupSpec { layers: 0, ..good.clone() }, 16);
        bad(GroupSpec { kv_heads: 0, ..good.clone() }, 16);
        bad(GroupSpec { window: Some(0), ..good.clone() }, 16);
        bad(GroupSpec::latent(1, u32::MAX, 64, KvFormat::F16), 16);
        bad(GroupSpec { v_dim: 584, ..GroupSpec::latent(1, 512, 64, KvFormat::F16) }, 16);
        let huge = GroupSpec { layers: u32::MAX, kv_heads: u32::MAX, ..good };
        assert_eq!(bad(huge, 256), Error::Overflow { what: "block_bytes" });
    }
}
