//! What goes down: the blocks that the device evicts or commits, as far as the options admit them.
//! Inside a step; nothing here fails or waits. From a device they are copied together, when all of them
//! are known (`lift.rs`). A block with raw rows goes down as the objects that it is spread over
//! (`tier/spread.rs`), each for itself.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::time::Duration;

use super::lift::{Departure, Lift};
use super::{Demotion, LowerTier, TierOptions};
use crate::cache::media::MediaKeys;
use crate::cache::outside::Outside;
use crate::cache::reserve;
use crate::cache::sinks::Held;
use crate::cache::whereabouts::{Shelf, Whereabouts};
use crate::device::Backend;
use crate::error::{Error, Result};
use crate::ids::{BlockId, Namespace, TokenId};
use crate::prefix::{Chain, DEFAULT_PRIORITY, Digest};
use crate::tier::buffer::{Buffer, Buffers};
use crate::tier::object::{HEAD_BYTES, Label, Nth, Origin, object_bytes};
use crate::tier::{
    Configuration, CopyState, Decision, HostBlock, HostTier, ObjectKey, PrefillCost, Rate, Ticket,
    Tier, TierCounters, TierKind, Watcher,
};

/// What is remembered of each cached block, by the id of its first group.
#[derive(Debug, Clone, Default)]
struct Note {
    /// Of the first of its objects.
    label: Option<Box<Label>>,
    priority: u8,
    uses: u32,
    /// How many steps had begun on the device when it was cached.
    steps: u64,
}

/// The tiers at work.
#[derive(Debug)]
pub(in crate::cache) struct Tiers {
    pub config: Configuration,
    pub host: HostTier,
    /// Whether what the device evicts stays in the host; else it only passes through.
    keeps: bool,
    host_demotion: Demotion,
    pub host_counters: TierCounters,
    pub host_rate: Rate,
    pub lower: Vec<(Tier, Demotion)>,
    pub buffers: Arc<Buffers>,
    pub cost: PrefillCost,
    notes: Vec<Note>,
    /// Where the host's blocks are told, if they are.
    shelf: Option<Arc<Shelf>>,
    /// `None` for a cache on the CPU.
    pub(super) lift: Option<Lift>,
    pub groups: usize,
    /// Why the last start loaded as much as it did.
    pub last: Option<Decision>,
}

/// The labels of the blocks of a prompt from some block on, those of their first objects, computed as
/// they are asked for. Tokens are as the index has them.
pub(super) struct Labels<'a> {
    config: &'a Configuration,
    media: &'a MediaKeys,
    space: Namespace,
    keys: Option<Digest>,
    parent: Option<Digest>,
    tokens: core::slice::ChunksExact<'a, TokenId>,
    /// The number of the next block in its sequence.
    index: usize,
}

impl Iterator for Labels<'_> {
    type Item = Label;

    fn next(&mut self) -> Option<Label> {
        let tokens = self.tokens.next()?;
        let parent = self.parent;
        let nth = Nth { of: self.config.spread().objects(self.index) as u8, ..Nth::ONLY };
        self.index += 1;
        Some(self.media.tell(tokens, |tokens, media| {
            let block = Digest::of_block_with_media(parent.as_ref(), tokens, media);
            self.parent = Some(block);
            let key = self.config.key(&block);
            let keys = Digest::of_media(self.keys.as_ref(), media);
            let origin = Origin { space: self.space, seed: self.keys, media: media.into() };
            Label { key, block, parent, keys, tokens: tokens.into(), origin, nth }
        }))
    }
}

impl Tiers {
    pub(super) fn new(
        options: TierOptions,
        config: Configuration,
        groups: usize,
        blocks: u32,
        backend: Option<&Arc<dyn Backend>>,
    ) -> Result<Self> {
        let bytes = object_bytes(config.payload_bytes())
            .and_then(|bytes| usize::try_from(bytes).ok())
            .ok_or(Error::Overflow { what: "object bytes" })?;
        if options.transit_blocks == 0 {
            return Err(Error::invalid("transit_blocks", "must be at least 1"));
        }
        let keeps = options.host_blocks > 0;
        // Where nothing is kept, what comes from below still has to land somewhere.
        let landing = options.transit_blocks.div_ceil(2);
        let host = HostTier::new(if keeps { options.host_blocks } else { landing });
        let limit = host
            .capacity()
            .checked_add(options.transit_blocks)
            .ok_or(Error::Overflow { what: "host blocks" })?;
        let buffers = match backend {
            None => Buffers::new(bytes, limit),
            Some(backend) => Buffers::on(backend, bytes, limit, !options.plain_memory)?,
        };
        let mut notes = Vec::new();
        reserve(&mut notes, blocks as usize)?;
        notes.resize(blocks as usize, Note::default());
        let mut lower = Vec::new();
        for tier in options.lower {
            let LowerTier { store, settings, demotion } = tier;
            lower.push((Tier::new(store, config.clone(), buffers.clone(), settings)?, demotion));
        }
        Ok(Self {
            config,
            host,
            keeps,
            host_demotion: options.host_demotion,
            host_counters: TierCounters::default(),
            host_rate: Rate::new(),
            lower,
            buffers,
            cost: options.prefill_cost,
            notes,
            shelf: None,
            lift: backend.map(|backend| Lift::new(backend, options.ahead_blocks)).transpose()?,
            groups,
            last: None,
        })
    }

