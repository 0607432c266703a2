//! Where blocks are below the device, as KV events tell it: the blocks of each medium, which tiers
//! have them, and whether listeners know.
//!
//! A tier's changes are told as they happen, by whichever thread makes them: the cache's for the
//! host, a tier's own for what is below. What finds no room in the queue waits here, and so does
//! everything after a loss, or when events begin; the publisher asks for it as it gets on. Costs a
//! copy of each block's tokens, and nothing before events are wanted.
//!
//! A block in several tiers of one medium is told once, and is gone with the last of them; one that is
//! spread over several objects is there as long as all of them are, in whichever tiers. One of a
//! namespace that has not been described yet (the disk has it from an earlier process) waits until
//! it is. Locks: a store's or a tier's, then this, then the queue's.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::events::{Backlog, Locked, Medium, Queue};
use crate::ids::{Namespace, TokenId};
use crate::prefix::Digest;
use crate::tier::object::{Label, Nth, Origin};
use crate::tier::{ObjectKey, TierKind, Watcher};

/// Blocks that are remembered of a tier that only says what it is asked for.
const MOST_UNSURE: usize = 1 << 17;
/// Waiting blocks that are not worth looking for those among that went.
const FEW_WAITING: usize = 1024;

/// What a namespace's blocks are known by.
#[derive(Debug, Clone, Default)]
pub(super) struct Seeds {
    /// Those that were described: the digest of their keys.
    pub described: BTreeMap<Namespace, Option<Digest>>,
    /// What the stored bytes mean; empty where all are floats.
    pub storage: Vec<u8>,
}

impl Seeds {
    /// What stands before the first block of a sequence.
    pub fn seed(&self, space: Namespace) -> Option<Digest> {
        let described = self.described.get(&space).copied();
        let seed = described.unwrap_or_else(|| Digest::of_namespace(space));
        if self.storage.is_empty() {
            return seed;
        }
        Some(Digest::of_storage(seed.as_ref(), &self.storage))
    }
}

/// An object of a medium.
#[derive(Debug)]
struct Entry {
    block: Digest,
    parent: Option<Digest>,
    tokens: Box<[TokenId]>,
    origin: Origin,
    nth: Nth,
    /// The tiers that have it, a bit each.
    holders: u64,
    /// Whether listeners know: of the block, by the entry of its first object.
    told: bool,
    /// Whether it is among those that wait.
    waits: bool,
}

#[derive(Debug, Default)]
struct State {
    queue: Option<Arc<Queue>>,
    seeds: Seeds,
    /// The described namespaces by their seeds.
    spaces: BTreeMap<Option<Digest>, Namespace>,
    blocks: HashMap<(Medium, ObjectKey), Entry>,
    /// Of blocks with several objects, which of those are there, a bit each, and the key of the first.
    spread: HashMap<(Medium, Digest), (u16, Option<ObjectKey>)>,
    /// To be told, in this order.
    waiting: VecDeque<(Medium, ObjectKey)>,
    /// Of namespaces that nobody has described, by their seeds.
    nameless: BTreeMap<Option<Digest>, Vec<(Medium, ObjectKey)>>,
    /// Of each tier that is unsure what it has: the blocks in the order in which they came.
    unsure: BTreeMap<u32, VecDeque<ObjectKey>>,
}

/// The blocks of all tiers below the device.
#[derive(Debug)]
pub(super) struct Whereabouts {
    state: Mutex<State>,
}

/// One tier of them: what its thread or store tells.
#[derive(Debug)]
pub(super) struct Shelf {
    of: Arc<Whereabouts>,
    tier: u32,
    medium: Medium,
}

impl Whereabouts {
    pub fn new(seeds: Seeds) -> Arc<Self> {
        let mut state = State { seeds, ..State::default() };
        state.name_spaces();
        Arc::new(Self { state: Mutex::new(state) })
    }

    /// The place of a tier, by its number from the host down.
    pub fn shelf(self: &Arc<Self>, tier: u32, kind: TierKind) -> Arc<Shelf> {
        let medium = match kind {
            TierKind::Host => Medium::Cpu,
            TierKind::Disk => Medium::Storage,
            TierKind::Remote => Medium::External,
        };
        Arc::new(Shelf { of: self.clone(), tier, medium })
    }

    /// Every change below leaves the state whole, so that a panic elsewhere does no harm to it.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells everything anew, after what `device` tells of the device.
    pub fn tell_all(self: &Arc<Self>, queue: &Arc<Queue>, device: impl FnOnce(&mut Locked)) {
        let mut state = self.state();
        if state.queue.is_none() {
            state.queue = Some(queue.clone());
            let this: Arc<dyn Backlog> = self.clone();
            let this: Weak<dyn Backlog> = Arc::downgrade(&this);
            queue.set_backlog(this);
        }
        let mut queue = queue.lock();
        queue.restart();
        device(&mut queue);
        state.forget();
        state.line_up();
        state.tell_waiting(&mut queue);
    }

