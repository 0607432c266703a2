//! What a cache shows the outside: digests of its committed blocks, KV events, metrics.
//!
//! Digests, events and block times are off until asked for. What they do inside a step cannot fail
//! and waits for nobody: events go to a bounded queue, times are read once a call.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use std::time::Instant;

use super::digests::Digests;
use super::media::MediaKeys;
use super::whereabouts::{Seeds, Whereabouts};
use super::{KvCache, reserve};
use crate::error::{Error, Result};
use crate::events::{AttentionKind, Locked, Medium, Name, Queue, QueueStats, Shape};
use crate::ids::{BlockId, Namespace, TokenId};
use crate::layout::GroupSpec;
use crate::metrics::{CacheMetrics, Counters, Evicted, Histogram, Watch};
use crate::prefix::{Chain, Digest, Keys, PrefixIndex};

/// Blocks that a queue of events has room for, unless its owner says otherwise: what an engine may
/// commit while the publisher rests.
const LEAST_CAPACITY: usize = 1 << 16;

/// The most bytes of a salt or of an adapter's name.
const MOST_NAME_BYTES: usize = 255;

/// What is shown.
#[derive(Debug)]
pub(super) struct Outside {
    groups: usize,
    digests: Option<Digests>,
    seeds: Seeds,
    /// Namespaces of which more is known than the number.
    names: BTreeMap<Namespace, Arc<Name>>,
    queue: Option<Arc<Queue>>,
    /// The blocks of the tiers, where there are tiers and a queue.
    below: Option<Arc<Whereabouts>>,
    watch: Option<Box<Watch>>,
    /// Where the time comes from; `None`: the caller sets it.
    clock: Option<Instant>,
    now_ms: u64,
    counters: Counters,
}

impl Outside {
    pub(super) fn new(groups: usize) -> Self {
        Outside {
            groups,
            digests: None,
            seeds: Seeds::default(),
            names: BTreeMap::new(),
            queue: None,
            below: None,
            watch: None,
            clock: Some(Instant::now()),
            now_ms: 0,
            counters: Counters::default(),
        }
    }

    /// Reads the clock for the call that begins, if times are kept.
    pub(super) fn tick(&mut self) {
        if let (Some(start), Some(_)) = (self.clock, &self.watch) {
            self.now_ms = start.elapsed().as_millis() as u64;
        }
    }

    /// Blocks were put into the index; `before` are the sequence's tokens before them.
    pub(super) fn stored(&mut self, chain: &Chain, before: &[TokenId], media: &MediaKeys) {
        let seed = self.seed(chain.space);
        if let Some(digests) = &mut self.digests {
            digests.fill(chain, before, seed, media);
            if let Some(queue) = &self.queue {
                digests.tell_stored(chain, seed, media, &mut queue.lock());
            }
        }
        if let Some(watch) = &mut self.watch {
            // The first group stands for all.
            for &id in chain.blocks.iter().step_by(self.groups) {
                watch.cached(id, self.now_ms);
            }
        }
    }

    /// The digest of an entry, from any group that has a block of it.
    pub(super) fn digest_of(&self, entry: &[BlockId]) -> Option<Digest> {
        self.digests.as_ref()?.of_entry(entry)
    }

    /// What stands before a chain; `before` are the sequence's tokens before it.
    pub(super) fn digest_before(
        &self,
        chain: &Chain,
        before: &[TokenId],
        media: &MediaKeys,
    ) -> Option<Digest> {
        self.digests.as_ref()?.before(chain, before, self.seed(chain.space), media)
    }

    /// What stands before the first block of a sequence.
    pub(super) fn seed(&self, space: Namespace) -> Option<Digest> {
        self.seeds.seed(space)
    }

    /// Says how K and V are stored, before anything is; empty for floats alone, whose digests are
    /// those that other stores know.
    pub(super) fn set_storage(&mut self, storage: Vec<u8>) {
        if let Some(below) = &self.below {
            below.set_storage(storage.clone());
        }
        self.seeds.storage = storage;
    }

