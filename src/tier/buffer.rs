//! Buffers for objects: page-aligned, all of one size, used again and again, and never more of them
//! than was agreed. Being out of buffers is what slows the tiers down, so it is an answer.
//!
//! Those of a cache on a device are made at once, in large pieces: locking pages takes long and may stop
//! the device for that time, which no step is to pay for. Of such a buffer the device may still be
//! reading or writing what its last user enqueued: it waits aside until that has been done.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::device::{Backend, HostPart};
use crate::error::{Error, Result};

const ALIGN: usize = 4096;
/// The most bytes of an allocation for several buffers.
const PIECE_BYTES: usize = 256 << 20;

/// The pool.
#[derive(Debug)]
pub struct Buffers {
    bytes: usize,
    limit: usize,
    locked: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    free: Vec<Raw>,
    /// Given back, and the device is still at them.
    lent: Vec<Raw>,
    made: usize,
}

impl State {
    /// Takes back what the device has done with.
    fn reap(&mut self) {
        let mut n = 0;
        while n < self.lent.len() {
            match self.lent[n].is_lent() {
                true => n += 1,
                // There is room: made with the buffer.
                false => self.free.push(self.lent.swap_remove(n)),
            }
        }
    }
}

enum Raw {
    /// Bytes that begin at a page.
    Plain { memory: Vec<u8>, start: usize },
    /// Memory that a device copies from and to.
    Part(HostPart),
}

impl Raw {
    fn is_lent(&self) -> bool {
        matches!(self, Raw::Part(part) if part.is_lent())
    }
}

impl fmt::Debug for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Raw::Plain { memory, .. } => {
                f.debug_struct("Raw").field("bytes", &memory.len()).finish()
            }
            Raw::Part(part) => part.fmt(f),
        }
    }
}

impl Buffers {
    /// A pool of at most `limit` buffers of `bytes` bytes, made as they are needed.
    pub fn new(bytes: usize, limit: usize) -> Arc<Self> {
        Arc::new(Self { bytes, limit, locked: false, state: Mutex::default() })
    }

    /// A pool of `limit` buffers of `bytes` bytes (whole pages), all made now, for copies from and to a
    /// device; where `locked`, of the memory that the device copies by itself.
    ///
    /// # Errors
    /// `OutOfMemory` where not all can be had: of page-locked memory there is less than of other.
    pub fn on(
        backend: &Arc<dyn Backend>,
        bytes: usize,
        limit: usize,
        locked: bool,
    ) -> Result<Arc<Self>> {
        let all = (bytes as u64).saturating_mul(limit as u64);
        let refused = Error::OutOfMemory { bytes: all };
        let mut state = State::default();
        for list in [&mut state.free, &mut state.lent] {
            list.try_reserve_exact(limit).map_err(|_| refused)?;
        }
        while state.made < limit {
            let count = (PIECE_BYTES / bytes.max(1)).clamp(1, limit - state.made);
            let parts = HostPart::allocate(backend, bytes, count, locked);
            // What is missing in the end is all of it: none of it can be used.
            let parts = parts.map_err(|error| match error {
                Error::OutOfMemory { .. } => refused,
                other => other,
            })?;
            state.free.extend(parts.map(Raw::Part));
            state.made += count;
        }
        let locked = locked && backend.locks_pages();
        Ok(Arc::new(Self { bytes, limit, locked, state: Mutex::new(state) }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of each buffer.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether they are page-locked memory of a device.
    pub fn are_locked(&self) -> bool {
        self.locked
    }

    /// Buffers that exist, and how many of them nobody uses, a device included.
    pub fn counts(&self) -> (usize, usize) {
        let mut state = self.state();
        state.reap();
        (state.made, state.free.len())
    }

    /// Buffers that can be had now.
    pub fn spare(&self) -> usize {
        let (made, free) = self.counts();
        self.limit - made + free
    }

    /// A buffer with whatever it held before.
    ///
    /// # Errors
    /// `OutOfMemory` where all are in use, or the system refuses one.
    pub fn take(self: &Arc<Self>) -> Result<Buffer> {
        let refused = Error::OutOfMemory { bytes: self.bytes as u64 };
        let mut state = self.state();
        state.reap();
        if let Some(raw) = state.free.pop() {
            return Ok(Buffer { raw: Some(raw), pool: self.clone() });
        }
        if state.made == self.limit {
            return Err(refused);
        }
        // Room to take it back is made here, where it may fail.
        let more = state.made + 1 - state.free.len();
        state.free.try_reserve(more).map_err(|_| refused)?;
        let mut memory = Vec::new();
        memory.try_reserve_exact(self.bytes + ALIGN).map_err(|_| refused)?;
        memory.resize(self.bytes + ALIGN, 0);
        let start = memory.as_ptr().align_offset(ALIGN);
        state.made += 1;
        Ok(Buffer { raw: Some(Raw::Plain { memory, start }), pool: self.clone() })
    }
}

/// A buffer; dropped, it goes back to its pool. Its bytes are what the device was last to write there:
/// who looks at them waits for that.
#[derive(Debug)]
pub struct Buffer {
    /// `None` only while it is being dropped.
    raw: Option<Raw>,
    pool: Arc<Buffers>,
}

impl Buffer {
    /// Whether a device is still copying from it or to it. Waits for nothing.
    pub fn is_lent(&self) -> bool {
        self.raw.as_ref().is_some_and(Raw::is_lent)
    }

    /// Waits until what a device was to write is there.
    ///
    /// # Errors
    /// `DeviceFailed` where it never will be.
    pub fn arrived(&self) -> Result<()> {
        self.part().map_or(Ok(()), HostPart::arrived)
    }

    /// What a device copies from; `None` where no device does.
    pub fn part(&self) -> Option<&HostPart> {
        match &self.raw {
            Some(Raw::Part(part)) => Some(part),
            _ => None,
        }
    }

    /// What a device copies to.
    pub fn part_mut(&mut self) -> Option<&mut HostPart> {
        match &mut self.raw {
            Some(Raw::Part(part)) => Some(part),
            _ => None,
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.raw {
            Some(Raw::Plain { memory, start }) => &memory[*start..*start + self.pool.bytes],
            Some(Raw::Part(part)) => part,
            None => &[],
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.raw {
            Some(Raw::Plain { memory, start }) => &mut memory[*start..*start + self.pool.bytes],
            Some(Raw::Part(part)) => part,
            None => &mut [],
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(raw) = self.raw.take() {
            let lent = raw.is_lent();
            let mut state = self.pool.state();
            if lent { state.lent.push(raw) } else { state.free.push(raw) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_bounded_and_used_again() {
        let pool = Buffers::new(12_288, 2);
        let (mut a, b) = (pool.take().unwrap(), pool.take().unwrap());
        assert_eq!(a.as_ptr().align_offset(4096), 0);
        assert_eq!((a.len(), b.len()), (12_288, 12_288));
        assert!(matches!(pool.take(), Err(Error::OutOfMemory { bytes: 12_288 })));
        a[12_287] = 9;
        drop(a);
        assert_eq!(pool.counts(), (2, 1));
        assert_eq!(pool.take().unwrap()[12_287], 9);
        assert!(Buffers::new(usize::MAX - 4096, 1).take().is_err());
    }
}
