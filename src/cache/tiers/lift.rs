//! Between a cache's device and the host's buffers: copies that are enqueued and not waited for.
//!
//! What a step evicts goes down as one batch of copies, on a stream of its own; what is loaded goes up on
//! another. Three orders hold, all on the device:
//!
//! - A copy down comes after what wrote its blocks. Of blocks that were cached when the last step began
//!   that is all before a point that was noted then, so that it does not wait for the step that runs.
//! - What is enqueued on the cache's stream after blocks have left the index comes after their copies
//!   ([`KvCache::join_down`]): their ids are given out at once, and the first kernel that could write
//!   them waits. Holding the blocks back instead would have a step that needs the room find none.
//! - A copy up comes after what used its blocks before, and after the copy down that it reads; the
//!   cache's stream waits for it.
//!
//! So a step waits on the device for the copies of what it evicted itself, if those are not done by the
//! time its kernels' turn has come, and the host for none. With `TierOptions::ahead_blocks` the step before
//! has evicted them, and they were copied beside its kernels.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;

use super::Tiers;
use crate::cache::KvCache;
use crate::cache::sequence::Sequence;
use crate::cache::sinks::Held;
use crate::cache::store::Store;
use crate::device::{Backend, Copies, Flight, SideStream, Stream, StreamMark, Way};
use crate::error::{Error, Result};
use crate::ids::{BlockId, SeqId};
use crate::metrics::Evicted;
use crate::pool::BlockPool;
use crate::tier::buffer::Buffer;
use crate::tier::object::HEAD_BYTES;
use crate::tier::spread::Spread;
use crate::tier::{HostBlock, ObjectKey};

/// The device's side of the tiers.
#[derive(Debug)]
pub(super) struct Lift {
    backend: Arc<dyn Backend>,
    down: SideStream,
    /// What the cache's stream had to do when the last step began, and how many had begun then.
    begun: Option<StreamMark>,
    steps: u64,
    /// Blocks that a step leaves free for the next.
    ahead: u32,
    /// Copies down are under way that the cache's stream does not wait for yet.
    unjoined: bool,
    trips: Vec<(Arc<Flight>, Cargo)>,
}

/// What a flight carries.
#[derive(Debug)]
enum Cargo {
    /// Blocks that the host is to have.
    Down(Vec<ObjectKey>),
    /// So many bytes from the host; 0 where they say nothing of its speed.
    Up(u64),
}

/// Copies of blocks that leave the device together.
#[derive(Debug)]
pub(super) struct Departure<'a> {
    copies: Copies<'a>,
    stream: Stream,
    /// Of them, those that the host is to have.
    kept: Vec<ObjectKey>,
    /// Some were cached after the last step began.
    fresh: bool,
}

impl Lift {
    pub fn new(backend: &Arc<dyn Backend>, ahead: u32) -> Result<Self> {
        Ok(Self {
            backend: backend.clone(),
            down: SideStream::new(backend)?,
            begun: None,
            steps: 0,
            ahead,
            unjoined: false,
            trips: Vec::new(),
        })
    }

    /// Steps that have begun.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Blocks on their way to the host.
    pub fn on_their_way(&self) -> usize {
        let kept = |(_, cargo): &(_, Cargo)| match cargo {
            Cargo::Down(keys) => keys.len(),
            Cargo::Up(_) => 0,
        };
        self.trips.iter().map(kept).sum()
    }
}

impl<'a> Departure<'a> {
    /// Adds an object of the blocks of an entry, by its number; `fresh` where that was cached after the
    /// last step began.
    pub fn add(
        &mut self,
        (ids, number, spread): (&[BlockId], u8, &Spread),
        held: Held<'a>,
        buffer: &mut Buffer,
        fresh: bool,
    ) -> Result<()> {
        let lacking = Error::InvalidState { why: "a buffer that no device copies to" };
        let part = buffer.part_mut().ok_or(lacking)?;
        let mut at = HEAD_BYTES;
        for (group, (store, &id)) in held.stores.iter().zip(ids).enumerate() {
            let bytes = store.layout().block_bytes() as usize;
            match held.sinks[group].slot(id) {
                Some(slot) => {
                    let layers = 0..store.layout().spec().layers;
                    for (from, to, bytes) in spread.chunks(group, number.into(), layers) {
                        self.copies.read(store.raw_span(slot, from, bytes)?, part, at + to)?;
                    }
                }
                None if number == 0 => self.copies.read(store.span(id, 0, bytes)?, part, at)?,
                None => {}
            }
            at += bytes;
        }
        self.fresh |= fresh;
        Ok(())
    }

    /// The host is to have this block.
    pub fn keep(&mut self, key: ObjectKey) {
        self.kept.push(key);
    }
}