    /// Tells from now on which blocks the tiers have, and before that which they have now.
    pub(in crate::cache) fn watch(&mut self, all: &Arc<Whereabouts>) {
        let shelf = all.shelf(0, TierKind::Host);
        let labels: Vec<&Label> = self.host.iter().map(|block| &block.label).collect();
        shelf.changed(&[], &labels);
        self.shelf = Some(shelf);
        for ((tier, _), number) in self.lower.iter().zip(1..) {
            let shelf = all.shelf(number, tier.kind());
            if !tier.watch(shelf.clone()) {
                shelf.unsure();
            }
        }
    }

    /// Entries were put into the index, or blocks back into entries that had lost them;
    /// [`BlockId::NONE`] stands for blocks that stay as they were. `before` are the sequence's
    /// tokens before the chain.
    pub(in crate::cache) fn stored(
        &mut self,
        chain: &Chain,
        before: &[TokenId],
        (outside, media): (&Outside, &MediaKeys),
        held: Held,
    ) {
        let keys = outside.seed(chain.space);
        let parent = outside.digest_before(chain, before, media);
        let block_tokens = self.config.block_tokens() as usize;
        let tokens = chain.tokens.chunks_exact(block_tokens);
        let (space, index) = (chain.space, before.len() / block_tokens);
        let labels = Labels { config: &self.config, media, space, keys, parent, tokens, index };
        for (ids, label) in chain.blocks.chunks_exact(self.groups).zip(labels) {
            if let Some(note) = self.notes.get_mut(ids[0].index()) {
                let label = Some(Box::new(label));
                let steps = self.lift.as_ref().map_or(0, Lift::steps);
                *note = Note { label, priority: DEFAULT_PRIORITY, uses: 0, steps };
            }
        }
        if self.lower.iter().any(|(_, demotion)| demotion.on_commit) {
            let mut departure = self.board(held);
            for ids in chain.blocks.chunks_exact(self.groups) {
                for number in 0..self.objects(ids) {
                    let block = (ids, number);
                    self.write_through(block, held, &mut departure, |demotion| demotion.on_commit);
                }
            }
            self.depart(departure);
        }
    }

    /// Objects that the block of an entry is spread over.
    pub(super) fn objects(&self, ids: &[BlockId]) -> u8 {
        let note = self.notes.get(ids[0].index());
        note.and_then(|note| note.label.as_ref()).map_or(1, |label| label.nth.of)
    }

    /// Cached entries were found by a lookup.
    pub(in crate::cache) fn used(&mut self, entries: &[BlockId]) {
        for ids in entries.chunks_exact(self.groups) {
            if let Some(note) = self.notes.get_mut(ids[0].index()) {
                note.uses = note.uses.saturating_add(1);
            }
        }
    }

    /// Entries were given a priority.
    pub(in crate::cache) fn prioritized(&mut self, id: BlockId, priority: u8) {
        if let Some(note) = self.notes.get_mut(id.index()) {
            note.priority = priority;
        }
    }

    /// Entries are about to leave the device; their blocks are as they were.
    pub(in crate::cache) fn evicted(&mut self, entries: &[BlockId], held: Held, demote: bool) {
        let mut departure = self.board(held);
        for ids in entries.chunks_exact(self.groups) {
            if demote {
                for number in 0..self.objects(ids) {
                    self.demote((ids, number), held, &mut departure);
                }
            }
            if let Some(note) = self.notes.get_mut(ids[0].index()) {
                *note = Note::default();
            }
        }
        self.depart(departure);
    }

