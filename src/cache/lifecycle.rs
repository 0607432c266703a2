//! Sequences begin, split and end: start from the prefix index, fork, truncate, release.

use super::media::{Media, keyed};
use super::sequence::Sequence;
use super::staging::release_raw;
use super::{KvCache, Started, reserve};
use crate::error::{Error, Result};
use crate::ids::{BlockId, Namespace, SeqId, TokenId};
use crate::metrics::Evicted;
use crate::pool::BlockTable;
use crate::prefix::{Hit, first_visible_block};

impl KvCache {
    /// Starts a sequence for `prompt`, holding whatever leading part of it the prefix index has in
    /// `namespace`: whole blocks shared, and of the block where it diverges the matching tokens
    /// copied (not where a format has sealed tiles: those are computed instead). At least the last prompt token is left to compute, since its logits are needed.
    ///
    /// The prompt itself is not kept: the engine feeds `prompt[cached_tokens..]` to its steps.
    ///
    /// # Errors
    /// `InvalidArgument` for an empty prompt, `OutOfSequences`, `OutOfMemory`. Nothing changed then.
    pub fn start(&mut self, prompt: &[TokenId], namespace: Namespace) -> Result<Started> {
        self.start_with_media(prompt, &[], namespace)
    }

    /// The same for a prompt in which tokens stand for `media`, ascending by position: what is
    /// before the first of them is shared with all prompts, what comes from then on with those that
    /// have the same media there. Only the first token of each counts. What of them the sequence holds
    /// cannot be truncated.
    ///
    /// A later turn that brings new media is a new sequence, whose prompt begins with this one.
    ///
    /// # Errors
    /// As for [`start`](Self::start); `InvalidArgument` for media out of order or past the prompt,
    /// `Overflow` after 2^31 different ones.
    pub fn start_with_media(
        &mut self,
        prompt: &[TokenId],
        media: &[Media],
        namespace: Namespace,
    ) -> Result<Started> {
        self.start_how(prompt, media, namespace, false)
    }

    /// The same, by layers where the tiers have it.
    pub(super) fn start_how(
        &mut self,
        prompt: &[TokenId],
        media: &[Media],
        namespace: Namespace,
        by_layers: bool,
    ) -> Result<Started> {
        if prompt.is_empty() {
            return Err(Error::invalid("prompt", "must have at least one token"));
        }
        if prompt.len() > i32::MAX as usize {
            return Err(Error::invalid("prompt", "must be shorter than 2^31 tokens"));
        }
        self.has_room()?;
        if let Some(tiers) = &mut self.tiers {
            tiers.see_ended();
        }
        self.outside.tick();
        let media = self.place_media(prompt, media)?;
        let mut sequence = Sequence { namespace, media, ..Sequence::default() };
        let mut hit = core::mem::take(&mut self.hit);
        let adopted = self.adopt(&mut sequence, prompt, &mut hit, by_layers);
        let loading = if sequence.load.is_some() { sequence.tokens.len() - hit.tokens } else { 0 };
        self.hit = hit;
        let seq = self.keep(adopted, sequence)?;
        let cached = self.tokens(seq)?.len();
        if self.tiers.is_some() {
            // What came from a tier is on the device for everybody. Where memory for the index is
            // refused, it is published with the next block that fills.
            self.publish_or_wait(seq)?;
        }
        self.totals.looked_up_tokens += prompt.len() as u64;
        // What is being loaded is a hit when it is there.
        self.totals.hit_tokens += (cached - loading) as u64;
        Ok(Started { seq, cached_tokens: cached as u32 })
    }

