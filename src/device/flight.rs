//! Copies under way between a device and host memory, and the points of streams that say how far they
//! are. A flight is *boarding* while its copies are gathered, flies once they are enqueued, and ends
//! once.

use alloc::sync::Arc;
use core::time::Duration;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::backend::Mark;
use super::{Backend, Stream};
use crate::error::{Error, Result};

/// A point of a stream, ended when it is dropped.
#[derive(Debug)]
pub struct StreamMark {
    backend: Arc<dyn Backend>,
    mark: Mark,
}

impl StreamMark {
    /// The point after what is enqueued now.
    ///
    /// # Errors
    /// `DeviceFailed`.
    pub fn new(backend: &Arc<dyn Backend>, stream: Stream) -> Result<Self> {
        let mark = backend.mark(stream)?;
        Ok(Self { backend: backend.clone(), mark })
    }

    /// Has what is enqueued on `stream` from here on wait for it.
    ///
    /// # Errors
    /// `DeviceFailed`.
    pub fn hold(&self, stream: Stream) -> Result<()> {
        self.backend.hold(stream, self.mark)
    }
}

impl Drop for StreamMark {
    fn drop(&mut self) {
        // SAFETY: made by `new`, ended once.
        unsafe { self.backend.end_mark(self.mark) }
    }
}

/// Copies that were enqueued together.
#[derive(Debug)]
pub struct Flight {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
enum State {
    Boarding,
    /// Between two points; since when the host waits.
    Flying(Arc<[StreamMark; 2]>, Instant),
    /// How it ended, and how long it took.
    Ended(Result<()>, Duration),
}

impl Flight {
    pub(super) fn boarding() -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(State::Boarding), changed: Condvar::new() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Whole after every assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, state: State) {
        *self.state() = state;
        self.changed.notify_all();
    }

    /// Its copies are enqueued between these points, which took the host since `begin`.
    pub(super) fn fly(&self, between: [StreamMark; 2], begin: Instant) {
        self.set(State::Flying(Arc::new(between), begin));
    }

    /// It ends without more of it being under way.
    pub(super) fn end(&self, result: Result<()>) {
        self.set(State::Ended(result, Duration::ZERO));
    }

    /// It was not enqueued, and never will be.
    pub(super) fn abandon(&self) {
        let mut state = self.state();
        if matches!(*state, State::Boarding) {
            let why = "copies were given up before they were enqueued";
            *state = State::Ended(Err(Error::DeviceFailed { call: "copy", why }), Duration::ZERO);
            self.changed.notify_all();
        }
    }

    /// How it ended; `None` while it is under way. Waits for nothing.
    pub fn poll(&self) -> Option<Result<()>> {
        let mut state = self.state();
        match &*state {
            State::Boarding => None,
            State::Ended(result, _) => Some(*result),
            State::Flying(between, begin) => {
                let result = match between[1].backend.has_passed(between[1].mark) {
                    Ok(false) => return None,
                    Ok(true) => Ok(()),
                    Err(error) => Err(error),
                };
                let ended = State::Ended(result, duration(between, *begin));
                *state = ended;
                Some(result)
            }
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// `DeviceFailed` where copies of it failed.
    pub fn wait(&self) -> Result<()> {
        let mut state = self.state();
        let (between, begin) = loop {
            match &*state {
                State::Boarding => {
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                State::Ended(result, _) => return *result,
                State::Flying(between, begin) => break (between.clone(), *begin),
            }
        };
        // Others look at the state meanwhile, and do not wait.
        drop(state);
        let result = between[1].backend.wait(between[1].mark);
        let mut state = self.state();
        if let State::Ended(result, _) = &*state {
            return *result;
        }
        *state = State::Ended(result, duration(&between, begin));
        result
    }

    /// Has what is enqueued on `stream` from here on wait for it; whether it had to. One that is
    /// boarding is not waited for.
    ///
    /// # Errors
    /// `DeviceFailed`, also where it has failed.
    pub(super) fn hold(&self, stream: Stream) -> Result<()> {
        match &*self.state() {
            State::Boarding => Ok(()),
            State::Ended(result, _) => *result,
            State::Flying(between, _) => between[1].hold(stream),
        }
    }

    /// How long its copies took, from when they could begin: as the device says, or, of one that notes
    /// no times, the host. `None` before it ended well.
    pub fn duration(&self) -> Option<Duration> {
        match &*self.state() {
            State::Ended(Ok(()), time) => Some(*time),
            _ => None,
        }
    }
}

fn duration(between: &[StreamMark; 2], begin: Instant) -> Duration {
    let [from, to] = between;
    let seconds = to.backend.seconds_between(from.mark, to.mark);
    let seconds = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.unwrap_or_else(|| begin.elapsed())
}
