//! Which shared prefixes are worth a cascade, by a model of what it saves and what it costs.
//!
//! Plain attention reads a shared prefix once from memory and then again for every further sequence,
//! from the second-level cache where the prefix fits there. A cascade reads it once, and pays: two
//! launches more, partial results of every row written in f32 and read again, and the arithmetic of
//! all queries over the prefix in a launch that may not fill the device. The model counts just
//! these; its rates are the caller's, and it is no measurement. It leans towards plain attention: a
//! cascade must win by a margin, and a prefix below 256 tokens is never split off.

use alloc::vec::Vec;

use super::params::CascadeSegment;
use crate::error::{Error, Result};

/// A cascade must be this much faster than plain attention by the model.
const MARGIN: f64 = 1.05;
/// Shorter prefixes are left alone.
const LEAST_TOKENS: u64 = 256;
/// Query rows (times heads of a group) that a block of the shared half's kernel works on.
const TILE_ROWS: u64 = 128;

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

/// The prefixes that a cascade should split off.
#[derive(Debug, Clone)]
pub struct Choice {
    /// The list that the split takes, filled up to the length asked for; empty: no cascade.
    pub segments: Vec<CascadeSegment>,
    /// What led to it.
    pub estimate: Estimate,
}

struct Model<'a> {
    shape: &'a CascadeShape,
    rates: &'a DeviceRates,
}

impl Model<'_> {
    fn tokens(&self, prefix: &SharedPrefix) -> u64 {
        u64::from(prefix.blocks) * u64::from(self.shape.block_tokens)
    }

    fn bytes(&self, prefix: &SharedPrefix) -> f64 {
        self.tokens(prefix) as f64 * f64::from(self.shape.token_bytes)
    }

    /// Microseconds in which plain attention reads a prefix again for the others.
    fn repeated(&self, prefix: &SharedPrefix) -> f64 {
        let bytes = self.bytes(prefix);
        let fits = bytes <= self.rates.cache_size as f64 / 2.0;
        let rate = if fits { self.rates.cache_bytes } else { self.rates.memory_bytes };
        f64::from(prefix.seqs.saturating_sub(1)) * bytes / rate
    }

    /// Microseconds of the shared half beyond reading each prefix once.
    fn shared_half(&self, chosen: &[SharedPrefix]) -> f64 {
        let s = self.shape;
        let (mut blocks, mut operations, mut longest, mut bytes) = (0u64, 0.0, 0.0f64, 0.0);
        for prefix in chosen {
            let rows = u64::from(prefix.seqs) * u64::from(s.q_len);
            let lines = rows.saturating_mul(u64::from(s.q_heads / s.kv_heads));
            let tiles = lines.div_ceil(TILE_ROWS).saturating_mul(u64::from(s.kv_heads));
            // Of the keys and of the values, two operations a channel.
            let tokens = self.tokens(prefix) as f64;
            let tile = TILE_ROWS as f64 * tokens * f64::from(s.head_dim) * 4.0;
            blocks = blocks.saturating_add(tiles);
            operations += tiles as f64 * tile;
            longest = longest.max(tile);
            bytes += self.bytes(prefix);
        }
        // One block goes no faster than its multiprocessor does.
        let alone = self.rates.operations / f64::from(self.rates.multiprocessors);
        let compute = (operations / self.rates.operations).max(longest / alone);
        let read = bytes / self.rates.memory_bytes;
        if blocks == 0 { 0.0 } else { compute.max(read) - read }
    }

    /// Microseconds of writing and reading partial results of `rows` rows in f32.
    fn partial_results(&self, rows: f64) -> f64 {
        // Two halves written, less the one result that plain attention writes; then both read, and
        // the result written; and the logarithms.
        let line = f64::from(self.shape.head_dim) * (8.0 - 2.0 + 8.0 + 2.0) + 24.0;
        rows * f64::from(self.shape.q_heads) * line / self.rates.memory_bytes
    }

    fn rows(&self) -> f64 {
        f64::from(self.shape.batch) * f64::from(self.shape.q_len)
    }

    fn estimate(&self, all: &[SharedPrefix], chosen: &[SharedPrefix]) -> Estimate {
        // Every token once from memory, but what is read again comes at the rate above.
        let unique = |repeats: f64, bytes: f64| repeats - bytes / self.rates.memory_bytes;
        let corrected: f64 = all
            .iter()
            .map(|p| {
                let again = f64::from(p.seqs.saturating_sub(1)) * self.bytes(p);
                unique(self.repeated(p), again)
            })
            .sum();
        let every =
            self.shape.tokens as f64 * f64::from(self.shape.token_bytes) / self.rates.memory_bytes;
        let plain = (every + corrected).max(0.0) + self.rates.launch;
        let saved: f64 = chosen.iter().map(|p| self.repeated(p)).sum();
        let cost =
            self.shared_half(chosen) + self.partial_results(self.rows()) + 2.0 * self.rates.launch;
        Estimate { plain, cascade: (plain - saved).max(self.rates.launch) + cost }
    }
}