    /// Fills a new sequence with what the prefix index has of the prompt.
    fn adopt(
        &mut self,
        sequence: &mut Sequence,
        prompt: &[TokenId],
        hit: &mut Hit,
        by_layers: bool,
    ) -> Result<()> {
        let keys = keyed(prompt, &sequence.media)?;
        let (groups, block_tokens) = (self.pools.len(), self.spec.block_tokens as usize);
        reserve(&mut sequence.tables, groups)?;
        sequence.tables.resize_with(groups, BlockTable::new);
        reserve(&mut sequence.raw, groups)?;
        sequence.raw.resize_with(groups, Vec::new);
        let whole_blocks = self.any_tiled();
        let Some(prefix) = self.prefix.as_mut() else { return Ok(()) };
        prefix.lookup(sequence.namespace, &keys, keys.len() - 1, hit);
        prefix.touch(hit.at)?;
        self.outside.used(&hit.blocks);
        for (group, table) in sequence.tables.iter_mut().enumerate() {
            // What a window does not reach is not held, though the index may have it.
            let window = self.spec.groups[group].window.filter(|_| self.staging[group].is_none());
            let first = window.map_or(0, |w| first_visible_block(hit.tokens, w, block_tokens));
            let blocks = hit.blocks.iter().skip(group).step_by(groups).enumerate();
            let blocks = blocks.map(|(n, &id)| if n < first { BlockId::NONE } else { id });
            table.adopt(&mut self.pools[group], blocks, block_tokens)?;
        }
        self.adopt_sinks(sequence)?;
        let loaded = match by_layers {
            true => self.begin_load(sequence, &keys, hit),
            false => self.onboard(sequence, &keys, hit),
        };
        let more = match loaded {
            // Of a sealed tile nothing less than all can be taken.
            0 if whole_blocks => 0,
            0 => self.copy_tail(&mut sequence.tables, hit)?,
            loaded => loaded,
        };
        let cached = &prompt[..hit.tokens + more];
        reserve(&mut sequence.tokens, cached.len())?;
        sequence.tokens.extend_from_slice(cached);
        sequence.published = hit.at;
        Ok(())
    }

    /// Copies the matching tokens of the block at which the prompt diverges; how many. None where
    /// there is no room for a copy: those tokens are computed instead.
    fn copy_tail(&mut self, tables: &mut [BlockTable], hit: &Hit) -> Result<usize> {
        if hit.tail_tokens == 0 {
            return Ok(0);
        }
        // Referenced, so that making room for the copy cannot evict what is to be copied.
        for (pool, &source) in self.pools.iter_mut().zip(&hit.tail_blocks) {
            pool.retain(source)?;
        }
        let mut result = self.reserve(|_| 1);
        for (group, table) in tables.iter_mut().enumerate() {
            let (pool, source) = (&mut self.pools[group], hit.tail_blocks[group]);
            result = result.and_then(|()| {
                table.extend(pool, hit.tail_tokens, self.spec.block_tokens as usize)?;
                let target = table.blocks().last().copied().unwrap_or(BlockId::NONE);
                self.stores[group].copy_tokens(source, target, hit.tail_tokens as u32)
            });
        }
        for (pool, &source) in self.pools.iter_mut().zip(&hit.tail_blocks) {
            pool.release(source)?;
        }
        match result {
            Ok(()) => {
                self.totals.copied_blocks += tables.len() as u64;
                Ok(hit.tail_tokens)
            }
            Err(Error::OutOfBlocks { .. }) => Ok(0),
            Err(error) => Err(error),
        }
    }

    /// Refuses where no sequence can be added.
    fn has_room(&mut self) -> Result<()> {
        self.sequences.has_room().inspect_err(|error| self.outside.refused(error))
    }

    /// Gives a finished sequence an id; what it holds is given back where that or what made it
    /// failed.
    pub(super) fn keep(&mut self, made: Result<()>, mut sequence: Sequence) -> Result<SeqId> {
        let made = made.and_then(|()| self.sequences.has_room());
        if let Err(error) = made {
            if let Some(mut load) = sequence.load.take() {
                self.leave_load(&mut load)?;
            }
            for (table, pool) in sequence.tables.iter_mut().zip(&mut self.pools) {
                table.release_all(pool)?;
            }
            release_raw(&mut sequence.raw, &mut self.staging)?;
            return Err(error);
        }
        self.sequences.insert(sequence)
    }

    /// A second sequence with the same tokens, sharing every block. Whichever of the two next
    /// writes to the last, partly full block gets a copy of it.
    ///
    /// # Errors
    /// `StaleHandle`, `InvalidState` while a step holds the sequence or it is being loaded,
    /// `OutOfSequences`, `OutOfMemory`.
    pub fn fork(&mut self, seq: SeqId) -> Result<SeqId> {
        self.has_room()?;
        let parent = self.sequences.get_whole(seq)?;
        let mut child = Sequence { namespace: parent.namespace, ..Sequence::default() };
        child.published = parent.published;
        let mut made = reserve(&mut child.tokens, parent.tokens.len());
        made = made.and_then(|()| reserve(&mut child.media, parent.media.len()));
        made = made.and_then(|()| reserve(&mut child.tables, parent.tables.len()));
        made = made.and_then(|()| reserve(&mut child.raw, parent.raw.len()));
        if made.is_ok() {
            child.tokens.extend_from_slice(&parent.tokens);
            child.media.extend_from_slice(&parent.media);
            child.raw.resize_with(parent.raw.len(), Vec::new);
            for (group, staged) in parent.raw.iter().enumerate() {
                made = made.and_then(|()| reserve(&mut child.raw[group], staged.len()));
                for staged in staged {
                    made = made.and_then(|()| {
                        if let Some(pool) = &mut self.staging[group] {
                            pool.retain(staged.slot)?;
                        }
                        child.raw[group].push(*staged);
                        Ok(())
                    });
                }
            }
            for (table, pool) in parent.tables.iter().zip(&mut self.pools) {
                made = made.and_then(|()| {
                    child.tables.push(table.fork(pool)?);
                    Ok(())
                });
            }
        }
        self.keep(made, child)
    }

