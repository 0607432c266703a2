//! Events on their way from the cache to the publisher: one buffer that the cache fills and the
//! publisher swaps for an empty one.
//!
//! The buffers are flat (events, digests, tokens, media) and grow up to a bound, so filling one
//! allocates nothing once it has been full, and costs a lock that the publisher holds only for the swap. What
//! happens where the bound is hit, or memory is refused, is in the module above. Knows no thread; a
//! model checker explores it (`scripts/shuttle`), which is why its locks come through `sync`.

use alloc::collections::BTreeMap;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::time::Duration;

use super::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use super::{Event, Medium, Name, Shape};
use crate::error::{Error, Result};
use crate::ids::{Namespace, TokenId};
use crate::prefix::Digest;

/// The most blocks of one event: longer chains are several.
const MAX_EVENT_BLOCKS: usize = 1024;

#[derive(Debug, Clone, Copy)]
enum Kind {
    Stored { space: Namespace, parent: Option<Digest> },
    Removed,
    Cleared,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    kind: Kind,
    medium: Medium,
    group: u32,
    /// One past its last digest, token and medium in the batch.
    digests: usize,
    tokens: usize,
    media: usize,
}

/// Events in the order in which they happened.
#[derive(Debug, Default)]
pub struct Batch {
    entries: Vec<Entry>,
    digests: Vec<Digest>,
    tokens: Vec<TokenId>,
    media: Vec<(u32, Digest)>,
}

impl Batch {
    /// Whether there is no event.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Blocks of all events together.
    pub fn blocks(&self) -> usize {
        self.digests.len()
    }

    /// The events.
    pub fn events(&self) -> Events<'_> {
        Events { batch: self, next: 0, end: self.entries.len() }
    }

    /// Empties it, keeping the memory.
    pub(super) fn clear(&mut self) {
        self.entries.clear();
        self.digests.clear();
        self.tokens.clear();
        self.media.clear();
    }

    /// Room for an event with so many digests and tokens; false where memory is refused.
    fn reserve(&mut self, digests: usize, tokens: usize) -> bool {
        self.entries.try_reserve(1).is_ok()
            && self.digests.try_reserve(digests).is_ok()
            && self.tokens.try_reserve(tokens).is_ok()
    }

    /// Ends an event whose digests and tokens were pushed: of the last one, if `joins`.
    fn end(&mut self, joins: bool, kind: Kind, medium: Medium, group: u32) {
        let (digests, tokens, media) = (self.digests.len(), self.tokens.len(), self.media.len());
        match self.entries.last_mut() {
            Some(last) if joins => (last.digests, last.tokens) = (digests, tokens),
            _ => self.entries.push(Entry { kind, medium, group, digests, tokens, media }),
        }
    }

    /// Adds media to the last event, by their places in its last `tokens` tokens; false where memory
    /// is refused.
    fn add_media(&mut self, tokens: usize, media: &[(u32, Digest)]) -> bool {
        let before = self.entries.len().checked_sub(2).map_or(0, |at| self.entries[at].tokens);
        let Some(last) = self.entries.last_mut() else { return true };
        let first = last.tokens - tokens - before;
        let room = self.media.try_reserve(media.len()).is_ok();
        if room {
            self.media.extend(media.iter().map(|&(at, digest)| (first as u32 + at, digest)));
            last.media = self.media.len();
        }
        room
    }

    /// The last event with its digests, if it is of this medium and group and may grow.
    fn open(&self, medium: Medium, group: u32) -> Option<(Kind, &[Digest])> {
        let last = self.entries.last()?;
        let before = self.entries.len().checked_sub(2).map_or(0, |at| self.entries[at].digests);
        let digests = &self.digests[before..];
        let fits = digests.len() < MAX_EVENT_BLOCKS;
        (fits && last.medium == medium && last.group == group).then_some((last.kind, digests))
    }
}

