//! Blocks of a sequence from one cache to another: prefill here, decode there.
//!
//! The other cache may have another block size, or other heads and layers of the model: tokens are
//! copied row by row where the format stores rows (16 and 32 bits, and the per-token formats).
//! Sealed tiles go only to a cache of the same blocks and the same part, and of as many raw sinks, which
//! go as their raw rows.

use alloc::vec::Vec;
use core::ops::Range;
use std::io::{Read, Write};

use super::media::Media;
use super::sequence::Sequence;
use super::{KvCache, reserve};
use crate::dtype::FormatClass;
use crate::error::{Error, Result};
use crate::ids::{BlockId, Namespace, SeqId};
use crate::layout::GroupLayout;
use crate::layout::slice::{GroupSlice, Slice};
use crate::pool::BlockTable;
use crate::tier::stream::{
    StreamHead, read_block, read_end, read_head, write_block, write_end, write_head,
};

/// Rows of one layer group that a stream and the cache both have, as ranges of bytes a token.
struct Shared {
    /// (offset in the stream's group, offset in the cache's, bytes a token).
    runs: Vec<(usize, usize, usize)>,
    /// All of the block, as it is.
    whole: bool,
}

/// A stream that is being read.
struct Source<'a> {
    from: &'a mut dyn Read,
    head: StreamHead,
    groups: Vec<Shared>,
    layouts: Vec<GroupLayout>,
    block: Vec<u8>,
    /// The block that is in `block`.
    at: Option<usize>,
}

impl Source<'_> {
    /// Reads on to block `at`.
    fn advance(&mut self, at: usize) -> Result<()> {
        while self.at.is_none_or(|have| have < at) {
            let next = self.at.map_or(0, |have| have + 1);
            let bytes: usize = places(&self.layouts, next).map(|place| place.len()).sum();
            resize(&mut self.block, bytes)?;
            read_block(self.from, &mut self.block)?;
            self.at = Some(next);
        }
        Ok(())
    }
}

fn resize(bytes: &mut Vec<u8>, to: usize) -> Result<()> {
    let more = to.saturating_sub(bytes.len());
    reserve(bytes, more)?;
    bytes.resize(to, 0);
    Ok(())
}

/// Where each group lies in a block of a sequence, as a stream has it.
fn places(layouts: &[GroupLayout], block: usize) -> impl Iterator<Item = Range<usize>> + '_ {
    layouts.iter().scan(0, move |at, layout| {
        let raw = block < layout.sink_blocks() as usize;
        let bytes = if raw { layout.staging_block_bytes() } else { layout.block_bytes() };
        let begin = *at;
        *at += bytes as usize;
        Some(begin..*at)
    })
}

/// What the two have in common of a group; marks it in `covered`, `[layer][head]` of the cache.
fn shared(
    theirs: (&GroupLayout, &GroupSlice),
    ours: (&GroupLayout, &GroupSlice),
    covered: &mut [bool],
) -> Result<Shared> {
    let ((from, source), (to, part)) = (theirs, ours);
    let (a, b) = (from.spec(), to.spec());
    let same = (a.format, a.k_dim, a.v_dim, a.v_in_k) == (b.format, b.k_dim, b.v_dim, b.v_in_k);
    if !same {
        return Err(Error::invalid("stream", "has another format or other heads"));
    }
    if b.format.class() == FormatClass::Tile {
        if source != part || from.block_tokens() != to.block_tokens() {
            return Err(Error::Unsupported { what: "sealed tiles of another block size or part" });
        }
        if a.sink_tokens != b.sink_tokens {
            return Err(Error::Unsupported { what: "sealed tiles with other sink tokens" });
        }
        covered.fill(true);
        return Ok(Shared { runs: Vec::new(), whole: true });
    }
    let (mine, yours): (Vec<_>, Vec<_>) = (to.runs().collect(), from.runs().collect());
    let parts = mine.len() / (part.layers as usize * part.heads as usize);
    let mut runs = Vec::new();
    for layer in 0..part.layers {
        let there = (part.first_layer + layer).checked_sub(source.first_layer);
        let Some(there) = there.filter(|&layer| layer < source.layers) else { continue };
        for head in 0..part.heads {
            let other = (part.first_head + head).checked_sub(source.first_head);
            let Some(other) = other.filter(|&head| head < source.heads) else { continue };
            let to = (layer * part.heads + head) as usize;
            let from = (there * source.heads + other) as usize;
            covered[to] = true;
            for n in 0..parts {
                let (ours, theirs) = (mine[to * parts + n], yours[from * parts + n]);
                runs.push((theirs.0 as usize, ours.0 as usize, ours.1 as usize));
            }
        }
    }
    Ok(Shared { runs, whole: false })
}

