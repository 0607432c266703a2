//! A tier as the cache sees it: a [`Store`] with threads of its own. Nothing here waits for the
//! store but who asks to.
//!
//! Demotions wait in a bounded queue and are dropped, and counted, where it is full. Promotions are
//! never dropped: they are a [`Ticket`] that can be polled, waited for up to a time, and cancelled,
//! and they go before demotions. What a store gives is verified before anybody sees it; a bad
//! object is a miss, counted, and removed.
//!
//! A store that fails, or panics, is left alone for a while, twice as long each time, up to a
//! minute; meanwhile everything asked of it is a miss at once.

use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use std::collections::HashSet;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::arrivals::Arrivals;
use super::buffer::{Buffer, Buffers};
use super::guarded::Guarded;
use super::host::HostBlock;
use super::key::Configuration;
use super::object::{self, Label};
use super::rate::Rate;
use super::recent::Recent;
use super::slabs::{Share, pack};
use super::store::{Store, Watcher};
use super::ticket::{Missed, Ticket, Want};
use super::{ObjectKey, TierCounters, TierKind};
use crate::error::{Error, Result};

const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// How a tier works.
#[derive(Debug, Clone, Copy)]
pub struct TierSettings {
    /// What kind it is.
    pub kind: TierKind,
    /// Threads that read.
    pub readers: u32,
    /// Threads that write.
    pub writers: u32,
    /// Demotions that may wait; more are dropped.
    pub queued_blocks: usize,
}

/// What a tier has of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyState {
    /// Nothing, as far as is known without asking.
    Absent,
    /// A demotion is on its way.
    Writing,
    /// All of it.
    Clean,
    /// All of it, and it is being read.
    Reading,
}

pub(super) struct Load {
    pub want: Want,
    pub buffer: Buffer,
    pub ticket: Ticket,
}

#[derive(Default)]
pub(super) struct State {
    pub loads: VecDeque<Load>,
    /// Loads by parts, shared out.
    pub shares: VecDeque<Share>,
    /// Chains of which the store must be asked how much it has.
    pub probes: VecDeque<(Vec<Load>, Ticket)>,
    pub puts: VecDeque<Arc<HostBlock>>,
    pub removes: Vec<ObjectKey>,
    pub writing: HashSet<ObjectKey>,
    pub reading: HashSet<ObjectKey>,
    /// What the store was seen to have.
    pub seen: Recent,
    /// Work in the hands of a thread.
    pub busy_writes: usize,
    pub stop: bool,
    pub pause: Option<(Instant, Duration)>,
    pub counters: TierCounters,
    pub load_rate: Rate,
    pub put_rate: Rate,
}

pub(super) struct Shared {
    pub settings: TierSettings,
    pub config: Configuration,
    pub store: Guarded,
    pub buffers: Arc<Buffers>,
    /// Who is told what the store is seen to have, where the store does not tell it.
    pub watcher: OnceLock<Arc<dyn Watcher>>,
    pub state: Mutex<State>,
    pub work: Condvar,
    pub idle: Condvar,
}

/// A store with its queues and threads.
pub struct Tier {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl core::fmt::Debug for Tier {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Tier").field("store", &self.shared.store).finish_non_exhaustive()
    }
}

impl Tier {
    /// Starts the threads of a tier over `store`. `buffers` are for what is read, and have the size
    /// of the configuration's objects.
    ///
    /// # Errors
    /// `InvalidArgument` for a tier without threads or queue, or buffers of another size;
    /// `OutOfMemory` where the system refuses a thread.
    pub fn new(
        store: Arc<dyn Store>,
        config: Configuration,
        buffers: Arc<Buffers>,
        settings: TierSettings,
    ) -> Result<Self> {
        let TierSettings { readers, writers, queued_blocks, .. } = settings;
        if readers == 0 || writers == 0 || readers > 64 || writers > 64 || queued_blocks == 0 {
            return Err(Error::invalid("tier", "must have 1 to 64 readers, writers, and a queue"));
        }
        if object::object_bytes(config.payload_bytes()) != Some(buffers.bytes() as u64) {
            return Err(Error::invalid("buffers", "must have the size of an object"));
        }
        let (state, work, idle) = (Mutex::default(), Condvar::new(), Condvar::new());
        let store = Guarded::new(store);
        let watcher = OnceLock::new();
        let shared =
            Arc::new(Shared { settings, config, store, buffers, watcher, state, work, idle });
        let mut tier = Tier { shared: shared.clone(), threads: Vec::new() };
        for n in 0..readers + writers {
            let shared = shared.clone();
            let thread = std::thread::Builder::new().name(settings.kind.name().into());
            let run = move || if n < readers { shared.read() } else { shared.write() };
            // Those that run already end with `tier`.
            let thread = thread.spawn(run).map_err(|_| Error::OutOfMemory { bytes: 0 })?;
            tier.threads.push(thread);
        }
        Ok(tier)
    }

