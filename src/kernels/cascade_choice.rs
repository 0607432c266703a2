//! Which shared prefixes are worth a cascade, by a model of what it saves and what it costs
//! (`cascade_model`).
//!
//! It leans towards plain attention: a cascade must win by a margin, and a prefix below 256 tokens is
//! never split off. [`cascade_choice`] is for the prefixes that a caller names and the split on the
//! device; [`cascade_within`] for what a batch shares ([`SharedPrefixes`]) and the views that the host
//! makes, which may cut the shared prefixes into chunks.

use alloc::vec::Vec;

use super::cascade_model::{CascadeShape, DeviceRates, Estimate, Model, SharedPrefix};
use super::params::CascadeSegment;
use super::shared_prefix::SharedPrefixes;
use crate::error::{Error, Result};

/// A cascade must be this much faster than plain attention by the model.
const MARGIN: f64 = 1.05;
/// Shorter prefixes are left alone.
const LEAST_TOKENS: u64 = 256;
/// Chunks of the shared half are no shorter than this, if there is more than one.
const LEAST_CHUNK_TOKENS: u64 = 128;
/// Numbers of chunks to choose from.
const CHUNKS: [u32; 5] = [1, 2, 4, 8, 16];

/// The prefixes that a cascade should split off.
#[derive(Debug, Clone)]
pub struct Choice {
    /// The list that the split takes, filled up to the length asked for; empty: no cascade.
    pub segments: Vec<CascadeSegment>,
    /// What led to it.
    pub estimate: Estimate,
}

impl Model<'_> {
    /// Microseconds that are won by splitting off a prefix, its launches not counted; below 0 for one
    /// that is left alone.
    fn gain(&self, prefix: &SharedPrefix) -> f64 {
        if prefix.seqs < 2 || self.tokens(prefix) < LEAST_TOKENS {
            return -1.0;
        }
        let rows = f64::from(prefix.seqs) * f64::from(self.shape.q_len);
        let cost = self.shared_half(core::slice::from_ref(prefix)) + self.partial_results(rows);
        self.repeated(prefix) - cost
    }
}

fn pays(estimate: &Estimate, chosen: &[SharedPrefix]) -> bool {
    !chosen.is_empty() && estimate.plain >= MARGIN * estimate.cascade
}

fn check(shape: &CascadeShape, rates: &DeviceRates) -> Result<()> {
    let s = shape;
    rates.check()?;
    if s.kv_heads == 0 || s.q_heads == 0 || !s.q_heads.is_multiple_of(s.kv_heads) {
        return Err(Error::invalid("q_heads", "must be a positive multiple of kv_heads"));
    }
    if [s.head_dim, s.block_tokens, s.token_bytes, s.q_len, s.batch].contains(&0) {
        return Err(Error::invalid("shape", "must have no dimension of 0"));
    }
    Ok(())
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
    check(shape, rates)?;
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

    let model = Model { shape, rates, chunks: 1 };
    let refused = Error::OutOfMemory { bytes: size_of_val(prefixes) as u64 };
    let mut chosen: Vec<SharedPrefix> = Vec::new();
    chosen.try_reserve_exact(prefixes.len()).map_err(|_| refused)?;
    chosen.extend(prefixes.iter().filter(|&p| model.gain(p) > 0.0));
    // A chosen prefix takes an entry, and so does what lies between two, or before and after.
    while entries(&chosen, s.batch) > segments as usize {
        let gain = |at: usize| model.gain(&chosen[at]);
        let least = (0..chosen.len()).min_by(|&a, &b| gain(a).total_cmp(&gain(b)));
        let Some(least) = least else { break };
        chosen.remove(least);
    }
    let estimate = model.estimate(prefixes, &chosen);
    let mut list = Vec::new();
    if pays(&estimate, &chosen) {
        list_segments(&chosen, s.batch, segments as usize, &mut list)?;
        let filler = CascadeSegment { first_seq: s.batch, ..CascadeSegment::default() };
        list.resize(segments as usize, filler);
    }
    Ok(Choice { segments: list, estimate })
}

/// How a batch is split where its shared prefixes are known to the host.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Chunked {
    /// Into how many chunks each shared prefix is cut.
    pub chunks: u32,
    /// What led to it.
    pub estimate: Estimate,
}

