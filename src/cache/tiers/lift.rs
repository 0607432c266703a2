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

use super::Tiers;
use crate::cache::KvCache;
use crate::cache::sequence::Sequence;
use crate::cache::store::Store;
use crate::device::{Backend, Copies, Flight, SideStream, Stream, StreamMark, Way};
use crate::error::{Error, Result};
use crate::ids::{BlockId, SeqId};
use crate::metrics::Evicted;
use crate::pool::BlockPool;
use crate::tier::buffer::Buffer;
use crate::tier::object::HEAD_BYTES;
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
    /// Adds the blocks of an entry, which was cached when so many steps had begun.
    pub fn add(
        &mut self,
        (ids, stores): (&[BlockId], &'a [Store]),
        buffer: &mut Buffer,
        fresh: bool,
    ) -> Result<()> {
        let lacking = Error::InvalidState { why: "a buffer that no device copies to" };
        let part = buffer.part_mut().ok_or(lacking)?;
        let mut at = HEAD_BYTES;
        for (store, &id) in stores.iter().zip(ids) {
            let bytes = store.layout().block_bytes() as usize;
            self.copies.read(store.span(id, 0, bytes)?, part, at)?;
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
    pub(super) fn board<'a>(&self, stores: &'a [Store]) -> Option<Departure<'a>> {
        let lift = self.lift.as_ref()?;
        let stream = stores.first().and_then(Store::stream)?;
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

    /// Enqueues copies of blocks of the host to the blocks of a sequence from `first` on.
    pub(super) fn lift_blocks(
        &mut self,
        sequence: &Sequence,
        found: &[Arc<HostBlock>],
        first: usize,
    ) -> Result<()> {
        self.fork_side()?;
        let (Some(backend), Some(side)) = (&self.backend, &self.side) else { return Ok(()) };
        let mut copies = Copies::new(backend, Way::Up);
        for (n, block) in found.iter().enumerate() {
            let mut at = HEAD_BYTES;
            for (table, store) in sequence.tables.iter().zip(&self.stores) {
                let bytes = store.layout().block_bytes() as usize;
                let id = table.blocks().get(first + n).copied().unwrap_or(BlockId::NONE);
                add_up(&mut copies, (store, id, 0), (&block.buffer, at), bytes)?;
                at += bytes;
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

    /// Enqueues copies of some layers (a group's, from one on, so many) of blocks of a sequence, each from
    /// a buffer's bytes from some place on; whether the host alone had them.
    pub(super) fn lift_part(
        &mut self,
        seq: SeqId,
        (group, layer, layers): (usize, u32, u32),
        from: &[(usize, &Buffer, usize)],
        timed: bool,
    ) -> Result<()> {
        let (Some(backend), Some(side)) = (&self.backend, &self.side) else { return Ok(()) };
        let (table, store) = (&self.sequences.get(seq)?.tables[group], &self.stores[group]);
        let bytes = layers as usize * store.layout().layer_bytes() as usize;
        let mut copies = Copies::new(backend, Way::Up);
        for &(block, buffer, at) in from {
            let id = table.blocks().get(block).copied().unwrap_or(BlockId::NONE);
            add_up(&mut copies, (store, id, layer), (buffer, at), bytes)?;
        }
        let bytes = if timed { copies.bytes() } else { 0 };
        let (flight, enqueued) = copies.enqueue(side);
        if let Some(tiers) = &mut self.tiers {
            tiers.lifted(flight, bytes);
        }
        enqueued
    }
}

/// Adds a copy of consecutive layers of a block, from a buffer's bytes from `at` on.
fn add_up<'a>(
    copies: &mut Copies<'a>,
    (store, id, layer): (&'a Store, BlockId, u32),
    (buffer, at): (&Buffer, usize),
    bytes: usize,
) -> Result<()> {
    let lacking = Error::InvalidState { why: "a buffer that no device copies from" };
    // What is still on its way from this very device has not been anywhere else.
    if !buffer.is_lent() && store.layout().staging_block_bytes() != 0 {
        store.check_records(buffer.get(at..at + bytes).unwrap_or(&[]))?;
    }
    copies.write(store.span(id, layer, bytes)?, buffer.part().ok_or(lacking)?, at)
}