    /// What kind it is.
    pub fn kind(&self) -> TierKind {
        self.shared.settings.kind
    }

    /// What it has of a block, as far as is known without waiting; of a store that has to be asked,
    /// what it was last seen to have.
    pub fn state(&self, key: &ObjectKey) -> CopyState {
        let state = self.shared.state();
        if state.writing.contains(key) {
            return CopyState::Writing;
        }
        let (reading, seen) = (state.reading.contains(key), state.seen.contains(key));
        drop(state);
        match self.shared.store.knows(key).or(seen.then_some(true)) {
            Some(true) if reading => CopyState::Reading,
            Some(true) => CopyState::Clean,
            _ => CopyState::Absent,
        }
    }

    /// Whether it may have a block: false where it is known not to, or is not asked for now.
    pub fn may_have(&self, key: &ObjectKey) -> bool {
        self.shared.store.knows(key).unwrap_or(true) && !self.shared.state().paused()
    }

    /// Whether [`Self::may_have`] is certain of its answer.
    pub fn is_certain(&self, key: &ObjectKey) -> bool {
        self.shared.store.knows(key).is_some()
    }

    /// A block that waits to be written, if it is the one that `label` describes: it is still in
    /// memory. Not one that is being written now.
    pub fn recall(&self, label: &Label) -> Option<Arc<HostBlock>> {
        let state = self.shared.state();
        if !state.writing.contains(&label.key) {
            return None;
        }
        state.puts.iter().find(|block| block.label == *label).cloned()
    }

    /// Whether it would queue another demotion.
    pub fn has_room(&self) -> bool {
        let state = self.shared.state();
        state.puts.len() < self.shared.settings.queued_blocks && !state.paused() && !state.stop
    }

    /// Queues a demotion. False where it is not: the tier has the block or is writing it, the queue
    /// is full, or the store is being left alone.
    pub fn put(&self, block: Arc<HostBlock>) -> bool {
        let key = block.label.key;
        let known = self.shared.store.knows(&key);
        let mut state = self.shared.state();
        let known = known.unwrap_or_else(|| state.seen.contains(&key));
        if known || state.writing.contains(&key) {
            state.counters.present += 1;
            return false;
        }
        if state.puts.len() >= self.shared.settings.queued_blocks || state.paused() || state.stop {
            state.counters.dropped += 1;
            return false;
        }
        state.writing.insert(key);
        state.puts.push_back(block);
        drop(state);
        self.shared.work.notify_all();
        true
    }

    /// Loads blocks that follow each other, as many as there are buffers for; the ticket has a place
    /// for each of them. What the store does not have ends the chain.
    pub fn load(&self, wants: Vec<Want>) -> Ticket {
        let mut loads = Vec::new();
        let ask = wants.iter().any(|want| !self.is_certain(&want.label.key));
        let mut buffers = Vec::new();
        for _ in 0..wants.len() {
            let Ok(buffer) = self.shared.buffers.take() else { break };
            buffers.push(buffer);
        }
        let ticket = Ticket::new(buffers.len());
        for (want, buffer) in wants.into_iter().zip(buffers) {
            loads.push(Load { want, buffer, ticket: ticket.clone() });
        }
        let mut state = self.shared.state();
        if state.stop || state.paused() {
            state.counters.missed += loads.len() as u64;
            drop(state);
            loads.iter().for_each(|load| load.ticket.miss(load.want.at, Missed::Down));
            return ticket;
        }
        if ask && !loads.is_empty() {
            state.probes.push_back((loads, ticket.clone()));
        } else {
            state.reading.extend(loads.iter().map(|load| load.want.label.key));
            state.loads.extend(loads);
        }
        drop(state);
        self.shared.work.notify_all();
        ticket
    }

    /// Whether [`Self::load_parts`] can load a block: the store gives parts, and knows that it has it.
    pub fn has_parts(&self, key: &ObjectKey) -> bool {
        self.shared.store.gives_parts()
            && self.shared.store.knows(key) == Some(true)
            && !self.shared.state().paused()
    }

