//! Buffers for objects: page-aligned, all of one size, used again and again, and never more of them
//! than was agreed. Being out of buffers is what slows the tiers down, so it is an answer.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};

const ALIGN: usize = 4096;

/// The pool.
#[derive(Debug)]
pub struct Buffers {
    bytes: usize,
    limit: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    free: Vec<Raw>,
    made: usize,
}

/// Bytes that begin at a page.
struct Raw {
    memory: Vec<u8>,
    start: usize,
}

impl fmt::Debug for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Raw").field("bytes", &self.memory.len()).finish()
    }
}

impl Buffers {
    /// A pool of at most `limit` buffers of `bytes` bytes, made as they are needed.
    pub fn new(bytes: usize, limit: usize) -> Arc<Self> {
        Arc::new(Self { bytes, limit, state: Mutex::default() })
    }

    /// Bytes of each buffer.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Buffers that exist, and how many of them nobody uses.
    pub fn counts(&self) -> (usize, usize) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        (state.made, state.free.len())
    }

    /// Buffers that can be had now.
    pub fn spare(&self) -> usize {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.limit - state.made + state.free.len()
    }

    /// A buffer with whatever it held before.
    ///
    /// # Errors
    /// `OutOfMemory` where all are in use, or the system refuses one.
    pub fn take(self: &Arc<Self>) -> Result<Buffer> {
        let refused = Error::OutOfMemory { bytes: self.bytes as u64 };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
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
        Ok(Buffer { raw: Some(Raw { memory, start }), pool: self.clone() })
    }
}

/// A buffer; dropped, it goes back to its pool.
#[derive(Debug)]
pub struct Buffer {
    /// `None` only while it is being dropped.
    raw: Option<Raw>,
    pool: Arc<Buffers>,
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.raw.as_ref().map_or(&[], |raw| &raw.memory[raw.start..raw.start + self.pool.bytes])
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        let bytes = self.pool.bytes;
        self.raw.as_mut().map_or(&mut [], |raw| &mut raw.memory[raw.start..raw.start + bytes])
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(raw) = self.raw.take() {
            let mut state = self.pool.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.free.push(raw);
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
