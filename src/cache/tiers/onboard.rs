//! What comes back: prompts are looked for below the device, and loaded as far as that is worth it.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
use core::time::Duration;
use std::time::Instant;

use super::{Prefetch, Progress, TierOptions, Tiers};
use crate::cache::KvCache;
use crate::cache::media::{Media, keyed};
use crate::cache::sequence::Sequence;
use crate::cache::sinks::Held;
use crate::cache::store::Store;
use crate::error::{Error, Result};
use crate::ids::{BlockId, Namespace, TokenId};
use crate::layout::slice::Slice;
use crate::prefix::Hit;
use crate::tier::object::Label;
use crate::tier::spread::Spread;
use crate::tier::{
    Configuration, Decision, Found, HostBlock, Rate, Ticket, TierKind, TierReport, Want, decide_by,
};

impl KvCache {
    /// Gives the cache tiers. Blocks that are cached already take part from when they are next
    /// committed or found.
    ///
    /// # Errors
    /// `InvalidState` where the cache has tiers, reuses no prefixes, or has blocks in the index;
    /// `InvalidArgument` for options that cannot be; `OutOfMemory`, on a GPU where the system refuses as
    /// much page-locked memory ([`TierOptions::plain_memory`]); `DeviceFailed`. Nothing changed then.
    pub fn attach_tiers(&mut self, options: TierOptions) -> Result<()> {
        self.check_can_attach()?;
        let slice = options.slice.clone().unwrap_or_else(|| Slice::whole(&self.spec));
        let config = Configuration::new(&options.model, &self.spec, &slice)?;
        let (groups, blocks) = (self.pools.len(), self.pools[0].blocks());
        let tiers = Tiers::new(options, config, groups, blocks, self.backend.as_ref())?;
        self.enable_digests()?;
        self.tiers = Some(Box::new(tiers));
        self.tell_tiers();
        Ok(())
    }

    /// Whether this cache can be given tiers now: to be asked before a store is opened for it.
    ///
    /// # Errors
    /// `InvalidState` where [`attach_tiers`](Self::attach_tiers) would refuse any options.
    pub fn check_can_attach(&self) -> Result<()> {
        if self.tiers.is_some() {
            return Err(Error::InvalidState { why: "the cache has tiers already" });
        }
        let Some(prefix) = &self.prefix else {
            return Err(Error::InvalidState { why: "the cache reuses no prefixes" });
        };
        if prefix.len_blocks() > 0 {
            return Err(Error::InvalidState { why: "something is cached already" });
        }
        Ok(())
    }

    /// What the cache's blocks are: the configuration that its objects carry. `None` without tiers.
    pub fn configuration(&self) -> Option<&Configuration> {
        self.tiers.as_ref().map(|tiers| &tiers.config)
    }

    /// Why the last [`start`](Self::start) loaded as much from the host as it did.
    pub fn last_decision(&self) -> Option<Decision> {
        self.tiers.as_ref().and_then(|tiers| tiers.last)
    }

    /// What each tier counted, from the host down; empty without tiers.
    pub fn tier_reports(&self) -> Vec<TierReport> {
        let Some(tiers) = &self.tiers else { return Vec::new() };
        let rate = |rate: Rate| rate.latency().zip(rate.bandwidth());
        let mut counters = tiers.host_counters;
        counters.objects = tiers.host.len() as u64;
        counters.queued = tiers.on_their_way();
        counters.bytes = counters.objects * tiers.config.payload_bytes();
        let (page_locked, load_rate) = (tiers.buffers.are_locked(), rate(tiers.host_rate));
        let kind = TierKind::Host;
        let host = TierReport { kind, counters, page_locked, load_rate, refusal: None };
        let lower = tiers.lower.iter().map(|(tier, _)| TierReport {
            kind: tier.kind(),
            counters: tier.counters(),
            page_locked: false,
            load_rate: rate(tier.load_rate()),
            refusal: tier.refusal(),
        });
        core::iter::once(host).chain(lower).collect()
    }