    /// Loads blocks that follow each other part by part, as many as there are buffers for.
    pub fn load_parts(&self, mut wants: Vec<Want>) -> Arrivals {
        let parts = self.shared.config.parts();
        let readers = self.shared.settings.readers as usize;
        let each = |blocks: usize| blocks.div_ceil(readers).max(1);
        let needed = |blocks: usize| -> usize {
            let (each, bytes) = (each(blocks), self.shared.buffers.bytes());
            let rest = pack(parts, blocks % each, bytes);
            blocks / each * pack(parts, each, bytes) + rest
        };
        let most = needed(wants.len());
        let takes = core::iter::from_fn(|| self.shared.buffers.take().ok());
        let mut slabs: Vec<Buffer> = takes.take(most).collect();
        // Fewer blocks, where there are not slabs for all.
        while needed(wants.len()) > slabs.len() {
            wants.pop();
        }
        let arrivals = Arrivals::new(parts.len(), wants.len());
        let mut state = self.shared.state();
        if state.stop || state.paused() {
            state.counters.missed += wants.len() as u64;
            drop(state);
            arrivals.fail(Missed::Down);
            return arrivals;
        }
        state.reading.extend(wants.iter().map(|want| want.label.key));
        let each = each(wants.len());
        while !wants.is_empty() {
            let rest = wants.split_off(each.min(wants.len()));
            let own = pack(parts, wants.len(), self.shared.buffers.bytes());
            let slabs = slabs.split_off(slabs.len().saturating_sub(own));
            state.shares.push_back(Share { wants, slabs, arrivals: arrivals.clone() });
            wants = rest;
        }
        drop(state);
        self.shared.work.notify_all();
        arrivals
    }

    /// Waits until every demotion queued so far is done, at most for `limit`; whether it is.
    pub fn flush(&self, limit: Duration) -> bool {
        let end = Instant::now().checked_add(limit);
        let mut state = self.shared.state();
        while !state.puts.is_empty() || state.busy_writes > 0 {
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return false;
            }
            let idle = &self.shared.idle;
            state = match left {
                Some(left) => {
                    idle.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
                None => idle.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
        true
    }

    /// Tells `watcher` from now on what the store holds, as far as that is known: all of it for a
    /// store that tells, else what it is seen to have. Whether the store tells. To be called once.
    pub fn watch(&self, watcher: Arc<dyn Watcher>) -> bool {
        let tells = self.shared.store.watch(watcher.clone());
        if !tells {
            // A second watcher would be one too many.
            let _ = self.shared.watcher.set(watcher);
        }
        tells
    }

    /// What it counted.
    pub fn counters(&self) -> TierCounters {
        let state = self.shared.state();
        let mut counters = state.counters;
        let shared: usize = state.shares.iter().map(|share| share.wants.len()).sum();
        counters.queued = (state.writing.len() + state.loads.len() + shared) as u64;
        counters.down = state.paused();
        drop(state);
        (counters.bytes, counters.objects) = self.shared.store.used().unwrap_or_default();
        counters.failures += self.shared.store.silent_failures();
        counters
    }

    /// What fails since the store refuses whoever calls ([`Store::refusal`]).
    pub fn refusal(&self) -> Option<&'static str> {
        self.shared.store.refusal()
    }

    /// How fast loads are.
    pub fn load_rate(&self) -> Rate {
        self.shared.state().load_rate
    }

    /// How fast demotions are.
    pub fn put_rate(&self) -> Rate {
        self.shared.state().put_rate
    }

    /// Notes that a caller stopped waiting for a load.
    pub fn timed_out(&self) {
        self.shared.state().counters.timeouts += 1;
    }
}

impl Drop for Tier {
    /// Demotions under way are finished, those that wait are written too; loads are misses.
    fn drop(&mut self) {
        self.shared.state().stop = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has nothing left to finish.
            let _ = thread.join();
        }
        let mut state = self.shared.state();
        let loads: Vec<Load> = state.loads.drain(..).collect();
        let shares: Vec<Share> = state.shares.drain(..).collect();
        let probes: Vec<_> = state.probes.drain(..).flat_map(|(loads, _)| loads).collect();
        drop(state);
        shares.iter().for_each(|share| share.arrivals.fail(Missed::Down));
        loads.into_iter().chain(probes).for_each(|l| l.ticket.miss(l.want.at, Missed::Down));
    }
}

impl State {
    pub fn paused(&self) -> bool {
        self.pause.is_some_and(|(until, _)| Instant::now() < until)
    }

    /// The store failed: it is left alone, twice as long as the last time.
    pub fn failed(&mut self) {
        self.counters.failures += 1;
        let pause = match self.pause {
            Some((_, pause)) => (pause * 2).min(LONGEST_PAUSE),
            None => FIRST_PAUSE,
        };
        if !self.paused() {
            self.pause = Some((Instant::now() + pause, pause));
        }
    }
}

impl Shared {
    /// Every change below leaves the state whole, so that a panic elsewhere does no harm to it.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells what the store was seen to have, and not to have. Called with the state locked, so that
    /// it is told in the order in which it was seen.
    pub fn tell(&self, gone: &[ObjectKey], stored: &[&Label]) {
        if let Some(watcher) = self.watcher.get()
            && !(gone.is_empty() && stored.is_empty())
        {
            watcher.changed(gone, stored);
        }
    }

    pub fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.work.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}