impl Tiers {
    /// A departure to add blocks to; `None` for a cache on the CPU, whose blocks are copied at once.
    pub(super) fn board<'a>(&self, held: Held<'a>) -> Option<Departure<'a>> {
        let lift = self.lift.as_ref()?;
        let stream = held.stores.first().and_then(Store::stream)?;
        let copies = Copies::new(&lift.backend, Way::Down);
        Some(Departure { copies, stream, kept: Vec::new(), fresh: false })
    }

    /// Enqueues the copies of a departure. Where that fails its blocks are not there: those who wait
    /// for them are told so, and the host gives them up.
    pub(super) fn depart(&mut self, departure: Option<Departure<'_>>) {
        let (Some(departure), Some(lift)) = (departure, &mut self.lift) else { return };
        let Departure { copies, stream, kept, fresh } = departure;
        if copies.is_empty() {
            return;
        }
        let flight = copies.flight().clone();
        let after = match &lift.begun {
            Some(begun) if !fresh => lift.down.follow_mark(begun),
            _ => lift.down.follow(stream),
        };
        if after.is_ok() {
            lift.unjoined = true;
            // The flight tells.
            let _ = copies.enqueue(&lift.down);
        } else {
            drop(copies);
        }
        lift.trips.push((flight, Cargo::Down(kept)));
        self.see_ended();
    }

    /// Copies up were enqueued: of so many bytes of the host's, or 0 where not all were.
    pub(super) fn lifted(&mut self, flight: Arc<Flight>, bytes: u64) {
        if let Some(lift) = &mut self.lift {
            lift.trips.push((flight, Cargo::Up(bytes)));
        }
        self.see_ended();
    }

    /// Notes which flights have ended, and how. Waits for nothing.
    pub(in crate::cache) fn see_ended(&mut self) {
        let mut n = 0;
        while let Some((flight, _)) = self.lift.as_ref().and_then(|lift| lift.trips.get(n)) {
            let Some(result) = flight.poll() else {
                n += 1;
                continue;
            };
            let Some(lift) = &mut self.lift else { return };
            let (flight, cargo) = lift.trips.remove(n);
            match cargo {
                Cargo::Down(keys) => self.landed(&keys, result),
                Cargo::Up(0) => {}
                Cargo::Up(bytes) => {
                    if let Some(time) = flight.duration() {
                        self.host_rate.observe(bytes, time);
                    }
                }
            }
        }
    }

    /// Waits for all copies that are under way.
    pub(super) fn wait_copies(&self) {
        let trips = self.lift.iter().flat_map(|lift| &lift.trips);
        // How they end is seen where that matters.
        trips.for_each(|(flight, _)| _ = flight.wait());
    }

    /// Blocks on their way to the host.
    pub(super) fn on_their_way(&self) -> u64 {
        self.lift.as_ref().map_or(0, |lift| lift.on_their_way() as u64)
    }

    fn landed(&mut self, keys: &[ObjectKey], result: Result<()>) {
        let blocks = keys.len() as u64;
        if result.is_ok() {
            self.host_counters.stored += blocks;
            self.host_counters.stored_bytes += blocks * self.config.payload_bytes();
            return;
        }
        self.host_counters.dropped += blocks;
        self.host_counters.failures += 1;
        for key in keys {
            // One of another flight may have come under the same key.
            let spoiled =
                |block: &Arc<HostBlock>| !block.buffer.is_lent() && block.buffer.arrived().is_err();
            if self.host.find(key).is_some_and(spoiled) {
                self.lose(key);
            }
        }
    }
}

impl KvCache {
    /// A step begins: what is enqueued now is what wrote the blocks that are cached now.
    pub(in crate::cache) fn note_step(&mut self) {
        let stream = self.stream;
        let Some(tiers) = &mut self.tiers else { return };
        tiers.see_ended();
        if let Some(lift) = &mut tiers.lift {
            lift.steps += 1;
            // Without a point copies wait for more than they need to.
            lift.begun = StreamMark::new(&lift.backend, stream).ok();
        }
    }

    /// Evicts what the next step is to find free, so that it is copied beside the kernels of this one.
    pub(in crate::cache) fn evict_ahead(&mut self) -> Result<()> {
        let lift = self.tiers.as_ref().and_then(|tiers| tiers.lift.as_ref());
        let Some(ahead) = lift.map(|lift| lift.ahead).filter(|&ahead| ahead > 0) else {
            return Ok(());
        };
        let lacking = |(group, pool): (usize, &BlockPool)| match self.window(group) {
            // Evicted alone, and copied nowhere.
            Some(_) => 0,
            None => ahead.saturating_sub(pool.free_blocks()).min(pool.cached_blocks()),
        };
        let lacking = self.pools.iter().enumerate().map(lacking).max().unwrap_or(0);
        match self.take_out(lacking, Evicted::Capacity) {
            // Then the next step does it.
            Err(Error::OutOfMemory { .. }) => Ok(()),
            result => result,
        }
    }