/// Chooses among `prefixes` those that a cascade should split off, and lists them as `segments`
/// entries for the split; none where plain attention is as good.
///
/// # Errors
/// `InvalidArgument` where a rate or a dimension is not positive, where prefixes overlap, are out of
/// order or leave the batch, or where `segments` is 0; `OutOfMemory`.
pub fn cascade_choice(
    shape: &CascadeShape,
    rates: &DeviceRates,
    prefixes: &[SharedPrefix],
    segments: u32,
) -> Result<Choice> {
    let s = shape;
    let positive = |x: f64| x > 0.0 && x.is_finite();
    let rates_sound =
        [rates.memory_bytes, rates.cache_bytes, rates.operations].into_iter().all(positive)
            && rates.launch >= 0.0
            && rates.launch.is_finite()
            && rates.multiprocessors != 0;
    if !rates_sound {
        return Err(Error::invalid("rates", "must be positive and finite"));
    }
    if s.kv_heads == 0 || s.q_heads == 0 || !s.q_heads.is_multiple_of(s.kv_heads) {
        return Err(Error::invalid("q_heads", "must be a positive multiple of kv_heads"));
    }
    if [s.head_dim, s.block_tokens, s.token_bytes, s.q_len, s.batch].contains(&0) {
        return Err(Error::invalid("shape", "must have no dimension of 0"));
    }
    if segments == 0 {
        return Err(Error::invalid("segments", "must be at least 1"));
    }
    let mut end = 0u64;
    for prefix in prefixes {
        let last = u64::from(prefix.first_seq) + u64::from(prefix.seqs);
        if u64::from(prefix.first_seq) < end || last > u64::from(s.batch) {
            return Err(Error::invalid("prefixes", "must be in order, apart, and in the batch"));
        }
        end = last;
    }

    let model = Model { shape, rates };
    let refused = Error::OutOfMemory { bytes: size_of_val(prefixes) as u64 };
    let mut chosen: Vec<SharedPrefix> = Vec::new();
    chosen.try_reserve_exact(prefixes.len()).map_err(|_| refused)?;
    let gain = |p: &SharedPrefix| {
        let rows = f64::from(p.seqs) * f64::from(s.q_len);
        let cost = model.shared_half(core::slice::from_ref(p)) + model.partial_results(rows);
        model.repeated(p) - cost
    };
    let long = |p: &SharedPrefix| p.seqs > 1 && model.tokens(p) >= LEAST_TOKENS;
    chosen.extend(prefixes.iter().filter(|&p| long(p) && gain(p) > 0.0));
    // A chosen prefix takes an entry, and so does what lies between two, or before and after.
    while entries(&chosen, s.batch) > segments as usize {
        let least =
            (0..chosen.len()).min_by(|&a, &b| gain(&chosen[a]).total_cmp(&gain(&chosen[b])));
        let Some(least) = least else { break };
        chosen.remove(least);
    }
    let estimate = model.estimate(prefixes, &chosen);
    let pays = !chosen.is_empty() && estimate.plain >= MARGIN * estimate.cascade;
    let segments = if pays { list(&chosen, s.batch, segments)? } else { Vec::new() };
    Ok(Choice { segments, estimate })
}

/// How many segments cover a batch with these prefixes.
fn entries(chosen: &[SharedPrefix], batch: u32) -> usize {
    let (mut count, mut at) = (0, 0);
    for prefix in chosen {
        count += 1 + usize::from(prefix.first_seq > at);
        at = prefix.first_seq + prefix.seqs;
    }
    count + usize::from(at < batch)
}