    /// Cached entries (`[entry][group]`) were found by a lookup.
    pub(super) fn used(&mut self, entries: &[BlockId]) {
        if let Some(watch) = &mut self.watch {
            for &id in entries.iter().step_by(self.groups) {
                watch.used(id, self.now_ms);
            }
        }
    }

    /// Entries (`[entry][group]`) were taken out of the index.
    pub(super) fn evicted(&mut self, entries: &[BlockId], why: Evicted) {
        self.counters.evicted_blocks[why as usize] += (entries.len() / self.groups) as u64;
        if let (Some(digests), Some(queue)) = (&self.digests, &self.queue) {
            digests.tell_removed(entries, &mut queue.lock());
        }
        if let Some(watch) = &mut self.watch {
            for &id in entries.iter().step_by(self.groups) {
                watch.evicted(id, self.now_ms);
            }
        }
    }

    /// A block of one group was taken out of its entry.
    pub(super) fn forgotten(&mut self, group: usize, block: BlockId, why: Evicted) {
        self.counters.evicted_blocks[why as usize] += 1;
        if let (Some(digests), Some(queue)) = (&self.digests, &self.queue)
            && let Some(digest) = digests.of(group, block)
        {
            queue.lock().removed(Medium::Gpu, group as u32, digest);
        }
        if let (0, Some(watch)) = (group, &mut self.watch) {
            watch.evicted(block, self.now_ms);
        }
    }

    /// A call failed for want of something.
    pub(super) fn refused(&mut self, error: &Error) {
        match error {
            Error::OutOfBlocks { missing, .. } => {
                self.counters.out_of_blocks += 1;
                self.counters.missing_blocks += u64::from(*missing);
            }
            Error::OutOfSequences { .. } => self.counters.out_of_sequences += 1,
            _ => {}
        }
    }

    /// Queues all that is resident, if events were lost and the publisher has said so.
    pub(super) fn resync(&self, prefix: Option<&PrefixIndex>, media: &MediaKeys) {
        if self.queue.as_ref().is_some_and(|queue| queue.lock().wants_resync()) {
            self.tell_all(prefix, media);
        }
    }

    /// Tells everything anew.
    fn tell_all(&self, prefix: Option<&PrefixIndex>, media: &MediaKeys) {
        let device = |queue: &mut Locked| {
            if let (Some(prefix), Some(digests)) = (prefix, &self.digests) {
                prefix.for_each_chain(&mut |chain| {
                    digests.tell_stored(&chain, self.seed(chain.space), media, queue);
                });
            }
        };
        match (&self.queue, &self.below) {
            (Some(queue), Some(below)) => below.tell_all(queue, device),
            (Some(queue), None) => {
                let mut queue = queue.lock();
                queue.restart();
                device(&mut queue);
            }
            (None, _) => {}
        }
    }
}

impl Drop for Outside {
    /// What is gone is cleared.
    fn drop(&mut self) {
        if let Some(below) = &self.below {
            below.detach();
        }
        if let Some(queue) = &self.queue {
            queue.lock().restart();
        }
    }
}

/// What events say of the attention of a layer group.
fn kind(group: &GroupSpec) -> AttentionKind {
    match (group.v_in_k, group.window) {
        (false, None) => AttentionKind::Full,
        (true, None) => AttentionKind::Latent,
        (false, Some(tokens)) => AttentionKind::Window(tokens),
        (true, Some(tokens)) => AttentionKind::LatentWindow(tokens),
    }
}

impl KvCache {
    /// Computes the digest of every cached block now, and from now on of each block that is
    /// committed. Does nothing where that is so already.
    ///
    /// # Errors
    /// `OutOfMemory` where 32 bytes a block and group are refused. Nothing changed then.
    pub fn enable_digests(&mut self) -> Result<()> {
        if self.outside.digests.is_none() {
            let (groups, blocks) = (self.pools.len(), self.pools[0].blocks());
            let mut digests = Digests::new(self.spec.block_tokens, groups, blocks)?;
            if let Some(prefix) = &self.prefix {
                prefix.for_each_chain(&mut |chain| {
                    digests.fill(&chain, &[], self.outside.seed(chain.space), &self.media);
                });
            }
            self.outside.digests = Some(digests);
        }
        Ok(())
    }