/// Some or all events of a [`Batch`]; an iterator.
#[derive(Debug, Clone)]
pub struct Events<'a> {
    batch: &'a Batch,
    next: usize,
    end: usize,
}

impl<'a> Events<'a> {
    /// Splits off the leading events that together have at most `max_blocks` blocks, at least one
    /// event if there is any.
    pub(super) fn split_front(&mut self, max_blocks: usize) -> Events<'a> {
        let entries = &self.batch.entries;
        let start = self.next.checked_sub(1).map_or(0, |at| entries[at].digests);
        let mut end = self.end.min(self.next + 1);
        while end < self.end && entries[end].digests - start <= max_blocks {
            end += 1;
        }
        let front = Events { batch: self.batch, next: self.next, end };
        self.next = end;
        front
    }
}

impl<'a> Iterator for Events<'a> {
    type Item = Event<'a>;

    fn next(&mut self) -> Option<Event<'a>> {
        if self.next == self.end {
            return None;
        }
        let entries = &self.batch.entries;
        let Entry { kind, medium, group, digests, tokens, media } = entries[self.next];
        let before = self.next.checked_sub(1).map(|at| &entries[at]);
        let first = |end: fn(&Entry) -> usize| before.map_or(0, end);
        let digests = &self.batch.digests[first(|entry| entry.digests)..digests];
        let tokens = &self.batch.tokens[first(|entry| entry.tokens)..tokens];
        let media = &self.batch.media[first(|entry| entry.media)..media];
        self.next += 1;
        Some(match kind {
            Kind::Stored { space, parent } => {
                Event::Stored { medium, group, space, parent, digests, tokens, media }
            }
            Kind::Removed => Event::Removed { medium, group, digests },
            Kind::Cleared => Event::Cleared,
        })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.end - self.next, Some(self.end - self.next))
    }
}

impl ExactSizeIterator for Events<'_> {}

/// Whether the queue takes events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    Open,
    /// Events were dropped; the publisher does not know yet.
    Lost,
    /// The publisher has told its sinks; the cache has to queue what is resident.
    Resync,
}

#[derive(Debug)]
struct State {
    batch: Batch,
    flow: Flow,
    stop: bool,
    /// The publisher sleeps and must be woken.
    asleep: bool,
    /// It works on what it took.
    publishing: bool,
    dropped_events: u64,
    losses: u64,
}

/// What a queue has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueStats {
    /// Events that wait.
    pub queued_events: usize,
    /// Their blocks.
    pub queued_blocks: usize,
    /// Whether the publisher is busy with events that it took.
    pub publishing: bool,
    /// The most blocks that may wait.
    pub capacity_blocks: usize,
    /// Events that were dropped because the queue was full, or memory was refused.
    pub dropped_events: u64,
    /// How often events began to be dropped.
    pub losses: u64,
}

/// Who has more to tell than the queue takes at once.
pub trait Backlog: core::fmt::Debug + Send + Sync {
    /// Queues as much as there is room for ([`Locked::spare_blocks`]).
    fn refill(&self);
}

/// A bounded queue of events, shared by one cache and one publisher.
#[derive(Debug)]
pub struct Queue {
    shape: Shape,
    capacity: usize,
    state: Mutex<State>,
    names: Mutex<BTreeMap<Namespace, Arc<Name>>>,
    backlog: Mutex<Option<Weak<dyn Backlog>>>,
    wake: Condvar,
}

/// What the publisher took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taken {
    /// Events, maybe none.
    Events,
    /// Events were dropped: everything known so far is to be forgotten.
    Lost,
    /// Nothing is left and nothing will come.
    Stopped,
}

