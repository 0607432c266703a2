//! What plain attention and a cascade cost, by a model.
//!
//! Plain attention reads a shared prefix once from memory and then again for every further sequence
//! (and for every further eight columns of one), from the second-level cache where the prefix fits
//! there. A cascade reads it once, and pays: further launches, partial results of every row written
//! in f32 and read again, and the arithmetic of all queries over the prefix in a launch that may not
//! fill the device. The model counts just these; its rates are the caller's, and it is no
//! measurement.

use crate::error::{Error, Result};

/// Query rows (times heads of a group) that a block of the kernel for long queries works on.
const TILE_ROWS: u64 = 128;
/// Query columns (rows times heads of a group) for which the decode kernel reads a context once.
const COLUMNS: u64 = 8;
/// Query rows up to which the shared half is decoded, which cuts contexts by itself.
const DECODED_ROWS: u32 = 8;

/// What a device does in a microsecond, and what a launch costs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeviceRates {
    /// Bytes from memory, in a microsecond.
    pub memory_bytes: f64,
    /// Bytes from the second-level cache, in a microsecond.
    pub cache_bytes: f64,
    /// Size of that cache, in bytes.
    pub cache_size: u64,
    /// Operations (two a multiplication and addition) of the attention kernel for long queries, in a
    /// microsecond, when it fills the device.
    pub operations: f64,
    /// Microseconds from one launch's end to the next one's work.
    pub launch: f64,
    /// Multiprocessors.
    pub multiprocessors: u32,
}

impl DeviceRates {
    /// # Errors
    /// `InvalidArgument` where one is not positive (a launch may take no time) and finite.
    pub fn check(&self) -> Result<()> {
        let positive = |x: f64| x > 0.0 && x.is_finite();
        let sound =
            [self.memory_bytes, self.cache_bytes, self.operations].into_iter().all(positive)
                && self.launch >= 0.0
                && self.launch.is_finite()
                && self.multiprocessors != 0;
        if sound { Ok(()) } else { Err(Error::invalid("rates", "must be positive and finite")) }
    }
}

/// The attention layer that a choice is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CascadeShape {
    /// Query heads, a multiple of `kv_heads`.
    pub q_heads: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Channels of a head.
    pub head_dim: u32,
    /// Tokens of a cache block.
    pub block_tokens: u32,
    /// Bytes of one token's keys and values of all KV heads in this layer.
    pub token_bytes: u32,
    /// Query tokens of a sequence.
    pub q_len: u32,
    /// Sequences.
    pub batch: u32,
    /// Tokens of all sequences together, shared ones counted in each; an estimate will do.
    pub tokens: u64,
}

/// Neighbouring sequences of the batch that begin with the same blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedPrefix {
    /// The first sequence.
    pub first_seq: u32,
    /// How many.
    pub seqs: u32,
    /// Blocks that all of them begin with, whole ones before every query.
    pub blocks: u32,
}

/// What the model makes of a batch, for one layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// Microseconds of plain attention.
    pub plain: f64,
    /// Microseconds of a cascade over the chosen prefixes.
    pub cascade: f64,
}

/// One layer on one device, with the shared half in so many chunks of the context.
pub(super) struct Model<'a> {
    pub shape: &'a CascadeShape,
    pub rates: &'a DeviceRates,
    pub chunks: u32,
}

