//! A load under way: blocks that follow each other, arriving in any order. Polled, waited for, or
//! cancelled; what has not arrived when it is given up is a miss, and does no harm when it comes.

use alloc::sync::Arc;
use alloc::vec::Vec;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::host::HostBlock;
use super::object::Label;

/// A block that is wanted.
#[derive(Debug, Clone)]
pub struct Want {
    /// Its place in the ticket.
    pub at: usize,
    /// What it must be.
    pub label: Label,
}

/// Why a block did not come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missed {
    /// The store does not have it.
    Absent,
    /// What the store gave was damaged or another block.
    Bad,
    /// The store failed, or is being left alone since it did.
    Down,
    /// The load was cancelled.
    Cancelled,
}

impl Missed {
    /// In words.
    pub const fn text(self) -> &'static str {
        match self {
            Missed::Absent => "the tier does not have a block of it any more",
            Missed::Bad => "a block of it was damaged, or another block",
            Missed::Down => "the tier failed, or is being left alone since it did",
            Missed::Cancelled => "the load was cancelled",
        }
    }
}

#[derive(Debug, Default)]
struct State {
    places: Vec<Option<Result<Arc<HostBlock>, Missed>>>,
    pending: usize,
    cancelled: bool,
}

/// The load.
#[derive(Debug, Clone)]
pub struct Ticket {
    shared: Arc<(Mutex<State>, Condvar)>,
}

impl Ticket {
    /// For `blocks` blocks.
    pub(super) fn new(blocks: usize) -> Self {
        let mut places = Vec::new();
        places.resize_with(blocks, || None);
        let state = State { places, pending: blocks, cancelled: false };
        Ticket { shared: Arc::new((Mutex::new(state), Condvar::new())) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Blocks asked for: those that there were buffers for.
    pub fn blocks(&self) -> usize {
        self.state().places.len()
    }

    /// Whether nothing more will come.
    pub fn is_done(&self) -> bool {
        self.state().pending == 0
    }

    /// Waits until nothing more will come, at most for `limit`; whether that is so.
    pub fn wait(&self, limit: Duration) -> bool {
        let end = Instant::now().checked_add(limit);
        let mut state = self.state();
        while state.pending > 0 {
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            let wake = &self.shared.1;
            state = match left {
                Some(Duration::ZERO) => return false,
                Some(left) => {
                    wake.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
                None => wake.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
        true
    }

    /// Asks for nothing more of it. Reads that have begun finish, unseen.
    pub fn cancel(&self) {
        self.state().cancelled = true;
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.state().cancelled
    }

    /// The blocks that have arrived, up to the first that has not; and why that one will not, if it
    /// will not.
    pub fn take(&self) -> (Vec<Arc<HostBlock>>, Option<Missed>) {
        let state = self.state();
        let mut blocks = Vec::new();
        for place in &state.places {
            match place {
                Some(Ok(block)) => blocks.push(block.clone()),
                Some(Err(why)) => return (blocks, Some(*why)),
                None => return (blocks, None),
            }
        }
        (blocks, None)
    }

    pub(super) fn done(&self, at: usize, block: Arc<HostBlock>) {
        self.fill(at, Ok(block));
    }

    pub(super) fn miss(&self, at: usize, why: Missed) {
        self.fill(at, Err(why));
    }

    fn fill(&self, at: usize, with: Result<Arc<HostBlock>, Missed>) {
        let mut state = self.state();
        if let Some(place @ None) = state.places.get_mut(at) {
            *place = Some(with);
            state.pending -= 1;
        }
        drop(state);
        self.shared.1.notify_all();
    }
}