    /// Begins to load what lower tiers have of a prompt, as far as loading is worth it, into host
    /// memory, from where [`start`](Self::start) takes it. Waits for nothing.
    ///
    /// # Errors
    /// `InvalidArgument` for an empty prompt, `InvalidState` without tiers.
    pub fn prefetch(&mut self, prompt: &[TokenId], space: Namespace) -> Result<Prefetch> {
        self.prefetch_with_media(prompt, &[], space)
    }

    /// The same for a prompt with media, as for
    /// [`start_with_media`](KvCache::start_with_media).
    ///
    /// # Errors
    /// As for both.
    pub fn prefetch_with_media(
        &mut self,
        prompt: &[TokenId],
        media: &[Media],
        space: Namespace,
    ) -> Result<Prefetch> {
        if prompt.is_empty() {
            return Err(Error::invalid("prompt", "must have at least one token"));
        }
        let placed = self.place_media(prompt, media)?;
        let prompt = &*keyed(prompt, &placed)?;
        let (Some(tiers), Some(prefix)) = (&mut self.tiers, &self.prefix) else {
            return Err(Error::InvalidState { why: "the cache has no tiers" });
        };
        tiers.see_ended();
        prefix.lookup(space, prompt, prompt.len() - 1, &mut self.hit);
        let block_tokens = self.spec.block_tokens as usize;
        let device = self.hit.tokens / block_tokens;
        let above = self.outside.digest_of(last_entry(&self.hit.blocks, self.pools.len()));
        let keys = (space, self.outside.seed(space));
        // Runs of blocks in the same place: `None` for the host, else a lower tier.
        let mut runs: Vec<(Option<usize>, Vec<Label>)> = Vec::new();
        let room = tiers.host.capacity();
        let mut recalled = Vec::new();
        for label in tiers.labels(prompt, &self.media, device, above, keys).take(room) {
            let lower = &tiers.lower;
            let place = if tiers.host.contains(&label.key) {
                None
            } else if let Some(block) = lower.iter().find_map(|(tier, _)| tier.recall(&label)) {
                recalled.push(block);
                None
            } else {
                match lower.iter().position(|(tier, _)| tier.may_have(&label.key)) {
                    Some(tier) => Some(tier),
                    None => break,
                }
            };
            match runs.last_mut() {
                Some((last, labels)) if *last == place => labels.push(label),
                _ => runs.push((place, alloc::vec![label])),
            }
        }
        recalled.into_iter().for_each(|block| tiers.keep(block));
        let found = runs.iter().map(|(place, labels)| Found {
            blocks: labels.len(),
            rate: place.map_or(tiers.host_rate, |tier| tiers.lower[tier].0.load_rate()),
        });
        let (mut left, decision) = tiers.decide(found, device, tiers.buffers.bytes() as u64);
        let (mut host_tokens, mut loads) = (0, Vec::new());
        for (n, (place, mut labels)) in runs.into_iter().enumerate() {
            labels.truncate(left);
            left -= labels.len();
            match place {
                Some(_) if labels.is_empty() => {}
                None => {
                    // Not to go for what comes.
                    for label in &labels {
                        tiers.host.touch(&label.key);
                    }
                    let whole = tiers.config.spread().whole(device, labels.len());
                    host_tokens += if n == 0 { whole * block_tokens } else { 0 };
                }
                Some(tier) => {
                    let wants =
                        labels.into_iter().enumerate().map(|(at, label)| Want { at, label });
                    let wants: Vec<Want> = wants.collect();
                    tiers.make_spare(wants.len());
                    loads.push((tier, tiers.lower[tier].0.load(wants)));
                }
            }
        }
        Ok(Prefetch { device_tokens: self.hit.tokens, host_tokens, decision, loads })
    }

    /// Takes what has arrived; whether more is to come. Waits for nothing.
    pub fn poll_prefetch(&mut self, prefetch: &mut Prefetch) -> Progress {
        self.take_arrived(prefetch, |ticket| ticket.is_done())
    }

    /// Waits until all of it has arrived, at most for `limit`. What has not by then is given up:
    /// counted, and computed like anything else that no tier has.
    pub fn wait_prefetch(&mut self, prefetch: &mut Prefetch, limit: Duration) -> Progress {
        let begin = Instant::now();
        let progress = self
            .take_arrived(prefetch, |ticket| ticket.wait(limit.saturating_sub(begin.elapsed())));
        self.give_up(prefetch);
        progress
    }

