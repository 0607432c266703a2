//! A load under way by parts: of blocks that follow each other, the first part of all, then the next.
//!
//! Nothing is handed out but verified bytes, and a part only when all blocks have it. The first thing
//! that goes wrong ends the whole load: an engine that began with its first layers has no use for
//! most of the blocks. What had not been taken by then is dropped.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::buffer::Buffer;
use super::ticket::Missed;

/// A part of one block.
#[derive(Debug, Clone)]
pub struct Piece {
    /// The block's place in the load.
    pub block: usize,
    pub(super) slab: Arc<Buffer>,
    pub(super) at: Range<usize>,
}

impl Piece {
    /// The layers' bytes; behind the last layer's there is padding.
    pub fn bytes(&self) -> &[u8] {
        &self.slab[self.at.clone()]
    }

    /// What they are a part of, and where in it they begin: for copies to a device.
    pub fn place(&self) -> (&Buffer, usize) {
        (&self.slab, self.at.start)
    }
}

#[derive(Debug, Default)]
struct Part {
    pieces: Vec<Piece>,
    missing: usize,
}

#[derive(Debug)]
struct State {
    parts: Vec<Part>,
    failed: Option<Missed>,
}

/// The load.
#[derive(Debug, Clone)]
pub struct Arrivals {
    blocks: usize,
    shared: Arc<(Mutex<State>, Condvar)>,
}

impl Arrivals {
    pub(super) fn new(parts: usize, blocks: usize) -> Self {
        let part = || Part { pieces: Vec::new(), missing: blocks };
        let mut list = Vec::new();
        list.resize_with(parts, part);
        let state = State { parts: list, failed: None };
        Arrivals { blocks, shared: Arc::new((Mutex::new(state), Condvar::new())) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change leaves it whole.
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Blocks asked for: those that there were buffers for.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Waits until all blocks have part `n`, at most for `limit`; whether they have.
    ///
    /// # Errors
    /// Why they never will.
    pub fn wait(&self, n: usize, limit: Duration) -> Result<bool, Missed> {
        let end = Instant::now().checked_add(limit);
        let mut state = self.state();
        loop {
            if let Some(why) = state.failed {
                return Err(why);
            }
            if state.parts.get(n).is_none_or(|part| part.missing == 0) {
                return Ok(true);
            }
            let wake = &self.shared.1;
            state = match end.map(|end| end.saturating_duration_since(Instant::now())) {
                Some(Duration::ZERO) => return Ok(false),
                Some(left) => {
                    wake.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
                None => wake.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// The pieces of part `n`, where all blocks have it; the load keeps them no longer.
    ///
    /// # Errors
    /// Why it never will be there; `None` where it is not yet.
    pub fn take(&self, n: usize) -> Result<Vec<Piece>, Option<Missed>> {
        let mut state = self.state();
        match state.failed {
            Some(why) => Err(Some(why)),
            None => match state.parts.get_mut(n) {
                Some(part) if part.missing == 0 => Ok(core::mem::take(&mut part.pieces)),
                _ => Err(None),
            },
        }
    }

    /// Why what has not come never will, if it will not.
    pub fn failed(&self) -> Option<Missed> {
        self.state().failed
    }

    /// Ends the load, where it has not ended.
    pub fn cancel(&self) {
        self.fail(Missed::Cancelled);
    }

    pub(super) fn fail(&self, why: Missed) {
        let mut state = self.state();
        state.failed = state.failed.or(Some(why));
        let pieces: Vec<Vec<Piece>> =
            state.parts.iter_mut().map(|part| core::mem::take(&mut part.pieces)).collect();
        drop(state);
        // Their buffers go back to the pool without this lock.
        drop(pieces);
        self.shared.1.notify_all();
    }

    /// Verified pieces, by the number of their part.
    pub(super) fn arrive(&self, pieces: impl IntoIterator<Item = (usize, Piece)>) {
        let mut state = self.state();
        if state.failed.is_none() {
            for (n, piece) in pieces {
                let part = &mut state.parts[n];
                part.pieces.push(piece);
                part.missing -= 1;
            }
        }
        drop(state);
        self.shared.1.notify_all();
    }
}
