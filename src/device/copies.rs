//! Copies between a device store and host memory, gathered and enqueued at once on a side stream.
//!
//! Nothing is copied through memory in between. Ranges that follow each other on both sides become one.
//! While copies are gathered the stores are borrowed; once they are enqueued, memory of the device is
//! freed after them ([`Backend::free`]), and that of the host waits for them ([`HostPart`]).

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::marker::PhantomData;
use core::ops::Range;
use std::time::Instant;

use super::backend::{HostCopy, Way};
use super::{Backend, Flight, HostPart, SideStream, StreamMark};
use crate::error::{Error, Result};

/// A range of a store's memory.
#[derive(Debug, Clone, Copy)]
pub struct Span<'a> {
    pub(super) address: u64,
    pub(super) bytes: usize,
    pub(super) store: PhantomData<&'a ()>,
}

/// Copies that are being gathered, all of one way. Dropped before they are enqueued, their flight has
/// failed.
#[derive(Debug)]
pub struct Copies<'a> {
    backend: Arc<dyn Backend>,
    way: Way,
    list: Vec<HostCopy>,
    locked: bool,
    bytes: u64,
    flight: Arc<Flight>,
    /// What still writes the host memory that is read.
    after: Vec<Arc<Flight>>,
    stores: PhantomData<&'a ()>,
}

impl<'a> Copies<'a> {
    /// None yet.
    pub fn new(backend: &Arc<dyn Backend>, way: Way) -> Self {
        Self {
            backend: backend.clone(),
            way,
            list: Vec::new(),
            locked: true,
            bytes: 0,
            flight: Flight::boarding(),
            after: Vec::new(),
            stores: PhantomData,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How they will have ended.
    pub fn flight(&self) -> &Arc<Flight> {
        &self.flight
    }

    /// Adds one down, to the bytes of `to` from `at` on. Who reads them waits for the flight.
    ///
    /// # Errors
    /// `Overflow` past the end of `to`, `OutOfMemory`, `InvalidState` for copies up.
    pub fn read(&mut self, from: Span<'a>, to: &mut HostPart, at: usize) -> Result<()> {
        if self.way != Way::Down {
            return Err(Error::InvalidState { why: "the copies go to the device" });
        }
        let host = to.give(range(at, from.bytes), &self.flight)?;
        self.add(from, host, to.is_locked())
    }

    /// Adds one up, from the bytes of `from` from `at` on, when they have arrived. Who writes them waits
    /// for the flight.
    ///
    /// # Errors
    /// `Overflow` past the end of `from`, `OutOfMemory`, `InvalidState` for copies down, `DeviceFailed`
    /// where what was copied there had failed.
    pub fn write(&mut self, to: Span<'a>, from: &HostPart, at: usize) -> Result<()> {
        if self.way != Way::Up {
            return Err(Error::InvalidState { why: "the copies go to the host" });
        }
        if let Some(flight) = from.writing()
            && !self.after.iter().chain([&self.flight]).any(|known| Arc::ptr_eq(known, &flight))
        {
            self.after.push(flight);
        }
        let host = from.lend(range(at, to.bytes), &self.flight)?;
        self.add(to, host, from.is_locked())
    }

    fn add(&mut self, span: Span<'a>, host: *mut u8, locked: bool) -> Result<()> {
        let room = self.list.len() + 1;
        let refused = Error::OutOfMemory { bytes: (room * size_of::<HostCopy>()) as u64 };
        self.list.try_reserve(1).map_err(|_| refused)?;
        self.locked &= locked;
        self.bytes += span.bytes as u64;
        match self.list.last_mut() {
            Some(last)
                if last.device + last.bytes as u64 == span.address
                    && last.host.wrapping_add(last.bytes) == host =>
            {
                last.bytes += span.bytes;
            }
            _ => self.list.push(HostCopy { device: span.address, host, bytes: span.bytes }),
        }
        Ok(())
    }

    /// Enqueues them: their flight, which tells how they end, and `DeviceFailed` where they could not
    /// be; nothing of them is under way then.
    pub fn enqueue(self, side: &SideStream) -> (Arc<Flight>, Result<()>) {
        let (flight, begin) = (self.flight.clone(), Instant::now());
        let between = self.depart(side);
        let result = match between {
            Ok(between) => {
                flight.fly(between, begin);
                Ok(())
            }
            Err(error) => {
                // Some may be under way; a device that cannot even wait has stopped.
                let _ = self.backend.sync(side.stream());
                flight.end(Err(error));
                Err(error)
            }
        };
        (flight, result)
    }

    fn depart(&self, side: &SideStream) -> Result<[StreamMark; 2]> {
        let stream = side.stream();
        self.after.iter().try_for_each(|flight| flight.hold(stream))?;
        let first = StreamMark::new(&self.backend, stream)?;
        // SAFETY: the ranges lie within parts of host memory and stores, which were lent to the flight:
        // who would touch or free the host's waits for it, and the device's are freed after it.
        unsafe { self.backend.copy_host(self.way, &self.list, self.locked, stream) }?;
        Ok([first, StreamMark::new(&self.backend, stream)?])
    }
}

fn range(at: usize, bytes: usize) -> Range<usize> {
    Range { start: at, end: at.saturating_add(bytes) }
}

impl Drop for Copies<'_> {
    fn drop(&mut self) {
        // Never for one that was enqueued: it has ended or flies.
        self.flight.abandon();
    }
}
