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
//! so that a block is one object for tiers, and one run per (layer, head) for kernels. A run of
//! quantised tokens has the rows of codes first and their scales behind them; a block of sealed
//! tiles is `[layer][kv_head]` records with K and V in one ([`tile`]). All sizes are `u64` and
//! every product is checked once, in [`GroupLayout::new`]; what it accepts cannot overflow later.

pub mod slice;
pub mod tile;

use alloc::vec::Vec;

use crate::dtype::{FormatClass, KvFormat};
use crate::error::{Error, Result};

pub(crate) use tile::check_quantized_dims;
use tile::{TileLayout, TileShape};

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
    /// Of sealed-tile formats, the first tokens of every sequence that stay raw in bf16 (attention
    /// sinks): a multiple of the block's tokens, 0 for none.
    pub sink_tokens: u32,
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
            sink_tokens: 0,
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
            sink_tokens: 0,
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

/// Raw blocks of a sealed-tile format that one sequence may hold beside its sealed ones and its
/// sinks: the block that is being filled, and the one before it as long as the last step may be
/// taken back.
pub const STAGING_BLOCKS: u64 = 2;

/// Distances between rows of one layer's K or V, in elements; in bytes where the format is
/// quantised.
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
    staging_block_bytes: u64,
}

impl GroupLayout {
    /// Checks the spec and multiplies its dimensions out.
    ///
    /// # Errors
    /// `InvalidArgument` for a geometry outside the documented ranges or one that the format
    /// cannot have, `Overflow` where a block would not fit in 63 bits.
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
        let tiles = spec.format.class() == FormatClass::Tile;
        if !spec.sink_tokens.is_multiple_of(block_tokens) || (spec.sink_tokens != 0 && !tiles) {
            let why =
                "must be a multiple of block_tokens, and 0 unless the format has sealed tiles";
            return Err(Error::invalid("sink_tokens", why));
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
        let (k_run_bytes, v_run_bytes) = run_bytes(&spec, block_tokens)?;
        let of_block = |head_bytes: u64| {
            head_bytes
                .checked_mul(u64::from(spec.kv_heads))
                .and_then(|layer| layer.checked_mul(u64::from(spec.layers)))
                .filter(|&bytes| bytes <= i64::MAX as u64)
                .ok_or(overflow)
        };
        let block_bytes = of_block(k_run_bytes + v_run_bytes)?;
        let staging_block_bytes = if spec.format.class() == FormatClass::Tile {
            let v_dim = if spec.v_in_k { 0 } else { spec.v_dim };
            let row_bytes = spec.format.row_bytes(spec.k_dim) + spec.format.row_bytes(v_dim);
            of_block(row_bytes * u64::from(block_tokens))?
        } else {
            0
        };
        let layer_bytes = block_bytes / u64::from(spec.layers);
        Ok(Self {
            spec,
            block_tokens,
            k_run_bytes,
            v_run_bytes,
            layer_bytes,
            block_bytes,
            staging_block_bytes,
        })
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

    /// Bytes of one layer in a block: the layers of a block lie one after the other.
    pub fn layer_bytes(&self) -> u64 {
        self.layer_bytes
    }

    /// Where `bytes` bytes of whole layers from `first` on begin in a block.
    ///
    /// # Errors
    /// `InvalidArgument` where they are no whole layers of the group.
    pub fn layers_at(&self, first: u32, bytes: usize) -> Result<u64> {
        let (bytes, at) = (bytes as u64, u64::from(first).saturating_mul(self.layer_bytes));
        let whole = bytes.is_multiple_of(self.layer_bytes)
            && at.checked_add(bytes).is_some_and(|end| end <= self.block_bytes);
        if whole { Ok(at) } else { Err(Error::invalid("bytes", "must be whole layers of a block")) }
    }

    /// Bytes that one token takes in the group (its share of a full block, rounded up).
    pub fn token_bytes(&self) -> u64 {
        self.block_bytes.div_ceil(u64::from(self.block_tokens))
    }

    /// Bytes of one raw block in the staging pool of a sealed-tile format, all layers of the
    /// group; 0 for other formats.
    pub fn staging_block_bytes(&self) -> u64 {
        self.staging_block_bytes
    }

    /// Blocks at the beginning of every sequence that stay raw.
    pub fn sink_blocks(&self) -> u32 {
        self.spec.sink_tokens / self.block_tokens
    }

    /// The record of one layer and head in a block of sealed tiles; `None` for other formats.
    pub fn tile(&self) -> Option<TileLayout> {
        // What `new` accepted is a tile, or the format has none.
        TileLayout::new(self.spec.format, tile_shape(&self.spec, self.block_tokens)).ok()
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

    /// Byte offset of the values of `layer` in a block (that of the keys where values lie in keys
    /// or in the same record).
    pub fn v_offset(&self, layer: u32) -> u64 {
        // Values lie in the keys' rows, or in the record that both share.
        let shared = self.spec.v_in_k || self.spec.format.class() == FormatClass::Tile;
        let keys = if shared { 0 } else { self.k_run_bytes * u64::from(self.spec.kv_heads) };
        self.k_offset(layer) + keys
    }

    /// Strides of the keys: in elements, in bytes where the format is quantised.
    pub fn k_strides(&self) -> Strides {
        self.strides(self.spec.k_dim, self.k_run_bytes)
    }

    /// Strides of the values (those of the keys where values lie in keys).
    pub fn v_strides(&self) -> Strides {
        if self.spec.v_in_k {
            self.k_strides()
        } else {
            self.strides(self.spec.v_dim, self.v_run_bytes)
        }
    }

    /// Byte offset of the scales of the keys of `layer` in a block: behind the codes of the first
    /// head. Of a format whose rows have none, where they would be.
    pub fn k_scale_offset(&self, layer: u32) -> u64 {
        self.k_offset(layer) + self.code_bytes(self.spec.k_dim)
    }

    /// Byte offset of the scales of the values of `layer` in a block (those of the keys where values
    /// lie in keys).
    pub fn v_scale_offset(&self, layer: u32) -> u64 {
        if self.spec.v_in_k {
            self.k_scale_offset(layer)
        } else {
            self.v_offset(layer) + self.code_bytes(self.spec.v_dim)
        }
    }

    /// Strides of the scales of keys, in bytes.
    pub fn k_scale_strides(&self) -> Strides {
        self.scale_strides(self.spec.k_dim, self.k_run_bytes)
    }

    /// Strides of the scales of values, in bytes (those of the keys where values lie in keys).
    pub fn v_scale_strides(&self) -> Strides {
        if self.spec.v_in_k {
            self.k_scale_strides()
        } else {
            self.scale_strides(self.spec.v_dim, self.v_run_bytes)
        }
    }

    /// Bytes of the rows of one run, their scales not counted.
    fn code_bytes(&self, dim: u32) -> u64 {
        row_parts(&self.spec, dim).0 * u64::from(self.block_tokens)
    }

    fn scale_strides(&self, dim: u32, run_bytes: u64) -> Strides {
        Strides {
            block: self.block_bytes as i64,
            head: run_bytes as i64,
            token: row_parts(&self.spec, dim).1 as i64,
        }
    }

    fn strides(&self, dim: u32, run_bytes: u64) -> Strides {
        let format = self.spec.format;
        let (unit, token) = match format.class() {
            FormatClass::Float => (u64::from(format.dtype().bytes()), u64::from(dim)),
            FormatClass::Token => (1, format.row_bytes(dim)),
            // A record is one object: its rows are found through `tile`.
            FormatClass::Tile => (1, 0),
        };
        let run_bytes =
            if format.class() == FormatClass::Tile { self.k_run_bytes } else { run_bytes };
        Strides {
            block: (self.block_bytes / unit) as i64,
            head: (run_bytes / unit) as i64,
            token: token as i64,
        }
    }

    /// The contiguous runs of a block that hold K or V of one head, as (byte offset, bytes a
    /// token): what a copy of the first tokens of a block walks over. Codes and scales of
    /// quantised tokens are runs of their own; sealed tiles have none, they are copied whole.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let (spec, tokens) = (&self.spec, u64::from(self.block_tokens));
        let side = move |start: u64, dim: u32| {
            let (codes, scales) = row_parts(spec, dim);
            let runs = [(start, codes), (start + tokens * codes, scales)];
            runs.into_iter().filter(|&(_, bytes)| bytes != 0)
        };
        let sealed = spec.format.class() == FormatClass::Tile;
        let layers = if sealed { 0 } else { spec.layers };
        (0..layers).flat_map(move |layer| {
            (0..spec.kv_heads).flat_map(move |head| {
                let k = self.k_offset(layer) + u64::from(head) * self.k_run_bytes;
                let v = self.v_offset(layer) + u64::from(head) * self.v_run_bytes;
                let v_dim = if spec.v_in_k { 0 } else { spec.v_dim };
                side(k, spec.k_dim).chain(side(v, v_dim))
            })
        })
    }
}

/// Bytes of codes and of scales of one token and head, 0 and 0 for a `dim` of 0.
fn row_parts(spec: &GroupSpec, dim: u32) -> (u64, u64) {
    let parts = if spec.v_in_k && spec.v_dim < spec.k_dim { 2 } else { 1 };
    match dim {
        0 => (0, 0),
        _ => (spec.format.row_bytes(dim), spec.format.row_scale_bytes(dim, parts)),
    }
}

fn tile_shape(spec: &GroupSpec, tokens: u32) -> TileShape {
    TileShape { k_dim: spec.k_dim, v_dim: spec.v_dim, v_in_k: spec.v_in_k, tokens }
}

/// Bytes of one head's keys and of its values in a block; a record counts as keys.
fn run_bytes(spec: &GroupSpec, block_tokens: u32) -> Result<(u64, u64)> {
    match spec.format.class() {
        FormatClass::Tile => {
            let record = TileLayout::new(spec.format, tile_shape(spec, block_tokens))?;
            Ok((record.bytes() as u64, 0))
        }
        class => {
            if class == FormatClass::Token {
                check_quantized_dims(spec.k_dim, spec.v_dim, spec.v_in_k)?;
            }
            let run = |dim: u32| {
                let (codes, scales) = row_parts(spec, dim);
                u64::from(block_tokens) * (codes + scales)
            };
            Ok((run(spec.k_dim), run(if spec.v_in_k { 0 } else { spec.v_dim })))
        }
    }
}

#[cfg(test)]
mod tests;