impl KvCache {
    /// Writes the full blocks of a sequence to `out`; how many tokens those are. `model` is what
    /// the reader calls the model too; `slice` is the part of it that this cache holds, `None` for
    /// all.
    ///
    /// # Errors
    /// `StaleHandle`, `InvalidState` while a step holds the sequence, `InvalidArgument` for another
    /// cache's slice, `Unsupported` where a window has left blocks behind (nothing is written then),
    /// `TierFailed` where `out` fails, `DeviceFailed`, `OutOfMemory`.
    pub fn export_blocks(
        &mut self,
        seq: SeqId,
        model: &str,
        slice: Option<&Slice>,
        out: &mut dyn Write,
    ) -> Result<usize> {
        let slices = self.part(slice)?.groups;
        let block_tokens = self.spec.block_tokens as usize;
        let sequence = self.sequences.get_idle(seq)?;
        let full = sequence.tokens.len() / block_tokens;
        // What is in the index is final.
        let blocks = self.prefix.as_ref().map_or(full, |_| sequence.published.blocks().min(full));
        if sequence.tables.iter().any(|table| table.left_blocks().min(blocks) > 0) {
            return Err(Error::Unsupported {
                what: "a sequence whose window has left blocks behind",
            });
        }
        let head = StreamHead {
            model: model.into(),
            keys: self.outside.seed(sequence.namespace),
            spec: self.spec.clone(),
            slices,
            tokens: sequence.tokens[..blocks * block_tokens].to_vec(),
            media: self.media.of_sequence(&sequence.media, blocks * block_tokens),
        };
        write_head(out, &head)?;
        let layouts = self.spec.layouts()?;
        let mut buffer = Vec::new();
        for block in 0..blocks {
            let bytes: usize = places(&layouts, block).map(|place| place.len()).sum();
            resize(&mut buffer, bytes)?;
            let sequence = self.sequences.get(seq)?;
            for (group, place) in places(&layouts, block).enumerate() {
                let (store, to) = (&self.stores[group], &mut buffer[place]);
                if block < self.sink_tiles(group) {
                    let slot = sequence.raw_slot(group, block).unwrap_or(BlockId::NONE);
                    store.read_raw(slot, 0, to)?;
                } else {
                    store.read_block(sequence.tables[group].blocks()[block], to)?;
                }
            }
            write_block(out, &buffer)?;
        }
        write_end(out)?;
        Ok(blocks * block_tokens)
    }

    /// Takes blocks from streams into the prefix index of `space`, where sequences that are started
    /// find them; how many tokens are there then. Several streams are parts of one: of the same
    /// tokens, and together with all layers and heads that this cache holds.
    ///
    /// # Errors
    /// `InvalidArgument` for streams that are damaged, of another model, namespace or format, or do
    /// not cover the cache's part; `TierFailed` where one fails or ends early; `Unsupported` for
    /// sealed tiles that would have to be cut, or beside other `sink_tokens`; `InvalidState` without prefix reuse; `OutOfBlocks`,
    /// `OutOfSequences`, `OutOfMemory`. Nothing is cached then.
    pub fn import_blocks(
        &mut self,
        streams: &mut [&mut dyn Read],
        model: &str,
        slice: Option<&Slice>,
        space: Namespace,
    ) -> Result<usize> {
        if self.prefix.is_none() {
            return Err(Error::InvalidState { why: "the cache reuses no prefixes" });
        }
        let slices = self.part(slice)?.groups;
        let mut sources = self.sources(streams, model, &slices, space)?;
        let Some(first) = sources.first() else {
            return Err(Error::invalid("streams", "must be at least one"));
        };
        let block_tokens = self.spec.block_tokens as usize;
        let blocks = first.head.tokens.len() / block_tokens;
        let tokens = first.head.tokens[..blocks * block_tokens].to_vec();
        let media: Vec<Media> = first.head.media.iter().map(Media::from_pair).collect();
        self.sequences.has_room()?;
        let media = self.place_media(&first.head.tokens, &media)?;
        let media = media.into_iter().filter(|placed| (placed.0 as usize) < tokens.len()).collect();
        let mut sequence = Sequence { namespace: space, tokens, media, ..Sequence::default() };
        sequence.tables.resize_with(self.pools.len(), BlockTable::new);
        sequence.raw.resize_with(self.pools.len(), Vec::new);
        let filled = self.fill(&mut sequence, &mut sources, blocks);
        let seq = self.keep(filled, sequence)?;
        let published = self.publish(seq);
        self.release(seq)?;
        published?;
        Ok(blocks * block_tokens)
    }