impl Queue {
    /// An empty queue for at most `capacity_blocks` blocks, counted for each event that has them.
    ///
    /// # Errors
    /// `InvalidArgument` for a capacity of 0 or a shape without groups or tokens.
    pub fn new(shape: Shape, capacity_blocks: usize) -> Result<Arc<Self>> {
        if capacity_blocks == 0 {
            return Err(Error::invalid("capacity_blocks", "must be at least 1"));
        }
        if shape.groups.is_empty() || shape.block_tokens == 0 {
            return Err(Error::invalid("shape", "must have groups and tokens"));
        }
        let state = State {
            batch: Batch::default(),
            flow: Flow::Open,
            stop: false,
            asleep: false,
            publishing: false,
            dropped_events: 0,
            losses: 0,
        };
        let (state, names, wake) = (Mutex::new(state), Mutex::default(), Condvar::new());
        let backlog = Mutex::new(None);
        Ok(Arc::new(Queue { shape, capacity: capacity_blocks, state, names, backlog, wake }))
    }

    /// What all its events share.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Tells the name of a namespace, before its first event.
    pub fn set_name(&self, space: Namespace, name: Arc<Name>) {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.insert(space, name);
    }

    /// The name of a namespace, if it has one.
    pub fn name(&self, space: Namespace) -> Option<Arc<Name>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).get(&space).cloned()
    }

    /// Says who has more to tell: asked each time that something was published.
    pub fn set_backlog(&self, backlog: Weak<dyn Backlog>) {
        *self.backlog.lock().unwrap_or_else(PoisonError::into_inner) = Some(backlog);
    }

    /// Asks for more, unless it is to stop.
    pub(super) fn refill(&self) {
        let backlog = self.backlog.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let stops = self.state().stop;
        if let Some(backlog) = backlog.filter(|_| !stops).and_then(|backlog| backlog.upgrade()) {
            backlog.refill();
        }
    }

    /// What it has seen.
    pub fn stats(&self) -> QueueStats {
        let state = self.state();
        QueueStats {
            queued_events: state.batch.events().len(),
            queued_blocks: state.batch.blocks(),
            publishing: state.publishing,
            capacity_blocks: self.capacity,
            dropped_events: state.dropped_events,
            losses: state.losses,
        }
    }

    /// To queue events; the publisher waits meanwhile. Dropping the guard wakes it.
    pub fn lock(&self) -> Locked<'_> {
        Locked { queue: self, state: self.state() }
    }

    /// Lets the publisher end after it took what is queued.
    pub(super) fn stop(&self) {
        self.state().stop = true;
        self.wake.notify_all();
    }

    /// Swaps the queued events for those in `batch`, which is emptied. Waits for some.
    pub(super) fn take(&self, batch: &mut Batch) -> Taken {
        batch.clear();
        let mut state = self.state();
        loop {
            state.publishing = true;
            if state.flow == Flow::Lost {
                state.flow = Flow::Resync;
                return Taken::Lost;
            }
            if !state.batch.is_empty() {
                core::mem::swap(&mut state.batch, batch);
                return Taken::Events;
            }
            state.publishing = false;
            if state.stop {
                return Taken::Stopped;
            }
            state.asleep = true;
            state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.asleep = false;
        }
    }

    /// Sleeps for `time` after what was taken is published, or until the queue is stopped.
    pub(super) fn rest(&self, time: Duration) {
        let mut state = self.state();
        state.publishing = false;
        let stopped = |state: &mut State| !state.stop;
        drop(self.wake.wait_timeout_while(state, time, stopped));
    }

    /// Every change below leaves the state whole, so that a panic elsewhere does no harm to it.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A queue that takes events.
#[derive(Debug)]
pub struct Locked<'a> {
    queue: &'a Queue,
    state: MutexGuard<'a, State>,
}