    fn take_arrived(
        &mut self,
        prefetch: &mut Prefetch,
        done: impl Fn(&Ticket) -> bool,
    ) -> Progress {
        if let Some(tiers) = &mut self.tiers {
            prefetch.loads.retain(|(_, ticket)| {
                let done = done(ticket);
                if done {
                    tiers.land(ticket);
                }
                !done
            });
        }
        if prefetch.loads.is_empty() { Progress::Done } else { Progress::Loading }
    }

    fn give_up(&mut self, prefetch: &mut Prefetch) {
        let Some(tiers) = &mut self.tiers else { return };
        for (tier, ticket) in prefetch.loads.drain(..) {
            ticket.cancel();
            if let Some((tier, _)) = tiers.lower.get(tier) {
                tier.timed_out();
            }
            tiers.land(&ticket);
        }
    }

    /// Copies everything that is cached, on the device and in the host, to the lower tiers that
    /// admit it, and waits until they have it, at most for `limit`; whether they do. What a full
    /// tier refuses is not waited for.
    pub fn flush_tiers(&mut self, limit: Duration) -> bool {
        let begin = Instant::now();
        let (Some(tiers), Some(prefix)) = (&mut self.tiers, &self.prefix) else { return true };
        let left = || limit.saturating_sub(begin.elapsed());
        let mut entries: Vec<BlockId> = Vec::new();
        prefix.for_each_chain(&mut |chain| entries.extend_from_slice(chain.blocks));
        for ids in entries.chunks_exact(tiers.groups) {
            if !tiers.make_way(left()) {
                return false;
            }
            let held = Held { stores: &self.stores, sinks: &self.sinks };
            for number in 0..tiers.objects(ids) {
                if number > 0 && !tiers.make_way(left()) {
                    return false;
                }
                let mut departure = tiers.board(held);
                tiers.write_through((ids, number), held, &mut departure, |_| true);
                tiers.depart(departure);
            }
        }
        let host: Vec<Arc<HostBlock>> = tiers.host.iter().cloned().collect();
        for block in host {
            if !tiers.make_way(left()) {
                return false;
            }
            tiers.pass_down(block);
        }
        tiers.lower.iter().all(|(tier, _)| tier.flush(left()))
    }

    /// Loads the blocks after `hit` that the host has of a prompt, given as the index has it, into new
    /// blocks at the end of the sequence's tables; how many tokens that are. What cannot be loaded is
    /// computed, so nothing here fails.
    pub(in crate::cache) fn onboard(
        &mut self,
        sequence: &mut Sequence,
        prompt: &[TokenId],
        hit: &Hit,
    ) -> usize {
        let block_tokens = self.spec.block_tokens as usize;
        let groups = self.pools.len();
        let Some(tiers) = &mut self.tiers else { return 0 };
        tiers.used(&hit.blocks);
        let above = self.outside.digest_of(last_entry(&hit.blocks, groups));
        let keys = (sequence.namespace, self.outside.seed(sequence.namespace));
        let skip = hit.tokens / block_tokens;
        let most = self.pools.iter().map(|pool| pool.free_blocks() + pool.cached_blocks()).min();
        let most = tiers.config.spread().span(skip, most.unwrap_or(0) as usize);
        let mut found = Vec::new();
        let labels: Vec<Label> = {
            // Computed up to the first that is not there.
            let host = &tiers.host;
            let labels = tiers.labels(prompt, &self.media, skip, above, keys);
            labels.take_while(|label| host.contains(&label.key)).collect()
        };
        for label in labels.iter().take(most) {
            match tiers.host.get(label) {
                Some(block) => found.push(block),
                None => break,
            }
        }
        let segment = Found { blocks: found.len(), rate: tiers.host_rate };
        let (objects, decision) = tiers.decide([segment], skip, tiers.config.payload_bytes());
        tiers.last = Some(decision);
        found.truncate(objects);
        let blocks = decision.blocks;
        if blocks == 0 || !self.has_slots(skip, blocks) {
            return 0;
        }
        if self.load_blocks(sequence, &found, (skip, blocks)).is_err() {
            // To what it was: nothing to allocate, so nothing to fail.
            let _ = self.cut_unborn(sequence, skip);
            return 0;
        }
        blocks * block_tokens
    }

