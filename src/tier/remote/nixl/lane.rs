//! A thread with an agent of its own, for calls that may take longer than anybody waits for them: a
//! file system that hangs, a server that does not answer. Who asked goes on when the time is up; the
//! thread is left to end by itself when the call returns, and what it works on is its own.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use core::ffi::CStr;
use core::fmt;
use core::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;
use std::vec::Vec;

use super::agent::Agent;
use crate::error::{Error, Result};

/// Threads of a store, those that were left alone included.
const MOST: usize = 64;

/// What agents are made with.
pub(super) struct Recipe {
    pub plugin: &'static CStr,
    pub parameters: Vec<(&'static str, String)>,
    /// Threads that there are.
    lanes: AtomicUsize,
}

impl fmt::Debug for Recipe {
    /// Without the parameters, among which are secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Recipe").field(&self.plugin).finish()
    }
}

impl Recipe {
    pub fn new(plugin: &'static CStr, parameters: Vec<(&'static str, String)>) -> Self {
        Self { plugin, parameters, lanes: AtomicUsize::new(0) }
    }

    fn agent(&self) -> Result<Agent> {
        static MADE: AtomicUsize = AtomicUsize::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let name = alloc::format!("kvcache-{}-{number}", std::process::id());
        Agent::new(&name, self.plugin, &self.parameters)
    }
}

/// What a call runs with.
pub(super) struct Worker {
    recipe: Arc<Recipe>,
    agent: Option<Agent>,
}

impl Worker {
    /// The agent, made when it is first asked for.
    ///
    /// # Errors
    /// Those of [`Agent::new`].
    pub fn agent(&mut self) -> Result<&mut Agent> {
        if self.agent.is_none() {
            self.agent = Some(self.recipe.agent()?);
        }
        self.agent.as_mut().ok_or(Error::Panic)
    }

    /// Ends the agent, and with it whatever of a transfer that failed may be under way.
    pub fn end_agent(&mut self) {
        self.agent = None;
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.recipe.lanes.fetch_sub(1, Ordering::AcqRel);
    }
}

type Call = Box<dyn FnOnce(&mut Worker) + Send>;

/// The thread. Dropped it is waited for, which only a lane that does nothing may be.
pub(super) struct Lane {
    calls: Option<Sender<Call>>,
    thread: Option<JoinHandle<()>>,
    /// Memory that calls move bytes through; it goes there and comes back.
    pub staging: Vec<u8>,
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane").field("staging", &self.staging.len()).finish_non_exhaustive()
    }
}

impl Lane {
    /// None where there are as many as there may be, or the system has no thread.
    pub fn new(recipe: &Arc<Recipe>) -> Option<Self> {
        let room = |lanes| (lanes < MOST).then_some(lanes + 1);
        recipe.lanes.fetch_update(Ordering::AcqRel, Ordering::Acquire, room).ok()?;
        let mut worker = Worker { recipe: recipe.clone(), agent: None };
        let (calls, queue): (_, Receiver<Call>) = channel();
        let thread = std::thread::Builder::new()
            .name("kvcache-nixl".into())
            .spawn(move || queue.into_iter().for_each(|call| call(&mut worker)))
            .ok()?;
        Some(Self { calls: Some(calls), thread: Some(thread), staging: Vec::new() })
    }

    /// Runs a call and waits for it until `deadline`: the lane again with what it came to, or neither.
    pub fn call<T: Send + 'static>(
        self,
        deadline: Instant,
        call: impl FnOnce(&mut Worker) -> T + Send + 'static,
    ) -> Option<(Self, T)> {
        let (answer, answered) = channel();
        let call: Call = Box::new(move |worker| drop(answer.send(call(worker))));
        let sent = self.calls.as_ref().is_some_and(|calls| calls.send(call).is_ok());
        let left = deadline.saturating_duration_since(Instant::now());
        match sent.then(|| answered.recv_timeout(left)) {
            Some(Ok(result)) => Some((self, result)),
            _ => {
                self.leave();
                None
            }
        }
    }

    /// Lets the thread end when it can.
    fn leave(mut self) {
        drop(self.thread.take());
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        drop(self.calls.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
