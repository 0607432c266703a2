//! The one thread that takes events out of the queue, numbers them and hands them to the sinks.
//!
//! Messages are numbered from 0, one up each; a number that no message carries says that events
//! were lost there. No lock is held while a sink works, so a sink may call the cache. A sink that
//! does not return holds up the others, and nothing else.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use std::thread::{self, JoinHandle};
use std::time::SystemTime;

use super::queue::{Batch, Events, Queue, Taken};
use super::{Event, Name, Shape};
use crate::error::{Error, Result};
use crate::ids::Namespace;

/// Blocks of one message, if it is more than one event.
const MAX_MESSAGE_BLOCKS: usize = 4096;
/// How long events gather after some were published: so that they are few messages, and the cache
/// does not wake a thread for each.
const REST: Duration = Duration::from_millis(1);

/// Events that are published together.
#[derive(Debug, Clone)]
pub struct Message<'a> {
    /// Its number.
    pub seq: u64,
    /// Seconds since 1970.
    pub time: f64,
    /// What all events share.
    pub shape: &'a Shape,
    pub(super) queue: &'a Queue,
    pub(super) events: Option<Events<'a>>,
}

impl<'a> Message<'a> {
    /// How many events it has, at least one.
    pub fn len(&self) -> usize {
        self.events.as_ref().map_or(1, Events::len)
    }

    /// Never.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What is known of a namespace beside its number.
    pub fn name(&self, space: Namespace) -> Option<Arc<Name>> {
        self.queue.name(space)
    }

    /// The events in their order.
    pub fn events(&self) -> impl Iterator<Item = Event<'a>> {
        // A message without a batch says that everything is cleared.
        let cleared = self.events.is_none().then_some(Event::Cleared);
        cleared.into_iter().chain(self.events.clone().into_iter().flatten())
    }
}

/// Where messages go.
pub trait Sink: Send {
    /// Takes a message; what it borrows is gone afterwards.
    fn publish(&mut self, message: &Message);
}

impl<F: FnMut(&Message) + Send> Sink for F {
    fn publish(&mut self, message: &Message) {
        self(message);
    }
}

/// The publishing thread of a queue. Dropping it publishes what is queued and ends the thread.
#[derive(Debug)]
pub struct Publisher {
    queue: Arc<Queue>,
    next_seq: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Publisher {
    /// Starts the thread. A queue has one publisher in its life.
    ///
    /// # Errors
    /// `OutOfMemory` where the system refuses a thread.
    pub fn start(queue: Arc<Queue>, sinks: Vec<Box<dyn Sink>>) -> Result<Self> {
        let next_seq = Arc::new(AtomicU64::new(0));
        let (source, seq) = (queue.clone(), next_seq.clone());
        let body = move || run(&source, &seq, sinks);
        let thread = thread::Builder::new().name("kvcache-events".into()).spawn(body);
        let thread = Some(thread.map_err(|_| Error::OutOfMemory { bytes: 0 })?);
        Ok(Publisher { queue, next_seq, thread })
    }

    /// The number of the next message.
    pub fn next_seq(&self) -> u64 {
        self.next_seq.load(Ordering::Relaxed)
    }

    /// Whether the caller is this publisher's thread, that is, one of its sinks.
    pub fn is_current_thread(&self) -> bool {
        let own = self.thread.as_ref().map(|handle| handle.thread().id());
        own == Some(thread::current().id())
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.queue.stop();
        // From a sink there is nothing to wait for: the thread ends when the sink returns.
        if !self.is_current_thread()
            && let Some(thread) = self.thread.take()
        {
            // A sink that panicked has ended it already.
            let _ = thread.join();
        }
    }
}

fn run(queue: &Queue, next_seq: &AtomicU64, mut sinks: Vec<Box<dyn Sink>>) {
    let (mut batch, mut seq) = (Batch::default(), 0);
    let mut publish = |events: Option<Events>, seq: &mut u64| {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let (time, shape) = (now.as_secs_f64(), queue.shape());
        let message = Message { seq: *seq, time, shape, queue, events };
        for sink in &mut sinks {
            sink.publish(&message);
        }
        *seq += 1;
        next_seq.store(*seq, Ordering::Relaxed);
    };
    loop {
        match queue.take(&mut batch) {
            Taken::Stopped => return,
            Taken::Lost => {
                // The number of what was lost.
                seq += 1;
                publish(None, &mut seq);
            }
            Taken::Events => {
                let mut events = batch.events();
                while events.len() > 0 {
                    let front = events.split_front(MAX_MESSAGE_BLOCKS);
                    publish(Some(front), &mut seq);
                }
            }
        }
        queue.refill();
        queue.rest(REST);
    }
}