    fn load_blocks(
        &mut self,
        sequence: &mut Sequence,
        found: &[Arc<HostBlock>],
        (first, blocks): (usize, usize),
    ) -> Result<()> {
        let block_tokens = self.spec.block_tokens as usize;
        self.make_sinks_free(first, blocks)?;
        self.reserve(|_| blocks as u32)?;
        for (table, pool) in sequence.tables.iter_mut().zip(&mut self.pools) {
            table.extend(pool, blocks * block_tokens, block_tokens)?;
        }
        self.take_sinks(sequence, first, blocks)?;
        if self.backend.is_some() {
            self.lift_blocks(sequence, found, first)?;
            if let Some(tiers) = &mut self.tiers {
                tiers.host_loaded(found.len(), None);
            }
            return Ok(());
        }
        let begin = Instant::now();
        let Some(tiers) = &self.tiers else { return Ok(()) };
        for (n, object) in found.iter().enumerate() {
            let (mut at, place) = (0, tiers.config.spread().place(first, n));
            for (group, store) in self.stores.iter_mut().enumerate() {
                let end = at + store.layout().block_bytes() as usize;
                let layers = 0..store.layout().spec().layers;
                let to = (&*sequence, group, layers);
                put_layers(store, to, tiers.config.spread(), place, &object.payload()[at..end])?;
                at = end;
            }
        }
        if let Some(tiers) = &mut self.tiers {
            tiers.host_loaded(found.len(), Some(begin.elapsed()));
        }
        Ok(())
    }
}

impl Tiers {
    /// How much of what was found is loaded behind `first` blocks that are there: so many objects of
    /// `bytes` bytes, all of some blocks; and why, in blocks.
    pub(super) fn decide(
        &self,
        found: impl IntoIterator<Item = Found>,
        first: usize,
        bytes: u64,
    ) -> (usize, Decision) {
        let (spread, block_tokens) = (self.config.spread(), u64::from(self.config.block_tokens()));
        // A block of which some objects are missing is not there.
        let mut found: Vec<Found> = found.into_iter().collect();
        let mut whole = found.iter().map(|part| part.blocks).sum();
        whole = spread.span(first, spread.whole(first, whole));
        for part in &mut found {
            part.blocks = part.blocks.min(whole);
            whole -= part.blocks;
        }
        let tokens = |objects: usize| spread.whole(first, objects) as u64 * block_tokens;
        let decision = decide_by(&found, tokens, first as u64 * block_tokens, bytes, &self.cost);
        let blocks = |objects: usize| spread.whole(first, objects);
        let in_blocks =
            Decision { blocks: blocks(decision.blocks), found: blocks(decision.found), ..decision };
        (spread.span(first, in_blocks.blocks), in_blocks)
    }
}

/// Copies the layers of a group that an object has (its block in the sequence, and its number of that)
/// to where they belong in host memory.
pub(super) fn put_layers(
    store: &mut Store,
    (sequence, group, layers): (&Sequence, usize, Range<u32>),
    spread: &Spread,
    (block, number): (usize, usize),
    from: &[u8],
) -> Result<()> {
    if block < store.layout().sink_blocks() as usize {
        let slot = sequence.raw_slot(group, block).unwrap_or(BlockId::NONE);
        let mut chunks = spread.chunks(group, number, layers);
        return chunks
            .try_for_each(|(to, at, bytes)| store.write_raw(slot, to, &from[at..at + bytes]));
    }
    if number > 0 {
        return Ok(());
    }
    let id = sequence.tables[group].blocks().get(block).copied().unwrap_or(BlockId::NONE);
    store.write_layers(id, layers.start, from)
}

/// The last of some entries; empty where there is none.
pub(super) fn last_entry(entries: &[BlockId], groups: usize) -> &[BlockId] {
    entries.rchunks_exact(groups).next().unwrap_or(&[])
}