    /// Tells nothing any more.
    pub fn detach(&self) {
        let mut state = self.state();
        state.queue = None;
        state.forget();
    }

    /// A namespace was described.
    pub fn describe(&self, space: Namespace, keys: Option<Digest>) {
        let mut state = self.state();
        state.seeds.described.insert(space, keys);
        let seed = state.seeds.seed(space);
        state.spaces.insert(seed, space);
        let named = state.nameless.remove(&seed).unwrap_or_default();
        state.wait(named);
        state.refill();
    }

    /// How bytes are stored was said.
    pub fn set_storage(&self, storage: Vec<u8>) {
        let mut state = self.state();
        state.seeds.storage = storage;
        state.name_spaces();
        let named = core::mem::take(&mut state.nameless).into_values().flatten().collect();
        state.wait(named);
        state.refill();
    }
}

impl Backlog for Whereabouts {
    fn refill(&self) {
        self.state().refill();
    }
}

impl Shelf {
    /// The same, where what is there may go without anybody saying so.
    pub fn unsure(&self) {
        self.of.state().unsure.entry(self.tier).or_default();
    }
}

impl Watcher for Shelf {
    fn changed(&self, gone: &[ObjectKey], stored: &[&Label]) {
        let mut state = self.of.state();
        let mut told: Vec<Digest> = gone.iter().filter_map(|key| state.remove(self, key)).collect();
        for label in stored {
            if state.insert(self, label)
                && let Some(oldest) = state.outlived(self, label.key)
            {
                told.extend(state.remove(self, &oldest));
            }
        }
        state.tell_removed(self.medium, &told);
        state.refill();
    }
}

impl State {
    /// A tier has a block; whether it had not.
    fn insert(&mut self, shelf: &Shelf, label: &Label) -> bool {
        let at = (shelf.medium, label.key);
        let entry = self.blocks.entry(at).or_insert_with(|| Entry {
            block: label.block,
            parent: label.parent,
            tokens: label.tokens.clone(),
            origin: label.origin.clone(),
            nth: label.nth,
            holders: 0,
            told: false,
            waits: false,
        });
        let before = entry.holders;
        entry.holders |= 1 << (shelf.tier % 64);
        let news = entry.holders != before;
        let first = if entry.nth.of == 1 { Some(label.key) } else { self.note_object(at, label) };
        if let Some(at) = first.map(|first| (shelf.medium, first))
            && self.blocks.get(&at).is_some_and(|first| !first.told)
            && self.queue.is_some()
        {
            self.wait(alloc::vec![at]);
        }
        news
    }

    /// One of several objects of a block is there; the first of them where all are.
    fn note_object(&mut self, at: (Medium, ObjectKey), label: &Label) -> Option<ObjectKey> {
        let (there, first) = self.spread.entry((at.0, label.block)).or_default();
        *there |= 1 << label.nth.number;
        if label.nth.number == 0 {
            *first = Some(label.key);
        }
        first.filter(|_| there.count_ones() == u32::from(label.nth.of))
    }

    /// One of several objects of a block is there no more; whether listeners are to be told that the block
    /// is not.
    fn lose_object(&mut self, medium: Medium, lost: &Entry) -> bool {
        let Some((there, first)) = self.spread.get_mut(&(medium, lost.block)) else {
            return lost.told;
        };
        *there &= !(1 << lost.nth.number);
        let key = if lost.nth.number == 0 { first.take() } else { *first };
        if *there == 0 {
            self.spread.remove(&(medium, lost.block));
        }
        let first = key.and_then(|key| self.blocks.get_mut(&(medium, key)));
        first.map_or(lost.told, |first| core::mem::take(&mut first.told) || lost.told)
    }

    /// Whether all objects of a block are there.
    fn is_whole(&self, medium: Medium, entry: &Entry) -> bool {
        let objects =
            || self.spread.get(&(medium, entry.block)).map_or(0, |there| there.0.count_ones());
        entry.nth.of == 1 || objects() == u32::from(entry.nth.of)
    }

    /// A tier has a block no more; its digest where listeners are to be told.
    fn remove(&mut self, shelf: &Shelf, key: &ObjectKey) -> Option<Digest> {
        let at = (shelf.medium, *key);
        let entry = self.blocks.get_mut(&at)?;
        entry.holders &= !(1 << (shelf.tier % 64));
        if entry.holders != 0 {
            return None;
        }
        let entry = self.blocks.remove(&at)?;
        let told = if entry.nth.of == 1 { entry.told } else { self.lose_object(at.0, &entry) };
        told.then_some(entry.block)
    }