    /// Says what a namespace is in the server's words, before anything is cached in it: its digests
    /// are then the same in every process that says the same, and KV events carry salt and adapter.
    /// Without it a namespace is its number.
    ///
    /// # Errors
    /// `InvalidState` where something is cached in it; `InvalidArgument` for a salt or an adapter
    /// above 255 bytes.
    pub fn describe_namespace(&mut self, space: Namespace, keys: &Keys) -> Result<()> {
        if keys.salt.len() > MOST_NAME_BYTES || keys.lora.len() > MOST_NAME_BYTES {
            return Err(Error::invalid("salt, lora", "must be at most 255 bytes"));
        }
        if self.prefix.as_ref().is_some_and(|prefix| prefix.has_namespace(space)) {
            return Err(Error::InvalidState { why: "something is cached in the namespace" });
        }
        let name = Arc::new(Name { salt: keys.salt.into(), lora: keys.lora.into() });
        if let Some(queue) = &self.outside.queue {
            queue.set_name(space, name.clone());
        }
        let digest = Digest::of_keys(keys);
        self.outside.names.insert(space, name);
        self.outside.seeds.described.insert(space, digest);
        if let Some(below) = &self.outside.below {
            below.describe(space, digest);
        }
        Ok(())
    }

    /// The digest of a cached block of a layer group. `None` for a block that is not in the prefix
    /// index, and without [`Self::enable_digests`].
    pub fn digest(&self, group: u32, block: BlockId) -> Option<Digest> {
        let cached = self.pools.get(group as usize)?.is_cached(block);
        let digests = self.outside.digests.as_ref().filter(|_| cached)?;
        digests.of(group as usize, block)
    }

    /// Queues KV events from now on, beginning with [`Event::Cleared`] and all that is resident.
    /// The queue is for one [`Publisher`] and holds `capacity_blocks` blocks of events; 0 for twice
    /// what the cache itself has, and no less than 65,536.
    ///
    /// [`Event::Cleared`]: crate::events::Event::Cleared
    /// [`Publisher`]: crate::events::Publisher
    ///
    /// # Errors
    /// `InvalidState` where the cache queues events already, or reuses no prefixes;
    /// `InvalidArgument` for a capacity below the blocks of all groups; `OutOfMemory`.
    pub fn enable_events(&mut self, capacity_blocks: usize) -> Result<Arc<Queue>> {
        if self.outside.queue.is_some() {
            return Err(Error::InvalidState { why: "the cache has its events published already" });
        }
        if self.prefix.is_none() {
            return Err(Error::InvalidState { why: "the cache reuses no prefixes" });
        }
        let resident = self.pools.iter().map(|pool| pool.blocks() as usize).sum::<usize>();
        let capacity = match capacity_blocks {
            0 => resident.saturating_mul(2).max(LEAST_CAPACITY),
            given => given,
        };
        if capacity < resident {
            let why = "must be at least the blocks of all layer groups";
            return Err(Error::invalid("capacity_blocks", why));
        }
        let mut groups = Vec::new();
        reserve(&mut groups, self.spec.groups.len())?;
        groups.extend(self.spec.groups.iter().map(kind));
        let queue = Queue::new(Shape { block_tokens: self.spec.block_tokens, groups }, capacity)?;
        self.enable_digests()?;
        for (&space, name) in &self.outside.names {
            queue.set_name(space, name.clone());
        }
        self.outside.queue = Some(queue.clone());
        self.watch_tiers();
        self.outside.tell_all(self.prefix.as_ref(), &self.media);
        Ok(queue)
    }

    /// Begins to watch the tiers, once there are both tiers and events; whether it begins now.
    pub(super) fn watch_tiers(&mut self) -> bool {
        let (Some(tiers), Outside { queue: Some(_), below: below @ None, seeds, .. }) =
            (&mut self.tiers, &mut self.outside)
        else {
            return false;
        };
        let all = Whereabouts::new(seeds.clone());
        tiers.watch(&all);
        *below = Some(all);
        true
    }