    /// Of a block, the object of a number.
    fn demote<'a>(
        &mut self,
        (ids, number): (&[BlockId], u8),
        held: Held<'a>,
        departure: &mut Option<Departure<'a>>,
    ) {
        let Some(note) = self.notes.get(ids[0].index()) else { return };
        let Some(label) = &note.label else { return };
        if !(self.keeps && self.host_demotion.admits(note)) {
            return self.write_through((ids, number), held, departure, |_| true);
        }
        if self.host.touch(&self.key_of(label, number)) {
            self.host_counters.present += 1;
            return;
        }
        match self.capture((ids, number), held, departure) {
            Some(block) => {
                match departure {
                    // Counted when it has come.
                    Some(departure) => departure.keep(block.label.key),
                    None => {
                        self.host_counters.stored += 1;
                        self.host_counters.stored_bytes += self.config.payload_bytes();
                    }
                }
                self.keep(block);
            }
            None => self.host_counters.dropped += 1,
        }
    }

    fn key_of(&self, first: &Label, number: u8) -> ObjectKey {
        if number == 0 { first.key } else { self.config.key_of(&first.block, number) }
    }

    /// Puts a block into the host tier; what goes for it goes further down.
    pub(super) fn keep(&mut self, block: Arc<HostBlock>) {
        let gone = self.host.insert(block.clone());
        if let Some(shelf) = &self.shelf {
            let key = gone.as_ref().map(|gone| gone.label.key);
            shelf.changed(key.as_slice(), &[&block.label]);
        }
        if let Some(gone) = gone {
            self.host_counters.evicted += 1;
            self.pass_down(gone);
        }
    }

    /// Takes the block out of the host that was not used for longest.
    pub(super) fn pop_oldest(&mut self) -> Option<Arc<HostBlock>> {
        let gone = self.host.pop_oldest()?;
        self.host_counters.evicted += 1;
        if let Some(shelf) = &self.shelf {
            shelf.changed(&[gone.label.key], &[]);
        }
        Some(gone)
    }

    /// Takes a block out of the host that is not there after all.
    pub(super) fn lose(&mut self, key: &ObjectKey) {
        self.host.remove(key);
        if let Some(shelf) = &self.shelf {
            shelf.changed(&[*key], &[]);
        }
    }

    /// A block that left the host goes to the first tier below that takes it or has it. What it was
    /// worth on the device is not known any more: what got as far as the host may go on.
    pub(super) fn pass_down(&self, block: Arc<HostBlock>) {
        for (tier, demotion) in &self.lower {
            if !demotion.on_commit && tier.state(&block.label.key) == CopyState::Absent {
                tier.put(block);
                return;
            }
        }
    }

    /// Copies an object of a block of the device, by its number, to the lower tiers that `wants` it, admit
    /// it and lack it.
    pub(super) fn write_through<'a>(
        &mut self,
        (ids, number): (&[BlockId], u8),
        held: Held<'a>,
        departure: &mut Option<Departure<'a>>,
        wants: impl Fn(&Demotion) -> bool,
    ) {
        let mut captured = None;
        for n in 0..self.lower.len() {
            let Some(note) = self.notes.get(ids[0].index()) else { return };
            let Some(label) = &note.label else { return };
            let (tier, demotion) = &self.lower[n];
            if !wants(demotion)
                || !demotion.admits(note)
                || tier.state(&self.key_of(label, number)) != CopyState::Absent
                || !tier.has_room()
            {
                continue;
            }
            if captured.is_none() {
                captured = self.capture((ids, number), held, departure);
            }
            if let Some(block) = &captured {
                self.lower[n].0.put(block.clone());
            }
        }
    }

    /// A copy of an object of a block of the device in host memory, where there is a departure: from when
    /// that is enqueued. `None` where there is no room for one, or not every group has the block.
    fn capture<'a>(
        &mut self,
        (ids, number): (&[BlockId], u8),
        held: Held<'a>,
        departure: &mut Option<Departure<'a>>,
    ) -> Option<Arc<HostBlock>> {
        let note = self.notes.get(ids[0].index())?;
        let (first, steps) = (note.label.as_ref()?, note.steps);
        let label = if number == 0 { (**first).clone() } else { first.nth(&self.config, number) };
        if ids.contains(&BlockId::NONE) {
            return None;
        }
        let mut buffer = self.buffer()?;
        if label.nth.of > 1 {
            // Not all of it is filled.
            buffer.fill(0);
        }
        match departure {
            Some(departure) => {
                let fresh = self.lift.as_ref().is_none_or(|lift| lift.steps() <= steps);
                let spread = self.config.spread();
                departure.add((ids, number, spread), held, &mut buffer, fresh).ok()?;
            }
            None => self.read((ids, number), held, &mut buffer[HEAD_BYTES..]).ok()?,
        }
        Some(Arc::new(HostBlock { label, buffer }))
    }

    /// Reads the payload of an object of a block in host memory.
    fn read(&self, (ids, number): (&[BlockId], u8), held: Held, to: &mut [u8]) -> Result<()> {
        let mut at = 0;
        for (group, (store, &id)) in held.stores.iter().zip(ids).enumerate() {
            let end = at + store.layout().block_bytes() as usize;
            let to = &mut to[at..end];
            match held.sinks[group].slot(id) {
                Some(slot) => {
                    let layers = 0..store.layout().spec().layers;
                    let chunks = self.config.spread().chunks(group, number.into(), layers);
                    for (from, at, bytes) in chunks {
                        store.read_raw(slot, from, &mut to[at..at + bytes])?;
                    }
                }
                None if number == 0 => store.read_block(id, to)?,
                None => {}
            }
            at = end;
        }
        Ok(())
    }

    /// A buffer, if need be that of the block that the host has not used for longest.
    fn buffer(&mut self) -> Option<Buffer> {
        loop {
            if let Ok(buffer) = self.buffers.take() {
                return Some(buffer);
            }
            // One that is still being copied frees none: then this block is dropped, not the host's.
            if self.host.oldest()?.buffer.is_lent() {
                return None;
            }
            // What is on its way down still has its buffer: then others have to go for this one.
            drop(self.pop_oldest()?);
        }
    }

    /// Objects of the blocks after the first `skip` of a prompt as the index has it, by label.
    pub(super) fn labels<'a>(
        &'a self,
        prompt: &'a [TokenId],
        media: &'a MediaKeys,
        skip: usize,
        above: Option<Digest>,
        (space, keys): (Namespace, Option<Digest>),
    ) -> impl Iterator<Item = Label> + use<'a> {
        let block_tokens = self.config.block_tokens() as usize;
        // The last token is left to compute, since its logits are needed.
        let whole = (prompt.len() - 1) / block_tokens * block_tokens;
        let tokens = prompt[(skip * block_tokens).min(whole)..whole].chunks_exact(block_tokens);
        let parent = if skip == 0 { keys } else { above };
        // Without the digest of what comes before, nothing has a name.
        let known = skip == 0 || above.is_some();
        let tokens = if known { tokens } else { [].chunks_exact(block_tokens) };
        let config = &self.config;
        let labels = Labels { config, media, space, keys, parent, tokens, index: skip };
        labels.flat_map(|first| {
            let others = (1..first.nth.of).map(|number| first.nth(config, number));
            let others: Vec<Label> = others.collect();
            core::iter::once(first).chain(others)
        })
    }

    pub(super) fn land(&mut self, ticket: &Ticket) {
        for block in ticket.take().0 {
            self.keep(block);
        }
    }
}