    /// The part of the model that the cache holds, as far as it can be.
    fn part(&self, slice: Option<&Slice>) -> Result<Slice> {
        let slice = slice.cloned().unwrap_or_else(|| Slice::whole(&self.spec));
        let fits = slice.groups.len() == self.spec.groups.len()
            && slice.groups.iter().zip(&self.spec.groups).all(|(part, group)| {
                (part.layers, part.heads) == (group.layers, group.kv_heads)
                    && part.first_layer.checked_add(part.layers).is_some()
                    && part.first_head.checked_add(part.heads).is_some()
            });
        if fits { Ok(slice) } else { Err(Error::invalid("slice", "must be the cache's own")) }
    }

    /// Reads the heads and checks them against the cache and each other.
    fn sources<'a>(
        &self,
        streams: &'a mut [&mut dyn Read],
        model: &str,
        slices: &[GroupSlice],
        space: Namespace,
    ) -> Result<Vec<Source<'a>>> {
        let layouts = self.spec.layouts()?;
        let mut covered: Vec<Vec<bool>> = slices
            .iter()
            .map(|part| alloc::vec![false; part.layers as usize * part.heads as usize])
            .collect();
        let mut sources: Vec<Source> = Vec::new();
        for from in streams {
            let head = read_head(*from)?;
            if head.model != model {
                return Err(Error::invalid("stream", "is of another model"));
            }
            if head.slices.len() != slices.len() {
                return Err(Error::invalid("stream", "has other layer groups"));
            }
            let other =
                |first: &Source| first.head.tokens != head.tokens || first.head.media != head.media;
            if sources.first().is_some_and(other) {
                return Err(Error::invalid("streams", "must be of the same tokens"));
            }
            let theirs = head.spec.layouts()?;
            let mut groups = Vec::new();
            for (n, layout) in theirs.iter().enumerate() {
                let ours = (&layouts[n], &slices[n]);
                groups.push(shared((layout, &head.slices[n]), ours, &mut covered[n])?);
            }
            // Formats are part of them: what those differ in has been named.
            if head.keys != self.outside.seed(space) {
                return Err(Error::invalid("stream", "is of another namespace"));
            }
            let (layouts, block) = (theirs, Vec::new());
            sources.push(Source { from: *from, head, groups, layouts, block, at: None });
        }
        if covered.iter().flatten().any(|covered| !covered) {
            return Err(Error::invalid("streams", "must have all layers and heads of the cache"));
        }
        Ok(sources)
    }

    /// Gives a sequence blocks and fills them from the streams, which end then.
    fn fill(&mut self, sequence: &mut Sequence, from: &mut [Source], blocks: usize) -> Result<()> {
        let block_tokens = self.spec.block_tokens as usize;
        let needed = u32::try_from(blocks).map_err(|_| Error::Overflow { what: "blocks" })?;
        self.make_sinks_free(0, blocks)?;
        self.reserve(|_| needed)?;
        for (table, pool) in sequence.tables.iter_mut().zip(&mut self.pools) {
            table.extend(pool, blocks * block_tokens, block_tokens)?;
        }
        self.take_sinks(sequence, 0, blocks)?;
        let layouts = self.spec.layouts()?;
        let mut buffer = Vec::new();
        for block in 0..blocks {
            let bytes: usize = places(&layouts, block).map(|place| place.len()).sum();
            resize(&mut buffer, bytes)?;
            for source in from.iter_mut() {
                let theirs = source.head.spec.block_tokens as usize;
                let (mut token, end) = (block * block_tokens, (block + 1) * block_tokens);
                while token < end {
                    source.advance(token / theirs)?;
                    let count = (theirs - token % theirs).min(end - token);
                    let there = places(&source.layouts, token / theirs);
                    let here = places(&layouts, block);
                    for (group, (here, there)) in source.groups.iter().zip(here.zip(there)) {
                        let (to, from) = (&mut buffer[here], &source.block[there]);
                        if group.whole {
                            to.copy_from_slice(from);
                        }
                        for &(theirs_at, ours_at, each) in &group.runs {
                            let at = ours_at + token % block_tokens * each;
                            let other = theirs_at + token % theirs * each;
                            let run = &from[other..other + count * each];
                            to[at..at + count * each].copy_from_slice(run);
                        }
                    }
                    token += count;
                }
            }
            for (group, place) in places(&layouts, block).enumerate() {
                let (store, from) = (&mut self.stores[group], &buffer[place]);
                if block < store.layout().sink_blocks() as usize {
                    let slot = sequence.raw_slot(group, block).unwrap_or(BlockId::NONE);
                    store.write_raw(slot, 0, from)?;
                } else {
                    store.write_block(sequence.tables[group].blocks()[block], from)?;
                }
            }
        }
        for source in from {
            // To the end: what comes behind is not lost to whoever reads on, and a stream that was
            // cut off is not taken for a shorter one.
            let theirs = source.head.spec.block_tokens as usize;
            if let Some(last) = (source.head.tokens.len() / theirs).checked_sub(1) {
                source.advance(last)?;
            }
            read_end(source.from)?;
        }
        Ok(())
    }
}
