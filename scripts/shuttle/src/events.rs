//! A cache that stores and removes blocks, and a publisher that takes what is queued, with room for
//! so little that events are lost: nobody hangs, and at the end the consumer believes in no block
//! that is gone, and in all that are there where the last loss was made good.

use std::collections::BTreeSet;
use std::time::Duration;

use kvcache::events::AttentionKind;
pub use kvcache::events::{Event, Medium, Name, Shape};
use kvcache::ids::Namespace;
use kvcache::prefix::Digest;
use shuttle::thread;

#[allow(dead_code, reason = "the publisher uses more of it")]
#[path = "../../../src/events/queue.rs"]
mod queue;
mod sync {
    pub use shuttle::sync::{Condvar, Mutex, MutexGuard};
    pub use std::sync::PoisonError;
}

use queue::{Batch, Queue, Taken};

const PLACE: (Medium, u32, Namespace) = (Medium::Gpu, 0, Namespace(0));

fn digest(block: u8) -> Digest {
    Digest([block; 32])
}

/// What a cache does in each call: tells all anew where that is asked for, then what changed.
fn call(queue: &Queue, resident: &mut BTreeSet<u8>, store: &[u8], remove: &[u8]) {
    let mut locked = queue.lock();
    if locked.wants_resync() {
        locked.restart();
        for &block in resident.iter() {
            locked.stored(PLACE, None, &[digest(block)], &[0]);
        }
    }
    for &block in store {
        resident.insert(block);
        locked.stored(PLACE, None, &[digest(block)], &[0]);
    }
    for block in remove {
        resident.remove(block);
        locked.removed(Medium::Gpu, 0, digest(*block));
    }
}

fn model() {
    let shape = Shape { block_tokens: 1, groups: vec![AttentionKind::Full] };
    let queue = Queue::new(shape, 3).unwrap();
    let source = queue.clone();
    let publisher = thread::spawn(move || {
        let (mut known, mut batch) = (BTreeSet::new(), Batch::default());
        loop {
            match source.take(&mut batch) {
                Taken::Stopped => return known,
                Taken::Lost => known.clear(),
                Taken::Events => {
                    for event in batch.events() {
                        match event {
                            Event::Stored { digests, .. } => known.extend(digests.to_vec()),
                            Event::Removed { digests, .. } => {
                                digests.iter().for_each(|gone| _ = known.remove(gone));
                            }
                            Event::Cleared => known.clear(),
                        }
                    }
                }
            }
            source.rest(Duration::from_millis(1));
        }
    });
    let mut resident = BTreeSet::new();
    call(&queue, &mut resident, &[1, 2], &[]);
    call(&queue, &mut resident, &[3], &[1]);
    thread::yield_now();
    call(&queue, &mut resident, &[], &[2]);
    call(&queue, &mut resident, &[4], &[3]);
    let stats = queue.stats();
    assert!(stats.queued_blocks <= stats.capacity_blocks);
    queue.stop();
    let known = publisher.join().unwrap();
    let resident: BTreeSet<_> = resident.into_iter().map(digest).collect();
    assert!(known.is_subset(&resident), "{known:?} are not all among {resident:?}");
    if stats.losses == 0 {
        assert_eq!(known, resident);
    }
}

pub fn check() {
    super::explore("events: a cache and its publisher", model);
}