    /// Forgets all tokens of a sequence from position `tokens` on (rejected speculation). With a
    /// sliding window, to lengths that the window has not left behind: those since the sequence's
    /// last `begin`, and as many more as its blocks allow.
    ///
    /// A format with sealed tiles takes any position in the last tile and, of the last step, in the
    /// one before it: their raw rows are there. Further back it takes multiples of `block_tokens`.
    ///
    /// # Errors
    /// `StaleHandle`, `InvalidState` while a step holds the sequence or it is being loaded, or where a
    /// window has left that length behind, `InvalidArgument` past its length, or within a tile that is sealed for
    /// good, or where a medium that it holds would be cut off. Nothing changed then.
    pub fn truncate(&mut self, seq: SeqId, tokens: u32) -> Result<()> {
        let sequence = self.sequences.get_whole(seq)?;
        if tokens as usize > sequence.tokens.len() {
            return Err(Error::invalid("tokens", "must be at most the sequence's length"));
        }
        sequence.check_media(tokens as usize)?;
        self.check_window(seq, tokens as usize)?;
        self.check_cut(seq, tokens as usize)?;
        self.cut_raw(seq, tokens as usize)?;
        let sequence = self.sequences.get_mut(seq)?;
        for (table, pool) in sequence.tables.iter_mut().zip(&mut self.pools) {
            table.truncate(pool, tokens as usize, self.spec.block_tokens as usize)?;
        }
        sequence.tokens.truncate(tokens as usize);
        let whole = (tokens / self.spec.block_tokens) as usize;
        sequence.published = sequence.published.first(whole);
        self.scrub()
    }

    /// Ends a sequence, and its load. Its published blocks stay in the prefix index until they are
    /// evicted.
    ///
    /// # Errors
    /// `StaleHandle`, `InvalidState` while a step holds the sequence.
    pub fn release(&mut self, seq: SeqId) -> Result<()> {
        let load = self.sequences.get_idle(seq)?.load.take();
        load.map_or(Ok(()), |mut load| self.leave_load(&mut load))?;
        self.end_use(seq);
        let mut sequence = self.sequences.remove(seq)?;
        for (table, pool) in sequence.tables.iter_mut().zip(&mut self.pools) {
            table.release_all(pool)?;
        }
        release_raw(&mut sequence.raw, &mut self.staging)?;
        self.scrub()
    }

    /// The tokens of a sequence whose K and V are in the cache.
    ///
    /// # Errors
    /// `StaleHandle`.
    pub fn tokens(&self, seq: SeqId) -> Result<&[TokenId]> {
        Ok(&self.sequences.get(seq)?.tokens)
    }

    /// The blocks of a sequence in one layer group, in order.
    ///
    /// # Errors
    /// `StaleHandle`; `InvalidArgument` for a group that the spec does not have.
    pub fn blocks(&self, seq: SeqId, group: u32) -> Result<&[BlockId]> {
        let tables = &self.sequences.get(seq)?.tables;
        let table =
            tables.get(group as usize).ok_or(Error::invalid("group", "is not in the spec"))?;
        Ok(table.blocks())
    }

    /// Drops everything from the prefix index that no sequence uses. Tiers keep their copies, for
    /// prompts to find again.
    ///
    /// # Errors
    /// None in practice: a failure is a bug in the library.
    pub fn clear_prefix(&mut self) -> Result<()> {
        let most = self.prefix.as_ref().map_or(0, |prefix| prefix.len_blocks() as u32);
        self.evict(most, Evicted::Cleared)?;
        self.forget_windows()?;
        self.scrub()
    }
}