    /// Blocks have left the index: what is enqueued from here on comes after the copies of them.
    pub(in crate::cache) fn join_down(&mut self) -> Result<()> {
        let lift = self.tiers.as_mut().and_then(|tiers| tiers.lift.as_mut());
        let Some(lift) = lift.filter(|lift| lift.unjoined) else { return Ok(()) };
        lift.down.lead(self.stream)?;
        lift.unjoined = false;
        Ok(())
    }

    /// Enqueues copies of objects of the host to the blocks of a sequence from block `first` on.
    pub(super) fn lift_blocks(
        &mut self,
        sequence: &Sequence,
        found: &[Arc<HostBlock>],
        first: usize,
    ) -> Result<()> {
        self.fork_side()?;
        let (Some(backend), Some(side)) = (&self.backend, &self.side) else { return Ok(()) };
        let Some(tiers) = &self.tiers else { return Ok(()) };
        let (spread, mut copies) = (tiers.config.spread(), Copies::new(backend, Way::Up));
        for (n, object) in found.iter().enumerate() {
            let place = spread.place(first, n);
            let mut at = HEAD_BYTES;
            for (group, store) in self.stores.iter().enumerate() {
                let layers = 0..store.layout().spec().layers;
                let to = Landing { spread, sequence, store, group, layers };
                to.add(&mut copies, place, (&object.buffer, at))?;
                at += store.layout().block_bytes() as usize;
            }
        }
        let bytes = copies.bytes();
        let (flight, enqueued) = copies.enqueue(side);
        if let Some(tiers) = &mut self.tiers {
            tiers.lifted(flight, bytes);
        }
        // Whatever has become of it, the blocks may be given to others.
        let joined = self.join_side();
        enqueued.and(joined)
    }

    /// Enqueues copies of some layers of a group of blocks of a sequence, each object's from a buffer's
    /// bytes from some place on; whether the host alone had them.
    pub(super) fn lift_part(
        &mut self,
        seq: SeqId,
        (group, layers): (usize, Range<u32>),
        from: &[((usize, usize), &Buffer, usize)],
        timed: bool,
    ) -> Result<()> {
        let (Some(backend), Some(side)) = (&self.backend, &self.side) else { return Ok(()) };
        let Some(tiers) = &self.tiers else { return Ok(()) };
        let (sequence, store) = (self.sequences.get(seq)?, &self.stores[group]);
        let to = Landing { spread: tiers.config.spread(), sequence, store, group, layers };
        let mut copies = Copies::new(backend, Way::Up);
        for &(place, buffer, at) in from {
            to.add(&mut copies, place, (buffer, at))?;
        }
        let bytes = if timed { copies.bytes() } else { 0 };
        let (flight, enqueued) = copies.enqueue(side);
        if let Some(tiers) = &mut self.tiers {
            tiers.lifted(flight, bytes);
        }
        enqueued
    }
}

/// Where consecutive layers of a group of a sequence's blocks go.
struct Landing<'a> {
    spread: &'a Spread,
    sequence: &'a Sequence,
    store: &'a Store,
    group: usize,
    layers: Range<u32>,
}

impl<'a> Landing<'a> {
    /// Adds copies of an object (its block in the sequence, and its number of that), whose layers are a
    /// buffer's bytes from `at` on.
    fn add(
        &self,
        copies: &mut Copies<'a>,
        (block, number): (usize, usize),
        (buffer, at): (&Buffer, usize),
    ) -> Result<()> {
        let lacking = Error::InvalidState { why: "a buffer that no device copies from" };
        let part = buffer.part().ok_or(lacking)?;
        if block < self.store.layout().sink_blocks() as usize {
            let slot = self.sequence.raw_slot(self.group, block).unwrap_or(BlockId::NONE);
            for (to, from, bytes) in self.spread.chunks(self.group, number, self.layers.clone()) {
                copies.write(self.store.raw_span(slot, to, bytes)?, part, at + from)?;
            }
            return Ok(());
        }
        if number > 0 {
            return Ok(());
        }
        let bytes = self.layers.len() * self.store.layout().layer_bytes() as usize;
        // What is still on its way from this very device has not been anywhere else.
        if !buffer.is_lent() && self.store.layout().staging_block_bytes() != 0 {
            self.store.check_records(buffer.get(at..at + bytes).unwrap_or(&[]))?;
        }
        let blocks = self.sequence.tables[self.group].blocks();
        let id = blocks.get(block).copied().unwrap_or(BlockId::NONE);
        copies.write(self.store.span(id, self.layers.start, bytes)?, part, at)
    }
}