impl Tiers {
    /// Blocks were copied from the host, in this time where that is known now.
    pub(super) fn host_loaded(&mut self, blocks: usize, time: Option<Duration>) {
        let bytes = blocks as u64 * self.config.payload_bytes();
        if blocks > 0 {
            if let Some(time) = time {
                self.host_rate.observe(bytes, time);
            }
            self.host_counters.loaded += blocks as u64;
            self.host_counters.loaded_bytes += bytes;
        }
    }

    /// Makes buffers spare for a load of so many blocks, as far as the host can.
    pub(super) fn make_spare(&mut self, blocks: usize) {
        let lacking = blocks.saturating_sub(self.buffers.spare());
        for _ in 0..lacking.min(self.host.len().saturating_sub(blocks)) {
            if let Some(gone) = self.pop_oldest() {
                self.pass_down(gone);
            }
        }
    }

    /// Waits until every lower tier takes another block, and for what the device is still copying where
    /// no buffer is left.
    pub(super) fn make_way(&self, limit: Duration) -> bool {
        if self.buffers.spare() == 0 {
            self.wait_copies();
        }
        self.lower.iter().all(|(tier, _)| tier.has_room() || tier.flush(limit))
            && (self.buffers.spare() > 0 || self.lower.iter().all(|(tier, _)| tier.flush(limit)))
    }
}

impl Demotion {
    fn admits(&self, note: &Note) -> bool {
        note.priority >= self.least_priority && note.uses >= self.least_uses
    }
}