impl Locked<'_> {
    /// What all events share.
    pub fn shape(&self) -> &Shape {
        &self.queue.shape
    }

    /// Whether events were dropped and the publisher has said so: all that is resident should be
    /// queued, after [`Self::restart`].
    pub fn wants_resync(&self) -> bool {
        self.state.flow == Flow::Resync
    }

    /// Blocks of events that what can wait may queue now: up to half of the queue, so that what
    /// cannot wait has room; none while events are being lost.
    pub fn spare_blocks(&self) -> usize {
        match self.state.flow {
            Flow::Open => {
                let most = (self.queue.capacity / 2).max(self.queue.shape.groups.len());
                most.saturating_sub(self.state.batch.blocks())
            }
            Flow::Lost | Flow::Resync => 0,
        }
    }

    /// Blocks that follow `parent` and each other are cached; `tokens` are theirs.
    pub fn stored(
        &mut self,
        (medium, group, space): (Medium, u32, Namespace),
        mut parent: Option<Digest>,
        mut digests: &[Digest],
        mut tokens: &[TokenId],
    ) {
        let block_tokens = self.queue.shape.block_tokens as usize;
        debug_assert_eq!(digests.len() * block_tokens, tokens.len());
        while !digests.is_empty() && self.room(digests.len(), tokens.len()) {
            let batch = &mut self.state.batch;
            let (mut joins, mut most) = (false, MAX_EVENT_BLOCKS);
            if let Some((Kind::Stored { space: last, .. }, open)) = batch.open(medium, group)
                && last == space
                && open.last() == parent.as_ref()
            {
                (joins, most) = (true, MAX_EVENT_BLOCKS - open.len());
            }
            let count = digests.len().min(most);
            let (now, later) = digests.split_at(count);
            let (now_tokens, later_tokens) = tokens.split_at(count * block_tokens);
            batch.digests.extend_from_slice(now);
            batch.tokens.extend_from_slice(now_tokens);
            batch.end(joins, Kind::Stored { space, parent }, medium, group);
            (parent, digests, tokens) = (now.last().copied(), later, later_tokens);
        }
    }

    /// A block is cached in which media begin, given by the places of their tokens.
    pub fn stored_with_media(
        &mut self,
        place: (Medium, u32, Namespace),
        parent: Option<Digest>,
        digest: Digest,
        tokens: &[TokenId],
        media: &[(u32, Digest)],
    ) {
        self.stored(place, parent, &[digest], tokens);
        let told = media.is_empty() || self.state.flow != Flow::Open;
        if !told && !self.state.batch.add_media(tokens.len(), media) {
            self.lose();
        }
    }

    /// A block is not cached there any more.
    pub fn removed(&mut self, medium: Medium, group: u32, digest: Digest) {
        if self.room(1, 0) {
            let batch = &mut self.state.batch;
            let joins = matches!(batch.open(medium, group), Some((Kind::Removed, _)));
            batch.digests.push(digest);
            batch.end(joins, Kind::Removed, medium, group);
        }
    }

    /// Begins anew: consumers are to forget everything, and are told what is resident next.
    pub fn restart(&mut self) {
        // What waits is part of what is forgotten.
        self.state.batch.clear();
        self.state.flow = Flow::Open;
        if self.room(0, 0) {
            self.state.batch.end(false, Kind::Cleared, Medium::Gpu, 0);
        }
    }

    /// Whether an event fits; drops everything where it does not.
    fn room(&mut self, digests: usize, tokens: usize) -> bool {
        let state = &mut *self.state;
        if state.flow == Flow::Open
            && digests <= self.queue.capacity - state.batch.blocks()
            && state.batch.reserve(digests, tokens)
        {
            return true;
        }
        self.lose();
        self.state.dropped_events += 1;
        false
    }

    /// Drops everything.
    fn lose(&mut self) {
        let state = &mut *self.state;
        if state.flow == Flow::Open {
            state.flow = Flow::Lost;
            state.losses += 1;
            state.dropped_events += state.batch.entries.len() as u64;
            state.batch.clear();
        }
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        let news = !self.state.batch.is_empty() || self.state.flow == Flow::Lost;
        if news && self.state.asleep {
            self.queue.wake.notify_all();
        }
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