    /// The same for tiers that come after the events, and tells what they have.
    pub(super) fn tell_tiers(&mut self) {
        if self.watch_tiers() {
            self.outside.tell_all(self.prefix.as_ref(), &self.media);
        }
    }

    /// Queues no more events to `queue`; the last one says that everything is cleared. Does nothing
    /// for a queue that is not this cache's.
    pub fn disable_events(&mut self, queue: &Arc<Queue>) {
        if self.outside.queue.as_ref().is_some_and(|own| Arc::ptr_eq(own, queue)) {
            self.outside.queue = None;
            if let Some(below) = &self.outside.below {
                below.detach();
            }
            queue.lock().restart();
        }
    }

    /// Queues [`Event::Cleared`] and then everything resident as stored, in place of all that
    /// still waits: for consumers that come late or have lost track. Takes time in proportion to
    /// what is resident.
    ///
    /// [`Event::Cleared`]: crate::events::Event::Cleared
    ///
    /// # Errors
    /// `InvalidState` where the cache queues no events.
    pub fn snapshot_events(&self) -> Result<()> {
        if self.outside.queue.is_none() {
            return Err(Error::InvalidState { why: "the cache publishes no events" });
        }
        self.outside.tell_all(self.prefix.as_ref(), &self.media);
        Ok(())
    }

    /// What its queue of events has seen; `None` where it queues none.
    pub fn event_stats(&self) -> Option<QueueStats> {
        self.outside.queue.as_ref().map(|queue| queue.stats())
    }

    /// Keeps the times of every `every`-th block from now on, for the histograms of
    /// [`Self::metrics`], which begin anew; 0 for none. The clock is read once in each `begin` and
    /// `start`, or never after [`Self::set_time`].
    ///
    /// # Errors
    /// `OutOfMemory` where 8 bytes a watched block are refused. Nothing changed then.
    pub fn watch_blocks(&mut self, every: u32) -> Result<()> {
        let mut watch = match every {
            0 => None,
            _ => Some(Box::new(Watch::new(every, self.pools[0].blocks())?)),
        };
        core::mem::swap(&mut self.outside.watch, &mut watch);
        self.outside.tick();
        self.begin_times();
        Ok(())
    }

    /// The times of all cached blocks begin now.
    fn begin_times(&mut self) {
        let now_ms = self.outside.now_ms;
        if let (Some(watch), Some(prefix)) = (&mut self.outside.watch, &self.prefix) {
            prefix.for_each_block(&mut |ids| watch.cached(ids[0], now_ms));
        }
    }

    /// Sets the time, in milliseconds since whenever the caller likes; the system's clock is not
    /// read from now on. Earlier than before counts as no time passed.
    pub fn set_time(&mut self, now_ms: u64) {
        if self.outside.clock.take().is_some() {
            // Another clock: what was timed by the old one means nothing on it.
            self.outside.now_ms = now_ms;
            self.begin_times();
        }
        self.outside.now_ms = self.outside.now_ms.max(now_ms);
    }

    /// Everything that is counted and timed.
    pub fn metrics(&self) -> CacheMetrics {
        let (stats, outside) = (self.stats(), &self.outside);
        let none = Histogram::default();
        let times = outside.watch.as_ref();
        CacheMetrics {
            blocks: stats.blocks,
            referenced_blocks: stats.referenced_blocks,
            cached_blocks: stats.cached_blocks,
            sequences: stats.sequences,
            queries_tokens: stats.looked_up_tokens,
            hits_tokens: stats.hit_tokens,
            counters: outside.counters,
            watched_every: times.map_or(0, |watch| watch.every()),
            lifetime: times.map_or(none, |watch| watch.lifetime),
            idle_before_evict: times.map_or(none, |watch| watch.idle_before_evict),
            reuse_gap: times.map_or(none, |watch| watch.reuse_gap),
            dropped_events: outside.queue.as_ref().map_or(0, |q| q.stats().dropped_events),
        }
    }
}