    /// Notes a block of a tier that is unsure of what it has; one that is to be forgotten for it.
    fn outlived(&mut self, shelf: &Shelf, key: ObjectKey) -> Option<ObjectKey> {
        let order = self.unsure.get_mut(&shelf.tier)?;
        order.push_back(key);
        if order.len() > MOST_UNSURE { order.pop_front() } else { None }
    }

    fn tell_removed(&self, medium: Medium, blocks: &[Digest]) {
        if let Some(queue) = self.queue.as_ref().filter(|_| !blocks.is_empty()) {
            let groups = queue.shape().groups.len() as u32;
            let mut queue = queue.lock();
            for group in 0..groups {
                blocks.iter().for_each(|&block| queue.removed(medium, group, block));
            }
        }
    }

    /// Lines blocks up to be told.
    fn wait(&mut self, blocks: Vec<(Medium, ObjectKey)>) {
        for at in blocks {
            if let Some(entry) = self.blocks.get_mut(&at)
                && !core::mem::replace(&mut entry.waits, true)
            {
                self.waiting.push_back(at);
            }
        }
        // Those that went while they waited, where nobody listens for long.
        if self.waiting.len() > 2 * self.blocks.len() + FEW_WAITING {
            let waiting = core::mem::take(&mut self.waiting);
            self.blocks.values_mut().for_each(|entry| entry.waits = false);
            self.waiting.extend(waiting.into_iter().filter(|at| {
                let entry = self.blocks.get_mut(at).filter(|entry| !entry.told);
                entry.is_some_and(|entry| !core::mem::replace(&mut entry.waits, true))
            }));
        }
    }

    /// Listeners know nothing any more.
    fn forget(&mut self) {
        self.waiting.clear();
        self.nameless.clear();
        self.blocks.values_mut().for_each(|entry| (entry.told, entry.waits) = (false, false));
    }

    /// Lines all blocks up, each behind those that stand before it.
    fn line_up(&mut self) {
        let firsts = self.blocks.iter().filter(|(_, entry)| entry.nth.number == 0);
        let by_digest: HashMap<(Medium, Digest), ObjectKey> =
            firsts.map(|(&(medium, key), e)| ((medium, e.block), key)).collect();
        let mut chain = Vec::new();
        for (&(medium, _), &key) in &by_digest {
            let mut next = Some(key);
            while let Some(key) = next
                && let Some(entry) = self.blocks.get_mut(&(medium, key))
                && !core::mem::replace(&mut entry.waits, true)
            {
                chain.push((medium, key));
                next = entry.parent.and_then(|above| by_digest.get(&(medium, above)).copied());
            }
            while let Some(at) = chain.pop() {
                self.waiting.push_back(at);
            }
        }
    }

    fn refill(&mut self) {
        if !self.waiting.is_empty()
            && let Some(queue) = self.queue.clone()
        {
            self.tell_waiting(&mut queue.lock());
        }
    }

    /// Tells of those that wait as many as there is room for.
    fn tell_waiting(&mut self, queue: &mut Locked) {
        let groups = queue.shape().groups.len();
        let mut room = queue.spare_blocks() / groups;
        let mut now = Vec::new();
        while room > 0
            && let Some(at) = self.waiting.pop_front()
        {
            // One that went meanwhile, and maybe came again, is told once.
            let Some(entry) = self.blocks.get(&at).filter(|entry| !entry.told) else { continue };
            if !self.is_whole(at.0, entry) {
                if let Some(entry) = self.blocks.get_mut(&at) {
                    // Lined up again when the last of its objects comes.
                    entry.waits = false;
                }
                continue;
            }
            let space = self.space(&entry.origin);
            if let (None, seed) = (space, entry.origin.seed) {
                self.nameless.entry(seed).or_default().push(at);
            }
            if let Some(entry) = self.blocks.get_mut(&at) {
                (entry.waits, entry.told) = (false, space.is_some());
            }
            if let Some(space) = space {
                now.push((at, space));
                room -= 1;
            }
        }
        for group in 0..groups as u32 {
            for (at, space) in &now {
                let Some(entry) = self.blocks.get(at) else { continue };
                let Entry { block, parent, tokens, origin, .. } = entry;
                // Events name blocks only: what stands for a namespace is in the digests.
                let parent = parent.filter(|_| *parent != origin.seed);
                let place = (at.0, group, *space);
                queue.stored_with_media(place, parent, *block, tokens, &origin.media);
            }
        }
    }

    /// The namespace of a block in this process; `None` where it is not known yet.
    fn space(&self, origin: &Origin) -> Option<Namespace> {
        if self.seeds.seed(origin.space) == origin.seed {
            return Some(origin.space);
        }
        self.spaces.get(&origin.seed).copied()
    }

    fn name_spaces(&mut self) {
        let seeds = &self.seeds;
        let spaces = core::iter::once(Namespace(0)).chain(seeds.described.keys().copied());
        self.spaces = spaces.map(|space| (seeds.seed(space), space)).collect();
    }
}