/// Chooses among what a batch shares, and in how many chunks it is attended; writes the segments
/// that cover the batch, without fillers, to `segments`. `None` where plain attention is as good.
///
/// # Errors
/// `InvalidArgument` where a rate or a dimension is not positive; `OutOfMemory`.
pub fn cascade_within(
    shape: &CascadeShape,
    rates: &DeviceRates,
    shared: &mut SharedPrefixes,
    segments: &mut Vec<CascadeSegment>,
) -> Result<Option<Chunked>> {
    check(shape, rates)?;
    segments.clear();
    let with = |chunks| Model { shape, rates, chunks };
    let mut best: Option<Chunked> = None;
    for chunks in CHUNKS {
        let model = with(chunks);
        let chosen = shared.choose(|prefix| model.gain(prefix));
        let longest = chosen.iter().map(|prefix| model.tokens(prefix)).max().unwrap_or(0);
        // What is decoded is cut by its own kernel.
        let cut = longest / u64::from(chunks) >= LEAST_CHUNK_TOKENS && !model.is_decoded();
        if chosen.is_empty() || (chunks > 1 && !cut) {
            continue;
        }
        let estimate = model.estimate(chosen, chosen);
        if pays(&estimate, chosen)
            && best.is_none_or(|best| estimate.cascade < best.estimate.cascade)
        {
            best = Some(Chunked { chunks, estimate });
        }
    }
    if let Some(best) = &best {
        let model = with(best.chunks);
        let chosen = shared.choose(|prefix| model.gain(prefix));
        list_segments(chosen, shape.batch, entries(chosen, shape.batch), segments)?;
    }
    Ok(best)
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

/// The segments of a batch, with room for `most`.
fn list_segments(
    chosen: &[SharedPrefix],
    batch: u32,
    most: usize,
    segments: &mut Vec<CascadeSegment>,
) -> Result<()> {
    let refused = Error::OutOfMemory { bytes: most as u64 * 16 };
    segments.try_reserve(most).map_err(|_| refused)?;
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
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::shared_prefix::{HostBatch, Words};
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

    /// The batch of `shape`, of which the first `seqs` share so many tokens.
    fn within(shape: &CascadeShape, seqs: u32, shared_tokens: u64) -> (Option<Chunked>, usize) {
        let blocks = shared_tokens as i32 / 16;
        let length = (shape.tokens / u64::from(shape.batch)) as i32;
        let mut lists = [const { Vec::new() }; 4];
        let mut end = 0i32;
        for seq in 0..=shape.batch as i32 {
            lists[0].push((seq * shape.q_len as i32).to_ne_bytes());
            lists[2].push(end.to_ne_bytes());
            if seq == shape.batch as i32 {
                break;
            }
            lists[1].push(length.to_ne_bytes());
            let whole = 0..(length + 15) / 16;
            let own = |block: i32| if block < blocks { block } else { block + 100_000 * (seq + 1) };
            let apart = if seq < seqs as i32 { 0 } else { 1 << 24 };
            lists[3].extend(whole.clone().map(|block| (apart * seq + own(block)).to_ne_bytes()));
            end += whole.end;
        }
        let [q_indptr, kv_lens, indptr, indices] = [0, 1, 2, 3].map(|n| Words(&lists[n]));
        let batch = HostBatch { q_indptr, kv_lens, indptr, indices, block_tokens: 16 };
        assert_eq!(batch.tokens(), shape.tokens);
        let (mut shared, mut segments) = (SharedPrefixes::default(), Vec::new());
        shared.find(&batch).unwrap();
        let chosen = cascade_within(shape, &rates(), &mut shared, &mut segments).unwrap();
        let mut next = 0;
        for segment in &segments {
            assert_eq!(segment.first_seq, next);
            next += segment.seqs;
        }
        assert_eq!(next, if chosen.is_some() { shape.batch } else { 0 });
        (chosen, segments.len())
    }

    #[test]
    fn chunks_fill_a_device_that_one_would_not() {
        // Two tiles of rows for each of eight heads: 16 blocks for 132 multiprocessors.
        let (chosen, segments) = within(&shape(64, 4096, 1024), 64, 4096);
        let chosen = chosen.unwrap();
        assert!(chosen.chunks > 2 && segments == 1, "{chosen:?}");
        let whole = one(64, 4096, 1024);
        assert!(chosen.estimate.cascade < whole.estimate.cascade);
        // Of which some share nothing.
        let (chosen, segments) = within(&shape(64, 4096, 1024), 50, 4096);
        assert!(chosen.is_some() && segments == 2);
        // Few rows are decoded, and short chunks cost more than they give.
        assert_eq!(within(&shape(8, 1 << 15, 1024), 8, 1 << 15).0.unwrap().chunks, 1);
        assert!(within(&shape(64, 128, 1024), 64, 128).0.is_none());
        assert!(within(&shape(2, 512, 8192), 2, 512).0.is_none());
        assert!(within(&shape(1, 4096, 10), 1, 4096).0.is_none());
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