impl Model<'_> {
    pub fn tokens(&self, prefix: &SharedPrefix) -> u64 {
        u64::from(prefix.blocks) * u64::from(self.shape.block_tokens)
    }

    fn bytes(&self, prefix: &SharedPrefix) -> f64 {
        self.tokens(prefix) as f64 * f64::from(self.shape.token_bytes)
    }

    /// Bytes that come from the second-level cache, or from memory where they do not fit there.
    fn again(&self, prefix: &SharedPrefix, times: u64) -> f64 {
        let bytes = self.bytes(prefix);
        let fits = bytes <= self.rates.cache_size as f64 / 2.0;
        let rate = if fits { self.rates.cache_bytes } else { self.rates.memory_bytes };
        times as f64 * bytes / rate
    }

    /// Rows of the queries over one KV head.
    fn lines(&self, seqs: u64) -> u64 {
        let s = self.shape;
        seqs.saturating_mul(u64::from(s.q_len)).saturating_mul(u64::from(s.q_heads / s.kv_heads))
    }

    /// Microseconds in which plain attention reads a prefix after the first time.
    pub fn repeated(&self, prefix: &SharedPrefix) -> f64 {
        let times = u64::from(prefix.seqs).saturating_mul(self.lines(1).div_ceil(COLUMNS));
        self.again(prefix, times.saturating_sub(1))
    }

    /// Microseconds of the shared half beyond reading each prefix once.
    pub fn shared_half(&self, chosen: &[SharedPrefix]) -> f64 {
        let s = self.shape;
        let decoded = self.is_decoded();
        let (mut blocks, mut operations, mut longest) = (0u64, 0.0, 0.0f64);
        let (mut bytes, mut again) = (0.0, 0.0);
        for prefix in chosen {
            let lines = self.lines(prefix.seqs.into());
            let tile_rows = if decoded { COLUMNS } else { TILE_ROWS };
            let tiles = lines.div_ceil(tile_rows);
            if decoded {
                again += self.again(prefix, tiles.saturating_sub(1));
            }
            let tiles = tiles.saturating_mul(u64::from(s.kv_heads));
            // Of the keys and of the values, two operations a channel.
            let tokens = self.tokens(prefix) as f64;
            let tile = tile_rows as f64 * tokens * f64::from(s.head_dim) * 4.0;
            blocks = blocks.saturating_add(tiles);
            operations += tiles as f64 * tile;
            longest = longest.max(tile / f64::from(self.chunks));
            bytes += self.bytes(prefix);
        }
        // One block goes no faster than its multiprocessor does.
        let alone = self.rates.operations / f64::from(self.rates.multiprocessors);
        let longest = if decoded { 0.0 } else { longest / alone };
        let compute = (operations / self.rates.operations).max(longest);
        let read = bytes / self.rates.memory_bytes;
        if blocks == 0 { 0.0 } else { (compute.max(read) - read).max(again) }
    }

    /// Microseconds of writing and reading partial results of `rows` rows in f32, and of as many
    /// queries as there are chunks.
    pub fn partial_results(&self, rows: f64) -> f64 {
        // Every part written and read, and the logarithms; the result is written in either case.
        let (parts, dim) = (f64::from(self.chunks) + 1.0, f64::from(self.shape.head_dim));
        let copies = if self.chunks > 1 { 4.0 * f64::from(self.chunks) } else { 0.0 };
        let line = dim * (8.0 * parts + copies) + 12.0 * parts;
        rows * f64::from(self.shape.q_heads) * line / self.rates.memory_bytes
    }

    /// Whether the rows are so few that the shared half is decoded.
    pub fn is_decoded(&self) -> bool {
        self.rows() <= f64::from(DECODED_ROWS)
    }

    fn rows(&self) -> f64 {
        f64::from(self.shape.batch) * f64::from(self.shape.q_len)
    }

    /// Of `all` prefixes that are shared the chosen ones are split off.
    pub fn estimate(&self, all: &[SharedPrefix], chosen: &[SharedPrefix]) -> Estimate {
        // Every token once from memory, but what is read again comes at the rate above.
        let corrected: f64 = all
            .iter()
            .map(|p| {
                let others = f64::from(p.seqs.saturating_sub(1)) * self.bytes(p);
                self.repeated(p) - others / self.rates.memory_bytes
            })
            .sum();
        let every =
            self.shape.tokens as f64 * f64::from(self.shape.token_bytes) / self.rates.memory_bytes;
        let plain = (every + corrected).max(0.0) + self.rates.launch;
        let saved: f64 = chosen.iter().map(|p| self.repeated(p)).sum();
        // Those of the shared half and of the merge, and of the copies of the queries.
        let launches = if self.chunks > 1 { 3.0 } else { 2.0 };
        let cost = self.shared_half(chosen)
            + self.partial_results(self.rows())
            + launches * self.rates.launch;
        Estimate { plain, cascade: (plain - saved).max(self.rates.launch) + cost }
    }
}