/// The segments of a batch, filled up to `length`.
fn list(chosen: &[SharedPrefix], batch: u32, length: u32) -> Result<Vec<CascadeSegment>> {
    let mut segments: Vec<CascadeSegment> = Vec::new();
    let refused = Error::OutOfMemory { bytes: u64::from(length) * 16 };
    segments.try_reserve_exact(length as usize).map_err(|_| refused)?;
    let segment = |first_seq: u32, end: u32, shared_blocks: u32| CascadeSegment {
        first_seq,
        seqs: end - first_seq,
        shared_blocks,
        reserved: 0,
    };
    let mut at = 0;
    for prefix in chosen {
        if prefix.first_seq > at {
            segments.push(segment(at, prefix.first_seq, 0));
        }
        at = prefix.first_seq + prefix.seqs;
        segments.push(segment(prefix.first_seq, at, prefix.blocks));
    }
    if at < batch {
        segments.push(segment(at, batch, 0));
    }
    segments.resize(length as usize, segment(batch, batch, 0));
    Ok(segments)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Round numbers in the range of large devices, made up for these tests.
    fn rates() -> DeviceRates {
        DeviceRates {
            memory_bytes: 3e6,
            cache_bytes: 6e6,
            cache_size: 50 << 20,
            operations: 3e8,
            launch: 2.5,
            multiprocessors: 132,
        }
    }

    fn shape(batch: u32, shared_tokens: u64, own_tokens: u64) -> CascadeShape {
        CascadeShape {
            q_heads: 32,
            kv_heads: 8,
            head_dim: 128,
            block_tokens: 16,
            token_bytes: 4096,
            q_len: 1,
            batch,
            tokens: u64::from(batch) * (shared_tokens + own_tokens),
        }
    }

    fn one(batch: u32, shared_tokens: u64, own_tokens: u64) -> Choice {
        let blocks = (shared_tokens / 16) as u32;
        let prefix = SharedPrefix { first_seq: 0, seqs: batch, blocks };
        cascade_choice(&shape(batch, shared_tokens, own_tokens), &rates(), &[prefix], 3).unwrap()
    }

    #[test]
    fn short_prefixes_stay_and_long_ones_of_many_go() {
        for batch in [1, 2, 8, 64, 256, 1024] {
            for own in [0, 100, 10_000] {
                assert!(one(batch, 128, own).segments.is_empty(), "{batch} {own}");
            }
        }
        assert!(one(1, 1 << 16, 100).segments.is_empty());
        assert!(one(4, 256, 100).segments.is_empty());
        let long = one(128, 4096, 256);
        assert_eq!((long.segments.len(), long.segments[0].shared_blocks), (3, 256));
        assert_eq!((long.segments[1].first_seq, long.segments[1].seqs), (128, 0));
    }

    #[test]
    fn what_is_chosen_wins_by_the_model_and_more_of_it_wins_more() {
        let mut cascades = 0;
        for batch in [2, 4, 16, 64, 256, 1000] {
            for own in [1, 300, 5000] {
                let mut last = 0.0;
                for shared in [16, 256, 1024, 4096, 32_768] {
                    let choice = one(batch, shared, own);
                    let Estimate { plain, cascade } = choice.estimate;
                    if choice.segments.is_empty() {
                        continue;
                    }
                    cascades += 1;
                    assert!(plain / cascade >= 1.05, "{batch} {own} {shared}");
                    assert!(plain - cascade > last, "{batch} {own} {shared}");
                    last = plain - cascade;
                }
            }
        }
        assert!(cascades > 20, "{cascades}");
    }

    #[test]
    fn segments_cover_the_batch_and_keep_what_gains_most() {
        let prefixes = [
            SharedPrefix { first_seq: 2, seqs: 60, blocks: 300 },
            SharedPrefix { first_seq: 62, seqs: 90, blocks: 500 },
            SharedPrefix { first_seq: 155, seqs: 3, blocks: 1 },
            SharedPrefix { first_seq: 160, seqs: 100, blocks: 900 },
        ];
        let shape = CascadeShape { tokens: 2_000_000, ..shape(260, 0, 0) };
        let of = |segments: u32| {
            let choice = cascade_choice(&shape, &rates(), &prefixes, segments).unwrap();
            let list: Vec<_> =
                choice.segments.iter().map(|s| (s.first_seq, s.seqs, s.shared_blocks)).collect();
            list
        };
        let all = [(0, 2, 0), (2, 60, 300), (62, 90, 500), (152, 8, 0), (160, 100, 900)];
        assert_eq!(of(5), all);
        assert_eq!(of(7)[..5], all);
        assert_eq!(of(7)[5..], [(260, 0, 0), (260, 0, 0)]);
        assert_eq!(of(4), [(0, 62, 0), (62, 90, 500), (152, 8, 0), (160, 100, 900)]);
        assert_eq!(of(2), [(0, 160, 0), (160, 100, 900)]);
        assert!(of(1).is_empty());
    }

    #[test]
    fn impossible_inputs_are_refused() {
        let good = shape(8, 512, 10);
        let prefix = |first_seq, seqs| SharedPrefix { first_seq, seqs, blocks: 32 };
        let check = |shape: &CascadeShape, rates: &DeviceRates, list: &[SharedPrefix], segments| {
            cascade_choice(shape, rates, list, segments)
        };
        assert!(check(&good, &rates(), &[prefix(0, 8)], 1).is_ok());
        for list in [&[prefix(0, 9)][..], &[prefix(0, 4), prefix(3, 2)], &[prefix(u32::MAX, 2)]] {
            assert!(check(&good, &rates(), list, 9).is_err(), "{list:?}");
        }
        assert!(check(&good, &rates(), &[], 0).is_err());
        assert!(check(&CascadeShape { kv_heads: 3, ..good }, &rates(), &[], 1).is_err());
        assert!(check(&CascadeShape { q_len: 0, ..good }, &rates(), &[], 1).is_err());
        for rate in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(check(&good, &DeviceRates { memory_bytes: rate, ..rates() }, &[], 1).is_err());
        }
    }
}
